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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.cpullm.epyc.plugins.action.job import fingerprint
from ansible_collections.cpullm.epyc.plugins.plugin_utils._target import interpreter

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
        self.keys: set[str] = set()

    def argv(self, steps: int = 3, pause: float = 0.05, rc: int = 0) -> list[str]:
        return [sys.executable, str(self.work), str(self.status), str(steps), str(pause), str(rc)]

    def command(self, *tasks: dict[str, Any], arguments: Sequence[str] = (), hosts: int = 1) -> list[str]:
        for task in tasks:
            if task.get("argv"):
                argv = [str(word) for word in task["argv"]]
                self.keys.add(task.get("key", fingerprint(argv, task.get("chdir"))[:24]))
        steps: list[dict[str, Any]] = [
            {"name": f"Task {n}", "cpullm.epyc.job": task, "register": f"out{n}", "ignore_errors": True}
            for n, task in enumerate(tasks)
        ]
        results = ", ".join(f"out{n}" for n in range(len(tasks)))
        keep = {"content": f"{{{{ [{results}] | to_json }}}}", "dest": str(self.result), "mode": "0600"}
        steps.append({"name": "Keep", "ansible.builtin.copy": keep, "run_once": True, "check_mode": False})
        play = {"hosts": "all", "gather_facts": False, "tasks": steps}
        (self.tmp / "play.yml").write_text(yaml.safe_dump([play], sort_keys=False))
        names = "\n".join(f"host{n} ansible_connection=local" for n in range(hosts))
        (self.tmp / "inventory").write_text(
            f"[all]\n{names}\n[all:vars]\nansible_python_interpreter={{{{ python_of_the_test }}}}\n"
            f"python_of_the_test={sys.executable}\n"
        )
        return [PLAYBOOK, "-i", str(self.tmp / "inventory"), str(self.tmp / "play.yml"), *arguments]

    def run_all(self, *tasks: dict[str, Any], arguments: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Run the tasks one after the other in one play."""
        self.result.unlink(missing_ok=True)
        done = subprocess.run(
            self.command(*tasks, arguments=arguments),
            env=environment(self.tmp),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert self.result.exists(), done.stdout + done.stderr
        results: list[dict[str, Any]] = json.loads(self.result.read_text())
        return results

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        (result,) = self.run_all(task)
        return result

    def leftovers(self) -> list[Path]:
        """Return what the jobs of this test left, in the folder that the agent picks for this user."""
        root = Path("/run/cpullm/jobs") if os.geteuid() == 0 else Path(f"/tmp/cpullm-jobs-{os.geteuid()}")
        return [root / key for key in self.keys if (root / key).exists()]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    made = Play(tmp_path)
    yield made
    assert made.leftovers() == []


def test_a_delegated_task_takes_the_other_host_s_python() -> None:
    action: Any = SimpleNamespace(
        _task=SimpleNamespace(delegate_to="builder"), _templar=SimpleNamespace(template=lambda value: value)
    )
    variables: dict[str, Any] = {
        "ansible_python_interpreter": "/usr/bin/python3.9",
        "ansible_delegated_vars": {
            "builder": {"ansible_facts": {"discovered_interpreter_python": "/usr/bin/python3.13"}}
        },
    }
    assert interpreter(action, variables) == "/usr/bin/python3.13"
    action._task.delegate_to = None
    assert interpreter(action, variables) == "/usr/bin/python3.9"
    assert interpreter(action, {}).startswith("$(command -v python3")


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


IGNORES_THE_REQUEST = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(300)
"""
TALKING = ["/bin/sh", "-c", "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.3; done"]

# What can share a play, by name; {tmp} is the test's folder.
SHORT: dict[str, dict[str, Any]] = {
    "failure": {"argv": [sys.executable, "{tmp}/work.py", "{tmp}/s", 1, 0, 3], "title": "engine"},
    "no-program": {"argv": ["/no/such/program"]},
    "no-folder": {"argv": ["true"], "chdir": "/no/such/folder"},
    "empty": {"argv": []},
    "nothing-to-do": {"title": "x"},
    "no-number": {"argv": ["true"], "timeout_s": "soon"},
    "two-ends": {"argv": ["true"], "done_when_complete": True},
    "signal": {"argv": ["/bin/sh", "-c", "kill -9 $$"]},
    "timeout": {"argv": ["/bin/sh", "-c", "echo begun; sleep 300 & echo $! > {tmp}/child; wait"], "timeout_s": 1},
    "ignores": {"argv": [sys.executable, "-c", IGNORES_THE_REQUEST, "{tmp}/pid"], "timeout_s": 1},
    "stall": {"argv": ["/bin/sleep", "300"], "stall_timeout_s": 1},
    "talking": {"argv": TALKING, "stall_timeout_s": 1},
    "gave-up": {"status_argv": ["/bin/echo", '{"phase": "failed", "message": "no pages"}'], "timeout_s": 5},
    "no-answer": {"status_argv": ["/bin/sh", "-c", "echo down >&2; exit 4"], "timeout_s": 1},
    "no-status": {"status_argv": ["/bin/echo", "{"], "timeout_s": 1},
    "command": {"status_argv": ["/bin/echo", '{"done": 4, "total": 4}'], "timeout_s": 5},
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Return the results of SHORT by name, all from one play."""
    made = Play(tmp_path_factory.mktemp("short"))
    tasks = []
    for task in SHORT.values():
        text = json.dumps({"poll_s": 0.2, **task}).replace("{tmp}", str(made.tmp))
        tasks.append(json.loads(text))
    results = dict(zip(SHORT, made.run_all(*tasks), strict=True))
    for name in ("child", "pid"):
        results[name] = {"pid": int((made.tmp / name).read_text())}
    yield results
    assert made.leftovers() == []


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("failure", "host0: engine: ended with rc 3. Last lines:\nthe end", id="last-lines"),
        pytest.param("no-program", "No such file or directory", id="no-program"),
        pytest.param("no-folder", "No such file or directory", id="no-folder"),
        pytest.param("empty", "argv is empty", id="empty"),
        pytest.param("nothing-to-do", "one of the following is required", id="nothing-to-do"),
        pytest.param("no-number", "timeout_s", id="no-number"),
        pytest.param("two-ends", "mutually exclusive", id="two-ends"),
        pytest.param("signal", "ended with rc -9", id="signal"),
        pytest.param("timeout", "not done after timeout_s=1 s; its process group was ended", id="timeout"),
        pytest.param("ignores", "not done after timeout_s=1 s; its process group was ended", id="ignores-the-request"),
        pytest.param("stall", "neither its status nor its output changed for stall_timeout_s=1", id="stall"),
        pytest.param("gave-up", "gave up: no pages", id="gave-up"),
        pytest.param("no-answer", "not done after timeout_s=1 s (no status yet: rc 4: down)", id="no-answer"),
        pytest.param("no-status", "status not readable", id="no-status"),
    ],
)
def test_failures(short: dict[str, dict[str, Any]], name: str, message: str) -> None:
    assert short[name]["failed"] and message in short[name]["msg"], short[name]


def test_a_timeout_ends_the_whole_group(short: dict[str, dict[str, Any]]) -> None:
    assert short["timeout"]["stdout"] == "begun"
    assert not lives(short["child"]["pid"])
    assert short["ignores"]["rc"] == -9
    assert not lives(short["pid"]["pid"])


def test_output_is_a_sign_of_life(short: dict[str, dict[str, Any]]) -> None:
    assert not short["talking"]["failed"]


def test_status_command(short: dict[str, dict[str, Any]]) -> None:
    assert not short["command"]["failed"] and short["command"]["status"]["done"] == 4


def test_a_killed_play_leaves_the_job_and_the_next_one_follows_it(play: Play) -> None:
    task = {"argv": play.argv(steps=60, pause=0.1), "status_file": str(play.status), "poll_s": 0.2, "key": "follow-me"}
    first = subprocess.Popen(
        play.command(task), env=environment(play.tmp), stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(play.status.exists)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    other, result = play.run_all({**task, "argv": play.argv(steps=61)}, task)
    assert other["failed"] and "runs already with other arguments" in other["msg"]
    assert result["attached"] and result["rc"] == 0, result["msg"]
    assert result["status"]["done"] == 60
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
    job, wait = play.run_all(
        {"argv": play.argv(), "status_file": str(play.status)},
        {"status_file": str(play.status), "timeout_s": 1},
        arguments=["--check"],
    )
    assert job["changed"] and not play.status.exists()
    assert job["msg"].startswith("check mode: ")
    assert not wait["changed"] and wait["skipped"]


def test_waiting_for_a_status_file(play: Play) -> None:
    worker = subprocess.Popen(play.argv(steps=5, pause=0.2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    result = play.run({"status_file": str(play.status), "done_when_complete": True, "poll_s": 0.2, "timeout_s": 30})
    assert not result["failed"] and not result["changed"] and result["status"]["done"] == 5
    worker.wait()


def test_a_log_gets_a_line_at_least_every_10_s(play: Play) -> None:
    command = play.command({"argv": play.argv(steps=14, pause=1.0), "status_file": str(play.status), "title": "slow"})
    process = subprocess.Popen(command, env=environment(play.tmp), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next((line for line in process.stdout if line.startswith("host0 | slow: ")), "")
    # It arrived while the job ran, not when Ansible's buffer was full.
    assert json.loads(play.status.read_text())["done"] < 14
    assert re.search(r"work, \d+ %, \d+ of 14 steps, [01]\.\d+ steps/s, \d+ s left, \d+ s elapsed", line), line
    process.communicate()


def test_a_terminal_gets_one_block_for_all_hosts(play: Play) -> None:
    argv = ["/bin/sh", "-c", "sleep 3; echo {{ inventory_hostname }}"]
    task = {"argv": argv, "title": "side by side", "poll_s": 0.5}
    command = play.command(task, arguments=["--forks", "3"], hosts=3)
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
