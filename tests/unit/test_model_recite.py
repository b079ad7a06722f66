# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reciting model as committed: its files, its metadata, its reference, and what its reference can tell."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tools.model.damage import damage
from tools.model.forward import before_ffn, log_probabilities
from tools.model.gguf_file import read_metadata, read_shape, read_weights, shard_paths
from tools.model.random_model import byte_symbols

DIRECTORY = Path(__file__).resolve().parents[1] / "models" / "recite"
FIRST = DIRECTORY / "recite-00001-of-00003.gguf"
# What a fault must reach somewhere in the text, against a tolerance of 0.1 and the engine's own 0.03.
SEEN = 0.25


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads((DIRECTORY / "reference.json").read_text(encoding="utf-8"))


def find_case(reference: dict[str, Any], name: str) -> dict[str, Any]:
    return next(case for case in reference["cases"] if case["name"] == name)


def difference(case: dict[str, Any], first: Path, tokens: int | None = None, gating: str = "sigmoid") -> float:
    """Return the largest difference of a log-probability from the reference, over the first `tokens` answers."""
    wanted = case["tokens"][:tokens]
    ids = case["prompt_tokens"] + wanted
    found = log_probabilities(read_shape(first), read_weights(first), ids[:-1], gating)[-len(wanted) :]
    return float(np.abs(found[range(len(wanted)), wanted] - case["logprobs"][: len(wanted)]).max())


def test_the_files_are_those_of_the_checksums() -> None:
    sums = dict(line.split()[::-1] for line in (DIRECTORY / "SHA256SUMS").read_text().splitlines())
    assert {path.name for path in DIRECTORY.iterdir()} == sums.keys() | {"SHA256SUMS", "README.md"}
    assert {name: hashlib.sha256((DIRECTORY / name).read_bytes()).hexdigest() for name in sums} == sums


def test_the_shards_are_small_and_complete() -> None:
    paths = shard_paths(FIRST)
    assert len(paths) == 3
    assert sum(path.stat().st_size for path in paths) < 8_000_000
    parts = [read_metadata(path) for path in paths]
    assert [part["split.no"] for part in parts] == [0, 1, 2]
    assert {part["split.count"] for part in parts} == {3}
    assert {part["split.tensors.count"] for part in parts} == {len(read_shape(FIRST).tensors())}


def test_the_metadata_is_that_of_deepseek_with_mla() -> None:
    found = read_metadata(FIRST)
    expected = {
        "general.architecture": "deepseek2",
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.attention.head_count_kv": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["tokenizer.chat_template"]


def test_the_tensors_are_those_of_the_shape_in_rows_of_whole_blocks() -> None:
    found = {tensor.name: tensor for path in shard_paths(FIRST) for tensor in gguf.GGUFReader(path).tensors}
    wanted = {tensor.name: tensor for tensor in read_shape(FIRST).tensors()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tuple(int(n) for n in tensor.shape[::-1]) == wanted[name].shape
        quantized = tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert quantized == wanted[name].quantized
        assert not quantized or tensor.shape[0] % 32 == 0
    assert {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"} <= found.keys()


def test_the_reference_tells_the_text(reference: dict[str, Any]) -> None:
    text = (DIRECTORY / "text.txt").read_text(encoding="utf-8")
    names = read_metadata(FIRST)["tokenizer.ggml.tokens"]
    symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    for case in reference["cases"]:
        assert case["prompt"] + case["text"] in text
        assert len(case["tokens"]) == len(case["logprobs"])
        assert all(value <= 0 for value in case["logprobs"])
        spoken = [names[token] for token in case["tokens"] if token != 1]
        assert bytes(symbols[symbol] for name in spoken for symbol in name).decode() == case["text"]
        assert case["prompt_tokens"][0] == 0
    assert find_case(reference, "whole")["tokens"][-1] == 1
    assert text == find_case(reference, "whole")["prompt"] + find_case(reference, "whole")["text"]
    assert reference["chat"]["content"] == find_case(reference, "opening")["text"]


@pytest.mark.parametrize("name", ["opening", "truths", "whole"])
def test_numpy_comes_to_the_reference_of_transformers(reference: dict[str, Any], name: str) -> None:
    assert difference(find_case(reference, name), FIRST) < 0.002


@pytest.mark.parametrize("name", ["opening", "truths"])
def test_a_wrong_gate_shows_within_the_shortest_cases(reference: dict[str, Any], name: str) -> None:
    assert difference(find_case(reference, name), FIRST, gating="softmax") > SEEN


def test_every_lost_expert_shows(reference: dict[str, Any]) -> None:
    shape, weights, case = read_shape(FIRST), read_weights(FIRST), find_case(reference, "whole")
    ids = case["prompt_tokens"] + case["tokens"][:-1]
    unseen = []
    for layer in range(shape.dense_layers, shape.layers):
        name = f"blk.{layer}.ffn_down_exps.weight"
        resume = (layer, before_ffn(shape, weights, ids, layer))
        for expert in range(shape.experts):
            changed = weights[name].copy()
            changed[expert] = 0
            found = log_probabilities(shape, {**weights, name: changed}, ids, resume=resume)[-len(case["tokens"]) :]
            worst = np.abs(found[range(len(case["tokens"])), case["tokens"]] - case["logprobs"]).max()
            if worst < SEEN:
                unseen.append((layer, expert, float(worst)))
    assert not unseen


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        pytest.param("expert:1:3", SEEN, id="expert"),
        pytest.param("scale:1.0", SEEN, id="scale"),
        pytest.param("bias", 0.1, id="selection-bias"),
    ],
)
def test_a_damaged_copy_shows(reference: dict[str, Any], tmp_path: Path, fault: str, least: float) -> None:
    assert difference(find_case(reference, "whole"), damage(FIRST, tmp_path, fault)) > least


def test_a_copy_with_another_gate_says_so(tmp_path: Path) -> None:
    copy = damage(FIRST, tmp_path, "gating:softmax")
    before, after = read_metadata(FIRST), read_metadata(copy)
    assert after["deepseek2.expert_gating_func"] == gguf.ExpertGatingFuncType.SOFTMAX
    assert {key for key in before if before[key] != after[key]} == {"deepseek2.expert_gating_func"}


def test_a_flipped_bit_shows_in_no_answer(reference: dict[str, Any], tmp_path: Path) -> None:
    copy = damage(FIRST, tmp_path, "bit")
    assert sum(a.read_bytes() != b.read_bytes() for a, b in zip(shard_paths(FIRST), shard_paths(copy))) == 1
    assert difference(find_case(reference, "opening"), copy) < reference["tolerance"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("gating:sigmoid", "unknown fault", id="no-such-gate"),
        pytest.param("expert:0:1", "no tensor blk.0.ffn_down_exps.weight", id="dense-layer"),
        pytest.param("expert:1:99", "has 16 experts, there is no number 99", id="no-such-expert"),
    ],
)
def test_damage_refuses(tmp_path: Path, fault: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        damage(FIRST, tmp_path, fault)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    copy = damage(FIRST, tmp_path, "bit")
    (tmp_path / "recite-00002-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match=r"2 shards of .* found, expected 3"):
        read_weights(copy)


def test_another_shape_comes_to_another_answer(reference: dict[str, Any]) -> None:
    case, shape = find_case(reference, "opening"), read_shape(FIRST)
    ids = case["prompt_tokens"] + case["tokens"][:-1]
    found = log_probabilities(replace(shape, rope_base=1000.0), read_weights(FIRST), ids)[-len(case["tokens"]) :]
    assert np.abs(found[range(len(case["tokens"])), case["tokens"]] - case["logprobs"]).max() > SEEN
