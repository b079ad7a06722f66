# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""End a play as the controller's power does: each of its processes at once."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

# The variable that a play is started with, with a value of its own.
MARK = "CPULLM_TEST_PLAY"


def kill(value: object) -> None:
    """End every process of a play with this mark: workers are sessions of their own, so their group is not enough."""
    mark = f"{MARK}={value}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
