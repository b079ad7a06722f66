"""Shards: verified once, fetched from a hub with faults, and never named before they are right."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _shards
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hub import Fault, Hub

PROGRAM = Path(__file__).resolve().parents[2] / "roles" / "model_fetch" / "files" / "fetch_model.py"
SIZES = {"m-00001-of-00003.gguf": 3_000_000, "m-00002-of-00003.gguf": 5_000_001, "m-00003-of-00003.gguf": 1}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(hashlib.shake_128(bytes([number])).digest(size))
    return folder


@pytest.fixture
def entries(source: Path) -> list[dict[str, Any]]:
    return [
        {"file": name, "bytes": size, "sha256": hashlib.sha256((source / name).read_bytes()).hexdigest()}
        for name, size in SIZES.items()
    ]


def request(tmp_path: Path, entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"directory": str(tmp_path / "models"), "shards": entries, "stall_timeout_s": 3, **more}


def from_hub(hub: Hub, source: Path) -> str:
    commit = hub.add("org/name", source)
    return f"{hub.url}/org/name/resolve/{commit}"


def assert_whole(tmp_path: Path, source: Path) -> None:
    models = tmp_path / "models"
    for name in SIZES:
        assert (models / name).read_bytes() == (source / name).read_bytes()
    assert not (models / _shards.PARTIAL).exists()


def test_fetches_from_a_hub_and_a_second_run_asks_for_nothing(tmp_path, source, entries):
    with Hub() as hub:
        wanted = request(tmp_path, entries, base_url=from_hub(hub, source))
        assert _shards.fetch(wanted, tmp_path / "status.json") == list(SIZES)
        assert_whole(tmp_path, source)
        asked = len(hub.requests)
        assert _shards.fetch(wanted, None) == []
        assert len(hub.requests) == asked


def test_status_counts_to_the_sum_of_the_shards(tmp_path, source, entries):
    _shards.fetch(request(tmp_path, entries, source_directory=str(source)), tmp_path / "status.json")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["unit"] == "bytes"
    assert 0 <= status["done"] <= status["total"] <= sum(SIZES.values())


def test_a_dropped_connection_is_resumed_within_the_run(tmp_path, source, entries):
    with Hub() as hub:
        base = from_hub(hub, source)
        hub.fault(Fault("drop", match="00002-of", after=1_000_000))
        _shards.fetch(request(tmp_path, entries, base_url=base), None)
        assert_whole(tmp_path, source)


def test_a_busy_hub_is_asked_again(tmp_path, source, entries):
    with Hub() as hub:
        base = from_hub(hub, source)
        hub.fault(Fault("status", match="00001-of", status=503, retry_after="1"))
        _shards.fetch(request(tmp_path, entries, base_url=base), None)
        assert_whole(tmp_path, source)


def test_wrong_bytes_are_named_and_never_get_the_name(tmp_path, source, entries):
    with Hub() as hub:
        base = from_hub(hub, source)
        hub.fault(Fault("corrupt", match="cdn/.*00002-of", after=77, times=None))
        with pytest.raises(_shards.FetchError, match=r"m-00002-of-00003\.gguf: sha256 is [0-9a-f]{64}, expected"):
            _shards.fetch(request(tmp_path, entries, base_url=base), None)
        assert not (tmp_path / "models" / "m-00002-of-00003.gguf").exists()
        assert (tmp_path / "models" / "m-00001-of-00003.gguf").exists()
        hub.clear_faults()
        assert _shards.fetch(request(tmp_path, entries, base_url=base), None) == ["m-00002-of-00003.gguf"]
        assert_whole(tmp_path, source)


def test_the_token_opens_the_hub_and_stays_there(tmp_path, source, entries):
    with Hub(token="hf_secret") as hub:
        base = from_hub(hub, source)
        with pytest.raises(_shards.FetchError):
            _shards.fetch(request(tmp_path, entries, base_url=base, token="hf_wrong"), None)
        _shards.fetch(request(tmp_path, entries, base_url=base, token="hf_secret"), None)
        assert_whole(tmp_path, source)


def test_a_killed_fetch_is_resumed_from_what_is_there(tmp_path, source, entries):
    with Hub() as hub:
        base = from_hub(hub, source)
        hub.fault(Fault("slow", match="cdn/.*00002-of", rate=1_000_000, times=None))
        body = tmp_path / "request.json"
        body.write_text(json.dumps(request(tmp_path, entries, base_url=base)))
        child = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--request", str(body)],
            env={**os.environ, "PYTHONPATH": str(Path(_shards.__file__).parent)},
            start_new_session=True,
        )
        partial = tmp_path / "models" / _shards.PARTIAL / "m-00002-of-00003.gguf"
        deadline = time.monotonic() + 30
        while _shards.disk_bytes(partial) < 3_000_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.5)  # aria2 notes once a second what it has
        os.killpg(child.pid, 9)
        child.wait()
        assert not (tmp_path / "models" / "m-00002-of-00003.gguf").exists()
        hub.clear_faults()
        before = len(hub.requests)
        _shards.fetch(request(tmp_path, entries, base_url=base), None)
        assert_whole(tmp_path, source)
        sent = sum(entry.sent for entry in hub.requests[before:] if "00002-of" in entry.path)
        assert sent < SIZES["m-00002-of-00003.gguf"]


def test_two_at_once_are_one_too_many(tmp_path, source, entries):
    directory = tmp_path / "models"
    directory.mkdir()
    with _shards.exclusive(directory), pytest.raises(_shards.FetchError, match="another fetch holds it"):
        _shards.fetch(request(tmp_path, entries, source_directory=str(source)), None)


def test_a_file_under_the_right_name_is_checked_not_fetched(tmp_path, source, entries):
    directory = tmp_path / "models"
    directory.mkdir()
    for name in SIZES:
        (directory / name).write_bytes((source / name).read_bytes())
    assert _shards.verified(directory, _shards.shards_of(entries)) == []
    _shards.fetch(request(tmp_path, entries, source_directory="/nonexistent"), None)
    assert len(_shards.verified(directory, _shards.shards_of(entries))) == 3


def test_a_touched_file_is_no_longer_verified(tmp_path, source, entries):
    _shards.fetch(request(tmp_path, entries, source_directory=str(source)), None)
    victim = tmp_path / "models" / "m-00001-of-00003.gguf"
    body = bytearray(victim.read_bytes())
    body[5] ^= 1
    victim.write_bytes(body)
    names = [shard.file for shard in _shards.verified(tmp_path / "models", _shards.shards_of(entries))]
    assert names == ["m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    assert _shards.fetch(request(tmp_path, entries, source_directory=str(source)), None) == ["m-00001-of-00003.gguf"]
    assert_whole(tmp_path, source)


def test_a_missing_source_shard_is_named(tmp_path, source, entries):
    (source / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(_shards.FetchError, match="m-00003-of-00003"):
        _shards.fetch(request(tmp_path, entries, source_directory=str(source)), None)


def test_a_full_disk_is_refused_with_both_numbers(tmp_path, source, entries, monkeypatch):
    monkeypatch.setattr(_shards, "free_bytes", lambda _directory: 7)
    with pytest.raises(_shards.FetchError, match="needs 8000002 bytes more, 7 are free"):
        _shards.fetch(request(tmp_path, entries, source_directory=str(source)), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"file": "../../etc/passwd"}, "no name below", id="climbs-out"),
        pytest.param({"file": "/etc/passwd"}, "no name below", id="absolute"),
        pytest.param({"file": ".partial/x"}, "no name below", id="our-partial"),
        pytest.param({"file": ".cpullm-record.json"}, "no name below", id="our-record"),
        pytest.param({"sha256": "12"}, "64 hexadecimal", id="short-hash"),
        pytest.param({"sha256": "z" * 64}, "64 hexadecimal", id="no-hash"),
        pytest.param({"bytes": 0}, "more than 0", id="empty"),
    ],
)
def test_refuses_a_hostile_list(change, message):
    entry = {"file": "a.gguf", "bytes": 1, "sha256": "0" * 64, **change}
    with pytest.raises(ValueError, match=message):
        _shards.shards_of([entry])


@given(st.lists(st.tuples(st.text("abc", min_size=1), st.integers(1, 9)), min_size=1, unique_by=lambda pair: pair[0]))
def test_the_content_id_knows_no_order(pairs):
    shards = [_shards.Shard(name, size, hashlib.sha256(name.encode()).hexdigest()) for name, size in pairs]
    assert _shards.content_id(shards) == _shards.content_id(shards[::-1])
    assert len(_shards.content_id(shards)) == 16
