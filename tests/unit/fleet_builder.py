# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts as a run leaves them among its variables: facts, plan and judgement by the collection's own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark, _numa, _serving, _smbios
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Host, judge
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import Overrides, Refusal, make_plan

from tests.unit import smbios_builder, tree_builder
from tests.unit.smbios_builder import EMPTY, Cpu, Device
from tests.unit.test_plan import ZEN4, manifest

Facts = dict[str, Any]
NINE_16 = "AMD EPYC 9135 16-Core Processor"
NINE_64 = "AMD EPYC 9575F 64-Core Processor"


def device(letter: str, socket: int = 0, *, gib: int = 64, rated: int = 6000, configured: int = 6000) -> Device:
    """Return the module of a channel."""
    return Device(
        locator=f"DIMM_P{socket}_{letter}0",
        bank=f"P{socket} CHANNEL {letter}",
        size=0x7FFF,
        extended_size=gib * 1024,
        speed=rated,
        configured_speed=configured,
        part="M321R8GA0PB2-CCPPC",
        volatile=gib << 30,
    )


def empty(letter: str, socket: int = 0) -> Device:
    """Return the empty slot of a channel."""
    return dataclasses.replace(EMPTY, locator=f"DIMM_P{socket}_{letter}0", bank=f"P{socket} CHANNEL {letter}")


def channels(socket: int = 0, gib: int = 64, rated: int = 6000, configured: int = 6000) -> list[Device]:
    """Return a module in each of the twelve channels of a socket."""
    return [device(letter, socket, gib=gib, rated=rated, configured=configured) for letter in "ABCDEFGHIJKL"]


def host(name: str, root: Path, machine: tree_builder.Machine, devices: Sequence[Device] | None) -> Facts:
    """Return the variables of a host after its facts and its plan, or its refusal; without devices it has no tables."""
    tree_builder.build(machine, root)
    block = (root / "proc/cpuinfo").read_text().replace("flags\t\t:", f"flags\t\t: {' '.join(ZEN4)}")
    tree_builder.write(root, "proc/cpuinfo", block)
    if devices is not None:
        table = smbios_builder.table(devices, [Cpu(f"P{number}") for number in range(machine.sockets)])
        tables = root / "sys/firmware/dmi/tables"
        tables.mkdir(parents=True)
        (tables / "smbios_entry_point").write_bytes(smbios_builder.entry_point_3(table))
        (tables / "DMI").write_bytes(table)
    facts: Facts = {"cpullm_numa": _numa.gather(str(root)), "cpullm_dimm": _smbios.gather(str(root))}
    record: Facts = {"inventory_hostname": name, "ansible_facts": facts}
    try:
        plan = make_plan(facts["cpullm_numa"], manifest(), Overrides())
    except Refusal as refusal:
        # As the action plugin answers.
        told = {key: getattr(refusal, key) for key in ("name", "found", "expected", "way_out")}
        facts["cpullm_judgement"] = judge(Host(facts["cpullm_numa"], None, facts["cpullm_dimm"]))
        record["__host_plan_result"] = {"failed": True, "msg": f"{name}: {refusal}", "refusal": {"host": name, **told}}
        return record
    hugepages = {"poisoned_bytes": 0, "pools": []}
    judgement = judge(Host(facts["cpullm_numa"], plan, facts["cpullm_dimm"], hugepages))
    facts.update(cpullm_plan=plan, cpullm_judgement=judgement, cpullm_hugepages=hugepages)
    return record


def served(record: Facts, rate: float, **differences: Any) -> Facts:
    """Return a host's variables after the verification of its servers, with these differences of the first one."""
    plan = record["ansible_facts"]["cpullm_plan"]
    instances = []
    for entry in plan["instances"]:
        found: Facts = {
            "instance": entry["instance"],
            "active_state": "active",
            "hugetlb_kib": entry["pages"] * plan["pages"]["size_kib"],
            "nodes": [{"node": node, "pages": entry["pages"]} for node in entry["nodes"]],
            "pid": 1000 + entry["instance"],
            "private_kib": 3 << 20,
            "no_repack": True,
            "store_pages": entry["pages"],
            "store_problems": [],
            "health": 200,
            "text": "Paris.",
            "tokens_per_s": rate,
            "without_key": None,
            "error": None,
        }
        if not entry["instance"]:
            found.update(differences)
        wanted = {**entry, "size_kib": 1048576, "hugepages": True, "expect": "Paris", "key_needed": False}
        wanted |= {"stored": True, "private_kib": None}
        instances.append({**found, "deviations": _serving.deviations(found, wanted)})
    good = all(not entry["deviations"] for entry in instances)
    return {**record, "__systemd_service_serving": {"as_planned": good, "instances": instances}}


def measured(record: Facts, figures: dict[str, tuple[float, ...]], **more: Any) -> Facts:
    """Return a host's variables with its latest benchmark: of each figure these values, one for each round."""
    runs = [
        {"figure": figure, "round": number, "value": value, "reasons": []}
        for figure, values in figures.items()
        for number, value in enumerate(values)
    ]
    runs.append({"figure": "batch_4", "round": 0, "value": 9.0, "reasons": ["the machine swapped 3 pages"]})
    measurement: Facts = {
        "name": "running",
        "instance": 0,
        "mode": "live",
        "build": "0.3.36-avx512-debian12-2bced256d28f",
        "as_unit": True,
        "arguments": [],
        "environment": {},
        "runs": runs,
        "omitted": [{"figure": "restart", "reason": "benchmark_downtime_allowed is false"}],
        **more,
    }
    machine = {"cpu": NINE_16, "cores": 32, "memory_gib": 704.0, "kernel": "6.1.0"}
    result = {"date": "2026-11-25T19:00:00Z", "machine": machine, "interleaved": False, "measurements": [measurement]}
    name, plan = record["inventory_hostname"], record["ansible_facts"].get("cpullm_plan")
    return {**record, "__benchmark": _benchmark.document(name, result, {"tokens": 64}, plan)}


# What two links of 140 GB/s leave of the roofs, and a prefill that grows with its length.
FIGURES = {
    "read": (262.0, 264.0),
    "prefill_512": (58.1, 58.9, 58.4),
    "prefill_2048": (61.2, 61.9, 61.5),
    "decode_d0": (6.38, 6.45, 6.41),
    "decode_d4096": (6.02, 6.11, 6.07),
    "decode_d16384": (5.1, 5.3, 5.24),
}


def pooled(record: Facts, found: int, reboot_required: bool = False) -> Facts:
    """Return a host's variables after its pools were compared, each node with these pages."""
    nodes = record["ansible_facts"]["cpullm_plan"]["pages"]["nodes"]
    pools = [{"node": row["node"], "asked": row["pages"], "found": found} for row in nodes]
    fact = {"reboot_required": reboot_required, "pools": pools}
    return {**record, "ansible_facts": {**record["ansible_facts"], "cpullm_grub_hugepages": fact}}


def one_channel_short(root: Path) -> Facts:
    """Return a host that serves, on 11 of its 12 channels and two CCDs."""
    devices = [*channels()[:8], empty("I"), *channels()[9:]]
    machine = tree_builder.Machine(model=NINE_16, gib_per_node=704)
    return measured(served(pooled(host("epyc-01", root, machine, devices), 668), 6.4), FIGURES)


def slow_memory(root: Path) -> Facts:
    """Return a host with two sockets whose memory runs below its rating, and which waits for its reboot."""
    devices = [
        module
        for socket in (0, 1)
        for module in channels(socket, gib=96, rated=6400, configured=6000 if socket else 4800)
    ]
    machine = tree_builder.Machine(sockets=2, cores=64, model=NINE_64, gib_per_node=1152)
    return pooled(host("epyc-02", root, machine, devices), 0, reboot_required=True)


def too_small(root: Path) -> Facts:
    """Return a host that is refused: its memory cannot hold the model."""
    return host("epyc-03", root, tree_builder.Machine(model=NINE_16, gib_per_node=384), channels(gib=32))


def fleet(folder: Path) -> list[Facts]:
    """Return three hosts with one kind of fault each."""
    return [one_channel_short(folder / "1"), slow_memory(folder / "2"), too_small(folder / "3")]
