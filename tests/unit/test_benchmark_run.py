# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""In which order servers are measured, what a variant is, and who holds the requests of clients."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark as bench
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark_host as host
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark_run as program


class Front:
    """HAProxy's runtime socket: keeps what it is told, and answers."""

    def __init__(self, path: Path) -> None:
        self.told: list[str] = []
        self.answer = b"\n"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _address = self._socket.accept()
            with connection:
                command = connection.recv(4096).decode().strip()
                if command == "end":
                    return
                self.told.append(command)
                connection.sendall(self.answer)

    def end(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(b"end\n")
        self._thread.join()
        self._socket.close()


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    path = tmp_path / "admin.sock"
    monkeypatch.setattr(program, "FRONT", path)
    it = Front(path)
    yield it
    it.end(path)


def server(idle: bool) -> Any:
    return SimpleNamespace(unit="llama-server@3.service", idle=lambda _seconds: idle)


DRAIN, READY = "set server llama/i3 state drain", "set server llama/i3 state ready"


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_requests_wait_while_it_is_measured_and_never_longer(
    front: Front, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(program, "instance", lambda _number: (server(idle=True), "", None))
    try:
        with program.held(3, time.monotonic() + 5):
            assert front.told == [DRAIN]
            if fails:
                raise KeyError("x")
    except KeyError:
        pass
    assert front.told == [DRAIN, READY]


def test_a_client_that_stays_is_not_cut(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "instance", lambda _number: (server(idle=False), "", None))
    with pytest.raises(program.Refused, match="still at work for a client"), program.held(3, time.monotonic()):
        pass
    assert front.told == [DRAIN, READY]


def test_an_unknown_server_of_the_front_is_told(front: Front) -> None:
    front.answer = b"No such server.\n"
    with pytest.raises(program.Refused, match=r"HAProxy answers 'No such server.' to 'set server llama/i3"):
        program.lead(3, "ready")


def test_without_a_front_there_is_nothing_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "FRONT", tmp_path / "none.sock")
    monkeypatch.setattr(program, "instance", lambda _number: (server(idle=True), "", None))
    with program.held(3, time.monotonic() + 1):
        pass


def test_what_a_killed_measurement_held_is_sent_on(
    front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "HOME", tmp_path)
    monkeypatch.setattr(program, "STATE", tmp_path / "state.json")
    monkeypatch.setattr(program, "UNITS", tmp_path / "units")
    program.keep_state([], [3])
    assert json.loads((tmp_path / "state.json").read_text())["held"] == [3]
    assert program.restore() == ["sent requests to instance 3 again"]
    assert front.told == [READY]
    assert program.restore() == []


def test_what_others_take_is_counted_for_long_enough_to_show() -> None:
    running: Any = SimpleNamespace(pid=os.getpid(), cpus=tuple(os.sched_getaffinity(0)))
    before = host.snapshot(running.pid, running.cpus)
    assert program.counters_after(running, before).seconds - before.seconds >= program.JUDGED_S
    # A run that took longer waits for nothing: its counters are those of its end.
    begun = time.monotonic()
    after = program.counters_after(running, dataclasses.replace(before, seconds=before.seconds - program.JUDGED_S))
    assert after.seconds - begun < program.JUDGED_S


def test_every_other_round_begins_with_the_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def once(one: Any, step: bench.Step, number: int, _request: Any) -> dict[str, Any]:
        asked.append(f"{one.name}{number}")
        # The first try of one run is disturbed, and repeated at once.
        reasons = ["disturbed"] if asked.count("b1") == 1 and asked[-1] == "b1" else []
        return {"figure": step.figure, "round": number, "value": 1.0, "reasons": reasons}

    monkeypatch.setattr(program, "once", once)
    sides: list[tuple[Any, dict[str, Any]]] = [(SimpleNamespace(name=name), {"runs": []}) for name in "ab"]
    program.rounds(sides, bench.Step("decode_d0", 16, 8), range(3), {}, program.Progress(None, 1))
    assert asked == ["a0", "b0", "b1", "b1", "a1", "a2", "b2"]
    assert [len(measurement["runs"]) for _server, measurement in sides] == [3, 4]


def test_no_run_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 2.0, 4.0])
    monkeypatch.setattr(program.time, "monotonic", lambda: next(now))
    disturbed = {"figure": "decode_d0", "round": 0, "value": None, "reasons": ["disturbed"]}
    monkeypatch.setattr(program, "once", lambda *_arguments: disturbed)
    runs: dict[str, Any] = {"runs": []}
    sides: list[tuple[Any, dict[str, Any]]] = [(SimpleNamespace(name="a"), runs)]
    program.rounds(sides, bench.Step("decode_d0", 16, 8), range(3), {}, program.Progress(None, 1, deadline=3.0))
    assert runs["runs"] == [disturbed, disturbed]


@pytest.mark.parametrize(
    ("variant", "running", "other"),
    [
        pytest.param({"name": "x"}, True, 0, id="as-it-runs"),
        pytest.param({"name": "x", "binary": "/opt/x"}, False, 0, id="build"),
        pytest.param({"name": "x", "instance": 100}, False, 100, id="another-instance"),
    ],
)
def test_a_variant_is_the_instance_another_one_or_a_second_server(
    variant: dict[str, Any], running: bool, other: int
) -> None:
    assert program.is_running(variant) is running
    assert program.runs_as(variant) == other
