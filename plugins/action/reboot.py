# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.reboot: ask for the reboot, wait with progress, prove that it was one."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import format_duration
from ansible_collections.cpullm.epyc.plugins.plugin_utils._reporter import Reporter
from ansible_collections.cpullm.epyc.plugins.plugin_utils._target import reset_connection

_BOOT_ID = re.compile(r"^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.MULTILINE)
# One read for both: the boot's identity and whether systemd is through with it.
_LOOK = "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running 2>/dev/null || true"
# The request must end, and its answer arrive, before the network goes. systemd's own timer outlives the session; a
# host without one gets a process of its own session.
REQUEST = (
    "if [ -d /run/systemd/system ]; then"
    " systemd-run --quiet --collect --on-active=2s --timer-property=AccuracySec=200ms systemctl {verb};"
    " else setsid sh -c 'sleep 2; {plain}' </dev/null >/dev/null 2>&1 & fi"
)

# What waiting for another boot takes; also what a trial boot is given.
WAIT_OPTIONS = {
    "timeout_s": {"type": "float", "default": 1800.0},
    "expected_s": {"type": "float", "default": 300.0},
    "down_timeout_s": {"type": "float", "default": 600.0},
    "settle_timeout_s": {"type": "float", "default": 300.0},
    "connect_timeout_s": {"type": "int", "default": 10},
    "poll_s": {"type": "float", "default": 2.0},
}
ARGUMENT_SPEC = {
    **WAIT_OPTIONS,
    "title": {"type": "str", "default": "reboot"},
}


class ActionModule(ActionBase):  # type: ignore[misc]
    """Reboots a host whose reboot the caller was allowed to ask for."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        host = str((task_vars or {}).get("inventory_hostname", "localhost"))
        if self._connection.transport == "local":
            raise AnsibleActionFail(f"{host}: its connection is local, so this would reboot the controller")
        if self._task.check_mode:
            result.update(changed=True, rebooted=False, msg=f"check mode: {host} was not rebooted")
            return result
        before, _state = self._look()
        with Reporter(host, args["title"]) as reporter:
            reporter.tell_clock("asking for it", args["expected_s"])
            request = self._low_level_execute_command(
                REQUEST.format(verb="reboot", plain="reboot || shutdown -r now"), sudoable=True
            )
            if request["rc"] != 0:
                raise AnsibleActionFail(
                    f"{host}: asking for a reboot ended with rc {request['rc']}: "
                    f"{(request['stderr'] or request['stdout']).strip()}"
                )
            outcome = self._wait(before, args, reporter)
            elapsed = round(reporter.elapsed_s, 1)
        result.update(elapsed_s=elapsed, boot_id_before=before, **outcome)
        if result.get("failed"):
            result["msg"] = f"{host}: {result['msg']}"
        return result

    def _look(self) -> tuple[str, str]:
        """Return the boot's identity and what systemd says of it; raises where the host does not say."""
        # Anybody may read both, so no password and no terminal is needed for it.
        answer = self._low_level_execute_command(_LOOK, sudoable=False)
        text = answer["stdout"].replace("\r", "")
        found = _BOOT_ID.search(text)
        if found is None:
            raise AnsibleConnectionFailure(
                f"no boot_id in the answer (rc {answer['rc']}): {(answer['stderr'] or answer['stdout']).strip()[-300:]}"
            )
        state = text[found.end() :].strip().splitlines()
        return found.group(0), state[-1].strip() if state else ""

    def _limit_waits(self, seconds: int) -> None:
        """Make each attempt short, where the connection can be told so.

        A host that goes down may never close its connections, and ssh would wait for it as long as its keep-alive says.
        """
        for option in ("timeout", "connection_timeout"):
            with contextlib.suppress(KeyError):
                self._connection.get_option(option)
                self._connection.set_option(option, seconds)
        with contextlib.suppress(KeyError):
            # Of two values ssh takes the first.
            arguments = self._connection.get_option("ssh_args") or ""
            short = f"-o ServerAliveInterval={max(1, seconds // 2)} -o ServerAliveCountMax=2"
            self._connection.set_option("ssh_args", f"{short} {arguments}")

    def _wait(self, before: str, args: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
        """Return the outcome: another boot that settled, or a failure that says what was seen."""
        # The reporter may have told of other work before; what is waited for begins now.
        begin = reporter.elapsed_s
        expected = begin + max(1.0, args["expected_s"])
        went_down = False
        silence = ""
        after: str | None = None
        back_at = 0.0
        self._limit_waits(args["connect_timeout_s"])
        reset_connection(self)
        while True:
            phase = "booted, starting units" if after else "down" if went_down else "going down"
            reporter.tell_clock(phase, expected, f"gives up after {format_duration(args['timeout_s'])}")
            time.sleep(args["poll_s"])
            try:
                found, state = self._look()
            except AnsibleConnectionFailure as error:
                silence = str(error)
                went_down = True
                reset_connection(self)
                found, state = "", ""
            elapsed = reporter.elapsed_s - begin
            if found and found != before:
                if after is None:
                    after, back_at = found, elapsed
                # An empty answer is a host without systemd; degraded is for the caller's verification to judge.
                if state not in ("initializing", "starting") or elapsed - back_at > args["settle_timeout_s"]:
                    return {
                        "changed": True,
                        "rebooted": True,
                        "boot_id": found,
                        "system_state": state,
                        "ssh_back_s": round(back_at, 1),
                    }
            same = f"boot_id is still {before}"
            if found == before and elapsed > args["down_timeout_s"]:
                return {
                    "failed": True,
                    "changed": False,
                    "rebooted": False,
                    "boot_id": before,
                    "msg": f"it was asked to reboot {format_duration(elapsed)} ago and did not: {same}. Look at "
                    "`systemctl list-jobs` there for a service that does not stop",
                }
            if elapsed > args["timeout_s"]:
                return {
                    "failed": True,
                    "changed": True,
                    "rebooted": after is not None,
                    "boot_id": after or found or None,
                    "msg": f"not back after timeout_s={format_duration(args['timeout_s'])}: "
                    + (same if found == before else f"the last attempt said: {silence.strip() or 'nothing'}")
                    + ". Look at its console; a machine that trains memory may take longer",
                }
