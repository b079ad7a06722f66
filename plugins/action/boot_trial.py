# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.boot_trial: arm, reboot, wait, verify, promote; or back to the old command line."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible_collections.cpullm.epyc.plugins.action import reboot
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import format_duration
from ansible_collections.cpullm.epyc.plugins.plugin_utils._reporter import Reporter
from ansible_collections.cpullm.epyc.plugins.plugin_utils._target import reset_connection

STEP = "cpullm.epyc.boot_trial_step"
POWER_CYCLE_TIMEOUT_S = 300
# How much longer than its reboots a play may hold a host.
LEASE_MARGIN_S = 900
# A network that is lost for a moment is no reason to give a good boot up.
PROMOTE_PAUSES_S = (5.0, 10.0, 20.0)

STEP_OPTIONS = {
    "size_kib": {"type": "int", "default": 1048576},
    "nodes": {"type": "list", "elements": "dict", "default": []},
    "arguments": {"type": "list", "elements": "str", "default": []},
    "reserve_bytes": {"type": "int", "default": 2147483648},
    "takeover": {"type": "bool", "default": False},
    "deadline_s": {"type": "int", "default": 600},
    "ignored_units": {"type": "list", "elements": "str", "default": []},
}
ARGUMENT_SPEC = {
    **STEP_OPTIONS,
    **reboot.WAIT_OPTIONS,
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "reboot_allowed": {"type": "bool", "default": False},
    "power_cycle": {"type": "list", "elements": "str"},
}


class TrialError(Exception):
    """The trial ended otherwise than wanted; the message says what was seen and what the host runs with now."""

    def __init__(self, message: str, evidence: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.evidence = evidence or []


def identify(pid: int) -> dict[str, Any]:
    """Return who this process is: comparable on the same machine, and readable for people elsewhere."""
    machine = started = ""
    with contextlib.suppress(OSError, IndexError):
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    name = socket.gethostname()
    return {
        "key": f"{name} {machine} {pid} {started}",
        "controller": name,
        "machine": machine,
        "pid": pid,
        "started": started,
    }


def has_ended(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Return whether the play that holds a host is known to be over: it ran on this machine and does not any more."""
    if holder.get("controller") != me["controller"] or not me["machine"]:
        return False
    if holder.get("machine") != me["machine"]:
        return True
    pid = holder.get("pid")
    return not isinstance(pid, int) or identify(pid)["started"] != holder.get("started")


def describe(evidence: list[dict[str, Any]], limit: int = 40) -> str:
    """Return what was seen as lines for a message: of each source how it begins, and more of how it ends."""
    if not evidence:
        return (
            "It left neither a log nor a journal: it ended before its root file system was writable, or did not begin. "
            "The machine's console has what it said"
        )
    each = max(6, limit // len(evidence))
    blocks = []
    for item in evidence:
        lines = item["lines"]
        if len(lines) > each:
            lines = [*lines[:3], "...", *lines[4 - each :]]
        blocks.append(f"{item['source']}:\n  " + "\n  ".join(lines))
    return "What was seen there:\n" + "\n".join(blocks)


class ActionModule(reboot.ActionModule):
    """Tries a kernel command line on a host whose reboots the caller was allowed to ask for."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super(reboot.ActionModule, self).run(tmp, task_vars)
        _dummy, self._args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        self._vars = task_vars or {}
        self._host = str(self._vars.get("inventory_hostname", "localhost"))
        # The worker, not the play: it is a session of its own, and goes on when only the play's process is killed.
        self._me = identify(os.getpid())
        self._power_cycled = False
        if self._connection.transport == "local" and self._args["state"] == "present":
            raise AnsibleActionFail(f"{self._host}: its connection is local, so this would reboot the controller")
        if self._task.check_mode:
            result.update(self._foresee())
            return result
        with Reporter(self._host, "trial of the kernel command line") as self._reporter:
            self._reporter.tell_clock("looking", self._args["expected_s"])
            looked = self._begin()
            try:
                result.update(self._clear(looked) if self._args["state"] == "absent" else self._work(looked))
            except TrialError as error:
                result.update(failed=True, changed=True, msg=f"{self._host}: {error}", evidence=error.evidence)
            finally:
                with contextlib.suppress(AnsibleActionFail, AnsibleConnectionFailure):
                    self._step("end")
            result["elapsed_s"] = round(self._reporter.elapsed_s, 1)
        return result

    def _step(self, name: str, **more: Any) -> dict[str, Any]:
        """Return what a step on the host returned; raises AnsibleActionFail with its message where it failed."""
        options = {key: self._args[key] for key in STEP_OPTIONS}
        lease = 2 * self._args["timeout_s"] + self._args["deadline_s"] + LEASE_MARGIN_S
        answer: dict[str, Any] = self._execute_module(
            module_name=STEP,
            module_args={**options, "step": name, "owner": self._me, "lease_s": int(lease), **more},
            task_vars=self._vars,
        )
        if answer.get("failed"):
            raise AnsibleActionFail(f"{self._host}: {answer.get('msg', 'the step failed without a message')}")
        if held := answer.get("held"):
            if has_ended(held, self._me) and more.get("dead") != held["key"]:
                return self._step(name, **{**more, "dead": held["key"]})
            raise AnsibleActionFail(
                f"{self._host}: another play is at work on its boot: process {held.get('pid')} on "
                f"{held.get('controller')}, since {held.get('since')}. Wait until it ends. If it is dead, the host is "
                f"free in {format_duration(held.get('left_s', 0))}, or at once after "
                "`rm /var/lib/cpullm/boot_trial.lock` there"
            )
        return answer

    def _begin(self) -> dict[str, Any]:
        """Take the host for this play, or keep it, and look at it."""
        return self._step("begin")

    def _foresee(self) -> dict[str, Any]:
        """Return what a run would do."""
        looked = self._step("look")
        if self._args["state"] == "absent":
            return {"changed": bool(looked["traces"]), "outcome": "foreseen", "traces": looked["traces"]}
        if looked["right"] and not looked["traces"]:
            return {"changed": False, "outcome": "right"}
        if looked["findings"]:
            raise AnsibleActionFail(f"{self._host}: nothing was touched. {'; '.join(looked['findings'])}")
        if not self._args["reboot_allowed"] and looked["state"] == "none":
            return {"changed": False, "outcome": "consent"}
        return {"changed": True, "outcome": "foreseen", "diff": looked.get("diff", [])}

    def _clear(self, looked: dict[str, Any]) -> dict[str, Any]:
        """Take away what is left of a trial."""
        if looked["traces"]:
            self._step("disarm")
        return {"changed": bool(looked["traces"]), "outcome": "cleared", "traces": looked["traces"]}

    def _work(self, looked: dict[str, Any]) -> dict[str, Any]:
        """Go on from whatever state the host is in."""
        state = looked["state"]
        if state == "running" and looked["matches"]:
            return self._judge(looked)
        if looked["right"]:
            return {**self._clear(looked), "outcome": "right"}
        allowed = self._args["reboot_allowed"]
        if state == "running" and not allowed:
            raise TrialError(
                f"a trial of another command line ({looked['id']}) is running. It reboots by itself at its deadline; "
                "run again then, or now with consent (grub_hugepages_reboot_allowed)"
            )
        earlier: list[dict[str, Any]] = []
        if state == "ended":
            earlier = self._step("evidence")["evidence"]
            self._display.warning(
                f"{self._host}: an earlier trial ({looked['id']}) ended, and no play was there to see it. "
                + describe(earlier),
                # Lines of a log stay lines.
                formatted=True,
            )
        if not allowed:
            return {**self._clear(looked), "outcome": "consent", "evidence": earlier}
        # Arming replaces what an earlier trial left.
        armed = self._step("arm")
        self._boot(armed["boot_id"], "trial boot", self._args["deadline_s"])
        looked = self._begin()
        if looked["state"] == "running" and looked["id"] == armed["id"]:
            return self._judge(looked)
        if looked["right"]:
            return {**self._clear(looked), "changed": True, "outcome": "promoted"}
        raise self._ended(
            "the trial boot did not come through (a panic, no root file system, no network, or nobody could verify it "
            f"within {self._args['deadline_s']} s)"
        )

    def _judge(self, looked: dict[str, Any]) -> dict[str, Any]:
        """Verify the trial boot; keep it, or return to the old command line and fail."""
        self._reporter.tell_clock("verifying", self._args["expected_s"])
        try:
            judged = self._promote()
            if "faults" not in judged and not judged["right"]:
                raise self._ended("the host rebooted while it was verified")
            faults = judged.get("faults", [])
        except AnsibleConnectionFailure as error:
            self._boot(looked["boot_id"], "way back", self._args["deadline_s"], ask=False)
            self._begin()
            raise self._ended(f"the host was lost while it was verified: {error}") from error
        except AnsibleActionFail as error:
            faults = [f"it is verified, and could not become the default: {error.message}"]
        if not faults:
            return {"changed": True, "outcome": "promoted", "id": looked["id"], "power_cycled": self._power_cycled}
        said = "; ".join(faults)
        if not self._args["reboot_allowed"]:
            raise TrialError(
                f"the trial boot is not right: {said}. It reboots by itself into the former command line at most "
                f"{self._args['deadline_s']} s after its start; nothing more was done without consent to reboot"
            )
        self._boot(looked["boot_id"], "way back", 0)
        self._begin()
        raise self._ended(said)

    def _promote(self) -> dict[str, Any]:
        """Return what the step promote returned, or a look at a host that is in its trial boot no more."""
        for pause_s in PROMOTE_PAUSES_S:
            try:
                return self._step("promote")
            except AnsibleConnectionFailure:
                time.sleep(pause_s)
                reset_connection(self)
            # The answer may be all that was lost.
            with contextlib.suppress(AnsibleConnectionFailure):
                looked = self._begin()
                if looked["state"] != "running":
                    return looked
        return self._step("promote")

    def _ended(self, said: str) -> TrialError:
        """Return the failure of a trial whose host is back; its traces are taken away."""
        evidence = self._step("evidence")["evidence"]
        looked = self._step("disarm")
        how = " after a power cycle" if self._power_cycled else ""
        where = (
            "The host still runs with the command line that failed (GRUB booted it twice): reboot it, since nothing "
            "of the trial is left"
            if looked["state"] == "running"
            else f"The host is back{how} on its former command line, which stays the default"
        )
        return TrialError(f"the new kernel command line was not kept: {said}. {where}. {describe(evidence)}", evidence)

    def _boot(self, before: str, what: str, deadline_s: int, ask: bool = True) -> None:
        """Reboot (or wait for a reboot by itself), and return once another boot answers; raises TrialError."""
        shell = self._connection._shell
        if shell.tmpdir:
            # The next boot may not have this directory.
            self._remove_tmp_path(shell.tmpdir)
            shell.tmpdir = None
        if ask:
            request = self._low_level_execute_command(
                reboot.REQUEST.format(verb="reboot", plain="reboot || shutdown -r now"), sudoable=True
            )
            if request["rc"] != 0:
                self._step("disarm")
                raise TrialError(
                    f"asking for a reboot ended with rc {request['rc']}: "
                    f"{(request['stderr'] or request['stdout']).strip()}. Nothing of the trial is left"
                )
        # A boot that fails late costs its deadline and a second boot. A power cycle need not wait for that one.
        second = self._args["timeout_s"] if deadline_s and self._args["power_cycle"] is None else 0
        wait = {
            **self._args,
            "timeout_s": self._args["timeout_s"] + deadline_s + second,
            # The deadline of a trial boot runs while its units start.
            "settle_timeout_s": min(self._args["settle_timeout_s"], self._args["deadline_s"] / 2),
        }
        if not ask:
            wait["down_timeout_s"] = wait["timeout_s"]
        outcome = self._wait(before, wait, self._reporter)
        if not outcome.get("failed"):
            return
        if outcome["boot_id"] == before:
            self._step("disarm")
            raise TrialError(f"{outcome['msg']}. Nothing of the trial is left, and the next boot is as before")
        if self._args["power_cycle"] is None:
            raise TrialError(
                f"{what}: {outcome['msg']}. If it hangs, cycle its power: GRUB has taken the one-time choice back, so "
                "the former command line boots then. grub_hugepages_power_cycle lets the play do it"
            )
        self._cycle(outcome["msg"])
        outcome = self._wait(before, {**wait, "timeout_s": self._args["timeout_s"]}, self._reporter)
        if outcome.get("failed"):
            raise TrialError(f"{what}: its power was cycled, and it is {outcome['msg']}")

    def _cycle(self, why: str) -> None:
        """Run the operator's command that cycles the host's power; raises TrialError."""
        command = self._args["power_cycle"]
        self._reporter.tell_clock("power cycle", self._args["expected_s"])
        self._display.warning(f"{self._host}: {why}; cycling its power with {command[0]}")
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=POWER_CYCLE_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TrialError(
                f"{why}; grub_hugepages_power_cycle could not be run on the controller: {error}"
            ) from error
        if done.returncode != 0:
            raise TrialError(
                f"{why}; grub_hugepages_power_cycle ended with rc {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-500:]}"
            )
        self._power_cycled = True
