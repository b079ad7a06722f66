# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make or remove the platforms of a molecule scenario as hosts of the lab.

usage: platforms.py up|down INVENTORY < platforms.json

The platforms come as molecule.yml lists them; INVENTORY is written for Ansible and testinfra. Containers start side by
side, VMs one after the other: each of them takes all CPUs of a small machine.
"""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[2]

# Keys of a platform that become options of 'lab up'; a list repeats its option.
OPTIONS = {
    "kind": "--kind",
    "release": "--release",
    "cpus": "--cpus",
    "memory_gib": "--memory-gib",
    "pages": "--pages",
    "firmware": "--firmware",
    "forwards": "--forward",
    "binds": "--bind",
}
# Keys that are molecule's own.
OTHERS = ("name", "groups", "children")


def up_words(platform: dict[str, Any]) -> list[str]:
    """Return the lab's command that makes a platform; raise ValueError on a key that means nothing."""
    unknown = sorted(set(platform) - set(OPTIONS) - set(OTHERS))
    if unknown:
        known = ", ".join([*OPTIONS, *OTHERS])
        raise ValueError(f"platform {platform.get('name')!r}: unknown {', '.join(unknown)}; expected some of {known}")
    words = ["up", str(platform["name"])]
    for key, option in OPTIONS.items():
        value = platform.get(key, "container" if key == "kind" else None)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += [option, str(one)]
    return words


def lab(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one command of the lab."""
    argv = [sys.executable, "-m", "lab", *words]
    return subprocess.run(argv, cwd=CLONE, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def run_all(commands: list[list[str]], side_by_side: int) -> list[str]:
    """Run commands of the lab and return what those that failed said."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, side_by_side)) as pool:
        return [done.stderr.strip() for done in pool.map(lab, commands) if done.returncode != 0]


def main() -> int:
    """Do what the command line says and return the exit status."""
    action, inventory = sys.argv[1], Path(sys.argv[2])
    platforms = json.load(sys.stdin)
    names = [str(platform["name"]) for platform in platforms]
    if action == "down":
        failed = run_all([["down", name] for name in names], len(names))
        inventory.unlink(missing_ok=True)
    else:
        try:
            commands = [up_words(platform) for platform in platforms]
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        virtual = [words for words in commands if "vm" in words]
        failed = run_all([words for words in commands if words not in virtual], 4) or run_all(virtual, 1)
        if not failed:
            listing = lab(["inventory", *names])
            inventory.parent.mkdir(parents=True, exist_ok=True)
            inventory.write_text(listing.stdout, encoding="utf-8")
            failed = [listing.stderr] if listing.returncode != 0 else []
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
