# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses
import importlib
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _gguf
from ansible_collections.cpullm.epyc.plugins.module_utils._gguf import Array, BytesSource, FileSource, Header
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import gguf_file
from tests.support.gguf_file import DeepSeek, TensorShape, header_bytes, pair, string

RECITE = Path(__file__).resolve().parents[1] / "models" / "recite"
TINY = DeepSeek(
    layers=3,
    dense_layers=1,
    context=4096,
    embedding=128,
    vocabulary=512,
    heads=4,
    q_lora=64,
    kv_lora=64,
    nope=32,
    rope=32,
    value=32,
    dense_ff=64,
    experts=16,
    experts_used=2,
    expert_ff=32,
)


def read(data: bytes, size: int | None = None) -> Header:
    return _gguf.read_header(BytesSource(data, size))


def raw(tensors: int = 0, pairs: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def tensor(name: str, dims: tuple[int, ...], number: int, offset: int) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", dim) for dim in dims)
        + struct.pack("<IQ", number, offset)
    )


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(version: int) -> None:
    pairs: list[tuple[str, str, Any]] = [
        ("a.u8", "UINT8", 200),
        ("a.i8", "INT8", -3),
        ("a.u16", "UINT16", 60000),
        ("a.i16", "INT16", -30000),
        ("a.u32", "UINT32", 1 << 31),
        ("a.i32", "INT32", -7),
        ("a.f32", "FLOAT32", 0.5),
        ("a.bool", "BOOL", 1),
        ("a.text", "STRING", "grüße"),
        ("a.u64", "UINT64", 1 << 63),
        ("a.i64", "INT64", -(1 << 62)),
        ("a.f64", "FLOAT64", 1e300),
        ("a.list", "[INT32]", [1, -2, 3]),
        ("a.texts", "[STRING]", ["x", "", "yz"]),
        ("a.empty", "[UINT8]", []),
        ("a.nested", "[[INT32]]", [[1, 2], [3]]),
    ]
    data, size = header_bytes(pairs, [TensorShape("t", (32, 2))], version=version)
    header = read(data, size)
    assert {key: header.metadata[key] for key, _, value in pairs if not isinstance(value, list)} == {
        key: value for key, _, value in pairs if not isinstance(value, list)
    }
    assert header.metadata["a.list"] == Array("INT32", 3, (1, -2, 3))
    assert header.metadata["a.texts"] == Array("STRING", 3, ("x", "", "yz"))
    assert header.metadata["a.empty"] == Array("UINT8", 0, ())
    assert header.metadata["a.nested"] == Array("ARRAY", 2, None)
    assert header.version == version
    assert header.tensors[0].bytes == 68
    assert header.data_start % 32 == 0
    assert header.file_bytes == header.data_start + 68


def test_types_agree_with_the_reference_writer() -> None:
    constants = importlib.import_module("gguf.constants")
    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in constants.GGML_QUANT_SIZES.items()}
    ours = {number: _gguf.TENSOR_TYPES.get(number) for number in theirs}
    # The writer's table has it with two F32 factors; block_q8_1 has two F16, and no file holds the type.
    del theirs[9], ours[9]
    assert ours == theirs


def test_a_vocabulary_is_walked_and_not_kept(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(129280)]
    merges = [f"a{number} b" for number in range(127000)]
    pairs: list[tuple[str, str, Any]] = [
        ("general.architecture", "STRING", "x"),
        ("tokenizer.ggml.tokens", "[STRING]", tokens),
        ("tokenizer.ggml.token_type", "[INT32]", [1] * len(tokens)),
        ("tokenizer.ggml.merges", "[STRING]", merges),
        ("after", "UINT32", 42),
    ]
    path = tmp_path / "vocabulary.gguf"
    gguf_file.write(path, pairs, [TensorShape("t", (32,))])
    del tokens, merges
    tracemalloc.start()
    start = time.process_time()
    header = _gguf.read_header(FileSource(str(path)))
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.metadata["tokenizer.ggml.tokens"] == Array("STRING", 129280, None)
    assert header.metadata["tokenizer.ggml.token_type"] == Array("INT32", 129280, None)
    assert header.metadata["after"] == 42
    assert peak < 24 << 20
    assert seconds < 10


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        pytest.param(b"", None, "offset 0: the magic needs 4 bytes, but the file has 0 left", id="empty"),
        pytest.param(b"GGML" + bytes(20), None, "offset 0: this is no GGUF file, it starts with b'GGML'", id="magic"),
        pytest.param(raw(version=1), None, "offset 4: this is GGUF version 1, expected 2 or 3", id="version-1"),
        pytest.param(raw(version=4), None, "offset 4: this is GGUF version 4, expected 2 or 3", id="version-4"),
        pytest.param(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), None, "big endian", id="big-endian"),
        pytest.param(raw(tensors=1 << 40), None, "offset 8: the header claims 1099511627776 tensors", id="tensors"),
        pytest.param(raw(tensors=9), None, "offset 8: the header claims 9 tensors, but 0 bytes are left", id="few"),
        pytest.param(raw(pairs=1 << 63), None, "offset 16: the header claims 9223372036854775808 key", id="pairs"),
        pytest.param(
            raw(pairs=1, body=struct.pack("<Q", 1 << 62) + bytes(20)), None, "key 0 has 4611686018427387904", id="key"
        ),
        pytest.param(raw(pairs=1, body=string("") + bytes(20)), None, "key 0 is empty", id="empty-key"),
        pytest.param(raw(pairs=1, body=string(b"\xff\xfe") + bytes(20)), None, "key 0 is not UTF-8", id="key-utf8"),
        pytest.param(
            raw(pairs=2, body=pair("a", "UINT64", 1) * 2), None, "offset 45: the key 'a' is there twice", id="twice"
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<IQ", 13, 0)), None, "unknown value type 13", id="value-type"
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<IQQ", 8, 1 << 30, 0)), None, "at most 1048576", id="string"
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<IQ", 8, 100) + b"abc"),
            None,
            "the file has 3 left",
            id="short",
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<IIQ", 9, 8, 1 << 61)), None, "claims 23058", id="array"
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<IIQ", 9, 0, 1 << 63)), None, "claims 922337", id="array-u8"
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6 + bytes(64)),
            None,
            "nests arrays more than 4 deep",
            id="deep",
        ),
        pytest.param(
            raw(pairs=1, body=string("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1 << 20) + bytes(20 << 20)),
            None,
            "above 2097152 array items",
            id="many-arrays",
        ),
        pytest.param(
            raw(pairs=1, body=string("k" * 60000) + struct.pack("<I", 99)), None, "unknown value type 99", id="long-key"
        ),
        pytest.param(
            raw(pairs=1, body=string("abc") + struct.pack("<IB", 7, 2)), None, "a boolean of value 2", id="boolean"
        ),
        pytest.param(
            raw(pairs=1, body=pair("general.alignment", "UINT32", 24)), None, "alignment is 24", id="alignment"
        ),
        pytest.param(
            raw(pairs=1, body=pair("general.alignment", "STRING", "8")), None, "expected a power of two", id="text"
        ),
        pytest.param(
            raw(1, 0, tensor("t" * 64, (32,), 0, 0)), None, "has 64 bytes, at most 63 are accepted", id="name"
        ),
        pytest.param(raw(1, 0, tensor("t", (1,) * 5, 0, 0)), None, "has 5 dimensions", id="dimensions"),
        pytest.param(
            raw(1, 0, tensor("t", (1 << 40, 1 << 40), 0, 0)), None, "more elements than can be counted", id="elements"
        ),
        pytest.param(raw(1, 0, tensor("t", (32,), 4, 0)), None, "unknown type 4", id="removed-type"),
        pytest.param(raw(1, 0, tensor("t", (32,), 999, 0)), None, "unknown type 999", id="unknown-type"),
        pytest.param(raw(1, 0, tensor("t", (33,), 8, 0)), None, "rows of 33, expected a multiple of 32", id="row"),
        pytest.param(raw(2, 0, tensor("t", (32,), 0, 0) * 2), 4096, "the tensor 't' is there twice", id="same-tensor"),
        pytest.param(raw(1, 0, tensor("t", (32,), 0, 7)), 4096, "is not aligned to 32 bytes", id="unaligned"),
        pytest.param(
            raw(2, 0, tensor("t", (64,), 0, 0) + tensor("u", (64,), 0, 128)), 4096, "overlaps the tensor", id="overlap"
        ),
        pytest.param(raw(2, 0, tensor("t", (8,), 0, 0) + tensor("u", (8,), 0, 64)), 4096, "leaves a gap", id="gap"),
        pytest.param(
            raw(1, 0, tensor("t", (1 << 20,), 0, 0)), 4096, "but the file has 4096 bytes: it is truncated", id="cut"
        ),
        pytest.param(raw(1, 0, tensor("t", (32,), 0, 0))[:40], 4096, "the data ends here", id="source-ends"),
    ],
)
def test_refused(data: bytes, size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match="offset") as caught:
        read(data, size)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_hostile_array_costs_no_time() -> None:
    data = raw(pairs=1, body=string("a") + struct.pack("<IIQ", 9, 8, 2_000_000) + bytes(16_000_000))
    start = time.process_time()
    header = read(data)
    assert time.process_time() - start < 10
    assert header.metadata["a"] == Array("STRING", 2_000_000, None)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 4), st.integers(0, 6), st.integers(0, 1 << 40))
def test_random_bodies_raise_nothing_but_value_errors(body: bytes, tensors: int, pairs: int, size: int) -> None:
    try:
        read(raw(tensors, pairs, body), size)
    except ValueError as error:
        assert "offset" in str(error)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 8))
def test_flipped_bytes_raise_nothing_but_value_errors(seed: int, flips: int) -> None:
    data, size = header_bytes(TINY.pairs(), TINY.tensors())
    spoiled = bytearray(data)
    source = random.Random(seed)
    for _ in range(flips):
        spoiled[source.randrange(len(spoiled))] = source.randrange(256)
    try:
        _gguf.describe_model([("a.gguf", read(bytes(spoiled), size))])
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("cut", range(0, 3000, 97))
def test_every_cut_is_an_error(cut: int) -> None:
    data, size = header_bytes(TINY.pairs(), TINY.tensors())
    with pytest.raises(ValueError, match="offset"):
        read(data[: min(cut, len(data) - 1)], size)


# --- Shards and models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("R1-00002-of-00016.gguf", ("R1", 2, 16)),
        ("plain.gguf", ("plain", 1, 1)),
        ("R1-2-of-16.gguf", ("R1-2-of-16", 1, 1)),
        (".gguf", None),
        ("R1.safetensors", None),
    ],
)
def test_parse_split_name(file: str, split: tuple[str, int, int] | None) -> None:
    found = _gguf.parse_split_name(file)
    assert (None if found is None else (found.stem, found.number, found.count)) == split


def shards(model: DeepSeek = TINY, count: int = 3) -> list[tuple[str, Header]]:
    parts = gguf_file.split(model.pairs(), model.tensors(), count)
    return [(f"m-{number}.gguf", gguf_file.header(*part)) for number, part in enumerate(parts, 1)]


def changed(header: Header, **metadata: Any) -> Header:
    known = dict(header.metadata)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        known.pop(name, None)
        if value is not None:
            known[name] = value
    return dataclasses.replace(header, metadata=known)


def test_deepseek_r1_is_described_with_the_published_numbers() -> None:
    model = _gguf.describe_model(shards(DeepSeek(), 16))
    assert model.parameters == 671_026_419_200
    assert round(model.tensor_bytes / (1 << 30), 3) == 664.295
    assert (model.layers, model.heads, model.experts, model.experts_used) == (61, 128, 256, 8)
    assert (model.mla, model.kv_lora_rank, model.rope_dims, model.context_trained) == (True, 512, 64, 163840)
    read_gb = {part.part: round(part.read_per_token / 1e9, 2) for part in model.parts}
    assert read_gb == {
        "attention": 12.13,
        "dense_ffn": 1.27,
        "embedding": 0.0,
        "experts": 21.71,
        "other": 0.0,
        "output": 0.98,
        "router": 0.43,
        "shared_expert": 2.71,
    }
    assert round(sum(part.read_per_token for part in model.parts) / 1e9, 2) == 39.23


def test_without_mla_tensors_there_is_no_mla() -> None:
    model = _gguf.describe_model(shards(DeepSeek(mla=False), 2))
    assert not model.mla
    assert (model.kv_heads, model.key_length, model.value_length) == (128, 192, 128)


def test_mla_tensors_without_the_metadata_are_no_mla() -> None:
    rows = shards()
    rows[0] = (rows[0][0], changed(rows[0][1], deepseek2__attention__key_length_mla=None))
    assert not _gguf.describe_model(rows).mla


def test_prediction_layers_keep_no_cache_and_are_not_read() -> None:
    rows = shards()
    rows[0] = (rows[0][0], changed(rows[0][1], deepseek2__nextn_predict_layers=1))
    model = _gguf.describe_model(rows)
    assert (model.layers, model.nextn_layers) == (2, 1)
    parts = {part.part: part for part in model.parts}
    assert parts["prediction"].bytes > 0
    assert parts["prediction"].read_per_token == 0


def test_heads_that_differ_between_layers_count_as_the_most() -> None:
    rows = shards()
    rows[0] = (rows[0][0], changed(rows[0][1], deepseek2__attention__head_count_kv=Array("UINT32", 3, (1, 4, 2))))
    assert _gguf.describe_model(rows).kv_heads == 4


def edit(position: int, **metadata: Any) -> list[tuple[str, Header]]:
    rows = shards()
    rows[position] = (rows[position][0], changed(rows[position][1], **metadata))
    return rows


def with_tensor(name: str, kind: str) -> list[tuple[str, Header]]:
    rows = shards()
    last = rows[-1][1]
    rows[-1] = (
        rows[-1][0],
        dataclasses.replace(last, tensors=(*last.tensors, _gguf.Tensor(name, (32,), kind, 0, 0, 32))),
    )
    rows[0] = (rows[0][0], changed(rows[0][1], split__tensors__count=None))
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([], "the model has no shard", id="none"),
        pytest.param(shards()[:2], "m-1.gguf: split.count is 3, but the model has 2 shard(s)", id="missing"),
        pytest.param([shards()[0]] * 3, "m-1.gguf: split.no is 0, as in m-1.gguf", id="duplicate"),
        pytest.param(shards()[::-1], "m-3.gguf: split.no is 2, expected 0 from its name", id="order"),
        pytest.param(edit(1, split__count=4), "m-2.gguf: split.count is 4", id="count"),
        pytest.param(edit(1, split__no=None), "m-2.gguf: split.no is missing", id="number"),
        pytest.param(edit(0, split__tensors__count=9), "split.tensors.count is 9, but the shards hold", id="tensors"),
        pytest.param(edit(2, split__tensors__count=9), "m-3.gguf: split.tensors.count is 9", id="tensors-of-another"),
        pytest.param(edit(0, general__architecture=None), "general.architecture is missing", id="architecture"),
        pytest.param(edit(0, general__architecture="a\x1b[2J"), r"architecture is 'a\x1b[2J', exp", id="terminal"),
        pytest.param(edit(0, general__architecture="a" * 65), "expected up to 64 letters", id="long-architecture"),
        pytest.param(edit(0, deepseek2__block_count=0), "block_count is missing or 0", id="layers"),
        pytest.param(edit(0, deepseek2__block_count=-1), "block_count is -1, expected 0 to", id="negative"),
        pytest.param(edit(0, deepseek2__context_length="x"), "context_length is 'x', expected an integer", id="type"),
        pytest.param(edit(0, deepseek2__expert_used_count=17), "expert_used_count is 17 of 16", id="experts"),
        pytest.param(edit(0, deepseek2__nextn_predict_layers=3), "nextn_predict_layers is 3 of 3", id="nextn"),
        pytest.param(edit(0, x=Array("ARRAY", 1, None)), "array of arrays, which llama.cpp does not read", id="nested"),
        pytest.param(with_tensor("blk.1.ffn_gate_inp.weight2", "F64"), "has the type F64, which crashes", id="f64"),
        pytest.param(with_tensor("blk.9.ffn_gate_inp.weight", "I32"), "has the type I32, which crashes", id="i32"),
        pytest.param(with_tensor("output_norm.weight", "F32"), "is in m-3.gguf too", id="tensor-twice"),
    ],
)
def test_sets_that_are_no_model(rows: list[tuple[str, Header]], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        _gguf.describe_model(rows)
    assert message in str(caught.value)


def test_the_trained_model() -> None:
    files = sorted(RECITE.glob("*.gguf"))
    model = _gguf.describe_model([(file.name, _gguf.read_header(FileSource(str(file)))) for file in files])
    assert (model.architecture, model.mla, model.split_count) == ("deepseek2", True, len(files))
    reader = importlib.import_module("gguf").GGUFReader
    theirs = {item.name: (item.tensor_type.name, int(item.n_bytes)) for file in files for item in reader(file).tensors}
    ours = {
        item.name: (item.type, item.bytes)
        for file in files
        for item in _gguf.read_header(FileSource(str(file))).tensors
    }
    assert ours == theirs
