# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory slots and processors from the SMBIOS tables that the kernel exports.

Offsets and codes: DMTF DSP0134, System Management BIOS Reference Specification, version 3.7 (codes up to 3.9).
The tables are firmware's word and are treated as hostile: their size is bounded, each length is checked, and what does
not fit raises ValueError with the offset.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import plain

ENTRY_POINT = "/sys/firmware/dmi/tables/smbios_entry_point"
TABLE = "/sys/firmware/dmi/tables/DMI"

# The largest tables seen on two-socket servers are some 40 KiB; the 3.x entry point could announce 4 GiB.
MAX_TABLE_BYTES = 1 << 20
MAX_ENTRY_POINT_BYTES = 64

KIB = 1 << 10
MIB = 1 << 20

END_OF_TABLE = 127

# What firmware writes where it has nothing to say (lower case).
PLACEHOLDERS = frozenset(
    {
        "",
        "[empty]",
        "default string",
        "dimm not installed",
        "empty",
        "n/a",
        "na",
        "no dimm",
        "no module installed",
        "none",
        "not available",
        "not installed",
        "not present",
        "not provided",
        "not specified",
        "to be filled by o.e.m.",
        "to be filled by oem",
        "undefined",
        "unknown",
    }
)

ARRAY_LOCATIONS = {
    0x01: "Other",
    0x03: "System board or motherboard",
    0x04: "ISA add-on card",
    0x05: "EISA add-on card",
    0x06: "PCI add-on card",
    0x07: "MCA add-on card",
    0x08: "PCMCIA add-on card",
    0x09: "Proprietary add-on card",
    0x0A: "NuBus",
    0xA0: "PC-98/C20 add-on card",
    0xA1: "PC-98/C24 add-on card",
    0xA2: "PC-98/E add-on card",
    0xA3: "PC-98/Local bus add-on card",
    0xA4: "CXL add-on card",
}
ARRAY_USES = {
    0x01: "Other",
    0x03: "System memory",
    0x04: "Video memory",
    0x05: "Flash memory",
    0x06: "Non-volatile RAM",
    0x07: "Cache memory",
}
ERROR_CORRECTIONS = {
    0x01: "Other",
    0x03: "None",
    0x04: "Parity",
    0x05: "Single-bit ECC",
    0x06: "Multi-bit ECC",
    0x07: "CRC",
}
FORM_FACTORS = {
    0x01: "Other",
    0x03: "SIMM",
    0x04: "SIP",
    0x05: "Chip",
    0x06: "DIP",
    0x07: "ZIP",
    0x08: "Proprietary card",
    0x09: "DIMM",
    0x0A: "TSOP",
    0x0B: "Row of chips",
    0x0C: "RIMM",
    0x0D: "SODIMM",
    0x0E: "SRIMM",
    0x0F: "FB-DIMM",
    0x10: "Die",
    0x11: "CAMM",
    0x12: "CUDIMM",
    0x13: "CSODIMM",
}
MEMORY_TYPES = {
    0x01: "Other",
    0x03: "DRAM",
    0x04: "EDRAM",
    0x05: "VRAM",
    0x06: "SRAM",
    0x07: "RAM",
    0x08: "ROM",
    0x09: "Flash",
    0x0A: "EEPROM",
    0x0B: "FEPROM",
    0x0C: "EPROM",
    0x0D: "CDRAM",
    0x0E: "3DRAM",
    0x0F: "SDRAM",
    0x10: "SGRAM",
    0x11: "RDRAM",
    0x12: "DDR",
    0x13: "DDR2",
    0x14: "DDR2 FB-DIMM",
    0x18: "DDR3",
    0x19: "FBD2",
    0x1A: "DDR4",
    0x1B: "LPDDR",
    0x1C: "LPDDR2",
    0x1D: "LPDDR3",
    0x1E: "LPDDR4",
    0x1F: "Logical non-volatile device",
    0x20: "HBM",
    0x21: "HBM2",
    0x22: "DDR5",
    0x23: "LPDDR5",
    0x24: "HBM3",
    0x25: "MRDIMM",
    0x26: "LPDDR6",
}
TYPE_DETAILS = (
    # The place in this tuple is the bit; bits 0 (reserved), 1 (other) and 2 (unknown) say nothing.
    (3, "Fast-paged"),
    (4, "Static column"),
    (5, "Pseudo-static"),
    (6, "RAMBUS"),
    (7, "Synchronous"),
    (8, "CMOS"),
    (9, "EDO"),
    (10, "Window DRAM"),
    (11, "Cache DRAM"),
    (12, "Non-volatile"),
    (13, "Registered (buffered)"),
    (14, "Unbuffered (unregistered)"),
    (15, "LRDIMM"),
)
TECHNOLOGIES = {
    0x01: "Other",
    0x03: "DRAM",
    0x04: "NVDIMM-N",
    0x05: "NVDIMM-F",
    0x06: "NVDIMM-P",
    0x07: "Intel Optane persistent memory",
    0x08: "MRDIMM",
}
# Only sockets of servers; the specification lists some ninety.
SOCKET_TYPES = {
    0x31: "AM4",
    0x37: "SP3",
    0x38: "SP3r2",
    0x3D: "LGA4189",
    0x3F: "LGA4677",
    0x49: "AM5",
    0x4A: "SP5",
    0x4B: "SP6",
    0x4F: "LGA4710",
    0x50: "LGA7529",
}
PROCESSOR_STATUS = {
    1: "Enabled",
    2: "Disabled by the user in firmware setup",
    3: "Disabled by firmware after an error",
    4: "Idle",
    7: "Other",
}
CENTRAL_PROCESSOR = 3


@dataclass(frozen=True)
class EntryPoint:
    """What the entry point announces; `structures` is None where it gives no count (3.x)."""

    anchor: str
    major: int
    minor: int
    table_bytes: int
    structures: int | None


@dataclass(frozen=True)
class Structure:
    """One structure of the table: `data` holds the formatted area with its four header bytes, `strings` what follows
    up to the two zero bytes."""

    kind: int
    handle: int
    offset: int
    data: bytes
    strings: bytes

    def number(self, at: int, width: int) -> int | None:
        """Return the little-endian number of `width` bytes at `at`, or None where the structure ends before it."""
        if at + width > len(self.data):
            return None
        return int.from_bytes(self.data[at : at + width], "little")

    def text(self, at: int) -> str | None:
        """Return the string that the byte at `at` refers to, or None: no field, no string, or a number past the end."""
        number = self.number(at, 1)
        texts = self.strings.split(b"\0") if number else []
        if not number or number > len(texts):
            return None
        return _printable(texts[number - 1])


@dataclass(frozen=True)
class MemoryArray:
    """A physical memory array (type 16)."""

    handle: int
    location: str | None
    use: str | None
    error_correction: str | None
    maximum_bytes: int | None
    slots: int | None


@dataclass(frozen=True)
class Slot:
    """A memory device (type 17): one slot, with its module where there is one. None is "the table does not tell"."""

    handle: int
    array_handle: int | None
    locator: str | None
    bank_locator: str | None
    socket: int | None
    channel: int | None
    channel_label: str | None
    populated: bool | None
    size_bytes: int | None
    form_factor: str | None
    type: str | None
    type_detail: tuple[str, ...]
    technology: str | None
    rated_mts: int | None
    configured_mts: int | None
    rank: int | None
    data_width_bits: int | None
    total_width_bits: int | None
    ecc: bool | None
    manufacturer: str | None
    manufacturer_jedec: str | None
    part_number: str | None
    minimum_mv: int | None
    maximum_mv: int | None
    configured_mv: int | None
    volatile_bytes: int | None
    non_volatile_bytes: int | None
    serial_number: str | None
    asset_tag: str | None


@dataclass(frozen=True)
class Processor:
    """A processor socket (type 4, central processors only)."""

    handle: int
    socket: int | None
    designation: str | None
    populated: bool | None
    status: str | None
    manufacturer: str | None
    version: str | None
    socket_type: str | None
    cores: int | None
    cores_enabled: int | None
    threads: int | None
    maximum_mhz: int | None
    boot_mhz: int | None


@dataclass(frozen=True)
class Inventory:
    """Everything read from one pair of tables; `notes` are sentences about what looked wrong but could be read."""

    version: str
    arrays: tuple[MemoryArray, ...]
    slots: tuple[Slot, ...]
    processors: tuple[Processor, ...]
    notes: tuple[str, ...]


def parse_entry_point(data: bytes) -> EntryPoint:
    """Return the entry point in `data`: `_SM3_` (3.x), `_SM_` (2.1 to 2.8) or the older bare `_DMI_`.

    Raises ValueError on an unknown anchor, a wrong length or a wrong checksum. Format: DSP0134 section 5.2.
    """
    if data[:5] == b"_SM3_":
        _check_sum(data, 0, _entry_length(data, 6, 0x18, 0x20), "_SM3_")
        return EntryPoint("_SM3_", data[7], data[8], struct.unpack_from("<I", data, 0x0C)[0], None)
    if data[:4] == b"_SM_":
        # 0x1E is an erratum of the 2.1 specification that firmware still carries.
        _check_sum(data, 0, _entry_length(data, 5, 0x1E, 0x20), "_SM_")
        if data[0x10:0x15] != b"_DMI_":
            raise ValueError(f"SMBIOS entry point: {data[0x10:0x15]!r} at offset 0x10, b'_DMI_' expected")
        _check_sum(data, 0x10, 0x0F, "_DMI_")
        length, _address, count = struct.unpack_from("<HIH", data, 0x16)
        return EntryPoint("_SM_", data[6], data[7], length, count)
    if data[:5] == b"_DMI_":
        if len(data) < 0x0F:
            raise ValueError(f"SMBIOS entry point: {len(data)} bytes, 15 expected")
        _check_sum(data, 0, 0x0F, "_DMI_")
        length, _address, count = struct.unpack_from("<HIH", data, 0x06)
        return EntryPoint("_DMI_", data[0x0E] >> 4, data[0x0E] & 0x0F, length, count)
    raise ValueError(f"SMBIOS entry point: anchor {data[:5]!r} at offset 0x0, _SM3_, _SM_ or _DMI_ expected")


def parse_table(table: bytes, entry: EntryPoint) -> tuple[tuple[Structure, ...], tuple[str, ...]]:
    """Return the structures of `table` up to its end marker, and notes on what was odd.

    Raises ValueError with the offset of a structure that is shorter than its header, reaches past the table's end, or
    whose strings do not end. Format: DSP0134 section 6.1.
    """
    if len(table) > MAX_TABLE_BYTES:
        raise ValueError(f"SMBIOS table: {len(table)} bytes, at most {MAX_TABLE_BYTES} expected")
    if entry.structures is not None and len(table) < entry.table_bytes:
        raise ValueError(
            f"SMBIOS table: {len(table)} bytes, but the entry point announces {entry.table_bytes}: the table is cut off"
        )
    # The 3.x length is a maximum, and the kernel exports what is used of it.
    table = table[: entry.table_bytes]

    structures: list[Structure] = []
    notes: list[str] = []
    at = 0
    ended = False
    while at + 4 <= len(table) and not ended:
        if entry.structures and len(structures) >= entry.structures:
            break
        kind, length, handle = struct.unpack_from("<BBH", table, at)
        if length < 4:
            raise ValueError(f"SMBIOS table: structure at offset 0x{at:x} has length {length}, at least 4 expected")
        if at + length > len(table):
            raise ValueError(
                f"SMBIOS table: structure at offset 0x{at:x} has length {length} and ends past the table's "
                f"{len(table)} bytes"
            )
        end = table.find(b"\0\0", at + length)
        ended = kind == END_OF_TABLE
        if end < 0:
            if ended:
                break
            raise ValueError(f"SMBIOS table: the strings of the structure at offset 0x{at:x} do not end")
        structures.append(Structure(kind, handle, at, table[at : at + length], table[at + length : end]))
        at = end + 2
    if not ended and any(table[at:]) and not (entry.structures and len(structures) >= entry.structures):
        notes.append(f"the SMBIOS table ends at offset 0x{at:x} without its end marker")
    if entry.structures and len(structures) != entry.structures:
        notes.append(f"the SMBIOS entry point announces {entry.structures} structures, {len(structures)} are there")
    return tuple(structures), tuple(notes)


def decode(entry_point: bytes, table: bytes) -> Inventory:
    """Return the inventory that the two exported files hold, or raise ValueError."""
    entry = parse_entry_point(entry_point)
    structures, notes = parse_table(table, entry)
    arrays = tuple(_array(item) for item in structures if item.kind == 16)
    raw_slots = [_slot(item) for item in structures if item.kind == 17]
    central = [item for item in structures if item.kind == 4 and item.number(5, 1) in (CENTRAL_PROCESSOR, None)]
    designations = [_meaning(_required(item, 0x1A, "processor").text(4)) for item in central]
    processors = tuple(_processor(item, socket) for item, socket in zip(central, processor_sockets(designations)))
    maker = next((item.text(4) for item in structures if item.kind == 1), None)
    slots, place_notes = place(raw_slots, len(processors), maker)
    if not slots:
        notes = (*notes, "the SMBIOS table describes no memory slot")
    return Inventory(f"{entry.major}.{entry.minor}", arrays, slots, processors, notes + place_notes)


def read(root: str = "/") -> Inventory:
    """Return the inventory of the tables below `root`; raises OSError or ValueError."""
    base = root.rstrip("/")
    return decode(
        _read_bounded(base + ENTRY_POINT, MAX_ENTRY_POINT_BYTES),
        _read_bounded(base + TABLE, MAX_TABLE_BYTES),
    )


def gather(root: str = "/", include_serial: bool = False) -> dict[str, Any]:
    """Return the fact `cpullm_dimm`: the inventory, or why it could not be read."""
    fact: dict[str, Any] = {
        "readable": False,
        "reason": None,
        "smbios_version": None,
        "arrays": [],
        "slots": [],
        "processors": [],
        "notes": [],
    }
    try:
        found = read(root)
    except FileNotFoundError as error:
        fact["reason"] = (
            f"{error.filename} does not exist: this host shows no SMBIOS tables "
            "(a container, or firmware or a kernel without them)"
        )
        return fact
    except PermissionError as error:
        fact["reason"] = f"{error.filename} is readable by root only: run with become"
        return fact
    except (OSError, ValueError) as error:
        fact["reason"] = str(error)
        return fact
    slots = plain(found.slots)
    if not include_serial:
        for slot in slots:
            del slot["serial_number"], slot["asset_tag"]
    fact.update(
        readable=True,
        smbios_version=found.version,
        arrays=plain(found.arrays),
        slots=slots,
        processors=plain(found.processors),
        notes=list(found.notes),
    )
    return fact


# --- Sizes and speeds ---------------------------------------------------------------------------------------------


def module_size(size: int | None, extended: int | None) -> int | None:
    """Return a module's bytes from the Size and Extended Size fields (offsets 0x0C and 0x1C); 0 is an empty slot.

    Bit 15 of Size selects KiB instead of MiB, 0xFFFF is unknown, 0x7FFF refers to the extended field (bits 0 to 30,
    MiB) where the structure has one.
    """
    if size is None or size == 0xFFFF:
        return None
    if size == 0x7FFF and extended is not None:
        return (extended & 0x7FFFFFFF) * MIB or None
    if size & 0x8000:
        return (size & 0x7FFF) * KIB
    return size * MIB


def transfer_rate(speed: int | None, extended: int | None) -> int | None:
    """Return MT/s from a speed field and its extended field of 3.3; 0 is unknown, 0xFFFF refers to the extended one."""
    if speed == 0xFFFF:
        speed = None if extended is None else extended & 0x7FFFFFFF
    return speed or None


# --- Where a slot is ----------------------------------------------------------------------------------------------

_CPU = r"(?:P|CPU|PROC|PROCESSOR|SOCKET) ?(?P<socket>\d{1,2})"
_SLOT = r"(?P<slot>\d{1,2})"
_CHANNEL = r"(?:CHANNEL|CH|C(?=\d)) ?(?:(?P<letter>[A-Z])|(?P<number>\d{1,2}))"
# Matched against the whole label in capitals, with runs of blanks, "_" and "-" made one blank. Each line: a label seen.
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"DIMM ?P(?P<socket>\d{1,2}) (?P<letter>[A-Z])" + _SLOT + r"?",  # DIMM_P0_A0
        _CPU + r" (?:MC\d{1,2} )?(?:DIMM ?)?(?P<letter>[A-Z])" + _SLOT + r"?",  # P1-DIMMA1, CPU1_DIMM_A1, CPU0_A0
        _CPU + r" DIMM ?" + _SLOT,  # PROC 1 DIMM 12
        _CPU + r" " + _CHANNEL + r"(?: ?/?(?:D|DIMM) ?" + _SLOT + r")?",  # P0 CHANNEL A, CPU0_C0D1, CPU0 CH0/D1
        _CPU + r" NODE ?(?P<node>\d{1,2}) " + _CHANNEL + r" DIMM ?" + _SLOT,  # P0_Node0_Channel0_Dimm0
        r"NODE ?(?P<node>\d{1,2}) " + _CHANNEL + r" DIMM ?" + _SLOT,  # NODE 0 CHANNEL 4 DIMM 1
        r"(?:DIMM|DDR\d) ?(?P<letter>[A-Z])" + _SLOT + r"?",  # DIMM_A1, DIMMA1, DDR5_A1
        _CHANNEL + r"(?: DIMM ?" + _SLOT + r")?",  # CHANNEL A DIMM0
    )
)
# Dell numbers its slots per processor: A1, A2, ... for the first, B1, B2, ... for the second. The number is no channel.
_DELL = re.compile(r"(?P<letter>[A-D])" + _SLOT)
_DESIGNATION = re.compile(r"(?:SP\d )?(?:P|CPU|PROC|PROCESSOR|SOCKET) ?(?:SP\d )?(?P<socket>\d{1,2})")


@dataclass(frozen=True)
class _Label:
    """What one label says: the number of the socket as printed, the channel as printed, and the place within it."""

    socket: int | None
    node: int | None
    channel: str | None
    slot: str | None


_SILENT = _Label(None, None, None, None)


def place(raw: list[Slot], processors: int, maker: str | None) -> tuple[tuple[Slot, ...], tuple[str, ...]]:
    """Return the slots with socket, channel and channel_label derived from their locators, and notes.

    Nothing is guessed: a set of labels that gives two slots one place is not used; labels that contradict each other
    give None; whether a board counts its sockets from 0 or from 1 must show in the labels. Where no label names a
    socket and the board has one, each slot belongs to it.
    """
    notes: list[str] = []
    dell = bool(maker) and str(maker).lower().startswith("dell")
    by_locator = [parse_label(slot.locator, dell) for slot in raw]
    by_bank = [parse_label(slot.bank_locator, False) for slot in raw]
    locators_differ = _distinct(by_locator, by_bank, [slot.bank_locator for slot in raw])
    banks_differ = _distinct(by_bank, by_locator, [slot.locator for slot in raw])
    if not locators_differ:
        notes.append("locators repeat and do not tell where a slot is")
        by_locator = [_SILENT] * len(raw)
    if not banks_differ:
        notes.append("bank locators repeat and do not tell where a slot is")
        by_bank = [_SILENT] * len(raw)

    sockets: list[int | None] = []
    contradicted = False
    silent = not any(label.socket is not None for label in by_locator + by_bank)
    for first, second in zip(
        socket_indices([label.socket for label in by_locator], processors),
        socket_indices([label.socket for label in by_bank], processors),
    ):
        if first is not None and second is not None and first != second:
            contradicted = True
            sockets.append(None)
        elif silent and processors == 1:
            sockets.append(0)
        else:
            sockets.append(second if first is None else first)
    if contradicted:
        notes.append("locators and bank locators name different sockets")

    channels = _channels(sockets, by_locator, by_bank, notes)
    return (
        tuple(
            replace(slot, socket=socket, channel=channel, channel_label=label)
            for slot, socket, (channel, label) in zip(raw, sockets, channels)
        ),
        tuple(notes),
    )


def parse_label(text: str | None, dell: bool) -> _Label:
    """Return what a locator or bank locator says; a label of no known form says nothing."""
    label = re.sub(r"[\s_-]+", " ", text or "").strip().upper()
    if dell:
        match = _DELL.fullmatch(label)
        if match:
            return _Label(ord(match["letter"]) - ord("A"), None, None, match["slot"])
    for form in _FORMS:
        match = form.fullmatch(label)
        if match:
            found = match.groupdict()
            socket, node = found.get("socket"), found.get("node")
            channel = found.get("letter") or found.get("number")
            return _Label(
                None if socket is None else int(socket), None if node is None else int(node), channel, found.get("slot")
            )
    return _SILENT


def socket_indices(numbers: list[int | None], processors: int) -> list[int | None]:
    """Return printed socket numbers as indices from 0; None where the base or the number cannot be right.

    A 0 among them shows that the board counts from 0. Without one it counts from 1, unless only 1 is there and the
    board has more sockets. An index of a socket that the board does not have is no index.
    """
    known = {number for number in numbers if number is not None}
    if not known:
        return [None] * len(numbers)
    if 0 in known:
        base = 0
    elif 1 in known and (len(known) > 1 or processors <= 1):
        base = 1
    else:
        return [None] * len(numbers)
    limit = processors or len(known)
    return [None if number is None or number - base >= limit else number - base for number in numbers]


def processor_sockets(designations: list[str | None]) -> list[int | None]:
    """Return the socket index of each processor from its designation; a single one is socket 0."""
    if len(designations) == 1:
        return [0]
    numbers: list[int | None] = []
    for text in designations:
        match = _DESIGNATION.fullmatch(re.sub(r"[\s_-]+", " ", text or "").strip().upper())
        numbers.append(int(match["socket"]) if match else None)
    known = [number for number in numbers if number is not None]
    if len(set(known)) != len(known):
        return [None] * len(numbers)
    return socket_indices(numbers, len(designations))


def _distinct(labels: list[_Label], others: list[_Label], texts: list[str | None]) -> bool:
    """Return whether no two labels that say something name one place.

    What a label does not say, the other one of its slot stands in for: its socket, and its text for the slot.
    """
    seen = set()
    for label, other, text in zip(labels, others, texts):
        if label == _SILENT:
            continue
        socket = other.socket if label.socket is None else label.socket
        key = (socket, label.node, label.channel, f"other {text}" if label.slot is None else label.slot)
        if key in seen:
            return False
        seen.add(key)
    return True


def _channels(
    sockets: list[int | None], by_locator: list[_Label], by_bank: list[_Label], notes: list[str]
) -> list[tuple[int | None, str | None]]:
    """Return channel index and label of each slot: the locator's where it tells, else the bank locator's."""
    found: list[tuple[int | None, str | None]] = [(None, None)] * len(sockets)
    members: dict[int | None, list[int]] = {}
    for position, socket in enumerate(sockets):
        members.setdefault(socket, []).append(position)
    for positions in members.values():
        pairs = {
            (by_locator[at].channel, (by_bank[at].node, by_bank[at].channel))
            for at in positions
            if by_locator[at].channel is not None and by_bank[at].channel is not None
        }
        agree = len({pair[0] for pair in pairs}) == len(pairs) == len({pair[1] for pair in pairs})
        if not agree:
            notes.append("locators and bank locators group the slots into different channels")
            continue
        # Channel numbers that start again in each node do not tell channels of a socket apart.
        nodes = {by_bank[at].node for at in positions}
        for at in positions:
            if by_locator[at].channel is not None:
                found[at] = (_channel_number(by_locator[at].channel), by_locator[at].channel)
            elif by_bank[at].channel is not None and len(nodes) == 1:
                found[at] = (_channel_number(by_bank[at].channel), by_bank[at].channel)
    return _from_zero(sockets, found)


def _from_zero(
    sockets: list[int | None], channels: list[tuple[int | None, str | None]]
) -> list[tuple[int | None, str | None]]:
    """Return the channels with the index counted from 0 in each socket.

    Boards letter the second socket's channels A, B, ... again, or go on where the first socket stopped (A to L, then M
    to X). In the second case the offset is certain only where both list the same number of channels, without a gap.
    """
    sets: dict[int, set[int]] = {}
    for socket, (index, _label) in zip(sockets, channels):
        if socket is not None and index is not None:
            sets.setdefault(socket, set()).add(index)
    offsets: dict[int, int | None] = {}
    for socket in sorted(sets):
        own, before = sets[socket], sets.get(socket - 1)
        if before is None or min(own) <= max(before):
            offsets[socket] = 0
        elif 1 < len(own) == max(own) - max(before) and own == {index + len(own) for index in before}:
            offsets[socket] = min(own)
        else:
            offsets[socket] = None
    shifted: list[tuple[int | None, str | None]] = []
    for socket, (index, label) in zip(sockets, channels):
        offset = offsets.get(socket, 0) if socket is not None else 0
        shifted.append((None if index is None or offset is None else index - offset, label))
    return shifted


def _channel_number(channel: str | None) -> int | None:
    if channel is None:
        return None
    return int(channel) if channel.isdigit() else ord(channel) - ord("A")


# --- Structures ---------------------------------------------------------------------------------------------------


def _required(item: Structure, length: int, name: str) -> Structure:
    if len(item.data) < length:
        raise ValueError(
            f"SMBIOS table: {name} structure at offset 0x{item.offset:x} has length {len(item.data)}, "
            f"at least {length} expected"
        )
    return item


def _array(item: Structure) -> MemoryArray:
    """Return a type 16 structure (DSP0134 section 7.17)."""
    _required(item, 0x0F, "memory array")
    capacity = item.number(0x07, 4)
    maximum = None if capacity == 0x80000000 or capacity is None else capacity * KIB
    if capacity == 0x80000000:
        maximum = item.number(0x0F, 8)
    return MemoryArray(
        handle=item.handle,
        location=ARRAY_LOCATIONS.get(item.data[0x04]),
        use=ARRAY_USES.get(item.data[0x05]),
        error_correction=ERROR_CORRECTIONS.get(item.data[0x06]),
        maximum_bytes=maximum or None,
        slots=item.number(0x0D, 2),
    )


def _slot(item: Structure) -> Slot:
    """Return a type 17 structure (DSP0134 section 7.18), without its place."""
    _required(item, 0x15, "memory device")
    size = module_size(item.number(0x0C, 2), item.number(0x1C, 4))
    populated = None if size is None else size > 0
    slot = Slot(
        handle=item.handle,
        array_handle=item.number(0x04, 2),
        locator=_meaning(item.text(0x10)),
        bank_locator=_meaning(item.text(0x11)),
        socket=None,
        channel=None,
        channel_label=None,
        populated=populated,
        size_bytes=size,
        form_factor=FORM_FACTORS.get(item.data[0x0E]),
        type=None,
        type_detail=(),
        technology=None,
        rated_mts=None,
        configured_mts=None,
        rank=None,
        data_width_bits=None,
        total_width_bits=None,
        ecc=None,
        manufacturer=None,
        manufacturer_jedec=None,
        part_number=None,
        minimum_mv=None,
        maximum_mv=None,
        configured_mv=None,
        volatile_bytes=None,
        non_volatile_bytes=None,
        serial_number=None,
        asset_tag=None,
    )
    if populated is False:
        # What firmware leaves in the other fields of an empty slot describes no module.
        return slot
    total, data = _known(item.number(0x08, 2), 0xFFFF), _known(item.number(0x0A, 2), 0xFFFF)
    details = item.number(0x13, 2) or 0
    return replace(
        slot,
        type=MEMORY_TYPES.get(item.data[0x12]),
        type_detail=tuple(name for bit, name in TYPE_DETAILS if details >> bit & 1),
        technology=TECHNOLOGIES.get(item.number(0x28, 1) or 0),
        rated_mts=transfer_rate(item.number(0x15, 2), item.number(0x54, 4)),
        configured_mts=transfer_rate(item.number(0x20, 2), item.number(0x58, 4)),
        rank=(item.number(0x1B, 1) or 0) & 0x0F or None,
        data_width_bits=data,
        total_width_bits=total,
        ecc=total > data if total and data and total >= data else None,
        manufacturer=_meaning(item.text(0x17)),
        manufacturer_jedec=_jedec(item.number(0x2C, 2)),
        part_number=_meaning(item.text(0x1A)),
        minimum_mv=item.number(0x22, 2) or None,
        maximum_mv=item.number(0x24, 2) or None,
        configured_mv=item.number(0x26, 2) or None,
        non_volatile_bytes=_known(item.number(0x34, 8), 0xFFFFFFFFFFFFFFFF),
        volatile_bytes=_known(item.number(0x3C, 8), 0xFFFFFFFFFFFFFFFF),
        serial_number=_meaning(item.text(0x18)),
        asset_tag=_meaning(item.text(0x19)),
    )


def _processor(item: Structure, socket: int | None) -> Processor:
    """Return a type 4 structure (DSP0134 section 7.5)."""
    status = item.number(0x18, 1)
    populated = None if status is None else bool(status & 0x40)
    processor = Processor(
        handle=item.handle,
        socket=socket,
        designation=_meaning(item.text(0x04)),
        populated=populated,
        status=None,
        manufacturer=None,
        version=None,
        socket_type=_meaning(item.text(0x32)) or SOCKET_TYPES.get(item.number(0x19, 1) or 0),
        cores=None,
        cores_enabled=None,
        threads=None,
        maximum_mhz=None,
        boot_mhz=None,
    )
    if not populated:
        return processor
    return replace(
        processor,
        status=PROCESSOR_STATUS.get((status or 0) & 0x07),
        manufacturer=_meaning(item.text(0x07)),
        version=_meaning(item.text(0x10)),
        cores=_count(item, 0x23, 0x2A),
        cores_enabled=_count(item, 0x24, 0x2C),
        threads=_count(item, 0x25, 0x2E),
        maximum_mhz=item.number(0x14, 2) or None,
        boot_mhz=item.number(0x16, 2) or None,
    )


def _count(item: Structure, at: int, wide: int) -> int | None:
    """Return a core or thread count: one byte, or the word at `wide` where the byte is 0xFF; 0 is unknown."""
    count = item.number(at, 1)
    if count == 0xFF:
        # Structures before 3.0 have no word, and 255 there means 255 or more.
        count = _known(item.number(wide, 2), 0xFFFF)
    return count or None


def _jedec(code: int | None) -> str | None:
    """Return a JEDEC JEP-106 code as "bank 1, 0xCE"; the low byte holds the bank less one, with parity in bit 7."""
    if not code:
        return None
    return f"bank {(code & 0x7F) + 1}, 0x{code >> 8:02X}"


def _known(value: int | None, unknown: int) -> int | None:
    return None if value == unknown else value


def _meaning(text: str | None) -> str | None:
    """Return the text without blanks around it, or None where it is a placeholder."""
    if text is None:
        return None
    text = text.strip()
    return None if text.lower() in PLACEHOLDERS or not text.strip(".?") else text


_DOTTED = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))


def _printable(text: bytes) -> str:
    return text.translate(_DOTTED).decode("ascii")


def _entry_length(data: bytes, at: int, shortest: int, longest: int) -> int:
    length = data[at] if len(data) > at else 0
    if not shortest <= length <= longest or length > len(data):
        raise ValueError(
            f"SMBIOS entry point: length {length} at offset 0x{at:x} with {len(data)} bytes there, "
            f"{shortest} to {longest} expected"
        )
    return length


def _check_sum(data: bytes, start: int, length: int, name: str) -> None:
    total = sum(data[start : start + length]) & 0xFF
    if total:
        raise ValueError(f"SMBIOS entry point: the bytes of {name} at offset 0x{start:x} sum to {total}, 0 expected")


def _read_bounded(path: str, limit: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} holds more than {limit} bytes, which no SMBIOS table does")
    return data
