# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the figures of a measurement with the machine, the commit and the command that they came from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parent.parent
RESULTS = CLONE / "bench" / "results"


def machine() -> dict[str, Any]:
    """Return what the results depend on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu[1] if cpu else "unknown",
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30), 1),
        "kernel": platform.release(),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest of values under the names that the results have."""
    return {
        name: round(statistics.median(values), 3),
        f"{name}_min": round(min(values), 3),
        f"{name}_max": round(max(values), 3),
    }


def commit() -> str:
    """Return the commit that the clone is at, or an empty text outside of a clone."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CLONE, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def changed_since(before: Mapping[str, Any]) -> set[str] | None:
    """Return the files that differ from those that a result came from; None where this machine or clone is another."""
    command = ["git", "diff", "--name-only", before["commit"]]
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, check=False)
    if before["machine"] != machine() or not before["commit"] or done.returncode:
        return None
    return set(done.stdout.splitlines())


def keep(name: str, command: Sequence[str], figures: dict[str, float], output: Path | None = None) -> Path:
    """Write the results, to ``bench/results/NAME.json`` by default, and return where they are."""
    result = {
        "name": name,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(),
        "command": shlex.join(command),
        "figures": figures,
    }
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
