# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of cpullm.epyc.job that runs on the target: sent as text over the connection for each request.

It imports nothing but the standard library, and answers with one line, MARKER and a JSON object. A job is a folder
named after its key; `state.json` names the runner and the job with their start times (a pid alone is reused), `rc`
appears when the job ended. The folder lies below /run, so that a reboot forgets what it ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from typing import Any

MARKER = "CPULLM-JOB "
STATUS_LIMIT = 65536
TAIL_LIMIT = 16384


def root() -> str:
    """Return this user's folder of jobs, made if need be; raises OSError where it belongs to somebody else."""
    uid = os.geteuid()
    path = "/run/cpullm/jobs" if uid == 0 else f"/tmp/cpullm-jobs-{uid}"  # noqa: S108 - checked below to be this user's alone
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
            raise OSError(f"{path} is not a folder of uid {uid} alone") from None
    return path


def start_time(pid: int) -> int | None:
    """Return when the kernel started a process, in ticks since boot, or None where there is none or only a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            # The name, in brackets, may hold spaces and brackets itself: fields are counted behind the last one.
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def read(path: str, limit: int, tail: bool = False) -> str | None:
    """Return the text of a file, at most its first or last bytes, or None where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            if tail:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - limit))
            return stream.read(limit).decode("utf-8", "replace")
    except OSError:
        return None


def write(path: str, text: str) -> None:
    """Replace a file in one step."""
    with open(path + ".new", "w") as stream:
        stream.write(text)
    os.replace(path + ".new", path)


def state_of(folder: str) -> dict[str, Any] | None:
    """Return the recorded state of a job, or None."""
    text = read(folder + "/state.json", STATUS_LIMIT)
    state: dict[str, Any] | None = json.loads(text) if text else None
    return state


def lives(process: dict[str, Any] | None) -> bool:
    """Return whether a recorded process is still that process."""
    return process is not None and process["start"] is not None and start_time(process["pid"]) == process["start"]


def group_lives(process: dict[str, Any]) -> bool:
    """Return whether anything of the job's process group is left."""
    try:
        os.killpg(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_group(process: dict[str, Any] | None) -> None:
    """End the job's process group: asked first, then killed."""
    if process is None:
        return
    found = start_time(process["pid"])
    if found is not None and found != process["start"]:
        return  # The number belongs to another process by now.
    for number, wait_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        try:
            os.killpg(process["pid"], number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if not group_lives(process):
                return
            time.sleep(0.05)


def describe(pid: int) -> dict[str, Any]:
    """Return a process as state.json records it."""
    return {"pid": pid, "start": start_time(pid)}


def run(folder: str, spec: dict[str, Any], ready: int) -> None:
    """Be the runner: start the job in a session of its own, record it, wait for it, and record how it ended."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    # The lock's descriptor among them: a runner that kept it would hold the lock for as long as the job takes.
    os.closerange(3, ready)
    os.closerange(ready + 1, 256)
    state: dict[str, Any] = {
        "runner": describe(os.getpid()),
        "job": None,
        "fingerprint": spec["fingerprint"],
        "started": time.time(),
    }
    environment = dict(os.environ)
    environment.update(spec["environment"])
    process = None
    try:
        os.umask(0o077)
        with open(folder + "/stdout", "wb") as out, open(folder + "/stderr", "wb") as err:
            os.umask(0o022)
            process = subprocess.Popen(
                spec["argv"],
                cwd=spec["chdir"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
    except OSError as error:
        write(folder + "/stderr", f"{error}\n")
    if process is not None:
        state["job"] = describe(process.pid)
    write(folder + "/state.json", json.dumps(state))
    os.close(ready)
    write(folder + "/rc", str(127 if process is None else process.wait()))


def start(folder: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Start a job, or find the one that runs; returns a partial answer."""
    state = state_of(folder)
    if state is not None:
        if lives(state["runner"]) and read(folder + "/rc", 16) is None:
            if state["fingerprint"] != spec["fingerprint"]:
                return {"state": "conflict", "pid": (state["job"] or state["runner"])["pid"]}
            return {"attached": True}
        end_group(state["job"])
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder, 0o700)
    if spec["status_file"] and os.path.isfile(spec["status_file"]):
        os.unlink(spec["status_file"])  # What the run before said would be taken for this one's progress.
    readable, ready = os.pipe()
    if os.fork() == 0:
        try:
            run(folder, spec, ready)
        finally:
            os._exit(0)
    os.close(ready)
    os.read(readable, 1)  # End of file: the runner has recorded itself.
    os.close(readable)
    return {"attached": False}


def look(folder: str | None, spec: dict[str, Any], wait_s: float) -> dict[str, Any]:
    """Return how a job is, at the latest after wait_s, sooner when it ends."""
    answer: dict[str, Any] = {}
    if folder is not None:
        deadline = time.monotonic() + wait_s
        while True:
            state = state_of(folder)
            if state is None:
                return {"state": "absent"}
            alive = lives(state["runner"])  # Asked before the result is: it may end between the two questions.
            code = read(folder + "/rc", 16)
            if code or not alive or time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        answer["elapsed_s"] = max(0.0, time.time() - state["started"])
        answer["output_bytes"] = sum(
            os.path.getsize(folder + name) for name in ("/stdout", "/stderr") if os.path.exists(folder + name)
        )
        answer["state"] = "running" if not code and alive else "finished" if code else "lost"
        if answer["state"] != "running":
            answer["rc"] = int(code) if code else None
            answer["stdout"] = read(folder + "/stdout", TAIL_LIMIT, tail=True) or ""
            answer["stderr"] = read(folder + "/stderr", TAIL_LIMIT, tail=True) or ""
    if spec["status_file"]:
        answer["status"] = read(spec["status_file"], STATUS_LIMIT)
    elif spec["status_argv"]:
        answer.update(ask(spec))
    return answer


def ask(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what the status command says, or why it says nothing."""
    environment = dict(os.environ)
    environment.update(spec["environment"])
    try:
        done = subprocess.run(
            spec["status_argv"],
            cwd=spec["chdir"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"status": None, "status_error": str(error)}
    if done.returncode != 0:
        last = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
        return {"status": None, "status_error": f"rc {done.returncode}: {last}"}
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return {"status": lines[-1][:STATUS_LIMIT] if lines else None}


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request of the controller."""
    operation, spec = request["operation"], request["spec"]
    if spec["key"] is None:
        return look(None, spec, 0)
    parent = root()
    folder = os.path.join(parent, spec["key"])
    with open(parent + "/.lock", "w") as lock:
        if operation in ("start", "clean"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if operation == "start":
            started = start(folder, spec)
            if "state" in started:
                return started
            fcntl.flock(lock, fcntl.LOCK_UN)
            started.update(look(folder, spec, request["wait_s"]))
            return started
        if operation == "kill":
            state = state_of(folder)
            end_group(state["job"] if state else None)
            return look(folder, spec, 2.0)
        if operation == "clean":
            state = state_of(folder)
            if state is None or not lives(state["runner"]) or read(folder + "/rc", 16) is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return {}
    return look(folder, spec, request["wait_s"])


def main(request: dict[str, Any]) -> None:
    """Answer on standard output."""
    try:
        answer = serve(request)
    except Exception as error:  # noqa: BLE001 - the controller must get an answer, whatever happened
        answer = {"state": "error", "error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(MARKER + json.dumps(answer) + "\n")
    sys.stdout.flush()
