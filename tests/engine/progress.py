# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A long run of tests that can be stopped and goes on: what passed is kept until the tests or what they test change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def state_of(files: Iterable[Path], *words: str) -> str:
    """Return a hash of files and words: what passed with other ones does not count."""
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    found.update("\n".join(words).encode())
    return found.hexdigest()


class Progress:
    """The tests that passed, and what they measured, in a file."""

    def __init__(self, file: Path, state: str) -> None:
        """Read the file, or begin anew where it tells of another state."""
        self._file, self._state = file, state
        self.passed: dict[str, dict[str, Any]] = {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["state"] == state:
                self.passed = dict(kept["passed"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def add(self, test: str, properties: dict[str, Any]) -> None:
        """Keep that a test passed, whole or not at all."""
        self.passed[test] = properties
        self._file.parent.mkdir(parents=True, exist_ok=True)
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps({"state": self._state, "passed": self.passed}, indent=1), encoding="utf-8")
        written.replace(self._file)

    def figures(self) -> dict[str, float]:
        """Return sums of what was measured, and the largest of what is called max_*."""
        figures: dict[str, float] = {"tests": len(self.passed)}
        for properties in self.passed.values():
            for name, value in properties.items():
                if name.startswith("max_"):
                    figures[name] = max(value, figures.get(name, 0.0))
                else:
                    figures[name] = figures.get(name, 0) + value
        return figures

    def end(self) -> None:
        """Forget everything: the next run begins anew."""
        self._file.unlink(missing_ok=True)
