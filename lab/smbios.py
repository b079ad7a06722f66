# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SMBIOS structures as bytes, for QEMU's ``-smbios file=``: the memory devices of a two-socket EPYC board.

Layouts: DMTF DSP0134 3.7, clauses 7.17 (type 16, Physical Memory Array) and 7.18 (type 17, Memory Device). QEMU drops
its own structures of a type that comes from a file; its processors (type 4) stay, one per socket.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

# The handle of QEMU's own array, which its mapped addresses (type 19) refer to (hw/smbios/smbios.c, T16_BASE).
ARRAY_HANDLE = 0x1000
# Far above everything that QEMU numbers itself.
DEVICE_HANDLE = 0x2000

_TYPE_DDR5 = 0x22
_FORM_DIMM = 0x09
_DETAIL_SYNCHRONOUS_REGISTERED = 1 << 7 | 1 << 13
_TECHNOLOGY_DRAM = 0x03
_MODE_VOLATILE = 1 << 3
_LOCATION_BOARD = 0x03
_USE_SYSTEM = 0x03
_CORRECTION_MULTI_BIT = 0x06


@dataclasses.dataclass(frozen=True)
class Dimm:
    """One memory slot; size 0 means that it is empty."""

    locator: str
    bank: str
    socket: int = 0
    size_gib: int = 64
    rated_mts: int = 5600
    configured_mts: int = 4800
    rank: int = 2
    data_bits: int = 64
    total_bits: int = 80
    manufacturer: str = "Lab Memory"
    part: str = "LAB64G56D8-EC8"
    serial: str = "00000000"


def structure(kind: int, handle: int, body: bytes, strings: Sequence[str]) -> bytes:
    """Return one structure: header, formatted area, and its string set with both terminators."""
    area = b"".join(text.encode("ascii") + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + area + b"\0"


def memory_device(dimm: Dimm, handle: int) -> bytes:
    """Return the type 17 structure of one slot, 92 bytes long as of SMBIOS 3.3, and its strings."""
    populated = dimm.size_gib > 0
    strings = [dimm.locator, dimm.bank]
    if populated:
        strings += [dimm.manufacturer, dimm.serial, "Not Specified", dimm.part]
    size_mib = dimm.size_gib * 1024
    # 0x7FFF in the 16-bit size means: look at the extended size, which is in MiB.
    short_size = 0 if not populated else size_mib if size_mib < 0x7FFF else 0x7FFF
    body = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHHBHBHHHHQQQQII",
        ARRAY_HANDLE + dimm.socket,
        0xFFFE,  # error information: not provided
        dimm.total_bits if populated else 0xFFFF,
        dimm.data_bits if populated else 0xFFFF,
        short_size,
        _FORM_DIMM,
        0,  # device set: none
        1,  # device locator: string 1
        2,  # bank locator: string 2
        _TYPE_DDR5 if populated else 0x02,
        _DETAIL_SYNCHRONOUS_REGISTERED if populated else 0,
        dimm.rated_mts if populated else 0,
        3 if populated else 0,  # manufacturer
        4 if populated else 0,  # serial number
        5 if populated else 0,  # asset tag
        6 if populated else 0,  # part number
        dimm.rank if populated else 0,
        size_mib if short_size == 0x7FFF else 0,
        dimm.configured_mts if populated else 0,
        1100 if populated else 0,  # voltages in millivolts: minimum, maximum, configured
        1100 if populated else 0,
        1100 if populated else 0,
        _TECHNOLOGY_DRAM if populated else 0x02,
        _MODE_VOLATILE if populated else 0x04,
        0,  # firmware version: none
        0,  # module manufacturer, module product, subsystem manufacturer, subsystem product: unknown
        0,
        0,
        0,
        0,  # non-volatile size
        dimm.size_gib << 30,  # volatile size
        0,  # cache size
        0,  # logical size
        0,  # extended speed and extended configured speed: the 16-bit fields hold them
        0,
    )
    return structure(17, handle, body, strings)


def memory_array(handle: int, slots: int, capacity_gib: int) -> bytes:
    """Return the type 16 structure of one socket's slots: on the board, system memory, multi-bit ECC."""
    # 0x80000000 in the 32-bit capacity means: look at the extended capacity, which is in bytes.
    numbers = (_LOCATION_BOARD, _USE_SYSTEM, _CORRECTION_MULTI_BIT, 0x80000000, 0xFFFE, slots, capacity_gib << 30)
    return structure(16, handle, struct.pack("<BBBIHHQ", *numbers), [])


def two_socket_board(channels: int = 6) -> list[Dimm]:
    """Return the lab's board: two sockets, one 64 GB DDR5-5600 DIMM on each of their first channels.

    The labels are those of AMD's reference firmware, in which only the bank tells the socket and the channel.
    """
    return [
        Dimm(
            locator="DIMM 0",
            bank=f"P{socket} CHANNEL {chr(ord('A') + channel)}",
            socket=socket,
            serial=f"1AB{socket:01d}{channel:04d}",
        )
        for socket in range(2)
        for channel in range(channels)
    ]


def tables(dimms: Sequence[Dimm]) -> list[bytes]:
    """Return one array per socket and one device per slot, each with a handle of its own."""
    slots = {socket: [dimm for dimm in dimms if dimm.socket == socket] for socket in {dimm.socket for dimm in dimms}}
    arrays = [memory_array(ARRAY_HANDLE + socket, len(slots[socket]), 256 * len(slots[socket])) for socket in slots]
    return arrays + [memory_device(dimm, DEVICE_HANDLE + number) for number, dimm in enumerate(dimms)]
