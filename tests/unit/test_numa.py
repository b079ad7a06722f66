# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The topology reader, on built and captured trees."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tree_builder as trees
from ansible_collections.cpullm.epyc.plugins.module_utils import _numa, _sysfs
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1 << 30
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def gather(machine: trees.Machine, root: Path) -> dict[str, Any]:
    fact = _numa.gather(trees.build(machine, root))
    assert fact["readable"], fact["reason"]
    json.dumps(fact)
    return fact


# --- Formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        pytest.param("", (), id="empty"),
        pytest.param("\n", (), id="empty-line"),
        pytest.param("0\n", (0,), id="one"),
        pytest.param("0-3,8,10-11\n", (0, 1, 2, 3, 8, 10, 11), id="ranges-and-numbers"),
        pytest.param("5,3-4,3", (3, 4, 5), id="out-of-order-and-twice"),
        pytest.param("65535", (65535,), id="largest"),
    ],
)
def test_parse_cpulist(text: str, numbers: tuple[int, ...]) -> None:
    assert _numa.parse_cpulist(text) == numbers


@pytest.mark.parametrize(
    "text", ["x", "1-", "-1", "3-1", "0-3:1/2", "1,,2", "0-99999", "999999", "1 2", "0x3", "\u0663", "0-3,"]
)
def test_parse_cpulist_refused(text: str) -> None:
    with pytest.raises(ValueError, match="in the list"):
        _numa.parse_cpulist(text)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        pytest.param([], "", id="none"),
        pytest.param([7], "7", id="one"),
        pytest.param([3, 1, 2, 9, 8, 5], "1-3,5,8-9", id="ranges"),
        pytest.param([1, 1], "1", id="twice"),
    ],
)
def test_format_cpulist(numbers: list[int], text: str) -> None:
    assert _numa.format_cpulist(numbers) == text


@settings(deadline=None)
@given(st.sets(st.integers(0, 2000)))
def test_cpulist_round_trip(numbers: set[int]) -> None:
    text = _numa.format_cpulist(numbers)
    assert _numa.parse_cpulist(text) == tuple(sorted(numbers))
    assert text == trees.cpulist(sorted(numbers))


@pytest.mark.parametrize("parse", [_numa.parse_cpulist, _numa.parse_size, _numa.parse_zoneinfo])
@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_parsers_raise_nothing_but_value_errors(parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert len(str(error)) < 300


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    _numa.parse_cpuinfo(text)
    _numa.parse_system_ram(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        pytest.param("32768K\n", 32 << 20, id="32-MiB"),
        pytest.param("512M", 512 << 20, id="512-MiB"),
        pytest.param("1024", 1024, id="bytes"),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert _numa.parse_size(text) == size


def test_parse_size_refused() -> None:
    with pytest.raises(ValueError, match="cache size '32 apples'"):
        _numa.parse_size("32 apples")


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        pytest.param("", None, id="empty"),
        pytest.param(
            "00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n", None, id="hidden-without-root"
        ),
        pytest.param(
            "00001000-0009fbff : System RAM\n100000000-17fffffff : System RAM\n  110000000-1100fffff : Kernel code\n",
            ((0x1000, 0x9FC00), (0x100000000, 0x180000000)),
            id="two-ranges",
        ),
        pytest.param(
            "100000000-13fffffff : System RAM\n140000000-17fffffff : System RAM (kmem)\n",
            ((0x100000000, 0x180000000),),
            id="side-by-side",
        ),
        pytest.param("  00100000-0fffffff : System RAM\n", None, id="within-another-resource"),
    ],
)
def test_parse_system_ram(text: str, ranges: tuple[tuple[int, int], ...] | None) -> None:
    assert _numa.parse_system_ram(text) == ranges


@pytest.mark.parametrize(
    ("ranges", "span", "expected"),
    [
        pytest.param([(0, 4 * GIB)], (0, 4 * GIB), 4, id="all"),
        pytest.param([(4096, 4 * GIB)], (0, 4 * GIB), 3, id="first-page-missing"),
        pytest.param([(0, 4 * GIB - 1)], (0, 4 * GIB), 3, id="last-byte-missing"),
        pytest.param([(GIB // 2, 3 * GIB // 2)], (0, 4 * GIB), 0, id="a-GiB-that-is-not-aligned"),
        pytest.param([(0, 8 * GIB)], (2 * GIB, 5 * GIB + 1), 3, id="cut-by-the-node"),
        pytest.param([(0, 2 * GIB), (4 * GIB, 6 * GIB)], (0, 6 * GIB), 4, id="a-hole"),
        pytest.param([(0, 4096)], (0, GIB), 0, id="little"),
        pytest.param([], (0, GIB), 0, id="none"),
    ],
)
def test_whole_gib(ranges: list[tuple[int, int]], span: tuple[int, int], expected: int) -> None:
    assert _numa.whole_gib(ranges, *span) == expected


# --- Machines -----------------------------------------------------------------------------------------------------


def test_single_socket(tmp_path: Path) -> None:
    fact = gather(trees.Machine(), tmp_path)
    assert {**fact["cpu"], "flags": None} == {
        "vendor": "AuthenticAMD",
        "model": "AMD EPYC 9135 16-Core Processor",
        "family": 26,
        "model_number": 2,
        "stepping": 1,
        "flags": None,
        "online": "0-31",
        "offline": "",
        "logical": 32,
        "physical_cores": 16,
        "smt": True,
        "smt_control": "on",
    }
    assert fact["cpu"]["flags"] == sorted(fact["cpu"]["flags"])
    assert "avx512_vnni" in fact["cpu"]["flags"]
    assert fact["sockets"] == [
        {"socket": 0, "nodes": [0], "cpus": "0-31", "primary_cpus": "0-15", "physical_cores": 16, "threads": 32}
    ]
    assert fact["nodes"] == [
        {
            "node": 0,
            "socket": 0,
            "cpus": "0-31",
            "primary_cpus": "0-15",
            "physical_cores": 16,
            "threads": 32,
            "memory_bytes": 768 * GIB,
            # Two of 768 lie below 4 GiB, of which the first has the hole below 1 MiB.
            "gib_ranges": 767,
            "distances": [{"node": 0, "distance": 10}],
        }
    ]
    assert fact["l3"] == [
        {
            "id": number,
            "socket": 0,
            "node": 0,
            "cpus": cpus,
            "primary_cpus": primary,
            "physical_cores": 8,
            "bytes": 32 << 20,
        }
        for number, cpus, primary in ((0, "0-7,16-23", "0-7"), (1, "8-15,24-31", "8-15"))
    ]
    assert (fact["memory_bytes"], fact["memory_source"]) == (768 * GIB, "/proc/zoneinfo")
    assert fact["kernel"]["release"] == "6.1.0-37-amd64"
    assert fact["kernel"]["cmdline"].endswith("hugepages=0:3 hugepages=1:3")


def test_two_sockets(tmp_path: Path) -> None:
    fact = gather(trees.Machine(sockets=2, cores=64), tmp_path)
    assert [(socket["cpus"], socket["nodes"]) for socket in fact["sockets"]] == [
        ("0-63,128-191", [0]),
        ("64-127,192-255", [1]),
    ]
    assert [node["primary_cpus"] for node in fact["nodes"]] == ["0-63", "64-127"]
    assert fact["nodes"][0]["distances"] == [{"node": 0, "distance": 10}, {"node": 1, "distance": 32}]
    assert [node["gib_ranges"] for node in fact["nodes"]] == [767, 768]
    assert [domain["socket"] for domain in fact["l3"]] == [0] * 8 + [1] * 8
    assert fact["memory_bytes"] == 1536 * GIB


def test_four_nodes_per_socket(tmp_path: Path) -> None:
    fact = gather(trees.Machine(sockets=2, cores=64, nodes_per_socket=4, gib_per_node=192), tmp_path)
    assert [socket["nodes"] for socket in fact["sockets"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [distance["distance"] for distance in fact["nodes"][5]["distances"]] == [32, 32, 32, 32, 12, 10, 12, 12]


def test_smt_off_and_second_threads_offline(tmp_path: Path) -> None:
    fact = gather(trees.Machine(offline=tuple(range(16, 32))), tmp_path)
    assert (fact["cpu"]["smt"], fact["cpu"]["online"], fact["cpu"]["offline"]) == (False, "0-15", "16-31")
    assert (fact["sockets"][0]["physical_cores"], fact["sockets"][0]["threads"]) == (16, 16)


def test_first_thread_of_a_core_offline(tmp_path: Path) -> None:
    fact = gather(trees.Machine(offline=(0, 3, 19)), tmp_path)
    assert fact["cpu"]["physical_cores"] == 15
    assert fact["sockets"][0]["primary_cpus"] == "1-2,4-16"
    assert fact["l3"][0]["cpus"] == "1-2,4-7,16-18,20-23"


def test_one_node_over_two_sockets(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(sockets=2), tmp_path)
    for name, cpus in (("node0", "0-63"), ("node1", "")):
        trees.write(tmp_path, f"sys/devices/system/node/{name}/cpulist", cpus + "\n")
    fact = _numa.gather(root)
    assert [(node["socket"], node["threads"]) for node in fact["nodes"]] == [(None, 64), (None, 0)]
    assert [socket["nodes"] for socket in fact["sockets"]] == [[0], [0]]


def test_holes_in_node_numbers_nodes_without_cpus_and_without_memory(tmp_path: Path) -> None:
    machine = trees.Machine(sockets=2, node_numbers=(0, 2, 5), bare_nodes=(2,))
    fact = gather(machine, tmp_path)
    assert [(node["node"], node["socket"], node["cpus"], node["memory_bytes"]) for node in fact["nodes"]] == [
        (0, 0, "0-15,32-47", 768 * GIB),
        (2, 1, "16-31,48-63", 0),
        (5, None, "", 768 * GIB),
    ]
    assert [distance["node"] for distance in fact["nodes"][2]["distances"]] == [0, 2, 5]
    assert [node["gib_ranges"] for node in fact["nodes"]] == [767, 0, 768]
    assert fact["memory_bytes"] == 1536 * GIB


def test_an_l3_over_two_nodes_belongs_to_none(tmp_path: Path) -> None:
    fact = gather(trees.Machine(cores_per_l3=16, nodes_per_socket=2, gib_per_node=12), tmp_path)
    assert [(domain["socket"], domain["node"]) for domain in fact["l3"]] == [(0, None)]


def test_no_l3(tmp_path: Path) -> None:
    assert gather(trees.Machine(l3_kib=0), tmp_path)["l3"] == []


def test_an_l3_at_another_index(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(cores=1, threads=1, cores_per_l3=1), tmp_path)
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    (cache / "index2/level").write_text("2\n")
    (cache / "index3").rename(cache / "index4")
    assert _numa.gather(root)["l3"][0]["bytes"] == 32 << 20


def test_old_names_of_the_topology_lists(tmp_path: Path) -> None:
    assert gather(trees.Machine(sockets=2, old_names=True), tmp_path)["cpu"]["physical_cores"] == 32


def test_a_kernel_without_numa(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(), tmp_path)
    (tmp_path / "sys/devices/system/node").rename(tmp_path / "gone")
    fact = _numa.gather(root)
    assert [(node["node"], node["cpus"], node["distances"]) for node in fact["nodes"]] == [(0, "0-31", [])]
    assert fact["nodes"][0]["memory_bytes"] == 768 * GIB


def test_memory_without_zoneinfo(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(), tmp_path)
    (tmp_path / "proc/zoneinfo").unlink()
    fact = _numa.gather(root)
    assert fact["memory_source"] == "/sys/devices/system/node/node*/meminfo"
    assert fact["memory_bytes"] == 768 * GIB // 1024 * 98 // 100 * 1024
    assert fact["nodes"][0]["gib_ranges"] is None


def test_memory_that_no_file_tells(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(), tmp_path)
    (tmp_path / "proc/zoneinfo").unlink()
    (tmp_path / "sys/devices/system/node/node0/meminfo").unlink()
    fact = _numa.gather(root)
    assert (fact["readable"], fact["memory_bytes"], fact["memory_source"]) == (True, None, None)


def test_without_root_the_ranges_are_unknown(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(), tmp_path)
    trees.write(tmp_path, "proc/iomem", "00000000-00000000 : System RAM\n")
    fact = _numa.gather(root)
    assert (fact["readable"], fact["nodes"][0]["gib_ranges"]) == (True, None)


def test_nodes_between_each_other_have_no_ranges(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(sockets=2), tmp_path)
    zones = trees.zoneinfo(0, 0, 8 * GIB) + trees.zone(0, "Movable", 30 * GIB // 4096, 4096, 4096)
    trees.write(tmp_path, "proc/zoneinfo", zones + trees.zoneinfo(1, 12 * GIB, 8 * GIB))
    assert [node["gib_ranges"] for node in _numa.gather(root)["nodes"]] == [None, None]


# --- What cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        pytest.param(
            "sys/devices/system/cpu/online",
            "0-x\n",
            "/sys/devices/system/cpu/online: '0-x' in the list '0-x': a number or a range such as 0-3 expected",
            id="online",
        ),
        pytest.param(
            "sys/devices/system/node/node0/distance",
            "10 32 32\n",
            "/sys/devices/system/node/node0/distance holds '10 32 32', 1 numbers expected, one for each of the nodes 0",
            id="distances",
        ),
        pytest.param(
            "sys/devices/system/cpu/cpu0/topology/physical_package_id",
            "zero\n",
            "/sys/devices/system/cpu/cpu0/topology/physical_package_id holds 'zero', a number expected",
            id="package",
        ),
        pytest.param("proc/zoneinfo", "nothing\n", "/proc/zoneinfo names no node", id="zoneinfo"),
    ],
)
def test_broken_files_are_named(path: str, text: str, reason: str, tmp_path: Path) -> None:
    root = trees.build(trees.Machine(), tmp_path)
    trees.write(tmp_path, path, text)
    fact = _numa.gather(root)
    assert (fact["readable"], fact["reason"]) == (False, reason)
    assert (fact["sockets"], fact["nodes"], fact["l3"], fact["cpu"]) == ([], [], [], None)


def test_nothing_there(tmp_path: Path) -> None:
    fact = _numa.gather(str(tmp_path))
    assert fact["readable"] is False
    assert "/sys/devices/system/cpu/online" in fact["reason"]


def test_no_package_number(tmp_path: Path) -> None:
    root = trees.build(trees.Machine(), tmp_path)
    (tmp_path / "sys/devices/system/cpu/cpu0/topology/physical_package_id").unlink()
    assert _numa.gather(root)["reason"].endswith("physical_package_id cannot be read")


def test_a_long_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    trees.write(tmp_path, "proc/long", "x" * 200000)
    assert len(_sysfs.read_text(str(tmp_path), "/proc/long", 100000)) == 100000
    assert len(_sysfs.read_text(str(tmp_path), "/proc/long")) == 200000


def test_files_that_refuse_large_reads_are_read() -> None:
    # A read of 4 MiB or more below /proc/sys gives ENOMEM.
    assert _sysfs.read_text("/", "/proc/sys/kernel/osrelease").strip()


# --- This machine, and time ---------------------------------------------------------------------------------------


def test_this_machine() -> None:
    fact = _numa.gather()
    assert fact["readable"], fact["reason"]
    assert fact["cpu"]["logical"] >= fact["cpu"]["physical_cores"] >= 1
    assert fact["memory_bytes"] > 0


def test_the_largest_machine_is_read_in_time(tmp_path: Path) -> None:
    """Two sockets of 192 cores with SMT: 768 CPUs, 32 L3 domains."""
    root = trees.build(trees.Machine(sockets=2, cores=192, cores_per_l3=16), tmp_path)
    best = min(timed(root) for _round in range(5))
    assert best < 0.15, f"{best * 1000:.1f} ms, 150 ms expected"


def timed(root: str) -> float:
    start = time.process_time()
    assert _numa.gather(root)["cpu"]["logical"] == 768
    return time.process_time() - start


# --- Captured machines --------------------------------------------------------------------------------------------


def test_lab_vm() -> None:
    fact = _numa.gather(str(FIXTURES / "lab-vm-bookworm"))
    assert fact["readable"], fact["reason"]
    assert fact["cpu"]["vendor"] == "AuthenticAMD"
    assert {"avx2", "fma", "f16c", "pdpe1gb"} <= set(fact["cpu"]["flags"])
    assert "avx512f" not in fact["cpu"]["flags"]
    assert [(socket["socket"], socket["nodes"], socket["cpus"]) for socket in fact["sockets"]] == [
        (0, [0], "0"),
        (1, [1], "1"),
    ]
    assert [[item["distance"] for item in node["distances"]] for node in fact["nodes"]] == [[10, 32], [32, 10]]
    assert [(domain["id"], domain["cpus"], domain["bytes"]) for domain in fact["l3"]] == [
        (0, "0", 16 << 20),
        (1, "1", 16 << 20),
    ]
    assert fact["memory_source"] == "/proc/zoneinfo"


def test_a_reservation_at_boot_changes_the_command_line_only() -> None:
    """The same VM, before and after a boot with one 1 GiB page in each node."""
    before = _numa.gather(str(FIXTURES / "lab-vm-bookworm"))
    after = _numa.gather(str(FIXTURES / "lab-vm-bookworm-reserved"))
    assert before.pop("kernel") != after.pop("kernel")
    assert before == after


def test_a_cloud_machine_whose_memory_is_initialised_late() -> None:
    root = str(FIXTURES / "cloud-2-cpus-24-gib")
    fact = _numa.gather(root)
    total = _numa._meminfo_total(root, 0)
    assert total is not None
    assert total < 21 * GIB
    assert 23 * GIB < fact["memory_bytes"] < 24 * GIB
    assert fact["nodes"][0]["gib_ranges"] == 23
