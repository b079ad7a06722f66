# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is shown of a long log after a failure: the part, what was said, the end, and never much more."""

from __future__ import annotations

import pytest

from tools import failures

NOISE = [f"ok: [host{number}]" for number in range(500)]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param("  │ fatal: [test-container]: FAILED! => {", id="ansible-in-a-frame"),
        pytest.param("____________ test_one[a] ____________", id="pytest"),
        pytest.param("E       assert 2 == 3", id="assertion"),
        pytest.param("roles/x.py:3: error: Missing return", id="mypy"),
    ],
)
def test_what_was_said_of_a_failure_is_shown_with_its_part_and_the_end(said: str) -> None:
    log = ["==> unit", *NOISE, "E  of the part before", "==> containers", *NOISE, said, "cause", *NOISE, "the end"]
    shown = list(failures.interesting(log))
    assert shown[shown.index(said) + 1] == "cause"
    assert ("==> containers" in shown, shown[-1]) == (True, "the end")
    assert "E  of the part before" not in shown
    assert len(shown) < 60


def test_ever_so_many_failures_stay_readable() -> None:
    log = ["==> unit", *["E  no " * 1000] * 5000, "the end"]
    shown = list(failures.interesting(log))
    assert len(shown) <= failures.MOST + 3
    assert max(map(len, shown)) == failures.WIDTH
    assert shown[-1] == "the end"
    assert list(failures.interesting([])) == []
