#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast the engine prefills and decodes with its weights in pages of each size, and what pages do for the KV cache.

In turns on one model: weights in the page cache (4 KiB), in transparent huge pages, and in stores of 2 MiB and 1 GiB
pages; KV cache and buffers in 4 KiB pages but where it says otherwise: with transparent huge pages everywhere, and
with the weights in a store and the rest in transparent ones. What each run really had is read from the kernel, and
a run that had something else, or shared its CPUs with others, is measured again. Needs root.

    python3 -m bench.pages --engine /opt/llama.cpp/current/bin --model a.gguf
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import record, watched
from bench.load import MIB2, pool, store
from bench.load_anonymous import GIB, drop_page_cache, pages_of, shards_of

OWNER = "bench-pages"
THP = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True)
class Way:
    """Where weights lie, and whether ordinary memory may lie in transparent huge pages."""

    name: str
    weights: str
    transparent: bool


WAYS = (
    Way("4k", "page cache", False),
    Way("thp", "memory", True),
    Way("2m", "2 MiB", False),
    Way("2m_kv_thp", "2 MiB", True),
    Way("1g", "1 GiB", False),
    Way("1g_kv_thp", "1 GiB", True),
)
# What all are compared with, and the end of a name that is also compared with the way without it.
BASE, KV = "4k", "_kv_thp"


@dataclass
class Seen:
    """The most of each kind of page that a process had, in bytes."""

    hugetlb: int = 0
    transparent: int = 0

    def look(self, pid: int) -> None:
        """Take in what the kernel says of a process now (proc_pid_status(5), proc_pid_smaps(5))."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
            rolled = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8", errors="replace")
            for name, text, key in (("hugetlb", status, "HugetlbPages"), ("transparent", rolled, "AnonHugePages")):
                if found := re.search(rf"^{key}:\s+(\d+) kB$", text, re.M):
                    setattr(self, name, max(getattr(self, name), int(found[1]) * 1024))


@contextlib.contextmanager
def transparent(wanted: bool) -> Iterator[None]:
    """Let all ordinary memory lie in transparent huge pages, or none, for a while."""
    before = {name: re.search(r"\[(.+?)\]", (THP / name).read_text(encoding="ascii")) for name in ("enabled", "defrag")}
    try:
        (THP / "enabled").write_text("always" if wanted else "never", encoding="ascii")
        # A fault waits for a huge page, so that a run has them from its first token.
        (THP / "defrag").write_text("always", encoding="ascii")
        yield
    finally:
        for name, found in before.items():
            if found:
                (THP / name).write_text(found[1], encoding="ascii")


@contextlib.contextmanager
def weights(way: Way, shards: Sequence[Path], threads: int) -> Iterator[tuple[Path, list[str]]]:
    """Bring the weights where a way has them; yields the first shard and llama-bench's arguments for it."""
    if way.weights == "page cache":
        for shard in shards:
            subprocess.run(["cat", str(shard)], stdout=subprocess.DEVNULL, check=True)
        yield shards[0], ["-lm", "mmap"]
    elif way.weights == "memory":
        yield shards[0], ["-lm", "none"]
    else:
        page = GIB if way.weights == "1 GiB" else MIB2
        # Pages of 1 GiB are kept from the first run to the last: once given back, they may not come together again.
        small = contextlib.nullcontext() if page == GIB else pool(pages_of(shards, page), page, OWNER)
        with small, store(threads, shards, page) as place:
            place.plan(shards, hashes=False)
            place.load()
            yield place.model(shards[0]), ["-lm", "mmap"]


def bench(engine: Path, model: Path, words: Sequence[str], depths: str) -> tuple[dict[str, float], Seen, float]:
    """Return tokens/s by test, the pages that the process had, and the share of the CPUs that others took."""
    argv = ["nice", "-n", "-20", str(engine / "llama-bench"), "-m", str(model), *words, "-fa", "on", "--repack", "0"]
    argv += ["-p", "512", "-n", "64", "-d", depths, "-r", "1", "-o", "json"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_"))}
    seen = Seen()
    done = watched.run(argv, clean, seen.look, itertools.repeat(0.5))
    if done.status:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.status}\n{done.errors[-2000:]}")
    rates = {}
    for row in json.loads(done.output):
        what = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        rates[f"{what}_d{row['n_depth']}"] = float(row["avg_ts"])
    return rates, seen, done.others


def objections(way: Way, seen: Seen, size: int, others: float, limit: float) -> list[str]:
    """Return why a run of a way does not count."""
    found = []
    if others > limit:
        found.append(f"others took {others:.0%} of the CPUs, expected at most {limit:.0%}")
    stored = way.weights in ("2 MiB", "1 GiB")
    if (seen.hugetlb >= size) != stored or (not stored and seen.hugetlb):
        found.append(f"{seen.hugetlb} bytes in hugetlb pages, expected {'the weights' if stored else 'none'}")
    least = 0.9 * size if way.weights == "memory" else MIB2 if way.transparent else 0
    if seen.transparent < least or (seen.transparent and not way.transparent):
        found.append(
            f"{seen.transparent} bytes in transparent huge pages, expected {'at least' if least else 'not over'} "
            f"{least:.0f}"
        )
    return found


def measure(
    engine: Path, way: Way, shards: Sequence[Path], options: argparse.Namespace
) -> tuple[dict[str, float], Seen]:
    """Return tokens/s of a run that counts, and its pages; RuntimeError where none of some tries does."""
    size = sum(shard.stat().st_size for shard in shards)
    reasons: list[str] = []
    for _try in range(options.tries):
        # What others left in the page cache is no room for huge pages.
        drop_page_cache()
        with transparent(way.transparent), weights(way, shards, options.threads) as (model, words):
            rates, seen, others = bench(engine, model, words, options.depths)
        reasons = objections(way, seen, size, others, options.others)
        if not reasons:
            return rates, seen
        print(f"thrown away: {way.name} with {rates}: {'; '.join(reasons)}", file=sys.stderr, flush=True)
    raise RuntimeError(f"{way.name}: no run of {options.tries} counts; the last: {'; '.join(reasons)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print each run, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", type=Path, default=Path("/opt/llama.cpp/current/bin"), help="bin directory")
    parser.add_argument("--model", type=Path, required=True, help="first shard")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way that count")
    parser.add_argument("--tries", type=int, default=3, help="runs until one must count")
    parser.add_argument("--others", type=float, default=0.1, help="share of the CPUs that others may take in a run")
    parser.add_argument("--ways", default=",".join(way.name for way in WAYS), help=f"beside {BASE}, by default all")
    parser.add_argument("--depths", default="0,4096", help="tokens of context before what is measured")
    parser.add_argument("--threads", type=int, default=8, help="readers of the loader")
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/pages.json")
    options = parser.parse_args(argv)
    chosen = set(options.ways.split(","))
    if unknown := chosen - {way.name for way in WAYS}:
        known = ", ".join(way.name for way in WAYS)
        parser.error(f"--ways {options.ways}: {', '.join(sorted(unknown))} is unknown, expected some of {known}")
    shards = shards_of(options.model)
    ways = [way for way in WAYS if way.name == BASE or way.name in chosen]
    rates: dict[str, dict[str, list[float]]] = {way.name: {} for way in ways}
    held: dict[str, list[float]] = {way.name: [] for way in ways}
    whole = pages_of(shards) if any(way.weights == "1 GiB" for way in ways) else 0
    with pool(whole, GIB, OWNER):
        for run in range(options.runs):
            # There and back, so that what the machine does meanwhile hits both sides of a ratio.
            for way in ways if run % 2 == 0 else reversed(ways):
                found, seen = measure(options.engine, way, shards, options)
                held[way.name].append(seen.transparent / (1 << 20))
                for test, rate in found.items():
                    rates[way.name].setdefault(test, []).append(rate)
                told = ", ".join(f"{test} {rate:.2f}" for test, rate in found.items())
                print(f"{run + 1}/{options.runs} {way.name}: {told} tok/s", flush=True)
    figures: dict[str, float] = {"model_gib": round(sum(shard.stat().st_size for shard in shards) / GIB, 3)}
    for way in ways:
        figures |= record.spread(f"transparent_mib_{way.name}", held[way.name])
        for test, values in rates[way.name].items():
            figures |= record.spread(f"{test}_{way.name}", values)
            for base in (BASE, way.name.removesuffix(KV)):
                if base != way.name and base in rates:
                    pairs = zip(values, rates[base][test], strict=True)
                    figures |= record.spread(f"{test}_{way.name}_of_{base}", [ours / theirs for ours, theirs in pairs])
    command = ["python3", "-m", "bench.pages", "--runs", str(options.runs), "--depths", options.depths]
    command += ["--ways", options.ways]
    command += ["--model", f"{options.model.parent.name}/{options.model.name}"]
    record.keep("pages", command, figures, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
