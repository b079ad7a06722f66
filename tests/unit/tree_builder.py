# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trees of /sys and /proc as the kernel shows them, for machines that no lab has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

GIB = 1 << 30
PAGE = 4096


def cpulist(cpus: Collection[int]) -> str:
    """Return a list in the kernel's format, written apart from the parser's."""
    held = set(cpus)
    text = ""
    for cpu in sorted(held):
        if cpu - 1 in held and cpu + 1 in held:
            continue
        if cpu - 1 in held:
            text += f"-{cpu}"
        else:
            text += f",{cpu}" if text else f"{cpu}"
    return text


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine whose cores are numbered socket by socket, second threads after all first ones, as on EPYC."""

    sockets: int = 1
    cores: int = 16
    threads: int = 2
    cores_per_l3: int = 8
    l3_kib: int = 32768
    nodes_per_socket: int = 1
    gib_per_node: int = 768
    # The numbers that the kernel gives to the nodes; more than there are sockets' nodes make nodes without CPUs.
    node_numbers: tuple[int, ...] = ()
    # Nodes without memory, by number.
    bare_nodes: tuple[int, ...] = ()
    offline: tuple[int, ...] = ()
    old_names: bool = False
    model: str = "AMD EPYC 9135 16-Core Processor"
    flags: tuple[str, ...] = (
        *("fpu", "vme", "pdpe1gb", "avx", "avx2"),
        *("avx512f", "avx512_vnni", "avx512_bf16", "fma", "f16c"),
    )

    @property
    def present(self) -> range:
        return range(self.sockets * self.cores * self.threads)

    @property
    def online(self) -> list[int]:
        return [cpu for cpu in self.present if cpu not in self.offline]

    def core(self, cpu: int) -> int:
        return cpu % (self.sockets * self.cores)

    def numbers(self) -> tuple[int, ...]:
        return self.node_numbers or tuple(range(self.sockets * self.nodes_per_socket))

    def cpus_of_node(self, position: int) -> list[int]:
        cores = self.cores // self.nodes_per_socket
        return [cpu for cpu in self.online if self.core(cpu) // cores == position]


def build(machine: Machine, root: Path) -> str:
    """Write the machine's tree below `root` and return its path."""
    write(root, "proc/cpuinfo", cpuinfo(machine))
    write(root, "proc/sys/kernel/osrelease", "6.1.0-37-amd64\n")
    write(root, "proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda2 ro hugepagesz=1G hugepages=0:3 hugepages=1:3\n")
    cpu = "sys/devices/system/cpu"
    write(root, f"{cpu}/online", cpulist(machine.online) + "\n")
    write(root, f"{cpu}/present", cpulist(machine.present) + "\n")
    write(root, f"{cpu}/smt/control", "on\n" if machine.threads > 1 else "notsupported\n")
    topologies(machine, root)
    numbers = machine.numbers()
    start = 0
    zones, ram = [], []
    for position, number in enumerate(numbers):
        base = f"sys/devices/system/node/node{number}"
        write(root, f"{base}/cpulist", cpulist(machine.cpus_of_node(position)) + "\n")
        row = [
            10 if other == number else 12 if same_socket(machine, position, at) else 32
            for at, other in enumerate(numbers)
        ]
        write(root, f"{base}/distance", " ".join(map(str, row)) + "\n")
        size = 0 if number in machine.bare_nodes else machine.gib_per_node * GIB
        write(root, f"{base}/meminfo", f"Node {number} MemTotal:       {size // 1024 * 98 // 100} kB\n")
        zones.append(zoneinfo(number, start, size, len(machine.online)))
        if size:
            ram.append((start, size))
        start += size + (2 * GIB if size and not position else 0)
    write(root, "proc/zoneinfo", "".join(zones))
    write(root, "proc/iomem", iomem(ram))
    return str(root)


def same_socket(machine: Machine, one: int, other: int) -> bool:
    return one // machine.nodes_per_socket == other // machine.nodes_per_socket


def topologies(machine: Machine, root: Path) -> None:
    """Write topology and caches of each CPU that is online."""
    siblings: dict[int, list[int]] = {}
    packages: dict[int, list[int]] = {}
    domains: dict[int, list[int]] = {}
    for cpu in machine.online:
        core = machine.core(cpu)
        siblings.setdefault(core, []).append(cpu)
        packages.setdefault(core // machine.cores, []).append(cpu)
        domains.setdefault(core // machine.cores_per_l3, []).append(cpu)
    names = ("core_cpus_list", "package_cpus_list")
    if machine.old_names:
        names = ("thread_siblings_list", "core_siblings_list")
    for cpu in machine.online:
        core = machine.core(cpu)
        base = f"sys/devices/system/cpu/cpu{cpu}"
        write(root, f"{base}/topology/{names[0]}", cpulist(siblings[core]) + "\n")
        write(root, f"{base}/topology/{names[1]}", cpulist(packages[core // machine.cores]) + "\n")
        write(root, f"{base}/topology/physical_package_id", f"{core // machine.cores}\n")
        for index, level in enumerate((1, 1, 2)):
            write(root, f"{base}/cache/index{index}/level", f"{level}\n")
        if machine.l3_kib:
            domain = core // machine.cores_per_l3
            write(root, f"{base}/cache/index3/level", "3\n")
            write(root, f"{base}/cache/index3/id", f"{domain}\n")
            write(root, f"{base}/cache/index3/size", f"{machine.l3_kib}K\n")
            write(root, f"{base}/cache/index3/shared_cpu_list", cpulist(domains[domain]) + "\n")


EMPTY_ZONE = "  pages free     0\n        spanned  0\n        present  0\n        managed  0\n"


def zoneinfo(node: int, start: int, size: int, cpus: int = 2) -> str:
    """Return the zones of a node: a small low one with a hole in node 0, the rest in Normal, an empty Movable."""
    if not size:
        return f"Node {node}, zone   Normal\n{EMPTY_ZONE}"
    text = ""
    low = start == 0
    if low:
        text += zone(node, "DMA32", 1, 4 * GIB // PAGE - 1, 2 * GIB // PAGE, cpus)
    first = 4 * GIB if low else start
    present = size - 2 * GIB if low else size
    text += zone(node, "Normal", first // PAGE, present // PAGE, present // PAGE, cpus)
    text += f"Node {node}, zone  Movable\n{EMPTY_ZONE}"
    text += zone(node, "Device", (start + size) // PAGE + 999999, 1 << 20, 1 << 20, cpus)
    return text


def zone(node: int, name: str, start: int, spanned: int, present: int, cpus: int = 2) -> str:
    pagesets = "".join(
        f"    cpu: {cpu}\n              count: 1\n              high:  2\n              batch: 3\n"
        "              high_min: 4\n              high_max: 5\n  vm stats threshold: 120\n"
        for cpu in range(cpus)
    )
    return (
        f"Node {node}, zone {name:>8}\n"
        "  per-node stats\n"
        "      nr_inactive_anon 1000\n"
        f"  pages free     {present // 2}\n"
        "        min      12\n"
        f"        spanned  {spanned}\n"
        f"        present  {present}\n"
        f"        managed  {present * 98 // 100}\n"
        "        protection: (0, 0, 0, 0, 0)\n"
        f"  pagesets\n{pagesets}"
        f"  node_unreclaimable:  0\n  start_pfn:           {start}\n"
    )


def iomem(ram: Sequence[tuple[int, int]]) -> str:
    """Return /proc/iomem: RAM with the holes of a PC below 1 MiB and from 2 to 4 GiB, kernel code within it."""
    lines = ["00000000-00000fff : Reserved"]
    for start, size in ram:
        if start == 0:
            lines += ["00001000-0009fbff : System RAM", "000a0000-000fffff : Reserved"]
            lines += [
                "00100000-7fffffff : System RAM",
                "  01000000-02209987 : Kernel code",
                "80000000-8fffffff : PCI Bus 0000:00",
            ]
            lines.append(f"{4 * GIB:08x}-{size + 2 * GIB - 1:08x} : System RAM")
        else:
            lines.append(f"{start:08x}-{start + size - 1:08x} : System RAM")
    return "\n".join(lines) + "\n"


def cpuinfo(machine: Machine) -> str:
    block = (
        "processor\t: {cpu}\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n"
        f"model name\t: {machine.model}\nstepping\t: 1\ncpu MHz\t\t: 2450.000\n"
        f"flags\t\t: {' '.join(machine.flags)}\nbugs\t\t: sysret_ss_attrs\n\n"
    )
    return "".join(block.format(cpu=cpu) for cpu in machine.online)


def write(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
