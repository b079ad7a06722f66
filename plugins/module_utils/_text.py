# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Words from elsewhere, as they may be shown: they go to a terminal and into reports."""

from __future__ import annotations


def printable(text: object, limit: int = 500) -> str:
    """Return at most `limit` characters of a text on one line, each that no terminal should get as a `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text)[:limit])
