#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much faster the patched kernels are than stock of the same tree: prefill, decode, and decode after 4,096 tokens.

Stock and patched take turns on the same model, so that a change in the machine's load hits both. A run is thrown away,
and measured again, when something else than the kernels decided it: other processes that took the CPUs, weights that
came from the disk or lay in pages of another size or on several nodes. Needs root, for the 1 GiB pages.

    python3 -m bench.kernels --stock DIR/bin --patched DIR/bin --model moe.gguf --dense llama.gguf

The 1 GiB pages are reserved and compared first: what lacks of them shows at once, and not after the long comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ansible_collections.cpullm.epyc.plugins.module_utils import _gguf

from bench import record, watched
from bench.load_anonymous import pages_of
from lab import pages as lab_pages

GIB = 1 << 30
OWNER = "kernels"


@dataclass(frozen=True)
class Point:
    """What is measured: so many tokens of prefill or decode, after so many others, with so many threads."""

    prompt: int
    generated: int
    depth: int
    threads: int

    @property
    def name(self) -> str:
        """The name that the results have."""
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return what + (f"_d{self.depth}" if self.depth else "") + f"_t{self.threads}"


POINTS = (
    Point(512, 0, 0, 1),
    Point(512, 0, 0, 2),
    Point(0, 64, 0, 1),
    Point(0, 64, 0, 2),
    Point(0, 32, 4096, 2),
)
# What the sizes of pages are compared at.
PAGES = tuple(point for point in POINTS if point.threads == 2)


@dataclass
class Watch:
    """What a running benchmark looked like: where its weights lay, and what others did."""

    huge_kib: int = 0
    nodes: dict[int, int] = field(default_factory=dict)

    def look(self, pid: int) -> None:
        """Take in what the kernel says of a process now."""
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            maps = Path(f"/proc/{pid}/numa_maps").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        found = re.search(r"^HugetlbPages:\s+(\d+) kB$", status, re.M)
        self.huge_kib = max(self.huge_kib, int(found[1]) if found else 0)
        seen: dict[int, int] = {}
        for line in maps.splitlines():
            size = int(size_found[1]) if (size_found := re.search(r"kernelpagesize_kB=(\d+)", line)) else 4
            for node, count in re.findall(r"\bN(\d+)=(\d+)", line):
                seen[int(node)] = seen.get(int(node), 0) + int(count) * size
        if sum(seen.values()) >= sum(self.nodes.values()):
            self.nodes = seen


def objections(
    watch: Watch, size: int, huge: bool, others: float, faults: int, limits: argparse.Namespace
) -> list[str]:
    """Return the reasons why a run does not count; `others` is the share of the CPUs' time that was not the run's."""
    found = []
    if others > limits.others:
        found.append(f"others took {others:.0%} of the CPUs, expected at most {limits.others:.0%}")
    if faults > limits.faults:
        found.append(f"{faults} pages came from the disk, expected at most {limits.faults}")
    if huge and watch.huge_kib * 1024 < size:
        found.append(f"{watch.huge_kib} kB lay in 1 GiB pages, expected the model's {size} bytes")
    if not huge and watch.huge_kib:
        found.append(f"{watch.huge_kib} kB lay in 1 GiB pages, expected none")
    total = sum(watch.nodes.values())
    if total and max(watch.nodes.values()) < 0.98 * total:
        found.append(f"memory lay on several nodes ({watch.nodes} kB); expected one: use numactl")
    return found


def run_once(
    engine: Path, model: Path, size: int, point: Point, huge: bool, limits: argparse.Namespace
) -> tuple[float, list[str]]:
    """Return tokens per second of one run, and why it does not count; RuntimeError where it failed."""
    argv = ["nice", "-n", "-20", str(engine / "llama-bench"), "-m", str(model), "-fa", "on", "--repack", "0"]
    argv += ["-p", str(point.prompt), "-n", str(point.generated), "-d", str(point.depth), "-t", str(point.threads)]
    argv += ["-r", "1", "-o", "json"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_"))}
    if huge:
        clean["LLAMA_WEIGHTS_HUGEPAGES"] = "require"
    else:
        # A run with 1 GiB pages drops the file from the page cache, and what reads it anew is slower for seconds.
        subprocess.run(["cat", str(model)], stdout=subprocess.DEVNULL, check=True)
    watch = Watch()
    # Less and less often: the kernel looks at each 4 KiB page, on a CPU that the run has, too.
    done = watched.run(argv, clean, watch.look, (0.25 * 2**number for number in itertools.count()))
    if done.status:
        raise RuntimeError(f"llama-bench: exit {done.status}\n{done.errors[-2000:]}")
    (result,) = json.loads(done.output)
    return float(result["avg_ts"]), objections(watch, size, huge, done.others, done.major_faults, limits)


def measure(engine: Path, model: Path, point: Point, huge: bool, limits: argparse.Namespace) -> float:
    """Return tokens per second of a run that counts; RuntimeError where none of some tries does."""
    size = model.stat().st_size
    for _try in range(limits.tries):
        rate, reasons = run_once(engine, model, size, point, huge, limits)
        if not reasons:
            return rate
        print(f"thrown away: {point.name} with {rate:.2f} tok/s: {'; '.join(reasons)}", file=sys.stderr, flush=True)
    raise RuntimeError(f"{point.name}: no run of {limits.tries} counts; the last: {'; '.join(reasons)}")


def compare(
    name: str,
    ways: Sequence[tuple[str, Path, bool]],
    model: Path,
    points: Sequence[Point],
    runs: int,
    limits: argparse.Namespace,
) -> dict[str, float]:
    """Return rates of two ways in turn, and the ratios of the second to the first, each with its spread."""
    figures: dict[str, float] = {}
    for point in points:
        rates: dict[str, list[float]] = {way: [] for way, _engine, _huge in ways}
        for run in range(runs):
            for way, engine, huge in ways:
                rates[way].append(measure(engine, model, point, huge, limits))
            told = ", ".join(f"{way} {values[-1]:.2f}" for way, values in rates.items())
            print(f"{run + 1}/{runs} {name}{point.name}: {told} tok/s", flush=True)
        (first, _, _), (second, _, _) = ways
        ratios = [after / before for before, after in zip(rates[first], rates[second], strict=True)]
        figures |= record.spread(f"{name}{point.name}_ratio", ratios)
        for way, values in rates.items():
            figures |= record.spread(f"{name}{point.name}_{way}", values)
    return figures


def read_per_token(model: Path) -> int:
    """Return the bytes of weights that one token of decode reads."""
    header = _gguf.read_header(_gguf.FileSource(str(model)))
    return sum(part.read_per_token for part in _gguf.describe_model([(model.name, header)]).parts)


def bandwidth(engine: Path, threads: int) -> dict[str, float]:
    """Return the rate at which as many CPUs read memory, in 10^9 bytes per second, with its spread."""
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    argv = ["nice", "-n", "-20", str(engine / "cpullm-bandwidth"), "--cpus", cpus, "--seconds", "2"]
    rates = []
    for _run in range(3):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"cpullm-bandwidth: exit {done.returncode}\n{done.stderr[-2000:]}")
        rates.append(float(json.loads(done.stdout)["gbs"]))
    return record.spread(f"read_bandwidth_t{threads}_gbs", rates)


def shares(figures: dict[str, float], weights: int, threads: int) -> dict[str, float]:
    """Return which part of the measured read bandwidth decode reaches, from the extremes of both."""
    gbs, name = f"read_bandwidth_t{threads}_gbs", f"tg64_t{threads}_patched"
    middle, low, high = (
        figures[name + rate] * weights / 1e9 / figures[gbs + read]
        for rate, read in (("", ""), ("_min", "_max"), ("_max", "_min"))
    )
    share = f"tg64_t{threads}_share_of_bandwidth"
    return {share: round(middle, 3), f"{share}_min": round(low, 3), f"{share}_max": round(high, 3)}


def table(figures: Mapping[str, float]) -> list[str]:
    """Return a line for each ratio, with the rates that it came from, and for decode's share of the read bandwidth."""

    def told(name: str, digits: int) -> str:
        middle, low, high = (f"{figures[name + end]:.{digits}f}" for end in ("", "_min", "_max"))
        return f"{middle} ({low} to {high})"

    lines = [f"{'':20} {'tok/s':>32} {'tok/s':>32}   ratio"]
    for ratio in (name for name in figures if name.endswith("_ratio")):
        name = ratio.removesuffix("_ratio")
        first, second = ("4k", "1g") if name.startswith("pages_") else ("stock", "patched")
        rates = " ".join(f"{f'{way} ' + told(f'{name}_{way}', 2):>32}" for way in (first, second))
        lines.append(f"{name:20} {rates}   {told(ratio, 3)}")
    for share in (name for name in figures if name.endswith("_share_of_bandwidth")):
        threads = share.removesuffix("_share_of_bandwidth")[-2:]
        lines.append(f"{share}: {told(share, 3)} of {told(f'read_bandwidth_{threads}_gbs', 1)} GB/s")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print each run, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--stock", type=Path, required=True, help="bin directory of the build without patches")
    parser.add_argument("--patched", type=Path, required=True, help="bin directory of the build with them")
    parser.add_argument("--model", type=Path, required=True, help="a mixture of experts in one file")
    parser.add_argument("--dense", type=Path, help="a dense model in one file")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way that count")
    parser.add_argument("--runs-beside", type=int, default=3, help="the same for page sizes and the dense model")
    parser.add_argument("--tries", type=int, default=5, help="runs until one must count")
    parser.add_argument("--others", type=float, default=0.1, help="share of the CPUs that others may take in a run")
    parser.add_argument("--faults", type=int, default=100, help="pages that may come from the disk in a run")
    parser.add_argument("--pages-model", type=Path, help="a smaller mixture for the page sizes, where pages are few")
    parser.add_argument("--no-pages", action="store_true", help="leave out the comparison of page sizes")
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/")
    options = parser.parse_args(argv)

    paged = options.pages_model or options.model
    weights = read_per_token(options.model)
    figures = {
        "model_gib": round(options.model.stat().st_size / GIB, 3),
        "read_per_token_gb": round(weights / 1e9, 3),
        "numa_nodes": float(len(lab_pages.nodes())),
    }
    if not options.no_pages:
        figures["pages_model_gib"] = round(paged.stat().st_size / GIB, 3)
        lab_pages.reserve(pages_of([paged]), OWNER)
        try:
            ways = [("4k", options.patched, False), ("1g", options.patched, True)]
            figures |= compare("pages_", ways, paged, PAGES, options.runs_beside, options)
        finally:
            lab_pages.release(OWNER)
    figures |= bandwidth(options.patched, 1) | bandwidth(options.patched, 2)
    both = [("stock", options.stock, False), ("patched", options.patched, False)]
    figures |= compare("", both, options.model, POINTS, options.runs, options)
    figures |= shares(figures, weights, 1) | shares(figures, weights, 2)
    if options.dense:
        figures |= compare("dense_", both, options.dense, POINTS, options.runs_beside, options)

    print("\n".join(table(figures)))
    command = ["python3", "-m", "bench.kernels", "--runs", str(options.runs), "--model", options.model.name]
    command += ["--runs-beside", str(options.runs_beside)] + (["--dense", options.dense.name] if options.dense else [])
    command += ["--no-pages"] if options.no_pages else ["--pages-model", paged.name]
    record.keep("kernels", command, figures, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
