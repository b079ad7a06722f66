# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that shows the judgement of a machine to people."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: judgement_table
short_description: Show what holds a machine back
version_added: "1.0.0"
description:
  - Returns the judgement of M(cpullm.epyc.judgement) as lines of text, the roofs with the decode speed that they allow
    at most, then the findings with what they cost and what to do.
options:
  _input:
    description: The judgement.
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
  bandwidth:
    description: The fact of M(cpullm.epyc.memory_bandwidth_facts), for a line that says why nothing was measured.
    type: dict
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Show what holds the machine back
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_judgement'] | cpullm.epyc.judgement_table(inventory_hostname) }}"
"""

RETURN = r"""
_value:
  description: Lines of text.
  type: list
  elements: str
"""

_LEAST_WIDTH = 60


def _speeds(row: Mapping[str, Any]) -> str:
    """Return the tokens/s at each depth, or nothing where there is no plan."""
    speeds = ", ".join(f"{entry['tokens_per_second']:.1f} at {entry['depth']}" for entry in row["tokens"])
    return f": tokens/s at most {speeds}" if speeds else ""


def _roof(roof: Mapping[str, Any]) -> str:
    """Return the line of one roof."""
    rate = f" = {roof['gbs']:.0f} GB/s" if roof["gbs"] is not None else ""
    doubt = " (a hypothesis)" if roof["hypothesis"] else ""
    return f"roof, socket {roof['socket']}: {roof['name']}{rate}{doubt}{_speeds(roof)}"


def _measured(row: Mapping[str, Any], roofs: Sequence[Mapping[str, Any]]) -> str:
    """Return the line of one measured read rate, as a share of the memory's where that is known."""
    mine = [roof for roof in roofs if roof["socket"] == row["socket"]]
    memory = next((roof for roof in mine if roof["gbs"] is not None and not roof["hypothesis"]), None)
    share = f", {row['gbs'] / memory['gbs']:.0%} of the memory's {memory['gbs']:.0f} GB/s" if memory else ""
    return f"measured, socket {row['socket']}: {row['gbs']:.0f} GB/s{share}{_speeds(row)}"


def _finding(finding: Mapping[str, Any]) -> str:
    """Return the text of one finding."""
    loss = f" Costs {finding['loss']}." if finding["loss"] else ""
    return (
        f"{finding['severity']}: {finding['name']}: found {finding['found']}; expected {finding['expected']}."
        f"{loss} {finding['way_out']}"
    )


def judgement_table(judgement: Any, host: str = "", width: int = 110, bandwidth: Any = None) -> list[str]:
    """Return a judgement as lines of text; raises AnsibleFilterError for what is none."""
    if not isinstance(judgement, Mapping) or "roofs" not in judgement:
        raise AnsibleFilterError("judgement_table: found no judgement, expected ansible_facts['cpullm_judgement']")
    width = max(_LEAST_WIDTH, int(width))
    count = len(judgement["findings"])
    lines = [f"{host}: {count} finding(s) on the hardware" if host else f"{count} finding(s) on the hardware"]
    unmeasured = bandwidth and not bandwidth["available"]
    for text in [
        *map(_roof, judgement["roofs"]),
        *(_measured(row, judgement["roofs"]) for row in judgement["measured"]),
        *([f"measured: nothing. {bandwidth['reason']}"] if unmeasured else []),
        *map(_finding, judgement["findings"]),
    ]:
        lines += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return lines


class FilterModule:
    """The collection's filter for judgements."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"judgement_table": judgement_table}
