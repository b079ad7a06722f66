# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host while it is measured: what a server runs with, what else the machine did meanwhile, what disturbed a run.

With no import but the standard library's: a copy of this file runs on the host beside the program that measures.
Sources of the formats: proc_pid_stat(5), proc_stat(5), proc_vmstat(5), proc_pid_numa_maps(5), proc_pid_net(5),
systemd.unit(5), systemd.service(5), and the kernel's admin-guide/numastat.rst and ABI/testing/sysfs-devices-system-cpu.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What the kernel counts in is a hundredth of a second: a run's two ends may each be one off, for two processes.
SLACK_TICKS = 4
# A library's page that was dropped costs a few; weights that are read from disk cost thousands.
FEW_FAULTS = 16
# Pages that the kernel moves between nodes without meaning the server.
FEW_MIGRATIONS = 256
# A server that was asked nothing wakes a few times a second.
IDLE_TICKS = 2

_HUGE_KIB = 2048
_NODE_PAGES = re.compile(r"\bN([0-9]{1,6})=([0-9]{1,15})\b")
_PAGE_SIZE = re.compile(r"\bkernelpagesize_kB=([0-9]{1,15})\b")
_ESTABLISHED = "01"


# --- What disturbs a run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """Counters of a server and of the machine at one moment; what the machine does not show is None.

    Ticks are hundredths of a second of CPU time: those of the server and of the measuring program, and those in which
    the server's CPUs were busy or taken by a hypervisor.
    """

    seconds: float
    server: int
    program: int
    busy: int
    stolen: int
    faults: int
    swapped: int
    migrated: int
    throttled: int | None
    huge_kib: int
    swap_kib: int
    hottest: float | None
    too_hot: bool


def cpus_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a list in the kernel's format, such as "0-3,8"; raises ValueError."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _dash, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def process_counters(stat: str) -> tuple[int, int]:
    """Return ticks of CPU time and major faults of a process, from its ``stat``."""
    # The name, in brackets, may hold spaces and brackets itself: fields are counted behind the last one.
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]), int(fields[9])


def cpu_counters(stat: str, cpus: Sequence[int]) -> tuple[int, int]:
    """Return the ticks in which these CPUs were busy, and those that a hypervisor took, from ``/proc/stat``."""
    busy = stolen = 0
    wanted = {f"cpu{number}" for number in cpus}
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    return busy, stolen


def counter(vmstat: str, *names: str) -> int:
    """Return the sum of counters of ``/proc/vmstat``; one that the kernel does not have is 0."""
    rows = (line.split() for line in vmstat.splitlines())
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)


def size_kib(status: str, name: str) -> int:
    """Return a size of ``/proc/PID/status`` in KiB, 0 where it tells none."""
    match = re.search(rf"^{name}:\s+([0-9]{{1,15}}) kB$", status, re.MULTILINE)
    return int(match[1]) if match else 0


def established(table: str, port: int) -> int:
    """Return how many connections to a local port are open, from ``/proc/PID/net/tcp`` or ``tcp6``."""
    rows = (line.split() for line in table.splitlines()[1:])
    return sum(
        1 for row in rows if len(row) > 3 and row[3] == _ESTABLISHED and int(row[1].rpartition(":")[2], 16) == port
    )


def pages(numa_maps: str) -> list[dict[str, int]]:
    """Return what a process holds as ``[{"size_kib", "node", "kib"}]``, by the size of its pages and by node."""
    held: dict[tuple[int, int], int] = {}
    for line in numa_maps.splitlines():
        size = _PAGE_SIZE.search(line)
        if size is not None:
            for node, count in _NODE_PAGES.findall(line):
                key = int(size[1]), int(node)
                held[key] = held.get(key, 0) + int(count) * key[0]
    return [{"size_kib": size, "node": node, "kib": held[size, node]} for size, node in sorted(held)]


def anonymous_huge_kib(numa_maps: str) -> int:
    """Return the KiB of huge pages that are the process's own: another server needs as many again."""
    own = [line for line in numa_maps.splitlines() if "anon_hugepage" in line or "file=" not in line]
    return sum(row["kib"] for row in pages("\n".join(own)) if row["size_kib"] >= _HUGE_KIB)


def disturbances(before: Snapshot, after: Snapshot, cpus: int, other_load: float) -> list[str]:
    """Return why what was measured between two moments does not count, in words; none where nothing disturbed it.

    ``cpus`` is how many CPUs the server runs on, ``other_load`` the share of them that others may take.
    """
    reasons = []
    ticks = max(0.0, after.seconds - before.seconds) * 100
    allowed = other_load * cpus * ticks + SLACK_TICKS
    others = (after.busy - before.busy) - (after.server - before.server) - (after.program - before.program)
    for taken, who in ((others, "other processes"), (after.stolen - before.stolen, "the hypervisor")):
        if taken > allowed:
            share = taken / max(ticks, 1)
            reasons.append(
                f"{who} took {share:.2f} of the server's {cpus} CPUs, at most {other_load * cpus:.2f} allowed"
            )
    if after.faults - before.faults > FEW_FAULTS:
        reasons.append(f"the server read {after.faults - before.faults} pages from the disk")
    if after.swapped > before.swapped:
        reasons.append(f"the machine swapped {after.swapped - before.swapped} pages")
    if after.swap_kib:
        reasons.append(f"{after.swap_kib} KiB of the server are swapped out")
    if after.migrated - before.migrated > FEW_MIGRATIONS:
        reasons.append(f"the kernel moved {after.migrated - before.migrated} pages between nodes")
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        reasons.append(f"the CPUs throttled {after.throttled - before.throttled} times")
    if after.too_hot:
        reasons.append(f"a memory module is at its critical temperature, {after.hottest:.0f} degrees Celsius")
    if after.huge_kib != before.huge_kib:
        reasons.append(f"the server's huge pages went from {before.huge_kib} to {after.huge_kib} KiB")
    return reasons


def misplaced(held: Sequence[Mapping[str, int]], nodes: Sequence[int], expected_kib: int | None) -> list[str]:
    """Return why a server's memory is not what is to be measured: nodes it must not use, huge pages that it lacks."""
    huge = [row for row in held if row["size_kib"] >= _HUGE_KIB]
    reasons = [
        f"{row['kib']} KiB in huge pages lie on node {row['node']}, bound to {list(nodes)}"
        for row in huge
        if nodes and row["node"] not in nodes
    ]
    found = sum(row["kib"] for row in huge)
    if expected_kib is not None and found < expected_kib:
        reasons.append(f"{found} KiB lie in huge pages, {expected_kib} planned")
    return reasons


# --- Reading the machine --------------------------------------------------------------------------------------------


def read(path: str) -> str:
    """Return a file's text, or an empty one where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = read(path).strip()
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _named(folder: str, pattern: str) -> list[str]:
    """Return the paths of a folder's entries whose names match, sorted; none where there is no folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [f"{folder}/{name}" for name in names if re.fullmatch(pattern, name)]


def _throttled(root: str) -> int | None:
    counts = [
        _number(f"{cpu}/thermal_throttle/core_throttle_count")
        for cpu in _named(f"{root}/sys/devices/system/cpu", r"cpu[0-9]+")
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _modules(root: str) -> tuple[float | None, bool]:
    """Return the hottest memory module in degrees Celsius, and whether one has reached its critical temperature."""
    hottest, too_hot = None, False
    for sensor in _named(f"{root}/sys/class/hwmon", r"hwmon[0-9]+"):
        if read(f"{sensor}/name").strip() not in ("spd5118", "jc42"):
            continue
        value, critical = _number(f"{sensor}/temp1_input"), _number(f"{sensor}/temp1_crit")
        if value is not None:
            hottest = max(value / 1000, -273.0 if hottest is None else hottest)
            too_hot = too_hot or (critical is not None and value >= critical > 0)
    return hottest, too_hot


def snapshot(pid: int, cpus: Sequence[int], root: str = "") -> Snapshot:
    """Return the counters of now; raises OSError where the process is gone."""
    with open(f"{root}/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
        server, faults = process_counters(stream.read())
    status, vmstat = read(f"{root}/proc/{pid}/status"), read(f"{root}/proc/vmstat")
    busy, stolen = cpu_counters(read(f"{root}/proc/stat"), cpus)
    own = os.times()
    hottest, too_hot = _modules(root)
    return Snapshot(
        seconds=time.monotonic(),
        server=server,
        program=round(100 * (own.user + own.system + own.children_user + own.children_system)),
        busy=busy,
        stolen=stolen,
        faults=faults,
        swapped=counter(vmstat, "pswpin", "pswpout"),
        migrated=counter(vmstat, "numa_pages_migrated"),
        throttled=_throttled(root),
        huge_kib=size_kib(status, "HugetlbPages"),
        swap_kib=size_kib(status, "VmSwap"),
        hottest=hottest,
        too_hot=too_hot,
    )


def memory(pid: int, root: str = "") -> dict[str, Any]:
    """Return where a process's memory lies, and how allocations of the nodes went so far (numastat)."""
    status = read(f"{root}/proc/{pid}/status")
    nodes = []
    for node in _named(f"{root}/sys/devices/system/node", r"node[0-9]+"):
        rows = (line.split() for line in read(f"{node}/numastat").splitlines())
        counts = {row[0]: int(row[1]) for row in rows if len(row) == 2}
        nodes.append({"node": int(node.rpartition("node")[2]), **counts})
    return {
        "pages": pages(read(f"{root}/proc/{pid}/numa_maps")),
        "rss_kib": size_kib(status, "VmRSS"),
        "anonymous_kib": size_kib(status, "RssAnon"),
        "file_kib": size_kib(status, "RssFile"),
        "huge_kib": size_kib(status, "HugetlbPages"),
        "swap_kib": size_kib(status, "VmSwap"),
        "numastat": nodes,
    }


def connections(pid: int, port: int, root: str = "") -> int:
    """Return how many connections to a port are open in the server's network."""
    return sum(established(read(f"{root}/proc/{pid}/net/{table}"), port) for table in ("tcp", "tcp6"))


def primary_cpus(cpus: Sequence[int], root: str = "") -> tuple[int, ...]:
    """Return the first hardware thread of each core among these CPUs."""
    chosen: dict[str, int] = {}
    for number in sorted(cpus):
        siblings = read(f"{root}/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").strip()
        chosen.setdefault(siblings or str(number), number)
    return tuple(sorted(chosen.values()))


def machine(root: str = "") -> dict[str, Any]:
    """Return what results depend on, as the collection's other results name it, and the settings that matter."""
    cpu = re.search(r"^model name\s*: (.*)$", read(f"{root}/proc/cpuinfo"), re.MULTILINE)
    total = re.search(r"^MemTotal:\s+([0-9]+) kB$", read(f"{root}/proc/meminfo"), re.MULTILINE)
    governors = {read(f"{policy}/scaling_governor").strip() for policy in _named(f"{root}{_POLICIES}", "policy[0-9]+")}
    thp = re.search(r"\[(\w+)\]", read(f"{root}/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "cpu": cpu[1] if cpu else "unknown",
        "cores": os.cpu_count(),
        "memory_gib": round(int(total[1]) / (1 << 20), 1) if total else None,
        "kernel": os.uname().release,
        "governors": sorted(governors),
        "numa_balancing": _number(f"{root}/proc/sys/kernel/numa_balancing"),
        "transparent_hugepages": thp[1] if thp else None,
        "swap_kib": size_kib(read(f"{root}/proc/meminfo"), "SwapTotal"),
    }


_POLICIES = "/sys/devices/system/cpu/cpufreq"


def free_pages(size: int = 1048576, nodes: Sequence[int] = (), root: str = "") -> int:
    """Return the huge pages of a size in KiB that nobody holds, of these nodes or of all."""
    pool = f"hugepages/hugepages-{size}kB/free_hugepages"
    if nodes:
        return sum(_number(f"{root}/sys/devices/system/node/node{node}/{pool}") or 0 for node in nodes)
    return _number(f"{root}/sys/kernel/mm/{pool}") or 0


def available_kib(root: str = "") -> int:
    """Return what memory the kernel could give away without swapping."""
    return size_kib(read(f"{root}/proc/meminfo"), "MemAvailable")


# --- What a unit runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What a server's unit says: its command as raw words of systemd, where it listens, and its secrets' files."""

    words: tuple[str, ...]
    host: str
    port: int
    nodes: tuple[int, ...]
    key_file: str | None
    certificate: str | None

    @property
    def url(self) -> str:
        """Return where the server can be asked on its own host."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 # compared, not bound
        name = f"[{local}]" if ":" in local else local
        return f"{'https' if self.certificate else 'http'}://{name}:{self.port}"

    @property
    def binary(self) -> str:
        """Return the program."""
        return plain_word(self.words[0])


def _logical_lines(text: str) -> list[str]:
    """Return the lines of a unit file without comments, continued ones as one."""
    lines: list[str] = []
    open_line = False
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith(("#", ";")) or (not line and not open_line):
            continue
        ends_open = line.endswith("\\")
        line = line[:-1].rstrip() if ends_open else line
        if open_line:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
        open_line = ends_open
    return lines


def split_words(line: str) -> list[str]:
    """Return the words of a command line as they stand, quotes and escapes in them."""
    return re.findall(r'(?:"(?:[^"\\]|\\.)*"|[^\s"])+', line)


def plain_word(word: str) -> str:
    """Return a word as the program gets it; a variable of systemd's stays as it is."""
    text = word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word
    return re.sub(r"\\(.)", r"\1", text).replace("%%", "%").replace("$$", "$")


def quoted_word(text: str) -> str:
    """Return a text as one word of a unit's command line; raises ValueError for a control character."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"found {text!r}, expected one line of text")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", escaped) else f'"{escaped}"'


def settings(text: str, name: str) -> list[str]:
    """Return the values of a setting in a unit's files, one after another; an empty value takes back those before."""
    values: list[str] = []
    for line in _logical_lines(text):
        key, equals, value = line.partition("=")
        if equals and key.strip() == name:
            values = [*values, value.strip()] if value.strip() else []
    return values


def parse_unit(text: str) -> Unit:
    """Return what a unit runs, from all its files in systemd's order; raises ValueError naming what is missing."""
    commands = settings(text, "ExecStart")
    if not commands:
        raise ValueError("found no ExecStart= in the unit, expected the server's command")
    words = split_words(commands[-1])
    values = [plain_word(word) for word in words]

    def after(flag: str) -> str | None:
        # Of a flag that is given twice the last one counts for the server as well.
        places = [number for number, value in enumerate(values[:-1]) if value == flag]
        return values[places[-1] + 1] if places else None

    port = after("--port")
    if port is None or not port.isdecimal():
        raise ValueError(f"found --port {port} in the unit's command, expected a number")
    credentials = dict(value.partition(":")[::2] for value in settings(text, "LoadCredential"))

    def file_of(flag: str, credential: str) -> str | None:
        value = after(flag)
        return credentials.get(credential, value) if value else None

    masks = settings(text, "NUMAMask")
    return Unit(
        words=tuple(words),
        host=after("--host") or "127.0.0.1",
        port=int(port),
        nodes=cpus_of(masks[-1].replace(" ", ",")) if masks else (),
        key_file=file_of("--api-key-file", "api-keys"),
        certificate=file_of("--ssl-cert-file", "tls-certificate"),
    )


def second_unit(
    text: str,
    number: int,
    name: str,
    port: int,
    *,
    binary: str | None = None,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    most_seconds: int,
    returns_to: str | None = None,
) -> str:
    """Return a unit file that runs a server as an instance's files say, beside it, on another port of loopback.

    ``text`` are the instance's files in systemd's order. The account, the binding, the hardening and the secrets stay;
    the program, further arguments and variables may be others. It ends by itself after ``most_seconds``, and then
    starts ``returns_to`` where that is given: what happens when the measuring program was killed.
    """
    unit = parse_unit(text)
    words = [quoted_word(binary) if binary else unit.words[0], *unit.words[1:]]
    words += ["--host", "127.0.0.1", "--port", str(port), *(quoted_word(argument) for argument in arguments)]
    kept = []
    section = ""
    for line in _logical_lines(text):
        if line.startswith("["):
            section = line
        if section != "[Install]":
            # What systemd would put in for an instance; a doubled percent sign is one that stays.
            kept.append(re.sub(r"(?<!%)((?:%%)*)%[iI]", rf"\g<1>{number}", line))
    lines = [
        *kept,
        "[Unit]",
        f"Description=llama.cpp server, measured by the role benchmark ({name})",
        *([f"OnFailure={returns_to}"] if returns_to else []),
        "[Service]",
        "Restart=no",
        f"RuntimeMaxSec={most_seconds}",
        "RuntimeDirectory=",
        f"SyslogIdentifier={name}",
        "ExecStartPre=",
        "ExecStartPost=",
        "ExecStart=",
        "ExecStart=" + " ".join(words),
        *(f"Environment={quoted_word(f'{key}={value}')}" for key, value in (environment or {}).items()),
    ]
    return "\n".join(lines) + "\n"
