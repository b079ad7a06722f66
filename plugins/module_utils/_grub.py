# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GRUB as Debian and Ubuntu set it up: what its files say, our drop-in, and whether huge pages can be asked for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline, _hugepages, _iomem
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import read_optional, read_text

DEFAULTS = "/etc/default/grub"
DROP_INS = "/etc/default/grub.d"
DROP_IN = DROP_INS + "/60-cpullm-hugepages.cfg"
CONFIG = "/boot/grub/grub.cfg"
# The huge page arguments that were ours before the drop-in's present ones, while this boot or an old grub.cfg may still
# have them. Without it a host whose power failed half way would look like one that somebody else prepared.
RECORD = "/var/lib/cpullm/grub_hugepages.json"
MKCONFIG = ("/usr/sbin/grub-mkconfig", "/usr/bin/grub-mkconfig")
GIB = 1 << 30
# Ends the name of a file that is being written, and of one that was replaced while GRUB may still look for it.
FRESH = ".cpullm-new"
OLD = ".cpullm-old"
# Ends the name of a grub.cfg that is being generated; grub-mkconfig writes to the second one first.
GENERATED = (".cpullm", ".cpullm.new")
# _IOW('f', 43, __u32), fs/ext4/ext4.h.
EXT4_IOC_CHECKPOINT = 0x4004662B
# Runs an argument list; returns its exit status, output and errors.
Runner = Callable[[list[str]], tuple[int, str, str]]

HEADER = """\
# Managed by cpullm.epyc, role grub_hugepages. The whole file is replaced at each change.
#
# Reserves huge pages for model weights at boot, when memory is not fragmented yet. The arguments keep their order:
# hugepages= counts for the hugepagesz= before it, and the kernel ignores a second hugepagesz= of one size.
# They are added to GRUB_CMDLINE_LINUX_DEFAULT, which the recovery entries do not get: those boot without any of it.
"""


@dataclass(frozen=True)
class Place:
    """A line of a file."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Entry:
    """A Linux entry of GRUB's menu."""

    title: str
    section: str
    line: int
    arguments: tuple[str, ...]

    @property
    def recovery(self) -> bool:
        """Whether it is a rescue path, which GRUB_CMDLINE_LINUX_DEFAULT does not reach."""
        return "(recovery mode)" in self.title or bool({"single", "recovery"} & set(self.arguments))


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for."""

    method: str = "boot"
    size_kib: int = 1048576
    pages: tuple[tuple[int, int], ...] = ()
    arguments: tuple[str, ...] = ()
    reserve_bytes: int = 0
    takeover: bool = False


@dataclass(frozen=True)
class Host:
    """What was read."""

    boot_id: str
    release: str
    running: tuple[str, ...]
    cpu_flags: frozenset[str]
    memory: _iomem.Memory
    pools: tuple[_hugepages.Pool, ...]
    default_size_kib: int | None
    drop_in: str | None
    config: str | None
    mkconfig: str | None
    drop_ins_read: bool
    conflicts: tuple[Place, ...] = ()
    overwrites: tuple[Place, ...] = ()
    ours: tuple[tuple[str, ...], ...] = ()
    boot_free_bytes: int | None = None


# The running command line of a trial boot names the trial.
MARK = "cpullm.trial="

TAKEOVER = """\
#
# grub_hugepages_takeover: what files read before this one say of huge pages is left out of both variables. Those files
# stay as they are, and without this one they count again.
""" + "".join(
    f"""{name}=$(printf '%s\\n' "${name}" | sed -E '{_cmdline.SED_HUGEPAGES}')\n"""
    for name in ("GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT")
)


def render_drop_in(arguments: Sequence[str], takeover: bool = False) -> str:
    """Return the drop-in's text: it adds to what other files set, and takes away only what it is to take over."""
    return (
        HEADER
        + (TAKEOVER if takeover else "")
        + 'GRUB_CMDLINE_LINUX_DEFAULT="${GRUB_CMDLINE_LINUX_DEFAULT:+$GRUB_CMDLINE_LINUX_DEFAULT }'
        + " ".join(arguments)
        + '"\n'
    )


def drop_in_arguments(text: str | None) -> list[str]:
    """Return the arguments that a drop-in of ours adds."""
    match = re.search(r'^GRUB_CMDLINE_LINUX_DEFAULT="\$\{[^}]*\}([^"]*)"$', text or "", re.MULTILINE)
    return _cmdline.split(match[1]) if match else []


def code_of(line: str) -> str:
    """Return a shell line without its comment."""
    quote = ""
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "#" and (index == 0 or line[index - 1].isspace()):
            return line[:index]
    return line


def find_conflicts(file: str, text: str) -> list[Place]:
    """Return the lines of a shell file that set huge page arguments."""
    return [
        Place(file, number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if _cmdline.find_hugepage_arguments(code_of(line))
    ]


def find_overwrites(file: str, text: str) -> list[Place]:
    """Return the lines that set GRUB_CMDLINE_LINUX_DEFAULT anew instead of adding to it."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*(?:export\s+)?GRUB_CMDLINE_LINUX_DEFAULT=(.*)", code_of(line))
        if match and not re.search(r"\$\{?GRUB_CMDLINE_LINUX_DEFAULT", match[1]):
            found.append(Place(file, number, line.strip()))
    return found


def parse_entries(text: str) -> list[Entry]:
    """Return the Linux entries of a grub.cfg that grub-mkconfig made."""
    entries: list[Entry] = []
    title = section = ""
    for number, line in enumerate(text.splitlines(), 1):
        begin = re.match(r"### BEGIN (\S+) ###", line)
        menu = re.match(r"\s*menuentry\s+(?:'((?:[^']|'\\'')*)'|\"([^\"]*)\")", line)
        linux = re.match(r"\s*linux(?:16|efi)?\s+(\S+)(.*)", line)
        if begin:
            section = begin[1]
        elif menu:
            title = (menu[1] or menu[2] or "").replace("'\\''", "'")
        elif linux:
            entries.append(Entry(title, section, number, tuple(_cmdline.split(linux[2]))))
    return entries


def ordinary_entries(text: str) -> list[Entry]:
    """Return the entries that boot this system's kernels in the ordinary way: what 10_linux made, less recovery.

    Entries of 40_custom or os-prober are other people's. Where no section says 10_linux, all count.
    """
    entries = [entry for entry in parse_entries(text) if not entry.recovery]
    return [entry for entry in entries if entry.section.endswith("/10_linux")] or entries


def config_faults(text: str, wanted: Sequence[str]) -> list[str]:
    """Return why a grub.cfg would not boot the wanted arguments; [] where it would, in every ordinary entry."""
    entries = ordinary_entries(text)
    if not entries:
        return [f"{CONFIG} has no entry for Linux"]
    return [
        f"{CONFIG}:{entry.line}: entry '{entry.title}' has "
        f"{' '.join(_cmdline.hugepage_arguments(entry.arguments)) or 'no huge page argument'}, "
        f"expected {' '.join(wanted) or 'none'}"
        for entry in entries
        if not _cmdline.carries(entry.arguments, wanted)
    ]


def read_host(root: str = "/") -> Host:
    """Return everything about the host that matters here; raises OSError or ValueError where the kernel hides it."""
    base = root.rstrip("/")
    drop_ins = sorted(name for name in _listdir(base + DROP_INS) if name.endswith(".cfg"))
    conflicts: list[Place] = []
    overwrites: list[Place] = []
    ours = os.path.basename(DROP_IN)
    for file in [DEFAULTS, *(f"{DROP_INS}/{name}" for name in drop_ins)]:
        text = read_optional(root, file)
        if text is None or file == DROP_IN:
            continue
        conflicts += find_conflicts(file, text)
        # Read in the order of their names: one after ours can undo it.
        if file != DEFAULTS and os.path.basename(file) > ours:
            overwrites += find_overwrites(file, text)
    pools = _hugepages.read(root)
    cpuinfo = re.search(r"^flags\s*:(.*)$", read_text(root, "/proc/cpuinfo"), re.MULTILINE)
    mkconfig = next((path for path in MKCONFIG if os.path.exists(base + path)), None)
    release = read_text(root, "/proc/sys/kernel/osrelease").strip()
    return Host(
        boot_id=read_text(root, "/proc/sys/kernel/random/boot_id").strip(),
        release=release,
        running=tuple(_cmdline.split(read_text(root, "/proc/cmdline"))),
        cpu_flags=frozenset(cpuinfo[1].split() if cpuinfo else ()),
        memory=_iomem.read(root, release),
        pools=pools.pools,
        default_size_kib=pools.default_size_kib,
        drop_in=read_optional(root, DROP_IN),
        config=read_optional(root, CONFIG),
        mkconfig=mkconfig,
        drop_ins_read=bool(mkconfig and "default/grub.d" in (read_optional(root, mkconfig) or "")),
        conflicts=tuple(conflicts),
        overwrites=tuple(overwrites),
        ours=tuple(_read_record(root)),
        boot_free_bytes=_free_bytes(base + os.path.dirname(CONFIG)),
    )


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _free_bytes(path: str) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _read_record(root: str) -> list[tuple[str, ...]]:
    """Return the argument lists of the record; an unreadable one counts as none, and is written anew."""
    text = read_optional(root, RECORD)
    try:
        data = json.loads(text) if text else []
    except ValueError:
        return []
    if not isinstance(data, list):
        return []
    return [tuple(map(str, item)) for item in data if isinstance(item, list)]


def pages_found(host: Host, wanted: Wanted) -> list[dict[str, Any]]:
    """Return the wanted pools beside the found ones, in the order asked."""
    rows = []
    for node, asked in wanted.pages:
        pool = next((p for p in host.pools if p.node == node and p.size_kib == wanted.size_kib), None)
        rows.append(
            {
                "node": node,
                "size_kib": wanted.size_kib,
                "asked": asked,
                "found": pool.total if pool else 0,
                "free": pool.free if pool else 0,
            }
        )
    return rows


def pool_faults(host: Host, wanted: Wanted) -> list[str]:
    """Return a line for each node whose pool is short."""
    unit = f"{wanted.size_kib // 1024} MiB" if wanted.size_kib < GIB // 1024 else f"{wanted.size_kib // 1048576} GiB"
    return [
        f"node {row['node']}: {row['asked']} pages of {unit} asked, {row['found']} found"
        for row in pages_found(host, wanted)
        if row["found"] < row["asked"]
    ]


def foreign_running(host: Host) -> list[str]:
    """Return the running command line's huge page arguments where they are neither ours nor from a file of GRUB's."""
    running = _cmdline.hugepage_arguments(host.running)
    known = [_cmdline.hugepage_arguments(drop_in_arguments(host.drop_in)), *map(list, host.ours)]
    # Conflicts in files explain them, and are refused by themselves.
    return [] if not running or running in known or host.conflicts or on_trial(host.running) else running


def on_trial(running: Sequence[str]) -> str | None:
    """Return the id of the trial that the running command line names, or None."""
    found = [argument[len(MARK) :] for argument in running if argument.startswith(MARK)]
    return found[-1] if found else None


def taken_over(place: Place) -> bool:
    """Return whether our drop-in is read after a file, and so can leave out what that one sets."""
    return place.file == DEFAULTS or os.path.basename(place.file) < os.path.basename(DROP_IN)


def findings(host: Host, wanted: Wanted) -> list[str]:
    """Return why the wanted pages cannot be reserved by GRUB; nothing may be touched unless this is empty."""
    found = _cmdline.check(wanted.arguments)
    found += _iomem.findings(host.memory, host.cpu_flags, wanted.size_kib, wanted.pages, wanted.reserve_bytes)
    if wanted.method == "runtime":
        return found
    if host.config is None or host.mkconfig is None:
        missing = CONFIG if host.config is None else MKCONFIG[0]
        found.append(
            f"no GRUB found ({missing} does not exist): reserve the pages in the way this host boots, and set "
            "grub_hugepages_method: external to have them verified"
        )
        return found
    if not host.drop_ins_read:
        found.append(f"{host.mkconfig} does not read {DROP_INS}: this GRUB is not set up the way Debian does it")
    if host.boot_free_bytes is not None and host.boot_free_bytes < 3 * len(host.config) + (1 << 20):
        found.append(
            f"{os.path.dirname(CONFIG)} has {host.boot_free_bytes // 1024} KiB free, "
            f"expected {(3 * len(host.config) + (1 << 20)) // 1024} to replace grub.cfg in one step: make room there"
        )
    found += [
        f"{place}: huge page arguments that are not ours. The kernel takes the first hugepagesz= of a size and ignores "
        "the second with its pages: remove them there"
        + (", or set grub_hugepages_takeover: true to have them left out" if taken_over(place) else "")
        for place in host.conflicts
        if not (wanted.takeover and taken_over(place))
    ]
    found += [
        f"{place}: read after {DROP_IN}, it sets anew what ours adds to: give it a name that sorts before 60, or let "
        "it add to $GRUB_CMDLINE_LINUX_DEFAULT"
        for place in host.overwrites
    ]
    foreign = foreign_running(host)
    if foreign:
        found.append(
            f"the running command line has {' '.join(foreign)}, which no file in {DEFAULTS} or {DROP_INS} sets: find "
            "what boots this host (a hand-edited grub.cfg, another boot loader), or reboot it into its own default"
        )
    return found


def survey(host: Host, wanted: Wanted) -> dict[str, Any]:
    """Return the fact `cpullm_grub_hugepages`."""
    boot = wanted.method == "boot"
    running_right = _cmdline.carries(host.running, wanted.arguments)
    faults = pool_faults(host, wanted)
    configured = boot and host.config is not None and not config_faults(host.config, wanted.arguments)
    return {
        "readable": True,
        "reason": None,
        "method": wanted.method,
        "boot_id": host.boot_id,
        "arguments": list(wanted.arguments),
        "running": _cmdline.hugepage_arguments(host.running),
        "running_right": running_right,
        "configured": configured and host.drop_in == render_drop_in(wanted.arguments, wanted.takeover),
        "asked_of_grub": host.drop_in is not None or bool(host.ours),
        "reboot_required": boot and not running_right,
        "pools": pages_found(host, wanted),
        "pools_right": not faults,
        "pool_faults": faults,
        "conflicts": [asdict(place) for place in host.conflicts],
        "findings": [] if wanted.method == "external" else findings(host, wanted),
        "memory_bytes": host.memory.memory_bytes,
    }


@dataclass(frozen=True)
class Change:
    """What a run does: None is a file that is not there."""

    drop_in_before: str | None
    drop_in_after: str | None
    regenerate: bool
    config_before: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def needed(self) -> bool:
        """Whether anything is to be done."""
        return self.regenerate or self.drop_in_before != self.drop_in_after


def plan(host: Host, arguments: Sequence[str] | None, takeover: bool = False) -> Change:
    """Return the way from the host's GRUB to one with these arguments, or (None) to one without a drop-in of ours.

    The generated file is compared, not remembered: a run that died between drop-in and grub.cfg is made good by the
    next one.
    """
    after = None if arguments is None else render_drop_in(arguments, takeover)
    wanted = tuple(arguments or ())
    regenerate = host.drop_in != after
    before: list[str] = []
    if host.config is None:
        regenerate = False
    else:
        entries = ordinary_entries(host.config)
        before = [f"{entry.title}: {' '.join(_cmdline.hugepage_arguments(entry.arguments))}" for entry in entries]
        # Where other files set such arguments, nobody but grub-mkconfig can say what the entries should have.
        if arguments is not None or not host.conflicts:
            regenerate = regenerate or bool(config_faults(host.config, wanted))
    return Change(host.drop_in, after, regenerate, tuple(before), wanted)


def difference(change: Change) -> list[dict[str, str]]:
    """Return the change as Ansible's diff shows it; of grub.cfg the huge page arguments of each entry."""
    parts = []
    if change.drop_in_before != change.drop_in_after:
        parts.append(
            {
                "before_header": DROP_IN,
                "after_header": DROP_IN,
                "before": change.drop_in_before or "",
                "after": change.drop_in_after or "",
            }
        )
    if change.regenerate:
        header = f"{CONFIG} (huge page arguments of its entries)"
        titles = [line.rpartition(": ")[0] for line in change.config_before]
        parts.append(
            {
                "before_header": header,
                "after_header": header,
                "before": "".join(f"{line.rstrip()}\n" for line in change.config_before),
                "after": "".join(f"{title}: {' '.join(change.arguments)}".rstrip() + "\n" for title in titles),
            }
        )
    return parts


def write_durably(path: str, text: str, mode: int) -> None:
    """Replace a file in one step that outlives a power cut."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fresh = path + FRESH
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(descriptor, mode)
            stream.write(text)
            stream.flush()
            os.fsync(descriptor)
        os.replace(fresh, path)
    except OSError as error:
        # A disk without room: the half of it goes, and the message gets the name that a write does not give it.
        remove_durably(fresh)
        raise OSError(error.errno, error.strerror, path) from error
    sync_directory(path)


def remove_durably(path: str) -> None:
    """Remove a file, or find it gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_directory(path)


def sync_directory(path: str) -> None:
    """Make a rename or removal outlive a power cut."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_for_grub(fresh: str | None, target: str) -> None:
    """Put a file in the place of another that GRUB reads, or (None) remove that one; raises OSError.

    GRUB reads the file system without its journal. After a power cut it may still follow the old name to the old file,
    whose blocks are free by then and may hold something else. So the old file stays under a second name until the new
    state is where GRUB looks.
    """
    kept = target + OLD
    remove_durably(kept)
    with contextlib.suppress(OSError):
        # FAT has no second names, and no journal.
        os.link(target, kept)
    if fresh is None:
        remove_durably(target)
    else:
        os.replace(fresh, target)
        sync_directory(target)
    write_journal_out(os.path.dirname(target))
    remove_durably(kept)


def write_journal_out(directory: str) -> None:
    """Write a file system's journal to its places, where it has one; raises OSError.

    fsync and sync end in the journal. EXT4_IOC_CHECKPOINT of Linux 5.14 goes on from there.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
        fcntl.ioctl(descriptor, EXT4_IOC_CHECKPOINT, struct.pack("I", 0))
    except OSError as error:
        # Another file system, an older kernel, an ext4 without a journal.
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
            raise
        os.sync()
    finally:
        os.close(descriptor)


def apply(host: Host, change: Change, run: Runner, root: str = "/") -> None:
    """Make the change; raises ValueError with what went wrong, after GRUB's files are as they were before.

    grub.cfg is generated beside the old one, checked, and renamed over it. Debian's update-grub ends in a copy over the
    file instead, and a power cut in it leaves half a configuration.
    """
    base = root.rstrip("/")
    before = tuple(_cmdline.hugepage_arguments(drop_in_arguments(host.drop_in)))
    _write_record(base, [*host.ours, before])
    _put(base + DROP_IN, change.drop_in_after)
    try:
        if change.regenerate:
            _regenerate(host, change, run, base)
    except BaseException:
        _put(base + DROP_IN, change.drop_in_before)
        raise
    # From here on an older list can only be what this boot still runs with.
    running = tuple(_cmdline.hugepage_arguments(host.running))
    _write_record(base, [item for item in (*host.ours, before) if item == running])


def forget(host: Host, root: str = "/") -> bool:
    """Remove a record that this boot no longer needs; return whether there was one."""
    running = tuple(_cmdline.hugepage_arguments(host.running))
    if not host.ours or running in host.ours:
        return False
    _write_record(root.rstrip("/"), [])
    return True


def _put(path: str, text: str | None) -> None:
    if text is None:
        remove_durably(path)
    else:
        write_durably(path, text, 0o644)


def _write_record(base: str, lists: Sequence[tuple[str, ...]]) -> None:
    kept = [list(item) for item in dict.fromkeys(lists) if item]
    if kept:
        write_durably(base + RECORD, json.dumps(kept) + "\n", 0o644)
    else:
        remove_durably(base + RECORD)


def _regenerate(host: Host, change: Change, run: Runner, base: str) -> None:
    """Replace grub.cfg by what grub-mkconfig makes now, if that is sound and boots what is wanted."""
    if host.mkconfig is None:
        raise ValueError(f"{MKCONFIG[0]} does not exist, so {CONFIG} cannot be generated")
    target = os.path.realpath(base + CONFIG)
    fresh = target + GENERATED[0]
    try:
        code, _out, errors = run([base + host.mkconfig, "-o", fresh])
        if code != 0:
            raise ValueError(f"grub-mkconfig ended with rc {code}: {errors.strip()[-1000:]}")
        code, _out, errors = run(["grub-script-check", fresh])
        if code != 0:
            raise ValueError(f"grub-script-check refuses the generated file, rc {code}: {errors.strip()[-1000:]}")
        with open(fresh, encoding="utf-8", errors="replace") as stream:
            text = stream.read()
        faults = config_faults(text, change.arguments) if change.drop_in_after is not None else []
        if not ordinary_entries(text):
            faults.append("no entry for Linux")
        if faults:
            raise ValueError(
                "the generated configuration does not boot what is wanted, so it was not installed: "
                + "; ".join(faults)
            )
        descriptor = os.open(fresh, os.O_RDONLY)
        try:
            old = os.stat(target)
            os.fchmod(descriptor, old.st_mode & 0o7777)
            os.fchown(descriptor, old.st_uid, old.st_gid)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        replace_for_grub(fresh, target)
    finally:
        for ending in GENERATED:
            remove_durably(target + ending)
