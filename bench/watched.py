# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a benchmark's program, look at it while it runs, and tell how much of the machine others had meanwhile."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """How a program ended: exit status, output, errors, the CPUs' share that others took, pages from the disk."""

    status: int
    output: str
    errors: str
    others: float
    major_faults: int


def busy_ticks() -> int:
    """Return the ticks that all CPUs have worked, or were held back by the hypervisor, since the start."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, first[:8])
    return user + nice + system + irq + softirq + steal


def run(
    argv: Sequence[str], environment: Mapping[str, str], look: Callable[[int], None], pauses: Iterable[float]
) -> Run:
    """Run a program to its end; `look` gets its process after each of the pauses, in seconds."""
    before, over = busy_ticks(), threading.Event()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):

        def keep_watch() -> None:
            for pause in pauses:
                if over.wait(pause):
                    return
                look(process.pid)

        watcher = threading.Thread(target=keep_watch)
        watcher.start()
        try:
            output = process.stdout.read() if process.stdout else ""
            # wait4 tells what this one child used.
            _pid, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            over.set()
            watcher.join()
            if process.returncode is None:
                process.kill()
        busy = (busy_ticks() - before) / TICK
        others = max(0.0, busy - usage.ru_utime - usage.ru_stime) / max(busy, 1e-9)
        errors.seek(0)
        return Run(process.returncode, output, errors.read(), others, usage.ru_majflt)
