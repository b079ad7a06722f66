# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Q8_0 format: blocks of 32 weights, each a scale in F16 and 32 signed bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
BLOCK_BYTES = 34


def row_bytes(columns: int) -> int:
    """Return the bytes of a row of that many weights; ValueError when it is no multiple of 32."""
    if columns <= 0 or columns % BLOCK:
        raise ValueError(f"a Q8_0 row holds a positive multiple of {BLOCK} weights, not {columns}")
    return columns // BLOCK * BLOCK_BYTES


def quantize(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the Q8_0 bytes of `weights`, same shape but for the last axis, which becomes bytes.

    The scale is max(abs)/127 before its rounding to F16, and weights are divided by the unrounded scale and
    rounded half away from zero, as ggml's quantize_row_q8_0_ref does. ValueError for a row that is no multiple
    of 32, for a value that is not finite, and for a block whose scale F16 cannot hold.
    """
    row_bytes(weights.shape[-1])
    blocks = np.asarray(weights, dtype=np.float32).reshape(-1, BLOCK)
    if not np.isfinite(blocks).all():
        raise ValueError("Q8_0 cannot hold a weight that is not finite")
    scale = np.abs(blocks).max(axis=1) / np.float32(127)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"the scale {scale.max():g} of a Q8_0 block is beyond F16's 65504")
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    # The inverse of a denormal scale overflows; ggml writes unspecified integers there, we write zeros.
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)
    scaled = blocks * inverse[:, None]
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    out = np.empty((len(blocks), BLOCK_BYTES), dtype=np.uint8)
    out[:, :2] = half.astype("<f2").view(np.uint8).reshape(-1, 2)
    out[:, 2:] = np.clip(rounded, -127, 127).astype(np.int8).view(np.uint8)
    return out.reshape(*weights.shape[:-1], row_bytes(weights.shape[-1]))


def dequantize(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the weights that Q8_0 bytes hold, same shape but for the last axis, which becomes weights."""
    if data.shape[-1] == 0 or data.shape[-1] % BLOCK_BYTES:
        raise ValueError(f"a Q8_0 row holds a positive multiple of {BLOCK_BYTES} bytes, not {data.shape[-1]}")
    blocks = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1, BLOCK_BYTES)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    weights = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * scale
    return weights.reshape(*data.shape[:-1], data.shape[-1] // BLOCK_BYTES * BLOCK)
