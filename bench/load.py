#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast weights come from a cold disk, and how soon a server on a store answers after a crash.

Cold, in turns, the page cache dropped before each: stock mmap, stock ``--load-mode dio``, our patch's anonymous pages
(each from the server's start to ready, without warm-up), our loader into a store (its whole run, hashes off and on),
and the raw rate of the same files with O_DIRECT at the same parallelism, into memory that is thrown away.

After a crash: a server on a store is killed and started again, with and without the engine's warm-up, beside the same
server on the page cache and on anonymous pages; what it read from the disk meanwhile is counted. Needs root, for the
page cache, the mount and the pages.

A machine that ran for a while has few GiB in one piece. ``--page-kib 2048`` measures with stores of 2 MiB pages there,
and ``--whole`` a model that fits what is left: in pages of 1 GiB, the anonymous ones among them.

    python3 -m bench.load --engine /opt/llama.cpp/current/bin --model a.gguf --ready b.gguf a.gguf c.gguf
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import record
from bench.load_anonymous import (
    GIB,
    STOCK,
    Way,
    anonymous,
    await_ready,
    drop_page_cache,
    load_seconds,
    pages_of,
    server,
    shards_of,
)
from lab import pages as lab_pages
from lab.state import LabError

CLONE = Path(__file__).resolve().parent.parent
LOADER = CLONE / "roles" / "systemd_service" / "files" / "llama_weights.py"
OWNER = "bench-load"
CHUNK = 16 << 20
MIB2 = 2 << 20
SMALL_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def raw_seconds(shards: Sequence[Path], threads: int) -> float:
    """Return the seconds that so many threads need to read the files with O_DIRECT."""
    chunks = [(shard, at) for shard in shards for at in range(0, shard.stat().st_size, CHUNK)]
    files = {shard: os.open(shard, os.O_RDONLY | os.O_DIRECT) for shard in shards}
    lock, failures = threading.Lock(), []

    def work() -> None:
        with mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
            # The disk's rate, not that of pinning small pages.
            buffer.madvise(mmap.MADV_HUGEPAGE)
            while True:
                with lock:
                    if not chunks:
                        return
                    shard, at = chunks.pop(0)
                try:
                    os.preadv(files[shard], [buffer], at)
                except OSError as error:
                    failures.append(error)
                    return

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - begin
    for descriptor in files.values():
        os.close(descriptor)
    if failures:
        raise failures[0]
    return seconds


def refused(owner: str) -> LabError | None:
    """Reserve one page of 1 GiB, or return why there is none."""
    try:
        lab_pages.reserve(1, owner)
    except LabError as error:
        return error
    return None


def gather(pages: int, owner: str, patience_s: float = 300) -> None:
    """Reserve pages of 1 GiB one by one, and wait where none is whole: what holds memory in pieces comes and goes.

    Raises LabError where they do not come together in time. The caller gives back what there is, in any case.
    """
    deadline, found = time.monotonic() + patience_s, 0
    while found < pages:
        error = refused(owner)
        if error is None:
            found += 1
        elif time.monotonic() > deadline:
            raise LabError(f"{found} of {pages} pages of 1 GiB came together in {patience_s:.0f} s: {error}")
        else:
            time.sleep(5)


@contextlib.contextmanager
def pool(pages: int, page_bytes: int, owner: str) -> Iterator[None]:
    """Reserve pages for a while, of 1 GiB or of 2 MiB; LabError where the machine has fewer."""
    if page_bytes == GIB:
        try:
            gather(pages, owner)
            yield
        finally:
            lab_pages.release(owner)
        return
    before = int(SMALL_POOL.read_text(encoding="ascii"))
    try:
        for _try in range(3):
            SMALL_POOL.write_text(str(before + pages), encoding="ascii")
            found = int(SMALL_POOL.read_text(encoding="ascii")) - before
            if found >= pages:
                break
            drop_page_cache()
        else:
            raise LabError(f"{found} of {pages} pages of 2 MiB could be reserved")
        yield
    finally:
        SMALL_POOL.write_text(str(before), encoding="ascii")


@functools.cache
def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """A mounted store, its loader's plan and run-time directory."""

    def __init__(self, folder: Path, threads: int, page_bytes: int) -> None:
        """Use a folder that is to hold the mount."""
        self.folder, self.threads, self.page_bytes = folder, threads, page_bytes
        self.mounted, self.run = folder / "store", folder / "run"

    def plan(self, shards: Sequence[Path], hashes: bool) -> None:
        """Write the loader's plan; a hash is made only where one is compared."""
        rows = [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path) if hashes else "0" * 64}
            for path in shards
        ]
        plan = {
            "instance": 0,
            "source": str(shards[0].parent),
            "store": str(self.mounted),
            "content": "0123456789abcdef",
            "shards": rows,
            "page_bytes": self.page_bytes,
            "nodes": [],
            "hash": hashes,
            "threads": self.threads,
        }
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    def load(self) -> float:
        """Return the seconds of one load of everything, from the loader's start to its end."""
        argv = [sys.executable, str(LOADER), "load", f"--plan={self.folder / 'plan.json'}", f"--run={self.run}"]
        begin = time.monotonic()
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return time.monotonic() - begin

    def model(self, first: Path) -> Path:
        """Return where the first shard is in the store."""
        return self.mounted / "0123456789abcdef" / first.name


@contextlib.contextmanager
def store(threads: int, shards: Sequence[Path], page_bytes: int = GIB) -> Iterator[Store]:
    """Mount a store for a while, its pages free before and after."""
    with tempfile.TemporaryDirectory() as name:
        it = Store(Path(name), threads, page_bytes)
        it.mounted.mkdir()
        it.run.mkdir()
        options = f"pagesize={page_bytes >> 20}M,size={pages_of(shards, page_bytes) * page_bytes}"
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", options, "hugetlbfs", str(it.mounted)], check=True)
        try:
            yield it
        finally:
            subprocess.run(["umount", str(it.mounted)], check=True)


def read_bytes(pid: int) -> int:
    """Return the bytes that a process had the kernel fetch from disks (proc_pid_io(5))."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


def ready_seconds(engine: Path, model: Path, way: Way, log: Path) -> tuple[float, int]:
    """Return the seconds from a server's start until it answers, and the bytes that it read from the disk.

    It is killed then, as in a crash.
    """
    begin = time.monotonic()
    with server(engine, model, way, log) as (process, port):
        await_ready(process, port, way.name, log, pause_s=0.005)
        seconds = time.monotonic() - begin
        read = read_bytes(process.pid)
        process.kill()
    return seconds, read


def servers_of(options: argparse.Namespace, page_bytes: int) -> dict[str, tuple[Path, Way]]:
    """Return the builds and ways that need no loader; the engine's anonymous pages are of 1 GiB."""
    stock = options.stock or options.engine
    found = {"stock_mmap": (stock, STOCK[0]), "stock_dio": (stock, STOCK[1])}
    if page_bytes == GIB:
        found["anonymous"] = (options.engine, anonymous(options.threads))
    return found


def cold(options: argparse.Namespace, first: Path, page_bytes: int) -> dict[str, float]:
    """Return the cold rates of every way, in 10^9 bytes per second; stores have pages of that many bytes."""
    shards = shards_of(first)
    size = sum(shard.stat().st_size for shard in shards)
    servers = servers_of(options, page_bytes)
    names = ("raw", "ours", "ours_hashed", *servers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # The first touch of the pool's pages does not count, as with other memory (back_memory).
    with store(options.threads, shards, page_bytes) as place:
        place.plan(shards, hashes=False)
        place.load()
    for run in range(options.runs):
        for name in names:
            if name == "raw":
                drop_page_cache()
                taken = raw_seconds(shards, options.threads)
            elif name in servers:
                build, way = servers[name]
                taken = load_seconds(build, first, way)
            else:
                with store(options.threads, shards, page_bytes) as place:
                    place.plan(shards, hashes=name == "ours_hashed")
                    drop_page_cache()
                    taken = place.load()
            seconds[name].append(taken)
            print(f"{run + 1}/{options.runs} {name}: {taken:.2f} s, {size / taken / 1e9:.2f} GB/s", flush=True)
    figures = {"cold_model_gib": round(size / GIB, 3)}
    for name, values in seconds.items():
        key = "raw_gb_s" if name == "raw" else f"cold_gb_s_{name}"
        figures |= record.spread(key, [size / value / 1e9 for value in values])
    # In turns, so that what the machine does meanwhile hits both sides of each ratio.
    for name in ("raw", "stock_mmap", "stock_dio"):
        pairs = zip(seconds[name], seconds["ours"], strict=True)
        figures |= record.spread(f"ours_of_{name}", [theirs / ours for theirs, ours in pairs])
    return figures


def after_crash(options: argparse.Namespace, first: Path) -> dict[str, float]:
    """Return the seconds until a server on a store answers again after a crash, and the bytes that it read."""
    shards = shards_of(first)
    gib = f"{sum(shard.stat().st_size for shard in shards) / GIB:.0f}gib"
    seconds: dict[str, list[float]] = {}
    read: list[float] = []
    with store(options.threads, shards, options.page_kib << 10) as place:
        place.plan(shards, hashes=False)
        place.load()
        log = place.folder / "log"
        ways = {
            f"ready_s_{gib}{end}": Way("store", (*STOCK[0].arguments, word), ())
            for end, word in (("", "--no-warmup"), ("_warmup", "--warmup"))
        }
        # The first start of all brings the program itself from the disk.
        ready_seconds(options.engine, place.model(first), ways[f"ready_s_{gib}"], log)
        for run in range(options.runs):
            for key, way in ways.items():
                taken, found = ready_seconds(options.engine, place.model(first), way, log)
                seconds.setdefault(key, []).append(taken)
                read.append(float(found))
                print(f"{run + 1}/{options.runs} {key}: {taken:.2f} s, {found} bytes read", flush=True)
    figures: dict[str, float] = {}
    for key, values in seconds.items():
        figures |= record.spread(key, values)
    return figures | record.spread(f"ready_{gib}_read_bytes", read)


def others_after_crash(options: argparse.Namespace, first: Path) -> dict[str, float]:
    """Return the seconds until servers without a store answer again, the page cache as a crash leaves it."""
    shards = shards_of(first)
    ways, runs = servers_of(options, options.page_kib << 10), max(1, options.runs // 2)
    figures: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for shard in shards:
        subprocess.run(["cat", str(shard)], stdout=subprocess.DEVNULL, check=True)
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            for name, (build, way) in ways.items():
                for end, word in (("", "--no-warmup"), ("_warmup", "--warmup")):
                    key = f"ready_s_{name}{end}"
                    asked = Way(way.name, (*way.arguments, word), way.environment)
                    taken, found = ready_seconds(build, first, asked, Path(folder) / "log")
                    seconds.setdefault(key, []).append(taken)
                    print(f"{run + 1}/{runs} {key}: {taken:.2f} s, {found} bytes read", flush=True)
    for key, values in seconds.items():
        figures |= record.spread(key, values)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print each run, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", type=Path, default=Path("/opt/llama.cpp/current/bin"), help="bin directory")
    parser.add_argument("--stock", type=Path, help="bin directory of a build without patches, by default the same one")
    parser.add_argument("--model", type=Path, required=True, help="first shard of the model for the cold loads")
    parser.add_argument("--ready", type=Path, nargs="*", default=[], help="first shards of models for the crashes")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way")
    parser.add_argument("--threads", type=int, default=8, help="readers")
    parser.add_argument("--page-kib", type=int, choices=(GIB >> 10, MIB2 >> 10), default=GIB >> 10, help="of the store")
    parser.add_argument(
        "--whole", type=Path, help="first shard of a model that is loaded into pages of 1 GiB after all"
    )
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/load.json")
    options = parser.parse_args(argv)
    page_bytes = options.page_kib << 10
    most = max(pages_of(shards_of(first), page_bytes) for first in [options.model, *options.ready])
    figures = {"page_mib": float(page_bytes >> 20)}
    with pool(most, page_bytes, OWNER):
        figures |= cold(options, options.model, page_bytes)
        figures |= others_after_crash(options, options.model)
        for first in options.ready:
            figures |= after_crash(options, first)
    if options.whole:
        with pool(pages_of(shards_of(options.whole)), GIB, OWNER):
            found = cold(options, options.whole, GIB)
        figures |= {key if "anonymous" in key else f"whole_{key}": value for key, value in found.items()}
    command = ["python3", "-m", "bench.load", "--runs", str(options.runs), "--threads", str(options.threads)]
    command += ["--page-kib", str(options.page_kib)]
    for word, models in (("--model", [options.model]), ("--ready", options.ready), ("--whole", [options.whole])):
        names = [f"{first.parent.name}/{first.name}" for first in models if first]
        command += [word, *names] if names else []
    record.keep("load", command, figures, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
