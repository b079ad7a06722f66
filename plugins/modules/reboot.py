#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: reboot
short_description: Reboot a host, show the wait, and prove that it was a reboot
version_added: "1.0.0"
description:
  - Reads the boot's identity, asks systemd for a reboot in two seconds, and waits until the host answers with another
    one. A host that answers again with the same identity did not reboot, and the task fails.
  - Shows the time that went by, what was expected, and when it gives up, while it waits.
  - Consent is the caller's matter. This reboots at once.
  - A task with a local connection is refused.
options:
  timeout_s:
    description:
      - Seconds from the request after which the wait ends as failed.
      - Large DDR5 machines may train memory for 15 minutes.
    type: float
    default: 1800
  expected_s:
    description: Seconds that a reboot of this host takes. It scales the progress bar and nothing else.
    type: float
    default: 300
  down_timeout_s:
    description:
      - Seconds from the request after which a host that still answers with the old identity counts as not rebooted.
      - Services get this long to stop.
    type: float
    default: 600
  settle_timeout_s:
    description:
      - Seconds that systemd may take, once the host answers again, until it is done starting units.
      - When they are over the task ends all the same, and RV(system_state) says how far it came.
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
  title:
    description: What the progress line calls the wait.
    type: str
    default: reboot
attributes:
  check_mode:
    description: Reports a change, and reboots nothing.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: reboot | Boot with the new kernel arguments
  cpullm.epyc.reboot:
    timeout_s: 2700
    expected_s: 900
  when: grub_hugepages_reboot_allowed
"""

RETURN = r"""
rebooted:
  description: Whether another boot was seen.
  returned: always
  type: bool
  sample: true
boot_id_before:
  description: Identity of the boot that was ended.
  returned: when the host was asked to reboot
  type: str
  sample: 1b2e5f6a-08c4-4f43-9a54-6f3b4b5d9d0e
boot_id:
  description: Identity of the boot that answered last, null where none did.
  returned: when the host was asked to reboot
  type: str
  sample: 7f0d8a3c-4c0e-4b0d-8d3a-2f6f4d8a1c55
elapsed_s:
  description: Seconds from the request to the end of the wait.
  returned: when the host was asked to reboot
  type: float
  sample: 142.7
ssh_back_s:
  description: Seconds from the request to the first answer of the new boot.
  returned: success
  type: float
  sample: 133.1
system_state:
  description: What C(systemctl is-system-running) said at the end; empty without systemd.
  returned: success
  type: str
  sample: running
"""
