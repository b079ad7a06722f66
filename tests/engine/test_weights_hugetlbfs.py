# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""llama-server with its weights in hugetlbfs files, against the same server with them on disk."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import GIB, Model, Pool, Server, Servers, count, free_pages
from tests.engine.test_mmap_check import MAPPED, Check, check, sparse_file  # noqa: F401 - a fixture among them


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A mount of 1 GiB pages, and its files gone with it: asked for after the pool, and before the servers."""
    folder = tmp_path / "huge"
    folder.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=1G", "hugetlbfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def put(source: Path, folder: Path) -> Path:
    """Copy a file into pages, rounded up to whole ones; a file there cannot be written to otherwise."""
    target, size = folder / source.name, source.stat().st_size
    pages = -(-size // GIB) * GIB
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, pages)
        with mmap.mmap(descriptor, pages) as held, source.open("rb") as stream:
            at = 0
            while piece := stream.read(16 << 20):
                held[at : at + len(piece)] = piece
                at += len(piece)
    finally:
        os.close(descriptor)
    return target


def said(server: Server) -> list[tuple[int, float]]:
    """Return a greedy completion of a server that must be ready."""
    assert server.ready, server.log
    return server.complete()


@pytest.mark.parametrize("mode", ["off", "try", "require"])
def test_serves_the_file_s_own_pages_in_every_mode(
    pool: Pool, mount: Path, servers: Servers, model: Model, mode: str
) -> None:
    stock = servers.start(model, LLAMA_WEIGHTS_HUGEPAGES="off")
    expected = said(stock)
    stock.stop()
    pool.free_exactly(model.pages)
    stored = Model(tuple(put(shard, mount) for shard in model.shards))
    assert free_pages() == 0
    server = servers.start(stored, ["--no-repack"], LLAMA_WEIGHTS_HUGEPAGES=mode)
    assert said(server) == expected
    assert server.status("HugetlbPages") == model.pages * MAPPED
    assert f"hugepages: {model.pages // len(model.shards)} pages of 1024 MiB mapped from hugetlbfs" in server.log
    second = servers.start(stored, ["--no-repack"], LLAMA_WEIGHTS_HUGEPAGES=mode)
    assert said(second) == expected, "two servers share the pages"
    for one in (server, second):
        one.stop()
        assert "munmap failed" not in one.log
        assert "madvise" not in one.log and "fadvise" not in one.log
    assert free_pages() == 0, "the store outlives its servers"


def test_a_killed_server_leaves_the_pages_as_they_were(pool: Pool, mount: Path, servers: Servers, model: Model) -> None:
    pool.free_exactly(model.pages)
    stored = Model(tuple(put(shard, mount) for shard in model.shards))
    server = servers.start(stored, ["--no-repack"])
    expected = said(server)
    server.process.kill()
    server.process.wait()
    again = servers.start(stored, ["--no-repack"])
    assert said(again) == expected


def test_parts_are_unmapped_in_whole_pages(check: Check, pool: Pool, tmp_path: Path, mount: Path) -> None:  # noqa: F811
    pool.free_exactly(2)
    stored = put(sparse_file(tmp_path / "large.gguf", GIB + GIB // 2 + 123_456_789), mount)
    done = check("unmap", stored)
    assert done.code == 0, done.log
    assert done.all("hugetlb_kib_loaded") == [str(2 * MAPPED)]
    assert done.all("hugetlb_kib_after_parts") == [str(2 * MAPPED)]
    assert done.all("hugetlb_kib_after_first") == [str(MAPPED)]
    assert done.all("hugetlb_kib_after_part") == [str(MAPPED)]
    assert done.all("hugetlb_kib_after_last") == ["0"]
    assert done.all("same") == ["1"]
    assert done.all("hugetlb_kib_freed") == ["0"]
    assert "munmap failed" not in done.log
    assert count("free_hugepages") == 0
