# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hardware judgement: what holds a machine back, by how much, and what to change first.

Pure functions of facts and plan. They inform and decide nothing: no number of the plan depends on them.

Decoding reads every active weight once a token, so the memory's read rate is the first roof. A finding's loss is its
share of that roof. Rates are peaks from transfer rate and width; what a machine reaches is less. At depth the
arithmetic of attention is a roof of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEPTHS = (0, 4096, 16384)
CHANNEL_BYTES = 8
# The published recipe decodes 7.17 tokens/s on 16 cores, which is 281 GB/s, and its processors have two CCDs by their
# L3: so the link of a CCD may be what limits it. Not measured by itself, and shown as the hypothesis that it is.
CCD_LINK_GBS = 140.0

# Modules refresh twice as often from here on (JESD79-4 and -5, extended temperature range), and throttle soon.
HOT_CELSIUS = 85.0
# A start that takes longer than a coffee.
SLOW_LOAD_S = 600

_FIRMWARE_SPEED = "Firmware: AMD CBS, UMC Common Options, DDR Timing Configuration, Memory Target Speed: Auto."


@dataclass(frozen=True)
class Platform:
    """What a processor's memory controller takes with one DIMM per channel, and its F32 operations a cycle and core.

    Source: AMD's processor specifications, and its optimization guides: two fused multiply-adds a cycle, 256 bits wide
    up to Zen 4 and 512 bits with Zen 5.
    """

    name: str
    channels: int
    mts: int
    flops_per_cycle: int


LINKED = "EPYC 9005"
# By the model's name: first digit, then the generation in the last one.
_PLATFORMS: tuple[tuple[str, Platform], ...] = (
    (r"EPYC 7..[23]", Platform("EPYC 7002 and 7003", 8, 3200, 32)),
    (r"EPYC 8..4", Platform("EPYC 8004", 6, 4800, 32)),
    (r"EPYC 9..4", Platform("EPYC 9004", 12, 4800, 32)),
    (r"EPYC 9..5", Platform(LINKED, 12, 6000, 64)),
)


def platform_of(model: str | None) -> Platform | None:
    """Return what is known of a processor by its model name as the kernel gives it, or None."""
    for pattern, platform in _PLATFORMS:
        if re.search(rf"\b{pattern}[A-Z]*\b", model or ""):
            return platform
    return None


@dataclass(frozen=True)
class Host:
    """The collection's facts of a host; what was not read or measured is an empty dictionary.

    ``plan`` is None where the plan refused the host: its hardware is judged all the same.
    """

    numa: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    dimm: Mapping[str, Any] = field(default_factory=dict)
    hugepages: Mapping[str, Any] = field(default_factory=dict)
    condition: Mapping[str, Any] = field(default_factory=dict)
    bandwidth: Mapping[str, Any] = field(default_factory=dict)
    disk_read: Mapping[str, Any] = field(default_factory=dict)

    @property
    def platform(self) -> Platform | None:
        """Return what is known of the processor."""
        return platform_of((self.numa.get("cpu") or {}).get("model"))

    @property
    def sockets(self) -> list[int]:
        """Return the sockets that serve, or all where there is no plan."""
        rows = self.plan["instances"] if self.plan else self.numa.get("sockets") or []
        return sorted({int(row["socket"]) for row in rows})


def judge(host: Host) -> dict[str, Any]:
    """Return ``findings``, ``roofs`` and ``measured`` of a host.

    A finding has ``severity`` (``warning`` costs speed or safety, ``advice`` may, ``unknown`` could not be judged),
    ``name``, ``found``, ``expected``, ``loss`` (in words, or None) and ``way_out``. A roof has ``socket``, ``name``,
    ``gbs`` (GB/s, 10^9 bytes; None where it is one of arithmetic), ``hypothesis`` and ``tokens`` (a list of ``depth``
    and ``tokens_per_second``). What was measured has ``socket``, ``gbs`` and ``tokens``.
    """
    served = host.sockets
    findings = [*_errors(host), *_nodes(host), *_smt(host), *_governors(host), *_heat(host)]
    roofs: list[dict[str, Any]] = []
    if not host.dimm.get("readable"):
        findings.append(
            _finding(
                "unknown",
                "memory slots",
                f"none could be read: {host.dimm.get('reason') or 'no such fact; run dimm_facts first'}",
                "SMBIOS tables of the types 16, 17 and 4",
                None,
                "Bare metal shows them to root; many virtual machines and all containers have none.",
            )
        )
    else:
        findings += _protection(host.dimm)
        for socket in served:
            slots = _slots_of(host.dimm["slots"], socket, alone=len(host.numa.get("sockets") or []) == 1)
            roof = _memory_roof(socket, slots, host.plan)
            nameless = sum(1 for slot in host.dimm["slots"] if slot.get("socket") is None)
            if nameless and not slots:
                findings.append(_nameless(socket, nameless))
            else:
                findings += _socket(socket, slots, host.platform, roof)
            roofs += roof
    for socket in served:
        for links in _link_roof(socket, host):
            findings += _links(links, roofs)
            roofs.append(links)
        roofs += _attention_roof(socket, host)
    measured = [
        {"socket": row["socket"], "gbs": row["gbs"], "tokens": tokens_under(row["gbs"], host.plan)}
        for row in host.bandwidth.get("sockets") or []
    ]
    findings += _disks(host)
    order = {"warning": 0, "advice": 1, "unknown": 2}
    return {
        "findings": sorted(findings, key=lambda row: order[row["severity"]]),
        "roofs": sorted(roofs, key=lambda row: row["socket"]),
        "measured": measured,
    }


def _finding(severity: str, name: str, found: str, expected: str, loss: str | None, way_out: str) -> dict[str, Any]:
    return {
        "severity": severity,
        "name": name,
        "found": found,
        "expected": expected,
        "loss": loss,
        "way_out": way_out,
    }


def _share(lost: float, roof: Sequence[Mapping[str, Any]]) -> str:
    """Return a loss in words: a share of the memory's read rate, and what that would be on top of its roof."""
    tokens = [entry["tokens_per_second"] for row in roof for entry in row["tokens"] if entry["depth"] == 0]
    speed = f"up to {tokens[0] * lost / (1 - lost):.1f} tokens/s: " if tokens else ""
    return f"{speed}{lost:.0%} of the memory's read rate, and of the decode speed where that is the limit"


def _slots_of(slots: Sequence[Mapping[str, Any]], socket: int, *, alone: bool) -> list[Mapping[str, Any]]:
    """Return the DRAM slots of a socket; those that name none are its own where it is the machine's only one."""
    return [slot for slot in slots if slot.get("socket") == socket or (alone and slot.get("socket") is None)]


def _channels(slots: Iterable[Mapping[str, Any]]) -> Counter[int]:
    """Return how many of these slots each channel has; slots that name none are left out."""
    return Counter(int(slot["channel"]) for slot in slots if slot.get("channel") is not None)


def _named(slots: Iterable[Mapping[str, Any]], limit: int = 4) -> str:
    """Return the locators of slots, shortened."""
    names = [str(slot.get("locator") or f"handle {slot.get('handle')}") for slot in slots]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _nameless(socket: int, slots: int) -> dict[str, Any]:
    return _finding(
        "unknown",
        f"socket {socket}, memory",
        f"{slots} slot(s) whose locators name no socket",
        "the socket of each slot",
        None,
        "Compare the board's manual with the slots by hand.",
    )


def _socket(
    socket: int,
    slots: Sequence[Mapping[str, Any]],
    platform: Platform | None,
    roof: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the findings on a socket's slots; ``roof`` is that of its memory, where it is known."""
    used = [slot for slot in slots if slot.get("populated")]
    name = f"socket {socket}, memory"
    if not used:
        return [
            _finding(
                "unknown",
                name,
                f"{len(slots)} slot(s) of this socket in the SMBIOS tables, none of them populated",
                "the modules that its memory is on",
                None,
                "The firmware's tables are wrong; a newer firmware may mend them.",
            )
        ]
    return [
        *_population(name, slots, used, platform, roof),
        *_equality(name, used),
        *_speed(name, used, platform, roof),
    ]


def _population(
    name: str,
    slots: Sequence[Mapping[str, Any]],
    used: Sequence[Mapping[str, Any]],
    platform: Platform | None,
    roof: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    found = []
    there = _channels(slots)
    filled = _channels(used)
    channels = platform.channels if platform else len(there)
    unplaced = [slot for slot in used if slot.get("channel") is None]
    if unplaced or not channels:
        return [
            _finding(
                "unknown",
                name,
                f"{len(unplaced)} of {len(used)} module(s) with locators that name no channel ({_named(unplaced, 2)})",
                "a channel for each slot",
                None,
                "Compare the board's manual with the slots by hand.",
            )
        ]
    if len(filled) < channels:
        empty = [slot for slot in slots if not slot.get("populated") and slot.get("channel") not in filled]
        found.append(
            _finding(
                "warning",
                name,
                f"{len(filled)} of {channels} channels populated" + (f", empty: {_named(empty)}" if empty else ""),
                f"a module in each of the {channels} channels",
                _share(1 - len(filled) / channels, roof),
                "Add equal modules to the empty channels.",
            )
        )
    doubled = sorted(channel for channel, count in filled.items() if count > 1)
    if doubled:
        found.append(
            _finding(
                "advice",
                name,
                f"two modules in {len(doubled)} of {len(filled)} channels",
                "one module in each channel",
                "unknown: firmware sets a lower speed for two modules in a channel, which the speed shows",
                "Larger modules, one in each channel, give the same memory at the full speed.",
            )
        )
    return found


def _equality(name: str, used: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what differs first: modules of different sizes have different part numbers as well."""
    for key, what in (("size_bytes", "sizes"), ("rank", "ranks"), ("part_number", "part numbers")):
        kinds: Counter[Any] = Counter(slot.get(key) for slot in used if slot.get(key) is not None)
        if len(kinds) < 2:
            continue
        sizes = key == "size_bytes"
        words = ", ".join(f"{count} x {_size(value) if sizes else value}" for value, count in kinds.most_common())
        odd = [slot for slot in used if slot.get(key) not in (None, kinds.most_common(1)[0][0])]
        return [
            _finding(
                "warning" if sizes else "advice",
                name,
                f"modules of different {what}: {words} ({_named(odd)})",
                "equal modules",
                "unknown: what exceeds the smallest module is read over fewer channels" if sizes else None,
                "Exchange the odd ones.",
            )
        ]
    return []


def _size(count: int) -> str:
    return f"{count / (1 << 30):g} GiB"


def _speed(
    name: str,
    used: Sequence[Mapping[str, Any]],
    platform: Platform | None,
    roof: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    rated = _least(used, "rated_mts")
    configured = _least(used, "configured_mts")
    if configured is None:
        return [
            _finding(
                "unknown",
                name,
                "no configured speed in the SMBIOS tables",
                "MT/s of each module",
                None,
                "A newer firmware may fill it in; the measured bandwidth tells as well.",
            )
        ]
    found = []
    wanted = min(rated, platform.mts) if rated and platform else rated
    if wanted and configured < wanted:
        found.append(
            _finding(
                "warning",
                name,
                f"{configured} MT/s configured, modules rated for {rated} MT/s",
                f"{wanted} MT/s"
                + (f", which {platform.name} takes" if platform and platform.mts < (rated or 0) else ""),
                _share(1 - configured / wanted, roof),
                _FIRMWARE_SPEED,
            )
        )
    elif platform and configured < platform.mts:
        told = f"{configured} MT/s, and modules that tell no rating"
        if rated:
            told = f"modules rated for {rated} MT/s" + (f", set to {configured}" if configured != rated else "")
        found.append(
            _finding(
                "advice",
                name,
                told,
                f"{platform.mts} MT/s, which {platform.name} takes",
                _share(1 - configured / platform.mts, roof),
                "Faster modules, where the processor's links can use them (see the roofs). The published recipe sets "
                "modules for 5600 to 6000 MT/s in the firmware, beyond what their maker promises.",
            )
        )
    return found


def _least(slots: Iterable[Mapping[str, Any]], key: str) -> int | None:
    """Return the least value, which all modules of a socket run at, or None where any module tells none."""
    values = [slot.get(key) for slot in slots]
    return None if None in values or not values else min(int(value) for value in values if value is not None)


def _protection(dimm: Mapping[str, Any]) -> list[dict[str, Any]]:
    plain = [slot for slot in dimm["slots"] if slot.get("populated") and slot.get("ecc") is False]
    if not plain:
        return []
    return [
        _finding(
            "warning",
            "memory errors",
            f"modules without ECC: {_named(plain)}",
            "ECC modules",
            "none in speed; a flipped bit in a weight goes unnoticed, and stays until the weights are loaded again",
            "Exchange them.",
        )
    ]


def _errors(host: Host) -> list[dict[str, Any]]:
    found = []
    poisoned = host.hugepages.get("poisoned_bytes")
    if poisoned:
        found.append(
            _finding(
                "warning",
                "memory errors",
                f"the kernel took {poisoned} bytes out of use after uncorrectable memory errors",
                "0",
                "a page of 1 GiB with one such byte cannot be reserved",
                "`journalctl -k | grep -i 'hardware error'` names the module; exchange it.",
            )
        )
    counted = host.condition.get("memory_errors") or []
    for kind, severity, loss in (
        ("uncorrected", "warning", "the page that holds such a byte, and what was in it"),
        ("corrected", "advice", "none yet; a module that is corrected often fails more often than others"),
    ):
        rows = [row for row in counted if row.get(kind)]
        total = sum(row[kind] for row in rows if row.get("module") is None)
        if total:
            named = [f"{row[kind]} in {row['module']}" for row in rows if row.get("module") is not None]
            found.append(
                _finding(
                    severity,
                    "memory errors",
                    f"{total} {kind} since the driver was loaded" + (f": {', '.join(named[:4])}" if named else ""),
                    "0",
                    loss,
                    "Reseat the module, and exchange it where the count grows.",
                )
            )
    return found


def _nodes(host: Host) -> list[dict[str, Any]]:
    """Return the sockets that the firmware splits: only one node for each was built for and tried."""
    with_memory = {row["node"] for row in host.numa.get("nodes") or [] if row.get("memory_bytes")}
    counts = {row["socket"]: len(with_memory.intersection(row["nodes"])) for row in host.numa.get("sockets") or []}
    return [
        _finding(
            "warning",
            f"socket {socket}, nodes",
            f"{counts[socket]} NUMA nodes (NPS{counts[socket]})",
            "one node for each socket (NPS1); others are not supported yet",
            "not measured here; an instance's threads then read from all nodes of the socket",
            "Firmware: AMD CBS, DF Common Options, Memory Addressing, NUMA nodes per socket: NPS1.",
        )
        for socket in host.sockets
        if counts.get(socket, 0) > 1
    ]


def _smt(host: Host) -> list[dict[str, Any]]:
    cpu = host.numa.get("cpu") or {}
    if cpu.get("smt") is not False or host.platform is None:
        return []
    return [
        _finding(
            "advice",
            "cpu.smt",
            f"off ({cpu.get('smt_control') or 'the kernel has no switch for it'})",
            "on: prefill uses both threads of a core",
            "none in decode; prefill not measured here",
            "Firmware: AMD CBS, CPU Common Options, Performance, CCD/Core/Thread Enablement, SMT Control: Auto.",
        )
    ]


def _governors(host: Host) -> list[dict[str, Any]]:
    others = [row for row in host.condition.get("governors") or [] if row.get("governor") != "performance"]
    if not others:
        return []
    words = ", ".join(f"{row['governor']} ({row.get('driver')}) on {row['cpus']} CPUs" for row in others)
    return [
        _finding(
            "advice",
            "governor",
            words,
            "performance: the clock does not fall while a thread waits for memory",
            "not measured here",
            "memory_tuning_governor sets it, and site.yml does so by default.",
        )
    ]


def _heat(host: Host) -> list[dict[str, Any]]:
    hot = [
        row
        for row in host.condition.get("module_temperatures") or []
        if row["celsius"] >= min(HOT_CELSIUS, row.get("critical") or HOT_CELSIUS)
    ]
    if not hot:
        return []
    words = ", ".join(f"{row['sensor']} {row['celsius']:.0f} C" for row in hot[:4])
    return [
        _finding(
            "warning",
            "memory temperature",
            f"{len(hot)} module(s) at or above their limit: {words}",
            f"below {min(row.get('critical') or HOT_CELSIUS for row in hot):.0f} C",
            "up to 20% of the decode speed where modules throttle, by the published recipe",
            "More air over the modules, or a fan of their own.",
        )
    ]


def _disks(host: Host) -> list[dict[str, Any]]:
    found = []
    for disk in host.condition.get("disks") or []:
        link = disk.get("link")
        if link and link["gts"] * link["lanes"] < link["best_gts"] * link["best_lanes"]:
            found.append(
                _finding(
                    "advice",
                    f"disk {disk['name']}",
                    f"a PCIe link of {link['gts']:g} GT/s x {link['lanes']}",
                    f"{link['best_gts']:g} GT/s x {link['best_lanes']}, which the disk can",
                    f"{1 - link['gts'] * link['lanes'] / (link['best_gts'] * link['best_lanes']):.0%} of the rate at "
                    "which weights load, where the link is the limit; none in decode",
                    "A slot with more lanes or a newer PCIe generation.",
                )
            )
    rate = host.disk_read.get("gbs")
    if rate and host.plan:
        weights = host.plan["model"]["bytes"] * len(host.plan["instances"])
        seconds = weights / (rate * 1e9)
        timeout = host.plan["start_timeout_s"]
        if seconds > min(SLOW_LOAD_S, timeout):
            late = seconds > timeout
            limit = f"{timeout / 60:.0f} min, the start timeout" if late else f"{SLOW_LOAD_S // 60} min"
            found.append(
                _finding(
                    "warning" if late else "advice",
                    "load time",
                    f"{rate:.2f} GB/s from {host.disk_read['source']}: {seconds / 60:.0f} min for each start",
                    f"at most {limit}",
                    "the start, which is ended before it is done" if late else "none in decode",
                    "Raise systemd_service_start_timeout_s, or use a faster disk." if late else "A faster disk.",
                )
            )
    return found


def _depths(plan: Mapping[str, Any]) -> list[int]:
    """Return the depths that the context has room for."""
    return [depth for depth in DEPTHS if depth < int(plan["context"])]


def tokens_under(gbs: float, plan: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the tokens/s that a read rate allows at each depth: the weights and the KV cache are read for a token."""
    weights = int(plan["model"]["read_per_token_bytes"]) if plan else 0
    if not plan or not weights:
        return []
    kv_per_token = int(plan["kv_bytes"]) / (int(plan["context"]) * int(plan["slots"]))
    return [
        {"depth": depth, "tokens_per_second": gbs * 1e9 / (weights + depth * kv_per_token)} for depth in _depths(plan)
    ]


def _memory_roof(
    socket: int, slots: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    used = [slot for slot in slots if slot.get("populated")]
    channels, mts = len(_channels(used)), _least(used, "configured_mts")
    if not channels or mts is None or any(slot.get("channel") is None for slot in used):
        return []
    gbs = channels * CHANNEL_BYTES * mts / 1000
    name = f"{channels} channels x {CHANNEL_BYTES} bytes x {mts} MT/s"
    return [{"socket": socket, "name": name, "gbs": gbs, "hypothesis": False, "tokens": tokens_under(gbs, plan)}]


def _link_roof(socket: int, host: Host) -> list[dict[str, Any]]:
    """Return the roof of the links between CCDs and memory: only for the generation that the hypothesis comes from."""
    ccds = [group for group in host.numa.get("l3") or [] if group.get("socket") == socket]
    if host.platform is None or host.platform.name != LINKED or not ccds:
        return []
    gbs = len(ccds) * CCD_LINK_GBS
    name = f"{len(ccds)} CCDs x {CCD_LINK_GBS:.0f} GB/s"
    return [{"socket": socket, "name": name, "gbs": gbs, "hypothesis": True, "tokens": tokens_under(gbs, host.plan)}]


def _attention_roof(socket: int, host: Host) -> list[dict[str, Any]]:
    """Return the roof of attention's arithmetic over the context, in F32 at the highest clock.

    A hypothesis: an engine may compute a part of it in 8-bit integers, and no processor holds that clock on all cores.
    """
    cores = [row["physical_cores"] for row in host.numa.get("sockets") or [] if row["socket"] == socket]
    clocks = {
        row.get("maximum_mhz")
        for row in host.dimm.get("processors") or []
        if row.get("populated") and row.get("socket") in (socket, None)
    } - {None, 0}
    if host.platform is None or host.plan is None or not cores or len(clocks) != 1:
        return []
    gigahertz = clocks.pop() / 1000
    flops = cores[0] * host.platform.flops_per_cycle * gigahertz * 1e9
    each = int(host.plan["model"]["attention_flops_per_context_token"])
    tokens = [
        {"depth": depth, "tokens_per_second": flops / (depth * each)} for depth in _depths(host.plan) if depth and each
    ]
    name = f"attention in F32, {cores[0]} cores x {host.platform.flops_per_cycle} operations x {gigahertz:.2f} GHz"
    return [{"socket": socket, "name": name, "gbs": None, "hypothesis": True, "tokens": tokens}] if tokens else []


def _links(roof: Mapping[str, Any], roofs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    memory = next((row for row in roofs if row["socket"] == roof["socket"] and not row["hypothesis"]), None)
    if memory is None or roof["gbs"] >= memory["gbs"]:
        return []
    return [
        _finding(
            "advice",
            f"socket {roof['socket']}, cores",
            f"{roof['name']} is {roof['gbs']:.0f} GB/s, below the memory's {memory['gbs']:.0f} GB/s (a hypothesis)",
            "enough CCDs to read at the memory's rate",
            f"up to {1 - roof['gbs'] / memory['gbs']:.0%} of the decode speed",
            "A processor with more CCDs; faster memory would gain little.",
        )
    ]
