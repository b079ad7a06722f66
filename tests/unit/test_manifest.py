# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _manifest
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import Candidate, DirectorySource
from hypothesis import given
from hypothesis import strategies as st

from tests.support import gguf_file
from tests.unit.test_gguf import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    gguf_file.write_model(directory, "tiny", TINY.pairs(), TINY.tensors(), 3)
    return directory


def quiet(file: str, done: int, total: int) -> None:
    """Nobody looks."""


def lock(folder: Path) -> dict[str, Any]:
    manifest = _manifest.manifest_of_directory(str(folder), None, None, quiet)
    return _manifest.manifest_to_data(manifest)


def test_a_directory_becomes_a_lock_and_back(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = _manifest.manifest_of_directory(str(folder), None, None, lambda *step: told.append(step))
    files = sorted(folder.iterdir())
    assert manifest.name == "tiny"
    assert manifest.source == DirectorySource(str(folder))
    assert [shard.file for shard in manifest.shards] == [file.name for file in files]
    assert [shard.sha256 for shard in manifest.shards] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    ]
    assert manifest.bytes == sum(file.stat().st_size for file in files)
    assert told[-1] == (files[-1].name, manifest.bytes, manifest.bytes)
    assert _manifest.parse_lock(_manifest.lock_text(manifest)) == manifest


def test_a_lock_holds_the_agreed_fields(folder: Path) -> None:
    data = lock(folder)
    assert set(data) == {"schema", "name", "source", "shards", "gguf"}
    assert set(data["shards"][0]) == {"file", "bytes", "sha256"}
    assert {
        "architecture",
        "layers",
        "context_trained",
        "embedding",
        "heads",
        "kv_heads",
        "key_length",
        "value_length",
        "kv_lora_rank",
        "rope_dims",
        "mla",
        "experts",
        "experts_used",
        "split_count",
        "tensor_types",
        "tensor_bytes",
        "parameters",
    } <= set(data["gguf"])
    assert data["gguf"]["tensor_types"][1] == {"type": "Q8_0", "tensors": 35, "bytes": 831232}


def without(path: str) -> Any:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        *parents, last = path.split(".")
        for part in parents:
            place = place[int(part)] if part.isdigit() else place[part]
        del place[last]

    return change


def put(path: str, value: Any) -> Any:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        *parents, last = path.split(".")
        for part in parents:
            place = place[int(part)] if part.isdigit() else place[part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("schema"), "schema: missing, expected int"),
        (put("schema", 2), "schema: found 2, expected 1: write the lock anew"),
        (put("schema", True), "schema: found True, expected int"),
        (put("name", "../x"), "name: found '../x', expected letters"),
        (put("shards", []), "shards: found none, expected at least one"),
        (put("shards", {}), "shards: found {}, expected list"),
        (put("shards.0.file", "/etc/x.gguf"), "shards[0].file: found '/etc/x.gguf'"),
        (put("shards.1.file", "tiny-00003-of-00003.gguf"), "expected shard 2 of 3 there"),
        (put("shards.1.file", "tiny-00001-of-00003.gguf"), "shards[1].file: 'tiny-00001-of-00003.gguf' is there twice"),
        (put("shards.2.bytes", 0), "shards[2].bytes: found 0, expected at least 1"),
        (put("shards.2.bytes", "9"), "shards[2].bytes: found '9', expected int"),
        (put("shards.0.sha256", "abc"), "shards[0].sha256: found 'abc', expected 64 hexadecimal digits"),
        (put("source", {"type": "ftp"}), "source.type: found 'ftp', expected hub or directory"),
        (put("source", {"type": "directory", "path": "x"}), "source.path: found 'x', expected an absolute path"),
        (
            put("source", {"type": "directory", "path": "/x\n"}),
            r"source.path: found '/x\n', expected an absolute path",
        ),
        (
            put("source", {"type": "hub", "endpoint": "ftp://x", "repo": "a/b", "commit": "0" * 40}),
            "source.endpoint: found 'ftp://x'",
        ),
        (
            put("source", {"type": "hub", "endpoint": "https://x", "repo": "a", "commit": "0" * 40}),
            "source.repo: found 'a', expected organisation/name",
        ),
        (
            put("source", {"type": "hub", "endpoint": "https://x", "repo": "a/b", "commit": "main"}),
            "source.commit: found 'main', expected 40 hexadecimal digits",
        ),
        (
            put("source", {"type": "hub", "endpoint": "https://x", "repo": "a/b", "commit": "0" * 40, "prefix": "../"}),
            "prefix: found '../', expected a folder within the repository",
        ),
        (without("gguf.layers"), "gguf.layers: missing, expected int"),
        (put("gguf.layers", 0), "gguf.layers: found 0, expected at least 1"),
        (put("gguf.mla", 1), "gguf.mla: found 1, expected bool"),
        (put("gguf.split_count", 2), "gguf.split_count: found 2, expected the number of shards, 3"),
        (put("gguf.kv_lora_rank", 0), "expected both for a model with MLA"),
        (put("gguf.tensor_bytes", 1 << 60), "expected at most the sum of the shards"),
        (put("gguf.tensor_types", [{"type": "Q8_0"}]), "gguf.tensor_types[0].tensors: missing"),
        (put("gguf.layers", 10**400), "gguf.layers: found 1000"),
        (put("gguf.architecture", ""), "gguf.architecture: found '', expected up to 64 letters"),
        (put("gguf.architecture", "a\x1b[2J"), r"gguf.architecture: found 'a\x1b[2J', expected up to 64 letters"),
        (
            put("source", {"type": "hub", "endpoint": "https://x", "repo": "a/b", "commit": "0" * 40, "prefix": {}}),
            "source.prefix: found {}, expected str",
        ),
    ],
)
def test_damaged_locks_are_refused_by_field(change: Any, message: str, folder: Path) -> None:
    data = copy.deepcopy(lock(folder))
    change(data)
    with pytest.raises(ValueError, match=r".") as caught:
        _manifest.parse_manifest(data)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100000])
def test_texts_that_are_no_lock(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        _manifest.parse_lock(text)


def test_many_shards_cost_no_time(folder: Path) -> None:
    data = lock(folder)
    row = data["shards"][0]
    data["shards"] = [{**row, "file": f"m-{number:05}-of-20000.gguf"} for number in range(1, 20001)]
    data["gguf"]["split_count"] = 20000
    start = time.process_time()
    assert len(_manifest.parse_manifest(data).shards) == 20000
    assert time.process_time() - start < 2


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["schema", "name", "source", "shards", "gguf", "type", "file", "bytes"]),
                inner,
                max_size=6,
            )
        ),
        max_leaves=20,
    )
)
def test_random_data_raises_nothing_but_value_errors(data: Any) -> None:
    if isinstance(data, dict):
        data["schema"] = 1
    with pytest.raises(ValueError, match=r"."):
        _manifest.parse_manifest(json.loads(json.dumps(data)))


# --- Which files are the model --------------------------------------------------------------------------------------


def files(*paths: str) -> list[Candidate]:
    return [Candidate(path, 1, None) for path in paths]


def series(stem: str, count: int, *numbers: int) -> list[Candidate]:
    return files(*(f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in numbers))


def test_choose_the_shards_of_a_folder_in_order() -> None:
    found = _manifest.choose_shards([*series("Q8/R1", 3, 3, 1, 2), *series("Q4/R1", 1, 1), *files("README.md")], "Q8/*")
    assert found[:2] == ("R1", "Q8/")
    assert [file.path[-8:-5] for file in found[2]] == ["003", "003", "003"]
    assert [file.path[6:11] for file in found[2]] == ["00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("given_files", "pattern", "message"),
    [
        pytest.param(files("a.txt"), None, "found no GGUF file among 1 files", id="none"),
        pytest.param(files("a.gguf"), "b*", "among 1 files that match 'b*'", id="pattern"),
        pytest.param(
            files("a.gguf", "b.gguf"), None, "found 2 models, expected one; narrow the pattern: a, b", id="two"
        ),
        pytest.param(series("a", 3, 1, 3), None, "a: of 3 shards [2] missing", id="missing"),
        pytest.param([*series("a", 2, 1, 2), *series("a", 2, 2)], None, "a: of 2 shards [2] twice", id="twice"),
        pytest.param([*series("a", 2, 1, 2), *series("a", 3, 1)], None, "shards of 2 and of 3", id="counts"),
        pytest.param(series("a", 2, 1, 2, 3), None, "a: of 2 shards [3] beyond the count", id="beyond"),
        pytest.param(series("a", 99999, 1), None, "found 1 shards, expected 99999", id="huge-count"),
        pytest.param(series("a", 0, 1), None, "a: of 0 shards [1] beyond the count", id="zero-count"),
        pytest.param(series("a", 2, 0, 1, 2), None, "a: of 2 shards [0] beyond the count", id="zero-number"),
        pytest.param(series("a\x1b[2J", 2, 1), None, "a?[2J: of 2 shards [2] missing", id="escapes"),
        pytest.param(files("a\n.gguf", "b.gguf"), None, "narrow the pattern: a?, b", id="two-with-escapes"),
    ],
)
def test_no_choice(given_files: list[Candidate], pattern: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        _manifest.choose_shards(given_files, pattern)
    assert message in str(caught.value)


def renamed(numbers: dict[int, int], count: int) -> Any:
    """Return a change that keeps these of three shards, old number to new, under names of ``count``."""

    def change(folder: Path) -> None:
        shards = {number: folder / f"tiny-{number:05d}-of-00003.gguf" for number in (1, 2, 3)}
        data = {number: path.read_bytes() for number, path in shards.items()}
        for path in shards.values():
            path.unlink()
        for old, new in numbers.items():
            (folder / f"tiny-{new:05d}-of-{count:05d}.gguf").write_bytes(data[old])

    return change


def other_shard(folder: Path) -> None:
    """Put the last shard of a model with one more layer in the place of this one's."""
    other = dataclasses.replace(TINY, layers=4)
    (folder / "other").mkdir()
    *_rest, last = gguf_file.write_model(folder / "other", "tiny", other.pairs(), other.tensors(), 3)
    last.replace(folder / last.name)


def wide_router(folder: Path) -> None:
    """Write the model again with a router in F64."""
    tensors = [
        dataclasses.replace(tensor, type="F64") if tensor.name == "blk.2.ffn_gate_inp.weight" else tensor
        for tensor in TINY.tensors()
    ]
    gguf_file.write_model(folder, "tiny", TINY.pairs(), tensors, 3)


def absurd_count(folder: Path) -> None:
    """Make the second shard claim 2**40 tensors."""
    with (folder / "tiny-00002-of-00003.gguf").open("r+b") as stream:
        stream.seek(8)
        stream.write((1 << 40).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            renamed({1: 1, 2: 2}, 2),
            "tiny-00001-of-00002.gguf: split.count is 3, but the model has 2 shard(s)",
            id="count-in-names",
        ),
        pytest.param(
            renamed({1: 1}, 1),
            "tiny-00001-of-00001.gguf: split.count is 3, but the model has 1 shard(s)",
            id="first-alone",
        ),
        pytest.param(
            renamed({1: 2, 2: 1, 3: 3}, 3),
            "tiny-00001-of-00003.gguf: split.no is 1, expected 0 from its name",
            id="swapped",
        ),
        pytest.param(renamed({1: 1, 2: 2}, 3), "tiny: of 3 shards [3] missing", id="missing"),
        pytest.param(
            lambda folder: shutil.copy(folder / "tiny-00001-of-00003.gguf", folder / "tiny-00002-of-00003.gguf"),
            "tiny-00002-of-00003.gguf: split.no is 0, as in tiny-00001-of-00003.gguf",
            id="duplicate",
        ),
        pytest.param(other_shard, "split.tensors.count is", id="shard-of-another-model"),
        pytest.param(
            wide_router,
            "the tensor 'blk.2.ffn_gate_inp.weight' has the type F64, which crashes llama.cpp",
            id="f64-router",
        ),
        pytest.param(
            absurd_count,
            "tiny-00002-of-00003.gguf: offset 8: the header claims 1099511627776 tensors, at most 65536 are accepted",
            id="absurd-count",
        ),
    ],
)
def test_files_that_contradict_their_headers(change: Any, message: str, folder: Path) -> None:
    change(folder)
    told: list[Any] = []
    with pytest.raises(ValueError, match=r".") as caught:
        _manifest.manifest_of_directory(str(folder), None, None, lambda *step: told.append(step))
    assert message in str(caught.value)
    assert told == []


def test_a_broken_model_is_refused_before_it_is_hashed(folder: Path) -> None:
    last = sorted(folder.iterdir())[-1]
    with last.open("r+b") as stream:
        stream.truncate(last.stat().st_size - 1)
    told: list[Any] = []
    with pytest.raises(ValueError, match=r"tiny-00003-of-00003.gguf: offset \d+: .* it is truncated"):
        _manifest.manifest_of_directory(str(folder), None, None, lambda *step: told.append(step))
    assert told == []


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    last = sorted(folder.iterdir())[-1]

    def grow(file: str, done: int, total: int) -> None:
        if file == "tiny-00001-of-00003.gguf":
            with last.open("ab") as stream:
                stream.write(b"x")

    with pytest.raises(ValueError, match="it changes while read"):
        _manifest.manifest_of_directory(str(folder), None, None, grow)
