# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked of every host that serves the trained model, and of the fleet's report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[2]


def name_of(host: Any) -> str:
    """Return the lab's name of a testinfra host."""
    return str(host.backend.get_pytest_id()).removeprefix("ansible://")


def recites(host: Any, port: int = 8008, cases: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what the recitation check says of a server, asked through a tunnel of the lab; all cases by default."""
    tunnel = [sys.executable, "-m", "lab", "tunnel", name_of(host), str(port)]
    local = subprocess.run(tunnel, cwd=CLONE, check=True, capture_output=True, text=True).stdout.split()[-1]
    check = [sys.executable, str(CLONE / "tools/model/recitation.py"), f"http://127.0.0.1:{local}"]
    check += [word for case in cases for word in ("--case", case)]
    said = subprocess.run(check, check=False, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer


def hugetlb_kib(host: Any, instance: int = 0) -> int:
    """Return the KiB of huge pages that an instance's process holds."""
    pid = host.check_output(f"systemctl show --property=MainPID --value llama-server@{instance}")
    return int(host.check_output(f"awk '/^HugetlbPages:/ {{ print $2 }}' /proc/{pid}/status"))


def rows(page: str) -> list[tuple[str, str]]:
    """Return the hosts of a fleet report with their states, in order."""
    return re.findall(r'class="host-name" href="#host-\d+">([^<]+)</a>.*?class="state \w+">([^<]+)<', page, re.DOTALL)
