# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Split GGUF models: writing them piece by piece, and reading their weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from . import q8_0
from .shapes import DeepSeek2, Llama, Tensor, split

Pieces = Callable[[Tensor], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary; `control` are the ids of BOS and EOS."""

    tokens: list[str]
    merges: list[str]
    control: Sequence[int]
    chat_template: str

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer's metadata; BOS is asked for, since llama.cpp adds none unasked."""
        kinds = [gguf.TokenType.NORMAL] * len(self.tokens)
        for token in self.control:
            kinds[token] = gguf.TokenType.CONTROL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.control[0])
        writer.add_eos_token_id(self.control[1])
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_chat_template(self.chat_template)


def encode(tensor: Tensor, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of a tensor in the file; ValueError when the weights have another shape."""
    if weights.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: the weights have the shape {weights.shape}, expected {tensor.shape}")
    if tensor.quantized:
        return q8_0.quantize(weights).reshape(-1)
    return np.ascontiguousarray(weights, dtype="<f4").view(np.uint8).reshape(-1)


def write_shards(
    path: Path, shape: DeepSeek2 | Llama, pieces: Pieces, vocabulary: Vocabulary, shards: int, name: str
) -> list[Path]:
    """Write a model as `shards` files beside `path` and return them in order.

    `pieces` gives the bytes of a tensor in parts, so that a model larger than memory can be written. One shard
    bears the name itself, more are named NAME-00001-of-00003.gguf as llama.cpp wants it.
    """
    runs = split(shape.tensors(), shards)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(name)
    writer.add_license("GPL-3.0-or-later")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    shape.describe(writer)
    vocabulary.describe(writer)
    for number, run in enumerate(runs):
        if number:
            writer.tensors.append({})
        for tensor in run:
            kind = gguf.GGMLQuantizationType.Q8_0 if tensor.quantized else gguf.GGMLQuantizationType.F32
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    files = writer.fout
    if files is None:
        raise ValueError(f"{path}: the writer opened no file")
    for file, run in zip(files, runs):
        writer.write_padding(file, file.tell())
        for tensor in run:
            written = 0
            for piece in pieces(tensor):
                file.write(np.ascontiguousarray(piece).data)
                written += piece.nbytes
            if written != tensor.bytes:
                raise ValueError(f"{tensor.name}: {written} bytes were given, expected {tensor.bytes}")
            file.write(bytes(tensor.padded_bytes - written))
    writer.close()
    return [Path(file.name) for file in files]


def write_model(
    path: Path,
    shape: DeepSeek2 | Llama,
    weights: Mapping[str, NDArray[np.float32]],
    vocabulary: Vocabulary,
    shards: int,
    name: str,
) -> list[Path]:
    """Write a model from weights in memory; ValueError when a tensor is missing, extra or of another shape."""
    names = {tensor.name for tensor in shape.tensors()}
    if names != set(weights):
        raise ValueError(f"weights and shape differ in {sorted(names ^ set(weights))}")
    return write_shards(path, shape, lambda tensor: [encode(tensor, weights[tensor.name])], vocabulary, shards, name)


def shard_paths(first: Path) -> list[Path]:
    """Return all shards of a model, given its first; ValueError when the number of files is not the one named."""
    stem, separator, count = first.stem.rpartition("-of-")
    if not separator:
        return [first]
    paths = sorted(first.parent.glob(f"{stem.rpartition('-')[0]}-?????-of-{count}.gguf"))
    if len(paths) != int(count):
        raise ValueError(f"{first.parent}: {len(paths)} shards of {first.name} found, expected {int(count)}")
    return paths


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of one GGUF file."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def read_weights(first: Path) -> dict[str, NDArray[np.float32]]:
    """Return all tensors of a model as F32, dequantised, with the row's length last."""
    found: dict[str, NDArray[np.float32]] = {}
    for path in shard_paths(first):
        for tensor in gguf.GGUFReader(path).tensors:
            data = np.array(tensor.data)
            if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
                found[tensor.name] = q8_0.dequantize(data)
            elif tensor.tensor_type == gguf.GGMLQuantizationType.F32:
                found[tensor.name] = data.astype(np.float32)
            else:
                raise ValueError(f"{path}: {tensor.name} has the type {tensor.tensor_type.name}, not Q8_0 or F32")
    return found


def read_shape(first: Path) -> DeepSeek2:
    """Return the shape that a DeepSeek model's metadata tells."""
    data = read_metadata(first)

    def get(key: str) -> Any:
        return data[f"deepseek2.{key}"]

    def get_number(key: str) -> float:
        # The shortest decimal that is this F32, so that what was written as 1e-6 is read as 1e-6.
        return float(str(np.float32(get(key))))

    rope = get("rope.dimension_count")
    return DeepSeek2(
        vocabulary=get("vocab_size"),
        layers=get("block_count"),
        dense_layers=get("leading_dense_block_count"),
        embedding=get("embedding_length"),
        heads=get("attention.head_count"),
        q_lora=get("attention.q_lora_rank"),
        kv_lora=get("attention.kv_lora_rank"),
        nope=get("attention.key_length_mla") - rope,
        rope=rope,
        value=get("attention.value_length_mla"),
        dense_ff=get("feed_forward_length"),
        experts=get("expert_count"),
        experts_used=get("expert_used_count"),
        experts_shared=get("expert_shared_count"),
        expert_ff=get("expert_feed_forward_length"),
        expert_scale=get_number("expert_weights_scale"),
        context=get("context_length"),
        rope_base=get_number("rope.freq_base"),
        epsilon=get_number("attention.layer_norm_rms_epsilon"),
    )
