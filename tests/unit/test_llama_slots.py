"""Slots across a restart: what is written, what is read, and what a failure leaves."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "roles" / "systemd_service" / "files" / "llama_slots.py"


@pytest.fixture
def slots():
    spec = importlib.util.spec_from_file_location("llama_slots", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(tmp_path):
    """Return a server of two slots that saves into a folder: slot 0 has tokens, slot 1 none; its answers can fail."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["filename"]
            slot, action = int(self.path[7]), self.path.split("=")[1]
            state.asked.append((slot, action, name))
            tokens = 0 if slot else 7
            if action == "save" and not state.fails:
                (tmp_path / name).write_text("state")
            body = json.dumps({"n_saved": tokens, "n_restored": tokens}).encode()
            self.send_response(400 if state.fails else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as state:
        state.asked, state.fails = [], False
        threading.Thread(target=state.serve_forever, daemon=True).start()
        yield state
        state.shutdown()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_trip(slots, server, tmp_path):
    (tmp_path / "other-0.bin").touch()
    slots.save(tmp_path, "key", server.server_port, 2)
    assert names(tmp_path) == ["key-0.bin"]
    slots.restore(tmp_path, "key", server.server_port, 2)
    assert server.asked[-1] == (0, "restore", "key-0.once")
    assert names(tmp_path) == []


def test_a_save_that_fails_keeps_what_is_there(slots, server, tmp_path, capsys):
    (tmp_path / "key-0.bin").write_text("before")
    server.fails = True
    slots.save(tmp_path, "key", server.server_port, 1)
    assert names(tmp_path) == ["key-0.bin"]
    assert "slot 0 is not kept: 400" in capsys.readouterr().out


def test_a_file_that_the_server_refuses_is_tried_once(slots, server, tmp_path, capsys):
    (tmp_path / "key-0.bin").touch()
    server.fails = True
    slots.restore(tmp_path, "key", server.server_port, 1)
    assert "slot 0 starts empty: 400" in capsys.readouterr().out
    assert names(tmp_path) == []


def test_a_server_that_died_of_a_file_does_not_meet_it_again(slots, tmp_path):
    (tmp_path / "key-0.once").touch()
    slots.restore(tmp_path, "key", 1, 1)
    assert names(tmp_path) == ["key-0.once"]


def test_another_key_is_not_read(slots, tmp_path):
    (tmp_path / "other-0.bin").touch()
    slots.restore(tmp_path, "key", 1, 1)
    assert names(tmp_path) == ["other-0.bin"]
