#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start, restart or stop llama-server instances so that each runs what its unit files say."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: server_instances
short_description: Run llama-server instances with the configuration on disk
version_added: "1.0.0"
description:
  - Enables and starts the wanted C(llama-server@) instances, and stops and disables every other one.
  - A running instance is restarted when its unit files differ from the ones that its process was started with, which
    the unit records at each start. So a play that died between a file and its restart is healed by the next one.
  - It does not wait for a model to be loaded, which may take minutes; wait with M(cpullm.epyc.job).
options:
  instances:
    description: Numbers of the instances that are to run. Empty to stop them all.
    type: list
    elements: int
    required: true
  script:
    description: The script C(llama_instance.py) on the host, which knows how to tell one configuration from another.
    type: path
    required: true
attributes:
  check_mode:
    description: Can run in check mode and say what it would do.
    support: full
  diff_mode:
    description: Returns the instances and their states before and after.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Run one server on each socket
  cpullm.epyc.server_instances:
    instances: [0, 1]
    script: /usr/local/lib/llama-server/llama_instance.py
"""

RETURN = r"""
actions:
  description: What was done, or in check mode would be done.
  type: list
  elements: dict
  returned: always
  contains:
    unit:
      description: The unit.
      type: str
    action:
      description: C(start), C(restart) or C(stop).
      type: str
"""

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

UNIT = re.compile(r"llama-server@(\d+)\.service")


def systemctl(module: AnsibleModule, *words: str) -> str:
    """Return what systemctl prints; the module fails where systemctl does."""
    code, out, err = module.run_command(["systemctl", *words])
    if code != 0:
        module.fail_json(msg=f"systemctl {' '.join(words)} failed with {code}: {err.strip() or out.strip()}")
    return str(out)


def known_instances(module: AnsibleModule) -> set[int]:
    """Return the instances that are loaded or enabled."""
    listed = systemctl(module, "list-units", "--all", "--plain", "--no-legend", "llama-server@*.service")
    enabled = Path("/etc/systemd/system/multi-user.target.wants").glob("llama-server@*.service")
    names = [*listed.split(), *(entry.name for entry in enabled)]
    return {int(match[1]) for match in map(UNIT.fullmatch, names) if match}


def state(module: AnsibleModule, number: int) -> str:
    """Return ``running``, ``changed`` (running with another configuration) or ``stopped``; of a disabled one, too."""
    unit = f"llama-server@{number}.service"
    shown = dict(
        line.split("=", 1)
        for line in systemctl(module, "show", "--property=ActiveState,UnitFileState", unit).splitlines()
        if "=" in line
    )
    if shown.get("UnitFileState") != "enabled" or shown.get("ActiveState") not in ("active", "activating"):
        return "stopped"
    recorded = Path(f"/run/llama-server/{number}/configuration")
    code, out, err = module.run_command(["python3", module.params["script"], "digest", str(number)])
    if code != 0:
        module.fail_json(msg=f"{module.params['script']} digest {number} failed with {code}: {err.strip()}")
    running = recorded.read_text(encoding="ascii") if recorded.exists() else ""
    return "running" if running.strip() == str(out).strip() else "changed"


def plan(wanted: list[int], before: dict[int, str]) -> list[dict[str, str]]:
    """Return the actions that bring the instances from their states to running exactly the wanted ones."""
    step = {"stopped": "start", "changed": "restart"}
    actions = [
        {"unit": f"llama-server@{number}.service", "action": "stop"} for number in sorted(set(before) - set(wanted))
    ]
    actions.extend(
        {"unit": f"llama-server@{number}.service", "action": step[before.get(number, "stopped")]}
        for number in wanted
        if before.get(number, "stopped") in step
    )
    return actions


def apply(module: AnsibleModule, actions: list[dict[str, str]]) -> None:
    """Carry the actions out, without waiting for models to be loaded."""
    systemctl(module, "daemon-reload")
    for entry in actions:
        unit, action = entry["unit"], entry["action"]
        if action == "stop":
            systemctl(module, "disable", "--now", unit)
            continue
        module.run_command(["systemctl", "reset-failed", unit])  # an earlier failure must not count against this start
        systemctl(module, "enable", unit)
        systemctl(module, "restart", "--no-block", unit)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "int", "required": True},
            "script": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    wanted = module.params["instances"]
    before = {number: state(module, number) for number in known_instances(module)}
    actions = plan(wanted, before)
    if actions and not module.check_mode:
        apply(module, actions)
    lines = "".join(f"llama-server@{number}: {before[number]}\n" for number in sorted(before))
    after = "".join(f"llama-server@{number}: running\n" for number in sorted(wanted))
    module.exit_json(
        changed=bool(actions),
        actions=actions,
        diff={"before": lines, "after": after, "before_header": "instances", "after_header": "instances"},
    )


if __name__ == "__main__":
    main()
