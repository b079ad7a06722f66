# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The read rate of memory as cpullm-bandwidth measures it: its answers, and who must not be disturbed by it.

The program is roles/llamacpp_build/files/cpullm-bandwidth.c. Rates are in GB/s, 10^9 bytes per second.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Filling the buffer takes far longer than reading it where memory is slow or huge pages are made first.
SLACK_S = 60
# What the program takes.
MOST_SECONDS = 60
SERVER = "llama-server"


@dataclass(frozen=True)
class Measurement:
    """One answer of the program: median, least and most of its passes over a buffer of ``bytes``."""

    gbs: float
    gbs_min: float
    gbs_max: float
    threads: int
    bytes: int


def parse_measurement(text: str) -> Measurement:
    """Return what the program printed, one line of JSON; raises ValueError for anything else."""
    try:
        # Python's own words for numbers that JSON does not have.
        found = json.loads(text, parse_constant=lambda word: word)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found {_shown(text)}, expected one line of JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"found {_shown(text)}, expected a JSON object")
    for name in ("gbs", "gbs_min", "gbs_max", "threads", "bytes"):
        value = found.get(name)
        whole = name in ("threads", "bytes")
        kinds = int if whole else (int, float)
        # Above the limit is no machine, and what overflows a float.
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1 << 63:
            kind = "whole number" if whole else "number"
            raise ValueError(f"found {name} {_shown(value)}, expected a {kind} above 0")
    if not found["gbs_min"] <= found["gbs"] <= found["gbs_max"]:
        raise ValueError(
            f"found a median of {found['gbs']} between {found['gbs_min']} and {found['gbs_max']}, expected it there"
        )
    return Measurement(
        gbs=float(found["gbs"]),
        gbs_min=float(found["gbs_min"]),
        gbs_max=float(found["gbs_max"]),
        threads=found["threads"],
        bytes=found["bytes"],
    )


def read_answer(code: int, out: str, err: str) -> Measurement:
    """Return the measurement of a run that ended with a code, negative for a signal; raises ValueError with why not."""
    if code:
        how = f"signal {-code}" if code < 0 else f"code {code}"
        raise ValueError(f"ended with {how}: {err.strip()[-500:] or 'no message'}")
    return parse_measurement(out)


def arguments(tool: str, cpus: str, seconds: float) -> list[str]:
    """Return the command that measures with one thread on each CPU of a list."""
    return [tool, "--cpus", cpus, "--seconds", str(seconds)]


def check_sockets(raw: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return number and CPUs of each socket of ``cpullm_numa``; raises ValueError naming the entry that lacks them."""
    sockets = []
    for index, entry in enumerate(raw):
        number, cpus = entry.get("socket"), entry.get("primary_cpus")
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(cpus, str) or not cpus:
            raise ValueError(
                f"sockets[{index}]: found socket {number!r} with primary_cpus {cpus!r};"
                " expected entries of ansible_facts['cpullm_numa'].sockets"
            )
        sockets.append((number, cpus))
    return sockets


def serving(proc: str = "/proc") -> list[int]:
    """Return the processes that are llama-server, ascending, whoever started them."""
    found = []
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                with open(os.path.join(proc, name, "comm"), encoding="utf-8", errors="replace") as stream:
                    command = stream.read().rstrip("\n")
            except OSError:
                continue
            if command == SERVER:
                found.append(int(name))
    return sorted(found)


def unavailable(reason: str) -> dict[str, Any]:
    """Return the fact of a host that was not measured."""
    return {"available": False, "reason": reason, "sockets": []}


def _shown(value: object) -> str:
    """Return a value as an error may quote it: one line of at most 80 printable characters."""
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
