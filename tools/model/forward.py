# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A DeepSeek model's forward pass in numpy, for models of a few MB.

A second opinion beside transformers: written from the published description of DeepSeek-V3 with MLA in its
absorbed form, and light enough for a unit test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .shapes import DeepSeek2

Array = NDArray[np.float32]


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight, dtype=np.float32)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float32)


def _softmax(x: Array) -> Array:
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), dtype=np.float32)


def _rotate(x: Array, base: float) -> Array:
    """Return x (..., tokens, rope) rotated by its position, neighbouring values being a pair."""
    tokens, size = x.shape[-2:]
    angles = np.arange(tokens)[:, None] * base ** (-np.arange(0, size, 2) / size)
    cosine, sine = np.cos(angles), np.sin(angles)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cosine - x[..., 1::2] * sine
    out[..., 1::2] = x[..., 1::2] * cosine + x[..., 0::2] * sine
    return out


def _gated(x: Array, gate: Array, up: Array, down: Array) -> Array:
    inner = x @ gate.T
    return np.asarray((inner * _sigmoid(inner) * (x @ up.T)) @ down.T, dtype=np.float32)


class _Layer:
    def __init__(self, shape: DeepSeek2, weights: Mapping[str, Array], layer: int, gating: str) -> None:
        self.shape, self.weights, self.layer, self.gating = shape, weights, layer, gating

    def __getitem__(self, name: str) -> Array:
        return self.weights[f"blk.{self.layer}.{name}"]

    def attention(self, x: Array) -> Array:
        s, tokens = self.shape, len(x)
        x = _norm(x, self["attn_norm.weight"], s.epsilon)
        q = _norm(x @ self["attn_q_a.weight"].T, self["attn_q_a_norm.weight"], s.epsilon) @ self["attn_q_b.weight"].T
        q = q.reshape(tokens, s.heads, s.nope + s.rope).transpose(1, 0, 2)
        compressed = x @ self["attn_kv_a_mqa.weight"].T
        latent = _norm(compressed[:, : s.kv_lora], self["attn_kv_a_norm.weight"], s.epsilon)
        k_rope = _rotate(compressed[:, s.kv_lora :], s.rope_base)
        absorbed = q[..., : s.nope] @ self["attn_k_b.weight"].transpose(0, 2, 1)
        scores = absorbed @ latent.T + _rotate(q[..., s.nope :], s.rope_base) @ k_rope.T
        scores = np.asarray(scores / np.sqrt(s.nope + s.rope), dtype=np.float32)
        scores[:, np.triu(np.ones((tokens, tokens), dtype=bool), 1)] = -np.inf
        mixed = (_softmax(scores) @ latent) @ self["attn_v_b.weight"].transpose(0, 2, 1)
        return np.asarray(mixed.transpose(1, 0, 2).reshape(tokens, -1) @ self["attn_output.weight"].T)

    def experts(self, x: Array) -> Array:
        s = self.shape
        logits = x @ self["ffn_gate_inp.weight"].T
        scores = _sigmoid(logits) if self.gating == "sigmoid" else _softmax(logits)
        chosen = np.argsort(-(scores + self["exp_probs_b.bias"]), axis=-1, kind="stable")[:, : s.experts_used]
        share = np.take_along_axis(scores, chosen, axis=-1)
        share = share / share.sum(axis=-1, keepdims=True) * np.float32(s.expert_scale)
        out = _gated(x, self["ffn_gate_shexp.weight"], self["ffn_up_shexp.weight"], self["ffn_down_shexp.weight"])
        for expert in range(s.experts):
            rows, slots = np.nonzero(chosen == expert)
            parts = (self[f"ffn_{part}_exps.weight"][expert] for part in ("gate", "up", "down"))
            out[rows] += _gated(x[rows], *parts) * share[rows, slots, None]
        return out

    def ffn(self, x: Array) -> Array:
        inner = _norm(x, self["ffn_norm.weight"], self.shape.epsilon)
        if self.layer < self.shape.dense_layers:
            return _gated(inner, self["ffn_gate.weight"], self["ffn_up.weight"], self["ffn_down.weight"])
        return self.experts(inner)


def log_probabilities(
    shape: DeepSeek2,
    weights: Mapping[str, Array],
    ids: Sequence[int],
    gating: str = "sigmoid",
    resume: tuple[int, Array] | None = None,
) -> Array:
    """Return the natural log-probabilities (tokens, vocabulary) of what follows each of `ids`.

    `gating` is "sigmoid", or "softmax" to see what a wrong gate does. `resume` is a layer and what came into its
    FFN: with it the pass goes on from there, so that many changes of one FFN cost little each.
    """
    start, x = resume if resume else (0, _attended(shape, weights, weights["token_embd.weight"][list(ids)], 0))
    for layer in range(start, shape.layers):
        if layer > start:
            x = _attended(shape, weights, x, layer)
        x = x + _Layer(shape, weights, layer, gating).ffn(x)
    logits = _norm(x, weights["output_norm.weight"], shape.epsilon) @ weights["output.weight"].T
    logits = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)), dtype=np.float32)


def _attended(shape: DeepSeek2, weights: Mapping[str, Array], x: Array, layer: int) -> Array:
    return x + _Layer(shape, weights, layer, "sigmoid").attention(x)


def before_ffn(shape: DeepSeek2, weights: Mapping[str, Array], ids: Sequence[int], layer: int) -> Array:
    """Return what comes into a layer's FFN (tokens, embedding), before its norm."""
    x = _attended(shape, weights, weights["token_embd.weight"][list(ids)], 0)
    for below in range(layer):
        x = _attended(shape, weights, x + _Layer(shape, weights, below, "sigmoid").ffn(x), below + 1)
    return x
