#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start, restart or stop llama-server instances and their stores, so that each is what its unit files say."""

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
  - Stores of weights are loaded where they are not complete, given back where they are not wanted any more, and mounted
    anew where they are to have another size. Where a store is complete, a restart reads nothing from the disk.
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
  loader:
    description: The script C(llama_weights.py) on the host, which knows whether a store is complete.
    type: path
    required: true
  store:
    description: Directory below which the stores are mounted.
    type: path
    required: true
  stores:
    description: The stores that are to be there, each of an instance that is to run.
    type: list
    elements: dict
    default: []
    suboptions:
      instance:
        description: Number of the instance.
        type: int
        required: true
      bytes:
        description: Bytes of whole pages that it is mounted for.
        type: int
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
    loader: /usr/local/lib/llama-server/llama_weights.py
    store: /var/lib/llama-weights
    stores:
      - instance: 0
        bytes: 721554505728
      - instance: 1
        bytes: 721554505728
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
      description:
        - C(start), C(restart) or C(stop) of a server, C(load) or C(free) of a store.
        - C(reload) where systemd has not read a changed file yet.
      type: str
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

UNIT = re.compile(r"llama-(server|weights)@(\d+)\.service")
PLANS = Path("/etc/llama-weights")
RUN = Path("/run/llama-weights")


def server(number: int) -> str:
    """Return the unit's name of a server."""
    return f"llama-server@{number}.service"


def weights(number: int) -> str:
    """Return the unit's name of a store's loader."""
    return f"llama-weights@{number}.service"


def systemctl(module: AnsibleModule, *words: str) -> str:
    """Return what systemctl prints; the module fails where systemctl does."""
    code, out, err = module.run_command(["systemctl", *words])
    if code != 0:
        module.fail_json(msg=f"systemctl {' '.join(words)} failed with {code}: {err.strip() or out.strip()}")
    return str(out)


def show(module: AnsibleModule, unit: str, *properties: str) -> dict[str, str]:
    """Return properties of a unit."""
    out = systemctl(module, "show", f"--property={','.join(properties)}", unit)
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def known_instances(module: AnsibleModule) -> set[int]:
    """Return the instances of servers that are loaded or enabled."""
    listed = systemctl(module, "list-units", "--all", "--plain", "--no-legend", "llama-server@*.service")
    enabled = Path("/etc/systemd/system/multi-user.target.wants").glob("llama-server@*.service")
    names = [*listed.split(), *(entry.name for entry in enabled)]
    return {int(match[2]) for match in map(UNIT.fullmatch, names) if match}


def state(module: AnsibleModule, number: int) -> str:
    """Return ``running``, ``changed`` (running with another configuration) or ``stopped``; of a disabled one, too."""
    shown = show(module, server(number), "ActiveState", "UnitFileState")
    if shown.get("UnitFileState") != "enabled" or shown.get("ActiveState") not in ("active", "activating"):
        return "stopped"
    recorded = Path(f"/run/llama-server/{number}/configuration")
    code, out, err = module.run_command(["python3", module.params["script"], "digest", str(number)])
    if code != 0:
        module.fail_json(msg=f"{module.params['script']} digest {number} failed with {code}: {err.strip()}")
    running = recorded.read_text(encoding="ascii") if recorded.exists() else ""
    return "running" if running.strip() == str(out).strip() else "changed"


def mounted(mountinfo: str, store: str) -> dict[int, int | None]:
    """Return the bytes that each mounted store is limited to, by the text of ``/proc/self/mountinfo`` (proc(5))."""
    found: dict[int, int | None] = {}
    for line in mountinfo.splitlines():
        fields = line.split()
        kind, options = fields[fields.index("-") + 1], fields[-1]
        folder, _slash, name = fields[4].rpartition("/")
        plain = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), folder)
        if kind == "hugetlbfs" and plain == store.rstrip("/") and name.isdecimal():
            size = re.search(r"(?:^|,)size=(\d+)(?:,|$)", options)
            found[int(name)] = int(size[1]) if size else None
    return found


def content_state(module: AnsibleModule, number: int) -> str:
    """Return ``complete``, ``loading`` or ``incomplete`` for a store that is mounted as wanted."""
    plan = PLANS / f"{number}.json"
    if not plan.exists() or not Path(module.params["loader"]).exists():
        return "incomplete"
    argv = ["python3", module.params["loader"], "check", f"--plan={plan}", f"--run={RUN / str(number)}"]
    _code, out, err = module.run_command(argv)
    try:
        answer = json.loads(out)
    except ValueError:
        module.fail_json(msg=f"{' '.join(argv)}: {err.strip() or out.strip()}; expected a line of JSON")
    if not answer["complete"]:
        return "loading" if answer["loading"] else "incomplete"
    active = show(module, weights(number), "ActiveState").get("ActiveState")
    return "complete" if active == "active" else "incomplete"


def store_states(module: AnsibleModule) -> dict[int, str]:
    """Return each store that is mounted or wanted: ``absent``, ``other`` (in size) or the state of its content."""
    sizes = mounted(Path("/proc/self/mountinfo").read_text(encoding="utf-8"), module.params["store"])
    wanted = {entry["instance"]: entry["bytes"] for entry in module.params["stores"]}
    states = {}
    for number in sorted(set(sizes) | set(wanted)):
        if number not in sizes:
            states[number] = "absent"
        elif number not in wanted:
            states[number] = "unwanted"
        else:
            states[number] = content_state(module, number) if sizes[number] == wanted[number] else "other"
    return states


def plan(
    wanted: list[int], before: dict[int, str], stored: list[int], stores: dict[int, str], stale: bool = False
) -> list[dict[str, str]]:
    """Return the actions that bring the instances from their states to running exactly the wanted ones, in order.

    ``before`` holds the states of servers, ``stored`` the instances that are to have a store, ``stores`` the states of
    stores; ``stale`` says that systemd has not read a changed file.
    """
    actions = [{"unit": server(number), "action": "stop"} for number in sorted(set(before) - set(wanted))]
    freed = [number for number, found in sorted(stores.items()) if found in ("unwanted", "other")]
    actions += [{"unit": weights(number), "action": "free"} for number in freed]
    loads = [number for number in stored if stores[number] not in ("complete", "loading")]
    actions += [{"unit": weights(number), "action": "load"} for number in loads]
    for number in wanted:
        found = "stopped" if number in freed + loads else before.get(number, "stopped")
        step = {"stopped": "start", "changed": "restart"}.get(found)
        if step:
            actions.append({"unit": server(number), "action": step})
    if stale and not actions:
        actions.append({"unit": "systemd", "action": "reload"})
    return actions


def stop(module: AnsibleModule, unit: str) -> None:
    """Stop a unit, which may be absent."""
    code, out, err = module.run_command(["systemctl", "stop", unit])
    if code not in (0, 5):  # 5: there is no such unit
        module.fail_json(msg=f"systemctl stop {unit} failed with {code}: {err.strip() or out.strip()}")


def free(module: AnsibleModule, number: int) -> None:
    """Stop what uses a store, and unmount it: its pages go back to the pool."""
    stop(module, server(number))
    stop(module, weights(number))
    path = Path(module.params["store"]) / str(number)
    code, out, err = module.run_command(["umount", str(path)])
    if code != 0 and path.is_mount():
        module.fail_json(
            msg=f"{path}: {err.strip() or out.strip()}; expected that nothing uses it any more: "
            f"stop what maps its files (grep -l {path} /proc/*/maps), and run the playbook again"
        )
    shutil.rmtree(RUN / str(number), ignore_errors=True)
    for folder in (path, path.parent, RUN):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def apply(module: AnsibleModule, actions: list[dict[str, str]]) -> None:
    """Carry the actions out, without waiting for models to be loaded."""
    systemctl(module, "daemon-reload")
    for entry in actions:
        unit, action = entry["unit"], entry["action"]
        match = UNIT.fullmatch(unit)
        if match is None:
            continue
        number = int(match[2])
        if action == "stop":
            systemctl(module, "disable", "--now", unit)
        elif action == "free":
            free(module, number)
        else:
            if action == "load":
                # The server may hold the very pages that the store is to take.
                stop(module, server(number))
            else:
                systemctl(module, "enable", unit)
            # What still stops, or waits for its next start, would be taken for a failure of this one.
            stop(module, unit)
            module.run_command(["systemctl", "reset-failed", unit])
            systemctl(module, "start", "--no-block", unit)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "int", "required": True},
            "script": {"type": "path", "required": True},
            "loader": {"type": "path", "required": True},
            "store": {"type": "path", "required": True},
            "stores": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "instance": {"type": "int", "required": True},
                    "bytes": {"type": "int", "required": True},
                },
            },
        },
        supports_check_mode=True,
    )
    module.run_command_environ_update = {"LC_ALL": "C"}
    wanted = module.params["instances"]
    stored = [entry["instance"] for entry in module.params["stores"]]
    before = {number: state(module, number) for number in known_instances(module)}
    stores = store_states(module)
    units = [server(number) for number in wanted] + [weights(number) for number in stored]
    stale = any(show(module, unit, "NeedDaemonReload").get("NeedDaemonReload") == "yes" for unit in units)
    actions = plan(wanted, before, stored, stores, stale)
    if actions and not module.check_mode:
        apply(module, actions)
    lines = [f"llama-server@{number}: {before[number]}\n" for number in sorted(before)]
    lines += [f"llama-weights@{number}: {stores[number]}\n" for number in sorted(stores)]
    after = [f"llama-server@{number}: running\n" for number in sorted(wanted)]
    after += [f"llama-weights@{number}: complete\n" for number in sorted(stored)]
    module.exit_json(
        changed=bool(actions),
        actions=actions,
        diff={
            "before": "".join(lines),
            "after": "".join(after),
            "before_header": "instances",
            "after_header": "instances",
        },
    )


if __name__ == "__main__":
    main()
