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

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Figures by which a build is judged: tokens/s, so more is better. A load depends on what the page cache held.
SPEEDS = ("prefill_", "decode_", "batch_")
# A prompt must have a token, and a short one costs nothing beside what is decoded behind it.
SHORT_PROMPT = 16
# What a decoded token takes of the time of a prefilled one, for the time left and for nothing else.
_DECODE_COST = 8


@dataclass(frozen=True)
class Step:
    """One way to ask a server: requests side by side, each of a prompt and of tokens to decode behind it.

    ``cached`` lets the server keep the prompt of the run before: the decode at a depth counts, not the way there.
    """

    figure: str
    prompt: int
    tokens: int
    parallel: int = 1
    cached: bool = False

    @property
    def cost(self) -> int:
        """Return how long it takes, in prefilled tokens."""
        return self.parallel * (self.prompt + _DECODE_COST * self.tokens)


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


def steps(
    lengths: Sequence[int], depths: Sequence[int], tokens: int, context: int, slots: int
) -> tuple[list[Step], list[dict[str, str]]]:
    """Return what a server with this context and these slots is asked, and what it cannot be, with the reason.

    One token of room stays free: a server that fills its context ends early.
    """
    wanted = [Step(f"prefill_{length}", length, 1) for length in lengths]
    wanted += [Step(f"decode_d{depth}", max(depth, SHORT_PROMPT), tokens, cached=True) for depth in depths]
    chosen = [step for step in wanted if step.prompt + step.tokens < context]
    omitted = [
        {
            "figure": step.figure,
            "reason": f"needs {step.prompt + step.tokens + 1} tokens of context, a slot of the server has {context}",
        }
        for step in wanted
        if step not in chosen
    ]
    batch = Step(f"batch_{slots}", SHORT_PROMPT, tokens, slots)
    if slots < 2:
        omitted.append({"figure": "batch", "reason": "the server has one slot"})
    elif batch.prompt + batch.tokens < context:
        chosen.append(batch)
    return chosen, omitted


def prompts(step: Step, number: int, seed: int, vocabulary: int) -> list[list[int]]:
    """Return random token ids for each request of a step's round: the same for every server that is compared.

    Special tokens lie at a vocabulary's ends, and are left out. A cached prompt is the same in every round.
    """
    source = random.Random(f"{seed} {step.figure} {'' if step.cached else number}")  # noqa: S311 # no secret
    low = vocabulary // 8
    return [[source.randrange(low, vocabulary - low) for _token in range(step.prompt)] for _one in range(step.parallel)]


def rate(step: Step, timings: Sequence[Mapping[str, Any]], seconds: float) -> tuple[float | None, list[str]]:
    """Return what a run came to in tokens/s, and why it does not count.

    ``timings`` are those of the answers, as llama-server measures them; ``seconds`` is what all of it took.
    """
    reasons = []
    for row in timings:
        found, prompt = row.get("predicted_n"), (row.get("prompt_n") or 0) + (row.get("cache_n") or 0)
        if found != step.tokens:
            reasons.append(f"the server decoded {found} tokens, {step.tokens} were asked for")
        if prompt < step.prompt:
            reasons.append(f"the server's prompt had {prompt} tokens, {step.prompt} were sent")
    if step.parallel > 1:
        return sum(row.get("predicted_n") or 0 for row in timings) / seconds, reasons
    key = "prompt_per_second" if step.figure.startswith("prefill_") else "predicted_per_second"
    value = timings[0].get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        return None, [*reasons, f"the server answers {key} {value!r:.40}"]
    if step.figure.startswith("prefill_") and timings[0].get("cache_n"):
        reasons.append(f"the server kept {timings[0]['cache_n']} tokens of the prompt before")
    return float(value), reasons


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

    It may where the median ratio of none of its speeds is below ``1 - tolerance`` (0.05 lets a twentieth go). Where it
    is, but the candidate was faster in one round, the machine was too restless to tell. Loads do not count. ``unknown``
    is no yes: the caller decides what to do where that is so, or no speed has a run on both sides that counts.
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
    sure = [row.figure for row in rows if row.figure in slower and row.ratio.most < 1]
    if sure:
        summary = f"slower than the running build by more than {tolerance:.1%}: " + "; ".join(
            told[figure] for figure in sure
        )
        return Verdict("refused", summary, rows)
    if slower:
        summary = f"the rounds do not agree, some were slower by more than {tolerance:.1%} and some faster: "
        return Verdict("unknown", summary + "; ".join(told.values()), rows)
    return Verdict("kept", f"within {tolerance:.1%} of the running build or faster: {'; '.join(told.values())}", rows)


def _in_words(row: Ratio) -> str:
    spread_ = "" if row.ratio.count == 1 else f", {row.ratio.least:.3f} to {row.ratio.most:.3f}"
    return f"{row.figure} {row.first:.2f} to {row.second:.2f} ({row.ratio.median:.3f}{spread_})"


# --- Results as they are kept ---------------------------------------------------------------------------------------


def depth_of(figure: str) -> int | None:
    """Return the depth of a figure of decode, or None of any other."""
    depth = figure[len("decode_d") :]
    return int(depth) if figure.startswith("decode_d") and depth.isdecimal() else None


def shares(measurement: Mapping[str, Any], tokens: int, plan: Mapping[str, Any] | None) -> dict[str, Spread]:
    """Return the share of the measured read rate that each decode reached; none without a plan or a read rate.

    A token reads the active weights, and the KV cache as far as it is filled: half of what was decoded lies behind the
    depth on average.
    """
    values = counted(measurement)
    if not plan or not values.get("read") or not plan["model"].get("read_per_token_bytes"):
        return {}
    gbs = statistics.median(values["read"].values())
    kv_per_token = int(plan["kv_bytes"]) / (int(plan["context"]) * int(plan["slots"]))
    found = {}
    for figure, rounds in values.items():
        depth = depth_of(figure)
        if depth is not None:
            read = int(plan["model"]["read_per_token_bytes"]) + (max(depth, SHORT_PROMPT) + tokens / 2) * kv_per_token
            found[figure] = spread([rate * read / (gbs * 1e9) for rate in rounds.values()])
    return found


def _flat(name: str, values: Spread) -> dict[str, float]:
    # Significant digits, not decimals: a small model decodes thousands of tokens/s, and a large one seven.
    return {
        name: float(f"{values.median:.5g}"),
        f"{name}_min": float(f"{values.least:.5g}"),
        f"{name}_max": float(f"{values.most:.5g}"),
    }


def document(
    host: str,
    result: Mapping[str, Any],
    settings: Mapping[str, Any],
    plan: Mapping[str, Any] | None = None,
    commit: str = "",
) -> dict[str, Any]:
    """Return a result as it is kept: one host at one time, in the form of the project's other results.

    ``result`` is what the measuring program wrote, ``settings`` what it was asked for. ``figures`` are flat, named
    ``instanceN_VARIANT_FIGURE``, and ``instanceN_ratio_FIGURE`` for the second variant over the first; without a
    variant's name where the running server alone was measured.
    """
    flat: dict[str, float] = {}
    kept = []
    comparisons = []
    by_instance: dict[int, list[Mapping[str, Any]]] = {}
    for measurement in result["measurements"]:
        by_instance.setdefault(int(measurement["instance"]), []).append(measurement)
    for number, rows in by_instance.items():
        for row in rows:
            prefix = f"instance{number}_" + (f"{row['name']}_" if len(rows) > 1 else "")
            reached = shares(row, int(settings["tokens"]), plan)
            for figure, values in figures(row).items():
                flat.update(_flat(prefix + figure, values))
            for figure, values in reached.items():
                flat.update(_flat(f"{prefix}{figure}_share", values))
            kept.append({**row, "shares": [{"figure": name, **vars(values)} for name, values in reached.items()]})
        if len(rows) == 2:
            for ratio in ratios(rows[0], rows[1], bool(result["interleaved"])):
                flat.update(_flat(f"instance{number}_ratio_{ratio.figure}", ratio.ratio))
                comparisons.append(
                    {
                        "instance": number,
                        "first_name": rows[0]["name"],
                        "second_name": rows[1]["name"],
                        **vars(ratio),
                        "ratio": vars(ratio.ratio),
                    }
                )
    return {
        "name": "benchmark",
        "host": host,
        "commit": commit,
        "date": result["date"],
        "machine": result["machine"],
        "command": "ansible-playbook playbooks/benchmark.yml",
        "settings": dict(settings),
        "plan": str((plan or {}).get("hash", "")),
        "model": str(((plan or {}).get("model") or {}).get("name", "")),
        "interleaved": bool(result["interleaved"]),
        "figures": flat,
        "ratios": comparisons,
        "measurements": kept,
    }


def unit_of(figure: str) -> str:
    """Return the unit of a figure."""
    if figure.startswith(SPEEDS):
        return "tokens/s"
    return "GB/s" if figure == "read" else "s"


def table(kept: Mapping[str, Any]) -> list[str]:
    """Return a kept result as lines of text: figures with their spread, ratios, what was left out or disturbed."""
    lines = [
        f"{kept['host']}, {kept['date']}: {kept['machine']['cpu']}, model {kept['model'] or 'not planned'}, "
        f"plan {str(kept['plan'])[:12] or 'none'}"
    ]
    rows: list[tuple[str, ...]] = [
        ("instance", "variant", "figure", "median", "least", "most", "unit", "runs", "of the read rate")
    ]
    notes = []
    for measurement in kept["measurements"]:
        where = (str(measurement["instance"]), str(measurement["name"]))
        reached = {row["figure"]: row for row in measurement["shares"]}
        disturbed: dict[str, list[str]] = {}
        for run in measurement["runs"]:
            if run["reasons"]:
                disturbed.setdefault(str(run["figure"]), []).append("; ".join(run["reasons"]))
        for figure, values in figures(measurement).items():
            share = f"{reached[figure]['median']:.0%}" if figure in reached else ""
            runs = sum(1 for run in measurement["runs"] if run["figure"] == figure)
            numbers = (f"{number:.4g}" for number in (values.median, values.least, values.most))
            good = runs - len(disturbed.get(figure, ()))
            rows.append((*where, figure, *numbers, unit_of(figure), f"{good} of {runs}", share))
        label = f"instance {where[0]}, {where[1]}"
        notes += [f"left out: {label}, {row['figure']}: {row['reason']}" for row in measurement["omitted"]]
        for figure, reasons in disturbed.items():
            notes.append(f"disturbed: {label}, {figure}: {len(reasons)} run(s) do not count, such as: {reasons[0]}")
    lines += _columns(rows)
    if kept["ratios"]:
        compared: list[tuple[str, ...]] = [("instance", "figure", "first", "second", "ratio", "least", "most", "pairs")]
        for row in kept["ratios"]:
            medians = f"{row['first']:.4g}", f"{row['second']:.4g}"
            spread_ = (f"{row['ratio'][key]:.3f}" for key in ("median", "least", "most"))
            compared.append((str(row["instance"]), str(row["figure"]), *medians, *spread_, str(row["ratio"]["count"])))
        first = kept["ratios"][0]
        lines += ["", f"{first['second_name']} over {first['first_name']}:", *_columns(compared)]
    return lines + ([""] if notes else []) + notes


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
