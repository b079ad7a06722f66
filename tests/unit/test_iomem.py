# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How many pages the memory of a node can hold, compared with what kernels of the lab really reserved."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _iomem
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.tree_builder import write

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
GIB = 1 << 30
RELEASE = "6.1.0-40-amd64"


@pytest.mark.parametrize(
    ("name", "rooms", "reserved"),
    [
        # Asked for hugepages=0:1,1:1, the kernel gave 0 and 2 by falling back; 48 MiB of descriptions lie at each end.
        pytest.param("lab-vm-bookworm-reserved", {0: (1, 0), 1: (3, 2)}, {0: 0, 1: 2}, id="ends-count"),
        # Asked for 0:3,1:3. The kernel itself sat at 8.7 GiB, which no look at an earlier boot can tell.
        pytest.param("lab-vm-bookworm-pages", {0: (3, 3), 1: (3, 3)}, {0: 3, 1: 2}, id="less-the-kernel-itself"),
        pytest.param("cloud-2-cpus-24-gib", {0: (23, 22)}, {0: 3}, id="one-node"),
    ],
)
def test_captured_hosts(name: str, rooms: dict[int, tuple[int, int]], reserved: dict[int, int]) -> None:
    root = FIXTURES / name
    memory = _iomem.read(str(root), RELEASE)
    assert {room.node: (room.whole_gib, room.reservable) for room in memory.rooms} == rooms
    for room in memory.rooms:
        pool = f"sys/devices/system/node/node{room.node}/hugepages/hugepages-1048576kB/nr_hugepages"
        assert int((root / pool).read_text()) == reserved[room.node] <= rooms[room.node][1]


@pytest.mark.parametrize(
    ("gib", "given"),
    [pytest.param(4, 1, id="4-GiB"), pytest.param(8, 5, id="8-GiB"), pytest.param(16, 13, id="16-GiB")],
)
def test_what_kernels_gave_that_were_asked_for_too_many(gib: int, given: int) -> None:
    """The measured figures: more pages than fit asked at boot, on one node with 2 GiB below 4 GiB."""
    ranges = ((0x100000, (2 << 30) - 0x24000), (4 << 30, (gib + 2) << 30))
    assert _iomem.reservable(ranges, RELEASE) == given


def test_newer_kernels_take_pages_first() -> None:
    ranges = ((4 << 30, 8 << 30),)
    assert (_iomem.reservable(ranges, "6.14.9"), _iomem.reservable(ranges, "6.15.0")) == (3, 4)


@pytest.mark.parametrize(
    ("count", "left"),
    [
        pytest.param(0, ((0, 10), (20, 30)), id="nothing"),
        pytest.param(4, ((0, 10), (20, 26)), id="of-the-last"),
        pytest.param(10, ((0, 10),), id="the-last"),
        pytest.param(15, ((0, 5),), id="more-than-the-last"),
        pytest.param(50, (), id="more-than-all"),
    ],
)
def test_without_top(count: int, left: tuple[tuple[int, int], ...]) -> None:
    assert _iomem.without_top(((0, 10), (20, 30)), count) == left


@given(st.lists(st.integers(0, 1 << 12), max_size=12, unique=True), st.integers(0, 1 << 13))
def test_taking_from_the_top_takes_so_much(edges: list[int], count: int) -> None:
    edges = sorted(edges)[: len(edges) // 2 * 2]
    ranges = tuple(zip(edges[::2], edges[1::2]))
    left = _iomem.without_top(ranges, count)
    assert _iomem.size(left) == max(0, _iomem.size(ranges) - count)
    assert _iomem.within(left, ranges) == left


def host(root: Path, iomem: str, zones: dict[int, tuple[int, int]]) -> Path:
    """Write a host with these zones (GiB from, GiB to) of its nodes."""
    write(root, "proc/iomem", iomem)
    text = ""
    for node, (low, high) in zones.items():
        pages = (high - low) << 18
        text += f"Node {node}, zone   Normal\n        spanned  {pages}\n        present  {pages}\n"
        text += f"  start_pfn: {low << 18}\n"
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    write(root, "proc/zoneinfo", text)
    return root


def test_memory_blocks_tell_nodes_apart_that_lie_between_each_other(tmp_path: Path) -> None:
    ram = "100000000-3ffffffff : System RAM\n"
    root = host(tmp_path, ram, {0: (4, 16), 1: (6, 12)})
    assert [room.reservable for room in _iomem.read(str(root), RELEASE).rooms] == [None, None]
    write(root, "sys/devices/system/memory/block_size_bytes", "80000000\n")
    for node, blocks in ((0, (2, 6, 7)), (1, (3, 4, 5))):
        for block in blocks:
            (root / f"sys/devices/system/node/node{node}/memory{block}").mkdir()
    rooms = _iomem.read(str(root), RELEASE).rooms
    assert [(room.whole_gib, room.reservable) for room in rooms] == [(6, 5), (6, 5)]


@pytest.mark.parametrize(
    ("size_kib", "pages", "reserve", "flags", "messages"),
    [
        pytest.param(1048576, ((0, 3), (1, 3)), 1 << 30, "pdpe1gb", [], id="fits"),
        pytest.param(
            1048576,
            ((0, 4), (1, 3)),
            1 << 30,
            "pdpe1gb",
            ["node 0: 4 pages of 1 GiB are asked, expected at most 3: /proc/iomem shows 4 whole aligned GiB"],
            id="the-kernel-s-descriptions",
        ),
        pytest.param(
            1048576, ((0, 5), (1, 3)), 0, "pdpe1gb", ["node 0: 5 pages are 5.0 GiB, and it has 4.0 GiB"], id="a-node"
        ),
        pytest.param(
            1048576, ((0, 3), (7, 3)), 0, "pdpe1gb", ["the host has only the nodes [0, 1]: correct"], id="no-node"
        ),
        pytest.param(
            1048576,
            ((0, 3), (1, 3)),
            3 << 30,
            "pdpe1gb",
            [
                "the pages are 6.0 GiB and the system keeps 3.0 GiB (grub_hugepages_system_reserve_bytes)",
                "but the memory is 8.0 GiB",
            ],
            id="the-reserve",
        ),
        pytest.param(1048576, ((0, 1),), 0, "avx2", ["lack pdpe1gb", "systemd_service_weights: mmap"], id="no-pdpe1gb"),
        pytest.param(2048, ((0, 2000),), 1 << 30, "avx2", [], id="2-MiB-need-no-whole-GiB"),
    ],
)
def test_findings(
    tmp_path: Path, size_kib: int, pages: tuple[tuple[int, int], ...], reserve: int, flags: str, messages: list[str]
) -> None:
    root = host(tmp_path, "100000000-2ffffffff : System RAM\n", {0: (4, 8), 1: (8, 12)})
    found = _iomem.findings(_iomem.read(str(root), RELEASE), {flags}, size_kib, pages, reserve)
    assert len(found) == (1 if messages else 0), found
    assert all(message in found[0] for message in messages), found


def test_hidden_addresses_are_no_reason_to_refuse(tmp_path: Path) -> None:
    root = host(tmp_path, "00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n", {0: (4, 8)})
    memory = _iomem.read(str(root), RELEASE)
    assert memory.whole_gib is None and memory.rooms[0].reservable is None
    assert _iomem.findings(memory, {"pdpe1gb"}, 1048576, ((0, 4),), 0) == []


def test_memory_is_what_firmware_gave_and_not_memtotal(tmp_path: Path) -> None:
    root = host(tmp_path, "", {0: (4, 8)})
    write(root, "proc/meminfo", "MemTotal: 1000 kB\n")
    assert _iomem.read(str(root), RELEASE).memory_bytes == 4 * GIB
