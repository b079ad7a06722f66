# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters for unit files."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: systemd_word
short_description: Quote a value as one word of a systemd command line
version_added: "1.0.0"
description:
  - Returns the value such that systemd hands it to the command as one argument, to the letter.
  - Specifiers (C(%)) and variables (C($)) are escaped.
options:
  _input:
    description: The value. Numbers are turned into text.
    type: raw
    required: true
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Show a quoted word
  ansible.builtin.debug:
    msg: "{{ '50% of $HOME' | cpullm.epyc.systemd_word }}" # "50%% of $$HOME"
"""

RETURN = r"""
_value:
  description: The quoted word.
  type: str
"""

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


def systemd_word(value: Any) -> str:
    """Return a value as one word of ``ExecStart=``, quoted where systemd.service(5) asks for it.

    Raises AnsibleFilterError for a control character, which no unit file can hold.
    """
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise AnsibleFilterError(f"systemd_word: {text!r} has a control character; expected one line of text")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if _PLAIN.fullmatch(escaped) else f'"{escaped}"'


class FilterModule:
    """The collection's filters for unit files."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"systemd_word": systemd_word}
