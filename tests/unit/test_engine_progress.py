# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a soak of the kernels keeps when it is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.progress import Progress, state_of


def test_what_passed_is_there_after_a_stop(tmp_path: Path) -> None:
    file = tmp_path / "soak" / "kernels.json"
    first = Progress(file, "state")
    first.add("one", {"cases": 3, "max_off": 0.2})
    second = Progress(file, "state")
    assert set(second.passed) == {"one"}
    second.add("two", {"cases": 4, "max_off": 0.1})
    assert Progress(file, "state").figures() == {"tests": 2, "cases": 7, "max_off": 0.2}
    second.end()
    assert not Progress(file, "state").passed


@pytest.mark.parametrize("text", ["", "[]", '{"state": "other", "passed": {"one": {}}}'], ids=["cut", "list", "other"])
def test_what_another_state_left_does_not_count(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(text, encoding="utf-8")
    assert Progress(file, "state").passed == {}


def test_state_follows_names_contents_and_words(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("text", encoding="utf-8")
    two.write_text("", encoding="utf-8")
    found = {state_of([one, two], "1"), state_of([one], "1"), state_of([one, two], "2")}
    assert state_of([two, one], "1") in found
    two.write_text("t", encoding="utf-8")
    found.add(state_of([one, two], "1"))
    assert len(found) == 4
