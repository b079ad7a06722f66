# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What molecule's platforms become in the lab."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab import cli

SCRIPT = Path(__file__).resolve().parents[2] / "molecule" / "resources" / "platforms.py"
SPEC = importlib.util.spec_from_file_location("platforms", SCRIPT)
platforms = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(platforms)


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        pytest.param({"name": "a"}, ["up", "a", "--kind", "container"], id="container-by-default"),
        pytest.param(
            {"name": "a", "kind": "vm", "release": "trixie", "memory_gib": 6, "firmware": "uefi", "groups": ["x"]},
            ["up", "a", "--kind", "vm", "--release", "trixie", "--memory-gib", "6", "--firmware", "uefi"],
            id="vm",
        ),
        pytest.param(
            {"name": "a", "pages": 2, "forwards": [8008, "18009:8009"], "binds": ["/x:/y:ro"]},
            [
                *("up", "a", "--kind", "container", "--pages", "2"),
                *("--forward", "8008", "--forward", "18009:8009", "--bind", "/x:/y:ro"),
            ],
            id="lists",
        ),
    ],
)
def test_up_words(platform, words):
    assert platforms.up_words(platform) == words
    cli.parser().parse_args(words)


def test_a_key_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"platform 'a': unknown image, memory; expected some of kind, release"):
        platforms.up_words({"name": "a", "memory": 3, "image": "x"})


def run(monkeypatch, tmp_path, action, hosts, failing=()):
    """Return the exit status and the commands that the lab was given."""
    seen = []

    def lab(words):
        seen.append(words)
        code = 1 if words[1] in failing else 0
        return subprocess.CompletedProcess(words, code, stdout="listing\n", stderr=f"{words[1]}: broken\n" * code)

    monkeypatch.setattr(platforms, "lab", lab)
    monkeypatch.setattr(sys, "argv", ["platforms.py", action, str(tmp_path / "inventory" / "lab.yml")])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(hosts)))
    return platforms.main(), seen


def test_up_writes_the_inventory(monkeypatch, tmp_path):
    code, seen = run(monkeypatch, tmp_path, "up", [{"name": "a"}, {"name": "b", "kind": "vm"}])
    assert code == 0
    assert [words[:2] for words in seen] == [["up", "a"], ["up", "b"], ["inventory", "a"]]
    assert (tmp_path / "inventory" / "lab.yml").read_text() == "listing\n"


def test_up_says_what_failed(monkeypatch, tmp_path, capsys):
    code, _seen = run(monkeypatch, tmp_path, "up", [{"name": "a"}, {"name": "b"}], failing=["b"])
    assert code == 1
    assert "b: broken" in capsys.readouterr().err
    assert not (tmp_path / "inventory" / "lab.yml").exists()


def test_down_removes_all_of_them_and_the_inventory(monkeypatch, tmp_path):
    (tmp_path / "inventory").mkdir()
    (tmp_path / "inventory" / "lab.yml").touch()
    code, seen = run(monkeypatch, tmp_path, "down", [{"name": "a"}, {"name": "b", "odd": 1}], failing=["a"])
    assert code == 1
    assert sorted(seen) == [["down", "a"], ["down", "b"]]
    assert not (tmp_path / "inventory" / "lab.yml").exists()
