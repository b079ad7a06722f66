# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""llama_mmap of the patched source by itself: pages, bytes, unmapping, and reads that fail."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.harness import GIB, Pool

MAPPED = 1048576  # KiB per page
SPEED = r"\d+\.\d\d s, \d+\.\d\d GiB/s"


@dataclass(frozen=True)
class Result:
    """What the program said."""

    code: int
    values: list[tuple[str, str]]
    log: str

    def all(self, name: str) -> list[str]:
        """Return the values of a name, in order."""
        return [value for key, value in self.values if key == name]


Check = Callable[..., Result]


@pytest.fixture
def check(mmap_check: Path) -> Check:
    """Run the program with the mode `require` unless told otherwise."""

    def run(*arguments: object, **environment: str) -> Result:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_")}
        done = subprocess.run(
            [mmap_check, *map(str, arguments)],
            env={**clean, "LLAMA_WEIGHTS_HUGEPAGES": "require", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        values = [(key, value) for key, _, value in (line.partition("=") for line in done.stdout.splitlines())]
        return Result(done.returncode, values, done.stderr)

    return run


def sparse_file(path: Path, size: int) -> Path:
    """Return a file with random bytes at its ends and across each border of 1 GiB; the rest are holes."""
    seeded = random.Random(size)
    with path.open("wb") as out:
        out.truncate(size)
        for border in [0, *range(GIB, size, GIB), size]:
            begin = max(0, border - 3_000_000)
            out.seek(begin)
            out.write(seeded.randbytes(min(size, border + 3_000_000) - begin))
        out.flush()
        os.fsync(out.fileno())  # the page cache cannot give up what is not on the disk yet
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of less than a page, of an odd length."""
    return sparse_file(tmp_path / "small.gguf", 70_012_345)


@pytest.mark.parametrize(
    ("size", "pages"),
    [
        pytest.param(1, 1, id="one-byte"),
        pytest.param(70_012_345, 1, id="odd"),
        pytest.param(GIB, 1, id="exactly-one-page"),
        pytest.param(GIB + 1, 2, id="one-byte-more"),
    ],
)
def test_holds_the_file_in_whole_pages_and_gives_them_back(
    check: Check, pool: Pool, tmp_path: Path, size: int, pages: int
) -> None:
    file = sparse_file(tmp_path / "weights.gguf", size)
    pool.free_exactly(pages)
    result = check("load", file)
    assert result.code == 0, result.log
    assert result.all("in_hugepages") == ["1", "1"]
    assert result.all("size") == [str(size)] * 2
    assert result.all("hugetlb_kib_loaded") == [str(pages * MAPPED)] * 2
    assert result.all("hugetlb_kib_freed") == ["0", "0"]
    assert result.all("same") == ["1", "1"]
    assert result.all("cached") == ["0", "0"], "the page cache holds a second copy"
    line = rf"{pages} pages of 1 GiB, {size} bytes in {SPEED} \(\d+ threads, O_DIRECT\)"
    assert len(re.findall(rf"hugepages: {re.escape(str(file))}: {line}", result.log)) == 2, result.log


def test_pages_are_read_only_and_not_dumped(check: Check, pool: Pool, small: Path) -> None:
    pool.free_exactly(1)
    flags = check("load", small).all("vm_flags")[0].split()
    assert "ht" in flags
    assert "wr" not in flags
    assert "dd" in flags, "a core dump would hold the weights"


def test_unmaps_whole_pages_only(check: Check, pool: Pool, tmp_path: Path) -> None:
    pool.free_exactly(2)
    result = check("unmap", sparse_file(tmp_path / "weights.gguf", GIB + GIB // 2 + 12_345))
    assert result.code == 0, result.log
    assert result.all("hugetlb_kib_loaded") == [str(2 * MAPPED)]
    assert result.all("hugetlb_kib_after_parts") == [str(2 * MAPPED)]
    assert result.all("hugetlb_kib_after_first") == [str(MAPPED)]
    assert result.all("hugetlb_kib_after_part") == [str(MAPPED)]
    assert result.all("hugetlb_kib_after_last") == ["0"]
    assert result.all("hugetlb_kib_freed") == ["0"]
    assert result.all("same") == ["1"]
    assert "munmap failed" not in result.log


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        pytest.param("short", "O_DIRECT|buffered", id="short-and-interrupted-reads"),
        pytest.param("no-direct", "buffered", id="file-system-without-O_DIRECT"),
        pytest.param("old-kernel", "O_DIRECT", id="kernel-before-5.14"),
    ],
)
def test_reads_all_the_same(check: Check, pool: Pool, small: Path, fault: str, how: str) -> None:
    pool.free_exactly(1)
    result = check("load", small, FAULT=fault)
    assert result.code == 0, result.log
    assert result.all("same") == ["1", "1"]
    # Without O_DIRECT, what the kernel still reads ahead when the load ends may stay: a few MB of any file.
    limit = 0 if how == "O_DIRECT" else 8 << 20
    assert max(map(int, result.all("cached"))) <= limit, "the page cache holds a second copy"
    assert re.search(rf"threads, ({how})\)", result.log), result.log


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("eio:40000000", r"read error at byte \d+ of 70012345: Input/output error", id="EIO"),
        pytest.param("truncate:40000000", r"file ends at byte 40000000, expected 70012345 bytes", id="early-end"),
        pytest.param("touch", r"file changed while it was read", id="written-to-meanwhile"),
    ],
)
@pytest.mark.parametrize("mode", ["try", "require"])
def test_a_failed_read_fails_the_load(
    check: Check, pool: Pool, small: Path, fault: str, message: str, mode: str
) -> None:
    pool.free_exactly(1)
    result = check("load", small, FAULT=fault, LLAMA_WEIGHTS_HUGEPAGES=mode)
    assert result.code == 1
    assert re.search(rf"error: {re.escape(str(small))}: {message}", result.log), result.log
    assert result.all("hugetlb_kib_freed") == ["0"]


def test_require_names_file_and_numbers_when_a_page_lacks(check: Check, pool: Pool, tmp_path: Path) -> None:
    file = sparse_file(tmp_path / "weights.gguf", GIB + 1)
    pool.free_exactly(1)
    result = check("load", file)
    assert result.code == 1
    assert f"LLAMA_WEIGHTS_HUGEPAGES=require: {file}: 2 pages of 1 GiB needed, 1 free of " in result.log
    assert "1 free on the nodes that this process may use (0" in result.log
    assert result.all("in_hugepages") == []


@pytest.mark.parametrize(
    "fault",
    [pytest.param("", id="at-mmap"), pytest.param("no-page:1", id="at-the-first-touch")],
)
def test_try_maps_the_file_when_a_page_lacks(check: Check, pool: Pool, small: Path, fault: str) -> None:
    pool.free_exactly(1 if fault else 0)
    result = check("load", small, FAULT=fault, LLAMA_WEIGHTS_HUGEPAGES="try")
    assert result.code == 0, result.log
    assert result.all("in_hugepages") == ["0", "0"]
    assert result.all("same") == ["1", "1"]
    assert f"hugepages: {small}: 1 pages of 1 GiB needed, {1 if fault else 0} free of " in result.log
    assert "LLAMA_WEIGHTS_HUGEPAGES=try: going on in small pages" in result.log


def test_a_page_that_is_promised_but_not_given_is_no_signal(check: Check, pool: Pool, small: Path) -> None:
    pool.free_exactly(1)
    result = check("load", small, FAULT="no-page:1")
    assert result.code == 1
    assert "1 pages of 1 GiB needed, 1 free of " in result.log
    assert "(page 1 of 1: Bad address)" in result.log


@pytest.mark.parametrize(
    ("hidden", "how", "name"),
    [
        pytest.param("/sys", "O_DIRECT", "small.gguf", id="sysfs"),
        pytest.param("/proc", "buffered", "file descriptor", id="procfs"),
    ],
)
def test_loads_where_the_kernel_shows_less(
    check: Check, mmap_check: Path, pool: Pool, small: Path, hidden: str, how: str, name: str
) -> None:
    pool.free_exactly(1)
    script = f'mount -t tmpfs none {hidden} && "$0" check 1000 && exec "$0" load "$1"'
    command = ["unshare", "--mount", "sh", "-c", script, str(mmap_check), str(small)]
    environment = {**os.environ, "LLAMA_WEIGHTS_HUGEPAGES": "require"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "in_hugepages=1\n" in result.stdout
    assert "same=1\n" in result.stdout
    assert re.search(rf"{name}[^:]*: 1 pages of 1 GiB, 70012345 bytes .*, {how}\)", result.stderr), result.stderr


def test_says_how_far_it_is(check: Check, pool: Pool, tmp_path: Path) -> None:
    pool.free_exactly(1)
    file = sparse_file(tmp_path / "weights.gguf", 1_000_000_000)
    result = check("load", file, FAULT="slow:400", LLAMA_WEIGHTS_THREADS="2")
    progress = r"weights\.gguf: +\d+\.\d %, \d+\.\d\d GiB/s, (?:\d+ s left|time left unknown)\n"
    lines = re.findall(progress, result.log)
    assert len(lines) >= 4, result.log
    assert "(2 threads, " in result.log


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LLAMA_WEIGHTS_HUGEPAGES", "yes", "LLAMA_WEIGHTS_HUGEPAGES is 'yes', expected off, try or require"),
        ("LLAMA_WEIGHTS_HUGEPAGES", "", "LLAMA_WEIGHTS_HUGEPAGES is '', expected off, try or require"),
        ("LLAMA_WEIGHTS_THREADS", "0", "LLAMA_WEIGHTS_THREADS is '0', expected a number from 1 to 256"),
        ("LLAMA_WEIGHTS_THREADS", "4x", "LLAMA_WEIGHTS_THREADS is '4x', expected a number from 1 to 256"),
    ],
)
def test_refuses_an_unknown_value(check: Check, small: Path, variable: str, value: str, message: str) -> None:
    result = check("load", small, **{variable: value})
    assert result.code == 1
    assert message in result.log


def test_off_maps_the_file(check: Check, small: Path) -> None:
    result = check("load", small, LLAMA_WEIGHTS_HUGEPAGES="off")
    assert result.code == 0
    assert result.all("in_hugepages") == ["0", "0"]
    assert result.all("same") == ["1", "1"]
    assert result.log == ""


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [
        pytest.param([1], 1, id="one"),
        pytest.param([GIB, GIB], 2, id="whole-pages"),
        pytest.param([1, GIB - 1], 2, id="rounded-each-by-itself"),
    ],
)
def test_counts_the_pages_of_the_whole_model(check: Check, pool: Pool, sizes: list[int], needed: int) -> None:
    pool.free_exactly(needed)
    enough = check("check", *sizes)
    text = f"model of {len(sizes)} files, {sum(sizes)} bytes: {needed} pages of 1 GiB needed, "
    assert enough.code == 0
    assert f"hugepages: {text}{needed} free of " in enough.log
    pool.free_exactly(needed - 1)
    short = check("check", *sizes)
    assert short.code == 1
    assert f"LLAMA_WEIGHTS_HUGEPAGES=require: {text}{needed - 1} free of " in short.log
