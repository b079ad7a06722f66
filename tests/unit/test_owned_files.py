"""A set of files: what is written, what is removed, and what is left alone."""

from __future__ import annotations

import os

import pytest
from ansible_collections.cpullm.epyc.plugins.modules import owned_files

RIGHT = {"content": "a\n", "mode": 0o644, "owner": (0, 0)}
WANTED = {"path": "/x", "content": "a\n", "mode": 0o644}


@pytest.mark.parametrize(
    ("wanted", "before", "written", "removed"),
    [
        pytest.param([WANTED], {"/x": None}, ["/x"], [], id="absent"),
        pytest.param([WANTED], {"/x": RIGHT}, [], [], id="right"),
        pytest.param([WANTED], {"/x": {**RIGHT, "content": "b\n"}}, ["/x"], [], id="other-content"),
        pytest.param([WANTED], {"/x": {**RIGHT, "mode": 0o666}}, ["/x"], [], id="other-mode"),
        pytest.param([WANTED], {"/x": {**RIGHT, "owner": (1000, 0)}}, ["/x"], [], id="other-owner"),
        pytest.param([], {"/x": RIGHT, "/y": RIGHT}, [], ["/x", "/y"], id="owned-and-unwanted"),
        pytest.param([WANTED], {"/x": RIGHT, "/y": RIGHT}, [], ["/y"], id="one-too-many"),
        pytest.param([], {"/x": None}, [], [], id="nothing"),
    ],
)
def test_plan(wanted, before, written, removed):
    write, remove = owned_files.plan(wanted, before)
    assert [entry["path"] for entry in write] == written
    assert remove == removed


def test_a_link_is_no_file_of_ours(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="no regular file"):
        owned_files.found(str(tmp_path / "link"))
    with pytest.raises(OSError, match="no regular file"):
        owned_files.found(str(tmp_path))
    assert owned_files.found(str(tmp_path / "nothing")) is None


def test_bytes_that_are_no_text_differ_from_every_text(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\n")
    state = owned_files.found(str(tmp_path / "x"))
    assert state is not None
    assert state["content"] == "\\xff\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to root")
@pytest.mark.parametrize("there", [None, 0o600, 0o644], ids=["absent", "closed", "no-program"])
def test_a_file_is_as_wanted_once_it_is_written(tmp_path, there):
    path = tmp_path / "folder" / "program"
    if there is not None:
        path.parent.mkdir()
        path.write_text("old\n")
        path.chmod(there)
    wanted = [{"path": str(path), "content": "new\n", "mode": 0o755}]
    write, remove = owned_files.plan(wanted, {str(path): owned_files.found(str(path))})
    owned_files.apply(write, remove)
    assert owned_files.plan(wanted, {str(path): owned_files.found(str(path))}) == ([], [])
    assert [entry.name for entry in path.parent.iterdir()] == ["program"]
