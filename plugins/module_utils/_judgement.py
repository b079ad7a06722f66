# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hardware judgement: what holds a machine back, by how much, and what to change first.

Pure functions of facts and plan. They inform and decide nothing: no number of the plan depends on them.

Decoding reads every active weight once a token, so the memory's read rate is the first roof. A finding's loss is its
share of that roof. Rates are peaks from transfer rate and width; what a machine reaches is less.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEPTHS = (0, 4096, 16384)
CHANNEL_BYTES = 8
# The published recipe decodes 7.17 tokens/s on 16 cores, which is 281 GB/s, and its processors have two CCDs by their
# L3: so the link of a CCD may be what limits it. Not measured by itself, and shown as the hypothesis that it is.
CCD_LINK_GBS = 140.0

_FIRMWARE_SPEED = "Firmware: AMD CBS, UMC Common Options, DDR Timing Configuration, Memory Target Speed: Auto."


@dataclass(frozen=True)
class Platform:
    """What a processor's memory controller takes. Source: AMD's processor specifications for one DIMM per channel."""

    name: str
    channels: int
    mts: int


# By the model's name: first digit, then the generation in the last one.
_PLATFORMS: tuple[tuple[str, Platform], ...] = (
    (r"EPYC 7..[23]", Platform("EPYC 7002 and 7003", 8, 3200)),
    (r"EPYC 8..4", Platform("EPYC 8004", 6, 4800)),
    (r"EPYC 9..4", Platform("EPYC 9004", 12, 4800)),
    (r"EPYC 9..5", Platform("EPYC 9005", 12, 6000)),
)


def platform_of(model: str | None) -> Platform | None:
    """Return what is known of a processor by its model name as the kernel gives it, or None."""
    for pattern, platform in _PLATFORMS:
        if re.search(rf"\b{pattern}[A-Z]*\b", model or ""):
            return platform
    return None


def judge(
    numa: Mapping[str, Any], dimm: Mapping[str, Any], hugepages: Mapping[str, Any], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``findings`` and ``roofs`` of a host.

    ``numa``, ``dimm`` and ``hugepages`` are the collection's facts, ``plan`` is the host's. A finding has
    ``severity`` (``warning`` costs speed or safety, ``advice`` may, ``unknown`` could not be judged), ``name``,
    ``found``, ``expected``, ``loss`` (in words, or None) and ``way_out``. A roof has ``socket``, ``name``, ``gbs``
    (GB/s, 10^9 bytes), ``hypothesis`` and ``tokens`` (a list of ``depth`` and ``tokens_per_second``).
    """
    platform = platform_of((numa.get("cpu") or {}).get("model"))
    served = sorted({int(row["socket"]) for row in plan["instances"]})
    findings = [*_errors(hugepages), *_smt(numa)]
    roofs: list[dict[str, Any]] = []
    if not dimm.get("readable"):
        findings.append(
            _finding(
                "unknown",
                "memory slots",
                f"none could be read: {dimm.get('reason') or 'no reason given'}",
                "SMBIOS tables of the types 16, 17 and 4",
                None,
                "Bare metal shows them to root; many virtual machines and all containers have none.",
            )
        )
    else:
        findings += _protection(dimm)
        for socket in served:
            slots = _slots_of(dimm["slots"], socket, served)
            findings += _socket(socket, slots, platform)
            roofs += _dimm_roof(socket, slots, plan)
    for socket in served:
        roof = _ccd_roof(socket, numa, plan)
        if roof is not None:
            findings += _links(roof, roofs)
            roofs.append(roof)
    order = {"warning": 0, "advice": 1, "unknown": 2}
    return {"findings": sorted(findings, key=lambda row: order[row["severity"]]), "roofs": roofs}


def _finding(severity: str, name: str, found: str, expected: str, loss: str | None, way_out: str) -> dict[str, Any]:
    return {
        "severity": severity,
        "name": name,
        "found": found,
        "expected": expected,
        "loss": loss,
        "way_out": way_out,
    }


def _share(lost: float) -> str:
    """Return a loss in words."""
    return f"{lost:.0%} of the memory's read rate, and of the decode speed where that is the limit"


def _slots_of(slots: Sequence[Mapping[str, Any]], socket: int, served: Sequence[int]) -> list[Mapping[str, Any]]:
    """Return the DRAM slots of a socket; with one socket, those that name none are its own."""
    alone = not any(slot.get("socket") not in (None, socket) for slot in slots) and len(served) == 1
    return [slot for slot in slots if slot.get("socket") == socket or (alone and slot.get("socket") is None)]


def _channels(slots: Iterable[Mapping[str, Any]]) -> Counter[int]:
    """Return how many of these slots each channel has; slots that name none are left out."""
    return Counter(int(slot["channel"]) for slot in slots if slot.get("channel") is not None)


def _named(slots: Iterable[Mapping[str, Any]], limit: int = 4) -> str:
    """Return the locators of slots, shortened."""
    names = [str(slot.get("locator") or f"handle {slot.get('handle')}") for slot in slots]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _socket(socket: int, slots: Sequence[Mapping[str, Any]], platform: Platform | None) -> list[dict[str, Any]]:
    """Return the findings on a socket's slots."""
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
    return [*_population(name, slots, used, platform), *_equality(name, used), *_speed(name, used, platform)]


def _population(
    name: str, slots: Sequence[Mapping[str, Any]], used: Sequence[Mapping[str, Any]], platform: Platform | None
) -> list[dict[str, Any]]:
    found = []
    there = _channels(slots)
    filled = _channels(used)
    channels = platform.channels if platform else len(there)
    if not filled or not channels:
        return [
            _finding(
                "unknown",
                name,
                f"{len(used)} module(s), and locators that name no channel ({_named(used, 2)})",
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
                _share(1 - len(filled) / channels),
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


def _speed(name: str, used: Sequence[Mapping[str, Any]], platform: Platform | None) -> list[dict[str, Any]]:
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
                _share(1 - configured / wanted),
                _FIRMWARE_SPEED,
            )
        )
    if rated and platform and rated < platform.mts:
        found.append(
            _finding(
                "advice",
                name,
                f"modules rated for {rated} MT/s",
                f"{platform.mts} MT/s, which {platform.name} takes",
                _share(1 - rated / platform.mts),
                "Faster modules, where the processor's links can use them (see the roofs).",
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


def _errors(hugepages: Mapping[str, Any]) -> list[dict[str, Any]]:
    poisoned = hugepages.get("poisoned_bytes")
    if not poisoned:
        return []
    return [
        _finding(
            "warning",
            "memory errors",
            f"the kernel took {poisoned} bytes out of use after uncorrectable memory errors",
            "0",
            "a page of 1 GiB with one such byte cannot be reserved",
            "`journalctl -k | grep -i 'hardware error'` names the module; exchange it.",
        )
    ]


def _smt(numa: Mapping[str, Any]) -> list[dict[str, Any]]:
    cpu = numa.get("cpu") or {}
    if cpu.get("smt") is not False or platform_of(cpu.get("model")) is None:
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


def _tokens(gbs: float, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens/s that a read rate allows at each depth that the context has room for."""
    weights = int(plan["model"]["read_per_token_bytes"])
    kv_per_token = int(plan["kv_bytes"]) / (int(plan["context"]) * int(plan["slots"]))
    depths = [depth for depth in DEPTHS if depth == 0 or depth < int(plan["context"])]
    return [
        {"depth": depth, "tokens_per_second": gbs * 1e9 / (weights + depth * kv_per_token)}
        for depth in depths
        if weights
    ]


def _dimm_roof(socket: int, slots: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    used = [slot for slot in slots if slot.get("populated")]
    channels, mts = len(_channels(used)), _least(used, "configured_mts")
    if not channels or mts is None:
        return []
    gbs = channels * CHANNEL_BYTES * mts / 1000
    name = f"{channels} channels x {CHANNEL_BYTES} bytes x {mts} MT/s"
    return [{"socket": socket, "name": name, "gbs": gbs, "hypothesis": False, "tokens": _tokens(gbs, plan)}]


def _ccd_roof(socket: int, numa: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the roof of the links between CCDs and memory: only where the processor has CCDs with such links."""
    platform = platform_of((numa.get("cpu") or {}).get("model"))
    ccds = [group for group in numa.get("l3") or [] if group.get("socket") == socket]
    if platform is None or platform.channels != 12 or not ccds:
        return None
    gbs = len(ccds) * CCD_LINK_GBS
    name = f"{len(ccds)} CCDs x {CCD_LINK_GBS:.0f} GB/s"
    return {"socket": socket, "name": name, "gbs": gbs, "hypothesis": True, "tokens": _tokens(gbs, plan)}


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
