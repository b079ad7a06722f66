# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that shows a plan to people."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: plan_table
short_description: Show a plan as a table
version_added: "1.0.0"
description:
  - Returns a plan of M(cpullm.epyc.plan) as lines of text, each number with its reason, then where the memory goes, and
    what was found that could be better.
options:
  _input:
    description: The plan.
    type: dict
    required: true
  host:
    description: Name of the host, for the first line.
    type: str
    default: ""
  width:
    description: Columns of the table.
    type: int
    default: 110
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Show the plan
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_plan'] | cpullm.epyc.plan_table(inventory_hostname) }}"
"""

RETURN = r"""
_value:
  description: Lines of text.
  type: list
  elements: str
"""

_GIB = 1 << 30
_LEAST_WIDTH = 60


def _rows(rows: list[tuple[str, str, str]], width: int) -> list[str]:
    """Return the rows in three columns, the last one wrapped."""
    first = max(len(row[0]) for row in rows)
    # A long value, such as the kernel arguments, takes a line of its own rather than half of the table.
    second = min(max(len(row[1]) for row in rows), 14)
    room = max(20, width - first - second - 4)
    lines = []
    for name, value, reason in rows:
        head = f"{name:<{first}}  "
        text = textwrap.wrap(reason, room) or [""]
        if len(value) > second:
            lines.append(head + value)
            lines += [f"{'':<{first + second + 4}}{line}" for line in text]
            continue
        lines.append(f"{head}{value:>{second}}  {text[0]}".rstrip())
        lines += [f"{'':<{first + second + 4}}{line}" for line in text[1:]]
    return lines


def plan_table(plan: Any, host: str = "", width: int = 110) -> list[str]:
    """Return a plan as lines of text; raises AnsibleFilterError for what is no plan."""
    if not isinstance(plan, Mapping) or "reasons" not in plan:
        raise AnsibleFilterError("plan_table: found no plan, expected ansible_facts['cpullm_plan'] of cpullm.epyc.plan")
    width = max(_LEAST_WIDTH, int(width))
    model = plan["model"]
    title = f"{model['name']} ({model['architecture']}, {len(model['shards'])} shard(s)), plan {plan['hash'][:12]}"
    lines = [f"{host}: {title}" if host else title]
    lines += _rows([(str(row["output"]), str(row["value"]), str(row["reason"])) for row in plan["reasons"]], width)
    for node in plan["pages"]["nodes"]:
        lines.append(f"node {node['node']}: {node['pages']} pages of 1 GiB")
    for row in plan["instances"]:
        lines.append(
            f"instance {row['instance']}: socket {row['socket']}, CPUs {row['cpus']}, "
            f"-t {row['threads']} -tb {row['threads_batch']}, port {row['port']}"
        )
    for row in plan.get("memory", []):
        parts = [
            f"{row[f'{name}_bytes'] / _GIB:.2f} {name}" for name in ("weights", "kv", "compute", "reserve", "left")
        ]
        lines.append(f"socket {row['socket']}: {row['bytes'] / _GIB:.2f} GiB = {' + '.join(parts)}")
    for row in plan.get("findings", []):
        text = f"{row['severity']}: {row['name']}: found {row['found']}, expected {row['expected']}. {row['way_out']}"
        lines += textwrap.wrap(text, width, subsequent_indent="  ")
    return lines


class FilterModule:
    """The collection's filter for plans."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"plan_table": plan_table}
