# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read what changes on a host while it runs: governor, memory errors, temperatures of the modules, the model's disks.

Sources in the kernel's documentation: admin-guide/pm/cpufreq.rst, driver-api/edac.rst, hwmon/{jc42,spd5118}.rst and
ABI/testing/{sysfs-devices-edac,sysfs-bus-pci,sysfs-class-hwmon}.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import numbered, plain, read_number, read_optional

# Drivers of the sensors on memory modules: DDR5's hub, and what DDR4 and DDR3 modules have.
_MODULE_SENSORS = frozenset({"spd5118", "jc42"})
# A mapping on a RAID on partitions; deeper stacks are walked no further.
_MAX_LAYERS = 8
# What os.stat names where a file system is on no single block device: btrfs, ZFS, overlayfs, network.
_NO_DEVICE = 0


@dataclass(frozen=True)
class Governor:
    """CPUs under one cpufreq governor of one driver."""

    governor: str
    driver: str | None
    cpus: int


@dataclass(frozen=True)
class MemoryErrors:
    """Errors since the driver was loaded that a memory controller counted; ``module`` is None for a whole one."""

    controller: str
    module: str | None
    corrected: int
    uncorrected: int


@dataclass(frozen=True)
class Temperature:
    """A sensor on a memory module; ``critical`` is the limit that the sensor was set to, None where it tells none."""

    sensor: str
    celsius: float
    critical: float | None


@dataclass(frozen=True)
class Link:
    """A PCIe link as it runs and as the device could: GT/s for each lane, and lanes."""

    gts: float
    lanes: int
    best_gts: float
    best_lanes: int


@dataclass(frozen=True)
class Disk:
    """A disk that holds a part of a file system."""

    name: str
    model: str | None
    rotational: bool | None
    link: Link | None


@dataclass(frozen=True)
class Condition:
    """The state of a host at one moment."""

    governors: tuple[Governor, ...]
    memory_errors: tuple[MemoryErrors, ...]
    module_temperatures: tuple[Temperature, ...]
    disks: tuple[Disk, ...]


def _word(root: str, path: str) -> str | None:
    """Return the file's text without surrounding space, or None where there is none."""
    text = (read_optional(root, path) or "").strip()
    return text[:120] or None


def _count(root: str, path: str) -> int | None:
    """Return the number in a file, or None where there is none; a driver that prints something else tells none."""
    try:
        return read_number(root, path)
    except ValueError:
        return None


def governors(root: str) -> tuple[Governor, ...]:
    """Return the governors in use, the most frequent first; none where the host has no frequency scaling."""
    counts: dict[tuple[str, str | None], int] = {}
    base = "/sys/devices/system/cpu/cpufreq"
    for policy in numbered(root, base, "policy"):
        name = _word(root, f"{base}/policy{policy}/scaling_governor")
        if name is not None:
            key = (name, _word(root, f"{base}/policy{policy}/scaling_driver"))
            cpus = len((_word(root, f"{base}/policy{policy}/affected_cpus") or "").split())
            counts[key] = counts.get(key, 0) + max(1, cpus)
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0][0]))
    return tuple(Governor(name, driver, cpus) for (name, driver), cpus in rows)


def memory_errors(root: str) -> tuple[MemoryErrors, ...]:
    """Return a row for each memory controller, and behind it one for each of its modules that had errors."""
    rows: list[MemoryErrors] = []
    base = "/sys/devices/system/edac/mc"
    for number in numbered(root, base, "mc"):
        corrected, uncorrected = (_count(root, f"{base}/mc{number}/{kind}_count") for kind in ("ce", "ue"))
        if corrected is None or uncorrected is None:
            continue
        rows.append(MemoryErrors(f"mc{number}", None, corrected, uncorrected))
        for kind in ("dimm", "rank"):
            for module in numbered(root, f"{base}/mc{number}", kind):
                place = f"{base}/mc{number}/{kind}{module}"
                corrected, uncorrected = (_count(root, f"{place}/dimm_{count}_count") or 0 for count in ("ce", "ue"))
                if corrected or uncorrected:
                    label = _word(root, f"{place}/dimm_label") or _word(root, f"{place}/dimm_location")
                    rows.append(MemoryErrors(f"mc{number}", label or f"{kind}{module}", corrected, uncorrected))
    return tuple(rows)


def module_temperatures(root: str) -> tuple[Temperature, ...]:
    """Return the sensors on memory modules, by their place on the bus; none where no driver shows them."""
    rows = []
    for number in numbered(root, "/sys/class/hwmon", "hwmon"):
        base = f"/sys/class/hwmon/hwmon{number}"
        name = _word(root, f"{base}/name")
        if name not in _MODULE_SENSORS:
            continue
        value, critical = (_count(root, f"{base}/temp1_{what}") for what in ("input", "crit"))
        if value is not None:
            place = os.path.basename(os.path.realpath(f"{root.rstrip('/')}{base}/device"))
            rows.append(Temperature(f"{name} {place}", value / 1000, None if critical is None else critical / 1000))
    return tuple(sorted(rows, key=lambda row: row.sensor))


def parse_ipmi_temperatures(text: str) -> tuple[Temperature, ...]:
    """Return the memory modules' sensors of a board's controller, from what `ipmitool sdr type Temperature` prints.

    A line is "P1-DIMMA1 Temp   | 40h | ok  | 32.64 | 48 degrees C"; a slot without a module has no reading.
    """
    rows = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        value = re.fullmatch(r"(-?[0-9]{1,3}(?:\.[0-9]{1,3})?) degrees C", parts[-1])
        if value is not None and "DIMM" in parts[0].upper():
            rows.append(Temperature(parts[0][:60], float(value[1]), None))
    return tuple(rows)


def _link(root: str, place: str) -> Link | None:
    """Return the PCIe link of a disk's controller, or None where it has none or tells none."""
    values = []
    for which in ("current", "max"):
        speed = re.match(r"([0-9]{1,3}(?:\.[0-9])?) GT/s", _word(root, f"{place}/{which}_link_speed") or "")
        lanes = _count(root, f"{place}/{which}_link_width")
        if speed is None or not lanes:
            return None
        values.append((float(speed[1]), lanes))
    (gts, lanes), (best_gts, best_lanes) = values
    return Link(gts, lanes, best_gts, best_lanes)


def _leaves(root: str, name: str, layers: int = _MAX_LAYERS) -> Iterator[str]:
    """Yield the names of the disks below a block device: past partitions, mappings and RAIDs."""
    base = root.rstrip("/")
    place = os.path.realpath(f"{base}/sys/class/block/{name}")
    try:
        below = sorted(os.listdir(f"{place}/slaves"))
    except OSError:
        below = []
    if os.path.exists(f"{place}/partition"):
        below = [os.path.basename(os.path.dirname(place))]
    if not below or not layers:
        yield name
    else:
        for each in below:
            yield from _leaves(root, each, layers - 1)


def device_name(root: str, device: tuple[int, int]) -> str | None:
    """Return the kernel's name of a block device, or None where there is none of that major and minor number."""
    place = os.path.realpath(f"{root.rstrip('/')}/sys/dev/block/{device[0]}:{device[1]}")
    return os.path.basename(place) if device[0] != _NO_DEVICE and os.path.isdir(place) else None


def disks(root: str, device: tuple[int, int]) -> tuple[Disk, ...]:
    """Return the disks behind a block device of that major and minor number; none where there is no such device."""
    top = device_name(root, device)
    if top is None:
        return ()
    rows = []
    for name in dict.fromkeys(_leaves(root, top)):
        base = f"/sys/class/block/{name}"
        rotational = _count(root, f"{base}/queue/rotational")
        rows.append(
            Disk(
                name,
                _word(root, f"{base}/device/model"),
                None if rotational is None else bool(rotational),
                # The block device's parent is the NVMe controller, and the controller's is the PCI function.
                _link(root, f"{base}/device/device"),
            )
        )
    return tuple(rows)


def device_of(path: str) -> tuple[int, int]:
    """Return major and minor number of the device that holds a path, or its deepest directory that can be seen."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    device = os.stat(path).st_dev
    return os.major(device), os.minor(device)


def gather(path: str, root: str = "/", device: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the condition of a host as plain data.

    ``path`` is absolute, and on the file system whose disks are meant; ``device`` names it in a captured tree.
    """
    found = Condition(
        governors(root), memory_errors(root), module_temperatures(root), disks(root, device or device_of(path))
    )
    data: dict[str, Any] = plain(found)
    return data
