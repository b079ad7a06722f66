# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel settings that live in files below /proc/sys and /sys: read, compare, set, and bring back."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import read_optional
from ansible_collections.cpullm.epyc.plugins.module_utils._text import printable

ROOTS = ("/proc/sys/", "/sys/")
# Read in the order of their names, and of two equal names the first folder's; sysctl.d(5).
SYSCTL_FOLDERS = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d", "/lib/sysctl.d")


@dataclass(frozen=True)
class Setting:
    """A wanted value; the path may hold a `*`, and an optional one need not exist."""

    path: str
    value: str
    optional: bool = False


@dataclass(frozen=True)
class Found:
    """One file beside what is wanted of it."""

    path: str
    before: str
    wanted: str
    choices: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the file says what is wanted."""
        return self.before == self.wanted


def parse_value(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the value that a file states, and the choices where it lists them: `always [madvise] never`."""
    words = text.split()
    chosen = [word[1:-1] for word in words if re.fullmatch(r"\[[^\[\]]+\]", word)]
    if len(chosen) == 1:
        return chosen[0], tuple(word.strip("[]") for word in words)
    return " ".join(words), ()


def expand(root: str, path: str) -> list[str]:
    """Return the existing files that a path with or without `*` names, in order; raises ValueError outside ROOTS."""
    if not path.startswith(ROOTS) or ".." in path.split("/") or not path.isprintable():
        raise ValueError(f"{printable(path)}: expected a file below {' or '.join(ROOTS)}")
    base = root.rstrip("/")
    names = [name[len(base) :] for name in glob.glob(glob.escape(base) + path)] if "*" in path else [path]
    return sorted(name for name in names if os.path.isfile(base + name))


def survey(root: str, settings: Sequence[Setting]) -> tuple[list[Found], list[str]]:
    """Return every file's value beside the wanted one, and what makes the wish impossible."""
    found: list[Found] = []
    faults: list[str] = []
    for setting in settings:
        files = expand(root, setting.path)
        if not files and not setting.optional:
            faults.append(f"{setting.path} does not exist: this kernel has no such setting. null leaves it alone")
        for file in files:
            text = read_optional(root, file)
            if text is None:
                faults.append(f"{file} cannot be read: root is needed")
                continue
            before, choices = parse_value(text)
            item = Found(file, before, " ".join(setting.value.split()), choices)
            if choices and item.wanted not in choices:
                faults.append(f"{file}: {item.wanted!r} is asked, the kernel knows {', '.join(choices)}")
            elif not item.right and not os.access(root.rstrip("/") + file, os.W_OK):
                faults.append(
                    f"{file} is {before}, {item.wanted} is asked, and it cannot be written: in a container it "
                    "belongs to the machine (memory_tuning_method: external compares alone, null leaves it alone)"
                )
            found.append(item)
    return found, faults


def find_overrides(root: str, settings: Sequence[Setting], ours: str) -> list[str]:
    """Return the lines of sysctl files that are read after ours and set one of the settings to something else."""
    base = root.rstrip("/")
    wanted = {
        s.path[len("/proc/sys/") :].replace("/", "."): s.value for s in settings if s.path.startswith("/proc/sys/")
    }
    files: dict[str, str] = {}
    for folder in SYSCTL_FOLDERS:
        for path in glob.glob(f"{glob.escape(base)}{folder}/*.conf"):
            files.setdefault(os.path.basename(path), path[len(base) :])
    # Debian's 99-sysctl.conf is a link to it; procps's own service reads it last.
    files.setdefault("99-sysctl.conf", "/etc/sysctl.conf")
    lines = []
    for name in sorted(files):
        text = read_optional(root, files[name]) if name > os.path.basename(ours) else None
        for number, line in enumerate((text or "").splitlines(), 1):
            match = re.match(r"\s*-?\s*([\w./]+)\s*=\s*(.*?)\s*$", line)
            if not match:
                continue
            key = match[1].replace("/", ".")
            if key in wanted and match[2] != wanted[key]:
                lines.append(
                    f"{files[name]}:{number}: {line.strip()} is read after {ours} and undoes its {wanted[key]}: "
                    "remove it there, or leave the setting alone with null"
                )
    return lines


def read_record(root: str, path: str) -> dict[str, str]:
    """Return the values from before the first change; raises ValueError where the record is unreadable."""
    text = read_optional(root, path)
    if text is None:
        return {}
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise ValueError(f"{path} is not a record of earlier values: remove it, and nothing is brought back")
    return data


def write_record(root: str, path: str, values: dict[str, str]) -> None:
    """Replace the record in one step, or remove it when nothing is left to bring back."""
    target = root.rstrip("/") + path
    if not values:
        if os.path.exists(target):
            os.unlink(target)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target + ".new", "w", encoding="utf-8") as stream:
        json.dump(values, stream, indent=1, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(target + ".new", target)


def set_value(root: str, path: str, value: str) -> None:
    """Write a value and read it back; raises ValueError where the kernel refuses or ignores it."""
    target = root.rstrip("/") + path
    try:
        with open(target, "w", encoding="ascii") as stream:
            stream.write(value)
    except OSError as error:
        raise ValueError(f"{path}: the kernel refused {value!r}: {error.strerror}") from error
    now = parse_value(read_optional(root, path) or "")[0]
    if now != value:
        raise ValueError(f"{path}: {value!r} was written and {now!r} is there")


def apply(root: str, found: Sequence[Found], record: str) -> None:
    """Set what differs; values from before the first change go into the record first."""
    changes = [item for item in found if not item.right]
    if not changes:
        return
    kept = read_record(root, record)
    write_record(root, record, {**{item.path: item.before for item in changes}, **kept})
    for item in changes:
        set_value(root, item.path, item.wanted)


def restorable(root: str, record: str) -> list[Found]:
    """Return the files of the record beside the values from before; a file that is gone needs nothing."""
    found = []
    for path, value in sorted(read_record(root, record).items()):
        if expand(root, path):
            before, choices = parse_value(read_optional(root, path) or "")
            found.append(Found(path, before, value, choices))
    return found


def restore(root: str, found: Sequence[Found], record: str) -> None:
    """Bring the values from before back, and remove the record when all of them are there."""
    for item in found:
        if not item.right:
            set_value(root, item.path, item.wanted)
    write_record(root, record, {})
