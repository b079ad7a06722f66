# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Huge page pools, poisoned memory and hugetlbfs mounts of a Linux host, from /sys and /proc.

Formats: Documentation/admin-guide/mm/hugetlbpage.rst and Documentation/filesystems/proc.rst of the kernel.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import (
    numbered,
    plain,
    read_number,
    read_optional,
    read_text,
)

POOLS = "/sys/kernel/mm/hugepages"
NODE = "/sys/devices/system/node"


@dataclass(frozen=True)
class Pool:
    """Pages of one size, of the whole machine (`node` None) or of a node; the kernel counts the last two fields only
    for the whole machine."""

    node: int | None
    size_kib: int
    total: int
    free: int
    surplus: int
    reserved: int | None
    overcommit: int | None


@dataclass(frozen=True)
class Mount:
    """A hugetlbfs mount."""

    path: str
    size_kib: int | None
    options: tuple[str, ...]


@dataclass(frozen=True)
class HugePages:
    """Everything read."""

    default_size_kib: int | None
    pools: tuple[Pool, ...]
    poisoned_bytes: int | None
    vmemmap_optimized: bool | None
    mounts: tuple[Mount, ...]
    boot_id: str | None


# --- Formats ------------------------------------------------------------------------------------------------------


def parse_pool_size(name: str) -> int | None:
    """Return the page size in KiB that a pool directory's name encodes, or None."""
    match = re.fullmatch(r"hugepages-([0-9]{1,12})kB", name)
    return int(match[1]) if match else None


def parse_meminfo(text: str, name: str) -> int | None:
    """Return the value in KiB of one line of /proc/meminfo, or None where the kernel prints no such line."""
    match = re.search(rf"^{re.escape(name)}: +([0-9]{{1,15}}) kB$", text, re.MULTILINE)
    return int(match[1]) if match else None


def parse_page_size(text: str) -> int | None:
    """Return the KiB of a mount option's size such as "1024M", "2M", "1G" or "2097152", or None."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper())
    if not match:
        return None
    return (int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]) // 1024 or None


def unescape(text: str) -> str:
    """Return a field of /proc/self/mounts with its octal escapes (blank, tab, newline, backslash, hash) undone."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)) if int(match[1], 8) < 0x80 else match[0], text)


def parse_mounts(text: str, default_size_kib: int | None) -> tuple[Mount, ...]:
    """Return the hugetlbfs mounts, in the order of mounting; one without `pagesize=` has the default size."""
    found: list[Mount] = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) < 4 or fields[2] != "hugetlbfs":
            continue
        options = tuple(unescape(option) for option in fields[3].split(","))
        size = default_size_kib
        for option in options:
            if option.startswith("pagesize="):
                size = parse_page_size(option[len("pagesize=") :])
        found.append(Mount(unescape(fields[1]), size, options))
    return tuple(found)


# --- Reading ------------------------------------------------------------------------------------------------------


def read(root: str = "/") -> HugePages:
    """Return the pools and mounts of the host below `root`; raises OSError or ValueError naming the file."""
    meminfo = read_text(root, "/proc/meminfo")
    default_size = parse_meminfo(meminfo, "Hugepagesize")
    poisoned = parse_meminfo(meminfo, "HardwareCorrupted")
    pools = _pools(root, POOLS, None)
    for node in numbered(root, NODE, "node"):
        path = f"{NODE}/node{node}/hugepages"
        if os.path.isdir(root.rstrip("/") + path):
            pools += _pools(root, path, node)
    optimized = read_number(root, "/proc/sys/vm/hugetlb_optimize_vmemmap")
    boot_id = read_optional(root, "/proc/sys/kernel/random/boot_id")
    return HugePages(
        default_size_kib=default_size,
        pools=tuple(pools),
        poisoned_bytes=None if poisoned is None else poisoned * 1024,
        vmemmap_optimized=None if optimized is None else optimized != 0,
        mounts=parse_mounts(read_optional(root, "/proc/self/mounts") or "", default_size),
        boot_id=None if boot_id is None else boot_id.strip(),
    )


def gather(root: str = "/") -> dict[str, Any]:
    """Return the fact `cpullm_hugepages`: pools and mounts, or why they could not be read."""
    try:
        found: dict[str, Any] = plain(read(root))
    except FileNotFoundError as error:
        reason = f"{error.filename} does not exist: a kernel without hugetlbfs, or /sys or /proc is not mounted"
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        return {"readable": True, "reason": None, **found}
    return {
        "readable": False,
        "reason": reason,
        "default_size_kib": None,
        "pools": [],
        "poisoned_bytes": None,
        "vmemmap_optimized": None,
        "mounts": [],
        "boot_id": None,
    }


def _pools(root: str, path: str, node: int | None) -> list[Pool]:
    sizes = sorted(filter(None, map(parse_pool_size, os.listdir(root.rstrip("/") + path))))
    return [_pool(root, f"{path}/hugepages-{size}kB", node, size) for size in sizes]


def _pool(root: str, path: str, node: int | None, size: int) -> Pool:
    whole = node is None
    return Pool(
        node=node,
        size_kib=size,
        total=_count(root, f"{path}/nr_hugepages"),
        free=_count(root, f"{path}/free_hugepages"),
        surplus=_count(root, f"{path}/surplus_hugepages"),
        reserved=_count(root, f"{path}/resv_hugepages") if whole else None,
        overcommit=read_number(root, f"{path}/nr_overcommit_hugepages") if whole else None,
    )


def _count(root: str, path: str) -> int:
    value = read_number(root, path)
    if value is None:
        raise ValueError(f"{path} cannot be read")
    return value
