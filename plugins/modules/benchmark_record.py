#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: benchmark_record
short_description: Keep what was measured of a host on the controller
version_added: "1.0.0"
description:
  - Writes what the program of the role C(benchmark) measured to a file on the controller, one for each host and time,
    with the machine, the builds, the plan's hash, every run, and the figures with their spread.
  - Runs on the controller alone.
options:
  directory:
    description:
      - Where the file goes. It is made where only the directory above it is there.
      - Without it no file is written, and the fact is set all the same.
    type: path
  result:
    description: What the program wrote. Without it the directory is looked for and nothing is written.
    type: dict
  settings:
    description: What the program was asked for.
    type: dict
    default: {}
attributes:
  check_mode:
    description: Writes nothing.
    support: full
  diff_mode:
    description: A new file has nothing to be compared with.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Refuse early where nothing could be kept
  cpullm.epyc.benchmark_record:
    directory: /srv/benchmarks
"""

RETURN = r"""
dest:
  description: The file.
  type: str
  returned: when O(directory) and O(result) are given
ansible_facts:
  description: The file's content as the fact C(cpullm_benchmark).
  type: dict
  returned: when O(result) is given
  contains:
    cpullm_benchmark:
      description: The result, which P(cpullm.epyc.benchmark_table#filter) shows.
      type: dict
"""
