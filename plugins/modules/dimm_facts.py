#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: dimm_facts
short_description: Read the memory slots and processor sockets of a host
version_added: "1.0.0"
description:
  - Returns each memory slot of the board, with the module in it or empty, as the fact C(cpullm_dimm), beside the memory
    arrays and the processor sockets.
  - Reads the SMBIOS tables that the kernel exports below C(/sys/firmware/dmi/tables), structures of the types 16, 17
    and 4. It needs no C(dmidecode), installs nothing, changes nothing and starts no other program.
  - The tables are the firmware's word. What a field does not tell is V(null), and nothing is filled in from what is
    usual. A table that breaks the format is refused as a whole, with the offset in
    RV(ansible_facts.cpullm_dimm.reason).
author:
  - The cpullm.epyc authors (@cpullm)
options:
  include_serial:
    description:
      - Whether to return the serial number and the asset tag of each module as well.
      - They identify hardware, end in fact caches and logs, and nothing in this collection needs them.
    type: bool
    default: false
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
  - The kernel lets only root read the tables. Without root the module does not fail, it says so in
    RV(ansible_facts.cpullm_dimm.reason).
  - Containers and some virtual machines show no tables. That is not a failure either.
  - Socket and channel of a slot are in no field of the tables. They come from the two locators, whose wording each
    board vendor chose. See the entries RV(ansible_facts.cpullm_dimm.slots.socket) and
    RV(ansible_facts.cpullm_dimm.slots.channel).
seealso:
  - module: cpullm.epyc.numa_facts
  - module: cpullm.epyc.hugepage_facts
  - name: System Management BIOS Reference Specification
    description: DMTF standard DSP0134, which defines the tables.
    link: https://www.dmtf.org/standards/smbios
"""

EXAMPLES = r"""
- name: Read the memory slots
  cpullm.epyc.dimm_facts:
  become: true

- name: Show the modules that run slower than they can
  ansible.builtin.debug:
    msg: "{{ item.locator }}: {{ item.configured_mts }} of {{ item.rated_mts }} MT/s"
  loop: "{{ ansible_facts['cpullm_dimm'].slots | selectattr('configured_mts') | selectattr('rated_mts') }}"
  loop_control:
    label: "{{ item.locator }}"
  when: item.configured_mts < item.rated_mts

- name: Name the slots that are empty
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_dimm'].slots | selectattr('populated', 'false') | map(attribute='locator') }}"
  when: ansible_facts['cpullm_dimm'].readable

- name: Read the serial numbers too, for an inventory of spare parts
  cpullm.epyc.dimm_facts:
    include_serial: true
  become: true
"""

RETURN = r"""
ansible_facts:
  description: The fact of this module.
  returned: always
  type: dict
  contains:
    cpullm_dimm:
      description: Memory slots and processor sockets of the host.
      returned: always
      type: dict
      contains:
        readable:
          description:
            - Whether the tables could be read.
            - Where it is V(false), lists are empty and other values are V(null).
          type: bool
          sample: true
        reason:
          description: Why they could not be read, V(null) where they could.
          type: str
          sample: null
        smbios_version:
          description: Version of the specification that the firmware follows. Fields of later versions are V(null).
          type: str
          sample: "3.5"
        notes:
          description: Sentences about what looked wrong in the tables and could be read all the same.
          type: list
          elements: str
          sample: []
        arrays:
          description: Memory arrays (type 16), in the order of the table. A board has one, or one per socket.
          type: list
          elements: dict
          contains:
            handle:
              description: Number of the structure, to which the slots refer.
              type: int
              sample: 36
            location:
              description: Where the array is.
              type: str
              sample: System board or motherboard
            use:
              description: What it is for.
              type: str
              sample: System memory
            error_correction:
              description: What the memory controller does about errors.
              type: str
              sample: Multi-bit ECC
            maximum_bytes:
              description: The most memory that the array takes.
              type: int
              sample: 3298534883328
            slots:
              description: Number of slots that the array announces.
              type: int
              sample: 12
        slots:
          description: Memory slots (type 17), in the order of the table, empty ones included.
          type: list
          elements: dict
          contains:
            handle:
              description: Number of the structure.
              type: int
              sample: 39
            array_handle:
              description: Number of the array that the slot belongs to.
              type: int
              sample: 36
            locator:
              description: Name of the slot, as a rule the one printed on the board.
              type: str
              sample: DIMM_P0_A0
            bank_locator:
              description: Second name of the slot.
              type: str
              sample: P0 CHANNEL A
            socket:
              description:
                - Processor socket of the slot, counted from 0, from the labels of the usual boards, such as
                  C(DIMM_P0_A0), C(P1-DIMMA1), C(CPU1_DIMM_A1), C(PROC 1 DIMM 1), C(P0 CHANNEL A) and
                  C(P0_Node0_Channel0_Dimm0), and Dell's C(A1) and C(B1).
                - V(null) where the labels do not tell, where they contradict each other, or where it does not show
                  whether the board counts from 0 or from 1. A board with one socket needs no label.
              type: int
              sample: 0
            channel:
              description:
                - Memory channel within the socket, counted from 0 for channel A, from the same labels. Two slots with
                  the same socket and channel share a channel.
                - V(null) where the labels do not tell, as with numbered slots.
              type: int
              sample: 0
            channel_label:
              description: The channel as the label has it.
              type: str
              sample: A
            populated:
              description: Whether a module is in the slot. V(null) where the firmware does not know the size.
              type: bool
              sample: true
            size_bytes:
              description: Size of the module, 0 for an empty slot, V(null) where the firmware does not know it.
              type: int
              sample: 68719476736
            form_factor:
              description: Form of the module.
              type: str
              sample: DIMM
            type:
              description: Kind of memory.
              type: str
              sample: DDR5
            type_detail:
              description: Further properties of the memory.
              type: list
              elements: str
              sample: [Synchronous, Registered (buffered)]
            technology:
              description: Memory technology, which tells persistent modules from DRAM.
              type: str
              sample: DRAM
            rated_mts:
              description: The most that the module can do, in MT/s.
              type: int
              sample: 5600
            configured_mts:
              description: What the firmware set, in MT/s.
              type: int
              sample: 4800
            rank:
              description: Number of ranks.
              type: int
              sample: 2
            data_width_bits:
              description: Width of the data.
              type: int
              sample: 64
            total_width_bits:
              description: Width with the bits for error correction.
              type: int
              sample: 80
            ecc:
              description: Whether the module carries bits for error correction, V(null) where a width is not known.
              type: bool
              sample: true
            manufacturer:
              description: Maker of the module. Some firmware writes a number of JEDEC's list here.
              type: str
              sample: Samsung
            manufacturer_jedec:
              description: Maker of the module by JEDEC's list JEP-106.
              type: str
              sample: bank 1, 0xCE
            part_number:
              description: The maker's part number.
              type: str
              sample: M321R8GA0PB0-CWMKH
            minimum_mv:
              description: Lowest voltage that the module takes, in mV.
              type: int
              sample: 1100
            maximum_mv:
              description: Highest voltage that the module takes, in mV.
              type: int
              sample: 1100
            configured_mv:
              description: Voltage that the firmware set, in mV.
              type: int
              sample: 1100
            volatile_bytes:
              description: The part of the module that is ordinary memory.
              type: int
              sample: 68719476736
            non_volatile_bytes:
              description: The part of the module that is persistent.
              type: int
              sample: 0
            serial_number:
              description: Serial number of the module.
              returned: O(include_serial) is V(true)
              type: str
              sample: 80CE0123456789ABCD
            asset_tag:
              description: Asset tag of the module.
              returned: O(include_serial) is V(true)
              type: str
              sample: null
        processors:
          description: Processor sockets (type 4, central processors), in the order of the table, empty ones included.
          type: list
          elements: dict
          contains:
            handle:
              description: Number of the structure.
              type: int
              sample: 72
            socket:
              description: Number of the socket, counted from 0, from the designation. V(null) where it does not tell.
              type: int
              sample: 0
            designation:
              description: Name of the socket.
              type: str
              sample: P0
            populated:
              description: Whether a processor is in the socket.
              type: bool
              sample: true
            status:
              description: What the firmware did with the processor.
              type: str
              sample: Enabled
            manufacturer:
              description: Maker of the processor.
              type: str
              sample: Advanced Micro Devices, Inc.
            version:
              description: Model of the processor.
              type: str
              sample: AMD EPYC 9135 16-Core Processor
            socket_type:
              description: Kind of socket.
              type: str
              sample: SP5
            cores:
              description: Number of cores.
              type: int
              sample: 16
            cores_enabled:
              description: Number of cores that the firmware switched on.
              type: int
              sample: 16
            threads:
              description: Number of hardware threads.
              type: int
              sample: 32
            maximum_mhz:
              description: The highest clock that the board takes, in MHz.
              type: int
              sample: 4300
            boot_mhz:
              description: Clock at boot, in MHz.
              type: int
              sample: 3650
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _smbios


def main() -> None:
    module = AnsibleModule(
        argument_spec={"include_serial": {"type": "bool", "default": False}}, supports_check_mode=True
    )
    found = _smbios.gather(include_serial=module.params["include_serial"])
    module.exit_json(changed=False, ansible_facts={"cpullm_dimm": found})


if __name__ == "__main__":
    main()
