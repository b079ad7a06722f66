# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a playbook as an operator does, and say which tasks changed or failed on which hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
TASK = re.compile(r"^(?:TASK|RUNNING HANDLER) \[(.*)\] \**$")
RESULT = re.compile(r"^(changed|failed|fatal): \[([^\]]+?)(?: -> [^\]]+)?\]")


@dataclass
class Run:
    """What a run did: exit status, output, and task names by host."""

    status: int
    output: str
    changed: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)


def read(status: int, output: str) -> Run:
    """Return a run from what ansible-playbook printed."""
    run, task = Run(status, output), ""
    for line in output.splitlines():
        if match := TASK.match(line):
            task = match[1]
        elif match := RESULT.match(line):
            kind = run.changed if match[1] == "changed" else run.failed
            tasks = kind.setdefault(match[2], [])
            if task not in tasks:
                tasks.append(task)
    return run


def play(inventory: str, *words: str, playbook: str = "site.yml") -> Run:
    """Run a playbook of the clone against an inventory, its output shown and returned."""
    argv = ["ansible-playbook", playbook, "--inventory", inventory, *words]
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
    }
    with subprocess.Popen(
        argv, cwd=CLONE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    return read(process.returncode, "".join(lines))
