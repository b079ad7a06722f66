# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table that ends a run: what was asked, planned and found on each host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible_collections.cpullm.epyc.plugins.plugin_utils._fleet import (
    REBOOT_REQUIRED,
    Instance,
    facts_of,
    instances,
    state,
)

DOCUMENTATION = r"""
name: serving_table
short_description: Show what was planned and found on each host
version_added: "1.0.0"
description:
  - Returns a table in text from the variables of hosts, after the roles of this collection ran on them.
options:
  _input:
    description: The variables of each host.
    type: list
    elements: dict
    required: true
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Show the fleet
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts_all | map('extract', hostvars) | list | cpullm.epyc.serving_table }}"
"""

RETURN = r"""
_value:
  description: The lines of the table.
  type: list
  elements: str
"""

COLUMNS = ("host", "state", "instance", "pages planned", "pages found", "threads", "context", "tokens/s", "build")


def _pages(row: Instance) -> str:
    if row.pages_found is None:
        return "-"
    by_node = ",".join(f"{node}:{pages}" for node, pages in row.pages_by_node)
    return f"{row.pages_found} ({by_node})" if by_node else str(row.pages_found)


def rows(variables: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row per instance of a host, and one for a host that has none."""
    facts = facts_of(variables)
    name = str(variables.get("inventory_hostname", "?"))
    table: list[tuple[str, ...]] = [
        (
            name,
            state(variables),
            str(row.instance),
            f"{row.pages} ({','.join(str(node) for node in row.nodes)})",
            _pages(row),
            f"{row.threads}/{row.threads_batch}",
            str(facts["cpullm_plan"]["context"]),
            f"{row.tokens_per_s:.1f}" if row.tokens_per_s is not None else "-",
            str((facts.get("cpullm_build") or {}).get("id", "-")),
        )
        for row in instances(variables)
    ]
    return table or [(name, state(variables), *["-"] * (len(COLUMNS) - 2))]


def serving_table(hosts: list[Mapping[str, Any]]) -> list[str]:
    """Return the table's lines, its columns as wide as their longest entry."""
    table = [COLUMNS, *(row for variables in hosts for row in rows(variables))]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    if any(row[1] == REBOOT_REQUIRED for row in table):
        lines.append("To reboot: run again with -e grub_hugepages_reboot_allowed=true, one host at a time.")
    return lines


class FilterModule:
    """The collection's table of hosts."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"serving_table": serving_table}
