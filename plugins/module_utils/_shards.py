# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shards of a model on disk: which are verified, and how the missing ones get there.

Imported by the module that looks, and by the program that fetches (roles/model_fetch/files/fetch_model.py).

A shard is downloaded (aria2: resumed, several connections) or copied below ``.partial``, its size and SHA-256 are
checked by us, it is synced, and only then does it get its name. What was verified is kept in a record with size,
inode and times of the file, so that nothing is read again as long as the file was not touched.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = ".cpullm-record.json"
PARTIAL = ".partial"
CHUNK = 8 << 20


@dataclass(frozen=True)
class Shard:
    """One file of a model: its name, its size in bytes and its SHA-256 in hexadecimal."""

    file: str
    bytes: int
    sha256: str


class FetchError(Exception):
    """A shard that cannot be had: the message names it, what was found, what was expected and the way out."""


def shards_of(entries: list[dict[str, Any]]) -> list[Shard]:
    """Return shards from a plan's or a lock's list.

    Raises ValueError for a name that would leave the model's directory, a wrong hash or a wrong size.
    """
    shards = []
    for entry in entries:
        shard = Shard(str(entry["file"]), int(entry["bytes"]), str(entry["sha256"]).lower())
        path = Path(shard.file)
        if path.is_absolute() or ".." in path.parts or path.parts[:1] in ((PARTIAL,), ()) or shard.file == RECORD:
            raise ValueError(f"shard {shard.file!r} is no name below the model's directory")
        if len(shard.sha256) != 64 or not set(shard.sha256) <= set("0123456789abcdef"):
            raise ValueError(f"shard {shard.file}: sha256 is {shard.sha256!r}, expected 64 hexadecimal digits")
        if shard.bytes <= 0:
            raise ValueError(f"shard {shard.file}: bytes is {shard.bytes}, expected more than 0")
        shards.append(shard)
    return shards


def content_id(shards: list[Shard]) -> str:
    """Return the name of a set of shards: 16 hexadecimal digits over names and hashes, whatever their source."""
    lines = sorted(f"{shard.sha256}  {shard.file}\n" for shard in shards)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def stamp(path: Path) -> dict[str, int] | None:
    """Return what tells an untouched file from a changed one, or None where there is no regular file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if not path.is_file() or path.is_symlink():
        return None
    return {"bytes": found.st_size, "inode": found.st_ino, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}


def read_record(directory: Path) -> dict[str, Any]:
    """Return the record of verified shards by file name; empty where there is none or it cannot be read."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def verified(directory: Path, shards: list[Shard]) -> list[Shard]:
    """Return the shards that are there, untouched since they were verified."""
    record = read_record(directory)
    found = []
    for shard in shards:
        entry = record.get(shard.file)
        now = stamp(directory / shard.file)
        if now is not None and entry == {"sha256": shard.sha256, **now} and now["bytes"] == shard.bytes:
            found.append(shard)
    return found


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path, itself included, that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def disk_bytes(path: Path) -> int:
    """Return the bytes that a file takes on its file system, 0 where it is absent."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def needed_bytes(directory: Path, shards: list[Shard]) -> int:
    """Return the bytes that the shards not yet verified still need on the file system of the directory."""
    missing = set(shards) - set(verified(directory, shards))
    there = sum(
        max(disk_bytes(directory / PARTIAL / shard.file), disk_bytes(directory / shard.file)) for shard in missing
    )
    return max(sum(shard.bytes for shard in missing) - there, 0)


def free_bytes(directory: Path) -> int:
    """Return the bytes that an ordinary user may still write on the file system of the directory."""
    found = os.statvfs(existing_parent(directory))
    return found.f_bavail * found.f_frsize


class Status:
    """The status file of this job, replaced in one step: see the module cpullm.epyc.job."""

    def __init__(self, path: Path | None, total: int) -> None:
        """Start at nothing done of ``total`` bytes."""
        self._path, self._total = path, total
        self._lock = threading.Lock()
        self._written = 0.0

    def show(self, phase: str, done: int, message: str, *, total: int | None = None) -> None:
        """Replace the status, at most twice a second."""
        with self._lock:
            now = time.time()
            if self._path is None or now - self._written < 0.5:
                return
            self._written = now
            body = {
                "phase": phase,
                "done": done,
                "total": self._total if total is None else total,
                "unit": "bytes",
                "message": message,
                "updated": now,
            }
            fresh = self._path.with_name(self._path.name + ".new")
            fresh.write_text(json.dumps(body), encoding="utf-8")
            fresh.replace(self._path)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory for one fetch. Raises FetchError where another one holds it."""
    with (directory / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FetchError(f"{directory}: another fetch holds it; wait for it, or end it, and run again") from None
        yield


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, tick: Any) -> str:
    """Return the SHA-256 of a file, calling ``tick`` with the size of each piece read."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(CHUNK):
            sha.update(piece)
            tick(len(piece))
    return sha.hexdigest()


class Store:
    """The directory of one model."""

    def __init__(self, directory: Path, shards: list[Shard], status: Status) -> None:
        """Work on ``directory``, which exists."""
        self.directory, self.shards, self.status = directory, shards, status
        self._lock = threading.Lock()
        self._hashed = 0

    def _tick(self, size: int) -> None:
        with self._lock:
            self._hashed += size
            done = self._hashed
        self.status.show("verify", done, "comparing SHA-256", total=self._verify_total)

    def accept(self, candidates: list[tuple[Shard, Path]]) -> list[str]:
        """Check candidates side by side, name the right ones, and return what is wrong with the others."""
        self._hashed = 0
        self._verify_total = sum(pair[0].bytes for pair in candidates)
        with concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            return [problem for problem in pool.map(lambda pair: self._accept(*pair), candidates) if problem]

    def _accept(self, shard: Shard, path: Path) -> str | None:
        now = stamp(path)
        if now is None:
            return f"{shard.file}: not there"
        if now["bytes"] != shard.bytes:
            return f"{shard.file}: has {now['bytes']} bytes, expected {shard.bytes}"
        found = sha256_of(path, self._tick)
        if found != shard.sha256:
            return f"{shard.file}: sha256 is {found}, expected {shard.sha256}"
        target = self.directory / shard.file
        if path != target:
            path.chmod(0o644)
            sync(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            sync(target.parent)
        with self._lock:
            self._write_record(shard, target)
        return None

    def _write_record(self, shard: Shard, target: Path) -> None:
        record = read_record(self.directory)
        record[shard.file] = {"sha256": shard.sha256, **(stamp(target) or {})}
        fresh = self.directory / (RECORD + ".new")
        fresh.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
        sync(fresh)
        fresh.replace(self.directory / RECORD)
        sync(self.directory)


def resolve(url: str, token: str | None) -> str:
    """Return where a hub's address leads, so that the hub's token never goes to the machine behind it.

    Raises FetchError where the hub refuses.
    """
    if token is None:
        return url

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_args: Any, **_named: Any) -> None:
            return None

    request = urllib.request.Request(url, method="HEAD", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
    try:
        with urllib.request.build_opener(Stay).open(request, timeout=60):
            raise FetchError(f"{url}: answers without a redirect; a token is not handed to a download of its own")
    except urllib.error.HTTPError as error:
        location = error.headers.get("Location")
        if error.code in (301, 302, 303, 307, 308) and location:
            return urllib.parse.urljoin(url, location)
        raise FetchError(
            f"{url}: HTTP {error.code}, expected a redirect to the file; check model_fetch_token and the lock"
        ) from None
    except OSError as error:
        raise FetchError(f"{url}: {error}; check the address and the network") from None


class Aria2:
    """One aria2 process that downloads shards, driven over its JSON-RPC on loopback with a secret of its own."""

    def __init__(self, connections: int, stall_s: int) -> None:
        """Start aria2. The secret goes through a file in memory: no argument, no path, nothing left when killed."""
        self._secret = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        with os.fdopen(os.memfd_create("aria2.conf"), "w", encoding="utf-8") as configuration:
            configuration.write(
                f"enable-rpc=true\nrpc-listen-port={self._port}\nrpc-secret={self._secret}\n"
                f"continue=true\nallow-overwrite=true\nauto-file-renaming=false\nfile-allocation=none\n"
                f"max-connection-per-server={connections}\nsplit={connections}\nmin-split-size=64M\n"
                f"max-concurrent-downloads=4\nmax-tries=8\nretry-wait=3\ntimeout={stall_s}\nconnect-timeout=30\n"
                f"lowest-speed-limit=1K\nauto-save-interval=1\nmax-file-not-found=1\nsummary-interval=0\n"
                f"stop-with-process={os.getpid()}\n"
            )
            configuration.flush()
            number = configuration.fileno()
            try:
                # A child opens its own description of the file, which starts at its first byte.
                self._process = subprocess.Popen(
                    ["aria2c", f"--conf-path=/proc/self/fd/{number}", "--quiet=true"],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[number],
                )
            except OSError as error:
                raise FetchError(f"aria2c does not start: {error}; install the package aria2") from None

    def call(self, method: str, *words: Any) -> Any:
        """Return the result of one RPC call. Raises FetchError for an error that aria2 reports."""
        body = {"jsonrpc": "2.0", "id": "0", "method": f"aria2.{method}", "params": [f"token:{self._secret}", *words]}
        for attempt in range(100):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            try:
                connection.request("POST", "/jsonrpc", json.dumps(body), {"Content-Type": "application/json"})
                answer = json.loads(connection.getresponse().read())
                break
            except ConnectionError:
                if self._process.poll() is not None or attempt == 99:
                    raise FetchError(f"aria2c ended with {self._process.poll()} before it answered") from None
                time.sleep(0.1)
            finally:
                connection.close()
        if "error" in answer:
            raise FetchError(f"aria2c: {answer['error'].get('message')}")
        return answer["result"]

    def close(self) -> None:
        """End the process; what it has downloaded so far is resumed by the next one."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def download(store: Store, missing: list[Shard], request: dict[str, Any]) -> None:
    """Download shards below ``.partial``, resumed where an earlier download ended.

    Raises FetchError with every shard that failed.
    """
    partial = store.directory / PARTIAL
    token = request.get("token") or None
    bases = [request["base_url"], *request.get("mirrors", [])]
    there = sum(shard.bytes for shard in store.shards) - sum(shard.bytes for shard in missing)
    aria2 = Aria2(int(request.get("connections", 8)), int(request.get("stall_timeout_s", 60)))
    try:
        jobs: dict[str, Shard] = {}
        for shard in missing:
            addresses = [f"{base.rstrip('/')}/{urllib.parse.quote(shard.file)}" for base in bases]
            addresses[0] = resolve(addresses[0], token)
            target = partial / shard.file
            target.parent.mkdir(parents=True, exist_ok=True)
            options = {"dir": str(target.parent), "out": target.name}
            jobs[aria2.call("addUri", addresses, options)] = shard
        problems = []
        while jobs:
            done = there
            for gid in list(jobs):
                shard = jobs[gid]
                found = aria2.call("tellStatus", gid, ["status", "completedLength", "errorCode", "errorMessage"])
                if found["status"] == "complete":
                    there += shard.bytes
                    del jobs[gid]
                elif found["status"] in ("error", "removed"):
                    problems.append(f"{shard.file}: {found.get('errorMessage')} (aria2 error {found.get('errorCode')})")
                    del jobs[gid]
                else:
                    done += int(found["completedLength"])
            active = ", ".join(sorted(shard.file for shard in jobs.values())[:2])
            store.status.show("download", done, f"{len(jobs)} left: {active}" if jobs else "downloaded")
            time.sleep(0.5 if jobs else 0)
    finally:
        aria2.close()
    if problems:
        raise FetchError(
            f"{'; '.join(problems)}. What is there is kept and resumed: check the source and run the playbook again"
        )


def copy(store: Store, missing: list[Shard], source: Path) -> None:
    """Copy shards from a local directory below ``.partial``. Raises FetchError for the first that cannot be read."""
    partial = store.directory / PARTIAL
    done = sum(shard.bytes for shard in store.shards) - sum(shard.bytes for shard in missing)
    for shard in missing:
        target = partial / shard.file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (source / shard.file).open("rb") as reader, target.open("wb") as writer:
                while piece := reader.read(CHUNK):
                    writer.write(piece)
                    done += len(piece)
                    store.status.show("copy", done, shard.file)
        except OSError as error:
            raise FetchError(f"{shard.file}: {error}; expected a readable shard in {source}") from None


def fetch(request: dict[str, Any], status_path: Path | None) -> list[str]:
    """Bring every shard of a request to its verified name; return the files that were missing.

    ``request``: ``directory``, ``shards``, and ``base_url`` (with ``mirrors``, ``token``, ``connections``,
    ``stall_timeout_s``) or ``source_directory``. Raises FetchError.
    """
    directory = Path(request["directory"])
    shards = shards_of(request["shards"])
    directory.mkdir(parents=True, exist_ok=True)
    store = Store(directory, shards, Status(status_path, sum(shard.bytes for shard in shards)))
    with exclusive(directory):
        missing = [shard for shard in shards if shard not in verified(directory, shards)]
        # A file that an operator or an unrecorded run left under the right name may be right: look before fetching.
        named = [
            (shard, directory / shard.file)
            for shard in missing
            if (stamp(directory / shard.file) or {"bytes": -1})["bytes"] == shard.bytes
        ]
        store.accept(named)
        absent = [shard for shard in shards if shard not in verified(directory, shards)]
        needed, free = needed_bytes(directory, shards), free_bytes(directory)
        if needed > free:
            raise FetchError(f"{directory}: needs {needed} bytes more, {free} are free; make room and run again")
        if absent:
            if request.get("source_directory"):
                copy(store, absent, Path(request["source_directory"]))
            else:
                download(store, absent, request)
            problems = store.accept([(shard, directory / PARTIAL / shard.file) for shard in absent])
            if problems:
                for shard in absent:
                    if any(problem.startswith(f"{shard.file}:") for problem in problems):
                        (directory / PARTIAL / shard.file).unlink(missing_ok=True)
                raise FetchError(
                    f"{'; '.join(problems)}. Wrong files were removed: check the source, or the lock, and run again"
                )
        shutil.rmtree(directory / PARTIAL, ignore_errors=True)
    return [shard.file for shard in missing]
