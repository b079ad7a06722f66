#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: grub_hugepages
short_description: Own the GRUB drop-in that reserves huge pages, and regenerate GRUB's configuration in one step
version_added: "1.0.0"
description:
  - Writes C(/etc/default/grub.d/60-cpullm-hugepages.cfg), which adds the arguments to
    C(GRUB_CMDLINE_LINUX_DEFAULT), and touches no file that others own.
  - Generates C(grub.cfg) into another file of the same file system, checks it with C(grub-script-check) and by reading
    its entries, and renames it over the old one. A power cut leaves the old file or the new one.
  - When anything fails, the drop-in and C(grub.cfg) are as they were before.
  - A run that died half way is made good by the next one, since C(grub.cfg) itself is compared.
  - It never reboots.
author:
  - The cpullm.epyc authors (@cpullm)
extends_documentation_fragment:
  - action_common_attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Of C(grub.cfg) the huge page arguments of each ordinary entry are shown.
  platform:
    platforms: linux
options:
  arguments:
    description: Kernel arguments, in order. Needed with O(state=present).
    type: list
    elements: str
  takeover:
    description:
      - Whether the drop-in also leaves out what F(/etc/default/grub) and drop-ins before it say of huge pages. Those
        files stay as they are, and O(state=absent) lets them count again.
    type: bool
    default: false
  state:
    description: V(absent) removes the drop-in and regenerates, which brings back the command line from before.
    type: str
    choices: [present, absent]
    default: present
seealso:
  - module: cpullm.epyc.grub_hugepages_facts
"""

EXAMPLES = r"""
- name: Reserve three pages of 1 GiB on each of two nodes at the next boot
  cpullm.epyc.grub_hugepages:
    arguments: [default_hugepagesz=1G, hugepagesz=1G, "hugepages=0:3,1:3"]

- name: Bring back the command line from before
  cpullm.epyc.grub_hugepages:
    state: absent
"""

RETURN = r"""
regenerated:
  description: Whether C(grub.cfg) was replaced, or would be.
  returned: success
  type: bool
running:
  description: The running command line's huge page arguments.
  returned: success
  type: list
  sample: ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3"]
reboot_required:
  description: Whether the running command line differs from what the next boot will have.
  returned: success
  type: bool
"""

import fcntl
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline, _grub

LOCK = "/run/cpullm/grub_hugepages.lock"


def main() -> None:
    """Compare, change what differs, and answer."""
    module = AnsibleModule(
        argument_spec={
            "arguments": {"type": "list", "elements": "str"},
            "takeover": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ["arguments"])],
        supports_check_mode=True,
    )
    present = module.params["state"] == "present"
    arguments: list[str] = module.params["arguments"] if present else []

    # Menu titles follow the locale, and GRUB_DEFAULT may name one: so no LC_ALL=C here.
    def run(command: list[str]) -> tuple[int, str, str]:
        if not os.path.isabs(command[0]):
            command = [module.get_bin_path(command[0], required=True, opt_dirs=["/usr/sbin", "/sbin"]), *command[1:]]
        code, out, err = module.run_command(command)
        return code, out, err

    try:
        os.makedirs(os.path.dirname(LOCK), exist_ok=True)
        with open(LOCK, "w", encoding="utf-8") as lock:
            # Two plays on one host: the second one looks when the first is through.
            fcntl.flock(lock, fcntl.LOCK_EX)
            host = _grub.read_host()
            if present:
                _refuse(module, host, arguments)
            change = _grub.plan(host, arguments if present else None, module.params["takeover"])
            if not module.check_mode:
                if change.needed:
                    _grub.apply(host, change, run)
                else:
                    _grub.forget(host)
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))
        return
    running = _cmdline.hugepage_arguments(host.running)
    right = _cmdline.carries(host.running, arguments) if present else _removed(host)
    module.exit_json(
        changed=change.needed,
        regenerated=change.regenerate,
        running=running,
        reboot_required=not right,
        diff=_grub.difference(change),
    )


def _refuse(module: AnsibleModule, host: _grub.Host, arguments: list[str]) -> None:
    """Fail where these arguments cannot become the host's: nothing was touched."""
    takeover: bool = module.params["takeover"]
    found = _grub.findings(host, _grub.Wanted(size_kib=0, arguments=tuple(arguments), takeover=takeover))
    if found:
        module.fail_json(msg="GRUB was left alone: " + "; ".join(found))


def _removed(host: _grub.Host) -> bool:
    """Return whether the running command line has none of ours any more."""
    running = tuple(_cmdline.hugepage_arguments(host.running))
    ours = [*host.ours, tuple(_cmdline.hugepage_arguments(_grub.drop_in_arguments(host.drop_in)))]
    return not running or (running not in ours and _grub.on_trial(host.running) is None)


if __name__ == "__main__":
    main()
