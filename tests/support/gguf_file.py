# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write GGUF files of any shape: real headers, data that is a hole in the file.

A model of hundreds of GB so takes no disk space; what reads headers or sizes cannot tell the difference.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._gguf import TENSOR_TYPES, BytesSource, Header, read_header

TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
VALUE_LAYOUTS = {
    "UINT8": (0, "<B"),
    "INT8": (1, "<b"),
    "UINT16": (2, "<H"),
    "INT16": (3, "<h"),
    "UINT32": (4, "<I"),
    "INT32": (5, "<i"),
    "FLOAT32": (6, "<f"),
    "BOOL": (7, "<B"),
    "UINT64": (10, "<Q"),
    "INT64": (11, "<q"),
    "FLOAT64": (12, "<d"),
}
STRING, ARRAY = 8, 9


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: str, value: Any) -> bytes:
    """Return one key-value pair; kind is a value type, "STRING", or "[KIND]" for an array of it."""
    return string(key) + _typed(kind, value)


def _typed(kind: str, value: Any) -> bytes:
    if kind.startswith("["):
        inner = kind[1:-1]
        return struct.pack("<I", ARRAY) + _items(inner, value)
    number = STRING if kind == "STRING" else VALUE_LAYOUTS[kind][0]
    return struct.pack("<I", number) + _item(kind, value)


def _items(kind: str, values: Sequence[Any]) -> bytes:
    number = ARRAY if kind.startswith("[") else STRING if kind == "STRING" else VALUE_LAYOUTS[kind][0]
    return struct.pack("<IQ", number, len(values)) + b"".join(_item(kind, value) for value in values)


def _item(kind: str, value: Any) -> bytes:
    if kind == "STRING":
        return string(value)
    if kind.startswith("["):
        return _items(kind[1:-1], value)
    return struct.pack(VALUE_LAYOUTS[kind][1], value)


@dataclasses.dataclass(frozen=True)
class TensorShape:
    name: str
    dims: tuple[int, ...]
    type: str = "Q8_0"

    @property
    def bytes(self) -> int:
        _, block, size = TENSOR_TYPES[TYPE_NUMBERS[self.type]]
        count = 1
        for dim in self.dims:
            count *= dim
        return count // block * size


def header_bytes(
    pairs: Sequence[tuple[str, str, Any]], tensors: Sequence[TensorShape], *, version: int = 3, alignment: int = 32
) -> tuple[bytes, int]:
    """Return the header, padded up to the data section, and the size of the whole file."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    head += b"".join(pair(*item) for item in pairs)
    offset = 0
    end = 0
    for tensor in tensors:
        head += string(tensor.name) + struct.pack("<I", len(tensor.dims))
        head += b"".join(struct.pack("<Q", dim) for dim in tensor.dims)
        head += struct.pack("<IQ", TYPE_NUMBERS[tensor.type], offset)
        end = offset + tensor.bytes
        offset += -(-tensor.bytes // alignment) * alignment
    if tensors:
        head += b"\0" * (-len(head) % alignment)
    return head, len(head) + end


def header(pairs: Sequence[tuple[str, str, Any]], tensors: Sequence[TensorShape]) -> Header:
    head, size = header_bytes(pairs, tensors)
    return read_header(BytesSource(head, size))


def write(path: Path, pairs: Sequence[tuple[str, str, Any]], tensors: Sequence[TensorShape]) -> int:
    head, size = header_bytes(pairs, tensors)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    return size


@dataclasses.dataclass(frozen=True)
class DeepSeek:
    """The shape of a DeepSeek-V3 model; the defaults are those of DeepSeek-R1 671B."""

    layers: int = 61
    dense_layers: int = 3
    context: int = 163840
    embedding: int = 7168
    vocabulary: int = 129280
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    dense_ff: int = 18432
    experts: int = 256
    experts_used: int = 8
    expert_ff: int = 2048
    mla: bool = True

    def pairs(self) -> list[tuple[str, str, Any]]:
        key = "deepseek2"
        kv_heads = 1 if self.mla else self.heads
        rows: list[tuple[str, str, Any]] = [
            ("general.architecture", "STRING", key),
            (f"{key}.block_count", "UINT32", self.layers),
            (f"{key}.context_length", "UINT32", self.context),
            (f"{key}.embedding_length", "UINT32", self.embedding),
            (f"{key}.feed_forward_length", "UINT32", self.dense_ff),
            (f"{key}.attention.head_count", "UINT32", self.heads),
            (f"{key}.attention.head_count_kv", "UINT32", kv_heads),
            (f"{key}.attention.layer_norm_rms_epsilon", "FLOAT32", 1e-6),
            (f"{key}.rope.freq_base", "FLOAT32", 10000.0),
            (f"{key}.leading_dense_block_count", "UINT32", self.dense_layers),
            (f"{key}.vocab_size", "UINT32", self.vocabulary),
            (f"{key}.attention.q_lora_rank", "UINT32", self.q_lora),
            (f"{key}.attention.kv_lora_rank", "UINT32", self.kv_lora),
            (f"{key}.attention.key_length", "UINT32", (self.kv_lora if self.mla else self.nope) + self.rope),
            (f"{key}.attention.value_length", "UINT32", self.kv_lora if self.mla else self.value),
            (f"{key}.expert_feed_forward_length", "UINT32", self.expert_ff),
            (f"{key}.expert_count", "UINT32", self.experts),
            (f"{key}.expert_used_count", "UINT32", self.experts_used),
            (f"{key}.expert_shared_count", "UINT32", 1),
            (f"{key}.expert_weights_scale", "FLOAT32", 2.5),
            (f"{key}.expert_weights_norm", "BOOL", 1),
            (f"{key}.expert_gating_func", "UINT32", 2),
            (f"{key}.rope.dimension_count", "UINT32", self.rope),
            ("tokenizer.ggml.model", "STRING", "none"),
        ]
        if self.mla:
            rows.append((f"{key}.attention.key_length_mla", "UINT32", self.nope + self.rope))
            rows.append((f"{key}.attention.value_length_mla", "UINT32", self.value))
        return rows

    def tensors(self) -> list[TensorShape]:
        e, h = self.embedding, self.heads
        rows = [TensorShape("token_embd.weight", (e, self.vocabulary))]
        for layer in range(self.layers):
            name = f"blk.{layer}."
            rows += [
                TensorShape(name + "attn_norm.weight", (e,), "F32"),
                TensorShape(name + "attn_q_a_norm.weight", (self.q_lora,), "F32"),
                TensorShape(name + "attn_kv_a_norm.weight", (self.kv_lora,), "F32"),
                TensorShape(name + "attn_q_a.weight", (e, self.q_lora)),
                TensorShape(name + "attn_q_b.weight", (self.q_lora, h * (self.nope + self.rope))),
                TensorShape(name + "attn_kv_a_mqa.weight", (e, self.kv_lora + self.rope)),
                TensorShape(name + "attn_output.weight", (h * self.value, e)),
                TensorShape(name + "ffn_norm.weight", (e,), "F32"),
            ]
            if self.mla:
                rows.append(TensorShape(name + "attn_k_b.weight", (self.nope, self.kv_lora, h)))
                rows.append(TensorShape(name + "attn_v_b.weight", (self.kv_lora, self.value, h)))
            else:
                rows.append(TensorShape(name + "attn_kv_b.weight", (self.kv_lora, h * (self.nope + self.value))))
            if layer < self.dense_layers:
                rows += [
                    TensorShape(name + "ffn_gate.weight", (e, self.dense_ff)),
                    TensorShape(name + "ffn_down.weight", (self.dense_ff, e)),
                    TensorShape(name + "ffn_up.weight", (e, self.dense_ff)),
                ]
                continue
            rows += [
                TensorShape(name + "ffn_gate_inp.weight", (e, self.experts), "F32"),
                TensorShape(name + "exp_probs_b.bias", (self.experts,), "F32"),
                TensorShape(name + "ffn_gate_exps.weight", (e, self.expert_ff, self.experts)),
                TensorShape(name + "ffn_down_exps.weight", (self.expert_ff, e, self.experts)),
                TensorShape(name + "ffn_up_exps.weight", (e, self.expert_ff, self.experts)),
                TensorShape(name + "ffn_gate_shexp.weight", (e, self.expert_ff)),
                TensorShape(name + "ffn_down_shexp.weight", (self.expert_ff, e)),
                TensorShape(name + "ffn_up_shexp.weight", (e, self.expert_ff)),
            ]
        rows.append(TensorShape("output_norm.weight", (e,), "F32"))
        rows.append(TensorShape("output.weight", (e, self.vocabulary)))
        return rows


def split(
    pairs: Sequence[tuple[str, str, Any]], tensors: Sequence[TensorShape], count: int, largest: int | None = None
) -> list[tuple[list[tuple[str, str, Any]], list[TensorShape]]]:
    """Return the pairs and tensors of each of ``count`` shards of about equal bytes, or of about ``largest``."""
    limit = largest or -(-sum(tensor.bytes for tensor in tensors) // count)
    groups: list[list[TensorShape]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor.bytes // 2 > limit and len(groups) < count:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    while len(groups) < count:
        largest_group = max(groups, key=len)
        groups.append([largest_group.pop()])
    shards = []
    for number, group in enumerate(groups):
        extra = [
            ("split.no", "UINT16", number),
            ("split.count", "UINT16", count),
            ("split.tensors.count", "INT32", len(tensors)),
        ]
        shards.append(([*(pairs if number == 0 else []), *extra], group))
    return shards


def write_model(
    directory: Path, stem: str, pairs: Sequence[tuple[str, str, Any]], tensors: Sequence[TensorShape], count: int
) -> list[Path]:
    """Write a model in ``count`` shards; returns their paths."""
    if count == 1:
        path = directory / f"{stem}.gguf"
        write(path, pairs, tensors)
        return [path]
    paths = []
    for number, (shard_pairs, shard_tensors) in enumerate(split(pairs, tensors, count), 1):
        path = directory / f"{stem}-{number:05d}-of-{count:05d}.gguf"
        write(path, shard_pairs, shard_tensors)
        paths.append(path)
    return paths
