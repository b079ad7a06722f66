# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bounded reads below a root, so that a captured tree reads like the host that it was taken from; facts as JSON."""

from __future__ import annotations

import os
import re
from typing import Any

# /proc/zoneinfo of a two-socket host with 384 threads is some 300 KiB.
MAX_BYTES = 8 << 20
# The files below /proc/sys answer a read of 4 MiB or more with ENOMEM.
CHUNK_BYTES = 64 << 10


def read_text(root: str, path: str, limit: int = MAX_BYTES) -> str:
    """Return at most the first `limit` bytes of the file at `path` below `root`; raises OSError."""
    chunks: list[bytes] = []
    left = limit
    # Hundreds of small files on a large host: a descriptor costs half of what a file object does.
    descriptor = os.open(root.rstrip("/") + path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while left:
            chunk = os.read(descriptor, min(left, CHUNK_BYTES))
            if not chunk:
                break
            chunks.append(chunk)
            left -= len(chunk)
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode("utf-8", "replace")


def read_optional(root: str, path: str) -> str | None:
    """Return the text of the file, or None where it does not exist or may not be read."""
    try:
        return read_text(root, path)
    except OSError:
        return None


def read_number(root: str, path: str) -> int | None:
    """Return the decimal number that the file holds, or None where there is no such file; raises ValueError."""
    text = read_optional(root, path)
    if text is None:
        return None
    # Of any white space, str.strip() would also take control characters that int() does not.
    number = text.strip(" \t\n")
    if not re.fullmatch(r"-?[0-9]{1,20}", number):
        raise ValueError(f"{path} holds {number[:40]!r}, a number expected")
    return int(number)


def numbered(root: str, path: str, prefix: str) -> list[int]:
    """Return the numbers N of the entries `prefix`N of a directory, ascending; [] where there is no such directory."""
    try:
        names = os.listdir(root.rstrip("/") + path)
    except OSError:
        return []
    form = re.compile(re.escape(prefix) + r"([0-9]{1,6})")
    return sorted(int(match[1]) for match in map(form.fullmatch, names) if match)


def plain(value: object) -> Any:
    """Return dataclasses as dicts and tuples as lists, all the way down; anything else as it is.

    Unlike dataclasses.asdict it copies nothing else, which is most of the time that reading a host would take.
    """
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(item) for name, item in vars(value).items()}
    return value
