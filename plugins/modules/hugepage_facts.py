#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: hugepage_facts
short_description: Read huge page pools, poisoned memory and hugetlbfs mounts of a host
version_added: "1.0.0"
description:
  - Returns how many huge pages of each size the host holds, in all and per NUMA node, as the fact
    C(cpullm_hugepages), with the memory that the kernel took out of use and the hugetlbfs mounts.
  - Reads C(/sys) and C(/proc) only. It installs nothing, changes nothing and starts no other program.
  - These are the values of the moment. They move when a server starts or a pool is resized, so they serve to verify a
    plan, not to make one.
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
  - Root is not needed.
  - In a container the pools are those of the machine, which others may use as well.
seealso:
  - module: cpullm.epyc.numa_facts
  - module: cpullm.epyc.dimm_facts
"""

EXAMPLES = r"""
- name: Read the pools
  cpullm.epyc.hugepage_facts:

- name: Refuse a host that came up with fewer 1 GiB pages than planned
  ansible.builtin.assert:
    that: found | int >= 672
    fail_msg: "{{ inventory_hostname }}: {{ found }} pages of 1 GiB, 672 expected"
  vars:
    found: >-
      {{ ansible_facts['cpullm_hugepages'].pools
         | selectattr('node', 'none') | selectattr('size_kib', 'eq', 1048576)
         | map(attribute='total') | sum }}

- name: Show what each node holds
  ansible.builtin.debug:
    msg: "node {{ item.node }}: {{ item.free }} of {{ item.total }} pages of {{ item.size_kib }} KiB are free"
  loop: "{{ ansible_facts['cpullm_hugepages'].pools | rejectattr('node', 'none') }}"
  loop_control:
    label: "{{ item.node }}"
"""

RETURN = r"""
ansible_facts:
  description: The fact of this module.
  returned: always
  type: dict
  contains:
    cpullm_hugepages:
      description: Huge pages of the host.
      returned: always
      type: dict
      contains:
        readable:
          description:
            - Whether the pools could be read.
            - Where it is V(false), lists are empty and other values are V(null).
          type: bool
          sample: true
        reason:
          description: Why they could not be read, V(null) where they could.
          type: str
          sample: null
        default_size_kib:
          description:
            - Page size that a mapping or a mount gets where it names none, from C(Hugepagesize) in C(/proc/meminfo).
            - Set with C(default_hugepagesz=) on the kernel's command line.
          type: int
          sample: 1048576
        pools:
          description:
            - Pools by size, first those of the whole machine, then those of each NUMA node.
            - Each size that the processor can do has a pool, also an empty one. A host without a pool of 1048576 KiB
              cannot do 1 GiB pages.
          type: list
          elements: dict
          contains:
            node:
              description: The NUMA node, V(null) for the whole machine.
              type: int
              sample: null
            size_kib:
              description: Page size in KiB.
              type: int
              sample: 1048576
            total:
              description: Pages in the pool, from C(nr_hugepages). Surplus pages are counted.
              type: int
              sample: 672
            free:
              description: Pages that nobody has touched yet. Reserved pages are counted.
              type: int
              sample: 8
            surplus:
              description: Pages beyond the size of the pool that was set, which go when they are freed.
              type: int
              sample: 0
            reserved:
              description:
                - Pages promised to mappings that have not touched them yet. What a new mapping can get is C(free) less
                  C(reserved).
                - The kernel counts them for the whole machine only, so the value is V(null) in a node.
              type: int
              sample: 0
            overcommit:
              description: How many surplus pages the kernel may make. V(null) in a node.
              type: int
              sample: 0
        poisoned_bytes:
          description:
            - Memory that the kernel took out of use after memory errors, from C(HardwareCorrupted) in
              C(/proc/meminfo).
            - V(null) on kernels that do not handle memory errors.
          type: int
          sample: 0
        vmemmap_optimized:
          description:
            - Whether the kernel gives back the page structures of new huge pages, which is 16 MiB for each page of
              1 GiB. Set with C(hugetlb_free_vmemmap=on) on the kernel's command line.
            - V(null) on kernels that cannot.
          type: bool
          sample: true
        mounts:
          description: hugetlbfs mounts that the module's process sees, in the order of mounting.
          type: list
          elements: dict
          contains:
            path:
              description: The mount point.
              type: str
              sample: /dev/hugepages
            size_kib:
              description: Page size in KiB, the default size where the mount names none.
              type: int
              sample: 1048576
            options:
              description: Mount options as the kernel prints them.
              type: list
              elements: str
              sample: [rw, relatime, pagesize=1024M]
        boot_id:
          description: The kernel's random name of this boot. Another one means that the host was rebooted.
          type: str
          sample: 0e8a5a0c-7f4c-4b0e-9d2c-3d6a8f0f5b11
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _hugepages


def main() -> None:
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.exit_json(changed=False, ansible_facts={"cpullm_hugepages": _hugepages.gather()})


if __name__ == "__main__":
    main()
