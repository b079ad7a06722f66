#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fleet_report
short_description: Write the report of the fleet as one HTML file
version_added: "1.0.0"
description:
  - Writes a page from the variables of all hosts of the inventory, as the roles of this collection leave them. A row
    for each host with state, model, pages, speeds and what to change first. For each host a picture of sockets, nodes,
    CCDs, channels and modules, where the memory goes, and the roofs over the decode speed with what was measured.
  - The page is one file that loads nothing and runs no script. It can be printed, and has a light and a dark side.
  - A host that was refused, failed or was not reached has its row with what is known of it.
  - Runs on the controller, which needs matplotlib. Use it with C(run_once).
options:
  dest:
    description: The file on the controller, readable by everyone. Its directory must be there.
    type: path
    required: true
  write:
    description: With V(false) nothing is written, and only matplotlib and the directory of O(dest) are looked for.
    type: bool
    default: true
  benchmarks:
    description:
      - A directory on the controller with results of the role C(benchmark). The newest of each host is shown, and drawn
        under the roofs where its plan is the host's. It need not be there.
    type: path
attributes:
  check_mode:
    description: Says whether the report changes, without writing it.
    support: full
  diff_mode:
    description: There is none, for a page is not read as a text.
    support: none
notes:
  - Changed means that the hosts, their states, plans, modules or findings differ from those in the file. The time and
    what was measured are not looked at. The file is written in either case, so that it shows the last look.
  - What hosts tell is foreign. It is escaped, and control characters in it are replaced.
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Write the fleet report
  cpullm.epyc.fleet_report:
    dest: /srv/www/fleet.html
  run_once: true
"""

RETURN = r"""
dest:
  description: Path of the report on the controller.
  type: str
  returned: success
"""
