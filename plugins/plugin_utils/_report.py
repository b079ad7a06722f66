# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The fleet report: variables of hosts in, one self-contained HTML page out.

Pure functions. Everything that a host tells is foreign input: names, module strings and errors are cleaned of control
characters, cut, and escaped by the template; facts of a shape that no module returns cost that host's pictures, not the
page. The page loads nothing and runs nothing, and its own policy (CSP) says so to the browser.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Platform, platform_of, tokens_under
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import GIB, MIB, STRUCT_PAGE_SHARE
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _fleet
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("report.html.j2")
# What a host's text may take of the page.
LONGEST_TEXT = 600
# No machine has more memory slots, caches or nodes than this; a list that is longer is no description of one.
LONGEST_LIST = 1024
# Stands where a number would.
NOTHING = "\N{EN DASH}"

_SEVERITIES = ("refused", "failed", "warning", "advice", "unknown")
_TONES = {
    _fleet.SERVING: "good",
    _fleet.REBOOT_REQUIRED: "warning",
    _fleet.NOT_SERVING: "warning",
    _fleet.NOT_AS_PLANNED: "bad",
    _fleet.REFUSED: "bad",
    _fleet.UNREACHABLE: "bad",
    _fleet.NOT_READ: "bad",
}
_SIGNATURE = re.compile(r'<meta name="cpullm-signature" content="([0-9a-f]{64})">')
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}href"
# Colours that matplotlib draws with, and what the page's style sheet calls them.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--good)",
    "#050501": "var(--roof-1)",
    "#050502": "var(--roof-2)",
    "#050503": "var(--roof-3)",
    "#050504": "var(--roof-4)",
}
_INK, _MUTED, _LINE, _GOOD, *_ROOFS = _COLOURS


@dataclass(frozen=True)
class Finding:
    """What holds a host back; what is not known of it is an empty text."""

    severity: str
    name: str
    found: str
    expected: str = ""
    loss: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class Slot:
    """A memory slot as it is drawn: its mark, two short texts, and all of it in words."""

    locator: str
    mark: str
    size: str
    speed: str
    words: str


@dataclass(frozen=True)
class Channel:
    """A memory channel, or with an empty label the slots that name none."""

    label: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Node:
    """A NUMA node; pages are None where nobody planned or looked."""

    node: int
    memory: str
    pages_planned: int | None
    pages_found: int | None


@dataclass(frozen=True)
class Socket:
    """A socket as it is drawn."""

    socket: int
    cores: int
    threads: int
    nodes: tuple[Node, ...]
    caches: tuple[tuple[int, str], ...]
    cache_name: str
    channels: tuple[Channel, ...]
    words: str


@dataclass(frozen=True)
class Segment:
    """A part of a memory bar."""

    kind: str
    name: str
    share: float
    size: str


@dataclass(frozen=True)
class Bar:
    """Where the memory of equal sockets goes."""

    label: str
    segments: tuple[Segment, ...]

    @property
    def words(self) -> str:
        """Return the picture in words."""
        return f"Memory of {self.label}: " + ", ".join(f"{part.size} {part.name}" for part in self.segments)


@dataclass(frozen=True)
class Roof:
    """A roof over the decode speed: (depth in tokens, tokens/s) in order of depth."""

    name: str
    gbs: float | None
    kind: str
    points: tuple[tuple[int, float], ...]
    colour: int


# Depth in tokens, and the tokens/s that a benchmark's runs decoded there: median, least, most.
Decoded = tuple[int, float, float, float]


@dataclass(frozen=True)
class Roofline:
    """The roofs that sockets share, and what was measured under them, as a picture and in numbers.

    ``benchmarks`` are the points of each instance that was measured under this very plan.
    """

    title: str
    depths: tuple[int, ...]
    roofs: tuple[Roof, ...]
    measured: tuple[float, ...]
    benchmarks: tuple[tuple[Decoded, ...], ...]
    svg: Markup


@dataclass(frozen=True)
class Figure:
    """A figure of a benchmark in words; ``share`` of the measured read rate is empty where there is none."""

    where: str
    name: str
    median: str
    spread: str
    unit: str
    runs: str
    share: str


@dataclass(frozen=True)
class Benchmark:
    """A host's latest benchmark: its figures, the ratios of two variants, and what is to be known of it."""

    date: str
    builds: str
    planned: bool
    figures: tuple[Figure, ...]
    compared: str
    ratios: tuple[Figure, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Host:
    """All that the page shows of a host."""

    anchor: str
    name: str
    state: str
    tone: str
    machine: str
    memory: str
    model: str
    setting: str
    build: str
    pages_planned: str
    pages_found: str
    expected: str
    hypothesis: str
    measured: str
    findings: tuple[Finding, ...]
    sockets: tuple[Socket, ...]
    no_slots: str
    bars: tuple[Bar, ...]
    rooflines: tuple[Roofline, ...]
    benchmark: Benchmark | None
    reasons: tuple[tuple[str, str, str], ...]
    plan: str

    @property
    def first(self) -> Finding | None:
        """Return what to change first."""
        return self.findings[0] if self.findings else None


def clean(value: Any) -> Any:
    """Return a value in plain types, its texts without control characters and cut, its lists cut.

    Marks of direction are control characters here: in a name they would turn the text beside it.
    """
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value[:LONGEST_LIST]]
    if isinstance(value, str):
        text = "".join(
            " " if char in "\n\t" else "\N{REPLACEMENT CHARACTER}" if unicodedata.category(char)[0] == "C" else char
            for char in value[: LONGEST_TEXT + 1]
        )
        return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) and math.isfinite(value) else None


def _gib(count: float) -> str:
    """Return bytes as a short text, in GiB from a tenth of one on, else in MiB."""
    size = count / GIB
    if 0 < size < 0.1:
        return f"{count / MIB:.1f} MiB"
    return f"{size:,.0f} GiB" if size >= 100 or size == int(size) else f"{size:.2f} GiB"


def _alike(texts: Iterable[str]) -> str:
    """Return texts of instances side by side, or one where all are the same."""
    every = list(texts)
    return every[0] if len(set(every)) == 1 else " / ".join(every)


# --- Findings -------------------------------------------------------------------------------------------------------


def _message(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return a task's message as the first part of a sentence, without the host's name before it."""
    text = str(result.get("msg") or "no reason given").strip()
    return text.removeprefix(f"{record.get('inventory_hostname')}: ").removesuffix(".")


def _stopped(record: Mapping[str, Any]) -> list[Finding]:
    stopped = _fleet.stopped_at(record)
    if stopped is None:
        return []
    state, result = stopped
    refusal, message = result.get("refusal"), _message(record, result)
    if refusal:
        return [
            Finding("refused", refusal["name"], refusal["found"], refusal["expected"], way_out=refusal["way_out"]),
        ]
    if state == _fleet.REFUSED:
        return [Finding("refused", "the host", message)]
    way_out = "Mend the way to the host, then run playbooks/report.yml again."
    return [
        Finding("failed", "the connection" if state == _fleet.UNREACHABLE else "the facts", message, "", "", way_out)
    ]


def _differences(record: Mapping[str, Any]) -> list[Finding]:
    """Return what the verification found, of servers first, then of all else that was compared."""
    servers = [
        Finding("failed", unit, text, way_out=f"`journalctl -u {unit}` on the host.")
        for row in _fleet.instances(record)
        for unit in (f"llama-server@{row.instance}",)
        for text in row.deviations
    ]
    # What ended the plan, and what the servers' differences say already, is not said twice.
    told = [(_fleet.stopped_at(record) or ("", {}))[1].get("msg")]
    others = [
        Finding("failed", str(row["role"]), _message(record, row))
        for row in record.get("__report_failures") or []
        if row["msg"] not in told and not (servers and row["role"] == "systemd_service")
    ]
    return servers + others


def findings_of(record: Mapping[str, Any]) -> list[Finding]:
    """Return all that holds a host back, what to change first at the head."""
    facts = _fleet.facts_of(record)
    found = [*_stopped(record), *_differences(record)]
    if _fleet.state(record) == _fleet.REBOOT_REQUIRED:
        found.append(
            Finding(
                "warning",
                "kernel arguments",
                "pages of 1 GiB are configured, and the running kernel has not reserved them",
                "a reboot",
                "",
                "Run site.yml again with -e grub_hugepages_reboot_allowed=true.",
            )
        )
    if record.get("ended_early") and not found:
        way_out = "The output of the run names task and reason; playbooks/report.yml looks again."
        found.append(Finding("failed", "the run", "it ended for this host before its end", "", "", way_out))
    if not found and not facts.get("cpullm_numa"):
        found.append(Finding("unknown", "the facts", "none in this run", "", "", "Run playbooks/report.yml."))
    told = [
        Finding(**{field.name: str(row.get(field.name) or "") for field in dataclasses.fields(Finding)})
        for source in ("cpullm_plan", "cpullm_judgement")
        for row in (facts.get(source) or {}).get("findings", [])
    ]
    return found + sorted(told, key=lambda row: (_SEVERITIES.index(row.severity), -_percent(row.loss)))


def _percent(loss: str) -> int:
    """Return the share of the decode speed that the words of a loss name, or 0."""
    match = re.search(r"(?<![\d.])(\d{1,3})%", loss)
    return int(match[1]) if match and "none in decode" not in loss else 0


# --- The board ------------------------------------------------------------------------------------------------------


def _sockets(record: Mapping[str, Any]) -> tuple[Socket, ...]:
    facts = _fleet.facts_of(record)
    numa, dimm, plan = (facts.get(f"cpullm_{name}") or {} for name in ("numa", "dimm", "plan"))
    platform = platform_of((numa.get("cpu") or {}).get("model"))
    planned = {row["node"]: row["pages"] for row in (plan.get("pages") or {}).get("nodes", [])}
    pools = {row["node"]: row["found"] for row in (facts.get("cpullm_grub_hugepages") or {}).get("pools") or []}
    numbers = [row["socket"] for row in numa.get("sockets") or []]
    nodes = {row["node"]: row for row in numa.get("nodes") or []}
    sockets = []
    for row in numa.get("sockets") or []:
        number = row["socket"]
        own = [slot for slot in dimm.get("slots") or [] if _belongs(slot, number, numbers)]
        channels = _channels(own, platform)
        sockets.append(
            Socket(
                socket=int(number),
                cores=int(row["physical_cores"]),
                threads=int(row["threads"]),
                nodes=tuple(
                    Node(int(node), _gib(nodes[node]["memory_bytes"]), planned.get(node), pools.get(node))
                    for node in row["nodes"]
                    if node in nodes
                ),
                caches=tuple(_cache(group) for group in numa.get("l3") or [] if group.get("socket") == number),
                # Cores that share an L3 cache are a CCD on the processors that are known here.
                cache_name="CCD" if platform else "group of cores with an L3 cache",
                channels=channels,
                words=_in_words(number, channels),
            )
        )
    return tuple(sockets)


def _belongs(slot: Mapping[str, Any], socket: int, sockets: Sequence[int]) -> bool:
    """Return whether a slot is a socket's; with one socket, slots that name none are its own."""
    return slot.get("socket") == socket or (slot.get("socket") is None and len(sockets) == 1)


def _cache(group: Mapping[str, Any]) -> tuple[int, str]:
    cores = int(group.get("physical_cores") or 0)
    cache = group.get("bytes")
    return cores, f"{cores} cores" + (f", {cache / (1 << 20):.0f} MiB of L3" if cache else "")


def _channels(slots: Sequence[Mapping[str, Any]], platform: Platform | None) -> tuple[Channel, ...]:
    """Return the channels in order, each with its slots, and last those that name none."""
    filled = {slot.get("channel") for slot in slots if slot.get("populated")} - {None}
    sizes = Counter(slot["size_bytes"] for slot in slots if slot.get("populated") and slot.get("size_bytes"))
    usual = sizes.most_common(1)[0][0] if sizes else None
    channels: dict[int | None, list[Slot]] = {}
    labels: dict[int | None, str] = {None: ""}
    for slot in slots:
        channel = slot.get("channel")
        channels.setdefault(channel, []).append(_slot(slot, usual, channel in filled, platform))
        if channel is not None:
            labels[channel] = str(slot.get("channel_label") or channel)
    return tuple(
        Channel(labels[key], tuple(channels[key])) for key in sorted(channels, key=lambda key: (key is None, key or 0))
    )


def _slot(slot: Mapping[str, Any], usual: int | None, filled: bool, platform: Platform | None) -> Slot:
    """Return a slot as it is drawn, with the one mark that matters most; the judgement's rules, slot by slot."""
    locator = str(slot.get("locator") or f"handle {slot.get('handle')}")
    if not slot.get("populated"):
        if slot.get("populated") is None:
            return Slot(locator, "unknown", "?", "", f"{locator}: the firmware does not know it")
        return Slot(locator, "free" if filled else "empty", "", "", f"{locator}: {'free' if filled else 'empty'}")
    size, rated, configured = (slot.get(key) for key in ("size_bytes", "rated_mts", "configured_mts"))
    wanted = min(rated, platform.mts) if rated and platform else rated
    words = [_gib(size) if size else "size unknown"]
    words.append(f"{configured} MT/s" + (f", rated {rated}" if rated else "") if configured else "speed unknown")
    words += [str(slot[key]) for key in ("manufacturer", "part_number") if slot.get(key)]
    if slot.get("ecc") is False:
        mark, why = "no-ecc", "without ECC"
    elif size != usual:
        mark, why = "odd", "not the size of the others"
    elif wanted and configured and configured < wanted:
        mark, why = "slow", f"slower than the {wanted} MT/s it could run at"
    else:
        mark, why = "good", ""
    return Slot(
        locator,
        mark,
        f"{size / GIB:g}" if size else "?",
        str(configured or "?"),
        f"{locator}: {', '.join(words)}" + (f"; {why}" if why else ""),
    )


def _in_words(socket: int, channels: Sequence[Channel]) -> str:
    """Return the picture of a socket's memory in words, for those who do not see it."""
    slots = [slot for channel in channels for slot in channel.slots]
    marks = Counter(slot.mark for slot in slots)
    told = ", ".join(f"{count} {mark}" for mark, count in marks.items())
    return f"Memory slots of socket {socket}: {told or 'none known'}"


def _memory(record: Mapping[str, Any]) -> str:
    """Return a machine's memory in a line, its modules where they are known."""
    facts = _fleet.facts_of(record)
    total = (facts.get("cpullm_numa") or {}).get("memory_bytes")
    used = [slot for slot in (facts.get("cpullm_dimm") or {}).get("slots") or [] if slot.get("populated")]
    kinds = Counter(
        (f"{slot['size_bytes'] / GIB:g} GiB" if slot.get("size_bytes") else "?", str(slot.get("type") or ""))
        for slot in used
    )
    modules = ", ".join(f"{count} x {size} {kind}".strip() for (size, kind), count in kinds.most_common(3))
    return modules or (_gib(total) if total else "")


# --- Where the memory goes ------------------------------------------------------------------------------------------


def _bars(plan: Mapping[str, Any]) -> tuple[Bar, ...]:
    """Return one bar for each way that the memory of a socket goes, so that equal sockets share one."""
    groups: dict[tuple[Segment, ...], list[Mapping[str, Any]]] = {}
    for row in plan.get("memory") or []:
        reserve = row["reserve_bytes"]
        # Struct pages come first in the reserve, as the plan computes it.
        struct = min(reserve, row.get("struct_pages_bytes", row["bytes"] // STRUCT_PAGE_SHARE))
        parts = (
            ("weights", "weights", row["weights_bytes"]),
            ("kv", "KV cache", row["kv_bytes"]),
            ("compute", "compute", row["compute_bytes"]),
            ("struct", "struct pages", struct),
            ("system", "system", reserve - struct),
            ("free", "free", max(0, row["left_bytes"])),
        )
        total = sum(size for _kind, _name, size in parts) or 1
        segments = tuple(Segment(kind, name, 100 * size / total, _gib(size)) for kind, name, size in parts)
        groups.setdefault(segments, []).append(row)
    return tuple(
        Bar(f"{_sockets_named(row['socket'] for row in rows)}: {_gib(rows[0]['bytes'])}", segments)
        for segments, rows in groups.items()
    )


def _sockets_named(sockets: Iterable[int]) -> str:
    """Return "socket 0", or "sockets 0 and 1, each"."""
    numbers = [str(socket) for socket in sockets]
    return f"socket {numbers[0]}" if len(numbers) == 1 else f"sockets {' and '.join(numbers)}, each"


# --- The rooflines --------------------------------------------------------------------------------------------------


def _points(row: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    points = (
        (int(point["depth"]), point["tokens_per_second"])
        for point in row.get("tokens") or []
        if isinstance(point.get("tokens_per_second"), (int, float))
    )
    return tuple(sorted((depth, float(rate)) for depth, rate in points))


def _roofs(judgement: Mapping[str, Any], socket: int) -> tuple[Roof, ...]:
    rows = [(row, "hypothesis" if row.get("hypothesis") else "roof") for row in judgement.get("roofs") or []]
    rows += [(row, "measured") for row in judgement.get("measured") or []]
    return tuple(
        Roof(str(row.get("name") or "measured read rate"), row.get("gbs"), kind, _points(row), colour % len(_ROOFS))
        for colour, (row, kind) in enumerate((row, kind) for row, kind in rows if row["socket"] == socket)
    )


def _rooflines(record: Mapping[str, Any], anchor: str) -> tuple[Roofline, ...]:
    """Return one picture for each set of equal roofs, so that equal sockets share one."""
    facts = _fleet.facts_of(record)
    judgement, plan = facts.get("cpullm_judgement") or {}, facts.get("cpullm_plan") or {}
    rates = {row.instance: row.tokens_per_s for row in _fleet.instances(record)}
    groups: dict[tuple[Roof, ...], list[tuple[int, float | None, tuple[Decoded, ...]]]] = {}
    for row in plan.get("instances") or []:
        roofs, measurement = _roofs(judgement, row["socket"]), _running(record, row["instance"])
        points = _decoded(measurement) if measurement else ()
        if measurement:
            roofs = _with_read_rate(roofs, measurement, plan)
        if any(roof.points for roof in roofs):
            groups.setdefault(roofs, []).append((int(row["socket"]), rates.get(row["instance"]), points))
    lines = []
    for number, (roofs, members) in enumerate(groups.items()):
        title = f"Decode speed of {_sockets_named(socket for socket, *_rest in members)}, over context depth"
        measured = tuple(rate for _socket, rate, _points in members if rate is not None)
        benchmarks = tuple(points for _socket, _rate, points in members if points)
        svg = draw(tuple((roof.points, roof.kind, roof.colour) for roof in roofs), measured, benchmarks)
        lines.append(
            Roofline(
                title=title,
                depths=tuple(sorted({depth for roof in roofs for depth, _rate in roof.points})),
                roofs=roofs,
                measured=measured,
                benchmarks=benchmarks,
                svg=Markup(svg.replace("ID-", f"{anchor}-r{number}-").replace("TITLE", title)),  # noqa: S704 # ours
            )
        )
    return tuple(lines)


def _running(record: Mapping[str, Any], instance: int) -> Mapping[str, Any] | None:
    """Return what the latest benchmark measured of an instance as it ran under this very plan, or None."""
    kept = record.get("__benchmark") or {}
    plan = _fleet.facts_of(record).get("cpullm_plan") or {}
    if not kept.get("plan") or kept["plan"] != plan.get("hash"):
        return None
    for row in kept["measurements"]:
        if row["instance"] == instance and not row["arguments"] and not row["environment"] and row["as_unit"]:
            return row  # type: ignore[no-any-return] # JSON
    return None


def _decoded(measurement: Mapping[str, Any]) -> tuple[Decoded, ...]:
    """Return the points of a measurement's decode, in order of depth."""
    found = []
    for figure, values in _benchmark.figures(measurement).items():
        depth = _benchmark.depth_of(figure)
        if depth is not None:
            found.append((depth, values.median, values.least, values.most))
    return tuple(sorted(found))


def _with_read_rate(
    roofs: tuple[Roof, ...], measurement: Mapping[str, Any], plan: Mapping[str, Any]
) -> tuple[Roof, ...]:
    """Return roofs with that of the read rate which the benchmark measured, where no fact has one."""
    read = _benchmark.figures(measurement).get("read")
    if read is None or any(roof.kind == "measured" for roof in roofs):
        return roofs
    points = _points({"tokens": tokens_under(read.median, plan)})
    return (*roofs, Roof("measured read rate", read.median, "measured", points, len(roofs) % len(_ROOFS)))


def depth_text(depth: int) -> str:
    """Return a depth in tokens, short."""
    return f"{depth // 1024}K" if depth >= 1024 and depth % 1024 == 0 else str(depth)


@functools.lru_cache(maxsize=256)
def draw(
    roofs: tuple[tuple[tuple[tuple[int, float], ...], str, int], ...],
    measured: tuple[float, ...],
    benchmarks: tuple[tuple[Decoded, ...], ...] = (),
) -> str:
    """Return a roofline as inline SVG, its ids beginning with ``ID-`` and its title being ``TITLE``.

    ``roofs`` are (points, kind, colour), ``measured`` are tokens/s of short completions, at a depth near 0, and
    ``benchmarks`` the points of each instance that was measured. Numbers alone go into the picture: what a roof is
    called stands beside it.
    """
    # Slow to load, and needed by nothing else on a controller.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    depths = sorted({depth for points, _kind, _colour in roofs for depth, _rate in points} | {0})
    decoded = [point for points in benchmarks for point in points]
    # Attention alone allows hundreds of tokens/s of a short context: its roof enters where it comes near the others.
    drawn = [point for points, _kind, _colour in roofs for point in points]
    empty = [rate for depth, rate in drawn if depth == 0]
    highest = max([*(empty or [rate for _depth, rate in drawn]), *measured, *(point[3] for point in decoded)])
    top = highest * 1.12 or 1
    plain = mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "cpullm",
            "font.size": 11,
            "text.color": _INK,
            "text.parse_math": False,
        }
    )
    with plain, io.StringIO() as out:
        # 72 units to the inch: what is given in points below is in units of the picture.
        figure = Figure(figsize=(440 / 72, 230 / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for points, kind, colour in roofs:
            axes.plot(
                [depth for depth, _rate in points],
                [rate for _depth, rate in points],
                color=_ROOFS[colour],
                linestyle={"hypothesis": (0, (5, 3)), "measured": (0, (1.5, 2))}.get(kind, "solid"),
                linewidth=2,
                marker="o",
                markersize=4.5,
                clip_on=any(rate > top for _depth, rate in points),
            )
        axes.plot([0] * len(measured), list(measured), "D", color=_GOOD, markersize=8, clip_on=False, gid="ID-measured")
        for number, row in enumerate(benchmarks):
            places = [point[0] for point in row]
            # From the least to the most of the runs, and the median on it.
            axes.vlines(places, [point[2] for point in row], [point[3] for point in row], color=_GOOD)
            medians = [point[1] for point in row]
            axes.plot(places, medians, "s-", color=_GOOD, linewidth=1.2, markersize=5, gid=f"ID-benchmark-{number}")
        axes.set_xlim(0, max([depths[-1], 1, *(point[0] for point in decoded)]))
        axes.set_ylim(0, top)
        axes.set_xticks(depths, [depth_text(depth) for depth in depths])
        axes.set_xlabel("tokens of context", color=_MUTED)
        axes.set_ylabel("tokens/s", color=_MUTED)
        axes.locator_params(axis="y", nbins=5)
        axes.tick_params(colors=_LINE, labelcolor=_MUTED, length=3)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(color=_LINE, visible=side in ("left", "bottom"))
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _inline(out.getvalue())


def _inline(document: str) -> str:
    """Return a figure of matplotlib as an element of a page: own ids, the page's colours and fonts, a title."""
    root = ElementTree.fromstring(document)  # noqa: S314 # our own figure, no foreign text in it
    for parent in list(root.iter()):
        for child in list(parent):
            # The style sheet would rule the whole page; the metadata say nothing.
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = dict(_attribute(key, value) for key, value in element.attrib.items())
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img", "aria-label": "TITLE"}
    title = ElementTree.Element("title")
    title.text = "TITLE"
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str) -> tuple[str, str]:
    """Return an attribute with its references renamed, its fonts left to the page, its colours to the style sheet."""
    if key == "id":
        return key, value if value.startswith("ID-") else f"ID-{value}"
    if key == _XLINK:
        return "href", value.replace("#", "#ID-")
    value = value.replace("url(#", "url(#ID-")
    if key == "style":
        value = re.sub(r"font: [^;]*;\s*", "", value)
        for colour, name in _COLOURS.items():
            value = value.replace(colour, name)
    return key, value


# --- The benchmark --------------------------------------------------------------------------------------------------


def benchmark_of(record: Mapping[str, Any]) -> Benchmark | None:
    """Return a host's latest benchmark in words, or None."""
    kept = record.get("__benchmark")
    if not kept:
        return None
    rows, notes = [], []
    for measurement in kept["measurements"]:
        where = f"instance {measurement['instance']}, {measurement['name']}"
        reached = {row["figure"]: row["median"] for row in measurement["shares"]}
        runs = Counter(str(run["figure"]) for run in measurement["runs"])
        good = Counter(str(run["figure"]) for run in measurement["runs"] if not run["reasons"])
        rows += [
            Figure(
                where,
                figure,
                _short(values.median),
                f"{_short(values.least)} to {_short(values.most)}" if values.count > 1 else "",
                _benchmark.unit_of(figure),
                f"{good[figure]} of {runs[figure]}",
                f"{reached[figure]:.0%}" if figure in reached else "",
            )
            for figure, values in _benchmark.figures(measurement).items()
        ]
        notes += [f"{where}: {row['figure']} was left out: {row['reason']}" for row in measurement["omitted"]]
        for figure in runs:
            if not good[figure]:
                why = next("; ".join(run["reasons"]) for run in measurement["runs"] if run["figure"] == figure)
                notes.append(f"{where}: no run of {figure} counts: {why}")
    ratios = [
        Figure(
            f"instance {row['instance']}",
            str(row["figure"]),
            f"{row['ratio']['median']:.3f}",
            f"{row['ratio']['least']:.3f} to {row['ratio']['most']:.3f}",
            "",
            str(row["ratio"]["count"]),
            "",
        )
        for row in kept["ratios"]
    ]
    names = {(str(row["second_name"]), str(row["first_name"])) for row in kept["ratios"]}
    plan = _fleet.facts_of(record).get("cpullm_plan") or {}
    return Benchmark(
        date=str(kept["date"]),
        builds=_alike(str(row["build"]) for row in kept["measurements"]),
        planned=bool(kept["plan"]) and kept["plan"] == plan.get("hash"),
        figures=tuple(rows),
        compared=" over ".join(names.pop()) if len(names) == 1 else "",
        ratios=tuple(ratios),
        notes=tuple(notes),
    )


def _short(value: float) -> str:
    """Return a number with four digits that count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


# --- The page -------------------------------------------------------------------------------------------------------


def _speeds(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what the sure roofs allow at depth 0, what hypotheses allow where that is less, and what was measured."""
    facts = _fleet.facts_of(record)
    judgement = facts.get("cpullm_judgement") or {}
    sure, doubtful = [], []
    for row in (facts.get("cpullm_plan") or {}).get("instances") or []:
        roofs = [roof for roof in _roofs(judgement, row["socket"]) if roof.points and roof.kind != "measured"]
        known = [roof.points[0][1] for roof in roofs if roof.kind == "roof"]
        sure.append(f"{min(known):.1f}" if known else NOTHING)
        lower = [roof.points[0][1] for roof in roofs if roof.kind == "hypothesis"]
        doubtful.append(f"{min(lower):.1f}" if lower and min(lower) < min([*known, math.inf]) else NOTHING)
    measured = [NOTHING if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}" for row in _fleet.instances(record)]
    doubt = _alike(doubtful or [NOTHING])
    return _alike(sure or [NOTHING]), "" if set(doubt) <= set(f"{NOTHING}/ ") else doubt, _alike(measured or [NOTHING])


def _pages(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return pages planned, and found: held by the servers, or else in the pools of the nodes."""
    facts = _fleet.facts_of(record)
    plan = facts.get("cpullm_plan")
    if not plan:
        return NOTHING, NOTHING
    held = [row.pages_found for row in _fleet.instances(record)]
    pools = (facts.get("cpullm_grub_hugepages") or {}).get("pools")
    if held and None not in held:
        found = str(sum(count for count in held if count is not None))
    else:
        found = str(sum(row["found"] for row in pools)) if pools else NOTHING
    return str(plan["pages"]["total"]), found


def _host(record: Mapping[str, Any], anchor: str) -> Host:
    """Return the view of one host; raises KeyError, TypeError and the like for facts of a shape that none has."""
    facts = _fleet.facts_of(record)
    plan, numa, dimm = (facts.get(f"cpullm_{name}") or {} for name in ("plan", "numa", "dimm"))
    state = _fleet.state(record)
    planned, found = _pages(record)
    expected, hypothesis, measured = _speeds(record)
    cpu = str((numa.get("cpu") or {}).get("model") or "").removesuffix(" Processor")
    sockets = len(numa.get("sockets") or [])
    return Host(
        anchor=anchor,
        name=str(record.get("inventory_hostname", "?")),
        state=state,
        tone=_TONES.get(state, "unknown"),
        machine=f"{sockets} x {cpu or 'unknown processor'}" if sockets else "",
        memory=_memory(record),
        model=str(plan["model"]["name"]) if plan else "",
        setting=f"{plan['context']:,} tokens of context, {plan['slots']} slot(s)" if plan else "",
        build=str((facts.get("cpullm_build") or {}).get("id") or ""),
        pages_planned=planned,
        pages_found=found,
        expected=expected,
        hypothesis=hypothesis,
        measured=measured,
        findings=tuple(findings_of(record)),
        sockets=_sockets(record),
        no_slots="" if dimm.get("slots") else str(dimm.get("reason") or "not read"),
        bars=_bars(plan),
        rooflines=_rooflines(record, anchor),
        benchmark=benchmark_of(record),
        reasons=tuple((str(row["output"]), str(row["value"]), str(row["reason"])) for row in plan.get("reasons", [])),
        plan=str(plan.get("hash", ""))[:12],
    )


def hosts(records: Sequence[Mapping[str, Any]]) -> list[Host]:
    """Return the views of hosts.

    A record has the host's ``inventory_hostname``, its ``ansible_facts``, what the roles registered (see _fleet), and
    ``ended_early``, whether the run ended for it. All of that may be absent.
    """
    views = []
    for number, raw in enumerate(records, 1):
        record, anchor = clean(raw), f"host-{number}"
        try:
            views.append(_host(record, anchor))
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # One host's facts must not cost the others their report.
            odd = {"failed": True, "msg": f"its facts are of no known shape: {error!r:.200}"}
            name = record.get("inventory_hostname", "?")
            views.append(_host({"inventory_hostname": name, "__host_plan_read": odd}, anchor))
    return views


def signature(views: Sequence[Host]) -> str:
    """Return the sha256 of what the page says of the hosts, but for what differs from one look to the next.

    Those are the time, everything measured, and the words of a finding, in which measured numbers stand.
    """
    content = [
        [
            (view.name, view.state, view.machine, view.memory, view.model, view.setting, view.build, view.plan),
            (view.pages_planned, view.pages_found, view.expected, view.hypothesis),
            [(row.severity, row.name, row.expected) for row in view.findings],
            [
                (slot.locator, slot.mark, slot.size, slot.speed)
                for socket in view.sockets
                for channel in socket.channels
                for slot in channel.slots
            ],
        ]
        for view in views
    ]
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def signature_of(page: str) -> str | None:
    """Return the signature that a page carries, or None."""
    match = _SIGNATURE.search(page)
    return match[1] if match else None


def render(views: Sequence[Host], written: str) -> str:
    """Return the page; ``written`` is the time, in words."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["depth"] = depth_text
    environment.filters["medians"] = lambda points: {point[0]: point[1] for point in points}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        hosts=views,
        states=Counter((view.state, view.tone) for view in views).most_common(),
        models=sorted({view.model for view in views if view.model}),
        written=written,
        signature=signature(views),
    )
