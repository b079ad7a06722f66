# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Figures of fuzzing stay as long as what was fuzzed is the same."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from bench import record
from tools import fuzz

MODULES = "plugins/module_utils/"


@pytest.mark.parametrize(
    ("target", "inside", "outside"),
    [
        pytest.param("gguf", {"_gguf", "_manifest", "_text"}, {"_plan", "_numa"}, id="follows-imports"),
        pytest.param("smbios", {"_smbios", "_judgement", "_plan"}, {"_grub"}, id="follows-helpers"),
        pytest.param("engine", {"_engine"}, {"_gguf", "_plan", "_smbios"}, id="helper-by-name"),
    ],
)
def test_sources_of_a_target(target: str, inside: set[str], outside: set[str]) -> None:
    found = fuzz.sources(target)
    assert found >= {f"{MODULES}{name}.py" for name in inside} | {"tests/fuzz/targets.py"}
    assert not found & {f"{MODULES}{name}.py" for name in outside}


@pytest.mark.parametrize(
    ("changed", "machine", "kept"),
    [
        pytest.param([], {}, {"gguf_runs": 1, "smbios_runs": 2}, id="nothing-changed"),
        pytest.param([f"{MODULES}_smbios.py"], {}, {"gguf_runs": 1}, id="one-parser"),
        pytest.param(["docs/plan.md"], {}, {"gguf_runs": 1, "smbios_runs": 2}, id="nothing-of-it"),
        pytest.param(["tests/fuzz/run.py"], {}, {}, id="the-harness"),
        pytest.param([], {"cpu": "another"}, {}, id="another-machine"),
    ],
)
def test_figures_that_still_hold(
    changed: list[str], machine: dict[str, Any], kept: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 0, stdout="".join(f"{path}\n" for path in changed), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_command, **_options: done)
    before = {
        "commit": "ab" * 20,
        "machine": {**record.machine(), **machine},
        "figures": {"gguf_runs": 1, "smbios_runs": 2, "gone_runs": 3},
    }
    assert fuzz.still_true(before) == kept


def test_figures_of_an_unknown_commit_do_not_hold() -> None:
    assert fuzz.still_true({"commit": "00" * 20, "machine": record.machine(), "figures": {"gguf_runs": 1}}) == {}
