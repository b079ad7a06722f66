#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: boot_trial
short_description: Try a kernel command line once, verify it, and only then keep it
version_added: "1.0.0"
description:
  - Copies GRUB's default entry into C(/boot/grub/custom.cfg) with the wanted arguments, boots it once, and compares the
    running host with what is wanted. If all of it is right the arguments become the default; otherwise the next boot
    has the former command line, the host is rebooted into it, and the task fails with what was seen.
  - A trial boot that nobody verifies in O(deadline_s) reboots by itself, also in emergency mode. A kernel panic, an
    init that dies and an initial RAM disk without root file system reboot by themselves, too.
  - A run that was cut at any point, by its controller's end or by a power failure, is taken up by the next one.
  - One play at a time works on a host. A second one is refused, unless the first is known to be dead.
options:
  state:
    description: V(absent) takes away what a trial left, and reboots nothing.
    type: str
    choices: [present, absent]
    default: present
  arguments:
    description: Wanted kernel arguments, in order.
    type: list
    elements: str
    default: []
  nodes:
    description: Wanted pages of each NUMA node.
    type: list
    elements: dict
    default: []
    suboptions:
      node:
        description: Number of the node.
        type: int
        required: true
      pages:
        description: Number of pages.
        type: int
        required: true
  size_kib:
    description: Size of a page in KiB.
    type: int
    default: 1048576
  reserve_bytes:
    description: Memory that has to be left beside the pages.
    type: int
    default: 2147483648
  takeover:
    description: Whether huge page arguments of files read before our drop-in are left out.
    type: bool
    default: false
  ignored_units:
    description: Patterns of units whose failure in the trial boot says nothing about the command line.
    type: list
    elements: str
    default: []
  reboot_allowed:
    description: Consent. Without it nothing is armed and nothing reboots; what an earlier run left is still cleared.
    type: bool
    default: false
  deadline_s:
    description: Seconds after the start of systemd that a trial boot may stay unverified.
    type: int
    default: 600
  power_cycle:
    description:
      - A command on the controller, as a list without a shell, that cycles the power of this host. It is run when the
        host does not come back in O(timeout_s) and O(deadline_s) together.
    type: list
    elements: str
  timeout_s:
    description: Seconds that one boot may take.
    type: float
    default: 1800
  expected_s:
    description: Seconds that a reboot of this host takes. It scales the progress bar and nothing else.
    type: float
    default: 300
  down_timeout_s:
    description: Seconds that services get to stop; a host that still answers with the same identity did not reboot.
    type: float
    default: 600
  settle_timeout_s:
    description: Seconds that systemd may take until it is done starting units. Half of O(deadline_s) at most is used.
    type: float
    default: 300
  connect_timeout_s:
    description: Seconds for one attempt to connect.
    type: int
    default: 10
  poll_s:
    description: Seconds between two attempts.
    type: float
    default: 2
attributes:
  check_mode:
    description: Says what would be tried, and reboots nothing.
    support: full
  diff_mode:
    description: Shows the trial entry, the drop-in and the arguments of each entry of C(grub.cfg).
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
seealso:
  - module: cpullm.epyc.grub_hugepages
"""

EXAMPLES = r"""
- name: Try three pages of 1 GiB on each of two nodes
  cpullm.epyc.boot_trial:
    arguments: [default_hugepagesz=1G, hugepagesz=1G, "hugepages=0:3,1:3"]
    nodes:
      - { node: 0, pages: 3 }
      - { node: 1, pages: 3 }
    reboot_allowed: true
    power_cycle: [ipmitool, -H, bmc7.example.com, -U, power, -f, /root/bmc7.password, chassis, power, cycle]
"""

RETURN = r"""
outcome:
  description:
    - V(promoted), the command line is verified and the default. V(right), it was so before. V(consent), consent to
      reboot is missing. V(cleared), what was left of a trial is gone. V(foreseen), in check mode.
  returned: success
  type: str
  sample: promoted
traces:
  description: Files in which something of a trial is, or was.
  returned: with O(state=absent)
  type: list
  elements: str
power_cycled:
  description: Whether the host's power had to be cycled.
  returned: when it was promoted
  type: bool
evidence:
  description: What a failed trial boot left, as a list of source and lines.
  returned: failure
  type: list
elapsed_s:
  description: Seconds that it took.
  returned: always
  type: float
"""
