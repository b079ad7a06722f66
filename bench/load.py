#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast weights come from a cold disk, and how soon a server on a store answers after a crash.

Cold, in turns, the page cache dropped before each: stock mmap, stock ``--load-mode dio``, our patch's anonymous pages
(each from the server's start to ready, without warm-up), our loader into a store (its whole run, hashes off and on),
and the raw rate of the same files with O_DIRECT at the same parallelism, into memory that is thrown away.

After a crash: a server on a store is killed and started again, with and without the engine's warm-up; what the disks
read meanwhile is counted. Needs root, for the page cache, the mount and the pages.

    python3 -m bench.load --engine /opt/llama.cpp/current/bin --model a-00001-of-00002.gguf --ready b.gguf c.gguf
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import record
from bench.load_anonymous import GIB, STOCK, Way, anonymous, drop_page_cache, load_seconds, server, shards_of
from lab import pages as lab_pages

CLONE = Path(__file__).resolve().parent.parent
LOADER = CLONE / "roles" / "systemd_service" / "files" / "llama_weights.py"
OWNER = "bench-load"
CHUNK = 16 << 20


def pages_of(shards: Sequence[Path]) -> int:
    """Return the pages of 1 GiB that hold the shards, each rounded up by itself."""
    return sum(-(-shard.stat().st_size // GIB) for shard in shards)


def raw_seconds(shards: Sequence[Path], threads: int) -> float:
    """Return the seconds that so many threads need to read the files with O_DIRECT."""
    chunks = [(shard, at) for shard in shards for at in range(0, shard.stat().st_size, CHUNK)]
    files = {shard: os.open(shard, os.O_RDONLY | os.O_DIRECT) for shard in shards}
    lock, failures = threading.Lock(), []

    def work() -> None:
        with mmap.mmap(-1, CHUNK) as buffer:
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


class Store:
    """A mounted store, its loader's plan and run-time directory."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Use a folder that is to hold the mount."""
        self.folder, self.threads = folder, threads
        self.mounted, self.run = folder / "store", folder / "run"

    def plan(self, shards: Sequence[Path], hashes: bool) -> None:
        """Write the loader's plan; a hash is made only where one is compared."""

        def sha256(path: Path) -> str:
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

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
            "page_bytes": GIB,
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
def store(threads: int, pages: int) -> Iterator[Store]:
    """Mount a store for a while, its pages free before and after."""
    with tempfile.TemporaryDirectory() as name:
        it = Store(Path(name), threads)
        it.mounted.mkdir()
        it.run.mkdir()
        options = f"pagesize=1G,size={pages}G"
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", options, "hugetlbfs", str(it.mounted)], check=True)
        try:
            yield it
        finally:
            subprocess.run(["umount", str(it.mounted)], check=True)


def disk_bytes() -> int:
    """Return the bytes that all disks have read since the boot (Documentation/admin-guide/iostats.rst)."""
    rows = [line.split() for line in Path("/proc/diskstats").read_text(encoding="ascii").splitlines()]
    return sum(int(row[5]) * 512 for row in rows if not row[2].startswith(("loop", "ram", "dm-")))


def ready_seconds(engine: Path, model: Path, arguments: Sequence[str], log: Path) -> float:
    """Return the seconds from a server's start until it answers; it is killed then, as in a crash."""
    begin = time.monotonic()
    with server(engine, model, Way("store", tuple(arguments), ()), log) as (process, port):
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                seconds = time.monotonic() - begin
                process.kill()
                return seconds
            time.sleep(0.005)
    raise RuntimeError(f"the server ended\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def cold(engine: Path, first: Path, runs: int, threads: int) -> dict[str, float]:
    """Return the cold rates of every way, in 10^9 bytes per second."""
    shards = shards_of(first)
    size, pages = sum(shard.stat().st_size for shard in shards), pages_of(shards)
    servers = {"stock_mmap": STOCK[0], "stock_dio": STOCK[1], "anonymous": anonymous(threads)}
    names = ("raw", "ours", "ours_hashed", *servers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in range(runs):
        for name in names:
            if name == "raw":
                drop_page_cache()
                taken = raw_seconds(shards, threads)
            elif name in servers:
                taken = load_seconds(engine, first, servers[name])
            else:
                with store(threads, pages) as place:
                    place.plan(shards, hashes=name == "ours_hashed")
                    drop_page_cache()
                    taken = place.load()
            seconds[name].append(taken)
            print(f"{run + 1}/{runs} {name}: {taken:.2f} s, {size / taken / 1e9:.2f} GB/s", flush=True)
    figures = {"cold_model_gib": round(size / GIB, 3)}
    for name, values in seconds.items():
        key = "raw_gb_s" if name == "raw" else f"cold_gb_s_{name}"
        figures |= record.spread(key, [size / value / 1e9 for value in values])
    # In turns, so that what the machine does meanwhile hits both sides of each ratio.
    pairs = zip(seconds["raw"], seconds["ours"], strict=True)
    figures |= record.spread("ours_of_raw", [raw / ours for raw, ours in pairs])
    pairs = zip(seconds["stock_mmap"], seconds["ours"], strict=True)
    return figures | record.spread("ours_of_stock_mmap", [stock / ours for stock, ours in pairs])


def after_crash(engine: Path, first: Path, runs: int, threads: int) -> dict[str, float]:
    """Return the seconds until a server on a store answers again, and the bytes that disks read meanwhile."""
    shards = shards_of(first)
    name = f"ready_s_{sum(shard.stat().st_size for shard in shards) / GIB:.0f}gib"
    seconds: dict[str, list[float]] = {name: [], f"{name}_warmup": []}
    read = []
    with store(threads, pages_of(shards)) as place:
        place.plan(shards, hashes=False)
        place.load()
        log = place.folder / "log"
        ready_seconds(engine, place.model(first), ["--no-warmup"], log)
        for run in range(runs):
            for key, words in ((name, ["--no-warmup"]), (f"{name}_warmup", ["--warmup"])):
                before = disk_bytes()
                seconds[key].append(ready_seconds(engine, place.model(first), words, log))
                read.append(float(disk_bytes() - before))
                print(f"{run + 1}/{runs} {key}: {seconds[key][-1]:.2f} s, {read[-1]:.0f} bytes read", flush=True)
    figures: dict[str, float] = {}
    for key, values in seconds.items():
        figures |= record.spread(key, values)
    return figures | record.spread(f"{name}_read_bytes", read)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print each run, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", type=Path, default=Path("/opt/llama.cpp/current/bin"), help="bin directory")
    parser.add_argument("--model", type=Path, required=True, help="first shard of the model for the cold loads")
    parser.add_argument("--ready", type=Path, nargs="*", default=[], help="first shards of models for the crashes")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way")
    parser.add_argument("--threads", type=int, default=8, help="readers")
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/load.json")
    options = parser.parse_args(argv)
    most = max(pages_of(shards_of(first)) for first in [options.model, *options.ready])
    lab_pages.reserve(most, OWNER)
    try:
        figures = cold(options.engine, options.model, options.runs, options.threads)
        for first in options.ready:
            figures |= after_crash(options.engine, first, options.runs, options.threads)
    finally:
        lab_pages.release(OWNER)
    command = ["python3", "-m", "bench.load", "--runs", str(options.runs), "--threads", str(options.threads)]
    command += ["--model", options.model.name, "--ready", *(first.name for first in options.ready)]
    record.keep("load", command, figures, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
