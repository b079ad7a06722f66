# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read the header of a GGUF file, from a file, from bytes or from anything that can read a range.

The format: magic, version, counts, key-value pairs, tensor descriptions, padding, tensor data; all little endian.
Source: docs/gguf.md of the ggml project, and what llama.cpp's loader accepts (ggml/src/gguf.cpp).

The input may be hostile. Every count and length is checked against what is left of the file before it is used, the
header as a whole is bounded in bytes and in items, long arrays are walked without being kept, and each error is a
ValueError that names the offset.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Union

MAGIC = b"GGUF"
# What no known model comes near: the largest header today is about 15 MB, of 1,100 tensors and 520,000 strings.
MAX_HEADER_BYTES = 256 << 20
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ITEMS = 1 << 21
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 20
MAX_KEPT_BYTES = 16 << 20
MAX_KEPT_ITEMS = 1024
MAX_DEPTH = 4
# GGML_MAX_NAME and GGML_MAX_DIMS of llama.cpp.
MAX_NAME_BYTES = 63
MAX_DIMS = 4
MAX_ELEMENTS = (1 << 63) - 1

_FIRST_BLOCK = 256 << 10
_LARGEST_BLOCK = 8 << 20

# Value types of key-value pairs: number -> (name, struct format or None).
_VALUE_TYPES: dict[int, tuple[str, str | None]] = {
    0: ("UINT8", "<B"),
    1: ("INT8", "<b"),
    2: ("UINT16", "<H"),
    3: ("INT16", "<h"),
    4: ("UINT32", "<I"),
    5: ("INT32", "<i"),
    6: ("FLOAT32", "<f"),
    7: ("BOOL", "<B"),
    8: ("STRING", None),
    9: ("ARRAY", None),
    10: ("UINT64", "<Q"),
    11: ("INT64", "<q"),
    12: ("FLOAT64", "<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Tensor types: number -> (name, elements per block, bytes per block).
# Source: type_traits in ggml/src/ggml.c and the block structures in ggml/src/ggml-common.h.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

# F64 and the integer types have no matrix multiplication in llama.cpp's CPU backend: it crashes at the warm-up.
# Q8_1 and Q8_K exist only as intermediate results.
_NEVER_WEIGHTS = frozenset({"F64", "I64", "Q8_1", "Q8_K"})
_INTEGERS = frozenset({"I8", "I16", "I32"})
_MULTIPLIED = re.compile(r"(^|\.)(attn_(q|k|v|kv|output)|ffn_(gate|up|down|gate_up)(_|\.)|output|token_embd)")

# What llama.cpp calls its architectures: gpt-oss, ernie4_5-moe. It is part of keys, and of what operators read.
ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

Scalar = Union[int, float, bool, str]


@dataclass(frozen=True)
class Array:
    """An array value; ``items`` holds the values of a short array of scalars or strings, and is None otherwise."""

    type: str
    count: int
    items: tuple[Scalar, ...] | None


Value = Union[Scalar, Array]


class Source(Protocol):
    """A file of known size that can be read at any offset."""

    @property
    def size(self) -> int:
        """Return the file's size in bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``, which the caller knows to be inside the file."""


class BytesSource:
    """Bytes in memory; ``size`` may claim more than there is, for the start of a larger file."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self._data = data
        self.size = len(data) if size is None else size

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class FileSource:
    """A local file, opened for each read so that no descriptor outlives it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.size = os.stat(path).st_size

    def read(self, offset: int, length: int) -> bytes:
        with open(self._path, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)


@dataclass(frozen=True)
class Tensor:
    """One tensor: ``dims`` innermost first, ``offset`` from the start of the data section, both as in the file."""

    name: str
    dims: tuple[int, ...]
    type: str
    offset: int
    bytes: int
    elements: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data; ``data_start`` is the offset of the data section in the file."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_start: int
    file_bytes: int

    def integer(self, key: str) -> int | None:
        """Return the integer under ``key``, or None if it is absent or something else."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """Return the string under ``key``, or None if it is absent or something else."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


class _Reader:
    """A cursor over a source that reads ahead in growing blocks and refuses to leave file or header bound."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.file_bytes = source.size
        self._end = min(source.size, MAX_HEADER_BYTES)
        self.at = 0
        self._block = b""
        self._block_start = 0
        self._ahead = _FIRST_BLOCK
        self._items_left = MAX_ITEMS
        self._kept_left = MAX_KEPT_BYTES

    @property
    def left(self) -> int:
        return self._end - self.at

    def need(self, length: int, what: str) -> None:
        if length > self.left:
            if self._end < self.file_bytes:
                raise ValueError(
                    f"offset {self.at}: {what} needs {length} bytes, "
                    f"which passes the {MAX_HEADER_BYTES} bytes that a header may have"
                )
            raise ValueError(f"offset {self.at}: {what} needs {length} bytes, but the file has {self.left} left")

    def spend(self, items: int, what: str) -> None:
        if items > self._items_left:
            raise ValueError(f"offset {self.at}: {what} brings the header above {MAX_ITEMS} array items")
        self._items_left -= items

    def keep(self, length: int, what: str) -> None:
        if length > self._kept_left:
            raise ValueError(f"offset {self.at}: {what} brings the texts of the header above {MAX_KEPT_BYTES} bytes")
        self._kept_left -= length

    def _fill(self, length: int) -> None:
        """Make ``length`` bytes from the cursor available in the block."""
        want = min(self.left, max(length, self._ahead))
        self._ahead = min(self._ahead * 2, _LARGEST_BLOCK)
        self._block = self._source.read(self.at, want)
        self._block_start = self.at
        if len(self._block) < length:
            have = self.at + len(self._block)
            raise ValueError(f"offset {have}: the data ends here, though the file should have {self.file_bytes} bytes")

    def take(self, length: int, what: str) -> bytes:
        self.need(length, what)
        start = self.at - self._block_start
        if start < 0 or start + length > len(self._block):
            self._fill(length)
            start = 0
        self.at += length
        return self._block[start : start + length]

    def skip(self, length: int, what: str) -> None:
        self.need(length, what)
        self.at += length

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def string(self, what: str, limit: int) -> bytes:
        start = self.at
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise ValueError(f"offset {start}: {what} has {length} bytes, at most {limit} are accepted")
        self.keep(length, what)
        return self.take(length, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Walk over ``count`` strings; a vocabulary has some 100,000, so the common case stays inside the block."""
        unpack = struct.Struct("<Q").unpack_from
        while count:
            start = self.at - self._block_start
            block = self._block
            last = len(block) - 8
            while count and 0 <= start <= last:
                start += 8 + int(unpack(block, start)[0])
                count -= 1
                if start > len(block):
                    break
            at = self._block_start + start
            if at > self._end:
                self.need(at - self.at, f"a string of {what}")
            self.at = at
            if count:
                self.skip(self.u64(f"the length of a string of {what}"), f"a string of {what}")
                count -= 1


def _text(data: bytes, at: int, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"offset {at}: {what} is not UTF-8") from None


def _value_type(reader: _Reader, what: str) -> int:
    start = reader.at
    number = reader.u32(f"the type of {what}")
    if number not in _VALUE_TYPES:
        raise ValueError(f"offset {start}: {what} has the unknown value type {number}")
    return number


def _scalar(reader: _Reader, number: int, what: str) -> Scalar:
    start = reader.at
    if number == _STRING:
        return reader.string(what, MAX_STRING_BYTES).decode("utf-8", errors="replace")
    layout = _VALUE_TYPES[number][1] or ""
    value: int | float = struct.unpack(layout, reader.take(struct.calcsize(layout), what))[0]
    if number == _BOOL:
        if value not in (0, 1):
            raise ValueError(f"offset {start}: {what} is a boolean of value {value}, expected 0 or 1")
        return bool(value)
    return value


def _array(reader: _Reader, what: str, depth: int) -> Array:
    start = reader.at
    if depth > MAX_DEPTH:
        raise ValueError(f"offset {start}: {what} nests arrays more than {MAX_DEPTH} deep")
    number = _value_type(reader, f"the items of {what}")
    count = reader.u64(f"the length of {what}")
    name, layout = _VALUE_TYPES[number]
    smallest = struct.calcsize(layout) if layout else (8 if number == _STRING else 12)
    if count * smallest > reader.left:
        raise ValueError(
            f"offset {start}: {what} claims {count} items of at least {smallest} bytes each, "
            f"but {reader.left} bytes are left"
        )
    if layout and count > MAX_KEPT_ITEMS:
        reader.skip(count * smallest, what)
        return Array(name, count, None)
    # An inner array costs several times a string's time.
    reader.spend(count * 8 if number == _ARRAY else count, what)
    if number == _ARRAY:
        for _dummy in range(count):
            _array(reader, what, depth + 1)
        return Array(name, count, None)
    if number == _STRING and count > MAX_KEPT_ITEMS:
        reader.skip_strings(count, what)
        return Array(name, count, None)
    return Array(name, count, tuple(_scalar(reader, number, f"an item of {what}") for _dummy in range(count)))


def _pairs(reader: _Reader, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(count):
        start = reader.at
        key = _text(reader.string(f"key {index}", MAX_KEY_BYTES), start, f"key {index}")
        if not key:
            raise ValueError(f"offset {start}: key {index} is empty")
        if key in metadata:
            raise ValueError(f"offset {start}: the key {key!r:.80} is there twice")
        what = f"the value of {key!r:.80}"
        number = _value_type(reader, what)
        metadata[key] = _array(reader, what, 1) if number == _ARRAY else _scalar(reader, number, what)
    return metadata


def _alignment(metadata: Mapping[str, Value], at: int) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"offset {at}: general.alignment is {value!r:.80}, expected a power of two")
    if value <= 0 or value & (value - 1) or value > 1 << 20:
        raise ValueError(f"offset {at}: general.alignment is {value}, expected a power of two up to 1048576")
    return value


def _tensor(reader: _Reader, index: int) -> Tensor:
    start = reader.at
    name = _text(reader.string(f"the name of tensor {index}", MAX_NAME_BYTES), start, f"the name of tensor {index}")
    what = f"tensor {name!r}"
    count = reader.u32(f"the dimensions of {what}")
    if count > MAX_DIMS:
        raise ValueError(f"offset {start}: {what} has {count} dimensions, at most {MAX_DIMS} are known")
    dims = tuple(reader.u64(f"the dimensions of {what}") for _dummy in range(count))
    elements = 1
    for size in dims:
        elements *= size
        if size > MAX_ELEMENTS or elements > MAX_ELEMENTS:
            raise ValueError(f"offset {start}: {what} has more elements than can be counted: {list(dims)}")
    number = reader.u32(f"the type of {what}")
    if number not in TENSOR_TYPES:
        raise ValueError(f"offset {start}: {what} has the unknown type {number}")
    kind, block, block_bytes = TENSOR_TYPES[number]
    row = dims[0] if dims else 1
    if row % block:
        raise ValueError(f"offset {start}: {what} of type {kind} has rows of {row}, expected a multiple of {block}")
    offset = reader.u64(f"the offset of {what}")
    return Tensor(name, dims, kind, offset, elements // block * block_bytes, elements)


def _check_layout(tensors: Sequence[Tensor], alignment: int, data_start: int, file_bytes: int) -> None:
    """Raise ValueError unless the tensors lie one behind the other, padded, and inside the file."""
    expected = 0
    for tensor in tensors:
        where = f"offset {data_start + tensor.offset}: tensor {tensor.name!r}"
        if tensor.offset % alignment:
            raise ValueError(f"{where} is not aligned to {alignment} bytes")
        if tensor.offset < expected:
            raise ValueError(f"{where} overlaps the tensor before it, which ends at {data_start + expected}")
        if tensor.offset > expected:
            raise ValueError(f"{where} leaves a gap, expected it at {data_start + expected}")
        end = data_start + tensor.offset + tensor.bytes
        if end > file_bytes:
            raise ValueError(f"{where} ends at {end}, but the file has {file_bytes} bytes: it is truncated")
        expected = tensor.offset + -(-tensor.bytes // alignment) * alignment


def read_header(source: Source) -> Header:
    """Return the header of a GGUF file; raises ValueError with the offset of what is wrong."""
    reader = _Reader(source)
    magic = reader.take(4, "the magic")
    if magic != MAGIC:
        raise ValueError(f"offset 0: this is no GGUF file, it starts with {magic!r}")
    version = reader.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise ValueError("offset 4: this GGUF file is big endian, only little endian is supported")
    if version not in (2, 3):
        raise ValueError(f"offset 4: this is GGUF version {version}, expected 2 or 3")
    tensor_count = reader.u64("the number of tensors")
    pair_count = reader.u64("the number of key-value pairs")
    # Smallest forms: a key of one byte with a one-byte value, and a tensor without name and dimensions.
    for count, limit, smallest, at, what in (
        (tensor_count, MAX_TENSORS, 24, 8, "tensors"),
        (pair_count, MAX_PAIRS, 14, 16, "key-value pairs"),
    ):
        if count > limit:
            raise ValueError(f"offset {at}: the header claims {count} {what}, at most {limit} are accepted")
        if count * smallest > reader.left:
            raise ValueError(f"offset {at}: the header claims {count} {what}, but {reader.left} bytes are left")
    metadata = _pairs(reader, pair_count)
    alignment = _alignment(metadata, reader.at)
    tensors: list[Tensor] = []
    names: set[str] = set()
    for index in range(tensor_count):
        start = reader.at
        tensor = _tensor(reader, index)
        if tensor.name in names:
            raise ValueError(f"offset {start}: the tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
        tensors.append(tensor)
    data_start = -(-reader.at // alignment) * alignment
    _check_layout(tensors, alignment, data_start, source.size)
    return Header(version, metadata, tuple(tensors), alignment, data_start, source.size)


@dataclass(frozen=True)
class SplitName:
    """The parts of a shard's file name; a model in one file is shard 1 of 1."""

    stem: str
    number: int
    count: int


def parse_split_name(file: str) -> SplitName | None:
    """Return stem, number (from 1) and count of a GGUF file's name, or None if it is no GGUF file."""
    match = _SPLIT_NAME.match(file)
    if match:
        return SplitName(match["stem"], int(match["number"]), int(match["count"]))
    if file.endswith(".gguf") and len(file) > len(".gguf"):
        return SplitName(file[: -len(".gguf")], 1, 1)
    return None


@dataclass(frozen=True)
class TypeSum:
    """How many tensors of one type there are, and their bytes."""

    type: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class PartSum:
    """The bytes of one part of the model; ``share`` of them is read for each generated token."""

    part: str
    bytes: int
    read_per_token: int


@dataclass(frozen=True)
class Model:
    """What the plan needs to know of a model, from the headers of all its shards.

    Counts that the header does not have are 0. ``kv_heads`` is the largest of all layers where they differ.
    ``layers`` counts those that keep a KV cache: the prediction layers (MTP) after them are not loaded by default.
    """

    architecture: str
    layers: int
    nextn_layers: int
    dense_layers: int
    context_trained: int
    embedding: int
    vocabulary: int
    feed_forward: int
    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    q_lora_rank: int
    kv_lora_rank: int
    rope_dims: int
    mla: bool
    experts: int
    experts_used: int
    experts_shared: int
    expert_feed_forward: int
    indexer_key_length: int
    split_count: int
    tensor_bytes: int
    parameters: int
    tensor_types: tuple[TypeSum, ...] = field(default=())
    parts: tuple[PartSum, ...] = field(default=())


def check_shards(shards: Sequence[tuple[str, Header]]) -> None:
    """Raise ValueError unless the named headers are one whole model in the order of its shards."""
    if not shards:
        raise ValueError("the model has no shard")
    count = len(shards)
    names: dict[str, str] = {}
    seen: dict[int, str] = {}
    for index, (file, header) in enumerate(shards):
        for key, value in header.metadata.items():
            if isinstance(value, Array) and value.type == "ARRAY":
                raise ValueError(f"{file}: {key!r:.80} is an array of arrays, which llama.cpp does not read")
        stated = header.integer("split.count")
        if (1 if stated is None or stated == 0 else stated) != count:
            raise ValueError(f"{file}: split.count is {stated or 1}, but the model has {count} shard(s)")
        number = header.integer("split.no")
        if number is None:
            if count > 1:
                raise ValueError(f"{file}: split.no is missing, though the model has {count} shards")
            number = 0
        if number in seen:
            raise ValueError(f"{file}: split.no is {number}, as in {seen[number]}")
        if number != index:
            raise ValueError(f"{file}: split.no is {number}, expected {index} from its name")
        seen[number] = file
        for tensor in header.tensors:
            if tensor.name in names:
                raise ValueError(f"{file}: the tensor {tensor.name!r} is in {names[tensor.name]} too")
            names[tensor.name] = file
            if tensor.type in _NEVER_WEIGHTS or (tensor.type in _INTEGERS and _MULTIPLIED.search(tensor.name)):
                raise ValueError(
                    f"{file}: the tensor {tensor.name!r} has the type {tensor.type}, which crashes llama.cpp; "
                    "use a file from a current converter"
                )
    for file, header in shards:
        stated = header.integer("split.tensors.count")
        if stated is not None and stated != len(names):
            raise ValueError(f"{file}: split.tensors.count is {stated}, but the shards hold {len(names)} tensors")
    if not names:
        raise ValueError(f"{shards[0][0]}: the model has no tensor")


def _number(header: Header, key: str, default: int = 0) -> int:
    """Return the integer under ``key``, the largest of an array there, or the default; negative values are refused."""
    value = header.metadata.get(key, default)
    if isinstance(value, Array):
        items = [item for item in value.items or () if isinstance(item, int)]
        value = max(items, default=default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {value!r:.80}, expected an integer")
    if not 0 <= value < 1 << 31:
        raise ValueError(f"{key} is {value}, expected 0 to {(1 << 31) - 1}")
    return value


def _part(name: str) -> str:
    """Return the part of the model that a tensor belongs to."""
    if name.startswith("token_embd"):
        return "embedding"
    if name.startswith("output."):
        return "output"
    if "_exps" in name:
        return "experts"
    if "_shexp" in name:
        return "shared_expert"
    if ".nextn." in name:
        return "prediction"
    if ".attn_" in name or ".indexer" in name:
        return "attention"
    if ".ffn_" in name:
        return "router" if "_inp" in name or "exp_probs" in name else "dense_ffn"
    return "other"


def _part_sums(tensors: Sequence[Tensor], layers: int, experts: int, used: int) -> tuple[PartSum, ...]:
    """Return bytes and bytes read per generated token of each part.

    Of the routed experts a token reads ``used`` of ``experts``; of the embedding one row, counted as nothing unless
    the output is tied to it; of the prediction layers, which are not loaded, nothing; of everything else all.
    """
    tied = not any(tensor.name.startswith("output.weight") for tensor in tensors)
    sums: dict[str, list[int]] = {}
    for tensor in tensors:
        part = _part(tensor.name)
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) >= layers:
            part = "prediction"
        read = tensor.bytes
        if part == "experts" and experts:
            read = tensor.bytes * used // experts
        elif part == "prediction" or (part == "embedding" and not tied):
            read = 0
        total = sums.setdefault(part, [0, 0])
        total[0] += tensor.bytes
        total[1] += read
    return tuple(PartSum(part, total, read) for part, (total, read) in sorted(sums.items()))


def describe_model(shards: Sequence[tuple[str, Header]]) -> Model:
    """Return what the headers of a whole model say; raises ValueError for a set that cannot be one model."""
    check_shards(shards)
    file, header = shards[0]
    architecture = header.text("general.architecture")
    if not architecture:
        raise ValueError(f"{file}: general.architecture is missing")
    if not ARCHITECTURE.fullmatch(architecture):
        raise ValueError(
            f"{file}: general.architecture is {architecture!r:.80}, expected up to 64 letters, digits and . _ -"
        )
    tensors = [tensor for _dummy, item in shards for tensor in item.tensors]

    def number(key: str, default: int = 0) -> int:
        try:
            return _number(header, f"{architecture}.{key}", default)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    blocks = number("block_count")
    nextn = number("nextn_predict_layers")
    for key, value in (("block_count", blocks), ("context_length", number("context_length"))):
        if value < 1:
            raise ValueError(f"{file}: {architecture}.{key} is missing or 0")
    if nextn >= blocks:
        raise ValueError(f"{file}: {architecture}.nextn_predict_layers is {nextn} of {blocks} layers")
    layers = blocks - nextn
    embedding = number("embedding_length")
    heads = number("attention.head_count")
    if embedding < 1 or heads < 1:
        raise ValueError(f"{file}: {architecture}.embedding_length and .attention.head_count are {embedding}, {heads}")
    names = {tensor.name for tensor in tensors}
    split = any(".attn_k_b." in name for name in names) and any(".attn_v_b." in name for name in names)
    mla = split and number("attention.key_length_mla") > 0 and number("attention.value_length_mla") > 0
    default_length = embedding // heads
    vocabulary = number("vocab_size")
    if not vocabulary:
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        vocabulary = tokens.count if isinstance(tokens, Array) else 0
    experts = number("expert_count")
    used = number("expert_used_count")
    if used > experts:
        raise ValueError(f"{file}: {architecture}.expert_used_count is {used} of {experts} experts")
    sums: dict[str, list[int]] = {}
    for tensor in tensors:
        total = sums.setdefault(tensor.type, [0, 0])
        total[0] += 1
        total[1] += tensor.bytes
    return Model(
        architecture=architecture,
        layers=layers,
        nextn_layers=nextn,
        dense_layers=number("leading_dense_block_count"),
        context_trained=number("context_length"),
        embedding=embedding,
        vocabulary=vocabulary,
        feed_forward=number("feed_forward_length"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        key_length=number("attention.key_length", default_length),
        value_length=number("attention.value_length", default_length),
        q_lora_rank=number("attention.q_lora_rank"),
        kv_lora_rank=number("attention.kv_lora_rank"),
        rope_dims=number("rope.dimension_count"),
        mla=mla,
        experts=experts,
        experts_used=used,
        experts_shared=number("expert_shared_count"),
        expert_feed_forward=number("expert_feed_forward_length"),
        indexer_key_length=number("attention.indexer.key_length"),
        split_count=len(shards),
        tensor_bytes=sum(tensor.bytes for tensor in tensors),
        parameters=sum(tensor.elements for tensor in tensors),
        tensor_types=tuple(TypeSum(kind, total, size) for kind, (total, size) in sorted(sums.items())),
        parts=_part_sums(tensors, layers, experts, used),
    )
