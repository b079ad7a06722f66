# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What was measured of a host, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.module_utils._benchmark import table

DOCUMENTATION = r"""
name: benchmark_table
short_description: Show a result of the benchmark as a table
version_added: "1.0.0"
description:
  - Returns a table in text of what M(cpullm.epyc.benchmark_record) returned or wrote, each figure with its spread, the
    ratios of two variants, what was left out, and what disturbed the runs that do not count.
options:
  _input:
    description: A result.
    type: dict
    required: true
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Show what was measured
  ansible.builtin.debug:
    msg: "{{ lookup('ansible.builtin.file', 'cpullm-benchmark/epyc-01-20261125T190000Z.json') | from_json
             | cpullm.epyc.benchmark_table }}"
"""

RETURN = r"""
_value:
  description: The lines of the table.
  type: list
  elements: str
"""


def benchmark_table(result: Mapping[str, Any]) -> list[str]:
    """Return the table's lines; raises AnsibleFilterError for what is no result."""
    try:
        return table(result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AnsibleFilterError(f"benchmark_table: {error!r}; expected a result of the role benchmark") from error


class FilterModule:
    """The collection's table of measurements."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"benchmark_table": benchmark_table}
