# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What dmidecode says about the same tables, as values to compare with the parser's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import smbios_builder

DMIDECODE = shutil.which("dmidecode", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")

SILENT = {"Unknown", "Reserved", "Not Specified", "NO DIMM", "<BAD INDEX>", "<OUT OF SPEC>", "None", "Not Provided", ""}
UNITS = {"bytes": 0, "byte": 0, "kB": 10, "KB": 10, "MB": 20, "GB": 30, "TB": 40, "PB": 50, "EB": 60}
# dmidecode 3.4 follows SMBIOS 3.5, which renamed one technology after it.
RENAMED = {"intel optane dc persistent memory": "intel optane persistent memory", "cxl flexbus 1.0": "cxl add-on card"}


def structures(entry: bytes, table: bytes, directory: Path) -> list[tuple[int, int, dict[str, str]]]:
    """Return (type, handle, fields) of each structure that dmidecode prints from a dump of the two."""
    path = directory / "dump.bin"
    path.write_bytes(smbios_builder.dump(entry, table))
    assert DMIDECODE is not None
    output = subprocess.run(
        [DMIDECODE, "--from-dump", str(path)], check=True, capture_output=True, text=True, env={"LC_ALL": "C"}
    ).stdout
    found = []
    for block in output.split("\n\n"):
        match = re.search(r"^Handle 0x([0-9A-F]{4}), DMI type (\d+), \d+ bytes$", block, re.MULTILINE)
        if match:
            fields = re.findall(r"^\t([^\t:]+): ?(.*)$", block, re.MULTILINE)
            found.append((int(match[2]), int(match[1], 16), dict(fields)))
    return found


def text(value: str | None) -> str | None:
    """Return a string field as the parser gives it."""
    value = (value or "").strip()
    return None if value in SILENT else value


def name(value: str | None) -> str | None:
    """Return an enumeration's name in small letters; dmidecode and the parser differ in capitals."""
    value = text(value)
    return None if value is None else RENAMED.get(value.lower(), value.lower())


def number(value: str | None) -> int | None:
    """Return the number before a unit such as bits, MT/s or MHz."""
    match = re.fullmatch(r"(\d+)(?: .*)?", value or "")
    return int(match[1]) if match else None


def millivolts(value: str | None) -> int | None:
    """Return a voltage in mV."""
    match = re.fullmatch(r"([\d.]+) V", value or "")
    return round(float(match[1]) * 1000) if match else None


def size(value: str | None) -> int | None:
    """Return a size in bytes; an empty slot is 0."""
    if value in ("No Module Installed", "None"):
        return 0
    match = re.fullmatch(r"(\d+) (\w+)", value or "")
    return int(match[1]) << UNITS[match[2]] if match else None


def slot(fields: dict[str, str]) -> dict[str, Any]:
    """Return a type 17 structure under the parser's names, as far as dmidecode prints it."""
    read: dict[str, tuple[str, Any]] = {
        "locator": ("Locator", text),
        "bank_locator": ("Bank Locator", text),
        "size_bytes": ("Size", size),
        "form_factor": ("Form Factor", name),
        "type": ("Type", name),
        "technology": ("Memory Technology", name),
        "rated_mts": ("Speed", number),
        "configured_mts": ("Configured Memory Speed", number),
        "rank": ("Rank", number),
        "data_width_bits": ("Data Width", number),
        "total_width_bits": ("Total Width", number),
        "manufacturer": ("Manufacturer", text),
        "part_number": ("Part Number", text),
        "minimum_mv": ("Minimum Voltage", millivolts),
        "maximum_mv": ("Maximum Voltage", millivolts),
        "configured_mv": ("Configured Voltage", millivolts),
        "volatile_bytes": ("Volatile Size", size),
        "non_volatile_bytes": ("Non-Volatile Size", size),
        "serial_number": ("Serial Number", text),
        "asset_tag": ("Asset Tag", text),
    }
    found = {key: convert(fields.get(label)) for key, (label, convert) in read.items()}
    found["array_handle"] = int(fields["Array Handle"], 16)
    maker = re.fullmatch(r"Bank (\d+), Hex 0x([0-9A-F]{2})", fields.get("Module Manufacturer ID", ""))
    found["manufacturer_jedec"] = f"bank {maker[1]}, 0x{maker[2]}" if maker else None
    return found


def array(fields: dict[str, str]) -> dict[str, Any]:
    """Return a type 16 structure under the parser's names."""
    correction = fields["Error Correction Type"]
    return {
        "location": name(fields["Location"]),
        "use": name(fields["Use"]),
        # Here "None" is a value.
        "error_correction": "none" if correction == "None" else name(correction),
        "maximum_bytes": size(fields["Maximum Capacity"]),
        "slots": number(fields["Number Of Devices"]),
    }


def processor(fields: dict[str, str]) -> dict[str, Any]:
    """Return a type 4 structure under the parser's names."""
    status = fields["Status"]
    return {
        "designation": text(fields["Socket Designation"]),
        "populated": status.startswith("Populated"),
        "manufacturer": text(fields["Manufacturer"]),
        "version": text(fields["Version"]),
        "cores": number(fields.get("Core Count")),
        "cores_enabled": number(fields.get("Core Enabled")),
        "threads": number(fields.get("Thread Count")),
        "maximum_mhz": number(fields["Max Speed"]),
        "boot_mhz": number(fields["Current Speed"]),
        # The parser names sockets of servers only.
        "socket_type": text(fields["Upgrade"].replace("Socket ", "").replace("Other", "")),
    }
