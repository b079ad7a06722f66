"""The digest that tells a running instance's configuration from the one on disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "roles" / "systemd_service" / "files" / "llama_instance.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("llama_instance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDERS", [tmp_path / "etc", tmp_path / "usr"])
    return module


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_every_file_of_an_instance_counts_and_no_other(script, tmp_path):
    put(tmp_path / "etc" / "llama-server@.service", "[Service]\n")
    put(tmp_path / "etc" / "llama-server@0.service.d" / "10-plan.conf", "a")
    first = script.digest(0)
    assert script.digest(0) == first
    put(tmp_path / "etc" / "llama-server@1.service.d" / "10-plan.conf", "other instance")
    put(tmp_path / "etc" / "llama-server@0.service.d" / "note.txt", "no drop-in")
    assert script.digest(0) == first
    seen = {first}
    for where in ("etc/llama-server@0.service.d/99-local.conf", "usr/llama-server@.service.d/50-all.conf"):
        put(tmp_path / where, "[Service]\n")
        assert script.digest(0) not in seen
        seen.add(script.digest(0))
    (tmp_path / "etc" / "llama-server@0.service.d" / "99-local.conf").unlink()
    assert script.digest(0) not in seen
