"""Fewer files made of shards: the same tensors to the byte, and of the former split no trace."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader

from tools.model.merge import merge

SHARDS = sorted((Path(__file__).resolve().parents[1] / "models" / "recite").glob("*.gguf"))


def test_the_merged_file_holds_the_shards_tensors(tmp_path):
    merge(SHARDS, tmp_path / "one.gguf")
    whole = GGUFReader(tmp_path / "one.gguf")
    assert not [name for name in whole.fields if name.startswith("split.")]
    parts = [tensor for shard in SHARDS for tensor in GGUFReader(shard).tensors]
    assert [tensor.name for tensor in whole.tensors] == [tensor.name for tensor in parts]
    for ours, theirs in zip(whole.tensors, parts):
        assert ours.tensor_type == theirs.tensor_type
        assert ours.data.tobytes() == theirs.data.tobytes()


def test_two_files_name_their_split(tmp_path):
    merge(SHARDS, tmp_path / "fewer.gguf", files=2)
    files = [GGUFReader(tmp_path / f"fewer-0000{number}-of-00002.gguf") for number in (1, 2)]
    parts = [tensor for shard in SHARDS for tensor in GGUFReader(shard).tensors]
    assert [file.fields["split.no"].contents() for file in files] == [0, 1]
    assert [file.fields["split.count"].contents() for file in files] == [2, 2]
    assert {file.fields["split.tensors.count"].contents() for file in files} == {len(parts)}
    found = [tensor for file in files for tensor in file.tensors]
    assert all(files[number].tensors for number in (0, 1))
    assert [(tensor.name, tensor.data.tobytes()) for tensor in found] == [
        (tensor.name, tensor.data.tobytes()) for tensor in parts
    ]
