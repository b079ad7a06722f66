# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether GRUB can write its environment block, without which an entry that is to boot once would boot for ever.

GRUB writes the block in place, into the disk blocks that the file had: it can do so on a plain partition with a file
system that keeps data where it is, and on nothing that it merely reads (GRUB's manual, "The GRUB environment block").
The format of the block is that of lib/envblk.c; of the mounts, Documentation/filesystems/proc.rst of the kernel.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ansible_collections.cpullm.epyc.plugins.module_utils._hugepages import unescape
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import read_optional

FILE = "/boot/grub/grubenv"
SIGNATURE = "# GRUB Environment Block\n"
SIZE = 1024
# next_entry with the longest name of an entry of ours, and what Debian's scripts keep beside it.
ROOM = 128
# File systems on which GRUB overwrites blocks of a file in place, and sees a new entry beside it after a power cut: it
# reads no journal. These have none, or one that is written out before the next boot is chosen (`_grub`).
WRITABLE = ("ext2", "ext3", "ext4", "vfat")
INSTEAD = "or reserve without GRUB, early in boot, with grub_hugepages_method: runtime"
# A RAID on partitions below a volume below a mapping; deeper stacks are walked no further.
MAX_LAYERS = 8

# How device mapper's users begin the uuid of a device (dm/uuid in sysfs).
_MAPPINGS = {"LVM": "LVM", "CRYPT": "encryption", "DMRAID": "RAID", "mpath": "multipath", "STRATIS": "Stratis"}


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo; `device` is 0:N where the file system is on no single block device."""

    device: tuple[int, int]
    path: str
    kind: str
    source: str
    read_only: bool


@dataclass(frozen=True)
class Layer:
    """A block device between a file system and its disks that GRUB would have to write through."""

    name: str
    what: str


@dataclass(frozen=True)
class Block:
    """The environment block as it was found: `fault` says why it is none, `denied` why it cannot be opened to write."""

    path: str
    fault: str | None
    denied: str | None
    mount: Mount | None
    layers: tuple[Layer, ...]


# --- Formats ------------------------------------------------------------------------------------------------------


def parse_block(data: bytes) -> list[tuple[str, str]]:
    """Return the names and values of an environment block, in order; raises ValueError where it is none."""
    if len(data) != SIZE:
        raise ValueError(f"{len(data)} bytes, expected {SIZE}")
    text = data.decode("latin-1")
    if not text.startswith(SIGNATURE):
        raise ValueError(f"its first line is not {SIGNATURE.strip()!r}")
    found: list[tuple[str, str]] = []
    at = len(SIGNATURE)
    # What is left but padding is lines; newer ones begin with a second comment.
    while text[at:].strip("#"):
        line = ""
        while at < SIZE and text[at] != "\n":
            # A backslash keeps the next character, a line feed too.
            at += text[at] == "\\"
            line += text[at : at + 1]
            at += 1
        if at >= SIZE:
            raise ValueError("its last line has no end")
        at += 1
        if line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name:
            raise ValueError(f"{ascii(line)[:60]} is no name=value")
        found.append((name, value))
    return found


def free_bytes(data: bytes) -> int:
    """Return how many bytes of a block are padding, so free for further names and values."""
    return len(data) - len(data.rstrip(b"#"))


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Return the mounts in the order of mounting; lines that are none are left out."""
    found = []
    for line in text.splitlines():
        before, _dash, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        number = re.fullmatch(r"([0-9]{1,7}):([0-9]{1,7})", fields[2]) if len(fields) > 5 else None
        if number is None or len(rest) < 3:
            continue
        options = (fields[5].split(","), rest[2].split(","))
        found.append(
            Mount(
                (int(number[1]), int(number[2])),
                unescape(fields[4]),
                _shown(rest[0]),
                _shown(unescape(rest[1])),
                any("ro" in each for each in options),
            )
        )
    return tuple(found)


def mount_of(mounts: Sequence[Mount], path: str) -> Mount | None:
    """Return the mount that holds a path: of those above it the deepest, and of several there the last."""
    found = None
    for mount in mounts:
        above = mount.path.rstrip("/")
        if (path == above or path.startswith(above + "/")) and (found is None or len(mount.path) >= len(found.path)):
            found = mount
    return found


# --- Reading ------------------------------------------------------------------------------------------------------


def layers(root: str, device: tuple[int, int]) -> tuple[Layer, ...]:
    """Return the mappings and RAIDs below a block device, the upper ones first; () for a partition of a disk."""
    place = os.path.realpath(f"{root.rstrip('/')}/sys/dev/block/{device[0]}:{device[1]}")
    return tuple(dict.fromkeys(_layers(place, MAX_LAYERS)))


def _layers(place: str, depth: int) -> list[Layer]:
    name = os.path.basename(place)
    found: list[Layer] = []
    if os.path.isdir(f"{place}/dm"):
        prefix = _word(f"{place}/dm/uuid").partition("-")[0]
        what = _MAPPINGS.get(prefix, f"device mapper ({prefix})" if prefix else "device mapper")
        found.append(Layer(_word(f"{place}/dm/name") or name, what))
    elif os.path.isdir(f"{place}/md"):
        found.append(Layer(name, f"RAID ({_word(f'{place}/md/level')})"))
    elif os.path.isdir(f"{place}/bcache"):
        found.append(Layer(name, "bcache"))
    if os.path.exists(f"{place}/partition"):
        below = [os.path.dirname(place)]
    else:
        try:
            below = [os.path.realpath(f"{place}/slaves/{each}") for each in sorted(os.listdir(f"{place}/slaves"))]
        except OSError:
            below = []
    if depth:
        for each in below:
            found += _layers(each, depth - 1)
    return found


def _word(path: str) -> str:
    """Return what a file of sysfs holds, fit to be shown; "" where there is none."""
    return _shown((read_optional("", path) or "").strip())


def _shown(text: str) -> str:
    """Return a text of the host as an error may quote it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:60])


def read(root: str = "/") -> Block:
    """Return the environment block of the host below `root`, and what it lies on."""
    base = root.rstrip("/")
    folder, name = os.path.split(FILE)
    # GRUB follows its own prefix, which grub-install made from the place that a link in /boot leads to.
    real = os.path.realpath(base + folder)
    inside = real[len(os.path.realpath(base)) :] if base else real
    path = os.path.join(real, name)
    mount = mount_of(parse_mountinfo(read_optional(root, "/proc/self/mountinfo") or ""), f"{inside}/{name}")
    below = layers(root, mount.device) if mount is not None else ()
    fault = denied = None
    try:
        if os.path.islink(path):
            fault = f"a link to {ascii(os.readlink(path))[:80]}"
        elif not os.path.isfile(path):
            fault = "no regular file" if os.path.exists(path) else "no such file"
        else:
            data = _bytes(path)
            parse_block(data)
            if free_bytes(data) < ROOM:
                fault = f"{free_bytes(data)} bytes of it are free, expected {ROOM}"
            denied = _denied(path)
    except (OSError, ValueError) as error:
        fault = error.strerror if isinstance(error, OSError) else str(error)
    return Block(FILE, fault, denied, mount, below)


def _bytes(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(SIZE + 1)


def _denied(path: str) -> str | None:
    """Return why the file cannot be opened for writing, which changes nothing in it, or None where it can."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        # An ordinary user may not, and learns nothing about root.
        return None if error.errno == errno.EACCES and os.geteuid() else error.strerror
    return None


# --- What forbids a trial boot ------------------------------------------------------------------------------------


def faults(block: Block) -> list[str]:
    """Return why GRUB cannot write the block, each with what was found, expected and a way out."""
    found = []
    where = block.mount
    once = "where GRUB cannot write it, an entry that is to boot once would boot for ever"
    seen = "GRUB reads no journal, and may not find there what was written before a power cut"
    if block.layers:
        on = ", ".join(f"{layer.name}: {layer.what}" for layer in block.layers)
        found.append(
            f"{block.path} lies on {on}, expected a partition of a disk: {once}. Give /boot a partition of its own, "
            f"{INSTEAD}"
        )
    if where is not None and where.kind not in WRITABLE:
        found.append(
            f"{block.path} lies on {where.kind} (mounted at {_shown(where.path)}), expected one of "
            f"{', '.join(WRITABLE)}: {once}, and {seen}. Give /boot a file system of these, {INSTEAD}"
        )
    if where is not None and where.read_only:
        found.append(
            f"{block.path}: {_shown(where.path)} is mounted read-only, expected writable. Mount it writable, {INSTEAD}"
        )
    elif block.denied is not None:
        found.append(
            f"{block.path} cannot be written: {block.denied}. Look at `lsattr {block.path}` and at its mount, {INSTEAD}"
        )
    if block.fault is not None:
        found.append(
            f"{block.path}: found {block.fault}, expected an environment block of {SIZE} bytes, a regular file. Make "
            f"it anew with `rm -f {block.path}; grub-editenv {block.path} create`, {INSTEAD}"
        )
    return found
