#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Thin edge of the measurement of a disk's read rate."""

from __future__ import annotations

DOCUMENTATION = r"""
module: disk_read_facts
short_description: Measure for a second how fast the model's disk is read
version_added: "1.0.0"
description:
  - Reads for about a second past the page cache, with four readers side by side in blocks of 8 MiB, as the loader of
    the weights does. It writes nothing. Whatever else uses the disk has less of it during that second.
  - Reads the largest of the model's shards that are there, and else the block device below the directory, for which it
    must be root. Parts of a new disk that nobody wrote yet read faster than what is stored.
options:
  directory:
    description: Directory of the model. It need not exist yet.
    type: path
    required: true
  files:
    description: Files of the model, relative to O(directory).
    type: list
    elements: str
    default: []
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
seealso:
  - module: cpullm.epyc.judgement
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Measure the model's disk
  cpullm.epyc.disk_read_facts:
    directory: /srv/models/DeepSeek-R1-Q8_0
    files: "{{ ansible_facts['cpullm_plan'].model.shards | map(attribute='file') }}"

- name: Show how fast it is
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_disk_read'].gbs }} GB/s"
  when: ansible_facts['cpullm_disk_read'].available
"""

RETURN = r"""
ansible_facts:
  description: The fact of this module.
  returned: always
  type: dict
  contains:
    cpullm_disk_read:
      description: What was measured.
      returned: always
      type: dict
      contains:
        available:
          description: Whether it could be measured. Where it is V(false), the other values are V(null).
          type: bool
          sample: true
        reason:
          description: Why it could not be measured, V(null) where it could.
          type: str
          sample: null
        gbs:
          description: The rate in GB/s, of 10^9 bytes.
          type: float
          sample: 6.8
        bytes:
          description: What was read.
          type: int
          sample: 6799997952
        seconds:
          description: The time that it took.
          type: float
          sample: 1.0
        source:
          description: The file or block device.
          type: str
          sample: /srv/models/DeepSeek-R1-Q8_0/DeepSeek-R1-Q8_0-00001-of-00016.gguf
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._condition import device_name, device_of
from ansible_collections.cpullm.epyc.plugins.module_utils._disk_read import Unmeasured, largest, measure


def source_of(directory: str, files: list[str]) -> str:
    """Return what to read: the largest shard, else the device below the directory; raises Unmeasured."""
    shard = largest([os.path.join(directory, name) for name in files])
    if shard is not None:
        return shard
    name = device_name("/", device_of(directory))
    if name is None:
        raise Unmeasured(f"{directory}: no shard is there yet, and its file system is on no block device of its own")
    # The kernel writes a slash of a name in /dev as an exclamation mark.
    return f"/dev/{name.replace('!', '/')}"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "files": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    directory = os.path.abspath(module.params["directory"])
    names = ("gbs", "bytes", "seconds", "source")
    try:
        rate = measure(source_of(directory, module.params["files"]))
        found = {"available": True, "reason": None, **{name: getattr(rate, name) for name in names}}
    except Unmeasured as error:
        found = {"available": False, "reason": str(error), **dict.fromkeys(names)}
    module.exit_json(changed=False, ansible_facts={"cpullm_disk_read": found})


if __name__ == "__main__":
    main()
