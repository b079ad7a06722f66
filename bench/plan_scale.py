#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long the controller plans 1, 10, 50 and 200 hosts, beyond the gathering of facts.

Each host takes over the facts of a two-socket machine, as the collection's parsers give them; a playbook then plans and
judges each, and shows all. ``seconds_N`` is what that takes beyond a run that ends with the facts, ``whole_N`` the
whole run with the start of Ansible. The two runs take turns.

    python3 -m bench.plan_scale
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import record

sys.path.insert(0, str(record.CLONE / ".collections"))

from ansible_collections.cpullm.epyc.plugins.module_utils import _manifest

from tests.support.golden import MACHINES
from tests.unit.test_plan import manifest

COUNTS = (1, 10, 50, 200)
MACHINE = "two-sockets"


def playbook(folder: Path, name: str, count: int) -> tuple[float, str]:
    """Return the seconds and the output of a playbook over that many hosts; raises RuntimeError."""
    command = ["ansible-playbook", "-i", str(folder / "hosts.ini"), str(record.CLONE / "bench" / name)]
    command += ["-e", f"bench_facts={folder / 'facts.json'}", "-e", f"bench_lock={folder / 'lock.json'}"]
    command += ["--limit", f"many[0:{count - 1}]"]
    # As it is without settings: a cache of facts on disk reads a host's facts for each of its tasks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_CACHE_")}
    environment["ANSIBLE_CONFIG"] = str(record.CLONE / "ansible.cfg")
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=record.CLONE,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(f"{name}: ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, done.stdout


def prepare(folder: Path) -> None:
    """Write inventory, lock and facts."""
    hosts = "\n".join(f"host{number}" for number in range(max(COUNTS)))
    (folder / "hosts.ini").write_text(f"[many]\n{hosts}\n", encoding="utf-8")
    (folder / "lock.json").write_text(_manifest.lock_text(manifest()), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(MACHINES[MACHINE].facts()), encoding="utf-8")


def run(folder: Path, count: int) -> tuple[float, float]:
    """Return the seconds with which that many hosts had their facts, and were planned; raises RuntimeError."""
    seconds = []
    # One task more shows all hosts at once.
    for name, tasks in (("plan_scale_facts.yml", count), ("plan_scale.yml", 3 * count + 1)):
        taken, output = playbook(folder, name, count)
        seconds.append(taken)
        done = sum(int(number) for number in re.findall(r" : ok=(\d+) ", output))
        if done != tasks:
            raise RuntimeError(f"{name}: {done} of {tasks} tasks done\n{output[-2000:]}")
    return seconds[0], seconds[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, the counts taking turns, print each run, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each count")
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/")
    options = parser.parse_args(argv)
    seconds: dict[int, list[tuple[float, float]]] = {count: [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for number in range(options.runs):
            for count, values in seconds.items():
                values.append(run(Path(name), count))
                facts, whole = values[-1]
                print(
                    f"{number + 1}/{options.runs} {count} hosts: {whole:.2f} s, {whole - facts:.2f} to plan", flush=True
                )
    figures: dict[str, float] = {}
    for count, values in seconds.items():
        figures |= record.spread(f"seconds_{count}", [whole - facts for facts, whole in values])
        figures |= record.spread(f"whole_{count}", [whole for _facts, whole in values])
    record.keep(
        "plan-scale", ["python3", "-m", "bench.plan_scale", "--runs", str(options.runs)], figures, options.output
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
