# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""bench.pages: what is refused before anything is measured."""

from __future__ import annotations

import pytest

from bench import pages


def test_a_way_that_is_not_known_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pages.main(["--model", "none.gguf", "--ways", "4k,4g"])
    said = capsys.readouterr().err
    assert "--ways 4k,4g: " in said and "4g is unknown, expected some of" in said
