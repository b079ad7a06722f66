# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab remembers: names, records, locks and processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import state
from lab.state import Host, LabError, Process


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Give each test a lab of its own."""
    monkeypatch.setenv("CPULLM_CACHE", str(tmp_path))
    return tmp_path / "lab"


def eventually(condition, seconds: float = 20) -> bool:
    """Return whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("name", ["a", "web-1", "x" * 32])
def test_good_names(name):
    assert state.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param("1a", id="digit-first"),
        pytest.param("a-", id="hyphen-last"),
        pytest.param("Web", id="capital"),
        pytest.param("../etc", id="path"),
        pytest.param("x" * 33, id="long"),
        pytest.param("a\n", id="line-feed"),
    ],
)
def test_bad_names_say_what_is_expected(name):
    with pytest.raises(LabError, match="expected 1 to 32 lower-case letters"):
        state.host_directory(name)


@pytest.mark.parametrize("name", ["", "-x", "../x", "a b", "x" * 64])
def test_bad_snapshot_names(name):
    with pytest.raises(LabError, match="snapshot name"):
        state.check_snapshot_name(name)


def test_record_survives_a_round_trip(home):
    host = Host(name="web", kind="vm", ssh_port=2201, forwards=[[8008, 8008]], extra={"warm": True})
    host.processes.append(Process(role="qemu", pid=1, start_ticks=2, boot_id="x"))
    host.save()
    assert state.load_host("web") == host
    assert state.host_names() == ["web"]
    state.forget_host("web")
    assert state.load_host("web") is None
    assert state.host_names() == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 0}', '{"schema": 1, "processes": [], "what": 1}'])
def test_damaged_record_names_the_file_and_the_way_out(home, content):
    path = state.host_directory("web") / "host.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(LabError, match=r"host\.json: cannot be read: .*lab down web"):
        state.load_host("web")


def test_missing_host_is_named_with_the_known_ones(home):
    Host(name="web", kind="vm").save()
    with pytest.raises(LabError, match=r"no host 'db' \(known: web\)"):
        state.need_host("db")


def test_write_json_leaves_the_old_file_when_it_fails(home):
    path = home / "x.json"
    state.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        state.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in home.iterdir()] == ["x.json"]


def test_spawn_records_before_it_runs(home):
    host = Host(name="web", kind="vm")
    process = state.spawn(host, "sleeper", ["sleep", "100"])
    try:
        recorded = state.load_host("web")
        assert recorded is not None
        assert recorded.processes == [process]
        assert state.process_alive(process)
        assert eventually(lambda: [found.pid for found in state.host_processes("web")] == [process.pid])
        assert [found.pid for found in state.lab_processes()] == [process.pid]
        assert state.host_processes("we") == []
    finally:
        state.stop_processes(host)
    assert not state.process_alive(process)
    assert state.load_host("web").processes == []


def test_stop_processes_finds_grandchildren_that_no_record_names(home):
    host = Host(name="web", kind="vm")
    state.spawn(host, "parent", ["sh", "-c", "setsid sleep 100 & setsid sleep 100 & wait"])
    assert eventually(lambda: len(state.host_processes("web")) >= 3)
    host.processes = []
    state.stop_processes(host, 1)
    assert state.host_processes("web") == []


def test_a_program_that_is_missing(home):
    with pytest.raises(LabError, match=r"'no-such-program' is not installed: .*packages\.txt"):
        state.spawn(Host(name="web", kind="vm"), "x", ["no-such-program"])


def test_spawn_logs_and_starts_where_it_is_told(home, tmp_path):
    host = Host(name="web", kind="vm")
    process = state.spawn(host, "pwd", ["sh", "-c", "pwd; cat"], directory=tmp_path)
    assert eventually(lambda: not state.process_alive(process))
    assert (host.directory / "pwd.log").read_text() == f"{tmp_path}\n"


def test_a_used_pid_is_not_the_same_process():
    mine = Process("x", os.getpid(), state.start_ticks(os.getpid()) or 0, state.boot_id())
    assert state.process_alive(mine)
    assert not state.process_alive(dataclasses.replace(mine, start_ticks=mine.start_ticks - 1))
    assert not state.process_alive(dataclasses.replace(mine, boot_id="other"))


def test_start_ticks_reads_past_a_command_that_looks_like_fields(tmp_path):
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "100"]) as process:
        try:
            assert abs((state.start_ticks(process.pid) or 0) - (state.start_ticks(os.getpid()) or 0)) < 10**7
        finally:
            process.kill()
    assert state.start_ticks(process.pid) is None


def test_a_process_whose_first_thread_ended_is_not_gone(home):
    # As QEMU, killed: the disk stays locked until the last thread is through.
    threads = "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()\n"
    threads += "ctypes.CDLL(None).pthread_exit(None)"
    host = Host(name="web", kind="vm")
    process = state.spawn(host, "threads", [sys.executable, "-c", threads])
    try:
        stat = Path(f"/proc/{process.pid}/stat")
        assert eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        assert state.process_alive(process)
    finally:
        state.stop_process(process, 0, first=signal.SIGKILL)
    assert not state.process_alive(process)


def test_lock_says_whom_it_waits_for(home):
    said: list[str] = []
    holder = f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom lab import state\nimport time\n"
    holder += "with state.lock('x'):\n    print('held', flush=True)\n    time.sleep(1)\n"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with state.lock("x", said.append):
            assert said == [f"waiting for x, which process {other.pid} is working on"]


def test_free_port_avoids_recorded_ports(home, monkeypatch):
    first = state.free_port()
    Host(name="web", kind="vm", ssh_port=first, forwards=[[first + 1, 80]]).save()
    assert state.free_port() not in (first, first + 1)


def test_prune_keeps_the_new_the_used_and_the_kept(home):
    home.mkdir()
    paths = {name: home / name for name in ("old", "used", "kept", "folder")}
    for name, path in paths.items():
        if name == "folder":
            path.mkdir()
        else:
            path.write_text(name)
    for name in ("old", "kept", "folder"):
        os.utime(paths[name], (0, 0))
    state.prune(home.iterdir(), keep=paths["kept"])
    assert sorted(entry.name for entry in home.iterdir()) == ["kept", "used"]


def test_unknown_kind():
    with pytest.raises(LabError, match="kind 'cloud': expected one of vm, container"):
        state.kind("cloud")
