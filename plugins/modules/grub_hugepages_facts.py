#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: grub_hugepages_facts
short_description: Compare a host's GRUB, command line and huge page pools with what is wanted
version_added: "1.0.0"
description:
  - Reads GRUB's files, the running command line, memory and pools once, and returns as the fact
    C(cpullm_grub_hugepages) what is there, what is missing, and why it could not work.
  - It changes nothing and starts no other program.
author:
  - The cpullm.epyc authors (@cpullm)
extends_documentation_fragment:
  - action_common_attributes
  - action_common_attributes.facts
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
    details: The module changes nothing, so there is no difference to show.
  facts:
    support: full
  platform:
    platforms: linux
options:
  method:
    description:
      - V(boot) reserves through the kernel command line.
      - V(runtime) reserves early in boot through C(/sys), without GRUB.
      - V(external) means that others reserve the pages, and only the pools are compared.
    type: str
    choices: [boot, runtime, external]
    default: boot
  size_kib:
    description: Size of a page in KiB.
    type: int
    choices: [2048, 1048576]
    default: 1048576
  nodes:
    description: Wanted pages of each NUMA node.
    type: list
    elements: dict
    required: true
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
    description:
      - Wanted kernel arguments, in order. By default made from O(nodes) and O(size_kib), per node where the kernel
        knows that form (5.16), else as one sum.
    type: list
    elements: str
  reserve_bytes:
    description: Memory that has to remain for the system.
    type: int
    default: 2147483648
  takeover:
    description: Whether huge page arguments in files that are read before our drop-in are left out instead of refused.
    type: bool
    default: false
  free_vmemmap:
    description:
      - Whether the kernel gives back what describes the 4 KiB pages of a huge one, 16 MiB for each of 1 GiB.
      - Where O(arguments) is given, C(hugetlb_free_vmemmap=on) has to be among them.
    type: bool
    default: false
notes:
  - Root is needed to see C(/proc/iomem), from which the upper bound of 1 GiB pages is taken. Without it that one check
    is left out.
seealso:
  - module: cpullm.epyc.grub_hugepages
  - module: cpullm.epyc.hugepage_facts
"""

EXAMPLES = r"""
- name: Compare the host with three pages of 1 GiB on each node
  cpullm.epyc.grub_hugepages_facts:
    nodes:
      - { node: 0, pages: 3 }
      - { node: 1, pages: 3 }

- name: Refuse what cannot work
  ansible.builtin.assert:
    that: ansible_facts['cpullm_grub_hugepages'].findings | length == 0
    fail_msg: "{{ ansible_facts['cpullm_grub_hugepages'].findings | join('; ') }}"
"""

RETURN = r"""
ansible_facts:
  description: Facts to add.
  returned: always
  type: dict
  contains:
    cpullm_grub_hugepages:
      description: What was found.
      returned: always
      type: dict
      contains:
        readable:
          description: Whether the host could be read; if not, only C(reason) is there.
          type: bool
        reason:
          description: Why it could not be read.
          type: str
        method:
          description: The method compared with.
          type: str
        boot_id:
          description: Identity of this boot.
          type: str
        arguments:
          description: The wanted kernel arguments, in order.
          type: list
          sample: ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3"]
        running:
          description: The running command line's huge page arguments.
          type: list
        running_right:
          description:
            - Whether the running command line has the wanted arguments in order, and no other ones for huge pages.
          type: bool
        configured:
          description: Whether the drop-in and every ordinary entry of C(grub.cfg) have them.
          type: bool
        reboot_required:
          description: Whether only a reboot can bring the wanted arguments.
          type: bool
        asked_of_grub:
          description: Whether GRUB's files, or the running boot, have arguments of ours.
          type: bool
        pools:
          description: For each node, pages asked, found and free.
          type: list
          elements: dict
          sample: [{"node": 0, "size_kib": 1048576, "asked": 3, "found": 3, "free": 3}]
        pools_right:
          description: Whether every node has at least the pages asked. A server can start when this is so.
          type: bool
        pool_faults:
          description: A line for each node that is short.
          type: list
        conflicts:
          description: Lines of other files that set huge page arguments.
          type: list
          elements: dict
          sample: [{"file": "/etc/default/grub", "line": 9, "text": "GRUB_CMDLINE_LINUX=hugepages=4"}]
        findings:
          description:
            - Why the pages cannot be reserved here in this way, each with the way out. Empty means it can be tried.
            - What forbids a trial boot (an environment block that GRUB cannot write, a distribution where nobody tried)
              is named only where a reboot is required.
          type: list
        trial:
          description:
            - Where a trial boot is, V(none), V(armed), V(running) or V(ended). Other than V(none) means that a run was
              cut; M(cpullm.epyc.boot_trial) goes on from there.
          type: str
          sample: none
        memory_bytes:
          description: Memory of the host.
          type: int
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline, _grub, _preflight, _trial


def main() -> None:
    """Read, compare and answer."""
    module = AnsibleModule(
        argument_spec={
            "method": {"type": "str", "choices": ["boot", "runtime", "external"], "default": "boot"},
            "size_kib": {"type": "int", "choices": [2048, 1048576], "default": 1048576},
            "nodes": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {"node": {"type": "int", "required": True}, "pages": {"type": "int", "required": True}},
            },
            "arguments": {"type": "list", "elements": "str"},
            "reserve_bytes": {"type": "int", "default": 2147483648},
            "takeover": {"type": "bool", "default": False},
            "free_vmemmap": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    params = module.params
    pages = tuple((item["node"], item["pages"]) for item in params["nodes"])
    try:
        host = _grub.read_host()
        arguments = params["arguments"] or _cmdline.build(
            params["size_kib"], pages, host.release, params["free_vmemmap"]
        )
    except (OSError, ValueError) as error:
        module.exit_json(
            changed=False, ansible_facts={"cpullm_grub_hugepages": {"readable": False, "reason": str(error)}}
        )
        return
    wanted = _grub.Wanted(
        params["method"], params["size_kib"], pages, tuple(arguments), params["reserve_bytes"], params["takeover"]
    )
    survey = _grub.survey(host, wanted)
    found = _trial.read()
    survey["trial"] = _trial.state(host, found)
    if wanted.method == "runtime":
        survey["findings"] += _preflight.runtime_faults(params["free_vmemmap"])
    elif survey["reboot_required"]:
        survey["findings"] += _preflight.trial_faults(host, found, wanted, _trial.MIN_DEADLINE_S)
    survey["pool_faults"] += _preflight.vmemmap_faults(params["free_vmemmap"])
    survey["pools_right"] = not survey["pool_faults"]
    module.exit_json(changed=False, ansible_facts={"cpullm_grub_hugepages": survey})


if __name__ == "__main__":
    main()
