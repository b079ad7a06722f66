#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: numa_facts
short_description: Read sockets, NUMA nodes, L3 domains and memory of a host
version_added: "1.0.0"
description:
  - Returns how the processors, their caches and the memory of a host belong together, as the fact C(cpullm_numa).
  - Reads C(/sys) and C(/proc) only. It installs nothing, changes nothing and starts no other program.
  - What is stable is kept apart from what is not. Every value here is the same before and after a reservation of huge
    pages and a reboot, so that a plan computed from it does not move. Free memory and clocks are left out on purpose.
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
notes:
  - Only Linux on x86-64 is covered.
  - Root is not needed, except for RV(ansible_facts.cpullm_numa.nodes.gib_ranges), because the kernel shows physical
    addresses to root only.
seealso:
  - module: cpullm.epyc.dimm_facts
  - module: cpullm.epyc.hugepage_facts
"""

EXAMPLES = r"""
- name: Read the topology
  cpullm.epyc.numa_facts:

- name: Refuse a host whose topology cannot be read
  ansible.builtin.assert:
    that: ansible_facts['cpullm_numa'].readable
    fail_msg: "{{ ansible_facts['cpullm_numa'].reason }}"

- name: Show the physical cores and the CCDs of each socket
  ansible.builtin.debug:
    msg: >-
      socket {{ item.socket }}: {{ item.physical_cores }} cores on {{ item.primary_cpus }},
      {{ ansible_facts['cpullm_numa'].l3 | selectattr('socket', 'eq', item.socket) | length }} L3 domains
  loop: "{{ ansible_facts['cpullm_numa'].sockets }}"
  loop_control:
    label: "{{ item.socket }}"
"""

RETURN = r"""
ansible_facts:
  description: The fact of this module.
  returned: always
  type: dict
  contains:
    cpullm_numa:
      description: The topology of the host.
      returned: always
      type: dict
      contains:
        readable:
          description:
            - Whether the topology could be read.
            - Where it is V(false), lists are empty and other values are V(null).
          type: bool
          sample: true
        reason:
          description: Why it could not be read, V(null) where it could.
          type: str
          sample: null
        cpu:
          description: The processor, from the first block of C(/proc/cpuinfo) and C(/sys/devices/system/cpu).
          type: dict
          contains:
            vendor:
              description: Vendor as the processor gives it.
              type: str
              sample: AuthenticAMD
            model:
              description: Model name.
              type: str
              sample: AMD EPYC 9135 16-Core Processor
            family:
              description: Family number. 25 is Zen 3 and Zen 4, 26 is Zen 5.
              type: int
              sample: 26
            model_number:
              description: Model number within the family.
              type: int
              sample: 2
            stepping:
              description: Stepping.
              type: int
              sample: 1
            flags:
              description: Instruction set flags in the kernel's names, sorted.
              type: list
              elements: str
              sample: [avx2, avx512_bf16, avx512_vnni, avx512f, pdpe1gb]
            online:
              description: CPUs that run, in the kernel's list format.
              type: str
              sample: 0-31
            offline:
              description: CPUs that are there and switched off, in the kernel's list format. Empty for none.
              type: str
              sample: ""
            logical:
              description: Number of CPUs online, hardware threads counted.
              type: int
              sample: 32
            physical_cores:
              description: Number of cores that have at least one CPU online.
              type: int
              sample: 16
            smt:
              description: Whether any core runs more than one hardware thread.
              type: bool
              sample: true
            smt_control:
              description:
                - The kernel's SMT switch as C(/sys/devices/system/cpu/smt/control) shows it. V(off) tells a host where
                  the kernel switched SMT off from one where the firmware did, V(notsupported).
                - V(null) on kernels without it.
              type: str
              sample: "on"
        sockets:
          description: Processor packages with at least one CPU online, by number.
          type: list
          elements: dict
          contains:
            socket:
              description: Number of the package as the kernel gives it.
              type: int
              sample: 0
            nodes:
              description: NUMA nodes that hold CPUs of this socket. More than one means NPS2, NPS4 or one per L3.
              type: list
              elements: int
              sample: [0]
            cpus:
              description: CPUs online, in the kernel's list format.
              type: str
              sample: 0-31
            primary_cpus:
              description: One CPU of each core, the lowest, in the kernel's list format.
              type: str
              sample: 0-15
            physical_cores:
              description: Number of cores.
              type: int
              sample: 16
            threads:
              description: Number of CPUs online.
              type: int
              sample: 32
        nodes:
          description: NUMA nodes by number. Numbers can have holes. A kernel without NUMA gives one node.
          type: list
          elements: dict
          contains:
            node:
              description: Number of the node.
              type: int
              sample: 0
            socket:
              description: The socket of its CPUs. V(null) for a node without CPUs or with CPUs of several sockets.
              type: int
              sample: 0
            cpus:
              description: CPUs online, in the kernel's list format. Empty for a node without CPUs.
              type: str
              sample: 0-31
            primary_cpus:
              description: One CPU of each core, the lowest, in the kernel's list format.
              type: str
              sample: 0-15
            physical_cores:
              description: Number of cores.
              type: int
              sample: 16
            threads:
              description: Number of CPUs online.
              type: int
              sample: 32
            memory_bytes:
              description:
                - RAM that the firmware gave to the kernel in this node. 0 for a node without memory.
                - The sum of C(present) over the node's zones in C(/proc/zoneinfo), device memory left out. It is not
                  C(MemTotal), which moves with C(hugetlb_free_vmemmap), with the size of the kernel and with memory
                  that is initialised late.
                - Where C(/proc/zoneinfo) cannot be read it is C(MemTotal) after all, and
                  RV(ansible_facts.cpullm_numa.memory_source) says so.
              type: int
              sample: 824633720832
            gib_ranges:
              description:
                - Number of whole GiB of RAM that start at a multiple of 1 GiB. No more 1 GiB pages than this fit, and
                  fewer do, because the kernel and what else is in use take their share.
                - From "System RAM" in C(/proc/iomem). V(null) without root.
              type: int
              sample: 765
            distances:
              description: Relative distance to each node. 10 is the node itself. Empty where the kernel gives none.
              type: list
              elements: dict
              contains:
                node:
                  description: The other node.
                  type: int
                  sample: 1
                distance:
                  description: The distance.
                  type: int
                  sample: 32
        l3:
          description:
            - Groups of CPUs that share a level 3 cache, by their lowest CPU. On EPYC since Zen 3 a group is a CCD, with
              the dense cores of Zen 4c a half of one.
            - Empty where the host shows no such cache, as many virtual machines do.
          type: list
          elements: dict
          contains:
            id:
              description: The kernel's number of the cache. Numbers can have holes. V(null) on kernels without it.
              type: int
              sample: 0
            socket:
              description: The socket of its CPUs.
              type: int
              sample: 0
            node:
              description: The NUMA node of its CPUs. V(null) where they belong to several.
              type: int
              sample: 0
            cpus:
              description: CPUs online, in the kernel's list format.
              type: str
              sample: 0-7,16-23
            primary_cpus:
              description: One CPU of each core, the lowest, in the kernel's list format.
              type: str
              sample: 0-7
            physical_cores:
              description: Number of cores.
              type: int
              sample: 8
            bytes:
              description: Size of the cache.
              type: int
              sample: 33554432
        memory_bytes:
          description: Sum of the nodes' C(memory_bytes), V(null) where one of them is not known.
          type: int
          sample: 824633720832
        memory_source:
          description: The file that the memory sizes come from.
          type: str
          sample: /proc/zoneinfo
        kernel:
          description: The running kernel.
          type: dict
          contains:
            release:
              description: Release as C(uname -r) prints it.
              type: str
              sample: 6.1.0-37-amd64
            cmdline:
              description: Command line from C(/proc/cmdline). An ordered list in which names may repeat.
              type: str
              sample: BOOT_IMAGE=/vmlinuz root=/dev/sda2 ro default_hugepagesz=1G hugepagesz=1G hugepages=672
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _numa


def main() -> None:
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.exit_json(changed=False, ansible_facts={"cpullm_numa": _numa.gather()})


if __name__ == "__main__":
    main()
