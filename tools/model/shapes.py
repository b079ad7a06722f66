# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shapes of the two architectures that we write: their tensors and their GGUF metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import gguf

from .q8_0 import row_bytes

ALIGNMENT: int = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class Tensor:
    """A tensor: its shape has the row's length last, as numpy has it and GGUF has not."""

    name: str
    shape: tuple[int, ...]
    quantized: bool

    @property
    def bytes(self) -> int:
        rows = prod(self.shape[:-1])
        return rows * (row_bytes(self.shape[-1]) if self.quantized else 4 * self.shape[-1])

    @property
    def padded_bytes(self) -> int:
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class DeepSeek2:
    """The architecture of DeepSeek-V3 and R1: MLA in its absorbed form, a dense head, routed and shared experts."""

    vocabulary: int
    layers: int
    dense_layers: int
    embedding: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    dense_ff: int
    experts: int
    experts_used: int
    experts_shared: int
    expert_ff: int
    expert_scale: float
    context: int
    rope_base: float = 10000.0
    epsilon: float = 1e-6

    architecture = "deepseek2"

    def __post_init__(self) -> None:
        # llama.cpp takes 26 and 27 layers, and 48 with one vocabulary, as the "lite" shape without a query LoRA.
        if self.layers in (26, 27):
            raise ValueError(f"{self.layers} layers are read as the lite shape; take another number")
        if not 0 <= self.dense_layers <= self.layers:
            raise ValueError(f"{self.dense_layers} dense layers do not fit into {self.layers}")
        if not 0 < self.experts_used <= self.experts:
            raise ValueError(f"{self.experts_used} of {self.experts} experts cannot be used")

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the file."""
        found = [Tensor("token_embd.weight", (self.vocabulary, self.embedding), True)]
        for layer in range(self.layers):
            found += self._attention(f"blk.{layer}.")
            found += self._dense(f"blk.{layer}.") if layer < self.dense_layers else self._experts(f"blk.{layer}.")
        found.append(Tensor("output_norm.weight", (self.embedding,), False))
        found.append(Tensor("output.weight", (self.vocabulary, self.embedding), True))
        return found

    def _attention(self, prefix: str) -> list[Tensor]:
        head = self.nope + self.rope
        return [
            Tensor(prefix + "attn_norm.weight", (self.embedding,), False),
            Tensor(prefix + "attn_q_a.weight", (self.q_lora, self.embedding), True),
            Tensor(prefix + "attn_q_a_norm.weight", (self.q_lora,), False),
            Tensor(prefix + "attn_q_b.weight", (self.heads * head, self.q_lora), True),
            Tensor(prefix + "attn_kv_a_mqa.weight", (self.kv_lora + self.rope, self.embedding), True),
            Tensor(prefix + "attn_kv_a_norm.weight", (self.kv_lora,), False),
            Tensor(prefix + "attn_k_b.weight", (self.heads, self.kv_lora, self.nope), True),
            Tensor(prefix + "attn_v_b.weight", (self.heads, self.value, self.kv_lora), True),
            Tensor(prefix + "attn_output.weight", (self.embedding, self.heads * self.value), True),
            Tensor(prefix + "ffn_norm.weight", (self.embedding,), False),
        ]

    def _dense(self, prefix: str) -> list[Tensor]:
        return [
            Tensor(prefix + "ffn_gate.weight", (self.dense_ff, self.embedding), True),
            Tensor(prefix + "ffn_up.weight", (self.dense_ff, self.embedding), True),
            Tensor(prefix + "ffn_down.weight", (self.embedding, self.dense_ff), True),
        ]

    def _experts(self, prefix: str) -> list[Tensor]:
        shared = self.expert_ff * self.experts_shared
        return [
            # The router and its bias stay F32: another type there crashes the engine at warm-up.
            Tensor(prefix + "ffn_gate_inp.weight", (self.experts, self.embedding), False),
            Tensor(prefix + "exp_probs_b.bias", (self.experts,), False),
            Tensor(prefix + "ffn_gate_exps.weight", (self.experts, self.expert_ff, self.embedding), True),
            Tensor(prefix + "ffn_up_exps.weight", (self.experts, self.expert_ff, self.embedding), True),
            Tensor(prefix + "ffn_down_exps.weight", (self.experts, self.embedding, self.expert_ff), True),
            Tensor(prefix + "ffn_gate_shexp.weight", (shared, self.embedding), True),
            Tensor(prefix + "ffn_up_shexp.weight", (shared, self.embedding), True),
            Tensor(prefix + "ffn_down_shexp.weight", (self.embedding, shared), True),
        ]

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the architecture's metadata, with the keys that llama.cpp's own converter writes."""
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.embedding)
        writer.add_feed_forward_length(self.dense_ff)
        writer.add_head_count(self.heads)
        # Absorbed MLA is multi-query attention over the latent: one KV head, keys and values of the latent's size.
        writer.add_head_count_kv(1)
        writer.add_key_length(self.kv_lora + self.rope)
        writer.add_value_length(self.kv_lora)
        writer.add_key_length_mla(self.nope + self.rope)
        writer.add_value_length_mla(self.value)
        writer.add_q_lora_rank(self.q_lora)
        writer.add_kv_lora_rank(self.kv_lora)
        writer.add_rope_dimension_count(self.rope)
        writer.add_rope_freq_base(self.rope_base)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_vocab_size(self.vocabulary)
        writer.add_leading_dense_block_count(self.dense_layers)
        writer.add_expert_count(self.experts)
        writer.add_expert_used_count(self.experts_used)
        writer.add_expert_shared_count(self.experts_shared)
        writer.add_expert_feed_forward_length(self.expert_ff)
        writer.add_expert_weights_scale(self.expert_scale)
        writer.add_expert_weights_norm(True)
        # Without this key llama.cpp takes softmax and says nothing.
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


@dataclass(frozen=True)
class Llama:
    """A dense decoder with grouped-query attention."""

    vocabulary: int
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    head: int
    ff: int
    context: int
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    architecture = "llama"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} KV heads")

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the file."""
        found = [Tensor("token_embd.weight", (self.vocabulary, self.embedding), True)]
        for layer in range(self.layers):
            prefix = f"blk.{layer}."
            found += [
                Tensor(prefix + "attn_norm.weight", (self.embedding,), False),
                Tensor(prefix + "attn_q.weight", (self.heads * self.head, self.embedding), True),
                Tensor(prefix + "attn_k.weight", (self.kv_heads * self.head, self.embedding), True),
                Tensor(prefix + "attn_v.weight", (self.kv_heads * self.head, self.embedding), True),
                Tensor(prefix + "attn_output.weight", (self.embedding, self.heads * self.head), True),
                Tensor(prefix + "ffn_norm.weight", (self.embedding,), False),
                Tensor(prefix + "ffn_gate.weight", (self.ff, self.embedding), True),
                Tensor(prefix + "ffn_up.weight", (self.ff, self.embedding), True),
                Tensor(prefix + "ffn_down.weight", (self.embedding, self.ff), True),
            ]
        found.append(Tensor("output_norm.weight", (self.embedding,), False))
        found.append(Tensor("output.weight", (self.vocabulary, self.embedding), True))
        return found

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the architecture's metadata."""
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.embedding)
        writer.add_feed_forward_length(self.ff)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(self.rope_base)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_vocab_size(self.vocabulary)


def split(tensors: Sequence[Tensor], shards: int) -> list[list[Tensor]]:
    """Return `tensors` in order as that many non-empty runs of about the same number of bytes."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot be split into {shards} shards")
    runs: list[list[Tensor]] = []
    left = sum(tensor.padded_bytes for tensor in tensors)
    position = 0
    for open_runs in range(shards, 0, -1):
        target = left / open_runs
        run = [tensors[position]]
        position += 1
        size = run[0].padded_bytes
        # Take the next tensor while that brings the run closer to its share, and leave one for each later run.
        while len(tensors) - position > open_runs - 1 and (
            open_runs == 1 or size + tensors[position].padded_bytes / 2 <= target
        ):
            run.append(tensors[position])
            size += tensors[position].padded_bytes
            position += 1
        left -= size
        runs.append(run)
    return runs
