#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: boot_trial_step
short_description: One step of a trial boot, on the host
version_added: "1.0.0"
description:
  - What M(cpullm.epyc.boot_trial) does on the host between its reboots. Use that one.
  - Each step is done whole under a lock of the host, and may be cut by a power failure at any point.
author:
  - The cpullm.epyc authors (@cpullm)
extends_documentation_fragment:
  - action_common_attributes
attributes:
  check_mode:
    support: full
    details: Only the step V(look) is done.
  diff_mode:
    support: full
    details: The step V(look) shows what a trial and its promotion change.
  platform:
    platforms: linux
options:
  step:
    description:
      - V(look) reads. V(begin) takes the play's lock and reads. V(arm) prepares the next boot. V(verify) compares the
        trial boot with what is wanted. V(promote) makes it the default. V(disarm) takes every trace away. V(evidence)
        reads what an ended trial boot left. V(end) gives the play's lock back.
    type: str
    choices: [look, begin, arm, verify, promote, disarm, evidence, end]
    required: true
  size_kib:
    description: Size of a page in KiB.
    type: int
    choices: [2048, 1048576]
    default: 1048576
  nodes:
    description: Wanted pages of each NUMA node.
    type: list
    elements: dict
    default: []
    suboptions:
      node:
        description: Number of the node.
        type: int
        required: true
      pages:
        description: Number of pages.
        type: int
        required: true
  arguments:
    description: Wanted kernel arguments, in order.
    type: list
    elements: str
    default: []
  reserve_bytes:
    description: Memory that has to remain for the system.
    type: int
    default: 2147483648
  takeover:
    description: Whether huge page arguments of other files are left out.
    type: bool
    default: false
  deadline_s:
    description: Seconds after the start of systemd that a trial boot may stay unverified.
    type: int
    default: 600
  ignored_units:
    description: Patterns of units whose failure says nothing about the command line.
    type: list
    elements: str
    default: []
  owner:
    description: The play at work, as a dict of texts and numbers with a V(key).
    type: dict
  lease_s:
    description: Seconds after which another play may take the host over.
    type: int
    default: 3600
  dead:
    description: Key of a play whose end is known.
    type: str
"""

EXAMPLES = r"""
- name: Look whether a trial is going on
  cpullm.epyc.boot_trial_step:
    step: look
"""

RETURN = r"""
state:
  description: V(none), V(armed), V(running) or V(ended), before the step.
  returned: success
  type: str
  sample: none
id:
  description: The trial's id.
  returned: when there is a trial
  type: str
boot_id:
  description: Identity of this boot.
  returned: success
  type: str
traces:
  description: Files in which something of a trial is.
  returned: success
  type: list
  elements: str
matches:
  description: Whether what is on trial is what is wanted.
  returned: success
  type: bool
right:
  description: Whether the host runs with what is wanted, has its pages, and boots so by default.
  returned: success
  type: bool
findings:
  description: Why a trial cannot be made.
  returned: success
  type: list
  elements: str
faults:
  description: What the trial boot lacks.
  returned: with step V(verify)
  type: list
  elements: str
held:
  description: The other play that is at work.
  returned: when another play is at work
  type: dict
evidence:
  description: What an ended trial boot left, by source.
  returned: with step V(evidence)
  type: list
  elements: dict
"""

import fcntl
import os
import re
import secrets
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _grub, _preflight, _trial
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import read_number

MODULE_LOCK = "/run/cpullm/grub_hugepages.lock"
PSTORE = ("/sys/fs/pstore", "/var/lib/systemd/pstore")
TELLING = re.compile(r"HugeTLB|Kernel panic|Out of memory|oom-kill|BUG:|Oops|cpullm-boot-trial")
LAST_LINES = 6


class Steps:
    """The steps, each on what was read when the lock was taken."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        params = module.params
        self.wanted = _grub.Wanted(
            method="boot",
            size_kib=params["size_kib"],
            pages=tuple((item["node"], item["pages"]) for item in params["nodes"]),
            arguments=tuple(params["arguments"]),
            reserve_bytes=params["reserve_bytes"],
            takeover=params["takeover"],
        )
        self.host = _grub.read_host()
        self.found = _trial.read()

    def run(self, command: list[str]) -> tuple[int, str, str]:
        """Run a program; menu titles follow the locale, so it stays as it is."""
        if not os.path.isabs(command[0]):
            path = self.module.get_bin_path(command[0], required=True, opt_dirs=["/usr/sbin", "/sbin"])
            command = [path, *command[1:]]
        code, out, err = self.module.run_command(command)
        return code, out, err

    def look(self) -> dict[str, Any]:
        """Return what is there."""
        record = self.found.record
        survey = _grub.survey(self.host, self.wanted)
        findings = [
            *survey["findings"],
            *_preflight.trial_faults(self.host, self.found, self.wanted, self.module.params["deadline_s"]),
        ]
        return {
            "changed": False,
            "state": _trial.state(self.host, self.found),
            "id": record.id if record else None,
            "boot_id": self.host.boot_id,
            "traces": list(self.found.traces),
            "matches": record is not None and record.wanted == self.wanted,
            "right": survey["running_right"] and survey["configured"] and survey["pools_right"],
            "findings": findings,
        }

    def arm(self) -> dict[str, Any]:
        """Prepare the next boot as a trial."""
        looked = self.look()
        if looked["findings"]:
            self.module.fail_json(msg="GRUB was left alone: " + "; ".join(looked["findings"]))
        record = _trial.Record(
            id=secrets.token_hex(8),
            arguments=self.wanted.arguments,
            size_kib=self.wanted.size_kib,
            pages=self.wanted.pages,
            reserve_bytes=self.wanted.reserve_bytes,
            takeover=self.wanted.takeover,
            boot_id=self.host.boot_id,
            failed_units=tuple(self.failed_units()),
            deadline_s=self.module.params["deadline_s"],
            armed_at=int(time.time()),
            panic_s=read_number("/", "/proc/sys/kernel/panic") or 0,
        )
        _trial.arm(self.host, self.found, record, self.run)
        return {**looked, "changed": True, "id": record.id}

    def verify(self) -> dict[str, Any]:
        """Compare the trial boot with what is wanted."""
        _code, out, _err = self.run(["systemctl", "show", "--property=ActiveState", "--value", _trial.UNIT_NAME])
        faults = _trial.faults(
            self.host, self.found, self.failed_units(), out.strip(), self.module.params["ignored_units"]
        )
        return {**self.look(), "faults": faults}

    def promote(self) -> dict[str, Any]:
        """Make the trial's command line the default, after a last look."""
        looked = self.verify()
        if looked["faults"]:
            return looked
        record = self.found.record
        _trial.promote(self.host, self.found, self.run)
        # What the trial entry set for this boot. The watchdog stays until the next one: systemd 252 cannot be told.
        if record is not None:
            with open("/proc/sys/kernel/panic", "w", encoding="ascii") as stream:
                stream.write(f"{record.panic_s}\n")
        return {**looked, "changed": True}

    def disarm(self) -> dict[str, Any]:
        """Take every trace away."""
        looked = self.look()
        if self.found.traces:
            _trial.disarm(self.found, self.run)
        return {**looked, "changed": bool(self.found.traces)}

    def evidence(self) -> dict[str, Any]:
        """Read what the boot before this one left, if it was the trial."""
        record = self.found.record
        seen: list[dict[str, Any]] = []
        if record is not None:
            if self.found.log and self.found.log.startswith(record.id):
                seen.append({"source": _trial.LOG, "lines": self.found.log.splitlines()[1:]})
            # Whoever looks late finds other boots after it.
            for number in (-1, -2, -3):
                journal = ["journalctl", f"--boot={number}", "--quiet", "--no-pager", "--output=short-monotonic"]
                _code, out, _err = self.run([*journal, "--dmesg"])
                if f"{_grub.MARK}{record.id}" not in out:
                    continue
                lines = out.splitlines()
                telling = [line for line in lines[:-LAST_LINES] if TELLING.search(line)]
                seen.append({"source": "kernel log of that boot", "lines": [*telling[:12], *lines[-LAST_LINES:]]})
                _code, out, _err = self.run([*journal, "--priority=warning", "--lines=12"])
                seen.append({"source": "warnings of that boot", "lines": out.splitlines()})
                break
            seen += self.pstore(record.armed_at)
        return {**self.look(), "evidence": seen}

    @staticmethod
    def pstore(since: int) -> list[dict[str, Any]]:
        """Return what the firmware kept of a kernel's end."""
        seen = []
        for place in PSTORE:
            for folder, _folders, names in sorted(os.walk(place)):
                for name in sorted(names):
                    path = os.path.join(folder, name)
                    try:
                        if os.stat(path).st_mtime < since:
                            continue
                        with open(path, encoding="utf-8", errors="replace") as stream:
                            lines = stream.read(1 << 20).splitlines()
                    except OSError:
                        continue
                    seen.append({"source": path, "lines": lines[-30:]})
        return seen

    def failed_units(self) -> list[str]:
        """Return the units that failed in this boot."""
        command = ["systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager", "--full"]
        code, out, err = self.run(command)
        if code != 0:
            raise ValueError(f"systemctl list-units ended with rc {code}: {err.strip()}")
        return [line.split()[0] for line in out.splitlines() if line.strip()]


def take(module: AnsibleModule) -> dict[str, Any] | None:
    """Take the play's lock, or return who has it."""
    params = module.params
    owner, held, now = params["owner"], _trial.read_lock(), int(time.time())
    if held and held.get("key") not in (owner["key"], params["dead"]):
        until = held.get("until")
        if isinstance(until, int) and now < until <= now + 7 * 86400:
            return {**held, "left_s": until - now}
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    _trial.write_lock({**owner, "since": since, "until": now + params["lease_s"]})
    return None


def main() -> None:
    """Do one step."""
    module = AnsibleModule(
        argument_spec={
            "step": {
                "type": "str",
                "choices": ["look", "begin", "arm", "verify", "promote", "disarm", "evidence", "end"],
                "required": True,
            },
            "size_kib": {"type": "int", "choices": [2048, 1048576], "default": 1048576},
            "nodes": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"node": {"type": "int", "required": True}, "pages": {"type": "int", "required": True}},
            },
            "arguments": {"type": "list", "elements": "str", "default": []},
            "reserve_bytes": {"type": "int", "default": 2147483648},
            "takeover": {"type": "bool", "default": False},
            "deadline_s": {"type": "int", "default": 600},
            "ignored_units": {"type": "list", "elements": "str", "default": []},
            "owner": {"type": "dict"},
            "lease_s": {"type": "int", "default": 3600},
            "dead": {"type": "str"},
        },
        required_if=[("step", step, ["owner"]) for step in ("begin", "arm", "promote", "disarm", "end")],
        supports_check_mode=True,
    )
    step = module.params["step"]
    try:
        if module.check_mode or step == "look":
            steps = Steps(module)
            result = steps.look()
            if not result["findings"]:
                result["diff"] = _trial.difference(steps.host, steps.found, steps.wanted)
            module.exit_json(**result)
        os.makedirs(os.path.dirname(MODULE_LOCK), exist_ok=True)
        with open(MODULE_LOCK, "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if module.params["owner"] is not None:
                held = take(module)
                if held is not None:
                    module.exit_json(changed=False, held=held)
            if step == "end":
                _trial.write_lock(None)
                module.exit_json(changed=False)
            steps = Steps(module)
            result = (steps.look if step == "begin" else getattr(steps, step))()
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))
        return
    module.exit_json(**result)


if __name__ == "__main__":
    main()
