# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The loader of llama-weights@.service: a model's shards into a hugetlbfs store that outlives every process.

``load``    bring the store to what the plan says; nothing is read where it already is
``check``   print as one JSON line whether it is, reading no shard; ``--deep`` compares the SHA-256 of what it holds

A shard is one file of whole pages at ``STORE/CONTENT/FILE``, where CONTENT is made from the names and hashes of all
shards. What is complete stands in ``record.json`` of the run-time directory, with device, inode, size, blocks and
times of each store file. That directory is on a tmpfs, so that record and pages end at the same moment. A file that
the record does not know, or that differs from it, is never served.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
CHUNK = 16 << 20
# O_DIRECT wants whole blocks; the padding of the last page takes what a rounded read may bring.
BLOCK = 64 << 10
# Shards that are read side by side: enough for the hashes, which are sequential in each, to keep up with a fast disk.
LANES = 8
# SHA-256 of one core with SHA instructions, and the rate of two PCIe 5 disks: what decides whether hashing is free.
HASH_BYTES_PER_S = 1.4e9
FREE_HASH_BYTES_PER_S = 8e9
FREE_HASH_S = 1.0

# A check holds the lock for an instant, which must not turn a loader away.
LOCK_S = 0.5

RECORD = "record.json"
PROGRESS = "progress.json"
FETCH_RECORD = ".cpullm-record.json"
SYS = Path("/sys")
PROC = Path("/proc")


class WeightsError(Exception):
    """What keeps the store from being complete: names the file, what was found, what was expected, and the way out."""


@dataclass(frozen=True)
class Shard:
    """One file of the model: its name below the model's directory, its bytes and its SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What the store of an instance is to hold."""

    instance: int
    source: Path
    store: Path
    content: str
    shards: tuple[Shard, ...]
    page_bytes: int
    nodes: tuple[int, ...]
    hash: bool | None
    threads: int

    def target(self, shard: Shard) -> Path:
        """Return the store file of a shard."""
        return self.store / self.content / shard.file

    def pages(self, shard: Shard) -> int:
        """Return the pages that a shard fills: each is rounded up by itself."""
        return -(-shard.bytes // self.page_bytes)


def read_plan(path: Path) -> Plan:
    """Return the plan in a file that the role wrote; raises WeightsError where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(Shard(str(row["file"]), int(row["bytes"]), str(row["sha256"]).lower()) for row in data["shards"])
        plan = Plan(
            instance=int(data["instance"]),
            source=Path(data["source"]),
            store=Path(data["store"]),
            content=str(data["content"]),
            shards=shards,
            page_bytes=int(data["page_bytes"]),
            nodes=tuple(int(node) for node in data["nodes"]),
            hash=None if data["hash"] is None else bool(data["hash"]),
            threads=int(data["threads"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path}: {error!r}; expected the plan that the playbook wrote: run site.yml") from None
    names = [shard.file for shard in shards]
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts]
    if outside or len(set(names)) != len(names) or not names or re.fullmatch(r"[0-9a-f]{8,64}", plan.content) is None:
        raise WeightsError(f"{path}: content {plan.content!r}, shards {names}; expected different names below a folder")
    if min(shard.bytes for shard in shards) < 1 or plan.page_bytes < 1 or plan.threads < 1:
        raise WeightsError(f"{path}: bytes, page_bytes or threads below 1")
    return plan


# ---- what is recorded as complete


def stamp_of(found: os.stat_result) -> dict[str, int]:
    """Return what tells a store file from any other, and from itself once it was touched.

    Blocks are the pages that a hugetlbfs file holds: a punched hole shows in nothing else.
    """
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "blocks": found.st_blocks,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def stamp(path: Path) -> dict[str, int] | None:
    """Return the stamp of a regular file, or None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return stamp_of(found) if stat.S_ISREG(found.st_mode) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where the file is absent or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a file in one step."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(data, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(path)


def problem(plan: Plan, shard: Shard, recorded: Any) -> str | None:
    """Return why a shard does not count as complete, or None."""
    now = stamp(plan.target(shard))
    if now is None:
        return f"{shard.file}: not in the store"
    if not isinstance(recorded, dict):
        return f"{shard.file}: was not loaded to its end"
    if recorded != {"sha256": shard.sha256, **now}:
        changed = [key for key, value in {"sha256": shard.sha256, **now}.items() if recorded.get(key) != value]
        return f"{shard.file}: {', '.join(changed)} differ from what was loaded"
    return None


def problems(plan: Plan, run: Path) -> list[str]:
    """Return why the store is not complete, shard by shard; empty where it is."""
    recorded = read_json(run / RECORD).get("shards")
    entries = recorded if isinstance(recorded, dict) else {}
    return [text for shard in plan.shards if (text := problem(plan, shard, entries.get(shard.file)))]


# ---- pages


@dataclass(frozen=True)
class Pool:
    """The machine's pages of one size: all, those neither in use nor promised, and of these those on some nodes."""

    total: int
    free: int
    promised: int
    allowed: int


def read_pool(page_bytes: int, nodes: Sequence[int]) -> Pool | None:
    """Return the pool of a page size, or None where the kernel shows none. No nodes means all of them."""

    def count(path: Path) -> int:
        return int(path.read_text(encoding="ascii"))

    name = f"hugepages/hugepages-{page_bytes // 1024}kB"
    try:
        whole = SYS / "kernel/mm" / name
        total, unused, promised = (count(whole / f"{key}_hugepages") for key in ("nr", "free", "resv"))
        free = max(0, unused - promised)
        folders = [SYS / f"devices/system/node/node{node}" / name for node in nodes]
        here = sum(count(folder / "free_hugepages") for folder in folders) if folders else free
    except (OSError, ValueError):
        return None
    return Pool(total, free, promised, min(free, here))


def users_of(inode: int, device: int) -> list[str]:
    """Return the processes that map a file, as ``NAME (PID)``, as far as this account may look."""
    tag = f"{os.major(device):02x}:{os.minor(device):02x}"
    found = []
    for folder in PROC.glob("[0-9]*"):
        # It may have ended, or belong to somebody else.
        with contextlib.suppress(OSError, ValueError, IndexError):
            rows = [line.split(None, 5) for line in (folder / "maps").read_text(encoding="utf-8").splitlines()]
            if any(row[3] == tag and row[4] == str(inode) for row in rows):
                found.append(f"{(folder / 'comm').read_text(encoding='utf-8').strip()} ({folder.name})")
    return found


def in_use(path: Path) -> bool:
    """Return whether any process has a file open or mapped.

    The kernel grants a write lease on a file only to its one user, whoever the others are (fcntl(2), F_SETLEASE).
    Where it grants none on this file system, the memory maps of the processes tell.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        found = os.fstat(descriptor)
        return bool(users_of(found.st_ino, found.st_dev))
    finally:
        os.close(descriptor)
    return False


def store_files(plan: Plan) -> list[Path]:
    """Return every file of the store."""
    return sorted(path for path in plan.store.rglob("*") if not path.is_dir() or path.is_symlink())


def held_pages(plan: Plan, path: Path) -> int:
    """Return the pages that a store file holds."""
    try:
        return path.lstat().st_blocks * 512 // plan.page_bytes
    except OSError:
        return 0


def describe_pool(plan: Plan, needed: int, pool: Pool | None) -> str:
    """Return the numbers that tell why pages lack."""
    size = f"pages of {plan.page_bytes // 1024} KiB" if plan.page_bytes < GIB else "pages of 1 GiB"
    if pool is None:
        return f"{needed} {size} needed, and this kernel shows no pool of them"
    where = f", {pool.allowed} of these on node {','.join(map(str, plan.nodes))}" if plan.nodes else ""
    return f"{needed} {size} needed, {pool.free} free of {pool.total} ({pool.promised} promised to others){where}"


def make_room(plan: Plan, missing: Sequence[Shard]) -> None:
    """Free every file of the store that is not a complete shard of the plan, or raise WeightsError with the numbers.

    Refused before anything is freed where that would not be enough. What a process still maps is not freed.
    """
    kept = {plan.target(shard) for shard in plan.shards} - {plan.target(shard) for shard in missing}
    old = [path for path in store_files(plan) if path not in kept]
    busy = [path for path in old if path.is_file() and not path.is_symlink() and in_use(path)]
    gone = [path for path in old if path not in busy]
    needed = sum(plan.pages(shard) for shard in missing)
    pool = read_pool(plan.page_bytes, plan.nodes)
    held = ""
    if busy:
        users = sorted({user for path in busy for user in users_of(path.stat().st_ino, path.stat().st_dev)})
        held = (
            f"; {sum(held_pages(plan, path) for path in busy)} pages are {', '.join(map(str, busy))}, mapped by "
            f"{', '.join(users) or 'a process'}: stop it first"
        )
    blocked = [path for path in busy if path in {plan.target(shard) for shard in missing}]
    if blocked:
        raise WeightsError(f"{plan.store}: not complete, and still in use{held}")
    if busy:
        say(f"old content stays{held}")
    comes_back = sum(held_pages(plan, path) for path in gone)
    if pool is not None and needed > pool.allowed + comes_back:
        raise WeightsError(
            f"{plan.store}: {describe_pool(plan, needed, pool)}, {comes_back} in old content of the store{held}. "
            "See who holds pages (grep HugetlbPages /proc/*/status), or reserve more, and start the unit again"
        )
    for path in gone:
        path.unlink()
    for folder in sorted((path for path in plan.store.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()
    if comes_back:
        say(f"freed {comes_back} pages of old content")


def check_mount(plan: Plan) -> None:
    """Raise WeightsError unless the store is a file system of the planned page size."""
    try:
        found = os.statvfs(plan.store)
    except OSError as error:
        raise WeightsError(f"{plan.store}: {error.strerror}; expected the store's mount: run site.yml") from None
    if found.f_bsize != plan.page_bytes:
        raise WeightsError(
            f"{plan.store}: pages of {found.f_bsize} bytes, expected a hugetlbfs of {plan.page_bytes}: is it mounted?"
        )
    needed = sum(plan.pages(shard) for shard in plan.shards)
    if 0 < found.f_blocks < needed:
        raise WeightsError(f"{plan.store}: mounted for {found.f_blocks} pages, {needed} needed: run site.yml")


def misplaced(plan: Plan, numa_maps: str) -> dict[int, int]:
    """Return pages of the store that lie on other nodes than planned, from a loader's own /proc/self/numa_maps."""
    wrong: dict[int, int] = {}
    for line in numa_maps.splitlines():
        if f"file={plan.store / plan.content}/" not in line:
            continue
        for node, count in re.findall(r"\bN(\d+)=(\d+)\b", line):
            if plan.nodes and int(node) not in plan.nodes:
                wrong[int(node)] = wrong.get(int(node), 0) + int(count)
    return wrong


# ---- what people see


def say(text: str) -> None:
    """Print a line for the journal."""
    print(text, flush=True)


def notify(**fields: str) -> None:
    """Tell systemd, where it started this (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        # A status that nobody hears must not hold up the load.
        out.settimeout(10 if "READY" in fields else 0)
        out.connect("\0" + address[1:] if address.startswith("@") else address)
        out.sendall("\n".join(f"{key}={value}" for key, value in fields.items()).encode())


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    whole = int(seconds + 0.5)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"


def amount(count: int) -> str:
    """Return bytes in GiB, small ones in MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.1f} MiB"


class Progress:
    """Says how far a load is: to systemd, to the journal, and in a file for the playbook (cpullm.epyc.job)."""

    # A stalled disk must still run into the unit's start timeout, so only progress extends it.
    EXTENSION_S = 120
    JOURNAL_S = 5.0

    def __init__(self, run: Path, total: int, before: int) -> None:
        """Start with ``before`` of ``total`` bytes."""
        self._path = run / PROGRESS
        self._total, self._before, self._last = total, before, before
        self._begin = self._spoken = time.monotonic()
        self._window = collections.deque([(self._begin, before)])

    def tell(self, done: int, message: str = "") -> None:
        """Say that so many bytes are in the store."""
        now = time.monotonic()
        self._window.append((now, done))
        while len(self._window) > 2 and self._window[1][0] < now - 10:
            self._window.popleft()
        since, first = self._window[0]
        rate = (done - first) / (now - since) if now - since > 0.2 else 0.0
        parts = [f"{100 * done / self._total:.1f} %", f"{amount(done)} of {amount(self._total)}"]
        if rate:
            parts += [f"{rate / 1e9:.2f} GB/s", f"{duration((self._total - done) / rate)} left"]
        text = ", ".join(parts + ([message] if message else []))
        fields = {"STATUS": text}
        if done > self._last:
            fields["EXTEND_TIMEOUT_USEC"] = str(self.EXTENSION_S * 1_000_000)
            self._last = done
        notify(**fields)
        if now - self._spoken >= self.JOURNAL_S:
            self._spoken = now
            say(text)
        write_json(self._path, {"done": done, "total": self._total, "message": message, "updated": time.time()})


# ---- reading


class Source:
    """A shard's file on disk, opened and compared with the plan before any page is taken."""

    def __init__(self, plan: Plan, shard: Shard) -> None:
        """Open it; raises WeightsError where it is not what was planned."""
        self.shard, self.path = shard, plan.source / shard.file
        try:
            self.buffered = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WeightsError(f"{self.path}: {error.strerror}; fetch the model anew: run site.yml") from None
        self.before = os.fstat(self.buffered)
        if not stat.S_ISREG(self.before.st_mode) or self.before.st_size != shard.bytes:
            raise WeightsError(
                f"{self.path}: {self.before.st_size} bytes, expected {shard.bytes}; fetch the model anew: run site.yml"
            )
        self.direct = -1
        with contextlib.suppress(OSError):
            # The same file, whatever its name means by now.
            self.direct = os.open(f"/proc/self/fd/{self.buffered}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def identity(self) -> tuple[int, ...]:
        """Return what changes when somebody writes to the file."""
        now = os.fstat(self.buffered)
        return (now.st_size, now.st_mtime_ns, now.st_ctime_ns)

    def changed(self) -> bool:
        """Return whether somebody wrote to it since it was opened."""
        return self.identity() != (self.before.st_size, self.before.st_mtime_ns, self.before.st_ctime_ns)

    def fetched(self, record: dict[str, Any]) -> bool:
        """Return whether the fetch verified just this file, by its record."""
        found = self.before
        return record.get(self.shard.file) == {
            "sha256": self.shard.sha256,
            "bytes": found.st_size,
            "inode": found.st_ino,
            "mtime_ns": found.st_mtime_ns,
            "ctime_ns": found.st_ctime_ns,
        }

    def read(self, view: memoryview, begin: int, end: int) -> None:
        """Read bytes ``begin`` to ``end`` into the same place of the view; raises WeightsError that names the file."""
        at, direct = begin, self.direct >= 0
        while at < end:
            stop = min(-(-end // BLOCK) * BLOCK, len(view)) if direct else end
            try:
                got = os.preadv(self.direct if direct else self.buffered, [view[at:stop]], at)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    direct = False  # refused late, or the rest of a short read, which starts within a block
                    if at == begin:
                        self.direct = -1
                    continue
                raise WeightsError(
                    f"{self.path}: read error at byte {at} of {self.shard.bytes}: {error.strerror}; "
                    "look at the disk (dmesg, smartctl), fetch the shard anew, and start the unit again"
                ) from None
            if got == 0:
                size = os.fstat(self.buffered).st_size
                raise WeightsError(f"{self.path}: ends at byte {size}, expected {self.shard.bytes}: it was cut")
            at += got
        if not direct:
            os.posix_fadvise(self.buffered, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it."""
        for descriptor in {self.buffered, self.direct} - {-1}:
            os.close(descriptor)


class Target:
    """A shard's file in the store while it is filled."""

    def __init__(self, plan: Plan, source: Source) -> None:
        """Make the file and map it, which makes the kernel promise all its pages; raises WeightsError."""
        self.plan, self.source, self.shard = plan, source, source.shard
        self.path = plan.target(self.shard)
        self.size = plan.pages(self.shard) * plan.page_bytes
        self.unit = max(plan.page_bytes, CHUNK)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self.descriptor, self.size)
            self.map = mmap.mmap(self.descriptor, self.size)
        except OSError as error:
            pool = read_pool(plan.page_bytes, plan.nodes)
            self.path.unlink()
            raise WeightsError(
                f"{self.path}: {describe_pool(plan, plan.pages(self.shard), pool)}: {error.strerror}"
            ) from None
        self.view = memoryview(self.map)
        self.chunks = -(-self.shard.bytes // CHUNK)
        self.ready = [False] * -(-self.size // self.unit)
        self.done = [False] * self.chunks
        self.left = self.chunks
        self.sha = hashlib.sha256()
        self.hashed = 0
        self.hashing = False

    def bounds(self, index: int) -> tuple[int, int]:
        """Return first and last byte of a chunk."""
        return index * CHUNK, min((index + 1) * CHUNK, self.shard.bytes)

    def populate(self, index: int) -> None:
        """Take the pages of a unit from the pool: an error here, where a touched mapping would raise SIGBUS."""
        begin = index * self.unit
        try:
            os.posix_fallocate(self.descriptor, begin, min(self.unit, self.size - begin))
        except OSError as error:
            needed = sum(not there for there in self.ready)
            pool = read_pool(self.plan.page_bytes, self.plan.nodes)
            raise WeightsError(f"{self.path}: {describe_pool(self.plan, needed, pool)}: {error.strerror}") from None

    def finish(self, compare: bool) -> dict[str, Any]:
        """Return the record's entry of the filled file; raises WeightsError where it must not be served."""
        found = self.sha.hexdigest()
        if self.source.changed():
            raise WeightsError(f"{self.source.path}: was written to while it was read; wait, and start the unit again")
        if compare and found != self.shard.sha256:
            raise WeightsError(
                f"{self.source.path}: sha256 is {found}, expected {self.shard.sha256}: the file on disk is damaged; "
                "remove it and run site.yml, which fetches it anew"
            )
        # A rounded read may have brought what lay behind the file's end on the disk.
        tail = min(self.size, -(-self.shard.bytes // BLOCK) * BLOCK)
        self.view[self.shard.bytes : tail] = bytes(tail - self.shard.bytes)
        os.fchmod(self.descriptor, 0o440)
        return {"sha256": self.shard.sha256, **stamp_of(os.fstat(self.descriptor))}


class Filling:
    """Fills store files side by side: readers with O_DIRECT, one of them ahead with new pages, and hashers behind."""

    def __init__(self, targets: Sequence[Target], hashed: set[str], threads: int, record: Any) -> None:
        """Prepare; ``hashed`` names the shards to compare, ``record`` is called with each one that is complete."""
        self._targets, self._compare, self._threads, self._record = targets, hashed, threads, record
        self._state = threading.Condition()
        self._chunks: list[tuple[Target, int]] = []
        self._units: list[tuple[Target, int]] = []
        for first in range(0, len(targets), LANES):
            self._line_up(targets[first : first + LANES])
        self._next_chunk = self._next_unit = 0
        self._populating = False
        self._unfinished = len(targets)
        self._error: BaseException | None = None
        self.bytes = 0

    def _line_up(self, lane: Sequence[Target]) -> None:
        """Append the chunks of some shards in turn, and their pages in the order in which these need them."""
        for index in range(max(target.chunks for target in lane)):
            for target in lane:
                if index < target.chunks:
                    self._chunks.append((target, index))
                    if index * CHUNK % target.unit == 0:
                        self._units.append((target, index * CHUNK // target.unit))

    @contextlib.contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let the others go on while the block works."""
        self._state.release()
        try:
            yield
        finally:
            self._state.acquire()

    def _finish(self, target: Target) -> None:
        with self._unlocked():
            self._record(target.shard, target.finish(target.shard.file in self._compare))
        self._unfinished -= 1

    def _read(self) -> None:
        while self._error is None and self._next_chunk < len(self._chunks):
            target, index = self._chunks[self._next_chunk]
            there = target.ready[index * CHUNK // target.unit]
            if self._next_unit < len(self._units) and not (self._populating and there):
                owner, unit = self._units[self._next_unit]
                self._next_unit += 1
                ahead, self._populating = not self._populating, True
                with self._unlocked():
                    owner.populate(unit)
                owner.ready[unit] = True
                if ahead:
                    self._populating = False
            elif there:
                self._next_chunk += 1
                begin, end = target.bounds(index)
                with self._unlocked():
                    target.source.read(target.view, begin, end)
                self.bytes += end - begin
                target.done[index] = True
                target.left -= 1
                if target.left == 0 and target.shard.file not in self._compare:
                    self._finish(target)
            else:
                self._state.wait()
                continue
            self._state.notify_all()

    def _hash(self) -> None:
        todo = [target for target in self._targets if target.shard.file in self._compare]
        while self._error is None and todo:
            target = next((one for one in todo if not one.hashing and one.done[one.hashed]), None)
            if target is None:
                self._state.wait()
            else:
                target.hashing = True
                begin, end = target.bounds(target.hashed)
                with self._unlocked():
                    target.sha.update(target.view[begin:end])
                target.hashed += 1
                # A finished one stays marked: nobody takes it again.
                target.hashing = target.hashed == target.chunks
                if target.hashing:
                    self._finish(target)
                self._state.notify_all()
            todo = [one for one in todo if one.hashed < one.chunks]

    def _work(self, job: Any) -> None:
        with self._state:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - it is raised again by run()
                self._error = self._error or error
            self._state.notify_all()

    def run(self, progress: Progress, before: int) -> None:
        """Fill all files; raises the first error once no thread works any more."""
        jobs = [self._read] * self._threads
        jobs += [self._hash] * min(len(self._compare), LANES, max(1, len(os.sched_getaffinity(0))))
        workers = [threading.Thread(target=self._work, args=(job,), daemon=True) for job in jobs]
        for worker in workers:
            worker.start()
        try:
            with self._state:
                while self._unfinished and self._error is None:
                    self._state.wait(0.5)
                    read = self.bytes
                    message = "" if read else "the kernel zeroes the first pages"
                    if self._next_chunk == len(self._chunks):
                        message = "comparing sha256"
                    with self._unlocked():
                        progress.tell(before + read, message)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            with self._state:
                self._state.notify_all()
            # A read on a dead disk may never return.
            deadline = time.monotonic() + 10
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error


# ---- the commands


def hashing(plan: Plan, sources: Sequence[Source]) -> tuple[set[str], str]:
    """Return the shards whose SHA-256 is compared, and the reason.

    All where it costs no time that anybody notices; elsewhere those that the fetch did not verify, or that were
    touched since.
    """
    names = {source.shard.file for source in sources}
    if plan.hash is not None:
        return (names, "sha256 compared") if plan.hash else (set(), "sha256 not compared, as set")
    size = sum(source.shard.bytes for source in sources)
    rate = min(len(os.sched_getaffinity(0)), len(names), LANES) * HASH_BYTES_PER_S
    if rate >= FREE_HASH_BYTES_PER_S or size / rate <= FREE_HASH_S:
        return names, "sha256 compared"
    record = read_json(plan.source / FETCH_RECORD)
    doubtful = {source.shard.file for source in sources if not source.fetched(record)}
    if doubtful == names:
        return names, "sha256 compared: no record of the fetch knows these files"
    return doubtful, f"sha256 compared of {len(doubtful)}: it would slow the load, and the fetch verified the others"


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the store for one loader; raises WeightsError where another one works."""
    deadline = time.monotonic() + LOCK_S
    with (run / "lock").open("a+", encoding="ascii") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise WeightsError(
                        f"{run}: another loader works (process {lock.read().strip()}); wait for it, or stop it"
                    ) from None
                time.sleep(0.05)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def works(run: Path) -> bool:
    """Return whether a loader holds the store."""
    try:
        with (run / "lock").open(encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def load(plan: Plan, run: Path) -> None:
    """Bring the store to what the plan says; raises WeightsError."""
    check_mount(plan)
    recorded = read_json(run / RECORD).get("shards")
    entries = recorded if isinstance(recorded, dict) else {}
    missing = [shard for shard in plan.shards if problem(plan, shard, entries.get(shard.file))]
    kept = {shard.file: entries[shard.file] for shard in plan.shards if shard not in missing}
    pages = sum(plan.pages(shard) for shard in plan.shards)
    whole = f"{amount(sum(shard.bytes for shard in plan.shards))} in {pages} pages, content {plan.content}"
    if not missing:
        make_room(plan, [])
        say(f"complete, nothing is read: {whole}")
        notify(READY="1", STATUS=f"complete: {whole}")
        return
    begin = time.monotonic()
    sources: list[Source] = []
    targets: list[Target] = []
    try:
        sources.extend(Source(plan, shard) for shard in missing)
        make_room(plan, missing)
        # Whatever happens from here on, nobody takes a half-filled file for a whole one.
        write_json(run / RECORD, {"content": plan.content, "shards": kept})
        compare, why = hashing(plan, sources)
        buffered = [source for source in sources if source.direct < 0]
        if buffered:
            say(f"{buffered[0].path}: no O_DIRECT on this file system; read through the page cache instead")
        total = sum(shard.bytes for shard in plan.shards)
        before = total - sum(shard.bytes for shard in missing)
        targets.extend(Target(plan, source) for source in sources)
        lock = threading.Lock()

        def keep(shard: Shard, entry: dict[str, Any]) -> None:
            with lock:
                kept[shard.file] = entry
                write_json(run / RECORD, {"content": plan.content, "shards": kept})

        shards = f"{len(missing)} of {len(plan.shards)} shards"
        say(f"loading {shards}, {amount(total - before)}; {plan.threads} readers; {why}")
        progress = Progress(run, total, before)
        Filling(targets, compare, plan.threads, keep).run(progress, before)
        late = [source for source in sources if source.direct < 0 and source not in buffered]
        if late:
            say(f"{late[0].path}: O_DIRECT was refused; read through the page cache instead")
        wrong = misplaced(plan, (PROC / "self/numa_maps").read_text(encoding="utf-8"))
        if wrong:
            kept.clear()
            write_json(run / RECORD, {"content": plan.content, "shards": {}})
            raise WeightsError(
                f"{plan.store}: {wrong} pages by node, expected only node {','.join(map(str, plan.nodes))}; "
                "start it as llama-weights@.service, which binds it"
            )
    except BaseException:
        # Free what is not complete: the next load takes the pages again.
        for target in targets:
            if target.shard.file not in kept:
                target.path.unlink(missing_ok=True)
        raise
    finally:
        for source in sources:
            source.close()
    seconds = max(1e-9, time.monotonic() - begin)
    rate = (total - before) / seconds / 1e9
    how = "buffered" if all(source.direct < 0 for source in sources) else "O_DIRECT"
    say(f"complete: {whole}; {amount(total - before)} read in {seconds:.2f} s, {rate:.2f} GB/s, {how}")
    notify(READY="1", STATUS=f"complete: {whole}")


def check(plan: Plan, run: Path, deep: bool) -> dict[str, Any]:
    """Return whether the store is complete and why not; ``deep`` reads what it holds."""
    try:
        check_mount(plan)
        found = problems(plan, run)
        other = [str(path) for path in store_files(plan) if path not in {plan.target(shard) for shard in plan.shards}]
        if deep:
            with concurrent.futures.ThreadPoolExecutor(max_workers=LANES) as pool:
                found += [text for text in pool.map(lambda shard: damaged(plan, shard), plan.shards) if text]
    except (WeightsError, OSError) as error:
        found, other = [str(error)], []
    pages = sum(plan.pages(shard) for shard in plan.shards)
    return {
        "complete": not found,
        "loading": works(run) and read_json(run / RECORD).get("content") == plan.content,
        "content": plan.content,
        "pages": pages,
        "problems": found,
        "other": other,
    }


def damaged(plan: Plan, shard: Shard) -> str | None:
    """Return what is wrong with the bytes of a store file, or None."""
    sha, left = hashlib.sha256(), shard.bytes
    try:
        with plan.target(shard).open("rb") as stream:
            while left and (piece := stream.read(min(CHUNK, left))):
                sha.update(piece)
                left -= len(piece)
    except OSError as error:
        return f"{shard.file}: {error.strerror}"
    return None if sha.hexdigest() == shard.sha256 else f"{shard.file}: sha256 of the store is {sha.hexdigest()}"


def stop(_number: int, _frame: Any) -> None:
    """End on systemd's wish, giving back what is not complete."""
    raise SystemExit(143)


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["load", "check"])
    parser.add_argument("--plan", type=Path, required=True, help="JSON file of the instance's plan")
    parser.add_argument("--run", type=Path, required=True, help="run-time directory of the instance")
    parser.add_argument("--deep", action="store_true", help="check: compare the SHA-256 of what the store holds")
    parser.add_argument("--no-hash", action="store_true", help="load: compare no SHA-256, whatever the plan says")
    options = parser.parse_args()
    try:
        plan = read_plan(options.plan)
        if options.no_hash:
            plan = dataclasses.replace(plan, hash=False)
        if options.command == "check":
            answer = check(plan, options.run, options.deep)
            print(json.dumps(answer))
            return 0 if answer["complete"] else 1
        signal.signal(signal.SIGTERM, stop)
        os.umask(0o027)
        with exclusive(options.run):
            load(plan, options.run)
    except (WeightsError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr, flush=True)
        notify(STATUS=f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
