# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program that reserves pages on a running kernel, on trees that answer as a kernel with so much room does."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "roles" / "grub_hugepages" / "files" / "reserve_pages.py"
SIZE = 1048576
GIB = 1 << 30


class Kernel:
    """Two nodes below a root: each can hold so many pages, more once its memory was compacted often enough."""

    def __init__(self, root: Path, room: dict[int, int], hidden: int = 0, memory_gib: int = 16) -> None:
        self.root, self.room, self.hidden, self.memory = root, dict(room), hidden, memory_gib
        self.rounds = 0
        for node in room:
            self.put(f"sys/devices/system/node/node{node}/hugepages/hugepages-{SIZE}kB/nr_hugepages", "0")
            self.put(f"sys/devices/system/node/node{node}/hugepages/hugepages-{SIZE}kB/free_hugepages", "0")
        for name in ("drop_caches", "compact_memory", "hugetlb_optimize_vmemmap"):
            self.put(f"proc/sys/vm/{name}", "0")
        pages = memory_gib << 17
        self.put("proc/zoneinfo", "".join(f"Node {node}, zone Normal\n        present  {pages}\n" for node in room))
        self.settle()

    def put(self, name: str, text: str) -> None:
        """Write a file below the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            stream.write(text)

    def pages(self, node: int) -> int:
        """Return the pages of a node's pool."""
        path = f"sys/devices/system/node/node{node}/hugepages/hugepages-{SIZE}kB/nr_hugepages"
        return int((self.root / path).read_text())

    def settle(self, corrupted_kib: int = 0) -> None:
        """Write /proc/meminfo for the pools as they are."""
        available = self.memory * GIB - sum(map(self.pages, self.room)) * GIB
        self.put("proc/meminfo", f"MemAvailable: {available // 1024} kB\nHardwareCorrupted: {corrupted_kib} kB\n")

    def write(self, path: Path, text: str) -> None:
        """Do what the kernel does when the program writes a file."""
        if path.name == "compact_memory":
            self.rounds += 1
        if path.name == "nr_hugepages":
            node = int(path.parts[-4][4:])
            hidden = max(0, self.hidden - self.rounds)
            text = str(min(int(text), self.room[node] - hidden))
            self.put(str(path.parent.relative_to(self.root) / "free_hugepages"), text)
        with path.open("w") as stream:
            stream.write(text)
        self.settle()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the program, on a root of the test's own, without its waiting."""
    spec = importlib.util.spec_from_file_location("reserve_pages", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(module.os, "sync", lambda: None)
    return module


@pytest.fixture
def kernel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Return a kernel with room for four pages on each node, or what the test asks for."""
    made = Kernel(tmp_path, **{"room": {0: 4, 1: 4}, **getattr(request, "param", {})})
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_named: made.write(path, text))
    return made


def test_pages_are_reserved_on_their_nodes_once(program: ModuleType, kernel: Kernel) -> None:
    said = program.reserve([(0, 3), (1, 2)], SIZE, GIB, None, 60)
    assert said == "pages of 1 GiB: node 0: 3 wanted, 3 there, +3 now; node 1: 2 wanted, 2 there, +2 now"
    assert program.reserve([(0, 3), (1, 2)], SIZE, GIB, None, 60).count("+0 now") == 2
    assert (kernel.pages(0), kernel.pages(1), kernel.rounds) == (3, 2, 0)


@pytest.mark.parametrize("kernel", [pytest.param({"hidden": 3}, id="scattered")], indirect=True)
def test_memory_in_pieces_is_compacted(program: ModuleType, kernel: Kernel) -> None:
    program.reserve([(0, 4)], SIZE, GIB, None, 60)
    assert kernel.pages(0) == 4 and kernel.rounds == 3


def test_too_many_end_with_the_numbers(program: ModuleType, kernel: Kernel) -> None:
    with pytest.raises(program.ShortError) as caught:
        program.reserve([(0, 6), (1, 2)], SIZE, GIB, None, 60)
    assert "node 0: 6 wanted, 4 there, +4 now (no more 1 GiB in one piece after 5 round(s)" in str(caught.value)
    assert "node 1: 2 wanted, 2 there" in str(caught.value)


def test_time_is_up(program: ModuleType, kernel: Kernel) -> None:
    with pytest.raises(program.ShortError, match="node 0: 4 wanted, 0 there"):
        program.reserve([(0, 4)], SIZE, GIB, None, -1)


def test_more_than_the_memory_takes_nothing(program: ModuleType, kernel: Kernel) -> None:
    with pytest.raises(program.ShortError) as caught:
        program.reserve([(0, 4), (1, 12)], SIZE, GIB, None, 60)
    assert str(caught.value) == (
        "wanted 16 pages of 1 GiB (16.0 GiB) and 1.0 GiB for the system, the memory is 16.0 GiB: nothing was reserved"
    )
    assert (kernel.pages(0), kernel.pages(1)) == (0, 0)


@pytest.mark.parametrize("kernel", [pytest.param({"room": {0: 99}, "memory_gib": 16}, id="one")], indirect=True)
def test_half_of_the_reserve_stays_available(
    program: ModuleType, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "present_bytes", lambda: 32 * GIB)
    with pytest.raises(program.ShortError) as caught:
        program.reserve([(0, 16)], SIZE, 4 * GIB, None, 60)
    assert "16 wanted, 14 there" in str(caught.value)
    assert "2.0 GiB of memory are available, and 2.0 GiB of them stay with the system" in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "there", "says"),
    [
        pytest.param(2, 3, None, id="a-few"),
        pytest.param(1, 1, "node 0: 3 wanted, 1 there, +0 now (2 are missing, and at most 1 are topped up)", id="many"),
    ],
)
def test_top_up(program: ModuleType, kernel: Kernel, limit: int, there: int, says: str | None) -> None:
    kernel.write(program.pool(0, SIZE) / "nr_hugepages", "1")
    if says is None:
        program.reserve([(0, 3)], SIZE, GIB, limit, 60)
    else:
        with pytest.raises(program.ShortError) as caught:
            program.reserve([(0, 3)], SIZE, GIB, limit, 60)
        assert says in str(caught.value)
    assert kernel.pages(0) == there


def test_fewer_give_back_what_is_ours(program: ModuleType, kernel: Kernel) -> None:
    kernel.write(program.pool(0, SIZE) / "nr_hugepages", "1")
    program.reserve([(0, 3), (1, 2)], SIZE, GIB, None, 60)
    program.reserve([(0, 0), (1, 1)], SIZE, GIB, None, 60)
    # One was there before, and one of the other node's is in use.
    assert (kernel.pages(0), kernel.pages(1)) == (1, 1)


def test_release_gives_back_what_was_there_before(program: ModuleType, kernel: Kernel) -> None:
    kernel.write(program.pool(0, SIZE) / "nr_hugepages", "1")
    program.reserve([(0, 3), (1, 2)], SIZE, GIB, None, 60)
    assert json.loads(program.record().read_text()) == {"0:1048576": 1, "1:1048576": 0}
    assert program.release() == (
        "node 0: 2 pages of 1 GiB given back, 1 left; node 1: 2 pages of 1 GiB given back, 0 left"
    )
    assert program.release() == "nothing was reserved in this boot"
    assert (kernel.pages(0), kernel.pages(1)) == (1, 0)


def test_pages_in_use_stay_when_fewer_are_wanted(program: ModuleType, kernel: Kernel) -> None:
    program.reserve([(0, 4)], SIZE, GIB, None, 60)
    kernel.put(f"sys/devices/system/node/node0/hugepages/hugepages-{SIZE}kB/free_hugepages", "1")
    program.reserve([(0, 1)], SIZE, GIB, None, 60)
    assert kernel.pages(0) == 3


def test_failed_memory_is_made_up_for(program: ModuleType, kernel: Kernel) -> None:
    program.reserve([(0, 2)], SIZE, GIB, None, 60)
    # Node 0 is the GiB from 1 to 3; the flags say that a page starts at 2 GiB, and that its memory failed.
    kernel.put("sys/devices/system/memory/block_size_bytes", "40000000\n")
    for block in (1, 2):
        (kernel.root / f"sys/devices/system/node/node0/memory{block}").mkdir()
    with open(kernel.root / "proc/kpageflags", "wb") as flags:
        for place, value in ((1, program.HUGE), (2, program.HUGE | program.HWPOISON)):
            flags.seek((place << 18) * 8)
            flags.write(struct.pack("=Q", value))
    kernel.settle(corrupted_kib=4)
    said = program.reserve([(0, 2)], SIZE, GIB, None, 60)
    assert said == "pages of 1 GiB: node 0: 2 wanted, 2 there, +1 now, 1 more hold failed memory"
    assert kernel.pages(0) == 3


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="torn"),
        pytest.param("[]", id="a-list"),
        pytest.param('{"x": 1}', id="no-node"),
        pytest.param('{"0:2048": "1"}', id="no-number"),
    ],
)
def test_a_record_that_is_none_counts_as_none(program: ModuleType, kernel: Kernel, text: str) -> None:
    kernel.put("run/cpullm/hugepages.json", text)
    assert program.release() == "nothing was reserved in this boot"


def test_the_command(program: ModuleType, kernel: Kernel, monkeypatch, capsys) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(program.sys, "argv", ["reserve_pages.py", *words])
        return program.main()

    words = ("reserve", "--size-kib", "1048576", "--reserve-bytes", str(GIB), "--free-vmemmap")
    assert run(*words, "0:2", "1:2") == 0
    assert (kernel.root / "proc/sys/vm/hugetlb_optimize_vmemmap").read_text() == "1"
    assert run(*words, "0:5") == 1
    assert "cpullm-hugepages: pages of 1 GiB: node 0: 5 wanted, 4 there" in capsys.readouterr().err
    assert run(*words, "7:5") == 1
    assert "no pool of 1 GiB pages on node 7" in capsys.readouterr().err
    assert run("release") == 0
    with pytest.raises(SystemExit):
        run(*words, "0:x")
    assert "'0:x', expected NODE:PAGES" in capsys.readouterr().err
