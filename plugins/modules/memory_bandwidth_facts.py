#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure the rate at which the sockets of a host read their memory."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: memory_bandwidth_facts
short_description: Measure the rate at which sockets read their memory
version_added: "1.0.0"
description:
  - Runs C(cpullm-bandwidth), which is built and installed beside the engine, on one socket after the other, with one
    thread on each core. It only reads, as decoding does.
  - It changes nothing, but for about a second and a half it takes the cores and the memory of each socket, in check
    mode too.
  - A host that cannot be measured is not failed. RV(ansible_facts.cpullm_bandwidth.available) is false then, and the
    reason is beside it.
options:
  tool:
    description: The program on the host.
    type: path
    default: /opt/llama.cpp/current/bin/cpullm-bandwidth
  sockets:
    description:
      - The sockets to measure, as M(cpullm.epyc.numa_facts) lists them.
      - Of each, C(socket) and C(primary_cpus) (one hardware thread of each core) are read.
    type: list
    elements: dict
    required: true
  seconds:
    description: How long each socket is read, above 0 and up to 60.
    type: float
    default: 1
  only_when_idle:
    description: Measure nothing while a process C(llama-server) runs, because it would take its bandwidth.
    type: bool
    default: false
extends_documentation_fragment:
  - action_common_attributes
  - action_common_attributes.facts
attributes:
  check_mode:
    support: full
    details: It measures in check mode as well.
  diff_mode:
    support: none
    details: The module changes nothing, so there is no difference to show.
  facts:
    support: full
  platform:
    platforms: linux
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Read the topology
  cpullm.epyc.numa_facts:

- name: Measure every socket unless a server runs
  cpullm.epyc.memory_bandwidth_facts:
    sockets: "{{ ansible_facts['cpullm_numa'].sockets }}"
    only_when_idle: true
"""

RETURN = r"""
ansible_facts:
  description: The fact C(cpullm_bandwidth).
  type: dict
  returned: success
  contains:
    cpullm_bandwidth:
      description: What was measured.
      type: dict
      contains:
        available:
          description: Whether every socket was measured.
          type: bool
          sample: true
        reason:
          description: Why not, with socket, found and expected. V(null) otherwise.
          type: str
          sample: null
        sockets:
          description: The sockets in the order of O(sockets). Empty where one of them could not be measured.
          type: list
          elements: dict
          contains:
            socket:
              description: Number of the socket.
              type: int
              sample: 0
            gbs:
              description: Median over the passes in GB/s, 10^9 bytes per second.
              type: float
              sample: 431.2
            gbs_min:
              description: The slowest pass. Far below the median where something else used the memory.
              type: float
              sample: 425.9
            gbs_max:
              description: The fastest pass.
              type: float
              sample: 433.0
            threads:
              description: Threads that read, one on each core.
              type: int
              sample: 16
            bytes:
              description: Size of what they read again and again.
              type: int
              sample: 1073741824
"""

import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _bandwidth
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import plain


def measure(tool: str, cpus: str, seconds: float) -> _bandwidth.Measurement:
    """Return one measurement; raises ValueError with why there is none."""
    where = f"{tool} on the CPUs {cpus}"
    try:
        done = subprocess.run(
            _bandwidth.arguments(tool, cpus, seconds),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds + _bandwidth.SLACK_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{where}: gave no answer within {error.timeout:.0f} s") from None
    except OSError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        return _bandwidth.read_answer(done.returncode, done.stdout, done.stderr)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def gather(module: AnsibleModule) -> dict[str, Any]:
    """Return the fact."""
    tool, seconds = module.params["tool"], module.params["seconds"]
    try:
        sockets = _bandwidth.check_sockets(module.params["sockets"])
    except ValueError as error:
        module.fail_json(msg=str(error))
    if not 0 < seconds <= _bandwidth.MOST_SECONDS:
        module.fail_json(msg=f"seconds: found {seconds}, expected above 0 and up to {_bandwidth.MOST_SECONDS}")
    if not Path(tool).is_file():
        return _bandwidth.unavailable(
            f"{tool}: found no such file, expected the program; it comes with the engine, so install that first"
        )
    servers = _bandwidth.serving() if module.params["only_when_idle"] else []
    if servers:
        pids = ", ".join(map(str, servers))
        return _bandwidth.unavailable(
            f"found {_bandwidth.SERVER} running (process {pids}), expected an idle host: measuring slows what is served"
        )
    try:
        found = [{"socket": number, **plain(measure(tool, cpus, seconds))} for number, cpus in sockets]
    except ValueError as error:
        return _bandwidth.unavailable(str(error))
    return {"available": True, "reason": None, "sockets": found}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "tool": {"type": "path", "default": "/opt/llama.cpp/current/bin/cpullm-bandwidth"},
            "sockets": {"type": "list", "elements": "dict", "required": True},
            "seconds": {"type": "float", "default": 1},
            "only_when_idle": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, ansible_facts={"cpullm_bandwidth": gather(module)})


if __name__ == "__main__":
    main()
