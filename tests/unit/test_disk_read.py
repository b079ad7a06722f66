# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures real files on this machine's disk; how fast that is decides nothing here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _disk_read
from ansible_collections.cpullm.epyc.plugins.module_utils._disk_read import BLOCK_BYTES, LEAST_BYTES, Unmeasured


def sparse(path: Path, size: int) -> str:
    """Make a file of that size that takes no room."""
    path.touch()
    os.truncate(path, size)
    return str(path)


def test_a_whole_file_is_read_once(tmp_path: Path) -> None:
    # More than whole blocks: the rest is left out, because a read past the page cache has to be of whole sectors.
    path = sparse(tmp_path / "shard", LEAST_BYTES + BLOCK_BYTES + 4711)
    rate = _disk_read.measure(path, seconds=60)
    assert (rate.bytes, rate.source) == (LEAST_BYTES + BLOCK_BYTES, path)
    assert rate.gbs == pytest.approx(rate.bytes / rate.seconds / 1e9)


def test_the_time_ends_it(tmp_path: Path) -> None:
    rate = _disk_read.measure(sparse(tmp_path / "shard", 1 << 40), seconds=0.005)
    assert 0 < rate.bytes < 8 << 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: sparse(path, LEAST_BYTES - 1), "are too few to measure with", id="small"),
        pytest.param(lambda path: None, "No such file or directory", id="absent"),
    ],
)
def test_what_cannot_be_measured(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path / "x")  # type: ignore[operator] # a lambda of the table
    with pytest.raises(Unmeasured, match=message):
        _disk_read.measure(str(tmp_path / "x"))


def test_a_file_system_without_such_reads_is_named() -> None:
    # procfs refuses O_DIRECT.
    with pytest.raises(Unmeasured, match="/proc/self/stat: its file system has no reads past the page cache"):
        _disk_read.measure("/proc/self/stat")


def test_the_largest_shard_that_is_there(tmp_path: Path) -> None:
    paths = [sparse(tmp_path / str(size), size << 20) for size in (100, 300, 700)]
    assert _disk_read.largest([*paths, str(tmp_path / "absent"), str(tmp_path)]) == paths[2]
    assert _disk_read.largest(paths[:1]) is None
    assert _disk_read.largest([]) is None
