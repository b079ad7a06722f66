"""cpullm.epyc.boot_trial: which step follows which, for every state that a host can be found in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible_collections.cpullm.epyc.plugins.action import boot_trial
from ansible_collections.cpullm.epyc.plugins.modules import boot_trial_step
from test_job import CLONE, PLAYBOOK, environment

LOOKED: dict[str, Any] = {
    "state": "none",
    "id": None,
    "boot_id": "a",
    "traces": [],
    "matches": False,
    "right": False,
    "findings": [],
}
TRACES = ["/var/lib/cpullm/boot_trial.json"]
RUNNING = {**LOOKED, "state": "running", "id": "t", "boot_id": "b", "traces": TRACES, "matches": True}
ENDED = {**LOOKED, "state": "ended", "id": "t", "boot_id": "c", "traces": TRACES}
RIGHT = {**LOOKED, "right": True}
ARMED = {**LOOKED, "state": "armed", "id": "t", "traces": TRACES}
KEPT = {**RUNNING, "faults": []}
BACK = {"failed": False, "boot_id": "b"}
AWAY = {"failed": True, "boot_id": None, "msg": "not back after timeout_s=9 s"}
SAME = {"failed": True, "boot_id": "a", "msg": "boot_id is still a"}


class Host:
    """Steps and waits as they are answered, and the order in which they were asked for."""

    def __init__(self, answers: list[Any], waits: list[dict[str, Any]]) -> None:
        self.answers = answers
        self.waits = waits
        self.asked: list[str] = []
        self.patience: list[float] = []

    def step(self, name: str, **more: Any) -> Any:
        self.asked.append(name)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, before: str, args: dict[str, Any], reporter: Any) -> dict[str, Any]:
        self.asked.append(f"wait {before}")
        self.patience.append(args["timeout_s"])
        return self.waits.pop(0)

    def command(self, command: str, sudoable: bool) -> dict[str, Any]:
        self.asked.append("reboot")
        return {"rc": 0, "stdout": "", "stderr": ""}


def action(monkeypatch: pytest.MonkeyPatch, host: Host, **args: Any) -> boot_trial.ActionModule:
    """Return the plugin on such a host."""
    found = object.__new__(boot_trial.ActionModule)
    defaults = {name: option.get("default") for name, option in boot_trial.ARGUMENT_SPEC.items()}
    found._args = {**defaults, "reboot_allowed": True, "timeout_s": 100.0, "deadline_s": 10, **args}
    found._host = "h"
    found._power_cycled = False
    found._reporter = SimpleNamespace(tell_clock=lambda *words: None)
    found._display = SimpleNamespace(warning=lambda text, formatted=False: host.asked.append("warning"))
    found._connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None))
    monkeypatch.setattr(found, "_step", host.step)
    monkeypatch.setattr(found, "_wait", host.wait)
    monkeypatch.setattr(found, "_low_level_execute_command", host.command)
    monkeypatch.setattr(boot_trial, "reset_connection", lambda plugin: None)
    monkeypatch.setattr(boot_trial.time, "sleep", lambda seconds: None)
    return found


@pytest.mark.parametrize(
    ("looked", "args", "answers", "waits", "outcome", "asked"),
    [
        pytest.param(RIGHT, {}, [], [], "right", [], id="nothing-to-do"),
        pytest.param({**RIGHT, "traces": TRACES}, {}, [{}], [], "right", ["disarm"], id="cut-while-cleaning"),
        pytest.param(
            LOOKED,
            {},
            [LOOKED | {"id": "t"}, RUNNING, KEPT],
            [BACK],
            "promoted",
            ["arm", "reboot", "wait a", "begin", "promote"],
            id="good",
        ),
        pytest.param(LOOKED, {"reboot_allowed": False}, [], [], "consent", [], id="no-consent"),
        pytest.param(ARMED, {"reboot_allowed": False}, [{}], [], "consent", ["disarm"], id="armed-and-no-consent"),
        pytest.param(
            ARMED,
            {},
            [LOOKED | {"id": "t"}, RUNNING, KEPT],
            [BACK],
            "promoted",
            ["arm", "reboot", "wait a", "begin", "promote"],
            id="armed-is-armed-anew",
        ),
        pytest.param(RUNNING, {"reboot_allowed": False}, [KEPT], [], "promoted", ["promote"], id="taken-up"),
        pytest.param(
            ENDED,
            {"reboot_allowed": False},
            [{"evidence": []}, {}],
            [],
            "consent",
            ["evidence", "warning", "disarm"],
            id="ended-and-no-consent",
        ),
        pytest.param(
            ENDED,
            {},
            [{"evidence": []}, LOOKED | {"id": "t"}, RUNNING, KEPT],
            [BACK],
            "promoted",
            ["evidence", "warning", "arm", "reboot", "wait a", "begin", "promote"],
            id="ended-is-tried-again",
        ),
        pytest.param(
            RUNNING | {"matches": False},
            {},
            [RUNNING | {"id": "u"}, RUNNING | {"id": "u"}, KEPT],
            [BACK],
            "promoted",
            ["arm", "reboot", "wait b", "begin", "promote"],
            id="another-line-on-trial",
        ),
        pytest.param(
            RUNNING,
            {},
            [AnsibleConnectionFailure("gone"), RUNNING, KEPT],
            [],
            "promoted",
            ["promote", "begin", "promote"],
            id="network-lost-for-a-moment",
        ),
        pytest.param(
            RUNNING,
            {},
            [AnsibleConnectionFailure("gone"), RIGHT],
            [],
            "promoted",
            ["promote", "begin"],
            id="answer-lost",
        ),
        pytest.param(
            LOOKED,
            {"power_cycle": ["true"]},
            [LOOKED | {"id": "t"}, RUNNING, KEPT],
            [AWAY, BACK],
            "promoted",
            ["arm", "reboot", "wait a", "warning", "wait a", "begin", "promote"],
            id="power-cycled",
        ),
    ],
)
def test_good_ends(
    monkeypatch: pytest.MonkeyPatch,
    looked: dict[str, Any],
    args: dict[str, Any],
    answers: list[Any],
    waits: list[dict[str, Any]],
    outcome: str,
    asked: list[str],
) -> None:
    host = Host(list(answers), list(waits))
    result = action(monkeypatch, host, **args)._work(looked)
    assert result["outcome"] == outcome and host.asked == asked
    assert not host.answers and not host.waits


SEEN = {"evidence": [{"source": "kernel log", "lines": ["Kernel panic"]}]}


@pytest.mark.parametrize(
    ("looked", "args", "answers", "waits", "messages", "asked"),
    [
        pytest.param(
            LOOKED,
            {},
            [LOOKED | {"id": "t"}, ENDED, SEEN, ENDED],
            [BACK],
            ["did not come through", "back on its former command line", "kernel log:\n  Kernel panic"],
            ["arm", "reboot", "wait a", "begin", "evidence", "disarm"],
            id="came-back-by-itself",
        ),
        pytest.param(
            RUNNING,
            {},
            [{**RUNNING, "faults": ["node 0: short", "x failed"]}, ENDED, {"evidence": []}, ENDED],
            [BACK],
            ["was not kept: node 0: short; x failed", "It left neither a log nor a journal"],
            ["promote", "reboot", "wait b", "begin", "evidence", "disarm"],
            id="faults",
        ),
        pytest.param(
            RUNNING,
            {"reboot_allowed": False},
            [{**RUNNING, "faults": ["node 0: short"]}],
            [],
            ["not right: node 0: short", "at most 10 s after its start", "without consent"],
            ["promote"],
            id="faults-without-consent",
        ),
        pytest.param(
            RUNNING,
            {},
            [AnsibleActionFail("no space"), ENDED, {"evidence": []}, ENDED],
            [BACK],
            ["could not become the default: no space"],
            ["promote", "reboot", "wait b", "begin", "evidence", "disarm"],
            id="promotion-fails",
        ),
        pytest.param(
            RUNNING,
            {},
            [AnsibleConnectionFailure("gone")] * 7 + [ENDED, SEEN, ENDED],
            [BACK],
            ["the host was lost while it was verified: gone"],
            [*["promote", "begin"] * 3, "promote", "wait b", "begin", "evidence", "disarm"],
            id="lost-while-verified",
        ),
        pytest.param(
            RUNNING,
            {},
            [{**RUNNING, "faults": ["x"]}, RUNNING, {"evidence": []}, RUNNING],
            [BACK],
            ["still runs with the command line that failed"],
            ["promote", "reboot", "wait b", "begin", "evidence", "disarm"],
            id="booted-twice",
        ),
        pytest.param(
            LOOKED,
            {},
            [LOOKED | {"id": "t"}, {}],
            [SAME],
            ["boot_id is still a. Nothing of the trial is left"],
            ["arm", "reboot", "wait a", "disarm"],
            id="did-not-go-down",
        ),
        pytest.param(
            LOOKED,
            {},
            [LOOKED | {"id": "t"}],
            [AWAY],
            ["trial boot: not back", "cycle its power", "grub_hugepages_power_cycle"],
            ["arm", "reboot", "wait a"],
            id="away",
        ),
        pytest.param(
            LOOKED,
            {"power_cycle": ["false"]},
            [LOOKED | {"id": "t"}],
            [AWAY],
            ["grub_hugepages_power_cycle ended with rc 1"],
            ["arm", "reboot", "wait a", "warning"],
            id="power-cycle-fails",
        ),
        pytest.param(
            LOOKED,
            {"power_cycle": ["/absent/program"]},
            [LOOKED | {"id": "t"}],
            [AWAY],
            ["could not be run on the controller", "/absent/program"],
            ["arm", "reboot", "wait a", "warning"],
            id="no-such-program",
        ),
        pytest.param(
            LOOKED,
            {"power_cycle": ["true"]},
            [LOOKED | {"id": "t"}],
            [AWAY, AWAY],
            ["its power was cycled, and it is not back"],
            ["arm", "reboot", "wait a", "warning", "wait a"],
            id="away-for-good",
        ),
        pytest.param(
            RUNNING | {"matches": False},
            {"reboot_allowed": False},
            [],
            [],
            ["a trial of another command line (t) is running", "reboots by itself at its deadline"],
            [],
            id="another-line-and-no-consent",
        ),
    ],
)
def test_bad_ends(
    monkeypatch: pytest.MonkeyPatch,
    looked: dict[str, Any],
    args: dict[str, Any],
    answers: list[Any],
    waits: list[dict[str, Any]],
    messages: list[str],
    asked: list[str],
) -> None:
    host = Host(list(answers), list(waits))
    with pytest.raises(boot_trial.TrialError) as error:
        action(monkeypatch, host, **args)._work(looked)
    assert all(message in str(error.value) for message in messages), str(error.value)
    assert host.asked == asked and not host.answers and not host.waits


def test_a_power_cycle_need_not_wait_for_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = []
    for command in (None, ["true"]):
        host = Host([LOOKED | {"id": "t"}, RUNNING, KEPT], [BACK])
        action(monkeypatch, host, power_cycle=command)._work(LOOKED)
        patience += host.patience
    assert patience == [210.0, 110.0]


def test_what_was_seen_keeps_beginning_and_end() -> None:
    lines = [str(number) for number in range(50)]
    text = boot_trial.describe([{"source": "log", "lines": lines}, {"source": "short", "lines": ["x"]}], limit=16)
    assert text == "What was seen there:\nlog:\n  0\n  1\n  2\n  ...\n  46\n  47\n  48\n  49\nshort:\n  x"


def test_this_process_is_alive_and_another_start_of_its_number_is_not() -> None:
    me = boot_trial.identify(os.getpid())
    assert me["controller"] == socket.gethostname() and me["pid"] == os.getpid()
    assert not boot_trial.has_ended(me, me)
    assert boot_trial.has_ended({**me, "started": "1"}, me)
    assert boot_trial.has_ended({**me, "machine": "earlier"}, me)
    assert boot_trial.has_ended({**me, "pid": "x"}, me)
    assert not boot_trial.has_ended({**me, "controller": "elsewhere", "started": "1"}, me)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        other = boot_trial.identify(process.pid)
        process.wait()
    assert boot_trial.has_ended(other, me)


def test_the_controller_is_never_tried(tmp_path: Path) -> None:
    play = tmp_path / "play.yml"
    play.write_text("- hosts: localhost\n  gather_facts: false\n  tasks:\n    - cpullm.epyc.boot_trial:\n")
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


@pytest.mark.parametrize(
    ("held", "dead", "taken"),
    [
        pytest.param(None, None, True, id="free"),
        pytest.param({"key": "me", "until": 2000}, None, True, id="mine"),
        pytest.param({"key": "other", "until": 2000}, None, False, id="another-s"),
        pytest.param({"key": "other", "until": 999}, None, True, id="over"),
        pytest.param({"key": "other", "until": 2000}, "other", True, id="known-to-be-dead"),
        pytest.param({"key": "other", "until": 2000}, "third", False, id="another-one-is-dead"),
        pytest.param({"key": "other", "until": 10**9}, None, True, id="clock-was-wrong"),
        pytest.param({"key": "other"}, None, True, id="damaged"),
    ],
)
def test_one_play_at_a_time(
    monkeypatch: pytest.MonkeyPatch, held: dict[str, Any] | None, dead: str | None, taken: bool
) -> None:
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(boot_trial_step._trial, "read_lock", lambda: held)
    monkeypatch.setattr(boot_trial_step._trial, "write_lock", written.append)
    monkeypatch.setattr(boot_trial_step.time, "time", lambda: 1000.5)
    module = SimpleNamespace(params={"owner": {"key": "me"}, "lease_s": 60, "dead": dead})
    answer = boot_trial_step.take(module)
    assert (answer is None) is taken
    if taken:
        assert written == [{"key": "me", "since": "1970-01-01 00:16:40 UTC", "until": 1060}]
    else:
        assert answer == {**held, "left_s": 1000} and not written


def test_the_second_play_is_told_who_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = action(monkeypatch, Host([], []))
    monkeypatch.undo()
    found._vars = {}
    found._me = boot_trial.identify(os.getpid())
    held = {**found._me, "key": "other", "controller": "elsewhere", "since": "yesterday", "left_s": 90}
    monkeypatch.setattr(found, "_execute_module", lambda **named: {"held": held})
    with pytest.raises(AnsibleActionFail, match=f"process {os.getpid()} on elsewhere, since yesterday") as error:
        found._step("begin")
    assert "the host is free in 1 min 30 s" in error.value.message
    # The same machine knows whether it is still there.
    asked: list[dict[str, Any]] = []
    answers = [{"held": {**held, "controller": socket.gethostname(), "started": "1"}}, {"state": "none"}]

    def execute(**named: Any) -> dict[str, Any]:
        asked.append(named["module_args"])
        return answers.pop(0)

    monkeypatch.setattr(found, "_execute_module", execute)
    assert found._step("begin") == {"state": "none"}
    assert [entry.get("dead") for entry in asked] == [None, "other"]
