# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bytes of the lab's memory tables, against the specification, our reader and dmidecode."""

from __future__ import annotations

import struct
from pathlib import Path

import dmidecode_oracle
import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _smbios
from hypothesis import given
from hypothesis import strategies as st

from lab import smbios


def entry_point(table: bytes) -> bytes:
    """Return a 64-bit entry point for a table (DSP0134 3.7, clause 5.2.2)."""
    area = struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 3, 0, 1, 0, len(table), 0x20)
    return area[:5] + bytes([-sum(area) % 256]) + area[6:]


def whole(dimms: list[smbios.Dimm]) -> bytes:
    """Return a table that ends as the specification wants."""
    return b"".join(smbios.tables(dimms)) + smbios.structure(127, 0xFEFF, b"", [])


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        pytest.param(0x00, "B", 17, id="type"),
        pytest.param(0x01, "B", 0x5C, id="length-of-3.3"),
        pytest.param(0x04, "H", 0x1001, id="array-of-its-socket"),
        pytest.param(0x08, "H", 80, id="total-width"),
        pytest.param(0x0A, "H", 64, id="data-width"),
        pytest.param(0x0C, "H", 0x7FFF, id="size-is-extended"),
        pytest.param(0x0E, "B", 0x09, id="form-dimm"),
        pytest.param(0x12, "B", 0x22, id="ddr5"),
        pytest.param(0x15, "H", 5600, id="rated"),
        pytest.param(0x1C, "I", 65536, id="extended-size-mib"),
        pytest.param(0x20, "H", 4800, id="configured"),
        pytest.param(0x28, "B", 3, id="dram"),
        pytest.param(0x3C, "Q", 64 << 30, id="volatile-bytes"),
    ],
)
def test_device_fields_lie_where_the_specification_has_them(at, form, value):
    device = smbios.memory_device(smbios.two_socket_board()[6], 0x2006)
    assert struct.unpack_from(f"<{form}", device, at)[0] == value


def test_device_strings():
    device = smbios.memory_device(smbios.two_socket_board()[11], 0x200B)
    strings = device[device[1] :].split(b"\0")
    assert strings[:2] == [b"DIMM 0", b"P1 CHANNEL F"]
    assert device.endswith(b"\0\0")


def test_our_reader_finds_twelve_dimms_on_two_sockets():
    table = whole(smbios.two_socket_board())
    found = _smbios.decode(entry_point(table), table)
    assert [(slot.socket, slot.channel) for slot in found.slots] == [
        (socket, channel) for socket in (0, 1) for channel in range(6)
    ]
    assert {(slot.size_bytes, slot.type, slot.rated_mts, slot.configured_mts, slot.ecc) for slot in found.slots} == {
        (64 << 30, "DDR5", 5600, 4800, True)
    }
    assert len(found.arrays) == 2


def test_dmidecode_finds_the_same(tmp_path: Path):
    table = whole(smbios.two_socket_board())
    blocks = dmidecode_oracle.structures(entry_point(table), table, tmp_path)
    devices = [fields for kind, _, fields in blocks if kind == 17]
    assert len(devices) == 12
    assert devices[0] == {
        **devices[0],
        "Array Handle": "0x1000",
        "Total Width": "80 bits",
        "Data Width": "64 bits",
        "Size": "64 GB",
        "Bank Locator": "P0 CHANNEL A",
        "Type": "DDR5",
        "Type Detail": "Synchronous Registered (Buffered)",
        "Speed": "5600 MT/s",
        "Configured Memory Speed": "4800 MT/s",
        "Rank": "2",
        "Volatile Size": "64 GB",
    }
    arrays = [fields for kind, _, fields in blocks if kind == 16]
    assert [array["Maximum Capacity"] for array in arrays] == ["1536 GB", "1536 GB"]
    assert [array["Number Of Devices"] for array in arrays] == ["6", "6"]


@given(
    st.lists(
        st.builds(
            smbios.Dimm,
            locator=st.from_regex(r"DIMM [A-Z][0-9]", fullmatch=True),
            bank=st.just("P0 CHANNEL A"),
            size_gib=st.sampled_from([0, 1, 16, 31, 32, 64, 96, 256, 1024]),
            rated_mts=st.integers(1, 0xFFFE),
            configured_mts=st.integers(1, 0xFFFE),
            rank=st.integers(1, 15),
        ),
        min_size=1,
        max_size=24,
    )
)
def test_any_board_reads_back(dimms):
    table = whole(dimms)
    slots = _smbios.decode(entry_point(table), table).slots
    for dimm, slot in zip(dimms, slots, strict=True):
        assert slot.populated == (dimm.size_gib > 0)
        if dimm.size_gib:
            assert slot.size_bytes == dimm.size_gib << 30
            assert (slot.rated_mts, slot.configured_mts, slot.rank) == (dimm.rated_mts, dimm.configured_mts, dimm.rank)
