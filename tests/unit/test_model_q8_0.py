# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Q8_0, against blocks worked out by hand, the gguf package, and the format's own bound."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tools.model import q8_0


def block(scale: float, *values: int) -> bytes:
    """Return a block whose first weights are given and the rest are zero."""
    weights = np.zeros(32, dtype=np.int8)
    weights[: len(values)] = values
    return np.float16(scale).tobytes() + weights.tobytes()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        pytest.param([], block(0), id="zeros"),
        pytest.param([127, -127, 1, 0], block(1, 127, -127, 1, 0), id="whole-numbers"),
        pytest.param([-127, 63.5, -63.5, 0.49], block(1, -127, 64, -64, 0), id="half-away-from-zero"),
        pytest.param([65504 * 127], block(65504, 127), id="largest-scale"),
        pytest.param([2**-24 * 127], block(2**-24, 127), id="smallest-scale"),
        pytest.param([2**-26 * 127], block(0, 127), id="scale-below-F16"),
        pytest.param([1e-40], block(0), id="denormal"),
    ],
)
def test_quantize_makes_these_bytes(weights: list[float], expected: bytes) -> None:
    row = np.zeros(32, dtype=np.float32)
    row[: len(weights)] = weights
    assert q8_0.quantize(row).tobytes() == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        pytest.param(np.zeros(33), "multiple of 32 weights, not 33", id="odd-row"),
        pytest.param(np.zeros(0), "multiple of 32 weights, not 0", id="empty-row"),
        pytest.param(np.full(32, np.nan), "not finite", id="nan"),
        pytest.param(np.full(32, np.inf), "not finite", id="infinity"),
        pytest.param(np.full(32, 65536 * 127.0), "beyond F16's 65504", id="scale-too-large"),
    ],
)
def test_quantize_refuses(weights: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        q8_0.quantize(weights.astype(np.float32))


@pytest.mark.parametrize("size", [0, 33, 35])
def test_dequantize_refuses_a_part_of_a_block(size: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 34 bytes, not {size}"):
        q8_0.dequantize(np.zeros(size, dtype=np.uint8))


weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda blocks: blocks * 32)),
    # Scales stay normal in F16, where the format's bound holds.
    elements=st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 0.01),
)


@given(weights)
def test_a_weight_comes_back_within_half_a_step(values: np.ndarray) -> None:
    back = q8_0.dequantize(q8_0.quantize(values))
    assert back.shape == values.shape
    largest = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True)
    # Half a step of rounding, and the relative error of the scale in F16 on up to 127 steps.
    bound = largest / 127 * 0.5 + largest * 2**-11 + 1e-7
    assert (np.abs(back - values).reshape(-1, 32) <= bound).all()


@given(weights)
def test_the_gguf_package_makes_the_same_bytes(values: np.ndarray) -> None:
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    ours = q8_0.quantize(values)
    assert ours.tobytes() == theirs.tobytes()
    back = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q8_0)
    assert (back == q8_0.dequantize(ours)).all()
