# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reserve huge pages on each NUMA node of the running kernel, or give them back.

``reserve``  bring each node's pool to what is wanted; ends with 1 and the numbers where it cannot
``release``  bring each pool to what it had before the first ``reserve`` of this boot

A page of 1 GiB has to lie in one piece, so the kernel moves what is movable out of the way, and early in boot almost
nothing is in it. Where it gets no further, the page cache is dropped and the memory compacted, and it is tried again.
The pool grows in steps, so that what the system keeps is looked at before each of them.

It needs /proc, /sys and /run, and the standard library alone. Formats: Documentation/admin-guide/mm/hugetlbpage.rst,
/proc/kpageflags by Documentation/admin-guide/mm/pagemap.rst of the kernel.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/")
GIB = 1 << 30
PAGE = 4096
# A pool grows by at least this much at a time, so that pages of 2 MiB do not take a third of a million steps.
STEP_KIB = 1048576
# The reserve is what firmware gave the kernel less the pages. A half of it has to be available still when the last page
# is taken: the rest is the kernel itself, its description of the memory, and what runs already.
AVAILABLE_SHARE = 2
# Rounds of compaction in a row that gain nothing before it is given up.
FRUITLESS_ROUNDS = 4
# Bits of an entry of /proc/kpageflags.
HUGE, HWPOISON = 1 << 17, 1 << 19

Wish = list[tuple[int, int]]


class ShortError(Exception):
    """Fewer pages than wanted; the message has the numbers of each node."""


def pool(node: int, size_kib: int) -> Path:
    """Return the directory of a node's pool."""
    return ROOT / f"sys/devices/system/node/node{node}/hugepages/hugepages-{size_kib}kB"


def number(path: Path) -> int:
    """Return the number that a file holds."""
    text = path.read_text(encoding="ascii").strip()
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"{path} holds {text[:40]!r}, a number expected")
    return int(text)


def meminfo(name: str) -> int:
    """Return a line of /proc/meminfo in bytes; 0 where the kernel has no such line."""
    text = (ROOT / "proc/meminfo").read_text(encoding="ascii")
    match = re.search(rf"^{name}: +([0-9]{{1,15}}) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def present_bytes() -> int:
    """Return the memory that firmware gave the kernel; MemTotal would change with every kernel and reservation."""
    text = (ROOT / "proc/zoneinfo").read_text(encoding="ascii", errors="replace")
    return sum(int(count) * PAGE for count in re.findall(r"^ +present +([0-9]{1,15})$", text, re.MULTILINE))


def text_of(count: int) -> str:
    """Return bytes as text in GiB."""
    return f"{count / GIB:.1f} GiB"


def unit(size_kib: int) -> str:
    """Return a page size as text."""
    return "1 GiB" if size_kib == STEP_KIB else f"{size_kib // 1024} MiB"


# --- What the pools had before ------------------------------------------------------------------------------------


def record() -> Path:
    """Return the file with what each pool had before us in this boot; it goes with the boot, as the pools do."""
    return ROOT / "run/cpullm/hugepages.json"


def read_record() -> dict[str, int]:
    """Return {"NODE:SIZE_KIB": pages} of the record; {} where there is none."""
    try:
        data = json.loads(record().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(data, dict) and all(
        re.fullmatch(r"[0-9]{1,6}:[0-9]{1,12}", key) and isinstance(value, int) for key, value in data.items()
    )
    return dict(data) if known else {}


def remember(nodes: Sequence[int], size_kib: int) -> dict[str, int]:
    """Return the record, with the pools in it that it did not have yet, written before any of them is changed."""
    before = read_record()
    missing = [node for node in nodes if f"{node}:{size_kib}" not in before]
    if missing:
        before.update({f"{node}:{size_kib}": number(pool(node, size_kib) / "nr_hugepages") for node in missing})
        record().parent.mkdir(parents=True, exist_ok=True)
        fresh = record().with_suffix(".new")
        fresh.write_text(json.dumps(before, sort_keys=True) + "\n", encoding="utf-8")
        fresh.replace(record())
    return before


# --- Poisoned pages -----------------------------------------------------------------------------------------------


def poisoned(nodes: Sequence[int], size_kib: int) -> dict[int, int]:
    """Return for each node how many pages of its pool hold memory that failed: they count, and nobody can have them.

    The kernel marks the first 4 KiB of such a page. Only where it reports failed memory are the flags read, one entry
    for each place that a page can have.
    """
    if not meminfo("HardwareCorrupted"):
        return {}
    block = int((ROOT / "sys/devices/system/memory/block_size_bytes").read_text(encoding="ascii"), 16)
    size = size_kib * 1024
    found: dict[int, int] = {}
    with open(ROOT / "proc/kpageflags", "rb", buffering=0) as flags:
        for node in nodes:
            places: set[int] = set()
            for entry in (ROOT / f"sys/devices/system/node/node{node}").glob("memory[0-9]*"):
                start = int(entry.name[6:]) * block
                places.update(range(-(-start // size) * size, start + block, size))
            for place in places:
                flags.seek(place // PAGE * 8)
                entry_bytes = flags.read(8)
                value = struct.unpack("=Q", entry_bytes)[0] if len(entry_bytes) == 8 else 0
                if value & HUGE and value & HWPOISON:
                    found[node] = found.get(node, 0) + 1
    return found


# --- Reserving ----------------------------------------------------------------------------------------------------


def make_room() -> None:
    """Write out and drop the page cache, and compact the memory, so that pieces of a GiB come free."""
    os.sync()
    for name, value in (("drop_caches", "3"), ("compact_memory", "1")):
        (ROOT / "proc/sys/vm" / name).write_text(value, encoding="ascii")


def grow(node: int, size_kib: int, wanted: int, floor: int, deadline: float) -> str:
    """Raise a pool to what is wanted; return why it went no further, or "" when it is there."""
    path = pool(node, size_kib) / "nr_hugepages"
    step = max(1, STEP_KIB // size_kib)
    fruitless = 0
    while (have := number(path)) < wanted:
        more = min(step, wanted - have)
        available = meminfo("MemAvailable")
        if available - more * size_kib * 1024 < floor:
            return f"{text_of(available)} of memory are available, and {text_of(floor)} of them stay with the system"
        if fruitless > FRUITLESS_ROUNDS or time.monotonic() > deadline:
            return (
                f"no more {unit(size_kib)} in one piece after {fruitless} round(s) of compaction, "
                f"{text_of(available)} of memory available"
            )
        if fruitless:
            make_room()
            time.sleep(0.25 * fruitless)
        path.write_text(str(have + more), encoding="ascii")
        fruitless = 0 if number(path) > have else fruitless + 1
    return ""


def shrink(node: int, size_kib: int, wanted: int) -> None:
    """Give back free pages beyond what is wanted; those in use stay in the pool."""
    path = pool(node, size_kib)
    have, free = number(path / "nr_hugepages"), number(path / "free_hugepages")
    if have > wanted and free:
        (path / "nr_hugepages").write_text(str(max(wanted, have - free)), encoding="ascii")


def check_sum(wish: Wish, size_kib: int, reserve_bytes: int, lost: dict[int, int]) -> None:
    """Raise ShortError where pages and reserve are more than the memory: then nothing is taken at all."""
    pages = sum(count for _node, count in wish) + sum(lost.values())
    present = present_bytes()
    if present and pages * size_kib * 1024 + reserve_bytes > present:
        raise ShortError(
            f"wanted {pages} pages of {unit(size_kib)} ({text_of(pages * size_kib * 1024)}) and "
            f"{text_of(reserve_bytes)} for the system, the memory is {text_of(present)}: nothing was reserved"
        )


def reserve(wish: Wish, size_kib: int, reserve_bytes: int, top_up: int | None, seconds: float) -> str:
    """Bring the pools to what is wanted and return the numbers; raises ShortError with them where they fall short.

    With ``top_up`` the kernel's command line reserves, and a node that lacks more than that many is left alone.
    """
    nodes = [node for node, _count in wish]
    missing = [str(node) for node in nodes if not pool(node, size_kib).is_dir()]
    if missing:
        raise ShortError(f"no pool of {unit(size_kib)} pages on node {', '.join(missing)}: no such node or page size")
    lost = poisoned(nodes, size_kib)
    before = remember(nodes, size_kib)
    check_sum(wish, size_kib, reserve_bytes, lost)
    deadline = time.monotonic() + seconds
    floor = reserve_bytes // AVAILABLE_SHARE
    lines = []
    short = False
    for node, count in wish:
        target = count + lost.get(node, 0)
        first = number(pool(node, size_kib) / "nr_hugepages")
        why = ""
        if first > target:
            shrink(node, size_kib, max(target, before.get(f"{node}:{size_kib}", 0)))
        elif top_up is not None and target - first > top_up:
            why = f"{target - first} are missing, and at most {top_up} are topped up"
        else:
            why = grow(node, size_kib, target, floor, deadline)
        got = number(pool(node, size_kib) / "nr_hugepages")
        short = short or got < target
        lines.append(
            f"node {node}: {count} wanted, {max(0, got - lost.get(node, 0))} there, {got - first:+d} now"
            + (f", {lost[node]} more hold failed memory" if lost.get(node) else "")
            + (f" ({why})" if why else "")
        )
    numbers = f"pages of {unit(size_kib)}: " + "; ".join(lines)
    if short:
        raise ShortError(numbers)
    return numbers


def release() -> str:
    """Bring each pool to what it had before this boot's first reservation, and return the numbers."""
    lines = []
    for key, pages in sorted(read_record().items()):
        node, size_kib = map(int, key.split(":"))
        path = pool(node, size_kib) / "nr_hugepages"
        have = number(path)
        if have > pages:
            path.write_text(str(pages), encoding="ascii")
        lines.append(f"node {node}: {have - number(path)} pages of {unit(size_kib)} given back, {number(path)} left")
    record().unlink(missing_ok=True)
    return "; ".join(lines) or "nothing was reserved in this boot"


def parse_wish(text: str) -> tuple[int, int]:
    """Return node and pages of a word NODE:PAGES."""
    if not re.fullmatch(r"[0-9]{1,6}:[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NODE:PAGES")
    node, pages = text.split(":")
    return int(node), int(pages)


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reserving = commands.add_parser("reserve")
    reserving.add_argument("--size-kib", type=int, choices=[2048, 1048576], required=True)
    reserving.add_argument("--reserve-bytes", type=int, required=True)
    reserving.add_argument("--top-up", type=int)
    reserving.add_argument("--free-vmemmap", action="store_true")
    reserving.add_argument("--seconds", type=float, default=300)
    reserving.add_argument("pages", nargs="+", type=parse_wish, metavar="NODE:PAGES")
    commands.add_parser("release")
    options = parser.parse_args()
    try:
        record().parent.mkdir(parents=True, exist_ok=True)
        with open(record().with_suffix(".lock"), "w", encoding="utf-8") as lock:
            # The unit and a start of a server may come at once.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if options.command == "release":
                print(release())
                return 0
            if options.free_vmemmap:
                (ROOT / "proc/sys/vm/hugetlb_optimize_vmemmap").write_text("1", encoding="ascii")
            print(reserve(options.pages, options.size_kib, options.reserve_bytes, options.top_up, options.seconds))
    except (OSError, ValueError, ShortError) as error:
        print(f"cpullm-hugepages: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
