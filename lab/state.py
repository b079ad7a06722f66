# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab remembers: where things lie, which hosts exist, and which processes belong to them.

Everything lies below ``${CPULLM_CACHE:-$HOME/.cache/cpullm}/lab``::

    rootfs/   tars of a Debian release, by recipe hash       (cache, may be deleted at any time)
    images/   VM disks and booted states, by recipe hash     (cache, may be deleted at any time)
    keys/     the lab's ssh key, the hosts' host key, known_hosts
    locks/    flock files
    hosts/NAME/host.json   one record per host, and beside it whatever its kind keeps

How a kind of host plugs in
---------------------------
``lab/vm.py`` and ``lab/container.py`` each have a module variable ``KIND`` that satisfies :class:`Kind`; :func:`kind`
finds it by name. The command line does the rest: it makes the :class:`Host` record (name, release, cpus, memory, a
free ssh port), holds :func:`host_lock` around every call, waits for ssh after ``up`` and ``reset``, and deletes the
host's directory and record after ``down``.

Rules that make ``down`` work after any crash:

* processes that live on are started with :func:`spawn`, which writes pid and start time into the record *before* the
  program runs, and marks the environment, so that :func:`host_processes` finds strays and grandchildren too;
* whatever else must be undone (mount, interface, namespace) goes into ``Host.extra`` and is saved *before* it is made;
* ``Kind.down`` works from the record alone, any number of times, and on a host that never came up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

KINDS = ("vm", "container")
RELEASES = ("bookworm", "trixie")
ENVIRONMENT_MARK = "CPULLM_LAB_HOST"
SCHEMA = 1

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class LabError(Exception):
    """Something the user can read and act on: what was found, what was expected, and the way out."""


# --- places ----------------------------------------------------------------------------------------------------------


def lab_home() -> Path:
    """Return the folder that holds everything of the lab; it may not exist yet."""
    cache = os.environ.get("CPULLM_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "cpullm")
    return Path(cache).absolute() / "lab"


def folder(*parts: str) -> Path:
    """Return a folder below the lab's home, made if it is not there."""
    path = lab_home().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def host_directory(name: str) -> Path:
    """Return the folder of one host; it may not exist yet."""
    return lab_home() / "hosts" / check_name(name)


def check_name(name: str) -> str:
    """Return a host's name, or raise LabError if it cannot be a hostname."""
    if not _NAME.fullmatch(name):
        raise LabError(
            f"host name {name!r}: expected 1 to 32 lower-case letters, digits and hyphens, starting with a letter"
        )
    return name


def check_snapshot_name(name: str) -> str:
    """Return a snapshot's name, or raise LabError if it cannot be a file's name."""
    if not _SNAPSHOT.fullmatch(name):
        raise LabError(f"snapshot name {name!r}: expected 1 to 63 letters, digits, dots, underscores and hyphens")
    return name


# --- files -----------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file's content atomically; a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file's content atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def prune(entries: Iterable[Path], keep: Path, days: float = 3) -> None:
    """Delete what another recipe left in the cache and nobody has used for days; hosts hold links to what they use."""
    for entry in entries:
        if entry == keep:
            continue
        with contextlib.suppress(FileNotFoundError):
            if time.time() - entry.stat().st_mtime > days * 86400:
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


@contextlib.contextmanager
def lock(name: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lab's exclusive lock of that name; call ``waiting`` once with a sentence if another process holds it.

    The lock ends with this process: it is not inherited by programs that it starts.
    """
    path = folder("locks") / f"{name}.lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            (waiting or say)(f"waiting for {name}, which process {holder} is working on")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def host_lock(name: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of one host: whoever changes a host or its record holds it."""
    return lock(f"host-{check_name(name)}")


def say(message: str) -> None:
    """Show one line of progress to the user (stderr, so that stdout stays data)."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


# --- processes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that belongs to a host; pid alone does not name one, since the kernel uses pids again."""

    role: str
    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks between the machine's boot and the start of the process."""
    boot_id: str


def boot_id() -> str:
    """Return the id that this machine drew at boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if there is none or it is a zombie.

    A process that is killed is one only with its last thread: until then its files may be open and locked.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may hold anything, spaces and parentheses too.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") and int(fields[17]) <= 1 else int(fields[19])


def process_alive(process: Process) -> bool:
    """Return whether exactly this process still runs, not merely one with its pid."""
    return process.boot_id == boot_id() and start_ticks(process.pid) == process.start_ticks


def stop_process(process: Process, grace_s: float = 5.0, first: signal.Signals = signal.SIGTERM) -> None:
    """End a process, politely at first, and return once it is gone; do nothing if it is gone already."""
    for number, patience_s in ((first, grace_s), (signal.SIGKILL, 10.0)):
        if not process_alive(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
            if not process_alive(process):
                return
            time.sleep(0.02)
    if process_alive(process):
        raise LabError(f"process {process.pid} ({process.role}) did not end after SIGKILL: it hangs in the kernel")


# --- hosts -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Host:
    """One throwaway host, as written to hosts/NAME/host.json."""

    name: str
    kind: str
    release: str = "bookworm"
    cpus: int = 2
    memory_gib: int = 0
    """What the user asked for; 0 means the kind's default."""
    ssh_port: int = 0
    """Port on 127.0.0.1 of this machine that leads to the host's port 22."""
    forwards: list[list[int]] = dataclasses.field(default_factory=list)
    """Further [port on 127.0.0.1, port of the host] pairs."""
    snapshots: list[str] = dataclasses.field(default_factory=list)
    processes: list[Process] = dataclasses.field(default_factory=list)
    created: float = 0.0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The kind's own part; JSON values only."""

    @property
    def directory(self) -> Path:
        """Return the host's folder."""
        return host_directory(self.name)

    def save(self) -> None:
        """Write the record."""
        write_json(self.directory / "host.json", {"schema": SCHEMA, **dataclasses.asdict(self)})

    def process(self, role: str) -> Process | None:
        """Return the newest process of that role if it still runs."""
        for process in reversed(self.processes):
            if process.role == role:
                return process if process_alive(process) else None
        return None

    def drop_dead_processes(self) -> None:
        """Forget processes that no longer run (in memory; the next save writes it)."""
        self.processes = [process for process in self.processes if process_alive(process)]


def load_host(name: str) -> Host | None:
    """Return the record of a host, or None if there is no such host."""
    path = host_directory(name) / "host.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise ValueError("written by another version of the lab")
        data["processes"] = [Process(**process) for process in data["processes"]]
        return Host(**data)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path}: cannot be read: {error}; 'lab down {name}' clears it away") from error


def need_host(name: str) -> Host:
    """Return the record of a host, or raise LabError."""
    host = load_host(name)
    if host is None:
        known = ", ".join(host_names()) or "none"
        raise LabError(f"there is no host {name!r} (known: {known}); 'lab up {name} --kind vm|container' makes one")
    return host


def host_names() -> list[str]:
    """Return the names of all hosts that have a folder, sorted; their records may be damaged."""
    hosts = lab_home() / "hosts"
    if not hosts.is_dir():
        return []
    return sorted(entry.name for entry in hosts.iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))


def forget_host(name: str) -> None:
    """Delete a host's folder with its record."""
    shutil.rmtree(host_directory(name), ignore_errors=True)


def spawn(
    host: Host,
    role: str,
    argv: Sequence[str],
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    directory: Path | None = None,
) -> Process:
    """Start a program that outlives this one, and return it; its pid is on disk before its first instruction.

    The program gets its own session (Ctrl-C in the lab does not reach it), no stdin, and ``log`` (default
    hosts/NAME/ROLE.log, appended) as stdout and stderr; it starts in ``directory`` if one is given. Its environment
    carries ENVIRONMENT_MARK=<host's folder>. If the lab dies between fork and record, the child sees the pipe close
    and never runs the program.
    """
    host.directory.mkdir(parents=True, exist_ok=True)
    path = log or host.directory / f"{role}.log"
    program = shutil.which(argv[0])
    if program is None:
        raise LabError(f"program {argv[0]!r} is not installed: install the packages of lab/packages.txt")
    surroundings = {**os.environ, **(environment or {}), ENVIRONMENT_MARK: str(host.directory)}
    reader, writer = os.pipe()
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writer)
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            if os.read(reader, 1) != b"1":
                os._exit(125)
            os.dup2(nothing, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if directory is not None:
                os.chdir(directory)
            for descriptor in pass_fds:
                os.set_inheritable(descriptor, True)
            os.execve(program, list(argv), surroundings)  # noqa: S606 - a shell would be one process more
        except OSError as error:
            os.write(output, f"cannot start {program}: {error}\n".encode())
        finally:
            os._exit(126)
    try:
        os.close(reader)
        ticks = start_ticks(pid)
        if ticks is None:
            raise LabError(f"{role}: process {pid} ended before it began")
        process = Process(role=role, pid=pid, start_ticks=ticks, boot_id=boot_id())
        host.drop_dead_processes()
        host.processes.append(process)
        host.save()
        os.write(writer, b"1")
    finally:
        os.close(writer)
        os.close(output)
        os.close(nothing)
    return process


def _marked_processes() -> Iterator[tuple[str, Process]]:
    """Yield (host's folder, process) for every running process that :func:`spawn` marked, or a child of one."""
    start = f"{ENVIRONMENT_MARK}=".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        for setting in environment.split(b"\0"):
            ticks = start_ticks(int(entry)) if setting.startswith(start) else None
            if ticks is not None:
                process = Process(role="stray", pid=int(entry), start_ticks=ticks, boot_id=boot_id())
                yield os.fsdecode(setting[len(start) :]), process


def host_processes(name: str) -> list[Process]:
    """Return every running process whose environment carries the host's mark, found by reading /proc."""
    return [process for directory, process in _marked_processes() if directory == str(host_directory(name))]


def lab_processes() -> list[Process]:
    """Return every running process of this lab, whichever host's mark it carries."""
    hosts = str(lab_home() / "hosts") + os.sep
    return [process for directory, process in _marked_processes() if directory.startswith(hosts)]


def stop_processes(host: Host, grace_s: float = 5.0) -> None:
    """End every process of a host, recorded or only marked, newest first, and save the record without them."""
    for process in [*reversed(host.processes), *host_processes(host.name)]:
        stop_process(process, grace_s)
    host.processes = []
    if host.directory.is_dir():
        host.save()


def free_port() -> int:
    """Return a TCP port that is free on 127.0.0.1 and that no record names; call it under lock("ports")."""
    taken = set()
    for name in host_names():
        with contextlib.suppress(LabError):
            other = load_host(name)
            if other is not None:
                taken |= {other.ssh_port, *(pair[0] for pair in other.forwards)}
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


# --- kinds -----------------------------------------------------------------------------------------------------------


class Kind(Protocol):
    """What lab/vm.py and lab/container.py offer as KIND. Every call happens under the host's lock.

    Progress goes through :func:`say`; anything the user can act on is a LabError.
    """

    def prepare(self, host: Host) -> None:
        """Fill in and check the record before anything is made: defaults, limits, missing programs (LabError)."""

    def up(self, host: Host) -> None:
        """Start the host, made from the caches if it is new; return once it boots (ssh may take longer)."""

    def down(self, host: Host) -> None:
        """Stop the host and undo everything outside its folder; the caller then deletes the folder."""

    def alive(self, host: Host) -> bool:
        """Return whether the host runs (its processes do; ssh may not answer yet)."""

    def stop(self, host: Host) -> None:
        """Shut the host down in good order and keep its disk; ``up`` starts it again."""

    def power_cut(self, host: Host) -> None:
        """Take the power away: nothing is flushed. ``up`` starts it again on what its disk then holds."""

    def snapshot(self, host: Host, name: str) -> None:
        """Keep the host's present state under a name (replaces one of that name); adds it to host.snapshots."""

    def reset(self, host: Host, name: str) -> None:
        """Return to a kept state. ``name`` is in host.snapshots; the caller waits for ssh and calls ``settle``."""

    def settle(self, host: Host) -> None:
        """Finish what needs ssh, once it answers after ``up`` or ``reset``: hostname, clock."""

    def restart(self, host: Host) -> None:
        """Press the reset button (VM), or start the running host anew as hard as the kind can."""

    def forward(self, host: Host, local_port: int, port: int) -> None:
        """Lead a port of 127.0.0.1 to a port of the running host; the caller adds it to host.forwards."""

    def console(self, host: Host) -> None:
        """Connect the terminal to the host's console until the user leaves."""

    def console_log(self, host: Host) -> Path:
        """Return the file that collects the console's output."""


def kind(name: str) -> Kind:
    """Return the implementation of a kind of host."""
    if name not in KINDS:
        raise LabError(f"kind {name!r}: expected one of {', '.join(KINDS)}")
    try:
        implementation: Kind = importlib.import_module(f"lab.{name}").KIND
    except ModuleNotFoundError as error:
        if error.name != f"lab.{name}":
            raise
        raise LabError(f"this checkout has no lab/{name}.py") from error
    return implementation
