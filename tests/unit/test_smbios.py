# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The SMBIOS parser, on tables built to the specification, on hostile ones, and beside dmidecode."""

from __future__ import annotations

import dataclasses
import struct
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dmidecode_oracle as oracle
import pytest
import smbios_builder as build
from ansible_collections.cpullm.epyc.plugins.module_utils import _smbios
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

MIB = 1 << 20
GIB = 1 << 30
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def entry_for(board: str, table: bytes) -> bytes:
    return build.entry_point_2(table, build.count(table)) if board == "unknown_4" else build.entry_point_3(table)


BOARDS = {
    name: (entry_for(name, table), table)
    for name, table in (
        ("single_socket_12", build.single_socket_12()),
        ("two_socket_24", build.two_socket_24()),
        ("unequal_24", build.unequal_24()),
        ("unknown_4", build.unknown_4()),
    )
}


def decode(*devices: build.Device, **kwargs: Any) -> _smbios.Inventory:
    table = build.table(devices, **kwargs)
    return _smbios.decode(build.entry_point_3(table), table)


def one(item: build.Device) -> _smbios.Slot:
    (slot,) = decode(item).slots
    return slot


# --- Entry points -------------------------------------------------------------------------------------------------


def resummed(entry: bytes) -> bytes:
    """Return a 2.x entry point whose outer sum is right again."""
    return build.summed(entry[:4] + b"\0" + entry[5:], 4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(build.entry_point_3(bytes(100), minor=7), _smbios.EntryPoint("_SM3_", 3, 7, 100, None), id="3.7"),
        pytest.param(build.entry_point_2(bytes(100), 9, minor=8), _smbios.EntryPoint("_SM_", 2, 8, 100, 9), id="2.8"),
        pytest.param(
            build.entry_point_2(bytes(100), 9, minor=8)[0x10:], _smbios.EntryPoint("_DMI_", 2, 8, 100, 9), id="bare-dmi"
        ),
    ],
)
def test_entry_point(data: bytes, expected: _smbios.EntryPoint) -> None:
    assert _smbios.parse_entry_point(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", r"anchor b'' at offset 0x0, _SM3_, _SM_ or _DMI_ expected", id="empty"),
        pytest.param(b"_SM4_" + bytes(27), r"anchor b'_SM4_'", id="unknown-anchor"),
        pytest.param(build.entry_point_3(b"x")[:20], r"length 24 at offset 0x6 with 20 bytes there", id="3.x-cut"),
        pytest.param(build.entry_point_2(b"x", 1)[:20], r"length 31 at offset 0x5 with 20 bytes", id="2.x-cut"),
        pytest.param(b"_SM3_\0\x05" + bytes(20), r"length 5 at offset 0x6", id="3.x-short-length"),
        pytest.param(
            build.entry_point_3(b"x")[:-1] + b"\x01", r"bytes of _SM3_ at offset 0x0 sum to 1, 0 expected", id="3.x-sum"
        ),
        pytest.param(
            build.entry_point_2(b"x", 1)[:8] + b"\x07" + build.entry_point_2(b"x", 1)[9:],
            r"bytes of _SM_ at offset 0x0 sum to",
            id="2.x-sum",
        ),
        pytest.param(
            resummed(build.entry_point_2(b"x", 1)[:0x1C] + b"\x09\0\x28"),
            r"bytes of _DMI_ at offset 0x10 sum to 8, 0 expected",
            id="2.x-inner-sum",
        ),
        pytest.param(
            resummed(build.entry_point_2(b"x", 1)[:0x10] + b"_XXX_" + build.entry_point_2(b"x", 1)[0x15:]),
            r"b'_XXX_' at offset 0x10",
            id="2.x-inner-anchor",
        ),
        pytest.param(b"_DMI_" + bytes(5), r"10 bytes, 15 expected", id="bare-dmi-cut"),
    ],
)
def test_entry_point_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _smbios.parse_entry_point(data)


# --- Tables -------------------------------------------------------------------------------------------------------

END = build.structure(127, 0xFEFF, b"")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        pytest.param(
            b"\x11\x03\0\0\0\0" + END, r"structure at offset 0x0 has length 3, at least 4 expected", id="header-short"
        ),
        pytest.param(
            build.structure(2, 1, b"") + b"\x11\xff\0\0\0\0",
            r"structure at offset 0x6 has length 255 and ends past the table's 12 bytes",
            id="past-the-end",
        ),
        pytest.param(
            b"\x01\x04\0\0name\0", r"the strings of the structure at offset 0x0 do not end", id="strings-do-not-end"
        ),
        pytest.param(
            build.structure(17, 1, bytes(10)) + END,
            r"memory device structure at offset 0x0 has length 14, at least 21 expected",
            id="slot-short",
        ),
        pytest.param(
            build.structure(16, 1, bytes(4)) + END,
            r"memory array structure at offset 0x0 has length 8, at least 15 expected",
            id="array-short",
        ),
        pytest.param(
            build.structure(4, 1, b"\x01\x03") + END,
            r"processor structure at offset 0x0 has length 6, at least 26 expected",
            id="processor-short",
        ),
        pytest.param(bytes(_smbios.MAX_TABLE_BYTES + 1), r"1048577 bytes, at most 1048576 expected", id="too-large"),
    ],
)
def test_table_refused(table: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _smbios.decode(build.entry_point_3(table), table)


def test_table_cut_off() -> None:
    entry, table = BOARDS["unknown_4"]
    with pytest.raises(ValueError, match=f"{len(table) - 1} bytes, but the entry point announces {len(table)}"):
        _smbios.decode(entry, table[:-1])


def test_what_follows_the_end_marker_is_not_read() -> None:
    table = build.single_socket_12()
    longer = table + b"\xff" * 64
    assert _smbios.decode(build.entry_point_3(longer), longer) == _smbios.decode(build.entry_point_3(table), table)


def test_a_missing_end_marker_is_noted() -> None:
    table = build.single_socket_12()[: -len(END)]
    assert _smbios.decode(build.entry_point_3(table), table).notes == ()
    found = _smbios.decode(build.entry_point_3(table + b"\x01"), table + b"\x01")
    assert found.notes == (f"the SMBIOS table ends at offset 0x{len(table):x} without its end marker",)
    assert len(found.slots) == 12


def test_a_wrong_count_is_noted() -> None:
    table = build.unknown_4()
    found = _smbios.decode(build.entry_point_2(table, build.count(table) + 3), table)
    assert found.notes == ("the SMBIOS entry point announces 12 structures, 9 are there",)


def test_a_table_without_slots_is_noted() -> None:
    assert decode().notes == ("the SMBIOS table describes no memory slot",)


def test_a_string_number_past_the_last_is_no_string() -> None:
    table = build.single_socket_12().replace(struct.pack("<BB", 1, 2), struct.pack("<BB", 1, 99), 1)
    found = _smbios.decode(build.entry_point_3(table), table)
    assert [slot.bank_locator for slot in found.slots].count(None) <= 1


def test_unprintable_characters_become_dots() -> None:
    table = build.table([build.Device(part="PART-X")]).replace(b"PART-X", b"PA\x07\xff-X")
    (slot,) = _smbios.decode(build.entry_point_3(table), table).slots
    assert slot.part_number == "PA..-X"


# --- Fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "extended", "expected"),
    [
        pytest.param(0, 0, 0, id="empty"),
        pytest.param(0xFFFF, 0, None, id="unknown"),
        pytest.param(16384, 0, 16 * GIB, id="16-GiB-in-MiB"),
        pytest.param(0x7FFE, 0, 32766 * MIB, id="largest-in-MiB"),
        pytest.param(0x8000 | 512, 0, 512 << 10, id="512-KiB"),
        pytest.param(0x8000, 0, 0, id="no-KiB"),
        pytest.param(0x7FFF, 65536, 64 * GIB, id="64-GiB-extended"),
        pytest.param(0x7FFF, 0x7FFFFFFF, 0x7FFFFFFF * MIB, id="largest-extended"),
        pytest.param(0x7FFF, 0x80000000 | 65536, 64 * GIB, id="extended-reserved-bit"),
        pytest.param(0x7FFF, 0, None, id="extended-unknown"),
        pytest.param(0x7FFF, None, 32767 * MIB, id="before-2.7"),
        pytest.param(16384, 99, 16 * GIB, id="extended-not-referred-to"),
    ],
)
def test_module_size(size: int, extended: int | None, expected: int | None) -> None:
    assert _smbios.module_size(size, extended) == expected


@pytest.mark.parametrize(
    ("speed", "extended", "expected"),
    [
        pytest.param(4800, 0, 4800, id="4800"),
        pytest.param(0, 0, None, id="unknown"),
        pytest.param(None, None, None, id="no-field"),
        pytest.param(0xFFFE, 0, 65534, id="largest"),
        pytest.param(0xFFFF, 70000, 70000, id="extended"),
        pytest.param(0xFFFF, 0x80000000 | 70000, 70000, id="extended-reserved-bit"),
        pytest.param(0xFFFF, 0, None, id="extended-unknown"),
        pytest.param(0xFFFF, None, None, id="extended-before-3.3"),
        pytest.param(5600, 99, 5600, id="extended-not-referred-to"),
    ],
)
def test_transfer_rate(speed: int | None, extended: int | None, expected: int | None) -> None:
    assert _smbios.transfer_rate(speed, extended) == expected


@pytest.mark.parametrize(
    ("total", "data", "expected"),
    [
        pytest.param(80, 64, True, id="ddr5-two-by-eight"),
        pytest.param(72, 64, True, id="72-of-64"),
        pytest.param(64, 64, False, id="none"),
        pytest.param(0xFFFF, 64, None, id="total-unknown"),
        pytest.param(80, 0xFFFF, None, id="data-unknown"),
        pytest.param(64, 72, None, id="total-below-data"),
        pytest.param(0, 0, None, id="zero"),
    ],
)
def test_ecc(total: int, data: int, expected: bool | None) -> None:
    assert one(build.Device(total_width=total, data_width=data)).ecc is expected


@pytest.mark.parametrize("text", ["Unknown", "UNKNOWN ", "Not Specified", "NO DIMM", "", "........", "Undefined"])
def test_placeholders_are_null(text: str) -> None:
    slot = one(build.Device(manufacturer=text, part=text, locator=text, bank=text, serial=text))
    assert (slot.manufacturer, slot.part_number, slot.locator, slot.bank_locator, slot.serial_number) == (None,) * 5


def test_an_empty_slot_describes_no_module() -> None:
    slot = one(build.Device(size=0, locator="DIMM_A1"))
    known = {
        key
        for key, value in asdict(slot).items()
        if value not in (None, ()) and key not in ("handle", "array_handle", "bank_locator")
    }
    assert known == {"locator", "socket", "channel", "channel_label", "populated", "size_bytes", "form_factor"}
    assert slot.populated is False
    assert slot.size_bytes == 0


def test_an_unknown_size_leaves_open_whether_a_module_is_there() -> None:
    slot = one(build.Device(size=0xFFFF))
    assert (slot.populated, slot.size_bytes, slot.type) == (None, None, "DDR5")


@pytest.mark.parametrize("length", [0x15, 0x17, 0x1B, 0x1C, 0x22, 0x28, 0x54, 0x5C, 0x64])
def test_fields_that_an_older_structure_lacks_are_null(length: int) -> None:
    slot = one(build.Device(length=length, size=16384, speed=0xFFFF, extended_speed=7000))
    assert slot.size_bytes == 16 * GIB
    assert slot.manufacturer == ("Samsung" if length >= 0x18 else None)
    assert slot.rank == (2 if length >= 0x1C else None)
    assert slot.configured_mts == (4800 if length >= 0x22 else None)
    assert slot.configured_mv == (1100 if length >= 0x28 else None)
    assert slot.volatile_bytes == (64 * GIB if length >= 0x44 else None)
    assert slot.rated_mts == (7000 if length >= 0x58 else None)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        pytest.param(build.Cpu(), (16, 16, 32), id="byte"),
        pytest.param(build.Cpu(cores=192, cores_enabled=192, threads=384), (192, 192, 384), id="word-threads"),
        pytest.param(build.Cpu(cores=256, cores_enabled=255, threads=512), (256, 255, 512), id="words"),
        pytest.param(build.Cpu(cores=300, length=0x28), (None, 16, 32), id="255-without-word"),
        pytest.param(build.Cpu(cores=0, cores_enabled=0, threads=0), (None, None, None), id="unknown"),
        pytest.param(build.Cpu(length=0x20), (None, None, None), id="before-2.5"),
    ],
)
def test_core_counts(item: build.Cpu, expected: tuple[int | None, ...]) -> None:
    (found,) = decode(cpus=(item,)).processors
    assert (found.cores, found.cores_enabled, found.threads) == expected


def test_only_central_processors_are_sockets() -> None:
    found = decode(cpus=(build.Cpu("CPU0"), build.Cpu("GPU", kind=6)))
    assert [item.designation for item in found.processors] == ["CPU0"]
    assert found.processors[0].socket == 0


# --- Where a slot is ----------------------------------------------------------------------------------------------


def places(*labels: tuple[str, str], processors: int = 2, maker: str = "Lab") -> list[tuple[Any, Any, Any]]:
    devices = [build.Device(locator=locator, bank=bank) for locator, bank in labels]
    cpus = [build.Cpu(f"P{number}") for number in range(processors)]
    return [(slot.socket, slot.channel, slot.channel_label) for slot in decode(*devices, cpus=cpus, maker=maker).slots]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param(
            [("DIMM_P0_A0", "BANK 0"), ("DIMM_P0_A1", "BANK 1"), ("DIMM_P0_B0", "BANK 0"), ("DIMM_P1_A0", "BANK 0")],
            [(0, 0, "A"), (0, 0, "A"), (0, 1, "B"), (1, 0, "A")],
            id="gigabyte",
        ),
        pytest.param(
            [
                ("P1-DIMMA1", "P0_Node0_Channel0_Dimm0"),
                ("P1-DIMMB1", "P0_Node0_Channel1_Dimm0"),
                ("P2-DIMMA1", "P1_Node1_Channel0_Dimm0"),
                ("P2-DIMMB1", "P1_Node1_Channel1_Dimm0"),
            ],
            [(0, 0, "A"), (0, 1, "B"), (1, 0, "A"), (1, 1, "B")],
            id="supermicro-two-sockets",
        ),
        pytest.param(
            [("DIMMG1", "P0_Node1_Channel2_Dimm0"), ("DIMMC1", "P0_Node0_Channel2_Dimm0")],
            [(0, 6, "G"), (0, 2, "C")],
            id="supermicro-channels-per-node",
        ),
        pytest.param(
            [
                ("P1-DIMMA1", "P0_Node0_Channel0_Dimm0"),
                ("P1-DIMMB1", "P0_Node0_Channel0_Dimm0"),
                ("P2-DIMMA1", "P0_Node0_Channel0_Dimm0"),
            ],
            [(0, 0, "A"), (0, 1, "B"), (1, 0, "A")],
            id="bank-locators-all-alike",
        ),
        pytest.param(
            [
                ("DIMM 0", "P0 CHANNEL A"),
                ("DIMM 1", "P0 CHANNEL A"),
                ("DIMM 0", "P0 CHANNEL L"),
                ("DIMM 0", "P1 CHANNEL B"),
            ],
            [(0, 0, "A"), (0, 0, "A"), (0, 11, "L"), (1, 1, "B")],
            id="amd-reference",
        ),
        pytest.param(
            [("DIMM A1", "P0 CHANNEL A"), ("DIMM A1", "P1 CHANNEL A")],
            [(0, 0, "A"), (1, 0, "A")],
            id="locator-repeats-per-socket",
        ),
        pytest.param(
            [("CPU1_DIMM_A1", "NODE 1"), ("CPU1_DIMM_B1", "NODE 1"), ("CPU2_DIMM_A1", "NODE 2")],
            [(0, 0, "A"), (0, 1, "B"), (1, 0, "A")],
            id="counted-from-1",
        ),
        pytest.param(
            [("CPU0_DIMM_A", "BANK 0"), ("CPU0_DIMM_L", "BANK 11"), ("CPU1_DIMM_A", "BANK 0")],
            [(0, 0, "A"), (0, 11, "L"), (1, 0, "A")],
            id="counted-from-0-no-slot",
        ),
        pytest.param(
            [("PROC 1 DIMM 1", ""), ("PROC 1 DIMM 12", ""), ("PROC 2 DIMM 1", "")],
            [(0, None, None), (0, None, None), (1, None, None)],
            id="hpe-numbers-are-no-channels",
        ),
        pytest.param(
            [("CPU0_C0D0", ""), ("CPU0_C10D1", ""), ("CPU1_C0D0", "")],
            [(0, 0, "0"), (0, 10, "10"), (1, 0, "0")],
            id="numbered-channels",
        ),
        pytest.param(
            [("CPU0 CH7/D0", ""), ("CPU1 CH7/D1", "")], [(0, 7, "7"), (1, 7, "7")], id="numbered-channels-slash"
        ),
        pytest.param(
            [("DIMM_A1", "NODE 0 CHANNEL 0 DIMM 0"), ("DIMM_B1", "NODE 0 CHANNEL 1 DIMM 0")],
            [(None, 0, "A"), (None, 1, "B")],
            id="node-is-no-socket",
        ),
        pytest.param(
            [("DIMM 1", "NODE 0 CHANNEL 0 DIMM 0"), ("DIMM 2", "NODE 1 CHANNEL 0 DIMM 0")],
            [(None, None, None), (None, None, None)],
            id="channels-start-again-in-each-node",
        ),
        pytest.param(
            [("CPU1_DIMM_A1", ""), ("CPU1_DIMM_B1", "")],
            [(None, 0, "A"), (None, 1, "B")],
            id="only-1-on-a-two-socket-board",
        ),
        pytest.param([("CPU3_DIMM_A1", "")], [(None, 0, "A")], id="neither-0-nor-1"),
        pytest.param(
            [("P0_DIMM_A1", "P1 CHANNEL A"), ("P1_DIMM_A1", "P0 CHANNEL A")],
            [(None, 0, "A"), (None, 0, "A")],
            id="labels-contradict",
        ),
        pytest.param(
            [
                ("P0_DIMM_A1", "P0 CHANNEL A"),
                ("P0_DIMM_B1", "P0 CHANNEL A"),
                ("P1_DIMM_A1", "P1 CHANNEL A"),
                ("P1_DIMM_A2", "P1 CHANNEL B"),
            ],
            [(0, None, None), (0, None, None), (1, None, None), (1, None, None)],
            id="channels-contradict",
        ),
        pytest.param(
            [("DIMM_P0_A0", ""), ("DIMM_P0_B0", ""), ("DIMM_P1_C0", ""), ("DIMM_P1_D0", "")],
            [(0, 0, "A"), (0, 1, "B"), (1, 0, "C"), (1, 1, "D")],
            id="letters-go-on",
        ),
        pytest.param(
            [("DIMM_P0_A0", ""), ("DIMM_P0_B0", ""), ("DIMM_P1_M0", "")],
            [(0, 0, "A"), (0, 1, "B"), (1, None, "M")],
            id="letters-go-on-with-slots-missing",
        ),
        pytest.param(
            [("DIMM_P0_A0", ""), ("DIMM_P1_B0", "")], [(0, 0, "A"), (1, None, "B")], id="one-channel-each-tells-nothing"
        ),
        pytest.param([("DIMM1", ""), ("DIMM2", "")], [(None, None, None)] * 2, id="numbers-alone"),
        pytest.param([("A1", ""), ("B1", "")], [(None, None, None)] * 2, id="bare-letters-not-dell"),
        pytest.param([("DIMM_A1", ""), ("DIMM_A1", "")], [(None, None, None)] * 2, id="all-alike"),
        pytest.param([("Top - on board", "BANK 0")], [(None, None, None)], id="prose"),
    ],
)
def test_places(labels: list[tuple[str, str]], expected: list[tuple[Any, Any, Any]]) -> None:
    assert places(*labels) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param([("DIMM_A1", ""), ("DIMM_L1", "")], [(0, 0, "A"), (0, 11, "L")], id="letters"),
        pytest.param([("DDR5_A1", ""), ("DDR5_B1", "")], [(0, 0, "A"), (0, 1, "B")], id="asrock-rack"),
        pytest.param([("DIMM 1", ""), ("DIMM 2", "")], [(0, None, None), (0, None, None)], id="numbers"),
        pytest.param([("P1-DIMMA1", ""), ("P1-DIMMB1", "")], [(0, 0, "A"), (0, 1, "B")], id="counted-from-1"),
        pytest.param(
            [("DIMM_P0_A0", ""), ("DIMM_P1_A0", "")], [(0, 0, "A"), (None, 0, "A")], id="slots-of-a-socket-not-listed"
        ),
    ],
)
def test_places_on_a_board_with_one_socket(labels: list[tuple[str, str]], expected: list[tuple[Any, Any, Any]]) -> None:
    assert places(*labels, processors=1) == expected


def test_dell_letters_are_sockets_and_numbers_no_channels() -> None:
    assert places(("A1", ""), ("A2", ""), ("B1", ""), maker="Dell Inc.") == [
        (0, None, None),
        (0, None, None),
        (1, None, None),
    ]


@pytest.mark.parametrize(
    ("designations", "expected"),
    [
        pytest.param(["SP5"], [0], id="one"),
        pytest.param(["P0", "P1"], [0, 1], id="from-0"),
        pytest.param(["CPU1", "CPU2"], [0, 1], id="from-1"),
        pytest.param(["Proc 2", "Proc 1"], [1, 0], id="in-another-order"),
        pytest.param(["CPU 0", "CPU 1"], [0, 1], id="qemu"),
        pytest.param(["SP5", "SP5"], [None, None], id="no-number"),
        pytest.param(["CPU1", "CPU1"], [None, None], id="alike"),
        pytest.param([None, None], [None, None], id="none"),
        pytest.param(["CPU0", "CPU7"], [0, None], id="no-such-socket"),
    ],
)
def test_processor_sockets(designations: list[str | None], expected: list[int | None]) -> None:
    assert _smbios.processor_sockets(designations) == expected


# --- Boards -------------------------------------------------------------------------------------------------------


def test_single_socket_12() -> None:
    found = _smbios.decode(*BOARDS["single_socket_12"])
    assert found.version == "3.7"
    assert found.notes == ()
    assert [(slot.socket, slot.channel) for slot in found.slots] == [(0, channel) for channel in range(12)]
    assert {slot.size_bytes for slot in found.slots} == {64 * GIB}
    assert {(slot.rated_mts, slot.configured_mts, slot.rank, slot.ecc) for slot in found.slots} == {
        (5600, 4800, 2, True)
    }
    assert {(slot.type, slot.part_number) for slot in found.slots} == {("DDR5", "M321R8GA0PB0-CWMKH")}
    (processor,) = found.processors
    assert (processor.socket, processor.socket_type, processor.version) == (0, "SP5", "AMD EPYC 9135 16-Core Processor")
    (array,) = found.arrays
    assert (array.slots, array.error_correction, array.maximum_bytes) == (12, "Multi-bit ECC", 3 << 40)


def test_two_socket_24() -> None:
    found = _smbios.decode(*BOARDS["two_socket_24"])
    assert found.notes == ()
    assert [(slot.socket, slot.channel) for slot in found.slots] == [
        (socket, channel) for socket in range(2) for channel in range(12)
    ]
    assert [slot.channel_label for slot in found.slots[12:14]] == ["M", "N"]
    assert [processor.socket for processor in found.processors] == [0, 1]
    assert [processor.threads for processor in found.processors] == [384, 512]


def test_unequal_24() -> None:
    found = _smbios.decode(*BOARDS["unequal_24"])
    assert [(slot.socket, slot.channel) for slot in found.slots] == [(0, number // 2) for number in range(24)]
    assert [slot.populated for slot in found.slots[:6]] == [True, False, True, False, True, None]
    assert [slot.populated for slot in found.slots[12:]] == [False] * 12
    sizes = [slot.size_bytes for slot in found.slots[:6]]
    assert sizes == [128 * GIB, 0, 16 * GIB, 0, 512 << 10, None]
    assert [slot.rated_mts for slot in found.slots[4:9]] == [70000, None, 5600, 5600, None]
    assert found.slots[7].configured_mts == 66000


def test_unknown_4() -> None:
    found = _smbios.decode(*BOARDS["unknown_4"])
    assert found.version == "2.8"
    said = {
        key
        for slot in found.slots[:2]
        for key, value in asdict(slot).items()
        if value not in (None, ()) and key not in ("handle", "array_handle")
    }
    assert said == set()
    assert [(slot.socket, slot.channel) for slot in found.slots[2:]] == [(None, 0), (None, 0)]
    assert [processor.populated for processor in found.processors] == [True, False]
    assert found.arrays[0].maximum_bytes == 16 * GIB
    assert found.arrays[0].location is None


# --- The fact -----------------------------------------------------------------------------------------------------


def captured(root: Path, board: str) -> str:
    entry, table = BOARDS[board]
    directory = root / "sys/firmware/dmi/tables"
    directory.mkdir(parents=True)
    (directory / "smbios_entry_point").write_bytes(entry)
    (directory / "DMI").write_bytes(table)
    return str(root)


def test_gather(tmp_path: Path) -> None:
    fact = _smbios.gather(captured(tmp_path, "single_socket_12"))
    assert (fact["readable"], fact["reason"], fact["smbios_version"]) == (True, None, "3.7")
    assert len(fact["slots"]) == 12
    assert "serial_number" not in fact["slots"][0]
    assert "asset_tag" not in fact["slots"][0]
    assert "80CE01" not in repr(fact)


def test_gather_with_serial_numbers(tmp_path: Path) -> None:
    fact = _smbios.gather(captured(tmp_path, "single_socket_12"), include_serial=True)
    assert fact["slots"][11]["serial_number"] == "80CE01000000000B"
    assert fact["slots"][11]["asset_tag"] is None


def test_gather_without_tables(tmp_path: Path) -> None:
    fact = _smbios.gather(str(tmp_path))
    assert fact["readable"] is False
    assert "smbios_entry_point does not exist: this host shows no SMBIOS tables" in fact["reason"]
    assert (fact["slots"], fact["arrays"], fact["processors"]) == ([], [], [])


def test_gather_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, _limit: int) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(_smbios, "_read_bounded", refuse)
    fact = _smbios.gather()
    assert fact["readable"] is False
    assert fact["reason"] == f"{_smbios.ENTRY_POINT} is readable by root only: run with become"


def test_gather_a_broken_table(tmp_path: Path) -> None:
    root = captured(tmp_path, "single_socket_12")
    (tmp_path / "sys/firmware/dmi/tables/DMI").write_bytes(b"\x11\x02\0\0\0\0")
    fact = _smbios.gather(root)
    assert fact["readable"] is False
    assert fact["reason"] == "SMBIOS table: structure at offset 0x0 has length 2, at least 4 expected"


def test_gather_a_table_beyond_the_bound(tmp_path: Path) -> None:
    root = captured(tmp_path, "single_socket_12")
    (tmp_path / "sys/firmware/dmi/tables/DMI").write_bytes(bytes(_smbios.MAX_TABLE_BYTES + 1))
    assert "holds more than 1048576 bytes" in _smbios.gather(root)["reason"]


def test_the_read_is_quick(tmp_path: Path) -> None:
    root = captured(tmp_path, "two_socket_24")
    best = min(timed(root) for _round in range(5))
    assert best < 0.15, f"{best * 1000:.1f} ms, 150 ms expected"


def timed(root: str) -> float:
    start = time.process_time()
    _smbios.gather(root)
    return time.process_time() - start


# --- Properties ---------------------------------------------------------------------------------------------------


def only_value_errors(entry: bytes, table: bytes) -> None:
    start = time.process_time()
    try:
        _smbios.decode(entry, table)
    except ValueError as error:
        assert str(error).startswith("SMBIOS ")
    assert time.process_time() - start < 5


@settings(deadline=None)
@given(entry=st.binary(max_size=40), table=st.binary(max_size=400))
def test_random_bytes(entry: bytes, table: bytes) -> None:
    only_value_errors(entry, table)
    only_value_errors(build.entry_point_3(table), table)
    only_value_errors(build.entry_point_2(table, 3), table)


@settings(max_examples=300, deadline=None)
@given(
    board=st.sampled_from(sorted(BOARDS)),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=12),
    cut=st.integers(0, 4000),
)
def test_damaged_tables(board: str, changes: list[tuple[int, int]], cut: int) -> None:
    entry, table = BOARDS[board]
    damaged = bytearray(table[: len(table) - cut % len(table)])
    for at, value in changes:
        damaged[at % len(damaged)] = value
    only_value_errors(entry, bytes(damaged))
    only_value_errors(build.entry_point_3(bytes(damaged)), bytes(damaged))
    only_value_errors(build.entry_point_2(bytes(damaged), 200), bytes(damaged))


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(b"\x11\x04\0\0\0\0" * (MIB // 6), id="smallest-structures"),
        pytest.param(build.structure(2, 1, b"") * (MIB // 6), id="smallest-unread-structures"),
        pytest.param(b"\x01\x04\0\0" + b"x\0" * (MIB // 2 - 8) + b"\0\0", id="many-strings"),
        pytest.param(b"\x11\x15\0\0" + bytes((2,)) * 17 + b"x" * (MIB - 40) + b"\0\0", id="one-long-string"),
        pytest.param(build.device(build.Device(length=0x15), 1, 2) * (MIB // 100), id="many-slots"),
    ],
)
def test_large_hostile_tables_take_bounded_time(table: bytes) -> None:
    only_value_errors(build.entry_point_3(table), table)


# Words with a digit, so that none of them is a placeholder.
TEXTS = st.one_of(
    st.just(""), st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map("7{}".format)
)
DEVICES = st.builds(
    build.Device,
    locator=TEXTS,
    bank=TEXTS,
    size=st.one_of(st.sampled_from([0, 0x7FFF, 0xFFFF, 0x8000]), st.integers(0, 0xFFFF)),
    extended_size=st.integers(0, 0x7FFFFFFF),
    total_width=st.sampled_from([0xFFFF, 64, 72, 80, 128]),
    data_width=st.sampled_from([0xFFFF, 32, 64, 128]),
    form_factor=st.integers(1, 0x10),
    kind=st.integers(1, 0x23),
    detail=st.integers(0, 0xFFFF),
    speed=st.one_of(st.just(0xFFFF), st.integers(0, 0xFFFF)),
    manufacturer=TEXTS,
    serial=TEXTS,
    part=TEXTS,
    rank=st.integers(0, 255),
    configured_speed=st.one_of(st.just(0xFFFF), st.integers(0, 0xFFFF)),
    minimum_mv=st.integers(0, 2000),
    maximum_mv=st.integers(0, 2000),
    configured_mv=st.integers(0, 2000),
    technology=st.integers(1, 7),
    jedec=st.integers(0, 0xFFFF),
    non_volatile=st.one_of(st.just(0xFFFFFFFFFFFFFFFF), st.integers(0, 2047).map(lambda mib: mib * MIB)),
    volatile=st.one_of(st.just(0xFFFFFFFFFFFFFFFF), st.integers(0, 2047).map(lambda gib: gib * GIB)),
    extended_speed=st.integers(0, 0x7FFFFFFF),
    extended_configured_speed=st.integers(0, 0x7FFFFFFF),
    length=st.sampled_from([0x15, 0x17, 0x1B, 0x1C, 0x22, 0x28, 0x54, 0x5C, 0x64]),
)


@settings(deadline=None)
@given(st.lists(DEVICES, max_size=6))
def test_round_trip(devices: list[build.Device]) -> None:
    found = decode(*devices)
    assert len(found.slots) == len(devices)
    for slot, device in zip(found.slots, devices):
        extended = device.extended_size if device.length >= 0x20 else None
        size = _smbios.module_size(device.size, extended)
        assert slot.size_bytes == size
        if size == 0:
            continue
        assert slot.total_width_bits == (None if device.total_width == 0xFFFF else device.total_width)
        assert slot.type == _smbios.MEMORY_TYPES.get(device.kind)
        if device.length >= 0x1C:
            assert slot.rank == (device.rank % 16 or None)
            part = device.part.strip()
            assert slot.part_number in (part, None)
        if device.length >= 0x22 and device.configured_speed != 0xFFFF:
            assert slot.configured_mts == (device.configured_speed or None)
        if device.length >= 0x44:
            assert slot.volatile_bytes == (None if device.volatile == 0xFFFFFFFFFFFFFFFF else device.volatile)


# --- dmidecode ----------------------------------------------------------------------------------------------------

NAMES = {"form_factor", "type", "technology", "location", "use", "error_correction"}


def agree(entry: bytes, table: bytes, directory: Path) -> None:
    """Compare each field that both give; dmidecode prints nothing about a module that is not there."""
    found = _smbios.decode(entry, table)
    theirs = oracle.structures(entry, table, directory)
    slots = [oracle.slot(fields) for kind, _handle, fields in theirs if kind == 17]
    handles = [handle for kind, handle, _fields in theirs if kind == 17]
    assert [slot.handle for slot in found.slots] == handles
    for ours, their in zip(map(asdict, found.slots), slots):
        skipped = (
            set() if ours["size_bytes"] != 0 else set(their) - {"locator", "bank_locator", "size_bytes", "form_factor"}
        )
        compare(ours, {key: value for key, value in their.items() if key not in skipped})
    arrays = [oracle.array(fields) for kind, _handle, fields in theirs if kind == 16]
    assert len(arrays) == len(found.arrays)
    for ours, their in zip(map(asdict, found.arrays), arrays):
        compare(ours, their)
    processors = [oracle.processor(fields) for kind, _handle, fields in theirs if kind == 4]
    for ours, their in zip(map(asdict, found.processors), processors):
        # dmidecode 3.4 ends its list of sockets before SP5, and prints an empty socket's fields.
        skipped = {"socket_type"} if their["socket_type"] is None else set()
        if not ours["populated"]:
            skipped = set(their) - {"designation", "populated"}
        compare(ours, {key: value for key, value in their.items() if key not in skipped})


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key, value in theirs.items():
        mine = ours[key].lower() if key in NAMES and ours[key] is not None else ours[key]
        assert mine == value, f"{key} of {ours['handle']:#x}: {mine!r}, dmidecode says {value!r}"


@pytest.mark.parametrize("board", sorted(BOARDS))
def test_dmidecode_agrees_on_boards(board: str, tmp_path: Path) -> None:
    agree(*BOARDS[board], tmp_path)


def test_dmidecode_agrees_on_codes(tmp_path: Path) -> None:
    devices = [build.Device(kind=code) for code in range(1, 0x24)]
    devices += [build.Device(form_factor=code) for code in range(1, 0x11)]
    devices += [build.Device(technology=code) for code in range(1, 8)]
    arrays = [build.Array(location=code) for code in (*range(1, 0x0B), *range(0xA0, 0xA5))]
    arrays += [build.Array(use=code) for code in range(1, 8)]
    arrays += [build.Array(correction=code) for code in range(1, 8)]
    cpus = [build.Cpu(f"CPU{code}", upgrade=code) for code in _smbios.SOCKET_TYPES]
    table = build.table(devices, cpus, arrays)
    agree(build.entry_point_3(table), table, tmp_path)


@settings(
    max_examples=40,
    deadline=None,
    # Each example starts a program, so shrinking would take minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(devices=st.lists(DEVICES, min_size=1, max_size=20))
def test_dmidecode_agrees_on_random_devices(devices: list[build.Device], tmp_path: Path) -> None:
    # dmidecode prints an extended size of 0, and a size of 0 KiB, as sizes; here both say that there is none.
    plain = [
        dataclasses.replace(
            device, extended_size=device.extended_size or 1, size=device.size if device.size != 0x8000 else 0
        )
        for device in devices
    ]
    table = build.table(plain)
    agree(build.entry_point_3(table), table, tmp_path)


# --- Captured machines --------------------------------------------------------------------------------------------

CAPTURED = sorted(path.parents[4].name for path in FIXTURES.glob("*/sys/firmware/dmi/tables/DMI"))


@pytest.mark.parametrize("name", CAPTURED)
def test_lab_vm(name: str) -> None:
    fact = _smbios.gather(str(FIXTURES / name))
    assert fact["readable"], fact["reason"]
    assert fact["notes"] == []
    assert [(slot["socket"], slot["channel"]) for slot in fact["slots"]] == [
        (socket, channel) for socket in range(2) for channel in range(6)
    ]
    assert {(slot["size_bytes"], slot["rated_mts"], slot["configured_mts"], slot["ecc"]) for slot in fact["slots"]} == {
        (64 * GIB, 5600, 4800, True)
    }
    assert [(processor["socket"], processor["designation"]) for processor in fact["processors"]] == [
        (0, "CPU 0"),
        (1, "CPU 1"),
    ]


@pytest.mark.parametrize("name", CAPTURED)
def test_dmidecode_agrees_on_captured_tables(name: str, tmp_path: Path) -> None:
    tables = FIXTURES / name / "sys/firmware/dmi/tables"
    table = (tables / "DMI").read_bytes()
    entry = _smbios.parse_entry_point((tables / "smbios_entry_point").read_bytes())
    # The captured entry point gives the address of the table in memory; a dump has the table at 0x20.
    rebuilt = build.entry_point_2(table, entry.structures or 0) if entry.structures else build.entry_point_3(table)
    agree(rebuilt, table, tmp_path)


def test_captured_tables_name_no_machine() -> None:
    for name in CAPTURED:
        fact = _smbios.gather(str(FIXTURES / name), include_serial=True)
        assert {slot["serial_number"] for slot in fact["slots"]} == {"00000000"}
