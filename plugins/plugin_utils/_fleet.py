# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host's state and instances, from its variables after the roles ran on it: what the table and the report share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SERVING = "SERVING"
REBOOT_REQUIRED = "NOT SERVING: reboot required"
NOT_AS_PLANNED = "NOT AS PLANNED"
NOT_SERVING = "NOT SERVING"
REFUSED = "REFUSED"
UNREACHABLE = "UNREACHABLE"
NOT_READ = "NOT READ"
NOT_PLANNED = "NOT PLANNED"

# Registered by the roles on a host's way to its plan, in that order.
_READS = ("__report_reached", "__host_plan_read")
_REFUSALS = ("__host_plan_result", "__host_plan_room")


@dataclass(frozen=True)
class Instance:
    """An instance as planned and as verified; what was not verified is None."""

    instance: int
    pages: int
    nodes: tuple[int, ...]
    threads: int
    threads_batch: int
    pages_found: int | None
    pages_by_node: tuple[tuple[int, int], ...]
    tokens_per_s: float | None
    deviations: tuple[str, ...]


def facts_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a host's facts, or an empty mapping."""
    return variables.get("ansible_facts") or {}


def serving_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the verification registered, or an empty mapping."""
    return variables.get("__systemd_service_serving") or {}


def stopped_at(variables: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return UNREACHABLE, NOT_READ or REFUSED, and the task's result, of a host that got no plan; else None."""
    for name in (*_READS, *_REFUSALS):
        result = variables.get(name) or {}
        if result.get("unreachable"):
            return UNREACHABLE, result
        if result.get("failed"):
            return (NOT_READ if name in _READS else REFUSED), result
    return None


def state(variables: Mapping[str, Any]) -> str:
    """Return one host's state in a few words."""
    serving, facts = serving_of(variables), facts_of(variables)
    if serving.get("as_planned"):
        return SERVING
    stopped = stopped_at(variables)
    if stopped:
        return stopped[0]
    if (facts.get("cpullm_grub_hugepages") or {}).get("reboot_required"):
        return REBOOT_REQUIRED
    found = serving.get("instances") or []
    if "as_planned" in serving and (not found or any(entry.get("active_state") == "active" for entry in found)):
        return NOT_AS_PLANNED
    return NOT_SERVING if facts.get("cpullm_plan") else NOT_PLANNED


def instances(variables: Mapping[str, Any]) -> list[Instance]:
    """Return a host's planned instances with what was found of each; empty without a plan."""
    plan = facts_of(variables).get("cpullm_plan")
    if not plan:
        return []
    found = {entry["instance"]: entry for entry in serving_of(variables).get("instances", [])}
    rows = []
    for entry in plan["instances"]:
        seen = found.get(entry["instance"], {})
        kib = seen.get("hugetlb_kib")
        rows.append(
            Instance(
                instance=entry["instance"],
                pages=entry["pages"],
                nodes=tuple(entry["nodes"]),
                threads=entry["threads"],
                threads_batch=entry["threads_batch"],
                pages_found=None if kib is None else kib // plan["pages"]["size_kib"],
                pages_by_node=tuple((row["node"], row["pages"]) for row in seen.get("nodes", [])),
                tokens_per_s=seen.get("tokens_per_s"),
                deviations=tuple(seen.get("deviations", [])),
            )
        )
    return rows
