#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Print the kept results of bench/results/ as a table, each with the machine that it ran on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values, a figure's spread behind it."""
    values = result["figures"]
    lines = []
    for name, value in values.items():
        if name.endswith(("_min", "_max")) and name[:-4] in values:
            continue
        low, high = values.get(f"{name}_min"), values.get(f"{name}_max")
        spread = f"   ({low:g} to {high:g})" if low is not None and high is not None else ""
        lines.append((name, f"{value:g}{spread}"))
    return lines


def main() -> int:
    """Print every result."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        print("no results yet: make bench")
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = result["machine"]
        print(f"{result['name']}   {result['date']}   {result['commit'][:12]}")
        print(f"  {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}")
        print(f"  {result['command']}")
        lines = figures(result)
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            print(f"    {name.ljust(width)}  {value}")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
