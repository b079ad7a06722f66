#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tunables
short_description: Set kernel settings below /proc/sys and /sys, and bring back what they were
version_added: "1.0.0"
description:
  - Compares a list of files with wanted values and sets those that differ, all of them or, where one is impossible,
    none.
  - Understands files that list their choices, such as C(always [madvise] never).
  - Keeps the values from before the first change in a record, from which O(state=absent) brings them back.
  - It makes nothing persistent. Files below C(/etc/sysctl.d) and C(/etc/tmpfiles.d) do that.
author:
  - The cpullm.epyc authors (@cpullm)
extends_documentation_fragment:
  - action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  platform:
    platforms: linux
options:
  settings:
    description: What is wanted.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: A file below C(/proc/sys) or C(/sys). A V(*) stands for any name.
        type: path
        required: true
      value:
        description: The value.
        type: str
        required: true
      optional:
        description: Whether a kernel without such a file is fine.
        type: bool
        default: false
      reason:
        description: Why the value is wanted. It is for those who read the task.
        type: str
  record:
    description: The file that keeps the values from before.
    type: path
    required: true
  sysctl_file:
    description:
      - The file below C(/etc/sysctl.d) that makes the settings persistent. Lines of files that are read after it and
        say something else are refused, or with O(compare_only) returned as RV(overrides).
    type: path
  compare_only:
    description: Set nothing, also outside of check mode, and let files be that cannot be written.
    type: bool
    default: false
  state:
    description: V(absent) brings back the values of O(record) and removes it.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Keep the KV cache out of swap
  cpullm.epyc.tunables:
    record: /var/lib/cpullm/memory_tuning.json
    settings:
      - path: /proc/sys/vm/swappiness
        value: "1"
      - path: /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor
        value: performance
        optional: true
"""

RETURN = r"""
settings:
  description: Each file, what it said before and what is wanted.
  returned: success
  type: list
  elements: dict
  sample: [{"path": "/proc/sys/vm/swappiness", "before": "60", "wanted": "1"}]
differing:
  description: A line for each file that said something else.
  returned: success
  type: list
  elements: str
  sample: ["/proc/sys/vm/swappiness: 60 found, 1 wanted"]
overrides:
  description: Lines of other sysctl files that would win at the next boot.
  returned: success
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _tunables


def main() -> None:
    """Compare, set or restore, and answer."""
    module = AnsibleModule(
        argument_spec={
            "settings": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "value": {"type": "str", "required": True},
                    "optional": {"type": "bool", "default": False},
                    "reason": {"type": "str"},
                },
            },
            "record": {"type": "path", "required": True},
            "sysctl_file": {"type": "path"},
            "compare_only": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    params = module.params
    settings = [_tunables.Setting(item["path"], item["value"], item["optional"]) for item in params["settings"]]
    overrides: list[str] = []
    write = not module.check_mode and not params["compare_only"]
    try:
        if params["state"] == "present":
            found, faults = _tunables.survey("/", settings)
            if params["sysctl_file"]:
                overrides = _tunables.find_overrides("/", settings, params["sysctl_file"])
            if (faults or overrides) and not params["compare_only"]:
                module.fail_json(msg="nothing was changed: " + "; ".join(faults + overrides))
            if write:
                _tunables.apply("/", found, params["record"])
        else:
            found = _tunables.restorable("/", params["record"])
            if write:
                _tunables.restore("/", found, params["record"])
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))
        return
    changes = [item for item in found if not item.right]
    module.exit_json(
        changed=bool(changes) and not params["compare_only"],
        settings=[{"path": item.path, "before": item.before, "wanted": item.wanted} for item in found],
        differing=[f"{item.path}: {item.before} found, {item.wanted} wanted" for item in changes],
        overrides=overrides,
        diff={
            "before": "".join(f"{item.path}: {item.before}\n" for item in changes),
            "after": "".join(f"{item.path}: {item.wanted}\n" for item in changes),
        },
    )


if __name__ == "__main__":
    main()
