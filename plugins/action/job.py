# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.job: start or find the job, poll it, show it, judge its end."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import Status, format_duration, parse_status
from ansible_collections.cpullm.epyc.plugins.plugin_utils._reporter import Reporter
from ansible_collections.cpullm.epyc.plugins.plugin_utils._target import ask_agent, reset_connection

# A network that stumbles for less than this does not end an hour's build.
_SILENCE_S = 120.0
_SHORTEST_POLL_S = 0.2
_FIRST_LOOK_S = 0.5

ARGUMENT_SPEC = {
    "argv": {"type": "list", "elements": "str"},
    "chdir": {"type": "str"},
    "environment": {"type": "dict", "default": {}},
    "key": {"type": "str", "no_log": False},
    "status_file": {"type": "str"},
    "status_argv": {"type": "list", "elements": "str"},
    "poll_s": {"type": "float", "default": 2.0},
    "timeout_s": {"type": "float", "default": 3600.0},
    "stall_timeout_s": {"type": "float"},
    "title": {"type": "str"},
    "done_when_complete": {"type": "bool", "default": False},
}


def fingerprint(argv: list[str], chdir: str | None) -> str:
    """Return what makes two jobs the same: program, arguments and folder; not the environment, which may hold keys."""
    return hashlib.sha256(json.dumps([argv, chdir]).encode("utf-8")).hexdigest()


def safe_key(key: str) -> str:
    """Return a key as the name of a folder; unusual ones by their hash."""
    plain = key.isascii() and key.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if plain and not key.startswith(".") and len(key) <= 64:
        return key
    return hashlib.sha256(key.encode("utf-8")).hexdigest()[:24]


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs or watches one long piece of work on the target."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _dummy, args = self.validate_argument_spec(
            argument_spec=ARGUMENT_SPEC,
            mutually_exclusive=[("status_file", "status_argv"), ("argv", "done_when_complete")],
            required_one_of=[("argv", "status_file", "status_argv")],
        )
        if args["argv"] is not None and not args["argv"]:
            raise AnsibleActionFail("argv is empty: expected a program and its arguments")
        title = args["title"] or (args["argv"][0] if args["argv"] else "waiting")
        if self._task.check_mode:
            result.update(changed=args["argv"] is not None, skipped=args["argv"] is None)
            result["msg"] = (
                f"check mode: {title} was not started" if args["argv"] else f"check mode: no wait for {title}"
            )
            return result
        job = _Job(self, task_vars, args)
        host = str(task_vars.get("inventory_hostname", "localhost"))
        with Reporter(host, title) as reporter:
            result.update(job.follow(reporter))
        if result.get("failed"):
            result["msg"] = f"{host}: {title}: {result['msg']}"
        return result


class _Job:
    """One job's questions and answers."""

    def __init__(self, action: ActionBase, task_vars: dict[str, Any], args: dict[str, Any]) -> None:
        self._action = action
        self._task_vars = task_vars
        self._args = args
        argv: list[str] | None = args["argv"]
        print_ = fingerprint(argv, args["chdir"]) if argv else ""
        self._spec = {
            "key": safe_key(args["key"] or print_[:24]) if argv else None,
            "fingerprint": print_,
            "argv": argv,
            "chdir": args["chdir"],
            "environment": {str(k): str(v) for k, v in args["environment"].items()},
            "status_file": args["status_file"],
            "status_argv": args["status_argv"],
        }
        self._poll_s: float = max(_SHORTEST_POLL_S, args["poll_s"])

    def _ask(self, operation: str, reporter: Reporter, wait_s: float = 0.0) -> dict[str, Any]:
        """Return an answer, over a new connection where the old one broke."""
        silent_since = time.monotonic()
        while True:
            try:
                answer = ask_agent(
                    self._action, self._task_vars, {"operation": operation, "spec": self._spec, "wait_s": wait_s}
                )
                break
            except AnsibleConnectionFailure:
                if time.monotonic() - silent_since > _SILENCE_S:
                    raise
                reporter.tell(None, "the host does not answer")
                reset_connection(self._action)
                time.sleep(1.0)
        if answer.get("state") == "error":
            raise AnsibleActionFail(str(answer["error"]))
        return answer

    def _end(self, reporter: Reporter, why: str, status: Status | None) -> dict[str, Any]:
        """Kill the job, if there is one, and return the failure."""
        failure: dict[str, Any] = {"failed": True, "msg": why, "status": _as_dict(status)}
        failure["elapsed_s"] = round(reporter.elapsed_s, 1)
        if self._spec["key"] is not None:
            answer = self._ask("kill", reporter)
            self._ask("clean", reporter)
            failure.update(changed=True, rc=answer.get("rc"), **_tails(answer))
            failure["msg"] += "; its process group was ended" + _last_words(answer)
        return failure

    def follow(self, reporter: Reporter) -> dict[str, Any]:
        """Return the result's fields when the work ended, one way or the other."""
        args = self._args
        has_job = self._spec["key"] is not None
        status: Status | None = None
        attached = False
        play = os.getppid()
        seen: tuple[Any, ...] = ()
        changed_at = time.monotonic()
        operation = "start" if has_job else "look"
        while True:
            # The first look comes soon, so that people see a status and short work ends fast.
            wait_s = min(self._poll_s, _FIRST_LOOK_S) if operation == "start" else self._poll_s
            answer = self._ask(operation, reporter, wait_s if has_job else 0.0)
            # A worker outlives a play that was killed. It must not clear away what the next play will follow.
            if os.getppid() != play:
                raise AnsibleActionFail("the play is gone; the job goes on, and the same task run again follows it")
            if answer.get("state") == "conflict":
                raise AnsibleActionFail(
                    f"a job with the key {self._spec['key']} runs already with other arguments "
                    f"(pid {answer['pid']}): wait for it or end it, or give this one another key"
                )
            attached = answer.get("attached", attached)
            operation = "look"
            note = ""
            if answer.get("status"):
                try:
                    status = parse_status(answer["status"])
                except ValueError as error:
                    note = f"status not readable: {error}"
            elif answer.get("status_error"):
                note = f"no status yet: {answer['status_error']}"
            reporter.tell(status, note)
            elapsed = answer.get("elapsed_s", reporter.elapsed_s)
            if has_job and answer["state"] != "running":
                self._ask("clean", reporter)
                return self._judge(answer, status, elapsed, attached)
            if not has_job and status is not None and (status.complete or status.failed):
                end: dict[str, Any] = {"changed": False, "status": _as_dict(status), "elapsed_s": round(elapsed, 1)}
                if status.failed:
                    end.update(failed=True, msg=f"gave up: {status.message or 'no reason given'}")
                return end
            now = time.monotonic()
            if status is not None or has_job:
                sign = (status.phase, status.done, status.message) if status else ()
                if (*sign, answer.get("output_bytes")) != seen:
                    seen, changed_at = (*sign, answer.get("output_bytes")), now
            if elapsed > args["timeout_s"]:
                why = f"not done after timeout_s={format_duration(args['timeout_s'])}"
                return self._end(reporter, why + (f" ({note})" if note else ""), status)
            if args["stall_timeout_s"] and now - changed_at > args["stall_timeout_s"]:
                why = f"neither its status nor its output changed for stall_timeout_s={args['stall_timeout_s']:g}"
                return self._end(reporter, why + (f" ({note})" if note else ""), status)
            if not has_job:
                time.sleep(self._poll_s)

    def _judge(self, answer: dict[str, Any], status: Status | None, elapsed: float, attached: bool) -> dict[str, Any]:
        """Return the result of a job that ended by itself."""
        result: dict[str, Any] = {
            "changed": True,
            "rc": answer.get("rc"),
            "attached": attached,
            "status": _as_dict(status),
            "elapsed_s": round(elapsed, 1),
            **_tails(answer),
        }
        if answer["state"] == "absent":
            result.update(failed=True, msg="its record is gone: somebody removed it, or the host rebooted meanwhile")
        elif answer["state"] == "lost":
            result.update(failed=True, msg="its runner was killed, so its result is unknown" + _last_words(answer))
        elif answer["rc"] != 0:
            result.update(failed=True, msg=f"ended with rc {answer['rc']}" + _last_words(answer))
        return result


def _as_dict(status: Status | None) -> dict[str, Any] | None:
    """Return a status as the result shows it."""
    if status is None:
        return None
    return {"phase": status.phase, "done": status.done, "total": status.total, "message": status.message}


def _tails(answer: dict[str, Any]) -> dict[str, str]:
    """Return the ends of both outputs."""
    return {"stdout": str(answer.get("stdout", "")).rstrip(), "stderr": str(answer.get("stderr", "")).rstrip()}


def _last_words(answer: dict[str, Any]) -> str:
    """Return the last lines of a job, errors before output, for a message."""
    text = str(answer.get("stderr") or answer.get("stdout") or "").rstrip()
    return ". Last lines:\n" + "\n".join(text.splitlines()[-15:]) if text else ""
