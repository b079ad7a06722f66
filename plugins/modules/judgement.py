#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: judgement
short_description: Say what holds a machine back, and what to change first
version_added: "1.0.0"
description:
  - Compares a host's hardware with what its processor can, and says what each difference costs.
  - Says how many tokens a second the memory, the links of the processor and the arithmetic of attention allow.
  - Runs on the controller and opens no connection. It informs, and no number of the plan depends on it.
  - It needs the fact C(cpullm_numa), and takes C(cpullm_plan), C(cpullm_dimm), C(cpullm_hugepages),
    C(cpullm_condition), C(cpullm_bandwidth) and C(cpullm_disk_read) where they are. A host that the plan refused is
    judged without tokens.
attributes:
  facts:
    description: Action returns an C(ansible_facts) dictionary that will update existing host facts.
    support: full
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
seealso:
  - module: cpullm.epyc.plan
  - module: cpullm.epyc.condition_facts
  - module: cpullm.epyc.disk_read_facts
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Judge the host
  cpullm.epyc.judgement:

- name: Show what holds it back
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_judgement'] | cpullm.epyc.judgement_table(inventory_hostname) }}"
"""

RETURN = r"""
ansible_facts:
  description: The judgement.
  type: dict
  returned: success
  contains:
    cpullm_judgement:
      description: What holds the machine back.
      type: dict
      returned: success
      contains:
        findings:
          description:
            - What costs speed or safety, with C(severity), C(name), C(found), C(expected), C(loss) and C(way_out).
            - Severity V(unknown) is what could not be judged.
          type: list
          elements: dict
          returned: success
        roofs:
          description:
            - What limits decoding, with C(socket), C(name), C(gbs) (10^9 bytes/s, V(null) where it is arithmetic that
              limits), C(hypothesis), and in C(tokens) the C(tokens_per_second) at each C(depth) of context.
          type: list
          elements: dict
          returned: success
        measured:
          description:
            - The measured read rate of each socket where there is one, with C(socket), C(gbs) and C(tokens) as for a
              roof.
          type: list
          elements: dict
          returned: success
"""
