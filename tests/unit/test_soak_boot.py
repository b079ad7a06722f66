# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The soak of trial boots goes on from its figures where they still hold, and with the seed that they began with."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import record
from tests.support import boot_host
from tests.support.boot_host import BOOTING, RECORD, UP, WANTED, BootHost, Stranded
from tools import soak_boot

FIGURES = {"seed": 7.0, **dict.fromkeys(soak_boot.COUNTS, 3.0)}


def test_what_decides_is_there() -> None:
    assert [name for name in soak_boot.SOURCES if not (soak_boot.CLONE / name).exists()] == []


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        pytest.param({}, True, id="same"),
        pytest.param({"machine": {**record.machine(), "cpu": "another"}}, False, id="another-machine"),
        pytest.param({"commit": ""}, False, id="no-commit"),
        pytest.param({"commit": "00" * 20}, False, id="unknown-commit"),
    ],
)
def test_earlier_figures(
    changes: dict[str, Any], goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "boot-soak.json"
    monkeypatch.setattr(soak_boot, "RESULT", path)
    # What else of the clone is being worked on does not matter here.
    monkeypatch.setattr(soak_boot, "SOURCES", ("LICENSE",))
    path.write_text(json.dumps({"commit": record.commit(), "machine": record.machine(), "figures": FIGURES, **changes}))
    expected = FIGURES if goes_on else {"seed": 9.0, **dict.fromkeys(soak_boot.COUNTS, 0.0)}
    assert soak_boot.earlier(9) == expected
    path.unlink()
    assert soak_boot.earlier(9)["seed"] == 9


def test_several_runs_share_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_boot, "RESULT", tmp_path / "boot-soak.json")
    monkeypatch.setattr(soak_boot, "SOURCES", ("LICENSE",))
    monkeypatch.setattr(soak_boot.state, "host_lock", lambda name: contextlib.nullcontext())
    for seed in (7, 8):
        with soak_boot.shared(seed) as figures:
            figures["begun"] += 1
    assert (figures["seed"], figures["begun"]) == (7.0, 2.0)


# --- How a host is followed after a fault -----------------------------------------------------------------------------

FORMER = ["BOOT_IMAGE=/boot/vmlinuz", "ro", "quiet"]
VERIFIED = [*FORMER, *WANTED]
TRIED = [*VERIFIED, "panic=10", "cpullm.trial=0"]


class Scripted(BootHost):
    """A host whose boots are known: for each its command line, or None where it hangs; a trial may be kept."""

    def __init__(self, path: Path, boots: list[list[str] | None], kept: bool = False) -> None:
        super().__init__("scripted", path)
        self.script = boots
        self.kept_trial = kept
        self.now: list[str] | None = None
        self.time = 0.0
        self.cuts = 0
        self.console.write_text("")

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    def boot(self) -> None:
        self.now = self.script.pop(0) if self.script else None
        with self.console.open("a") as stream:
            stream.write(f"{BOOTING}x'\n" + (f"{UP}\n" if self.now else ""))

    def clock(self) -> float:
        # Nobody verifies, and the deadline of a trial passes.
        self.time += 10
        if self.time % 200 == 0 and self.now and self.now[-1].startswith("cpullm.trial=") and not self.kept_trial:
            self.boot()
        return self.time

    def cut(self) -> int:
        self.cuts += 1
        self.boot()
        return 0

    def on(self, script: str, timeout_s: float = 0) -> str:
        assert self.now is not None
        trace = [] if self.kept_trial or self.now != TRIED else [RECORD]
        return "\n".join([" ".join(self.now), *trace])


@pytest.mark.parametrize(
    ("boots", "kept", "found"),
    [
        pytest.param([FORMER], False, (1, 0, FORMER), id="former"),
        pytest.param([VERIFIED], False, (1, 0, VERIFIED), id="verified"),
        pytest.param([TRIED, FORMER], False, (2, 0, FORMER), id="at-its-deadline"),
        pytest.param([TRIED], True, (1, 0, TRIED), id="trial-that-was-kept"),
        pytest.param([None, FORMER], False, (2, 1, FORMER), id="hang"),
        pytest.param([TRIED, TRIED, FORMER], False, (3, 0, FORMER), id="tried-twice"),
        pytest.param([None, None, FORMER], False, None, id="hangs-for-ever"),
        pytest.param([TRIED] * 9, False, None, id="a-loop"),
        pytest.param([["other"]] * 9, False, None, id="another-line"),
    ],
)
def test_a_host_is_followed(
    boots: list[list[str] | None],
    kept: bool,
    found: tuple[int, int, list[str]] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boot_host.time, "sleep", lambda seconds: None)
    host = Scripted(tmp_path, list(boots), kept)
    host.boot()
    if found is None:
        with pytest.raises(Stranded):
            host.recover(0, [FORMER, VERIFIED], 400)
    else:
        back = host.recover(0, [FORMER, VERIFIED], 400)
        assert (back.boots, back.cycles, back.line) == found


@pytest.mark.parametrize(
    ("outcome", "counts"),
    [
        pytest.param((1, 0), {"recovered_within_two_boots": 1}, id="at-once"),
        pytest.param((2, 1), {"recovered_within_two_boots": 1, "needed_power_cycle": 1}, id="cycled"),
        pytest.param((3, 0), {}, id="late"),
        pytest.param(Stranded("x"), {"stranded": 1}, id="stranded"),
    ],
)
def test_what_a_fault_counts(
    outcome: tuple[int, int] | Stranded, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"seed": 7.0, **dict.fromkeys(soak_boot.COUNTS, 0.0)}
    monkeypatch.setattr(soak_boot, "shared", lambda seed: contextlib.nullcontext(figures))
    soak = object.__new__(soak_boot.Soak)
    soak.seed = 7
    soak.host = SimpleNamespace(mark=lambda: 0, boots=lambda since: 2)
    for name in soak_boot.Soak.KINDS:
        monkeypatch.setattr(soak, name, lambda chance: (0, "x"))

    def recovered(since: int) -> tuple[int, int]:
        if isinstance(outcome, Stranded):
            raise outcome
        return outcome

    monkeypatch.setattr(soak, "recovered", recovered)
    monkeypatch.setattr(soak, "stayed", lambda since: False)
    monkeypatch.setattr(soak, "play_again", lambda whole: "")
    soak.fault()
    assert {name: figures[name] for name in soak_boot.COUNTS if not name.startswith("played")} == {
        "begun": 1,
        "faults": 1,
        "boots": 2,
        "stranded": 0,
        "recovered_within_two_boots": 0,
        "needed_power_cycle": 0,
        **counts,
    }
