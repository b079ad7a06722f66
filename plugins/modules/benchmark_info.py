#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Say what can be measured of the servers of a host, and how."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: benchmark_info
short_description: Say what can be measured of running servers, and how
version_added: "1.0.0"
description:
  - Reads what each C(llama-server@) instance runs with, asks it for its context and its slots, and says which figures
    the role C(benchmark) can measure, which it cannot and why, and whether two variants find room beside each other.
  - It changes nothing. It needs root. It fails where nothing can be measured, such as a server that is at work.
options:
  instances:
    description: Numbers of the instances.
    type: list
    elements: int
    required: true
  variants:
    description:
      - None, or the two to compare. Each has a C(name), and may have C(binary), C(arguments) and C(environment); one
        without these is the instance as it runs. C(instance) names another instance that runs already.
    type: list
    elements: dict
    default: []
  lengths:
    description: Tokens of the prompts whose prefill is to be measured.
    type: list
    elements: int
    required: true
  depths:
    description: Tokens of context behind which decode is to be measured.
    type: list
    elements: int
    required: true
  tokens:
    description: Tokens that a run decodes.
    type: int
    required: true
  repeats:
    description: Runs of each figure.
    type: int
    required: true
  downtime_allowed:
    description: Whether an instance may stop.
    type: bool
    default: false
  hold_s:
    description: Seconds that the front is to hold requests. A server may be at work then.
    type: int
attributes:
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Returns details on what has changed.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: See what can be measured of the first server
  cpullm.epyc.benchmark_info:
    instances: [0]
    lengths: [512]
    depths: [0, 4096]
    tokens: 64
    repeats: 5
"""

RETURN = r"""
instances:
  description: What can be measured of each instance.
  type: list
  elements: dict
  returned: success
  contains:
    instance:
      description: Its number.
      type: int
    unit:
      description: Its unit.
      type: str
    mode:
      description:
        - V(live) asks the running server. V(beside) runs the variants at the same time. V(turns) stops the instance,
          and runs them one after the other.
      type: str
    reason:
      description: Why so, with the memory that was needed and found.
      type: str
    context:
      description: Tokens of context of a slot.
      type: int
    slots:
      description: Requests that it decodes side by side.
      type: int
    figures:
      description: What is measured.
      type: list
      elements: str
    runs:
      description: How many runs that takes in a round without disturbance.
      type: int
    omitted:
      description: What is not measured, each with C(figure) and C(reason).
      type: list
      elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark_run


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "int", "required": True},
            "variants": {"type": "list", "elements": "dict", "default": []},
            "lengths": {"type": "list", "elements": "int", "required": True},
            "depths": {"type": "list", "elements": "int", "required": True},
            "tokens": {"type": "int", "required": True, "no_log": False},
            "repeats": {"type": "int", "required": True},
            "downtime_allowed": {"type": "bool", "default": False},
            "hold_s": {"type": "int"},
        },
        supports_check_mode=True,
    )
    request = module.params
    try:
        plans = [_benchmark_run.look_at(number, request) for number in request["instances"]]
    except (_benchmark_run.Refused, OSError, ValueError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, instances=[_benchmark_run.in_words(plan, request) for plan in plans])


if __name__ == "__main__":
    main()
