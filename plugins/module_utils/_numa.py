# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sockets, NUMA nodes, L3 domains and memory of a Linux host on x86-64, from /sys and /proc.

Formats: Documentation/ABI/stable/sysfs-devices-node, Documentation/admin-guide/cputopology.rst and
Documentation/ABI/testing/sysfs-devices-system-cpu of the kernel; /proc/zoneinfo as mm/vmstat.c prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import (
    numbered,
    plain,
    read_number,
    read_optional,
    read_text,
)

CPU = "/sys/devices/system/cpu"
NODE = "/sys/devices/system/node"
ZONEINFO = "/proc/zoneinfo"
MEMINFO = f"{NODE}/node*/meminfo"

PAGE_BYTES = 4096
GIB = 1 << 30

# Linux on x86-64 takes at most 8192 CPUs; a list beyond this bound is no CPU list.
MAX_CPU = 65535

# The first processor's block is some 2 KiB. The file as a whole makes older kernels ask each core for its clock.
CPUINFO_BYTES = 16384


@dataclass(frozen=True)
class Cpu:
    """The processor as the kernel names it, and how many of it are online."""

    vendor: str | None
    model: str | None
    family: int | None
    model_number: int | None
    stepping: int | None
    flags: tuple[str, ...]
    online: str
    offline: str
    logical: int
    physical_cores: int
    smt: bool
    smt_control: str | None


@dataclass(frozen=True)
class Distance:
    """The relative distance to a node; 10 is the node itself."""

    node: int
    distance: int


@dataclass(frozen=True)
class Socket:
    """A processor package."""

    socket: int
    nodes: tuple[int, ...]
    cpus: str
    primary_cpus: str
    physical_cores: int
    threads: int


@dataclass(frozen=True)
class Node:
    """A NUMA node; `socket` is None for a node without CPUs or with CPUs of several sockets."""

    node: int
    socket: int | None
    cpus: str
    primary_cpus: str
    physical_cores: int
    threads: int
    memory_bytes: int | None
    gib_ranges: int | None
    distances: tuple[Distance, ...]


@dataclass(frozen=True)
class L3:
    """CPUs that share a level 3 cache: a CCD, or a half of one, on EPYC."""

    id: int | None
    socket: int | None
    node: int | None
    cpus: str
    primary_cpus: str
    physical_cores: int
    bytes: int | None


@dataclass(frozen=True)
class Kernel:
    """The running kernel."""

    release: str | None
    cmdline: str | None


@dataclass(frozen=True)
class Topology:
    """Everything read."""

    cpu: Cpu
    sockets: tuple[Socket, ...]
    nodes: tuple[Node, ...]
    l3: tuple[L3, ...]
    memory_bytes: int | None
    memory_source: str | None
    kernel: Kernel


@dataclass(frozen=True)
class Zones:
    """Memory of a node by /proc/zoneinfo: bytes present, and the span of physical addresses [start, end)."""

    present: int
    start: int
    end: int


# --- Formats ------------------------------------------------------------------------------------------------------


def _shown(text: str) -> str:
    """Return a text as an error may quote it: one line of at most 60 printable characters."""
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def parse_cpulist(text: str) -> tuple[int, ...]:
    """Return the numbers of a kernel list such as "0-3,8", ascending and once each; raises ValueError."""
    numbers: set[int] = set()
    text = text.strip()
    if not text:
        return ()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        if not match:
            raise ValueError(f"{_shown(part)} in the list {_shown(text)}: a number or a range such as 0-3 expected")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > MAX_CPU:
            raise ValueError(f"{_shown(part)} in the list {_shown(text)}: ascending and at most {MAX_CPU} expected")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def format_cpulist(numbers: Iterable[int]) -> str:
    """Return the numbers as a kernel list: ranges joined by commas, "" for none."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def parse_size(text: str) -> int:
    """Return the bytes that a cache's size file gives, such as "32768K"; raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", text.strip())
    if not match:
        raise ValueError(f"cache size {_shown(text.strip())}: a number with K, M or G expected")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def parse_zoneinfo(text: str) -> dict[int, Zones]:
    """Return the memory of each node that /proc/zoneinfo names, without device memory; raises ValueError.

    `present` is what firmware gave the kernel as RAM. Unlike MemTotal (`managed`), neither a reservation of huge
    pages, nor hugetlb_free_vmemmap, nor the kernel's own size changes it.
    """
    found: dict[int, Zones] = {}
    # Most of the file is page sets, one per CPU, which no pattern needs to look at.
    for section in ("\n" + text).split("\nNode ")[1:]:
        header = re.match(r" *([0-9]{1,6}), zone +(\w+)", section)
        if not header:
            raise ValueError(f"{ZONEINFO} holds {_shown('Node ' + section)}, a node and a zone expected")
        node = int(header[1])
        before = found.setdefault(node, Zones(0, 0, 0))
        counts = dict(
            re.findall(r"^ +(spanned|present) +([0-9]{1,15})$", section.split("pagesets", 1)[0], re.MULTILINE)
        )
        first = re.search(r" start_pfn: +([0-9]{1,15})", section[max(section.rfind("start_pfn:") - 1, 0) :])
        spanned = int(counts.get("spanned", 0))
        if header[2] == "Device" or not spanned or not first:
            continue
        start = int(first[1]) * PAGE_BYTES
        end = start + spanned * PAGE_BYTES
        found[node] = Zones(
            before.present + int(counts.get("present", 0)) * PAGE_BYTES,
            min(before.start, start) if before.end else start,
            max(before.end, end),
        )
    if not found:
        raise ValueError(f"{ZONEINFO} names no node")
    return found


def parse_system_ram(text: str) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges [start, end) of "System RAM" in /proc/iomem, or None where the kernel hides addresses."""
    ranges: list[tuple[int, int]] = []
    for match in re.finditer(r"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) : System RAM", text, re.MULTILINE):
        start, end = int(match[1], 16), int(match[2], 16) + 1
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    if not ranges or all(end == 1 for _start, end in ranges):
        return None
    return tuple(ranges)


def whole_gib(ranges: Iterable[tuple[int, int]], start: int, end: int) -> int:
    """Return how many whole GiB, aligned to a GiB, of the ranges lie in [start, end)."""
    return sum(
        max(0, min(high, end) // GIB - -(-max(low, start) // GIB)) for low, high in ranges if low < end and high > start
    )


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields[name.strip()] = value.strip()
    return fields


# --- Reading ------------------------------------------------------------------------------------------------------


def read(root: str = "/") -> Topology:
    """Return the topology of the host below `root`; raises OSError or ValueError naming the file."""
    online = _list(root, f"{CPU}/online")
    cores = _groups(root, online, ("core_cpus_list", "thread_siblings_list"))
    packages = _groups(root, online, ("package_cpus_list", "core_siblings_list"))
    socket_of: dict[int, int] = {}
    for package in packages:
        number = read_number(root, f"{CPU}/cpu{package[0]}/topology/physical_package_id")
        if number is None:
            raise ValueError(f"{CPU}/cpu{package[0]}/topology/physical_package_id cannot be read")
        for cpu in package:
            socket_of[cpu] = number
    primaries = {core[0] for core in cores}

    zoneinfo = read_optional(root, ZONEINFO)
    zones = parse_zoneinfo(zoneinfo) if zoneinfo else None
    nodes = _nodes(root, online, primaries, socket_of, zones)
    node_of = {cpu: node.node for node in nodes for cpu in parse_cpulist(node.cpus)}
    memories = [node.memory_bytes for node in nodes]
    return Topology(
        cpu=_cpu(root, online, cores),
        sockets=tuple(
            Socket(
                socket=socket,
                nodes=tuple(sorted({node_of[cpu] for cpu in cpus if cpu in node_of})),
                cpus=format_cpulist(cpus),
                primary_cpus=format_cpulist(primaries.intersection(cpus)),
                physical_cores=len(primaries.intersection(cpus)),
                threads=len(cpus),
            )
            for socket, cpus in sorted(_inverted(socket_of).items())
        ),
        nodes=nodes,
        l3=_l3(root, online, primaries, socket_of, node_of),
        memory_bytes=None if None in memories or not memories else sum(memory or 0 for memory in memories),
        memory_source=None if None in memories or not memories else MEMINFO if zones is None else ZONEINFO,
        kernel=Kernel(
            release=_stripped(read_optional(root, "/proc/sys/kernel/osrelease")),
            cmdline=_stripped(read_optional(root, "/proc/cmdline")),
        ),
    )


def gather(root: str = "/") -> dict[str, Any]:
    """Return the fact `cpullm_numa`: the topology, or why it could not be read."""
    try:
        found: dict[str, Any] = plain(read(root))
    except (OSError, ValueError) as error:
        return {
            "readable": False,
            "reason": str(error),
            "cpu": None,
            "sockets": [],
            "nodes": [],
            "l3": [],
            "memory_bytes": None,
            "memory_source": None,
            "kernel": None,
        }
    return {"readable": True, "reason": None, **found}


def _cpu(root: str, online: tuple[int, ...], cores: list[tuple[int, ...]]) -> Cpu:
    fields = parse_cpuinfo(read_text(root, "/proc/cpuinfo", CPUINFO_BYTES))
    present = read_optional(root, f"{CPU}/present")
    return Cpu(
        vendor=fields.get("vendor_id"),
        model=fields.get("model name"),
        family=_integer(fields.get("cpu family")),
        model_number=_integer(fields.get("model")),
        stepping=_integer(fields.get("stepping")),
        flags=tuple(sorted(set(fields.get("flags", "").split()))),
        online=format_cpulist(online),
        offline=format_cpulist(set(parse_cpulist(present or "")).difference(online)),
        logical=len(online),
        physical_cores=len(cores),
        smt=any(len(core) > 1 for core in cores),
        smt_control=_stripped(read_optional(root, f"{CPU}/smt/control")),
    )


def _nodes(
    root: str,
    online: tuple[int, ...],
    primaries: set[int],
    socket_of: dict[int, int],
    zones: dict[int, Zones] | None,
) -> tuple[Node, ...]:
    numbers = numbered(root, NODE, "node")
    iomem = read_optional(root, "/proc/iomem")
    ram = parse_system_ram(iomem) if iomem else None
    cpus_of = {number: set(_list(root, f"{NODE}/node{number}/cpulist")).intersection(online) for number in numbers}
    distances_of = {number: _distances(root, number, numbers) for number in numbers}
    if not numbers and zones:
        # A kernel without NUMA has no node directory, and one node in /proc/zoneinfo.
        numbers = sorted(zones)[:1]
        cpus_of, distances_of = {numbers[0]: set(online)}, {numbers[0]: ()}
    found: list[Node] = []
    for number in numbers:
        cpus = cpus_of[number]
        sockets = {socket_of[cpu] for cpu in cpus}
        span = zones.get(number, Zones(0, 0, 0)) if zones is not None else None
        found.append(
            Node(
                node=number,
                socket=min(sockets) if len(sockets) == 1 else None,
                cpus=format_cpulist(cpus),
                primary_cpus=format_cpulist(primaries.intersection(cpus)),
                physical_cores=len(primaries.intersection(cpus)),
                threads=len(cpus),
                memory_bytes=_meminfo_total(root, number) if span is None else span.present,
                gib_ranges=None if ram is None or span is None else _gib_ranges(ram, number, zones or {}),
                distances=distances_of[number],
            )
        )
    return tuple(found)


def _gib_ranges(ram: tuple[tuple[int, int], ...], number: int, zones: dict[int, Zones]) -> int | None:
    """Return the whole GiB of a node, or None where another node's addresses lie between its own."""
    span = zones.get(number, Zones(0, 0, 0))
    for other, them in zones.items():
        if other != number and them.start < span.end and span.start < them.end:
            return None
    return whole_gib(ram, span.start, span.end)


def _l3(
    root: str,
    online: tuple[int, ...],
    primaries: set[int],
    socket_of: dict[int, int],
    node_of: dict[int, int],
) -> tuple[L3, ...]:
    found: list[L3] = []
    seen: set[int] = set()
    for cpu in online:
        if cpu in seen:
            continue
        seen.add(cpu)
        index = _l3_index(root, cpu)
        if index is None:
            continue
        cpus = set(_list(root, f"{index}/shared_cpu_list")).intersection(online) | {cpu}
        seen |= cpus
        size = read_optional(root, f"{index}/size")
        sockets = {socket_of[one] for one in cpus}
        nodes = {node_of[one] for one in cpus if one in node_of}
        found.append(
            L3(
                id=read_number(root, f"{index}/id"),
                socket=min(sockets) if len(sockets) == 1 else None,
                node=min(nodes) if len(nodes) == 1 else None,
                cpus=format_cpulist(cpus),
                primary_cpus=format_cpulist(primaries.intersection(cpus)),
                physical_cores=len(primaries.intersection(cpus)),
                bytes=None if size is None else parse_size(size),
            )
        )
    return tuple(found)


def _l3_index(root: str, cpu: int) -> str | None:
    """Return the directory of a CPU's level 3 cache; index3 on the processors known, looked for on others."""
    base = f"{CPU}/cpu{cpu}/cache"
    if read_optional(root, f"{base}/index3/level") == "3\n":
        return f"{base}/index3"
    for number in numbered(root, base, "index"):
        if _stripped(read_optional(root, f"{base}/index{number}/level")) == "3":
            return f"{base}/index{number}"
    return None


def _groups(root: str, online: tuple[int, ...], names: tuple[str, str]) -> list[tuple[int, ...]]:
    """Return the online CPUs grouped by a topology list, one read per group; the second name is the older kernels'."""
    groups: list[tuple[int, ...]] = []
    seen: set[int] = set()
    for cpu in online:
        if cpu in seen:
            continue
        base = f"{CPU}/cpu{cpu}/topology"
        text = read_optional(root, f"{base}/{names[0]}")
        if text is None:
            text = read_text(root, f"{base}/{names[1]}")
        members = tuple(sorted(set(parse_cpulist(text)).intersection(online).difference(seen) | {cpu}))
        seen.update(members)
        groups.append(members)
    return groups


def _distances(root: str, number: int, numbers: list[int]) -> tuple[Distance, ...]:
    """Return the distances of a node; the kernel prints one per online node, ascending, holes left out."""
    text = read_optional(root, f"{NODE}/node{number}/distance")
    if text is None:
        return ()
    values = text.split()
    if len(values) != len(numbers) or not all(re.fullmatch(r"[0-9]{1,5}", value) for value in values):
        raise ValueError(
            f"{NODE}/node{number}/distance holds {_shown(text.strip())}, {len(numbers)} numbers expected, "
            f"one for each of the nodes {format_cpulist(numbers)}"
        )
    return tuple(Distance(node, int(value)) for node, value in zip(numbers, values))


def _meminfo_total(root: str, number: int) -> int | None:
    match = re.search(r"MemTotal: +([0-9]{1,15}) kB", read_optional(root, f"{NODE}/node{number}/meminfo") or "")
    return int(match[1]) * 1024 if match else None


def _list(root: str, path: str) -> tuple[int, ...]:
    try:
        return parse_cpulist(read_text(root, path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _inverted(mapping: dict[int, int]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for key, value in mapping.items():
        groups.setdefault(value, []).append(key)
    return groups


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else None


def _stripped(text: str | None) -> str | None:
    return None if text is None else text.strip()
