# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure for about a second how fast a disk is read past the page cache, as the loader of the weights reads."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

READERS = 4
BLOCK_BYTES = 8 << 20
# Less is over before the disk's queue is full.
LEAST_BYTES = 256 << 20
MOST_BYTES = 8 << 30
SECONDS = 1.0


class Unmeasured(Exception):
    """The read rate could not be measured; the text says why."""


@dataclass(frozen=True)
class ReadRate:
    """A measured rate in GB/s (10^9 bytes a second), and what was read from where in which time."""

    gbs: float
    bytes: int
    seconds: float
    source: str


def largest(paths: Sequence[str]) -> str | None:
    """Return the largest of these files that is there, if it is large enough to measure with."""
    size, path = max(((os.path.getsize(path), path) for path in paths if os.path.isfile(path)), default=(0, ""))
    return path if size >= LEAST_BYTES else None


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Unmeasured(f"{path}: its file system has no reads past the page cache") from None
        raise Unmeasured(f"{path}: {error.strerror}") from None


def measure(path: str, seconds: float = SECONDS) -> ReadRate:
    """Return the rate at which a file or block device is read, by four readers side by side in blocks of 8 MiB.

    Ends after that many seconds, after 8 GiB, or at the end of the file. Raises Unmeasured.
    """
    descriptor = _open(path)
    try:
        size = min(os.lseek(descriptor, 0, os.SEEK_END), MOST_BYTES) // BLOCK_BYTES * BLOCK_BYTES
        if size < LEAST_BYTES:
            raise Unmeasured(f"{path}: {size} bytes are too few to measure with, expected {LEAST_BYTES}")
        lock = threading.Lock()
        offsets = iter(range(0, size, BLOCK_BYTES))
        counts: list[int] = []
        problems: list[str] = []
        start = time.monotonic()

        def read() -> None:
            # A mapping is aligned to a page, as such reads must be.
            with mmap.mmap(-1, BLOCK_BYTES) as buffer:
                done = 0
                while not problems and time.monotonic() - start < seconds:
                    with lock:
                        offset = next(offsets, None)
                    if offset is None:
                        break
                    try:
                        done += os.preadv(descriptor, [buffer], offset)
                    except OSError as error:
                        problems.append(f"{path}: {error.strerror} at byte {offset}")
                counts.append(done)

        threads = [threading.Thread(target=read) for _dummy in range(READERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - start
    finally:
        os.close(descriptor)
    if problems:
        raise Unmeasured(problems[0])
    total = sum(counts)
    return ReadRate(total / elapsed / 1e9, total, elapsed, path)
