# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Machines whose plan and judgement are kept as text in tests/golden/, from trees and tables to the last line.

A difference is read like a review: `PYTHONPATH=.collections python -m tests.support.golden` writes the files anew, and
git shows what changed.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible_collections.cpullm.epyc.plugins.filter.judgement_table import judgement_table
from ansible_collections.cpullm.epyc.plugins.filter.plan_table import plan_table
from ansible_collections.cpullm.epyc.plugins.module_utils import _hugepages, _numa, _smbios
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Host, judge
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import Manifest
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import Overrides, Refusal, make_plan

from tests.unit import smbios_builder, tree_builder
from tests.unit.smbios_builder import LETTERS, Array, Cpu, Device
from tests.unit.test_gguf import TINY
from tests.unit.test_plan import R1, ZEN4, manifest

FOLDER = Path(__file__).resolve().parent.parent / "golden"
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def module(gib: int, rated: int, configured: int, **other: Any) -> Device:
    """Return a module of that size and speed."""
    return Device(
        extended_size=gib * 1024, volatile=gib << 30, speed=rated, configured_speed=configured, part="", **other
    )


def board(*sockets: Sequence[Device], cpu: Cpu) -> bytes:
    """Return the table of a board with these modules in the channels of each socket."""
    return smbios_builder.table(
        [
            dataclasses.replace(item, locator=f"DIMM_P{socket}_{LETTERS[channel]}0", bank="BANK 0")
            for socket, modules in enumerate(sockets)
            for channel, item in enumerate(modules)
        ],
        cpus=[dataclasses.replace(cpu, designation=f"P{socket}") for socket in range(len(sockets))],
        arrays=(Array(slots=sum(map(len, sockets)), extended_capacity=12 << 40),),
    )


@dataclasses.dataclass(frozen=True)
class Golden:
    """A machine and what is asked of it; ``tree`` is None for a captured one, whose folder ``captured`` names."""

    title: str
    tree: tree_builder.Machine | None = None
    table: bytes | None = None
    captured: str | None = None
    model: Manifest = dataclasses.field(default_factory=manifest)
    overrides: Overrides = dataclasses.field(default_factory=Overrides)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the machine, by their names."""
        with tempfile.TemporaryDirectory() as folder:
            root = self._root(Path(folder))
            dimm = _smbios.gather(root)
            dimm["reason"] = dimm["reason"] and dimm["reason"].replace(root, "")
            return {
                "cpullm_numa": _numa.gather(root),
                "cpullm_dimm": dimm,
                "cpullm_hugepages": _hugepages.gather(root),
            }

    def render(self) -> str:
        """Return plan or refusal, and the judgement, as an operator reads them."""
        numa, dimm, hugepages = self.facts().values()
        plan = None
        try:
            plan = make_plan(numa, self.model, self.overrides)
            lines = plan_table(plan, width=120)
        except Refusal as refusal:
            lines = [f"refused: {refusal}"]
        lines += ["", *judgement_table(judge(Host(numa, plan, dimm, hugepages)), width=120)]
        return "\n".join([self.title, "", *lines, ""])

    def _root(self, folder: Path) -> str:
        if self.captured is not None:
            return str(FIXTURES / self.captured)
        assert self.tree is not None
        tree_builder.build(self.tree, folder)
        tree_builder.write(folder, "proc/meminfo", "HardwareCorrupted:     0 kB\nHugepagesize:       2048 kB\n")
        if self.table is not None:
            tables = folder / "sys/firmware/dmi/tables"
            tables.mkdir(parents=True)
            (tables / "smbios_entry_point").write_bytes(smbios_builder.entry_point_3(self.table))
            (tables / "DMI").write_bytes(self.table)
        return str(folder)


EPYC_9135 = Cpu()
EPYC_9354 = Cpu(version="AMD EPYC 9354 32-Core Processor", cores=32, cores_enabled=32, threads=64, maximum_mhz=3800)
EPYC_9575F = Cpu(version="AMD EPYC 9575F 64-Core Processor", cores=64, cores_enabled=64, threads=128, maximum_mhz=5000)
RECIPE = tree_builder.Machine(flags=ZEN4)
GENOA = tree_builder.Machine(cores=32, cores_per_l3=4, model=EPYC_9354.version, flags=ZEN4)

MACHINES = {
    "published-5600": Golden(
        "The published machine as bought: one EPYC 9135, 12 x 64 GB at 5600 MT/s, DeepSeek-R1 Q8_0 in 16 shards",
        RECIPE,
        board([module(64, 5600, 5600)] * 12, cpu=EPYC_9135),
    ),
    "published-6000": Golden(
        "The published machine with its modules raised to 6000 MT/s",
        RECIPE,
        board([module(64, 5600, 6000)] * 12, cpu=EPYC_9135),
    ),
    "published-without-mla": Golden(
        "The published machine with an upload of early 2025, which has no MLA tensors",
        RECIPE,
        board([module(64, 5600, 6000)] * 12, cpu=EPYC_9135),
        model=manifest(dataclasses.replace(R1, mla=False), 16, "DeepSeek-R1-Q8_0-MHA"),
    ),
    "two-sockets": Golden(
        "A two-socket board with 24 x 64 GB at 6400 MT/s: a copy of the model on each socket",
        tree_builder.Machine(sockets=2, cores=64, model=EPYC_9575F.version, flags=ZEN4),
        board(*[[module(64, 6400, 6000)] * 12] * 2, cpu=EPYC_9575F),
    ),
    "eleven-of-twelve": Golden(
        "A 9004 with 11 of 12 channels populated",
        dataclasses.replace(GENOA, gib_per_node=704),
        board([module(64, 4800, 4800)] * 11 + [smbios_builder.EMPTY], cpu=EPYC_9354),
    ),
    "genoa-4800": Golden(
        "A 9004 with 12 x 96 GB rated for 5600 MT/s, of which the processor takes 4800",
        dataclasses.replace(GENOA, gib_per_node=1152),
        board([module(96, 5600, 4800)] * 12, cpu=EPYC_9354),
    ),
    "mixed-modules": Golden(
        "An EPYC 9135 with 10 x 64 GB and 2 x 96 GB, all slowed to 4800 MT/s",
        dataclasses.replace(RECIPE, gib_per_node=832),
        board([module(64, 5600, 4800)] * 10 + [module(96, 6400, 4800)] * 2, cpu=EPYC_9135),
    ),
    "nodes-per-socket-4": Golden(
        "An EPYC 9135 whose firmware splits the socket into four nodes",
        dataclasses.replace(RECIPE, nodes_per_socket=4, cores_per_l3=4, gib_per_node=192),
        board([module(64, 6000, 6000)] * 12, cpu=EPYC_9135),
    ),
    "laptop": Golden(
        "A laptop with 24 GiB, which must be refused",
        tree_builder.Machine(cores=8, gib_per_node=24, model="AMD Ryzen 7 PRO 7840U", flags=ZEN4),
    ),
    "lab-vm": Golden(
        "The lab's VM, captured: two nodes, twelve modules configured below their rating, and the small model",
        captured="lab-vm-bookworm-pages",
        model=manifest(TINY, 3, "recite"),
    ),
    "cloud-vm": Golden(
        "A cloud's VM with 2 CPUs and 24 GiB, captured, and the small model",
        captured="cloud-2-cpus-24-gib",
        model=manifest(TINY, 3, "recite"),
    ),
}


def main() -> None:
    """Write every golden file."""
    for name, golden in MACHINES.items():
        (FOLDER / f"{name}.txt").write_text(golden.render(), encoding="utf-8")


if __name__ == "__main__":
    main()
