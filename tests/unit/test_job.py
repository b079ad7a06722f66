"""cpullm.epyc.job through real plays on a local connection."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CLONE = Path(__file__).resolve().parents[2]
PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))

WORK = """
import json, os, sys, time
status, steps, pause, rc = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
for step in range(steps + 1):
    with open(status + ".new", "w") as stream:
        json.dump({"phase": "work", "done": step, "total": steps, "unit": "steps"}, stream)
    os.replace(status + ".new", status)
    with open(status + ".starts" if step == 0 else os.devnull, "a") as stream:
        stream.write("%d\\n" % os.getpid())
    print("step", step, flush=True)
    time.sleep(pause)
print("colour is", os.environ.get("COLOUR"))
print("the end", file=sys.stderr)
sys.exit(rc)
"""


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(CLONE / ".collections"),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "PYTHONWARNINGS": "ignore",
    }


class Play:
    """One play of one task; the task's result comes back as data."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.work = tmp_path / "work.py"
        self.work.write_text(WORK)
        self.status = tmp_path / "status.json"
        self.result = tmp_path / "result.json"

    def argv(self, steps: int = 3, pause: float = 0.05, rc: int = 0) -> list[str]:
        return [sys.executable, str(self.work), str(self.status), str(steps), str(pause), str(rc)]

    def command(self, task: dict[str, Any], *arguments: str, hosts: int = 1, action: str = "job") -> list[str]:
        play = {
            "hosts": "all",
            "gather_facts": False,
            "tasks": [
                {"name": "The task", f"cpullm.epyc.{action}": task, "register": "out", "ignore_errors": True},
                {
                    "name": "Keep the result",
                    "ansible.builtin.copy": {
                        "content": "{{ out | to_json }}",
                        "dest": str(self.result),
                        "mode": "0600",
                    },
                    "run_once": True,
                    "check_mode": False,
                },
            ],
        }
        (self.tmp / "play.yml").write_text(yaml.safe_dump([play], sort_keys=False))
        names = "\n".join(f"host{n} ansible_connection=local" for n in range(hosts))
        (self.tmp / "inventory").write_text(
            f"[all]\n{names}\n[all:vars]\nansible_python_interpreter={sys.executable}\n"
        )
        return [PLAYBOOK, "-i", str(self.tmp / "inventory"), str(self.tmp / "play.yml"), *arguments]

    def run(self, task: dict[str, Any], *arguments: str, **options: Any) -> dict[str, Any]:
        self.result.unlink(missing_ok=True)
        done = subprocess.run(
            self.command(task, *arguments, **options),
            env=environment(self.tmp),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert self.result.exists(), done.stdout + done.stderr
        result: dict[str, Any] = json.loads(self.result.read_text())
        result["_output"] = done.stdout + done.stderr
        return result


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    # Long work of the user who runs the tests, in the folder that the agent picks for that user.
    root = Path("/run/cpullm/jobs") if os.geteuid() == 0 else Path(f"/tmp/cpullm-jobs-{os.geteuid()}")
    before = set(root.glob("*")) if root.exists() else set()
    yield Play(tmp_path)
    left = (set(root.glob("*")) if root.exists() else set()) - before - {root / ".lock"}
    assert not left, f"left on the target: {left}"


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_job_ends_well(play: Play) -> None:
    result = play.run(
        {
            "argv": play.argv(),
            "status_file": str(play.status),
            "environment": {"COLOUR": "blue"},
            "chdir": str(play.tmp),
            "poll_s": 0.2,
        }
    )
    assert result["rc"] == 0 and result["changed"] and not result["failed"] and not result["attached"]
    assert result["stdout"].splitlines() == ["step 0", "step 1", "step 2", "step 3", "colour is blue"]
    assert result["stderr"] == "the end"
    assert result["status"]["done"] == result["status"]["total"] == 3
    assert 0 < result["elapsed_s"] < 60


def test_failure_shows_the_last_lines(play: Play) -> None:
    result = play.run({"argv": play.argv(rc=3), "title": "engine"})
    assert result["failed"] and result["rc"] == 3
    assert result["msg"] == "host0: engine: ended with rc 3. Last lines:\nthe end"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param({"argv": ["/no/such/program"]}, "No such file or directory", id="no-program"),
        pytest.param({"argv": ["true"], "chdir": "/no/such/folder"}, "No such file or directory", id="no-folder"),
        pytest.param({"argv": []}, "argv is empty", id="empty"),
        pytest.param({"title": "x"}, "one of the following is required", id="nothing-to-do"),
        pytest.param({"argv": ["true"], "timeout_s": "soon"}, "timeout_s", id="no-number"),
        pytest.param({"argv": ["true"], "done_when_complete": True}, "mutually exclusive", id="two-ends"),
    ],
)
def test_refusals(play: Play, task: dict[str, Any], message: str) -> None:
    result = play.run(task)
    assert result["failed"] and message in result["msg"]


def test_killed_by_a_signal(play: Play) -> None:
    result = play.run({"argv": ["/bin/sh", "-c", "kill -9 $$"]})
    assert result["failed"] and result["rc"] == -9


def test_timeout_ends_the_whole_group(play: Play) -> None:
    child = play.tmp / "child"
    result = play.run(
        {"argv": ["/bin/sh", "-c", f"echo begun; sleep 300 & echo $! > {child}; wait"], "timeout_s": 1, "poll_s": 0.2}
    )
    assert result["failed"] and "not done after timeout_s=1 s; its process group was ended" in result["msg"]
    assert result["stdout"] == "begun"
    assert not lives(int(child.read_text()))


def test_a_job_that_ignores_the_request_is_killed(play: Play) -> None:
    pid = play.tmp / "pid"
    program = (
        f"import os, signal, time; signal.signal(15, signal.SIG_IGN); open({str(pid)!r}, 'w').write(str(os.getpid()))"
    )
    result = play.run({"argv": [sys.executable, "-c", f"{program}; time.sleep(300)"], "timeout_s": 1, "poll_s": 0.2})
    assert result["failed"] and result["rc"] == -9
    assert not lives(int(pid.read_text()))


def test_stall_is_no_status_and_no_output(play: Play) -> None:
    quiet = play.run({"argv": ["/bin/sleep", "300"], "stall_timeout_s": 1, "poll_s": 0.2})
    assert quiet["failed"] and "changed for stall_timeout_s=1" in quiet["msg"]
    # Output is a sign of life, also without a status.
    talking = ["/bin/sh", "-c", "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.3; done"]
    assert not play.run({"argv": talking, "stall_timeout_s": 1, "poll_s": 0.2})["failed"]


def test_a_killed_play_leaves_the_job_and_the_next_one_follows_it(play: Play) -> None:
    task = {"argv": play.argv(steps=60, pause=0.1), "status_file": str(play.status), "poll_s": 0.2, "key": "follow-me"}
    first = subprocess.Popen(
        play.command(task), env=environment(play.tmp), stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(play.status.exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    other = play.run({**task, "argv": play.argv(steps=61)})
    assert other["failed"] and "runs already with other arguments" in other["msg"]
    result = play.run(task)
    assert result["attached"] and result["rc"] == 0 and result["status"]["done"] == 60
    assert result["elapsed_s"] >= 6
    starts = (play.tmp / "status.json.starts").read_text().split()
    assert len(starts) == 1


def test_a_result_nobody_fetched_is_not_taken_for_the_next_one(play: Play) -> None:
    task = {"argv": play.argv(steps=5, pause=0.1), "status_file": str(play.status), "key": "unfetched"}
    first = subprocess.Popen(
        play.command({**task, "poll_s": 60}),
        env=environment(play.tmp),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(play.status.exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    pid = int((play.tmp / "status.json.starts").read_text().split()[0])
    wait_for(lambda: not lives(pid))
    result = play.run(task)
    assert not result["attached"] and result["rc"] == 0
    assert len((play.tmp / "status.json.starts").read_text().split()) == 2


def test_check_mode_starts_nothing(play: Play) -> None:
    result = play.run({"argv": play.argv(), "status_file": str(play.status)}, "--check")
    assert result["changed"] and not play.status.exists()
    assert result["msg"].startswith("check mode: ")
    waiting = play.run({"status_file": str(play.status), "timeout_s": 1}, "--check")
    assert not waiting["changed"] and waiting["skipped"]


def test_waiting_for_a_status_file(play: Play) -> None:
    worker = subprocess.Popen(play.argv(steps=5, pause=0.2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = play.run({"status_file": str(play.status), "done_when_complete": True, "poll_s": 0.2, "timeout_s": 30})
    assert not result["failed"] and not result["changed"] and result["status"]["done"] == 5
    worker.wait()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param('echo \'{"phase": "failed", "message": "no pages"}\'', "gave up: no pages", id="gave-up"),
        pytest.param(
            "echo down >&2; exit 4", "not done after timeout_s=1 s (no status yet: rc 4: down)", id="no-answer"
        ),
        pytest.param("echo '{'", "status not readable", id="no-status"),
    ],
)
def test_waiting_in_vain(play: Play, script: str, message: str) -> None:
    result = play.run({"status_argv": ["/bin/sh", "-c", script], "timeout_s": 1, "poll_s": 0.2})
    assert result["failed"] and message in result["msg"]


def test_status_command(play: Play) -> None:
    result = play.run({"status_argv": ["/bin/echo", '{"done": 4, "total": 4}'], "timeout_s": 5})
    assert not result["failed"] and result["status"]["done"] == 4


def test_a_log_gets_a_line_at_least_every_10_s(play: Play) -> None:
    command = play.command({"argv": play.argv(steps=11, pause=1.0), "status_file": str(play.status), "title": "slow"})
    process = subprocess.Popen(command, env=environment(play.tmp), stdout=subprocess.PIPE, text=True)
    began = time.monotonic()
    seen = None
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("host0 | slow: "):
            seen = time.monotonic() - began
            assert re.search(r"work, \d+ %, \d+ of 11 steps, 1\.\d+ steps/s, \d+ s left, \d+ s elapsed", line), line
            break
    process.communicate()
    # It arrived while the job ran, not when Ansible's buffer was full.
    assert seen is not None and seen < 11.9


def test_a_terminal_gets_one_block_for_all_hosts(play: Play) -> None:
    argv = ["/bin/sh", "-c", "sleep 3; echo {{ inventory_hostname }}"]
    command = play.command({"argv": argv, "title": "side by side", "poll_s": 0.5}, "--forks", "3", hosts=3)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        env={**environment(play.tmp), "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    output = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        output += piece
    os.close(master)
    assert process.wait() == 0, output.decode()
    text = output.decode().replace("\r\n", "\n")
    block = r"host0  side by side  .*elapsed\nhost1  side by side  .*elapsed\nhost2  side by side  .*elapsed\n"
    assert re.search(block, text), text
    # Three lines up, erased, and then Ansible's own line.
    assert re.search(r"\x1b\[[123]A\x1b\[J(\x1b\[[0-9;]*m)?changed: \[host", text), text
    assert "host0 | side by side" not in text
