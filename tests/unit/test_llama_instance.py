"""The digest that tells a running instance's configuration from the one on disk."""

from __future__ import annotations

import importlib.util
import json
import sys
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


UNITS = {"ActiveState": "active", "SubState": "running", "MainPID": "0", "NRestarts": "0"}
PAGES = 3 << 30


def shown(script, monkeypatch, **units):
    """Have the units show these properties; unnamed ones are as when all is well."""
    names = {"server": "llama-server@0.service", "weights": "llama-weights@0.service"}
    states = {names[key]: {**UNITS, **value} for key, value in units.items()}
    monkeypatch.setattr(script, "show", lambda name, *_properties: states.get(name, UNITS))


@pytest.mark.parametrize(
    ("units", "progress", "status"),
    [
        pytest.param({}, None, {"done": PAGES, "total": PAGES, "message": "ready"}, id="ready"),
        pytest.param(
            {"weights": {"ActiveState": "activating"}},
            {"done": 7, "total": 10, "message": "", "updated": 1000.0},
            {"done": 7, "total": 11, "message": "waiting for llama-weights@0.service"},
            id="loading",
        ),
        pytest.param(
            {"weights": {"ActiveState": "activating"}},
            {"done": 10, "total": 10, "message": "comparing sha256", "updated": 1000.0},
            {"done": 10, "total": 11, "message": "waiting for llama-weights@0.service comparing sha256"},
            id="read-and-not-ready",
        ),
        pytest.param(
            {"weights": {"ActiveState": "activating"}},
            {"done": 10, "total": 10, "message": "", "updated": 900.0},
            {"done": 0, "total": PAGES + 1},
            id="progress-of-an-earlier-load",
        ),
        pytest.param(
            {"server": {"ActiveState": "activating", "SubState": "start-post"}},
            None,
            {"done": 0, "total": PAGES, "message": "waiting for llama-server@0.service"},
            id="server-starts",
        ),
        pytest.param(
            {"weights": {"ActiveState": "failed", "SubState": "failed"}}, None, {"phase": "failed"}, id="failed"
        ),
        pytest.param(
            {"weights": {"ActiveState": "inactive", "Job": "12"}}, None, {"phase": "load", "done": 0}, id="queued"
        ),
        pytest.param({"server": {"ActiveState": "inactive", "Job": ""}}, None, {"phase": "failed"}, id="server-gone"),
        pytest.param(
            {"server": {"ActiveState": "deactivating", "SubState": "stop-sigterm", "Job": "12"}},
            None,
            {"done": 0, "total": PAGES, "message": "waiting for llama-server@0.service"},
            id="server-stops-before-it-starts",
        ),
        pytest.param(
            {"server": {"ActiveState": "deactivating", "SubState": "stop-sigterm", "Job": "0"}},
            None,
            {"phase": "failed"},
            id="server-stops",
        ),
    ],
)
def test_says_how_far_a_store_and_its_server_are(script, monkeypatch, tmp_path, units, progress, status):
    monkeypatch.setattr(script, "PLANS", tmp_path / "plans")
    monkeypatch.setattr(script, "STORES", tmp_path / "run")
    monkeypatch.setattr(script.time, "time", lambda: 1010.0)
    put(tmp_path / "plans" / "0.json", "{}")
    if progress:
        put(tmp_path / "run" / "0" / "progress.json", json.dumps(progress))
    shown(script, monkeypatch, **units)
    said = script.status([(0, 3)])
    assert {key: said[key] for key in status} == status


def test_a_server_does_not_start_on_a_store_that_is_not_complete(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "PLANS", tmp_path / "plans")
    monkeypatch.setattr(script, "RUNTIME", tmp_path / "server")
    monkeypatch.setattr(script, "STORES", tmp_path / "run")
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    asked = []
    monkeypatch.setattr(script.subprocess, "run", lambda argv, **_named: asked.append(argv))
    put(tmp_path / "server" / "0" / "configuration", "old")
    assert script.record(0) == 0, "without a store there is nothing to look at"
    put(tmp_path / "plans" / "0.json", "no plan")
    before = (tmp_path / "server" / "0" / "configuration").read_text()
    assert script.record(0) == 1
    assert asked == [["systemctl", "restart", "--no-block", "llama-weights@0.service"]]
    assert (tmp_path / "server" / "0" / "configuration").read_text() == before
    assert "run site.yml" in capsys.readouterr().err
