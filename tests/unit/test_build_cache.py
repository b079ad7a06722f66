"""The controller's cache of sources and artifacts, and its patch sets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.action import llamacpp_build_schedule, llamacpp_source
from ansible_collections.cpullm.epyc.plugins.module_utils._build import parse_os_release, parse_source
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _llamacpp

DIFF = b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+new\n"
CONTENT = b"an archive"
SHA = hashlib.sha256(CONTENT).hexdigest()


def source(kind: str, **changes: Any) -> Any:
    pins = {"git": {"commit": "b" * 40, "url": "https://x/y.git"}}
    places = {"archive_url": {"url": "https://x/y.tgz?z=1"}, "archive": {"path": "/nonexistent"}}
    pin = pins.get(kind, {"sha256": SHA})
    return parse_source({"type": kind, "version": "1.0", **pin, **places.get(kind, {}), **changes})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param("sdist", "llama_cpp_python-1.0.tar.gz", id="sdist"),
        pytest.param("archive_url", f"{SHA[:16]}-y.tgz", id="url"),
        pytest.param("git", "b" * 40 + ".tar.gz", id="git"),
    ],
)
def test_place_in_the_cache(kind: str, name: str) -> None:
    assert _llamacpp.source_path(Path("/c"), source(kind)) == Path("/c/sdist") / name


def test_cached_source_counts_only_with_its_hash(tmp_path: Path) -> None:
    place = _llamacpp.source_path(tmp_path, source("sdist"))
    assert not _llamacpp.have_source(tmp_path, source("sdist"))
    place.parent.mkdir()
    place.write_bytes(CONTENT)
    assert _llamacpp.have_source(tmp_path, source("sdist"))
    place.write_bytes(CONTENT[:-1])
    assert not _llamacpp.have_source(tmp_path, source("sdist"))


def test_cached_git_source_counts_only_with_the_hash_that_was_noted(tmp_path: Path) -> None:
    place = _llamacpp.source_path(tmp_path, source("git"))
    place.parent.mkdir()
    place.write_bytes(CONTENT)
    assert not _llamacpp.have_source(tmp_path, source("git"))
    Path(f"{place}.sha256").write_text(f"{SHA}  x\n")
    assert _llamacpp.have_source(tmp_path, source("git"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "No such file or directory; expected a file", id="absent"),
        pytest.param(b"other", f"expected {SHA}. Nothing was unpacked", id="differs"),
    ],
)
def test_own_archive_is_refused_early(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="llamacpp_build_source") as caught:
        _llamacpp.have_source(tmp_path, source("archive", path=str(tmp_path / "x")))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("hash_text", "whole"),
    [
        pytest.param(f"{SHA}  x\n", True, id="whole"),
        pytest.param("0" * 64, False, id="differs"),
        pytest.param("", False, id="empty"),
        pytest.param(None, False, id="no-hash"),
    ],
)
def test_cached_artifact(tmp_path: Path, hash_text: str | None, whole: bool) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "i.tar.gz").write_bytes(CONTENT)
    if hash_text is not None:
        (tmp_path / "artifacts" / "i.tar.gz.sha256").write_text(hash_text)
    path, digest = _llamacpp.cached_artifact(tmp_path, "i")
    assert path == tmp_path / "artifacts" / "i.tar.gz"
    assert digest == (SHA if whole else None)


def test_patch_set_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0001-a.patch").write_bytes(DIFF)
    (tmp_path / "set" / "README").write_text("not a patch")
    by_name = _llamacpp.read_patches("set", tmp_path)
    assert [patch.name for patch in by_name] == ["0001-a.patch"]
    assert by_name == _llamacpp.read_patches(str(tmp_path / "set"), Path("/nonexistent"))


def test_absent_patch_set_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(
        ValueError, match=r"found 'two', which is no directory; expected a set of the collection \(one\)"
    ):
        _llamacpp.read_patches("two", tmp_path)


def test_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPULLM_CACHE", "/c")
    assert _llamacpp.cache_directory() == Path("/c")
    monkeypatch.delenv("CPULLM_CACHE")
    monkeypatch.setenv("HOME", "/h")
    assert _llamacpp.cache_directory() == Path("/h/.cache/cpullm")


def test_download_with_another_hash_leaves_the_cache_alone(tmp_path: Path) -> None:
    (tmp_path / "origin.tgz").write_bytes(b"tampered")
    (tmp_path / "sdist").mkdir()
    wanted = source("archive_url", url=f"file://{tmp_path}/origin.tgz")
    with pytest.raises(ValueError, match=f"expected {SHA}. Nothing was unpacked"):
        llamacpp_source.fetch(wanted, _llamacpp.source_path(tmp_path, wanted))
    assert list((tmp_path / "sdist").iterdir()) == []
    (tmp_path / "origin.tgz").write_bytes(CONTENT)
    llamacpp_source.fetch(wanted, _llamacpp.source_path(tmp_path, wanted))
    assert _llamacpp.have_source(tmp_path, wanted)


RELEASE = parse_os_release(Path("/etc/os-release").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("release", "missing", "user", "message"),
    [
        pytest.param(RELEASE, [], 1000, None, id="all-there"),
        pytest.param(RELEASE, ["cmake"], 0, None, id="root-installs"),
        pytest.param(RELEASE, ["cmake", "patch"], 1000, "Run: sudo apt install cmake patch", id="no-root"),
        pytest.param("plan9", [], 0, f"found a controller with {RELEASE}; expected plan9", id="another-release"),
    ],
)
def test_controller_as_build_host(
    monkeypatch: pytest.MonkeyPatch, release: str, missing: list[str], user: int, message: str | None
) -> None:
    monkeypatch.setattr(llamacpp_build_schedule, "missing_build_packages", lambda _ccache: missing)
    monkeypatch.setattr(llamacpp_build_schedule.os, "geteuid", lambda: user)
    if message is None:
        llamacpp_build_schedule.check_controller(release, ccache=False)
    else:
        with pytest.raises(ValueError, match="llamacpp_build_host localhost") as caught:
            llamacpp_build_schedule.check_controller(release, ccache=False)
        assert message in str(caught.value)


@pytest.mark.parametrize("build_host", [None, "localhost", "web1"])
def test_known_build_host(build_host: str | None) -> None:
    llamacpp_build_schedule.check_build_host(build_host, ["web1"])


def test_unknown_build_host() -> None:
    with pytest.raises(ValueError, match="found 'web2'; expected null, localhost or a host of the inventory"):
        llamacpp_build_schedule.check_build_host("web2", ["web1"])
