# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write a Q8_0 model of random weights and any size, for load and speed.

Run from the checkout's root: python3 -m tools.model.random_model --size-gib 5.5 --output DIRECTORY
Needs numpy and gguf. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .gguf_file import Vocabulary, write_shards
from .q8_0 import BLOCK, BLOCK_BYTES
from .shapes import DeepSeek2, Llama, Tensor

GIB = 1 << 30
# What is in memory at once: a piece, and the random bytes it is made of.
PIECE_BLOCKS = (16 << 20) // BLOCK_BYTES
# The standard deviation of the signed bytes, which are even over -127..127.
BYTE_DEVIATION = 73.3
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

Shape = DeepSeek2 | Llama


def byte_symbols() -> list[str]:
    """Return the character that stands for each byte in a GPT-2 vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def make_vocabulary(size: int) -> Vocabulary:
    """Return a vocabulary that any text can be told in: two control tokens, all bytes, and pairs of bytes."""
    symbols = byte_symbols()
    pairs = size - 2 - len(symbols)
    if not 1 <= pairs <= len(symbols) ** 2:
        raise ValueError(f"a vocabulary has {3 + len(symbols)} to {2 + 257 * len(symbols)} tokens, not {size}")
    # Letters first, so that plain text is made of pairs.
    ordered = sorted(symbols, key=lambda symbol: (not symbol.isascii(), not symbol.isalpha(), symbol))
    merges = [f"{ordered[n // 256]} {ordered[n % 256]}" for n in range(pairs)]
    tokens = ["<|bos|>", "<|endoftext|>", *symbols, *(merge.replace(" ", "") for merge in merges)]
    return Vocabulary(tokens, merges, (0, 1), CHAT_TEMPLATE)


def base_shape(architecture: str, size: int) -> Shape:
    """Return the shape of a model of about `size` bytes, whose FFN width is still to be fitted."""
    small, middle = size < GIB, size < 4 * GIB
    embedding = 512 if small else 1024 if middle else 2048
    layers = 4 if small else 8 if middle else 10
    vocabulary = 8192 if small else 32000
    heads = embedding // 128
    if architecture == "llama":
        return Llama(vocabulary, layers * 2, embedding, heads, max(1, heads // 4), 128, 32, 32768)
    return DeepSeek2(
        vocabulary=vocabulary,
        layers=layers,
        dense_layers=1,
        embedding=embedding,
        heads=heads,
        q_lora=embedding // 2,
        kv_lora=256 if small else 512,
        nope=128,
        rope=64,
        value=128,
        dense_ff=embedding * 4,
        experts=64,
        experts_used=8,
        experts_shared=1,
        expert_ff=32,
        expert_scale=2.5,
        context=32768,
    )


def fit(shape: Shape, size: int) -> Shape:
    """Return `shape` with the FFN width that brings its tensors nearest to `size` bytes; ValueError if none does."""

    def widen(blocks: int) -> Shape:
        if isinstance(shape, Llama):
            return replace(shape, ff=blocks * BLOCK)
        return replace(shape, expert_ff=blocks * BLOCK)

    def weigh(blocks: int) -> int:
        return sum(tensor.padded_bytes for tensor in widen(blocks).tensors())

    step = weigh(2) - weigh(1)
    blocks = 1 + round((size - weigh(1)) / step)
    if blocks < 1:
        raise ValueError(f"this shape takes at least {weigh(1)} bytes, {size} were asked for; ask for fewer layers")
    return widen(blocks)


def pieces(tensor: Tensor, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in parts: weights of deviation 1/sqrt(row), norms of one, small selection biases."""
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    if not tensor.quantized:
        if tensor.name.endswith("norm.weight"):
            values = np.ones(tensor.shape, dtype="<f4")
        else:
            deviation = 0.01 if tensor.name.endswith(".bias") else tensor.shape[-1] ** -0.5
            values = (generator.standard_normal(tensor.shape) * deviation).astype("<f4")
        yield values.reshape(-1).view(np.uint8)
        return
    scale = tensor.shape[-1] ** -0.5 / BYTE_DEVIATION
    left = tensor.bytes // BLOCK_BYTES
    while left:
        count = min(left, PIECE_BLOCKS)
        piece = np.frombuffer(generator.bytes(count * BLOCK_BYTES), dtype=np.uint8).reshape(count, BLOCK_BYTES).copy()
        weights = piece[:, 2:].view(np.int8)
        # A quantiser never writes -128.
        np.maximum(weights, -127, out=weights)
        scales = (scale * generator.uniform(0.5, 1.5, count)).astype("<f2")
        piece[:, :2] = scales.view(np.uint8).reshape(count, 2)
        yield piece.reshape(-1)
        left -= count


class Progress:
    """Tells on stderr, and in a status file where one is named, how many bytes are written."""

    def __init__(self, total: int, status: Path | None, interval_s: float = 2.0) -> None:
        self.total, self.status, self.interval_s = total, status, interval_s
        self.done, self.started, self.told = 0, time.monotonic(), 0.0

    def add(self, count: int) -> None:
        """Count bytes, and tell when the last word was long enough ago or all is done."""
        self.done += count
        now = time.monotonic()
        if now - self.told < self.interval_s and self.done < self.total:
            return
        self.told = now
        rate = self.done / max(now - self.started, 1e-9)
        text = f"{self.done / GIB:.2f} of {self.total / GIB:.2f} GiB, {rate / 1e9:.2f} GB/s"
        print(f"{self.done / self.total:4.0%}  {text}", file=sys.stderr, flush=True)
        if self.status:
            state = {"phase": "write", "done": self.done, "total": self.total, "unit": "bytes", "message": text}
            beside = self.status.with_name(self.status.name + ".new")
            beside.write_text(json.dumps(state | {"updated": time.time()}), encoding="utf-8")
            os.replace(beside, self.status)


def write(
    directory: Path, name: str, shape: Shape, shards: int, seed: int, add: Callable[[int], object] = bool
) -> list[Path]:
    """Write the shards into `directory`, each under its name only when all are complete; return their paths.

    `add` is called with the number of bytes of each piece written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))

    def counted(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        for piece in pieces(tensor, seed):
            yield piece
            add(piece.nbytes)

    try:
        vocabulary = make_vocabulary(shape.vocabulary)
        written = write_shards(partial / f"{name}.gguf", shape, counted, vocabulary, shards, name)
        return [path.replace(directory / path.name) for path in written]
    finally:
        shutil.rmtree(partial)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--size-gib", type=float, required=True, help="of the tensors, about; the FFN is fitted to it")
    parser.add_argument("--architecture", choices=("deepseek2", "llama"), default="deepseek2")
    parser.add_argument("--name", default="random", help="of the model, and of its files")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--embedding", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--context", type=int, help="tokens that the metadata calls trained")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--experts-used", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--status", type=Path, help="file to keep the progress in, as JSON")
    chosen = parser.parse_args()
    size = int(chosen.size_gib * GIB)
    keys = ("layers", "embedding", "heads", "vocabulary", "context", "experts", "experts_used")
    given = {key: value for key in keys if (value := getattr(chosen, key)) is not None}
    try:
        shape = fit(replace(base_shape(chosen.architecture, size), **given), size)
        total = sum(tensor.bytes for tensor in shape.tensors())
        chosen.output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(chosen.output).free
        if free < total:
            raise ValueError(f"{chosen.output} has {free} bytes free, {total} are needed")
        progress = Progress(total, chosen.status)
        paths = write(chosen.output, chosen.name, shape, chosen.shards, chosen.seed, progress.add)
    except (TypeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {
        "first_shard": str(paths[0]),
        "shards": [{"file": path.name, "bytes": path.stat().st_size} for path in paths],
        "tensor_bytes": total,
        "shape": {"architecture": shape.architecture} | {key: getattr(shape, key) for key in shape.__dict__},
        "seconds": round(time.monotonic() - progress.started, 2),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
