# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table that ends a run: what was asked, planned and found on each host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def _pages(plan: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    kib = found.get("hugetlb_kib")
    size = plan["pages"]["size_kib"]
    if kib is None:
        return "-"
    by_node = ",".join(f"{entry['node']}:{entry['pages']}" for entry in found.get("nodes", []))
    return f"{kib // size} ({by_node})" if by_node else str(kib // size)


def state(variables: Mapping[str, Any]) -> str:
    """Return one host's state in a few words."""
    serving = variables.get("__systemd_service_serving") or {}
    if serving.get("as_planned"):
        return "SERVING"
    facts = variables.get("ansible_facts") or {}
    if (facts.get("cpullm_grub_hugepages") or {}).get("reboot_required"):
        return "NOT SERVING: reboot required"
    if "as_planned" in serving:
        return "NOT AS PLANNED"
    return "NOT SERVING" if facts.get("cpullm_plan") else "NOT PLANNED"


def rows(variables: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row per instance of a host, and one for a host that has none."""
    facts = variables.get("ansible_facts") or {}
    plan, build = facts.get("cpullm_plan"), facts.get("cpullm_build") or {}
    name = str(variables.get("inventory_hostname", "?"))
    if not plan:
        return [(name, state(variables), "-", "-", "-", "-", "-", "-", "-")]
    found = {
        entry["instance"]: entry for entry in (variables.get("__systemd_service_serving") or {}).get("instances", [])
    }
    table: list[tuple[str, ...]] = []
    for entry in plan["instances"]:
        seen = found.get(entry["instance"], {})
        rate = seen.get("tokens_per_s")
        planned = f"{entry['pages']} ({','.join(str(node) for node in entry['nodes'])})"
        table.append(
            (
                name,
                state(variables),
                str(entry["instance"]),
                planned,
                _pages(plan, seen),
                f"{entry['threads']}/{entry['threads_batch']}",
                str(plan["context"]),
                f"{rate:.1f}" if rate is not None else "-",
                str(build.get("id", "-")),
            )
        )
    return table


def serving_table(hosts: list[Mapping[str, Any]]) -> list[str]:
    """Return the table's lines, its columns as wide as their longest entry."""
    table = [COLUMNS, *(row for variables in hosts for row in rows(variables))]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    if any("reboot required" in line for line in lines):
        lines.append("To reboot: run again with -e grub_hugepages_reboot_allowed=true, one host at a time.")
    return lines


class FilterModule:
    """The collection's table of hosts."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"serving_table": serving_table}
