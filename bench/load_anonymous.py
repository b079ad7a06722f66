#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast llama-server loads a model from cold: anonymous 1 GiB pages against stock mmap and `--load-mode dio`.

Each run drops the page cache, starts the server, and takes the time until it reports ready, without warm-up. The ways
take turns, so that a change in the machine's load hits all of them. Needs root, for the page cache and the pages.

    python3 -m bench.load_anonymous --engine /opt/llama.cpp/current/bin --model big-00001-of-00002.gguf
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import record
from lab import pages as lab_pages

GIB = 1 << 30
OWNER = "load-anonymous"


@dataclass(frozen=True)
class Way:
    """One way to load: the server's arguments and environment."""

    name: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


def anonymous(threads: int) -> Way:
    """Return the way of our patch with that many readers."""
    variables = (("LLAMA_WEIGHTS_HUGEPAGES", "require"), ("LLAMA_WEIGHTS_THREADS", str(threads)))
    return Way(f"anonymous_{threads}_threads", ("--load-mode", "mmap"), variables)


STOCK = (Way("mmap", ("--load-mode", "mmap"), ()), Way("dio", ("--load-mode", "dio"), ()))


def shards_of(first: Path) -> list[Path]:
    """Return all shards of a model, given its first."""
    return sorted(first.parent.glob(first.name.replace("-00001-of-", "-*-of-")))


def pages_of(shards: Sequence[Path], page_bytes: int = GIB) -> int:
    """Return the pages that hold the shards, each rounded up by itself."""
    return sum(-(-shard.stat().st_size // page_bytes) for shard in shards)


def drop_page_cache() -> None:
    """Make the next read come from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")


def back_memory(size: int) -> None:
    """Touch that much free memory and give it back.

    Where a hypervisor takes free memory away, the first touch of each page is a fault of the hypervisor, many times as
    dear as the kernel's own. No real host has that, so it must not decide which way is the fastest.
    """
    with mmap.mmap(-1, size) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            area[at] = 1


@contextlib.contextmanager
def server(engine: Path, model: Path, way: Way, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a server, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [
        str(engine / "llama-server"),
        *("-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "256", "-np", "1"),
        *("--fit", "off", "--no-repack", "--no-warmup", "-lv", "4"),
        *way.arguments,
    ]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_")}
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env={**clean, **dict(way.environment)})
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait()


def await_ready(process: subprocess.Popen[bytes], port: int, name: str, log: Path, pause_s: float) -> None:
    """Return once a server says that it is ready; RuntimeError with its log when it ends instead."""
    while process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(pause_s)
    raise RuntimeError(f"{name}: the server ended\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def load_seconds(engine: Path, model: Path, way: Way) -> float:
    """Return the seconds from the server's start to ready; RuntimeError with its log when it ends instead."""
    drop_page_cache()
    back_memory(sum(shard.stat().st_size for shard in shards_of(model)))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        start = time.monotonic()
        with server(engine, model, way, log) as (process, port):
            await_ready(process, port, way.name, log, pause_s=0.01)
            seconds = time.monotonic() - start
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"^HugetlbPages:\s+(\d+) kB$", status, re.M)
        if found is None or bool(int(found[1])) != bool(way.environment):
            raise RuntimeError(f"{way.name}: HugetlbPages is {found[1] if found else 'not shown'}")
        return seconds


def summarise(size: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return median, least and largest rate in GiB/s, and the median of the seconds, for each way."""
    figures = {"model_gib": round(size / GIB, 3)}
    for name, values in seconds.items():
        figures |= record.spread(f"{name}_gib_per_s", [size / GIB / value for value in values])
        figures[f"{name}_s"] = round(statistics.median(values), 3)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print each run, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", type=Path, default=Path("/opt/llama.cpp/current/bin"), help="bin directory")
    parser.add_argument("--model", type=Path, required=True, help="first shard")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8], help="readers of the anonymous way")
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/")
    options = parser.parse_args(argv)

    shards = shards_of(options.model)
    size = sum(shard.stat().st_size for shard in shards)
    ways = [*map(anonymous, options.threads), *STOCK]
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    lab_pages.reserve(pages_of(shards), OWNER)
    try:
        for run in range(options.runs):
            for way in ways:
                taken = load_seconds(options.engine, options.model, way)
                seconds[way.name].append(taken)
                print(f"{run + 1}/{options.runs} {way.name}: {taken:.2f} s, {size / GIB / taken:.2f} GiB/s", flush=True)
    finally:
        lab_pages.release(OWNER)

    command = ["python3", "-m", "bench.load_anonymous", "--runs", str(options.runs)]
    command += ["--threads", *map(str, options.threads), "--model", options.model.name]
    record.keep("load_anonymous", command, summarise(size, seconds), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
