# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random models: shapes that fit a size, splits, and the bytes that are written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.model import random_model
from tools.model.forward import log_probabilities
from tools.model.gguf_file import read_metadata, read_shape, read_weights
from tools.model.shapes import DeepSeek2, Llama, Tensor, split

GIB = 1 << 30
TINY = DeepSeek2(
    vocabulary=300,
    layers=2,
    dense_layers=1,
    embedding=64,
    heads=2,
    q_lora=32,
    kv_lora=32,
    nope=32,
    rope=32,
    value=32,
    dense_ff=64,
    experts=4,
    experts_used=2,
    experts_shared=1,
    expert_ff=32,
    expert_scale=2.5,
    context=128,
)


@pytest.mark.parametrize("architecture", ["deepseek2", "llama"])
@pytest.mark.parametrize("gib", [0.1, 0.3, 1.0, 5.5, 20.0])
def test_the_tensors_come_near_the_size_asked_for(architecture: str, gib: float) -> None:
    size = int(gib * GIB)
    shape = random_model.fit(random_model.base_shape(architecture, size), size)
    found = sum(tensor.bytes for tensor in shape.tensors())
    assert abs(found - size) < 0.03 * size


def test_the_default_of_5_gib_routes_8_of_64_experts() -> None:
    shape = random_model.base_shape("deepseek2", int(5.5 * GIB))
    assert isinstance(shape, DeepSeek2)
    assert (shape.experts, shape.experts_used) == (64, 8)


def test_a_size_below_the_smallest_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"takes at least [0-9]+ bytes, 1000000 were asked for"):
        random_model.fit(random_model.base_shape("deepseek2", 1000000), 1000000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"layers": 27}, "27 layers are read as the lite shape", id="lite"),
        pytest.param({"dense_layers": 3}, "3 dense layers do not fit into 2", id="dense"),
        pytest.param({"experts_used": 5}, "5 of 4 experts cannot be used", id="experts"),
        pytest.param({"nope": 48}, "multiple of 32 weights, not 48", id="row"),
    ],
)
def test_a_shape_that_the_engine_cannot_read_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sum(tensor.bytes for tensor in replace(TINY, **change).tensors())  # type: ignore[arg-type]


def test_heads_that_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="4 heads cannot share 3 KV heads"):
        Llama(vocabulary=300, layers=1, embedding=64, heads=4, kv_heads=3, head=32, ff=64, context=64)


tensor_lists = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(
    lambda sizes: [Tensor(f"t{n}", (rows, 64), quantized=True) for n, rows in enumerate(sizes)]
)


@given(tensor_lists, st.data())
def test_a_split_keeps_every_tensor_in_order(tensors: list[Tensor], data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, len(tensors)))
    runs = split(tensors, shards)
    assert len(runs) == shards
    assert all(runs)
    assert [tensor for run in runs for tensor in run] == tensors


def test_a_split_is_about_even() -> None:
    runs = split([Tensor(f"t{n}", (10, 64), quantized=True) for n in range(30)], 3)
    assert [len(run) for run in runs] == [10, 10, 10]


@pytest.mark.parametrize("shards", [0, 3])
def test_a_split_into_more_than_the_tensors_is_refused(shards: int) -> None:
    with pytest.raises(ValueError, match=f"2 tensors cannot be split into {shards} shards"):
        split([Tensor("a", (1, 32), quantized=True), Tensor("b", (1, 32), quantized=True)], shards)


@pytest.mark.parametrize("size", [258, 65795])
def test_a_vocabulary_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"259 to 65794 tokens, not {size}"):
        random_model.make_vocabulary(size)


@pytest.mark.parametrize("size", [259, 8192, 65794])
def test_a_vocabulary_has_its_size_and_no_token_twice(size: int) -> None:
    vocabulary = random_model.make_vocabulary(size)
    assert len(vocabulary.tokens) == size
    assert len(set(vocabulary.tokens)) == size
    assert all(merge.replace(" ", "") in vocabulary.tokens[258:] for merge in vocabulary.merges[:50])


def test_what_is_written_can_be_read_and_computed(tmp_path: Path) -> None:
    told: list[int] = []
    paths = random_model.write(tmp_path, "tiny", TINY, 3, 7, told.append)
    assert [path.name for path in paths] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert sum(told) == sum(tensor.bytes for tensor in TINY.tensors())
    assert read_shape(paths[0]) == TINY
    weights = read_weights(paths[0])
    assert {name: value.shape for name, value in weights.items()} == {t.name: t.shape for t in TINY.tensors()}
    answers = log_probabilities(TINY, weights, [0, 5, 9])
    assert np.isfinite(answers).all()
    # Weights of the deviation 1/sqrt(row) keep the answers far from sure.
    assert answers.max() < -0.5


def test_a_model_of_one_shard_has_no_split_in_its_name(tmp_path: Path) -> None:
    (path,) = random_model.write(tmp_path, "tiny", TINY, 1, 7)
    assert path.name == "tiny.gguf"
    assert "split.count" not in read_metadata(path)


def test_scales_are_finite_and_no_weight_is_below_127(tmp_path: Path) -> None:
    (path,) = random_model.write(tmp_path, "tiny", TINY, 1, 7)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            blocks = np.array(tensor.data).reshape(-1, 34)
            scales = blocks[:, :2].copy().view(np.float16)
            assert (scales > 0).all()
            assert (scales < 1).all()
            assert blocks[:, 2:].copy().view(np.int8).min() == -127


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    first, again, other = (
        random_model.write(tmp_path / str(n), "tiny", TINY, 1, seed)[0].read_bytes() for n, seed in enumerate((7, 7, 8))
    )
    assert first == again
    assert first != other


def test_memory_is_bounded_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "PIECE_BLOCKS", 10)
    parts = list(random_model.pieces(Tensor("a.weight", (33, 32), quantized=True), 1))
    assert [len(part) for part in parts] == [340, 340, 340, 102]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        random_model.write(tmp_path, "tiny", TINY, 3, 7, stop)
    assert not list(tmp_path.iterdir())


def test_the_program_tells_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tmp_path / "status.json"
    words = ["--size-gib", "0.012", "--architecture", "llama", "--layers", "1", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["random_model", *words, "--status", str(status)])
    assert random_model.main() == 0
    report = json.loads(capsys.readouterr().out)
    assert Path(report["first_shard"]).stat().st_size == report["shards"][0]["bytes"] > report["tensor_bytes"]
    told = json.loads(status.read_text())
    assert (told["done"], told["total"], told["unit"]) == (report["tensor_bytes"], report["tensor_bytes"], "bytes")


def test_the_program_refuses_what_the_disk_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["random_model", "--size-gib", "1e7", "--output", str(tmp_path)])
    assert random_model.main() == 1
    assert "bytes free" in capsys.readouterr().err
