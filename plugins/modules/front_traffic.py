#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lead requests to servers behind the front or away from them, and wait for what they still work on."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: front_traffic
short_description: Lead requests to servers behind the front, or away from them
version_added: "1.0.0"
description:
  - Speaks HAProxy's runtime socket. No configuration is written and nothing is reloaded; a restart of HAProxy goes back
    to what its configuration says.
  - Where HAProxy does not run there is no traffic to lead, and nothing is done.
options:
  instances:
    description: Numbers of the instances, as the front names them.
    type: list
    elements: int
    required: true
  state:
    description:
      - V(ready) sends requests to a server as long as it is healthy, and waits until it is.
      - V(drain) sends no further ones and lets those in flight end; its health goes on being looked at.
      - V(maint) is as drain, without looks at its health.
    type: str
    choices: [ready, drain, maint]
    required: true
  timeout_s:
    description: Seconds to wait, for health with V(ready) and else for requests in flight.
    type: int
    default: 60
attributes:
  check_mode:
    description: Can run in check mode and say what it would do.
    support: full
  diff_mode:
    description: Returns the states before and after.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Let instance 0 finish its work
  cpullm.epyc.front_traffic:
    instances: [0]
    state: drain
    timeout_s: 3600
"""

RETURN = r"""
in_flight:
  description: Requests that the servers still work on.
  type: int
  returned: always
waited_s:
  description: Seconds that were waited.
  type: float
  returned: always
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._front import Server, ask, parse_servers

SOCKET = "/run/haproxy/admin.sock"
BACKENDS = ("llama", "llama-look")


def words_of(status: str) -> str:
    """Return the option's word for a status of HAProxy's statistics."""
    if status.startswith("MAINT"):
        return "maint"
    return "drain" if status.startswith("DRAIN") else "ready"


def find(text: str, instances: list[int]) -> dict[int, Server]:
    """Return the wanted servers. Raises ValueError where the front lacks one."""
    known = {server.name: server for server in parse_servers(text, BACKENDS[0])}
    missing = [number for number in instances if f"i{number}" not in known]
    if missing:
        raise ValueError(
            f"the front has no server for instance {', '.join(map(str, missing))}; found {', '.join(sorted(known))}. "
            "Run site.yml, which writes its configuration."
        )
    return {number: known[f"i{number}"] for number in instances}


def in_flight(text: str, instances: list[int]) -> int:
    """Return the requests that the servers work on."""
    names = {f"i{number}" for number in instances}
    return sum(s.current for backend in BACKENDS for s in parse_servers(text, backend) if s.name in names)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "int", "required": True},
            "state": {"type": "str", "choices": ["ready", "drain", "maint"], "required": True},
            "timeout_s": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    instances, state = module.params["instances"], module.params["state"]
    begin = time.monotonic()
    changed, left = False, 0
    before: dict[int, Server] = {}
    try:
        text = ask(SOCKET, "show stat")
    except OSError:
        module.exit_json(changed=False, in_flight=0, waited_s=0.0)
    try:
        before = find(text, instances)
        # A server that is down in drain shows as DOWN; so the wish is always sent, and what shows is compared.
        if not module.check_mode:
            for number in instances:
                said = ask(SOCKET, f"set server {BACKENDS[0]}/i{number} state {state}").strip()
                if said:
                    raise ValueError(f"HAProxy answers to 'set server {BACKENDS[0]}/i{number} state {state}': {said}")
            while True:
                text = ask(SOCKET, "show stat")
                after = find(text, instances)
                left = in_flight(text, instances)
                done = (
                    all(server.status.startswith("UP") for server in after.values()) if state == "ready" else not left
                )
                if done or time.monotonic() - begin > module.params["timeout_s"]:
                    break
                time.sleep(0.2)
            if state == "ready" and not done:
                found = ", ".join(f"{server.name} is {server.status}" for server in after.values())
                raise ValueError(f"{found} after {module.params['timeout_s']} s; expected UP: GET /health answers 200")
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    changed = any(words_of(server.status) != state for server in before.values())
    module.exit_json(
        changed=changed,
        in_flight=left,
        waited_s=round(time.monotonic() - begin, 1),
        diff={
            "before": "".join(f"{server.name}: {words_of(server.status)}\n" for server in before.values()),
            "after": "".join(f"i{number}: {state}\n" for number in instances),
        },
    )


if __name__ == "__main__":
    main()
