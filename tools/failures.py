# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Show what a long log of tests says of a failure: its part, Ansible's and pytest's words, and the end.

usage: failures.py LOG
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Molecule draws a frame around what it runs.
_SAYS = re.compile(r"^[ │]*(fatal: |failed: |E  |FAILED |ERROR )|^_{4,} .* _{4,}$|FAILED!|Assertion|\berror:")
_PART = re.compile(r"^==> [a-z][a-z -]*$")
# Lines after one that says a failure, lines of the log's end, characters of a line, and lines in all.
AFTER, END, WIDTH, MOST = 20, 30, 400, 150


def interesting(lines: Sequence[str]) -> Iterator[str]:
    """Yield the last part that began, what was said of failures, and the end; a line of dots for what is left out."""
    end = max(0, len(lines) - END)
    begun = max((number for number, line in enumerate(lines) if _PART.match(line)), default=-1)
    wanted = {*range(end, len(lines)), *([begun] if begun >= 0 else [])}
    said = [number for number in range(begun + 1, end) if _SAYS.search(lines[number])]
    for number in said:
        for near in range(number, min(end, number + AFTER)):
            if len(wanted) < MOST:
                wanted.add(near)
    last = -1
    for number in sorted(wanted):
        if number != last + 1:
            yield "..."
        yield lines[number][:WIDTH]
        last = number


def main() -> int:
    """Show them."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 64
    text = Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace")
    for line in interesting(_COLOUR.sub("", text).splitlines()):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
