# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a build that was measured may take the running one's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.module_utils._benchmark import verdict

DOCUMENTATION = r"""
name: benchmark_verdict
short_description: Say whether a measured build may replace the running one
version_added: "1.0.0"
description:
  - Compares two measurements of the role C(benchmark), that of the running build and that of a candidate, figure by
    figure, and says whether the candidate may be kept.
  - Refused is a candidate of which the median ratio of a speed (prefill, decode, batch) is below 1 less the tolerance,
    and that was faster in no round. Disturbed runs never count.
options:
  _input:
    description: The measurement of the running build, an entry of C(measurements) of a result.
    type: dict
    required: true
  candidate:
    description: The measurement of the candidate.
    type: dict
    required: true
  tolerance:
    description: The share of the speed that may be lost, 0 or more and below 1.
    type: float
    default: 0.05
  interleaved:
    description: Whether the two took turns, so that their rounds belong together.
    type: bool
    default: true
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Keep no slower build
  ansible.builtin.assert:
    that: verdict.decision == 'kept'
    fail_msg: "{{ inventory_hostname }}: {{ verdict.summary }}"
  vars:
    verdict: "{{ result.measurements[0] | cpullm.epyc.benchmark_verdict(result.measurements[1], tolerance=0.05) }}"
"""

RETURN = r"""
_value:
  description:
    - C(decision) is V(kept), V(refused), or V(unknown) where no speed was measured of both, or the rounds
      do not agree.
    - C(summary) says why, with the numbers. C(ratios) lists each figure with both medians and the ratio's spread.
  type: dict
"""


def benchmark_verdict(
    running: Mapping[str, Any], candidate: Mapping[str, Any], tolerance: float = 0.05, interleaved: bool = True
) -> dict[str, Any]:
    """Return the verdict as plain data; raises AnsibleFilterError for what is no measurement or no tolerance."""
    try:
        share = float(tolerance)
        if not 0 <= share < 1:
            raise ValueError(f"found tolerance {tolerance!r}, expected 0 or more and below 1")
        return asdict(verdict(running, candidate, share, interleaved))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AnsibleFilterError(
            f"benchmark_verdict: {error}; expected two measurements of the role benchmark"
        ) from error


class FilterModule:
    """The collection's judgement of a build by its speed."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"benchmark_verdict": benchmark_verdict}
