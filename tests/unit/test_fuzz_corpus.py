# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""No input that fuzzing starts from, or found worth keeping, breaks a promise of the parsers; `make fuzz` looks on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.mutate import mutate_json
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_promise(name: str) -> None:
    kept = sorted((CORPUS / name).iterdir())
    assert kept, "nothing is kept: make fuzz FUZZ_KEEP=1"
    for data in (b"", *SEEDS[name](), *(file.read_bytes() for file in kept)):
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.json])
def test_changed_json_breaks_no_promise(name: str) -> None:
    changed = 0
    for data in SEEDS[name]():
        for seed in range(200):
            text = mutate_json(data, seed)
            if text is not None:
                changed += 1
                TARGETS[name].run(text)
    assert changed > 100
