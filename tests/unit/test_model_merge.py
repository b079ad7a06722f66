"""One file made of shards: the same tensors to the byte, and no trace of the split."""

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
