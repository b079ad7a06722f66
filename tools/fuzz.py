#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fuzz the targets of tests/fuzz/targets.py for some CPU time each, and write bench/results/fuzz.json.

A target fails when an input raises (a promise of tests/fuzz/targets.py is broken), takes more CPU time than
tests/fuzz/run.py allows or TIMEOUT_S by the clock, or takes more than MEMORY_MIB, and when the process grows from the
second to the last quarter of its time by more than GROWTH_MIB. What was found goes on growing in
$CPULLM_CACHE/fuzz/TARGET, so that a later run starts where this one stopped. A target's figures stay in the results
until its parsers change: a run in pieces gives the same file as a whole one. Failing inputs and libFuzzer's logs are in
build/fuzz/.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import inspect
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parent.parent
for entry in (CLONE, CLONE / ".collections"):
    sys.path.insert(0, str(entry))

from bench import record  # noqa: E402  (the clone is not installed)
from tests.fuzz import targets  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

KEPT = CLONE / "tests" / "fuzz" / "corpus"
CACHE = Path(os.environ.get("CPULLM_CACHE", Path.home() / ".cache" / "cpullm")) / "fuzz"
LOGS = CLONE / "build" / "fuzz"
RESULT = CLONE / "bench" / "results" / "fuzz.json"
MODULES = CLONE / "plugins" / "module_utils"

# For what sleeps, and on a machine that is busy with other work.
TIMEOUT_S = 300
MEMORY_MIB = 1024
# The interpreter's own memory moves by a few MiB; 600,000 runs that keep 60 bytes each pass this.
GROWTH_MIB = 32
# Of each target's minimised inputs the smallest are kept, up to this.
KEPT_BYTES = 64 << 10
SHOWN_EVERY_S = 10.0

_PULSE = re.compile(r"#(?P<runs>\d+)\s+\w+\s+cov: (?P<coverage>\d+) ft: \d+ corp: (?P<inputs>\d+)/")
_FINAL = re.compile(r"stat::number_of_executed_units: (\d+)")


@dataclass(frozen=True)
class Outcome:
    """How one target ended; `failure` is None, or what went wrong."""

    target: str
    seconds: float
    runs: int
    coverage: int
    inputs: int
    peak_mib: float
    growth_mib: float
    failure: str | None

    def figures(self) -> dict[str, float]:
        """Return the outcome as figures of a result."""
        return {
            f"{self.target}_seconds": round(self.seconds, 1),
            f"{self.target}_runs": self.runs,
            f"{self.target}_coverage": self.coverage,
            f"{self.target}_inputs": self.inputs,
            f"{self.target}_crashes": 0 if self.failure is None else 1,
            f"{self.target}_peak_rss_mib": round(self.peak_mib, 1),
            f"{self.target}_rss_growth_mib": round(self.growth_mib, 1),
        }


def usage(pid: int) -> tuple[float, float]:
    """Return the CPU seconds and resident MiB of a process; proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """Return by how many MiB the last quarter's median lies above the second quarter's, of (CPU seconds, MiB)."""
    end = samples[-1][0] if samples else 0.0
    second = [mib for at, mib in samples if end / 4 <= at < end / 2]
    last = [mib for at, mib in samples if at >= end * 3 / 4]
    return statistics.median(last) - statistics.median(second) if second and last else 0.0


def dictionary(target: str) -> Path:
    """Write the words of a target as libFuzzer reads them, and return the file."""
    path = LOGS / f"{target}.dict"
    lines = ["".join(f"\\x{byte:02x}" for byte in word.encode()) for word in TARGETS[target].words]
    path.write_text("".join(f'"{line}"\n' for line in lines), encoding="ascii")
    return path


def libfuzzer(target: str, *words: str) -> list[str]:
    """Return the command that runs libFuzzer on a target."""
    return [sys.executable, "-m", "tests.fuzz.run", target, f"-rss_limit_mb={MEMORY_MIB}", *words]


def fuzz(target: str, seconds: float) -> Outcome:
    """Fuzz one target for this CPU time, with a line of progress now and then."""
    corpus, kept, log = CACHE / target, KEPT / target, LOGS / f"{target}.log"
    seed = random.randrange(1, 1 << 31)  # noqa: S311 - a seed to repeat a run with, no secret
    for folder in (corpus, kept):
        folder.mkdir(parents=True, exist_ok=True)
    command = libfuzzer(
        target,
        f"-timeout={TIMEOUT_S}",
        f"-seed={seed}",
        f"-dict={dictionary(target)}",
        f"-artifact_prefix={LOGS}/{target}-",
        "-print_final_stats=1",
        str(corpus),
        str(kept),
    )
    print(f"{target}: seed {seed}, {seconds:.0f} s of CPU time", flush=True)
    samples: list[tuple[float, float]] = []
    pulse: re.Match[str] | None = None
    asked = False
    shown = time.monotonic()
    with log.open("wb") as out, log.open("r", encoding="utf-8", errors="replace") as written:
        process = subprocess.Popen(command, cwd=CLONE, stdout=out, stderr=out)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                pulse = ([pulse, *_PULSE.finditer(written.read())])[-1]
                try:
                    samples.append(usage(process.pid))
                except (OSError, IndexError):
                    break
                if samples[-1][0] >= seconds and not asked:
                    process.send_signal(signal.SIGUSR1)
                    asked = True
                if time.monotonic() - shown >= SHOWN_EVERY_S and pulse:
                    shown = time.monotonic()
                    print(
                        f"{target}: {samples[-1][0]:.0f} of {seconds:.0f} s, {pulse['runs']} runs, coverage "
                        f"{pulse['coverage']}, {pulse['inputs']} inputs, {samples[-1][1]:.0f} MiB",
                        flush=True,
                    )
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    pulse = ([pulse, *_PULSE.finditer(text)])[-1]
    final = _FINAL.search(text)
    grown = growth(samples)
    failure = None
    if status != 0 or not asked:
        _before, found, after = text.partition("=== Uncaught Python exception: ===")
        failure = f"libFuzzer ended with {status}\n" + (after if found else text)[-3000:]
    elif grown > GROWTH_MIB:
        failure = f"the process grew by {grown:.1f} MiB, at most {GROWTH_MIB} are expected"
    return Outcome(
        target,
        samples[-1][0] if samples else 0.0,
        int(final[1]) if final else 0,
        int(pulse["coverage"]) if pulse else 0,
        int(pulse["inputs"]) if pulse else 0,
        max((mib for _at, mib in samples), default=0.0),
        grown,
        failure,
    )


def sources(target: str) -> set[str]:
    """Return what decides how a target ends, as paths in the clone: the harness, and each module that is named.

    Modules are followed by name, from the target's function through its helpers and from module to module.
    """
    found = {"tests/fuzz/targets.py", "tests/fuzz/run.py", "tests/fuzz/mutate.py"}
    seen: set[str] = set()
    todo = [TARGETS[target].run.__name__]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        module = MODULES / f"{name}.py"
        if module.exists():
            found.add(str(module.relative_to(CLONE)))
            todo += re.findall(r"(?<!\w)_\w+", module.read_text(encoding="utf-8"))
        elif getattr(vars(targets).get(name), "__module__", None) == targets.__name__:
            todo += re.findall(r"(?<![.\w])(?:_\w+|\w+(?=\())", inspect.getsource(vars(targets)[name]))
    return found


def still_true(before: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a result that this machine would find again: of targets whose sources are the same."""
    changed = record.changed_since(before)
    if changed is None:
        return {}
    same = [target for target in TARGETS if not sources(target) & changed]
    return {name: figure for name, figure in before["figures"].items() if name.startswith(tuple(f"{t}_" for t in same))}


def keep_figures(outcomes: Sequence[Outcome], command: Sequence[str]) -> None:
    """Write the figures; those of targets that did not run now stay where they still hold."""
    figures = still_true(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.exists() else {}
    for outcome in outcomes:
        figures.update(outcome.figures())
    record.keep("fuzz", command, dict(sorted(figures.items())))


def keep(target: str) -> None:
    """Replace the kept inputs of a target by the smallest of a minimal set with the coverage of all that was found."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "fresh"
        fresh.mkdir()
        command = libfuzzer(target, "-set_cover_merge=1", str(fresh), str(CACHE / target), str(KEPT / target))
        subprocess.run(command, cwd=CLONE, check=True, capture_output=True)
        files = sorted(fresh.iterdir(), key=lambda file: (file.stat().st_size, file.name))
        shutil.rmtree(KEPT / target)
        (KEPT / target).mkdir()
        total = count = 0
        for file in files:
            total += file.stat().st_size
            if total > KEPT_BYTES:
                break
            # The bytes alone: a file's name and times are the run's.
            (KEPT / target / file.name[:12]).write_bytes(file.read_bytes())
            count += 1
    print(f"{target}: kept {count} of {len(files)} inputs", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz the targets, print each outcome, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=600, help="CPU time of each target")
    parser.add_argument("--target", choices=[*TARGETS, ""], action="append", help="one of the targets; all without it")
    parser.add_argument("--jobs", type=int, default=1, help="targets side by side")
    parser.add_argument("--keep", action="store_true", help="replace the kept inputs by a minimised set at the end")
    options = parser.parse_args(argv)
    targets = [target for target in options.target or () if target] or list(TARGETS)
    LOGS.mkdir(parents=True, exist_ok=True)
    words = ["make", "fuzz", f"FUZZ_SECONDS={options.seconds:g}", f"FUZZ_JOBS={options.jobs}"]
    outcomes: list[Outcome] = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=options.jobs) as pool:
        for done in concurrent.futures.as_completed(pool.submit(fuzz, target, options.seconds) for target in targets):
            outcome = done.result()
            outcomes.append(outcome)
            print(
                f"{outcome.target}: {outcome.failure or 'clean'}: {outcome.seconds:.0f} s, {outcome.runs} runs, "
                f"coverage {outcome.coverage}, at most {outcome.peak_mib:.0f} MiB, grown by {outcome.growth_mib:.1f}",
                flush=True,
            )
            keep_figures(outcomes, words)
    failed = [outcome.target for outcome in outcomes if outcome.failure is not None]
    if failed:
        print(f"fuzz: failed: {', '.join(failed)}; the inputs are in {LOGS.relative_to(CLONE)}", file=sys.stderr)
        return 1
    if options.keep:
        for target in targets:
            keep(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
