# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure servers of this host. Beside it lie copies of the collection's modules that it needs, and no Ansible."""

from __future__ import annotations

import sys

from ansible_collections.cpullm.epyc.plugins.module_utils._benchmark_run import main

if __name__ == "__main__":
    sys.exit(main())
