# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator reads of each kept machine is what was reviewed; tests/support/golden.py writes it anew."""

from __future__ import annotations

import pytest

from tests.support.golden import FOLDER, MACHINES


@pytest.mark.parametrize("name", MACHINES)
def test_plan_and_judgement_are_those_that_were_reviewed(name: str) -> None:
    assert MACHINES[name].render() == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_each_file_has_a_machine() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(MACHINES)
