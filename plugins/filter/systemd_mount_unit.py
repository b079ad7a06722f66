# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of systemd mount units."""

from __future__ import annotations

from collections.abc import Callable

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: systemd_mount_unit
short_description: Name of the mount unit for a path
version_added: "1.0.0"
author:
  - The cpullm.epyc authors (@cpullm)
description:
  - Returns the name that systemd demands of the unit that mounts a path, as C(systemd-escape --path --suffix=mount)
    prints it.
options:
  _input:
    description: An absolute path.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show the name
  ansible.builtin.debug:
    msg: "{{ '/dev/hugepages-1G' | cpullm.epyc.systemd_mount_unit }}" # dev-hugepages\x2d1G.mount
"""

RETURN = r"""
_value:
  description: Name of the unit.
  type: str
  sample: dev-hugepages\x2d1G.mount
"""


def systemd_mount_unit(path: str) -> str:
    """Return the unit's name; systemd.unit(5), "String Escaping for Inclusion in Unit Names"."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or not parts or {".", ".."} & set(parts):
        raise AnsibleFilterError(f"systemd_mount_unit: found {path!r}, expected an absolute path below /")

    def escape(index: int, byte: int) -> str:
        character = chr(byte)
        plain = byte < 0x80 and (character.isalnum() or character in ":_.")
        return character if plain and not (index == 0 and character == ".") else f"\\x{byte:02x}"

    joined = "/".join(parts).encode("utf-8")
    return "".join("-" if byte == 0x2F else escape(index, byte) for index, byte in enumerate(joined)) + ".mount"


class FilterModule:
    """Names the filter."""

    def filters(self) -> dict[str, Callable[[str], str]]:
        """Return the filters of this file."""
        return {"systemd_mount_unit": systemd_mount_unit}
