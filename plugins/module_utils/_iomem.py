# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many huge pages the memory of each NUMA node can hold, from the physical addresses that the kernel shows.

Formats: /proc/iomem and /proc/zoneinfo as _numa reads them; Documentation/admin-guide/mm/memory-hotplug.rst for the
memory blocks below /sys/devices/system/node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline, _hugepages, _numa
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import numbered, read_optional

GIB = 1 << 30
GIB_KIB = 1048576
# The kernel keeps 64 bytes for each page of 4 KiB, and takes them from the end of each node's memory.
STRUCT_PAGE_SHARE = 64
# Since this kernel pages of 1 GiB are taken before those 64 bytes are, so the end of a node is theirs to have.
PAGES_FIRST_SINCE = (6, 15)

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Room:
    """The memory of a node: bytes, whole aligned GiB, and how many of these can become pages (None: not known)."""

    node: int
    memory_bytes: int
    whole_gib: int | None
    reservable: int | None


@dataclass(frozen=True)
class Memory:
    """The memory of a host, and of each of its nodes; `whole_gib` is None where the addresses are hidden (not root)."""

    memory_bytes: int
    whole_gib: int | None
    rooms: tuple[Room, ...]


# --- Ranges of addresses ------------------------------------------------------------------------------------------


def size(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the bytes of ranges [start, end)."""
    return sum(end - start for start, end in ranges)


def within(ranges: Iterable[tuple[int, int]], limits: Iterable[tuple[int, int]]) -> Ranges:
    """Return the parts of the ranges that lie in the limits, neighbours joined; both are ascending."""
    bounds = tuple(limits)
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        for low, high in bounds:
            part = (max(start, low), min(end, high))
            if part[0] >= part[1]:
                continue
            if found and found[-1][1] == part[0]:
                part = (found.pop()[0], part[1])
            found.append(part)
    return tuple(found)


def without_top(ranges: Sequence[tuple[int, int]], count: int) -> Ranges:
    """Return ascending ranges less `count` bytes at their upper end."""
    left = list(ranges)
    while left and count > 0:
        start, end = left.pop()
        taken = min(count, end - start)
        count -= taken
        if end - taken > start:
            left.append((start, end - taken))
    return tuple(left)


def whole_gib(ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many whole GiB, aligned to a GiB, lie in the ranges."""
    return sum(max(0, end // GIB - -(-start // GIB)) for start, end in ranges)


def reservable(ranges: Ranges, release: str) -> int:
    """Return how many pages of 1 GiB a node with these ranges can hold, at most.

    Until 6.15 the kernel first describes the memory, in 1/64 of it at the node's end, and takes pages of 1 GiB from
    what is left. The kernel itself is not counted: where address randomisation puts it into a whole GiB, that node has
    one page less, which no look at this boot can tell of the next.
    """
    if _cmdline.parse_release(release) < PAGES_FIRST_SINCE:
        ranges = without_top(ranges, size(ranges) // STRUCT_PAGE_SHARE)
    return whole_gib(ranges)


# --- Reading ------------------------------------------------------------------------------------------------------


def read_blocks(root: str) -> dict[int, Ranges]:
    """Return the address ranges of each node by its memory blocks; {} on a kernel without them."""
    text = (read_optional(root, "/sys/devices/system/memory/block_size_bytes") or "").strip()
    if not re.fullmatch(r"[0-9a-f]{1,12}", text) or int(text, 16) == 0:
        return {}
    block = int(text, 16)
    found: dict[int, Ranges] = {}
    for node in numbered(root, _numa.NODE, "node"):
        numbers = numbered(root, f"{_numa.NODE}/node{node}", "memory")
        found[node] = within(((number * block, (number + 1) * block) for number in numbers), ((0, 1 << 64),))
    return found if any(found.values()) else {}


def read_spans(zones: dict[int, _numa.Zones]) -> dict[int, Ranges]:
    """Return the address span of each node by its zones; {} where one's addresses lie between another's."""
    spans = sorted((zone.start, zone.end, node) for node, zone in zones.items() if zone.end)
    if any(following[0] < span[1] for span, following in zip(spans, spans[1:])):
        return {}
    return {node: ((start, end),) for start, end, node in spans}


def read(root: str, release: str) -> Memory:
    """Return the memory of the host below `root`; raises OSError or ValueError naming the file.

    Bytes are what firmware gave the kernel, which neither a reservation nor its own size changes; MemTotal only where
    the kernel tells no more.
    """
    text = read_optional(root, _numa.ZONEINFO)
    zones = _numa.parse_zoneinfo(text) if text else {}
    ram = _numa.parse_system_ram(read_optional(root, "/proc/iomem") or "")
    places = read_blocks(root) or read_spans(zones)
    rooms = []
    for node in numbered(root, _numa.NODE, "node"):
        count = zones[node].present if node in zones else _meminfo(root, node)
        ranges = within(ram, places[node]) if ram is not None and node in places else None
        if count is not None:
            rooms.append(
                Room(
                    node,
                    count,
                    None if ranges is None else whole_gib(ranges),
                    None if ranges is None else reservable(ranges, release),
                )
            )
    total = sum(zone.present for zone in zones.values())
    if not total:
        total = (_hugepages.parse_meminfo(read_optional(root, "/proc/meminfo") or "", "MemTotal") or 0) * 1024
    return Memory(total, None if ram is None else whole_gib(ram), tuple(rooms))


def _meminfo(root: str, node: int) -> int | None:
    text = read_optional(root, f"{_numa.NODE}/node{node}/meminfo") or ""
    match = re.search(r"MemTotal: +([0-9]{1,15}) kB", text)
    return int(match[1]) * 1024 if match else None


# --- What does not fit --------------------------------------------------------------------------------------------


def findings(
    memory: Memory, cpu_flags: Iterable[str], size_kib: int, pages: Sequence[tuple[int, int]], reserve_bytes: int
) -> list[str]:
    """Return why this memory cannot hold these (node, pages), each with what was found, expected and a way out."""
    found = []
    if size_kib == GIB_KIB and "pdpe1gb" not in cpu_flags:
        found.append(
            "the CPU's flags lack pdpe1gb, so it has no 1 GiB pages: only 2 MiB pages are possible here "
            "(grub_hugepages_size_kib: 2048), or weights without huge pages (systemd_service_weights: mmap)"
        )
    rooms = {room.node: room for room in memory.rooms}
    page = size_kib * 1024
    for node, count in pages:
        room = rooms.get(node)
        if rooms and room is None:
            found.append(
                f"node {node} is asked for {count} pages, and the host has only the nodes {sorted(rooms)}: "
                "correct grub_hugepages_nodes"
            )
        elif room is not None and count * page > room.memory_bytes:
            found.append(
                f"node {node}: {count} pages are {gib(count * page)}, and it has {gib(room.memory_bytes)} of memory: "
                "ask for fewer (grub_hugepages_nodes), or add memory to the node"
            )
        elif room is not None and size_kib == GIB_KIB and room.reservable is not None and count > room.reservable:
            found.append(
                f"node {node}: {count} pages of 1 GiB are asked, expected at most {room.reservable}: /proc/iomem shows "
                f"{room.whole_gib} whole aligned GiB of System RAM there, less what the kernel's page descriptions "
                f"({room.memory_bytes // STRUCT_PAGE_SHARE >> 20} MiB, at the node's end) take of them. Ask for fewer "
                "(grub_hugepages_nodes), or add memory to the node"
            )
    asked = sum(count for _node, count in pages)
    if asked * page + reserve_bytes > memory.memory_bytes:
        found.append(
            f"the pages are {gib(asked * page)} and the system keeps {gib(reserve_bytes)} "
            f"(grub_hugepages_system_reserve_bytes), but the memory is {gib(memory.memory_bytes)}: "
            "fewer pages, a smaller model or more memory"
        )
    known = all(room.reservable is not None for room in memory.rooms) and memory.rooms
    if size_kib == GIB_KIB and not known and memory.whole_gib is not None and asked > memory.whole_gib:
        found.append(
            f"{asked} pages of 1 GiB are asked, and /proc/iomem shows {memory.whole_gib} whole aligned GiB of "
            "System RAM: the boot would end with fewer and say so only in the kernel's log. Ask for fewer "
            "(grub_hugepages_nodes), or add memory"
        )
    return found


def gib(count: int) -> str:
    """Return bytes as text in GiB."""
    return f"{count / GIB:.1f} GiB"
