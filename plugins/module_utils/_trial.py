# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel command line on trial: booted once, verified, and only then the default.

What a trial leaves on the host while it lasts, in the order of writing; the reverse takes it away again:

    /var/lib/cpullm/boot_trial.json                        what is tried, and what the host was like before
    /etc/systemd/system/cpullm-boot-trial.service          reboots the trial boot when nobody verifies it in time
    /etc/systemd/system/{sysinit,emergency}.target.wants/  links to it
    /boot/grub/custom.cfg                                  the trial entry, between two marks
    /boot/grub/grubenv                                     next_entry; GRUB takes it back before it loads the kernel

Beside them /var/lib/cpullm/boot_trial.lock names the play at work, and boot_trial.log holds what a trial boot saw
before its deadline ended it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline, _grub, _menu
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import read_optional

STATE = "/var/lib/cpullm"
RECORD = STATE + "/boot_trial.json"
LOCK = STATE + "/boot_trial.lock"
LOG = STATE + "/boot_trial.log"
UNITS = "/etc/systemd/system"
UNIT_NAME = "cpullm-boot-trial.service"
UNIT = f"{UNITS}/{UNIT_NAME}"
# Emergency mode starts this target alone; everything else goes through sysinit.target.
TARGETS = ("sysinit.target", "emergency.target")
LINKS = tuple(f"{UNITS}/{target}.wants/{UNIT_NAME}" for target in TARGETS)
CUSTOM = "/boot/grub/custom.cfg"
ENVIRONMENT = "/boot/grub/grubenv"
# What a power cut may leave of a file that was being written.
HALVES = (
    RECORD + _grub.FRESH,
    UNIT + _grub.FRESH,
    CUSTOM + _grub.FRESH,
    CUSTOM + _grub.OLD,
    _grub.CONFIG + _grub.OLD,
    *(_grub.CONFIG + ending for ending in _grub.GENERATED),
    _grub.DROP_IN + _grub.FRESH,
    _grub.RECORD + _grub.FRESH,
)
INITRAMFS = "/usr/share/initramfs-tools/init"
# Seconds until a panicked kernel or Debian's initramfs shell reboots.
PANIC_S = 10
# Seconds that the first process may be stuck before a watchdog resets the machine.
WATCHDOG_S = 60
MIN_DEADLINE_S = 30

STATES = ("none", "armed", "running", "ended")


@dataclass(frozen=True)
class Record:
    """What is tried, and what the host was like before."""

    id: str
    arguments: tuple[str, ...]
    size_kib: int
    pages: tuple[tuple[int, int], ...]
    reserve_bytes: int
    takeover: bool
    boot_id: str
    failed_units: tuple[str, ...]
    deadline_s: int
    armed_at: int
    panic_s: int

    @property
    def wanted(self) -> _grub.Wanted:
        """Return what the trial is for."""
        return _grub.Wanted("boot", self.size_kib, self.pages, self.arguments, self.reserve_bytes, self.takeover)


@dataclass(frozen=True)
class Found:
    """A trial's traces on a host; None is a file that is not there."""

    record: Record | None = None
    record_text: str | None = None
    unit: str | None = None
    links: tuple[str, ...] = ()
    custom: str | None = None
    environment: str | None = None
    log: str | None = None
    halves: tuple[str, ...] = ()
    initramfs_tools: bool = True

    @property
    def variables(self) -> dict[str, str]:
        """Return GRUB's variables."""
        return _menu.parse_environment(self.environment or "")

    @property
    def chosen(self) -> bool:
        """Whether GRUB is told to boot the trial entry next."""
        return self.variables.get("next_entry") == _menu.ENTRY

    @property
    def block(self) -> str | None:
        """Return our part of custom.cfg."""
        return _menu.block_of(self.custom or "")

    @property
    def traces(self) -> tuple[str, ...]:
        """Return the files in which something of a trial is."""
        found = [RECORD] if self.record_text is not None else []
        found += [UNIT] if self.unit is not None else []
        found += list(self.links)
        found += [CUSTOM] if self.block is not None else []
        found += [ENVIRONMENT] if self.chosen else []
        found += list(self.halves)
        return tuple(found)


# --- Pure -------------------------------------------------------------------------------------------------------------


def parse_record(text: str) -> Record:
    """Return a record from its file; raises ValueError on one that no run of ours wrote."""
    try:
        data = json.loads(text)
        return Record(
            id=str(data["id"]),
            arguments=tuple(map(str, data["arguments"])),
            size_kib=int(data["size_kib"]),
            pages=tuple((int(node), int(pages)) for node, pages in data["pages"]),
            reserve_bytes=int(data["reserve_bytes"]),
            takeover=bool(data["takeover"]),
            boot_id=str(data["boot_id"]),
            failed_units=tuple(map(str, data["failed_units"])),
            deadline_s=int(data["deadline_s"]),
            armed_at=int(data["armed_at"]),
            panic_s=int(data["panic_s"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{RECORD} is no record of a trial: {type(error).__name__}: {error}") from error


def render_record(record: Record) -> str:
    """Return a record's file."""
    return json.dumps(asdict(record), indent=1) + "\n"


def state(host: _grub.Host, found: Found) -> str:
    """Return where a trial is.

    none: no trace. armed: this boot wrote it, and the trial was not booted yet. running: this is the trial boot.
    ended: another boot than both, so the trial failed, or was cut while it was cleaned away.
    """
    if not found.traces:
        return "none"
    if found.record is None or found.record.boot_id == host.boot_id:
        return "armed"
    return "running" if _grub.on_trial(host.running) == found.record.id else "ended"


def extra_arguments(identity: str) -> list[str]:
    """Return what the trial entry has beside the wanted arguments: ways back without a human."""
    return [
        f"panic={PANIC_S}",
        # The first process stops for ever after a crash of its own, unless told otherwise.
        "systemd.crash_reboot=1",
        f"systemd.watchdog_sec={WATCHDOG_S}",
        f"{_grub.MARK}{identity}",
    ]


def render_unit(identity: str, deadline_s: int) -> str:
    """Return the unit that ends a trial boot which nobody verifies in time.

    The first process counts the time and reboots by itself: no program has to start for it, none can keep it waiting.
    """
    report = (
        f'test "$$SERVICE_RESULT" = success || test ! -e {RECORD} || '
        f"{{ echo {identity}; echo nobody verified the boot within {deadline_s} s; date --utc; "
        "systemctl list-units --state=failed,activating --plain --no-legend --no-pager; "
        f"dmesg | tail -n 10; }} >{LOG} 2>&1; sync"
    )
    return f"""\
# Managed by cpullm.epyc, role grub_hugepages. It is here while a kernel command line is on trial.
[Unit]
Description=Reboot into the former kernel command line unless the new one is verified in {deadline_s} s
DefaultDependencies=no
ConditionKernelCommandLine={_grub.MARK}{identity}
# Without stopping units, which may hang: processes are ended and file systems unmounted.
FailureAction=reboot-force

[Service]
# The watchdog of the command line needs a device; a machine without one gets the kernel's own. Time counts meanwhile.
ExecStart=/bin/sh -c 'test -e /dev/watchdog0 || modprobe softdog; exec sleep infinity'
RuntimeMaxSec={deadline_s}
ExecStopPost=-/bin/sh -c '{report}'
TimeoutStopSec=20
OOMScoreAdjust=-1000
"""


def render_entry(host: _grub.Host, found: Found, wanted: Sequence[str], identity: str) -> str:
    """Return the trial entry; raises ValueError with why the host's default entry cannot be tried."""
    config = host.config or ""
    entry = _menu.find(_menu.parse(config), _menu.default_of(config, found.variables))
    return _menu.render_entry(entry, wanted, extra_arguments(identity))


def findings(host: _grub.Host, found: Found, wanted: Sequence[str], deadline_s: int) -> list[str]:
    """Return why a trial boot cannot be made here, each with the way out; [] where it can.

    To be asked where GRUB is there at all (`_grub.findings`), as a part of `_preflight.trial_faults`.
    """
    if host.config is None:
        return []
    reasons = []
    if deadline_s < MIN_DEADLINE_S:
        reasons.append(
            f"grub_hugepages_trial_deadline_s is {deadline_s}, expected at least {MIN_DEADLINE_S}: no boot is verified "
            "faster"
        )
    if not _menu.sources_custom(host.config):
        reasons.append(
            f"{_grub.CONFIG} does not read custom.cfg, where the trial entry would be: let /etc/grub.d/41_custom be "
            "executable and run update-grub"
        )
    if _menu.waits_for_ever(host.config):
        reasons.append(
            f"{_grub.CONFIG} has no time limit for the menu, so that no boot goes on without a key: set GRUB_TIMEOUT "
            "to a number of seconds and run update-grub"
        )
    other = found.variables.get("next_entry", "")
    if other and not found.chosen:
        reasons.append(
            f"{ENVIRONMENT} has next_entry={other!r}: somebody else chose what the next boot is. Reboot, or run "
            "`grub-editenv - unset next_entry`"
        )
    if not found.initramfs_tools:
        reasons.append(
            f"{INITRAMFS} does not exist, so the initial RAM disk is not of initramfs-tools: whether the shell of "
            "another one reboots by itself was never verified. grub_hugepages_method: external leaves booting to you"
        )
    try:
        render_entry(host, found, wanted, "0" * 16)
    except ValueError as error:
        reasons.append(f"{_grub.CONFIG}: {error}")
    return reasons


def faults(
    host: _grub.Host, found: Found, failed_units: Sequence[str], unit_state: str, ignored: Sequence[str]
) -> list[str]:
    """Return what a trial boot lacks, a line for each point of the verification; [] where it is right."""
    record = found.record
    if record is None:
        return [f"{RECORD} is gone: what is on trial is not known"]
    lines = []
    if host.boot_id == record.boot_id:
        lines.append(f"boot_id is still {host.boot_id}: the host did not reboot")
    if _grub.on_trial(host.running) != record.id:
        lines.append(f"/proc/cmdline has no {_grub.MARK}{record.id}: GRUB did not boot the trial entry")
    if not _cmdline.carries(host.running, record.arguments):
        lines.append(
            f"the kernel runs with {' '.join(_cmdline.hugepage_arguments(host.running)) or 'no huge page argument'}, "
            f"expected {' '.join(record.arguments)} in this order and nothing else about huge pages"
        )
    lines += _grub.pool_faults(host, record.wanted)
    held = sum(pool.total * pool.size_kib * 1024 for pool in host.pools if pool.node is not None)
    left = host.memory.memory_bytes - held
    if left < record.reserve_bytes:
        lines.append(
            f"{left / _grub.GIB:.2f} GiB are left beside the pages, expected at least "
            f"{record.reserve_bytes / _grub.GIB:.2f} GiB (grub_hugepages_system_reserve_bytes)"
        )
    new = sorted(set(failed_units) - set(record.failed_units))
    new = [unit for unit in new if not any(_matches(unit, pattern) for pattern in ignored)]
    if new:
        lines.append(
            f"units failed that had not failed before: {', '.join(new)} (grub_hugepages_ignored_units names those that "
            "do not count)"
        )
    if found.chosen:
        lines.append(
            f"{ENVIRONMENT} still has next_entry={_menu.ENTRY}: GRUB cannot write there, and would have booted the "
            "trial again and again"
        )
    if unit_state != "active":
        lines.append(f"{UNIT_NAME} is {unit_state or 'gone'}: nothing would have ended a trial that nobody verifies")
    return lines


def _matches(name: str, pattern: str) -> bool:
    parts = [re.escape(part) for part in pattern.split("*")]
    return re.fullmatch(".*".join(parts), name) is not None


def difference(host: _grub.Host, found: Found, wanted: _grub.Wanted) -> list[dict[str, str]]:
    """Return as Ansible's diff what a trial and its promotion change."""
    parts = [
        {
            "before_header": f"{CUSTOM} (while the trial lasts)",
            "after_header": f"{CUSTOM} (while the trial lasts)",
            "before": found.custom or "",
            "after": _menu.with_block(found.custom, render_entry(host, found, wanted.arguments, "ID")),
        }
    ]
    return parts + _grub.difference(_grub.plan(host, wanted.arguments, wanted.takeover))


# --- On the host ------------------------------------------------------------------------------------------------------


def read(root: str = "/") -> Found:
    """Return a trial's traces on the host below `root`."""
    base = root.rstrip("/")
    text = read_optional(root, RECORD)
    record = None
    if text is not None:
        try:
            record = parse_record(text)
        except ValueError:
            # A file that was damaged names no trial; it is a trace, and goes with the others.
            record = None
    return Found(
        record=record,
        record_text=text,
        unit=read_optional(root, UNIT),
        links=tuple(link for link in LINKS if os.path.lexists(base + link)),
        custom=_read_exactly(base + CUSTOM),
        environment=read_optional(root, ENVIRONMENT),
        log=read_optional(root, LOG),
        halves=tuple(half for half in HALVES if os.path.lexists(base + half)),
        initramfs_tools=os.path.exists(base + INITRAMFS),
    )


def _read_exactly(path: str) -> str | None:
    """Return a file's text so that writing it again gives the same bytes."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def arm(host: _grub.Host, found: Found, record: Record, run: _grub.Runner, root: str = "/") -> None:
    """Write everything that a trial needs, the choice of the next boot last; raises ValueError and leaves no trace.

    A power cut at any point leaves a host that boots its old default, or, after the last write, one that boots the
    trial with its deadline.
    """
    base = root.rstrip("/")
    entry = render_entry(host, found, record.arguments, record.id)
    try:
        _grub.remove_durably(base + LOG)
        _grub.write_durably(base + RECORD, render_record(record), 0o644)
        _grub.write_durably(base + UNIT, render_unit(record.id, record.deadline_s), 0o644)
        for link in LINKS:
            os.makedirs(os.path.dirname(base + link), exist_ok=True)
            if not os.path.lexists(base + link):
                os.symlink(f"../{UNIT_NAME}", base + link)
            _grub.sync_directory(base + link)
        _write_custom(base, _menu.with_block(found.custom, entry), run)
        _edit_environment(base, ["set", f"next_entry={_menu.ENTRY}"], run)
    except BaseException:
        disarm(read(root), run, root)
        raise


def disarm(found: Found, run: _grub.Runner, root: str = "/") -> None:
    """Take away every trace of a trial, the choice of the next boot first and the record last."""
    base = root.rstrip("/")
    # GRUB takes a choice back by leaving it empty.
    if found.chosen or found.variables.get("next_entry") == "":
        _edit_environment(base, ["unset", "next_entry"], run)
    if found.block is not None:
        others = _menu.without_block(found.custom)
        if others is None:
            _grub.replace_for_grub(None, os.path.realpath(base + CUSTOM))
        else:
            _write_custom(base, others, run)
    if found.unit is not None:
        # Stopped in good order it does not reboot.
        run(["systemctl", "stop", UNIT_NAME])
    for link in found.links:
        _grub.remove_durably(base + link)
        try:
            os.rmdir(os.path.dirname(base + link))
        except OSError:
            # Others have links there, too.
            continue
    if found.unit is not None:
        _grub.remove_durably(base + UNIT)
        run(["systemctl", "daemon-reload"])
        run(["systemctl", "reset-failed", UNIT_NAME])
    for half in found.halves:
        _grub.remove_durably(base + half)
    _grub.remove_durably(base + LOG)
    _grub.remove_durably(base + RECORD)


def _write_custom(base: str, text: str, run: _grub.Runner) -> None:
    """Replace custom.cfg in one step, its owner and mode kept, after GRUB's own check."""
    target = os.path.realpath(base + CUSTOM)
    fresh = target + _grub.FRESH
    data = text.encode("utf-8", "surrogateescape")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            try:
                old = os.stat(target)
                os.fchmod(stream.fileno(), old.st_mode & 0o7777)
                os.fchown(stream.fileno(), old.st_uid, old.st_gid)
            except FileNotFoundError:
                os.fchmod(stream.fileno(), 0o644)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        code, _out, errors = run(["grub-script-check", fresh])
        if code != 0:
            raise ValueError(f"grub-script-check refuses {CUSTOM} with the trial entry, rc {code}: {errors.strip()}")
        _grub.replace_for_grub(fresh, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, CUSTOM) from error
    finally:
        _grub.remove_durably(fresh)


def _edit_environment(base: str, words: list[str], run: _grub.Runner) -> None:
    """Change GRUB's variables and make it last; raises ValueError where they do not read back."""
    path = base + ENVIRONMENT
    code, _out, errors = run(["grub-editenv", path, *words])
    if code != 0:
        raise ValueError(f"grub-editenv {ENVIRONMENT} {' '.join(words)} ended with rc {code}: {errors.strip()}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    # It is written anew, in other blocks: GRUB has to see those, and writes to the ones that it sees.
    _grub.write_journal_out(os.path.dirname(os.path.realpath(path)))
    with open(path, encoding="utf-8", errors="replace") as stream:
        now = _menu.parse_environment(stream.read()).get("next_entry")
    if now != (_menu.ENTRY if words[0] == "set" else None):
        raise ValueError(f"{ENVIRONMENT}: next_entry reads back as {now!r} after {' '.join(words)}")


def promote(host: _grub.Host, found: Found, run: _grub.Runner, root: str = "/") -> None:
    """Make a verified command line the default; raises ValueError, and then the next boot is still the old one."""
    record = found.record
    if record is None:
        raise ValueError(f"{RECORD} is gone: there is nothing to promote")
    change = _grub.plan(host, record.arguments, record.takeover)
    if change.needed:
        _grub.apply(host, change, run, root)
    disarm(found, run, root)


# --- The play at work -------------------------------------------------------------------------------------------------


def read_lock(root: str = "/") -> dict[str, Any] | None:
    """Return who is at work on this host; a damaged file counts as nobody."""
    try:
        data = json.loads(read_optional(root, LOCK) or "null")
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def write_lock(owner: dict[str, Any] | None, root: str = "/") -> None:
    """Put down who is at work, or (None) that nobody is; the caller holds the module's own lock."""
    path = root.rstrip("/") + LOCK
    if owner is None:
        _grub.remove_durably(path)
    else:
        _grub.write_durably(path, json.dumps(owner) + "\n", 0o644)
