"""cpullm.epyc.reboot: what counts as a reboot, and what does not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.cpullm.epyc.plugins.action import reboot
from test_job import CLONE, PLAYBOOK, environment

OLD = "11111111-1111-1111-1111-111111111111"
NEW = "22222222-2222-2222-2222-222222222222"
ARGS = {
    "timeout_s": 100.0,
    "expected_s": 30.0,
    "down_timeout_s": 50.0,
    "settle_timeout_s": 20.0,
    "connect_timeout_s": 10,
    "poll_s": 5.0,
    "title": "reboot",
}


class Clock:
    """A reporter and a clock in one: time passes while somebody sleeps."""

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self.elapsed_s = elapsed_s
        self.phases: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.elapsed_s += seconds

    def tell_clock(self, phase: str, expected_s: float, note: str = "") -> None:
        self.phases.append(phase)


def wait(
    monkeypatch: pytest.MonkeyPatch, looks: list[tuple[str, str] | None], elapsed_s: float = 0.0
) -> tuple[dict[str, Any], Clock]:
    """Return the outcome over a list of looks, None for no answer; the last one repeats. It begins at `elapsed_s`."""
    clock = Clock(elapsed_s)
    answers = iter(looks)
    last: list[tuple[str, str] | None] = [None]

    def look() -> tuple[str, str]:
        last[0] = next(answers, last[0])
        if last[0] is None:
            raise AnsibleConnectionFailure("connection refused")
        return last[0]

    monkeypatch.setattr(reboot.time, "sleep", clock.sleep)
    monkeypatch.setattr(reboot, "reset_connection", lambda action: None)
    action = object.__new__(reboot.ActionModule)
    monkeypatch.setattr(action, "_look", look)
    monkeypatch.setattr(action, "_limit_waits", lambda seconds: None)
    return action._wait(OLD, dict(ARGS), clock), clock


def test_down_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [(OLD, "stopping"), None, None, (NEW, "starting"), (NEW, "running")]
    outcome, clock = wait(monkeypatch, looks)
    assert outcome["rebooted"] and outcome["changed"] and outcome["boot_id"] == NEW
    assert outcome["ssh_back_s"] == 20.0 and outcome["system_state"] == "running"
    assert clock.phases == ["going down", "going down", "down", "down", "booted, starting units"]


def test_an_answer_before_it_went_down_is_no_reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _clock = wait(monkeypatch, [None, (OLD, "running"), (NEW, "degraded")])
    assert outcome["rebooted"] and outcome["system_state"] == "degraded" and outcome["ssh_back_s"] == 15.0


def test_same_boot_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, clock = wait(monkeypatch, [(OLD, "running")])
    assert outcome["failed"] and not outcome["rebooted"] and not outcome["changed"]
    assert f"boot_id is still {OLD}" in outcome["msg"] and clock.elapsed_s == 55.0


def test_not_back(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, clock = wait(monkeypatch, [None])
    assert outcome["failed"] and outcome["boot_id"] is None and clock.elapsed_s == 105.0
    assert "not back after timeout_s=1 min 40 s: the last attempt said: connection refused" in outcome["msg"]


def test_what_came_before_the_wait_takes_nothing_of_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    stays, clock = wait(monkeypatch, [(OLD, "running")], elapsed_s=1000.0)
    assert stays["failed"] and clock.elapsed_s == 1055.0
    gone, clock = wait(monkeypatch, [None], elapsed_s=1000.0)
    assert gone["failed"] and clock.elapsed_s == 1105.0
    back, _clock = wait(monkeypatch, [(OLD, "stopping"), None, (NEW, "running")], elapsed_s=1000.0)
    assert back["rebooted"] and back["ssh_back_s"] == 15.0


def test_units_that_never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, clock = wait(monkeypatch, [None, (NEW, "starting")])
    assert outcome["rebooted"] and outcome["system_state"] == "starting" and clock.elapsed_s == 35.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"{OLD}\nrunning\n", (OLD, "running"), id="plain"),
        pytest.param(f"{OLD}\r\nrunning\r\n", (OLD, "running"), id="terminal"),
        pytest.param(f"Welcome!\n{OLD}\n", (OLD, ""), id="banner-and-no-systemd"),
    ],
)
def test_look(monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, str]) -> None:
    action = object.__new__(reboot.ActionModule)
    answer = {"rc": 0, "stdout": text, "stderr": ""}
    monkeypatch.setattr(action, "_low_level_execute_command", lambda *args, **kwargs: answer)
    assert action._look() == expected
    answer["stdout"] = "nothing"
    with pytest.raises(AnsibleConnectionFailure, match="no boot_id in the answer"):
        action._look()


def test_the_controller_is_never_rebooted(tmp_path: Path) -> None:
    play = tmp_path / "play.yml"
    play.write_text("- hosts: localhost\n  gather_facts: false\n  tasks:\n    - cpullm.epyc.reboot:\n")
    done = subprocess.run(
        [PLAYBOOK, "-i", "localhost,", "-c", "local", str(play)],
        env=environment(tmp_path),
        cwd=CLONE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "its connection is local, so this would reboot the controller" in done.stdout + done.stderr
