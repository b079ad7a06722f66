# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SMBIOS tables built to the specification (DMTF DSP0134 3.7), written apart from the parser that they test."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

# dmidecode's dump format: the entry point at 0, pointing at a table at 0x20.
DUMP_TABLE = 0x20


@dataclasses.dataclass(frozen=True)
class Device:
    """A memory device (type 17) in the specification's own numbers; `length` cuts it to an older version."""

    locator: str = "DIMM_A1"
    bank: str = "BANK 0"
    size: int = 0x7FFF
    extended_size: int = 65536
    total_width: int = 80
    data_width: int = 64
    form_factor: int = 0x09
    kind: int = 0x22
    detail: int = 1 << 7 | 1 << 13
    speed: int = 5600
    manufacturer: str = "Samsung"
    serial: str = "80CE010000000001"
    asset: str = "Not Specified"
    part: str = "M321R8GA0PB0-CWMKH  "
    rank: int = 2
    configured_speed: int = 4800
    minimum_mv: int = 1100
    maximum_mv: int = 1100
    configured_mv: int = 1100
    technology: int = 0x03
    modes: int = 1 << 3
    jedec: int = 0xCE80
    non_volatile: int = 0
    volatile: int = 64 << 30
    extended_speed: int = 0
    extended_configured_speed: int = 0
    length: int = 0x5C


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A processor (type 4)."""

    designation: str = "CPU0"
    kind: int = 3
    manufacturer: str = "Advanced Micro Devices, Inc."
    version: str = "AMD EPYC 9135 16-Core Processor                "
    status: int = 0x41
    upgrade: int = 0x4A
    cores: int = 16
    cores_enabled: int = 16
    threads: int = 32
    maximum_mhz: int = 4300
    boot_mhz: int = 3650
    length: int = 0x30


@dataclasses.dataclass(frozen=True)
class Array:
    """A physical memory array (type 16); the capacity is in KiB, or beyond it in bytes."""

    location: int = 0x03
    use: int = 0x03
    correction: int = 0x06
    capacity: int = 0x80000000
    extended_capacity: int = 3 << 40
    slots: int = 12
    length: int = 0x17


EMPTY = Device(
    size=0,
    extended_size=0,
    total_width=0xFFFF,
    data_width=0xFFFF,
    form_factor=0x09,
    kind=0x02,
    detail=1 << 2,
    speed=0,
    manufacturer="Unknown",
    serial="Unknown",
    part="Unknown",
    rank=0,
    configured_speed=0,
    minimum_mv=0,
    maximum_mv=0,
    configured_mv=0,
    technology=0x02,
    modes=1 << 2,
    jedec=0,
    volatile=0,
)


class Strings:
    """The string set of one structure: add() returns the number of a text, 0 for none."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> int:
        if not text:
            return 0
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def area(self) -> bytes:
        return (b"".join(text.encode("ascii") + b"\0" for text in self.texts) or b"\0") + b"\0"


def structure(kind: int, handle: int, body: bytes, strings: Strings | None = None) -> bytes:
    """Return header, body and string set."""
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + (strings or Strings()).area()


def device(item: Device, handle: int, array: int) -> bytes:
    """Return a type 17 structure, clause 7.18."""
    strings = Strings()
    body = b"".join(
        (
            struct.pack("<HHHH", array, 0xFFFE, item.total_width, item.data_width),
            struct.pack("<HBB", item.size, item.form_factor, 0),
            bytes((strings.add(item.locator), strings.add(item.bank))),
            struct.pack("<BHH", item.kind, item.detail, item.speed),
            bytes(strings.add(text) for text in (item.manufacturer, item.serial, item.asset, item.part)),
            struct.pack("<BIH", item.rank, item.extended_size, item.configured_speed),
            struct.pack("<HHH", item.minimum_mv, item.maximum_mv, item.configured_mv),
            struct.pack("<BHB", item.technology, item.modes, 0),
            struct.pack("<HHHH", item.jedec, 0, 0, 0),
            struct.pack("<QQQQ", item.non_volatile, item.volatile, 0, 0),
            struct.pack("<II", item.extended_speed, item.extended_configured_speed),
            struct.pack("<HHHH", 0, 0, 0, 0),
        )
    )
    return structure(17, handle, body[: item.length - 4], strings)


def processor(item: Cpu, handle: int) -> bytes:
    """Return a type 4 structure, clause 7.5."""
    strings = Strings()
    wide = item.cores, item.cores_enabled, item.threads
    narrow = [min(count, 0xFF) for count in wide]
    body = b"".join(
        (
            bytes((strings.add(item.designation), item.kind, 0x6B, strings.add(item.manufacturer))),
            struct.pack("<QB", 0x178BFBFF00B00F21, strings.add(item.version)),
            struct.pack("<BHHH", 0x8B, 100, item.maximum_mhz, item.boot_mhz),
            struct.pack("<BB", item.status, item.upgrade),
            struct.pack("<HHH", 0xFFFF, 0xFFFF, 0xFFFF),
            bytes((0, 0, 0)),
            bytes(narrow),
            struct.pack("<HH", 0xFC, 0x6B),
            struct.pack("<HHH", *wide),
            struct.pack("<H", item.threads),
        )
    )
    return structure(4, handle, body[: item.length - 4], strings)


def array(item: Array, handle: int) -> bytes:
    """Return a type 16 structure, clause 7.17."""
    body = struct.pack(
        "<BBBIHHQ",
        item.location,
        item.use,
        item.correction,
        item.capacity,
        0xFFFE,
        item.slots,
        item.extended_capacity,
    )
    return structure(16, handle, body[: item.length - 4])


def system(maker: str, handle: int = 1) -> bytes:
    """Return a type 1 structure, clause 7.2."""
    strings = Strings()
    names = bytes((strings.add(maker), strings.add("Board"), 0, 0))
    return structure(1, handle, names + bytes(16) + b"\x06\0\0", strings)


def table(
    devices: Sequence[Device],
    cpus: Sequence[Cpu] = (Cpu(),),
    arrays: Sequence[Array] = (Array(),),
    maker: str = "Lab",
) -> bytes:
    """Return a table as a board would have it: system, processors, arrays, memory devices, end."""
    parts = [system(maker)]
    parts += [processor(item, 0x40 + number) for number, item in enumerate(cpus)]
    parts += [array(item, 0x1000 + number) for number, item in enumerate(arrays)]
    parts += [device(item, 0x1100 + number, 0x1000) for number, item in enumerate(devices)]
    parts.append(structure(127, 0xFEFF, b""))
    return b"".join(parts)


def entry_point_3(content: bytes, minor: int = 7, longest: int | None = None) -> bytes:
    """Return a 3.x entry point, clause 5.2.2."""
    size = len(content) if longest is None else longest
    return summed(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 0x18, 3, minor, 0, 1, 0, size, DUMP_TABLE), 5)


def entry_point_2(content: bytes, structures: int, minor: int = 8) -> bytes:
    """Return a 2.x entry point, clause 5.2.1."""
    inner = summed(struct.pack("<5sBHIHB", b"_DMI_", 0, len(content), DUMP_TABLE, structures, 0x20 | minor), 5)
    return summed(struct.pack("<4sBBBBHB5s", b"_SM_", 0, 0x1F, 2, minor, 0x100, 0, bytes(5)) + inner, 4)


def summed(data: bytes, at: int) -> bytes:
    """Return the data with the byte at `at` set so that all bytes sum to zero."""
    return data[:at] + bytes((-sum(data) & 0xFF,)) + data[at + 1 :]


def count(content: bytes) -> int:
    """Return the number of structures in a built table."""
    found = at = 0
    while at < len(content):
        found += 1
        at = content.index(b"\0\0", at + content[at + 1]) + 2
    return found


def dump(entry: bytes, content: bytes) -> bytes:
    """Return the two as dmidecode's --from-dump reads them."""
    return entry.ljust(DUMP_TABLE, b"\0") + content


# --- Boards -------------------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWX"


def single_socket_12() -> bytes:
    """An SP5 board with twelve channels, one DIMM each, named as on boards by Gigabyte."""
    return table(
        [
            Device(locator=f"DIMM_P0_{letter}0", bank="BANK 0", serial=f"80CE01{number:010X}")
            for number, letter in enumerate(LETTERS[:12])
        ]
    )


def two_socket_24() -> bytes:
    """A board with two sockets and 24 slots; the second socket's letters go on with M, one processor runs SMT-less."""
    return table(
        [
            Device(
                locator=f"DIMM_P{number // 12}_{letter}0",
                bank="BANK 0",
                speed=6400,
                configured_speed=6000,
                total_width=72,
                part="HMCG94AGBRA179N     ",
                manufacturer="SK Hynix",
                jedec=0xAD80,
            )
            for number, letter in enumerate(LETTERS)
        ],
        cpus=(
            Cpu("P0", version="AMD EPYC 9965 192-Core Processor", cores=192, cores_enabled=192, threads=384),
            Cpu("P1", version="AMD EPYC 9965 192-Core Processor", cores=192, cores_enabled=256, threads=512),
        ),
        arrays=(Array(slots=24, extended_capacity=12 << 40),),
    )


def unequal_24() -> bytes:
    """One socket with two slots per channel, AMD's own labels: unequal, empty, and with sizes of every form."""
    kinds = [
        Device(size=0x7FFF, extended_size=131072, rank=4, volatile=128 << 30),
        EMPTY,
        Device(size=16384, extended_size=0, rank=1, volatile=16 << 30),
        EMPTY,
        Device(size=0x8000 | 512, extended_size=0, kind=0x1A, speed=0xFFFF, extended_speed=70000, volatile=512 << 10),
        Device(size=0xFFFF, extended_size=0, speed=0, configured_speed=0, rank=0, volatile=0xFFFFFFFFFFFFFFFF),
        Device(total_width=64, data_width=64, manufacturer="Unknown", part="", serial="", jedec=0),
        Device(total_width=0xFFFF, data_width=64, configured_speed=0xFFFF, extended_configured_speed=66000),
        Device(speed=0xFFFF, extended_speed=0, minimum_mv=0, configured_mv=1250, technology=0x02, detail=1 << 2),
        Device(form_factor=0x02, kind=0x02, detail=0, technology=0x07, non_volatile=128 << 30, volatile=0),
        Device(length=0x1B, size=8192, volatile=0, rank=0, configured_speed=0),
        Device(length=0x28, size=0x7FFF, extended_size=32768),
        *[EMPTY] * 12,
    ]
    return table(
        [
            dataclasses.replace(kind, locator=f"DIMM {number % 2}", bank=f"P0 CHANNEL {LETTERS[number // 2]}")
            for number, kind in enumerate(kinds)
        ],
        cpus=(Cpu("SP5"),),
        arrays=(Array(slots=24),),
    )


def unknown_4() -> bytes:
    """An older board (SMBIOS 2.x) whose firmware says "Unknown" nearly everywhere."""
    vague = Device(
        locator="Unknown",
        bank="Unknown",
        size=0xFFFF,
        extended_size=0,
        total_width=0xFFFF,
        data_width=0xFFFF,
        form_factor=0x02,
        kind=0x02,
        detail=1 << 2,
        speed=0,
        manufacturer="Unknown",
        serial="Unknown",
        part="Unknown",
        rank=0,
        configured_speed=0,
        length=0x22,
    )
    return table(
        [
            vague,
            dataclasses.replace(vague, locator="", bank=""),
            Device(length=0x15, size=4096),
            dataclasses.replace(EMPTY, locator="DIMM_A2"),
        ],
        cpus=(Cpu("Unknown", length=0x20, upgrade=0x02), Cpu("Unknown", length=0x23, status=0, upgrade=0x01)),
        arrays=(Array(capacity=16 << 20, length=0x0F, slots=4, correction=0x02, location=0x02),),
    )
