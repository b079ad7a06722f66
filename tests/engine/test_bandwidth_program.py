# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""cpullm-bandwidth as the build installs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from ansible_collections.cpullm.epyc.plugins.module_utils import _bandwidth, _numa


def test_the_build_holds_the_program_and_it_measures(engine: Path) -> None:
    record = json.loads((engine.parent / "BUILD.json").read_text(encoding="utf-8"))
    assert [program["name"] for program in record["programs"]] == ["cpullm-bandwidth"]
    cpus = _numa.format_cpulist(os.sched_getaffinity(0))
    command = _bandwidth.arguments(str(engine / "cpullm-bandwidth"), cpus, 0.5)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = _bandwidth.read_answer(done.returncode, done.stdout, done.stderr)
    assert found.threads == len(os.sched_getaffinity(0))
    assert json.loads(done.stdout)["isa"] == record["isa"]
