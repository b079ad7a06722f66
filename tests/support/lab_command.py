# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's command line, as a test uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]


def lab(
    *words: str, check: bool = True, data: str | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the lab's command line; AssertionError where it fails, unless that is asked for."""
    done = subprocess.run(
        [sys.executable, "-m", "lab", *words],
        cwd=CLONE,
        input=data,
        stdin=None if data is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"lab {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
