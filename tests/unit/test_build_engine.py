"""The files of builds, and the program that makes them; with a tree of three files instead of llama.cpp's."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _build, _engine
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _llamacpp
from hypothesis import given
from hypothesis import strategies as st

CLONE = Path(__file__).resolve().parents[2]
ID = "1.0-avx2-debian12-0123456789ab"
FILE = {"path": "note", "bytes": 1, "sha256": "0" * 64, "executable": False}
TREE = {
    "p-1/vendor/llama.cpp/ggml/CMakeLists.txt": b"ggml\n",
    "p-1/vendor/llama.cpp/src/a.cpp": b"one\ntwo\nthree\n",
    "p-1/vendor/llama.cpp/.git": b"gitdir: ../../.git/modules/x\n",
    "p-1/README.md": b"outside\n",
}
FITS = b"--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,3 +1,3 @@\n one\n-two\n+TWO\n three\n"
FUZZY = b"--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,3 +1,3 @@\n uno\n-two\n+TWO\n three\n"
NO_FILE = FITS.replace(b"src/a.cpp", b"src/b.cpp")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """Return the build program as the build host has it: beside _engine."""
    sys.modules["_engine"] = _engine
    spec = importlib.util.spec_from_file_location(
        "build_engine", CLONE / "roles" / "llamacpp_build" / "files" / "build_engine.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_engine"] = module
    spec.loader.exec_module(module)
    return module


def pack(path: Path, members: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> Path:
    """Write a tar archive."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if data.startswith(b"#!") else 0o644
            tar.addfile(member, io.BytesIO(data))
        for member in extra or []:
            tar.addfile(member)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """Return a member that is a link."""
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


def test_unpack_takes_only_what_lies_below(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tgz", TREE, [link("p-1/vendor/llama.cpp/l", "src/a.cpp")])
    (tmp_path / "out").mkdir()
    _engine.unpack(str(archive), str(tmp_path / "out"), below="vendor/llama.cpp", strip_top=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".git", "ggml", "l", "src"]
    assert (tmp_path / "out" / "l").read_bytes() == TREE["p-1/vendor/llama.cpp/src/a.cpp"]


@pytest.mark.parametrize(
    ("members", "extra", "message"),
    [
        pytest.param({"../x": b""}, [], "leads out", id="dots"),
        pytest.param({"/etc/x": b""}, [], "leads out", id="absolute"),
        pytest.param({}, [link("l", "/etc/passwd")], "leads out", id="link-absolute"),
        pytest.param({}, [link("a/l", "../../x")], "leads out", id="link-up"),
        pytest.param({}, [link("a/l", "b/../../x")], "leads out", id="link-with-dots-inside"),
        pytest.param({}, [link("d", "."), link("d/e", "../x")], "leads out", id="link-below-a-link"),
        pytest.param({}, [link("d", "."), link("e", "d/..")], "leads out", id="link-through-a-link"),
        pytest.param({}, [link("h", "x", tarfile.LNKTYPE)], "neither file", id="hard-link"),
        pytest.param({}, [link("f", "", tarfile.FIFOTYPE)], "neither file", id="fifo"),
    ],
)
def test_unpack_refuses(tmp_path: Path, members: dict[str, bytes], extra: list[tarfile.TarInfo], message: str) -> None:
    archive = pack(tmp_path / "x.tgz", members, extra)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        _engine.unpack(str(archive), str(tmp_path / "out"))
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_unpack_refuses_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\3\4 no tar")
    with pytest.raises(ValueError, match="no readable tar archive"):
        _engine.unpack(str(tmp_path / "x"), str(tmp_path))


@given(st.binary(max_size=2000))
def test_unpack_of_any_bytes_is_an_error_or_nothing(data: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"cpullm-unpack-{os.getpid()}"
    try:
        path.write_bytes(data)
        _engine.unpack(str(path), "/nonexistent")
    except ValueError:
        pass
    finally:
        path.unlink(missing_ok=True)


def make_artifact(program: ModuleType, directory: Path, identifier: str = ID) -> tuple[Path, str]:
    """Return a small artifact with its hash."""
    staging = directory / "staging"
    (staging / "bin").mkdir(parents=True, exist_ok=True)
    (staging / "bin" / "llama-server").write_bytes(b"#!/bin/sh\n")
    (staging / "bin" / "llama-server").chmod(0o755)
    (staging / "note").write_bytes(b"x")
    record = {"schema": 1, "id": identifier, "files": _engine.list_files(str(staging))}
    (staging / "BUILD.json").write_bytes(_engine.to_json(record))
    artifact = directory / f"{identifier}.tar.gz"
    return artifact, program.pack(staging, identifier, artifact)


def test_equal_trees_give_equal_artifacts(program: ModuleType, tmp_path: Path) -> None:
    artifact, digest = make_artifact(program, tmp_path / "a")
    os.utime(tmp_path / "a" / "staging" / "note", (1, 1))
    (tmp_path / "a" / "staging" / "note").chmod(0o600)
    assert make_artifact(program, tmp_path / "b")[1] == digest
    assert program.pack(tmp_path / "a" / "staging", ID, artifact) == digest
    assert program.finished(artifact) == digest
    with artifact.open("ab") as stream:
        stream.write(b"x")
    assert program.finished(artifact) is None


def test_installed_build_is_complete_and_switched(program: ModuleType, tmp_path: Path) -> None:
    artifact, digest = make_artifact(program, tmp_path)
    prefix = tmp_path / "opt"
    umask = os.umask(0o077)
    try:
        _engine.install(str(artifact), digest, str(prefix), ID)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (prefix, prefix / ID, prefix / ID / "bin")} == {0o755}
    assert _engine.find_damage(str(prefix / ID), ID, deep=True) == []
    assert [path.name for path in prefix.iterdir()] == [ID]
    assert _engine.current_build(str(prefix)) is None
    _engine.activate(str(prefix), ID)
    assert os.readlink(prefix / "current") == ID
    assert os.access(prefix / "current" / "bin" / "llama-server", os.X_OK)


@pytest.mark.parametrize(
    ("identifier", "digest", "message"),
    [
        pytest.param(ID, "0" * 64, "found sha256", id="hash"),
        pytest.param(ID.replace("1.0", "2.0"), None, "expected 2.0-avx2", id="another-build"),
    ],
)
def test_wrong_artifact_leaves_nothing(
    program: ModuleType, tmp_path: Path, identifier: str, digest: str | None, message: str
) -> None:
    artifact, right = make_artifact(program, tmp_path)
    with pytest.raises(ValueError, match=message):
        _engine.install(str(artifact), digest or right, str(tmp_path / "opt"), identifier)
    assert not list((tmp_path / "opt").glob("*"))
    assert not list((tmp_path / "opt").glob(".*"))


def test_remains_of_a_killed_installation_go_and_a_damaged_build_is_replaced(
    program: ModuleType, tmp_path: Path
) -> None:
    artifact, digest = make_artifact(program, tmp_path)
    prefix = tmp_path / "opt"
    _engine.install(str(artifact), digest, str(prefix), ID)
    (prefix / ID / "note").write_bytes(b"longer")
    (prefix / f".cpullm-{ID}").mkdir()
    assert "found 6 bytes, expected 1" in _engine.find_damage(str(prefix / ID), ID, deep=False)[0]
    _engine.install(str(artifact), digest, str(prefix), ID)
    assert [path.name for path in prefix.iterdir()] == [ID]
    assert _engine.find_damage(str(prefix / ID), ID, deep=True) == []


@pytest.mark.parametrize(
    ("change", "deep", "message"),
    [
        pytest.param(lambda root: (root / "note").unlink(), False, "No such file", id="file-gone"),
        pytest.param(lambda root: (root / "note").write_bytes(b"y"), True, "found sha256", id="content"),
        pytest.param(lambda root: (root / "note").chmod(0o755), False, "another than the build's", id="mode"),
        pytest.param(lambda root: (root / "BUILD.json").unlink(), False, "No such file", id="no-record"),
        pytest.param(lambda root: (root / "BUILD.json").write_text("{"), False, "no JSON", id="no-json"),
        pytest.param(lambda root: (root / "BUILD.json").write_text("[]"), False, "no record", id="list"),
        pytest.param(
            lambda root: (root / "BUILD.json").write_text(
                json.dumps({"schema": 1, "id": ID, "files": [{**FILE, "path": "../x"}]})
            ),
            False,
            "outside of the build",
            id="record-leaves",
        ),
        *(
            pytest.param(
                lambda root, entry=entry: (root / "BUILD.json").write_text(
                    json.dumps({"schema": 1, "id": ID, "files": [entry]})
                ),
                False,
                "a file without one of path, bytes, sha256, executable",
                id=name,
            )
            for name, entry in (
                ("no-file", "note"),
                ("no-path", {name: value for name, value in FILE.items() if name != "path"}),
                ("bytes-as-text", {**FILE, "bytes": "1"}),
                ("no-mode", {**FILE, "executable": None}),
            )
        ),
        pytest.param(lambda root: (root / "BUILD.json").write_text("[" * 100_000), False, "no JSON", id="deep"),
    ],
)
def test_damage_is_named(program: ModuleType, tmp_path: Path, change: Any, deep: bool, message: str) -> None:
    artifact, digest = make_artifact(program, tmp_path)
    _engine.install(str(artifact), digest, str(tmp_path / "opt"), ID)
    change(tmp_path / "opt" / ID)
    assert message in "; ".join(_engine.find_damage(str(tmp_path / "opt" / ID), ID, deep))


@pytest.mark.parametrize(
    ("ids", "keep", "needed", "removed"),
    [
        pytest.param("abcd", 3, "d", "a", id="one-too-many"),
        pytest.param("abcd", 3, "a", "b", id="rolled-back-to-the-oldest"),
        pytest.param("abcd", 1, "cd", "ab", id="previous-stays-beyond-keep"),
        pytest.param("ab", 3, "b", "", id="room"),
        pytest.param("abc", 0, "c", "ab", id="none-but-the-current"),
    ],
)
def test_old_builds(ids: str, keep: int, needed: str, removed: str) -> None:
    assert _engine.choose_old([{"id": each} for each in ids], keep, set(needed)) == list(removed)


def test_running_builds_are_found(tmp_path: Path) -> None:
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "opt" / ID / "bin").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "exe").symlink_to(f"{tmp_path}/opt/{ID}/bin/llama-server")
    (tmp_path / "proc" / "self").mkdir()
    assert _engine.running_builds(str(tmp_path / "opt"), str(tmp_path / "proc")) == {ID}


@pytest.mark.parametrize(
    ("wish", "cpus", "memory", "jobs"),
    [
        pytest.param(5, 2, 1, 5, id="wish"),
        pytest.param(None, 64, 512 << 30, 64, id="big"),
        pytest.param(None, 8, 4 << 30, 2, id="little-memory"),
        pytest.param(None, 8, 0, 1, id="no-memory"),
        pytest.param(None, 8, None, 8, id="unknown"),
    ],
)
def test_jobs(program: ModuleType, wish: int | None, cpus: int, memory: int | None, jobs: int) -> None:
    assert program.choose_jobs(wish, cpus, memory) == jobs


def shop(program: ModuleType, work: Path, patches: list[bytes], archive: Path) -> Any:
    """Return a workshop for the tiny tree."""
    source = _build.parse_source({"type": "sdist", "version": "1", "sha256": _engine.sha256_file(str(archive))})
    files = [(f"{number:04d}-p.patch", data) for number, data in enumerate(patches, 1)]
    checked = _build.check_patches("set", files) if files else []
    options = _build.cmake_options("avx2", {})
    recipe = _build.recipe(source, checked, _llamacpp.read_programs(), options, "avx2", "debian12")
    recipe["archive_sha256"] = source.digest
    environment = program.clean_environment(work, None)
    return program.Workshop(recipe, work, io.StringIO(), environment, program.Status(None))


def test_tree_is_unpacked_and_patched_once(program: ModuleType, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tgz", TREE)
    workshop = shop(program, tmp_path, [FITS], archive)
    (tmp_path / "source.new" / "left").mkdir(parents=True)
    program.prepare_tree(workshop, archive)
    assert (tmp_path / "source" / "src" / "a.cpp").read_text() == "one\nTWO\nthree\n"
    assert not (tmp_path / "source" / ".git").exists()
    assert not (tmp_path / "source" / "left").exists()
    program.prepare_tree(workshop, tmp_path / "not read again")


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        pytest.param([FITS, FITS], r"patch 0002-p\.patch does not apply to src/a\.cpp", id="applied-already"),
        pytest.param([FUZZY], r"patch 0001-p\.patch does not apply to src/a\.cpp", id="needs-fuzz"),
        pytest.param([NO_FILE], r"patch 0001-p\.patch does not apply to src/b\.cpp", id="no-such-file"),
    ],
)
def test_patch_that_does_not_apply(program: ModuleType, tmp_path: Path, patches: list[bytes], message: str) -> None:
    archive = pack(tmp_path / "x.tgz", TREE)
    with pytest.raises(program.BuildError, match=message):
        program.prepare_tree(shop(program, tmp_path, patches, archive), archive)
    assert not (tmp_path / "source").exists()


def test_wrong_source_is_not_unpacked(program: ModuleType, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tgz", TREE)
    workshop = shop(program, tmp_path, [], archive)
    pack(archive, {**TREE, "p-1/README.md": b"changed\n"})
    with pytest.raises(program.BuildError, match=r"found sha256 .*, expected .*; nothing was unpacked"):
        program.prepare_tree(workshop, archive)
    assert not (tmp_path / "source.new").exists()


def test_source_that_is_not_llamacpp(program: ModuleType, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tgz", {"p-1/README.md": b"x"})
    with pytest.raises(program.BuildError, match=r"found no ggml/CMakeLists\.txt below vendor/llama\.cpp"):
        program.prepare_tree(shop(program, tmp_path, [], archive), archive)


def test_our_programs_are_built_for_the_instruction_set(program: ModuleType, tmp_path: Path) -> None:
    workshop = shop(program, tmp_path, [], pack(tmp_path / "x.tgz", TREE))
    program.compile_programs(workshop)
    built = tmp_path / "build" / "bin" / "cpullm-bandwidth"
    assert "ymm" in subprocess.run(["objdump", "-d", built], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path).encode() not in built.read_bytes(), "the place of the build is in the program"


def test_a_program_that_is_not_the_one_of_the_id_is_not_built(program: ModuleType, tmp_path: Path) -> None:
    workshop = shop(program, tmp_path, [], pack(tmp_path / "x.tgz", TREE))
    workshop.recipe["programs"][0]["text"] += " "
    with pytest.raises(program.BuildError, match=r"program cpullm-bandwidth: found sha256 .*, expected "):
        program.compile_programs(workshop)
    assert not list((tmp_path / "build" / "bin").iterdir())


def test_another_release_is_refused(program: ModuleType) -> None:
    with pytest.raises(program.BuildError, match=r"llamacpp_build_host: found .*; expected plan9"):
        program.check_release("plan9")


def test_foreign_flags_do_not_reach_the_compiler(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CFLAGS", "CXXFLAGS", "CMAKE_GENERATOR", "CCACHE_DISABLE", "GGML_NATIVE", "SOURCE_DATE_EPOCH"):
        monkeypatch.setenv(name, "x")
    environment = program.clean_environment(Path("/w"), "/c")
    assert "CFLAGS" not in environment
    assert "SOURCE_DATE_EPOCH" not in environment
    assert environment["CCACHE_BASEDIR"] == "/w"


def test_status_is_the_contract(program: ModuleType, tmp_path: Path) -> None:
    status = program.Status(str(tmp_path / "s"))
    status.show("build", 1, 220, "a.o")
    status.show("build", 2, 220, "b.o")
    assert json.loads((tmp_path / "s").read_text())["done"] == 1
    status.show("build", 220, 220, "z.o")
    shown = json.loads((tmp_path / "s").read_text())
    assert {name: shown[name] for name in shown if name != "updated"} == {
        "phase": "build",
        "done": 220,
        "total": 220,
        "unit": "steps",
        "message": "z.o",
    }


def test_forgotten_builds_are_swept(program: ModuleType, tmp_path: Path) -> None:
    work, old, recent = (tmp_path / ID.replace("1.0", version) for version in ("1.0", "0.1", "0.9"))
    for directory in (work, old, recent, tmp_path / "operators-own"):
        directory.mkdir()
        (directory / "recipe.json").write_text("{}")
        os.utime(directory, (1000, 1000) if directory != recent else (3000, 3000))
    program.sweep(work, 2000.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([work.name, recent.name, "operators-own"])
