#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin edge of the readers of what changes while a host runs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: condition_facts
short_description: Read governor, memory errors, temperatures of the memory, and the model's disks
version_added: "1.0.0"
description:
  - Reads what can hold a model server back and changes while the host runs, unlike what M(cpullm.epyc.numa_facts) and
    M(cpullm.epyc.dimm_facts) read. No plan depends on it.
  - Reads files of the kernel, and asks the board's controller through C(ipmitool) where the kernel shows no sensor on
    a memory module and that tool is installed. It changes nothing and installs nothing.
options:
  path:
    description: A path on the file system whose disks are meant. It need not exist yet.
    type: path
    default: /
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
  - Root is not needed, except for the board's controller.
  - A list is empty where the host does not show such a thing, as most virtual machines and containers do.
seealso:
  - module: cpullm.epyc.judgement
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Read what may hold the server back
  cpullm.epyc.condition_facts:
    path: /srv/models

- name: Show the warmest memory module
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_condition'].module_temperatures | map(attribute='celsius') | max }} C"
  when: ansible_facts['cpullm_condition'].module_temperatures | length > 0
"""

RETURN = r"""
ansible_facts:
  description: The fact of this module.
  returned: always
  type: dict
  contains:
    cpullm_condition:
      description: The state of the host at this moment.
      returned: always
      type: dict
      contains:
        governors:
          description: Governors of the processors' clocks, the most frequent first.
          type: list
          elements: dict
          contains:
            governor:
              description: The governor.
              type: str
              sample: performance
            driver:
              description: The driver that it belongs to.
              type: str
              sample: amd-pstate-epp
            cpus:
              description: How many CPUs run under it.
              type: int
              sample: 32
        memory_errors:
          description: One entry for each memory controller, and one for each module that had errors.
          type: list
          elements: dict
          contains:
            controller:
              description: Name of the controller.
              type: str
              sample: mc0
            module:
              description: Label of the module, or its place where nobody labelled it. V(null) for a whole controller.
              type: str
              sample: null
            corrected:
              description: Errors that were corrected, since the driver was loaded.
              type: int
              sample: 0
            uncorrected:
              description: Errors that could not be corrected, since the driver was loaded.
              type: int
              sample: 0
        module_temperatures:
          description: Sensors on the memory modules.
          type: list
          elements: dict
          contains:
            sensor:
              description: Driver and place on the bus, or the name that the board's controller gives.
              type: str
              sample: spd5118 1-0050
            celsius:
              description: Temperature in degrees Celsius.
              type: float
              sample: 48.25
            critical:
              description: The critical limit that the sensor was set to, V(null) where it tells none.
              type: float
              sample: 85.0
        disks:
          description: Disks below the file system, past partitions, mappings and RAIDs.
          type: list
          elements: dict
          contains:
            name:
              description: The kernel's name.
              type: str
              sample: nvme0n1
            model:
              description: Model of the disk.
              type: str
              sample: SAMSUNG MZQL27T6HBLA-00A07
            rotational:
              description: Whether it is a spinning disk. Virtual disks often claim so.
              type: bool
              sample: false
            link:
              description:
                - The PCIe link, with C(gts) (GT/s a lane) and C(lanes) as it runs, and C(best_gts) and C(best_lanes) as
                  the disk could.
                - V(null) where there is none.
              type: dict
              sample: {gts: 16.0, lanes: 4, best_gts: 16.0, best_lanes: 4}
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _condition
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import plain

IPMI_DEVICE = "/dev/ipmi0"
# A controller answers some hundred sensors in a few seconds; one that hangs must not hang the run.
IPMI_TIMEOUT_S = "20"


def ask_controller(module: AnsibleModule) -> list[dict[str, Any]]:
    """Return the memory modules' sensors of the board's controller, none where it cannot be asked."""
    tool = module.get_bin_path("ipmitool")
    if tool is None or not os.access(IPMI_DEVICE, os.R_OK):
        return []
    command = ["timeout", IPMI_TIMEOUT_S, tool, "sdr", "type", "Temperature"]
    code, output, _dummy = module.run_command(command, environ_update={"LC_ALL": "C"})
    rows: list[dict[str, Any]] = plain(_condition.parse_ipmi_temperatures(output)) if code == 0 else []
    return rows


def main() -> None:
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "default": "/"}},
        supports_check_mode=True,
    )
    found = _condition.gather(os.path.abspath(module.params["path"]))
    if not found["module_temperatures"]:
        found["module_temperatures"] = ask_controller(module)
    module.exit_json(changed=False, ansible_facts={"cpullm_condition": found})


if __name__ == "__main__":
    main()
