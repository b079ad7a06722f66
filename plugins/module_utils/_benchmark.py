# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a measurement of a server is made of: its runs, which of them count, its figures, and how two compare.

Pure, and with no import but the standard library's: a copy of this file runs on the host beside the program that
measures. A *run* is ``{"figure", "round", "value", "reasons"}``; one with reasons was disturbed and never counts. A
*measurement* is what was measured of one server: a mapping with ``name`` and ``runs``, and more beside them. Figures
are named ``prefill_TOKENS``, ``decode_dDEPTH`` and ``batch_REQUESTS`` (tokens/s), ``load`` and ``restart`` (seconds)
and ``read`` (GB/s, 10^9 bytes).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Figures by which a build is judged: tokens/s, so more is better. A load depends on what the page cache held.
SPEEDS = ("prefill_", "decode_", "batch_")


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some values."""

    median: float
    least: float
    most: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """How a figure of one measurement compares with another's: above 1 the second one's number is larger.

    ``paired`` says that each ratio is of two runs of one round, taken one after the other.
    """

    figure: str
    first: float
    second: float
    ratio: Spread
    paired: bool


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is ``kept``, ``refused``, or ``unknown`` where nothing could be compared; why, in words."""

    decision: str
    summary: str
    ratios: tuple[Ratio, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def counted(measurement: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Return the figures of a measurement in the order of their runs: of each round the median of what counts."""
    every: dict[str, dict[int, list[float]]] = {}
    for run in measurement.get("runs", ()):
        if not run["reasons"] and run["value"] is not None:
            every.setdefault(str(run["figure"]), {}).setdefault(int(run["round"]), []).append(float(run["value"]))
    return {
        figure: {number: statistics.median(values) for number, values in rounds.items()}
        for figure, rounds in every.items()
    }


def figures(measurement: Mapping[str, Any]) -> dict[str, Spread]:
    """Return the spread of each figure over its rounds."""
    return {figure: spread(list(rounds.values())) for figure, rounds in counted(measurement).items()}


def ratios(first: Mapping[str, Any], second: Mapping[str, Any], interleaved: bool = True) -> list[Ratio]:
    """Return how the second measurement compares with the first, for each figure that both have.

    Of interleaved measurements the rounds that both have are compared one by one, so that what slows the machine for a
    while hits both sides. Of others, or where no round is whole, every value is compared with every value.
    """
    before, after = counted(first), counted(second)
    rows = []
    for figure in before:
        if figure not in after:
            continue
        one, two = before[figure], after[figure]
        both = sorted(set(one) & set(two)) if interleaved else []
        pairs = [(one[number], two[number]) for number in both] or [
            (base, other) for base in one.values() for other in two.values()
        ]
        found = [other / base for base, other in pairs if base > 0]
        if found:
            middle = statistics.median(one.values()), statistics.median(two.values())
            rows.append(Ratio(figure, *middle, spread(found), bool(both)))
    return rows


def verdict(
    running: Mapping[str, Any], candidate: Mapping[str, Any], tolerance: float, interleaved: bool = True
) -> Verdict:
    """Return whether a candidate may take the running build's place.

    It may where the median ratio of none of its speeds is below ``1 - tolerance`` (0.05 lets a twentieth go). Loads do
    not count. ``unknown`` is no yes: the caller decides what to do where no speed has a run on both sides that counts.
    """
    rows = tuple(row for row in ratios(running, candidate, interleaved) if row.figure.startswith(SPEEDS))
    if not rows:
        disturbed = [
            f"{side}: {run['figure']}, {'; '.join(run['reasons'])}"
            for side, measurement in (("running", running), ("candidate", candidate))
            for run in measurement.get("runs", ())
            if run["reasons"]
        ]
        why = f" (disturbed runs: {' | '.join(disturbed[:4])})" if disturbed else ""
        return Verdict("unknown", f"no speed was measured of both builds{why}", rows)
    told = {row.figure: _in_words(row) for row in rows}
    slower = [row.figure for row in rows if row.ratio.median < 1 - tolerance]
    if slower:
        summary = f"slower than the running build by more than {tolerance:.1%}: " + "; ".join(
            told[figure] for figure in slower
        )
        return Verdict("refused", summary, rows)
    return Verdict("kept", f"within {tolerance:.1%} of the running build or faster: {'; '.join(told.values())}", rows)


def _in_words(row: Ratio) -> str:
    spread_ = "" if row.ratio.count == 1 else f", {row.ratio.least:.3f} to {row.ratio.most:.3f}"
    return f"{row.figure} {row.first:.2f} to {row.second:.2f} ({row.ratio.median:.3f}{spread_})"
