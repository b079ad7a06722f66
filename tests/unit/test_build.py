"""What names a build, and what is refused before one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _build
from hypothesis import given
from hypothesis import strategies as st

SHA = "a" * 64
COMMIT = "b" * 40
DIFF = b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+new\n"
SDIST = {"type": "sdist", "version": "0.3.36", "sha256": SHA}
ZEN5 = sorted({*_build._ISA_CPU_FLAGS["avx512"], "sse4_1", "lm"})
HASWELL = ["avx", "avx2", "bmi2", "f16c", "fma", "lm", "sse4_2"]


def patch(number: int, data: bytes = DIFF) -> _build.Patch:
    return _build.Patch(f"{number:04d}-x.patch", hashlib.sha256(data).hexdigest(), data)


def program(name: str, data: bytes = b"int main(void) { return 0; }\n") -> _build.Program:
    return _build.Program(name, hashlib.sha256(data).hexdigest(), data)


def name(**changes: object) -> str:
    inputs: dict[str, object] = {
        "source": _build.parse_source(SDIST),
        "patches": [patch(1), patch(2, DIFF + b"-more\n")],
        "programs": [program("reader")],
        "options": _build.cmake_options("avx2", {}),
        "isa": "avx2",
        "release": "debian12",
        **changes,
    }
    return _build.build_id(**inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(SDIST, ("sdist", SHA, "llama-cpp-python", "vendor/llama.cpp"), id="sdist"),
        pytest.param(
            {"type": "archive", "version": "b1", "sha256": SHA, "path": "/srv/x.tar"},
            ("archive", SHA, "/srv/x.tar", ""),
            id="archive",
        ),
        pytest.param(
            {"type": "archive_url", "version": "b1", "sha256": SHA, "url": "https://x/y.tgz", "subdirectory": "/a/b/"},
            ("archive_url", SHA, "https://x/y.tgz", "a/b"),
            id="url-with-subdirectory",
        ),
        pytest.param(
            {"type": "git", "version": "b1", "commit": COMMIT, "url": "https://x/y.git"},
            ("git", COMMIT, "https://x/y.git", ""),
            id="git",
        ),
    ],
)
def test_source_is_read(raw: dict[str, object], expected: tuple[str, ...]) -> None:
    source = _build.parse_source(raw)
    assert (source.type, source.digest, source.location, source.subdirectory) == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(None, "llamacpp_build_source: found None", id="none"),
        pytest.param({"type": "rpm"}, "found 'rpm'; expected one of sdist, archive, archive_url, git", id="type"),
        pytest.param({}, "llamacpp_build_source.type", id="no-type"),
        pytest.param({**SDIST, "sha265": SHA}, "found the key sha265", id="misspelt-key"),
        pytest.param({"type": "sdist", "version": "1"}, "sha256: found None; expected 64", id="unpinned"),
        pytest.param({**SDIST, "sha256": SHA.upper()}, "64 lower-case hex digits", id="upper-case"),
        pytest.param({**SDIST, "version": "../x"}, "llamacpp_build_source.version", id="version-with-path"),
        pytest.param({**SDIST, "version": "1" * 65}, "up to 64", id="long-version"),
        pytest.param({**SDIST, "package": "-r/etc/passwd"}, "a package name", id="package-is-an-option"),
        pytest.param({**SDIST, "subdirectory": "a/../.."}, "without dots", id="subdirectory-leaves"),
        pytest.param({**SDIST, "build_number": "x"}, "build_number", id="build-number"),
        pytest.param(
            {"type": "git", "version": "b1", "commit": "main", "url": "https://x"}, "40 lower-case hex", id="branch"
        ),
        pytest.param(
            {"type": "git", "version": "b1", "commit": COMMIT, "url": "--upload-pack=x"}, "a hyphen", id="git-option"
        ),
        pytest.param(
            {"type": "archive", "version": "b1", "sha256": SHA, "path": "x.tar"}, "absolute path", id="relative-path"
        ),
        pytest.param(
            {"type": "archive_url", "version": "b1", "sha256": SHA, "url": "ftp://x"}, "http, https or file", id="ftp"
        ),
        pytest.param({"type": "archive_url", "version": "b1", "sha256": SHA}, ".url: found None", id="no-url"),
    ],
)
def test_source_is_refused(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"expected") as caught:
        _build.parse_source(raw)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param([], "no file NNNN-*.patch", id="empty"),
        pytest.param([("fix.patch", DIFF)], "the file fix.patch", id="no-number"),
        pytest.param([("0001-a.patch", DIFF), ("0001-b.patch", DIFF)], "0001-a.patch and 0001-b.patch", id="twice"),
        pytest.param([("0001-a.patch", b"Subject: nothing\n")], "no hunk", id="no-diff"),
    ],
)
def test_patch_set_is_refused(files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(ValueError, match=r"llamacpp_build_patch_set") as caught:
        _build.check_patches("set", files)
    assert message in str(caught.value)


def test_patches_come_in_the_order_of_their_numbers() -> None:
    files = [("0010-b.patch", DIFF), ("0002-a.patch", DIFF)]
    assert [patch.name for patch in _build.check_patches("set", files)] == ["0002-a.patch", "0010-b.patch"]


@pytest.mark.parametrize(
    ("wish", "flags", "isa"),
    [
        pytest.param(None, ZEN5, "avx512", id="best-of-zen-5"),
        pytest.param(None, HASWELL, "avx2", id="best-of-haswell"),
        pytest.param("avx2", ZEN5, "avx2", id="wish"),
        pytest.param(None, [flag for flag in ZEN5 if flag != "avx512_bf16"], "avx2", id="ice-lake-has-no-bf16"),
    ],
)
def test_instruction_set(wish: str | None, flags: list[str], isa: str) -> None:
    assert _build.choose_isa(wish, flags) == isa


@pytest.mark.parametrize(
    ("wish", "flags", "message"),
    [
        pytest.param("avx512", HASWELL, "a CPU without avx512f,", id="avx512-on-haswell"),
        pytest.param("avx512", [f for f in ZEN5 if f != "avx512vbmi"], "a CPU without avx512vbmi;", id="one-flag"),
        pytest.param(None, ["avx", "sse4_2"], "a CPU without avx2, fma, f16c, bmi2;", id="sandy-bridge"),
        pytest.param("native", ZEN5, "one of avx512, avx2, or null", id="native"),
        pytest.param(None, [], "This CPU cannot run the engine", id="no-flags"),
    ],
)
def test_instruction_set_is_refused(wish: str | None, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="llamacpp_build_isa") as caught:
        _build.choose_isa(wish, flags)
    assert message in str(caught.value)


def test_options_are_explicit_for_both_instruction_sets() -> None:
    avx2 = {option.name: option.value for option in _build.cmake_options("avx2", {})}
    avx512 = {option.name: option.value for option in _build.cmake_options("avx512", {"GGML_LTO": True})}
    assert avx2["GGML_NATIVE"] == avx512["GGML_NATIVE"] == "OFF"
    assert avx2["GGML_RPC"] == avx512["GGML_RPC"] == "OFF"
    differing = {name for name, value in avx2.items() if avx512[name] != value}
    assert differing == {"GGML_AVX512", "GGML_AVX512_VNNI", "GGML_AVX512_VBMI", "GGML_AVX512_BF16"}
    assert avx512["GGML_LTO"] == "ON"


@pytest.mark.parametrize("option", ["GGML_RPC", "GGML_NATIVE", "GGML_AVX512", "LLAMA_BUILD_COMMIT", "A B"])
def test_options_of_the_role_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="llamacpp_build_cmake_options"):
        _build.cmake_options("avx2", {option: True})


@pytest.mark.parametrize(
    ("text", "release"),
    [
        pytest.param('ID=debian\nVERSION_ID="12"\n', "debian12", id="bookworm"),
        pytest.param("# x\nVERSION_ID='24.04'\nID=ubuntu\n", "ubuntu24.04", id="noble"),
        pytest.param("ID=debian\nVERSION_CODENAME=forky\n", "debianforky", id="testing"),
    ],
)
def test_release(text: str, release: str) -> None:
    assert _build.parse_os_release(text) == release


@pytest.mark.parametrize("text", ["", "ID=debian\n", "ID=a/b\nVERSION_ID=1\n"])
def test_release_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="/etc/os-release: found"):
        _build.parse_os_release(text)


@given(st.text())
def test_release_of_any_text_is_safe_in_a_path_or_refused(text: str) -> None:
    try:
        release = _build.parse_os_release(text)
    except ValueError:
        return
    assert "/" not in release
    assert release not in (".", "..")


def test_cpu_flags_are_those_of_every_cpu() -> None:
    text = "processor: 0\nflags\t\t: avx2 fma lm\n\nprocessor: 1\nflags\t\t: lm avx2\n"
    assert _build.parse_cpu_flags(text) == ["avx2", "lm"]
    assert _build.parse_cpu_flags("") == []


def test_id_names_version_instruction_set_and_release() -> None:
    assert name().startswith("0.3.36-avx2-debian12-")
    assert name() == name()


source = _build.parse_source(SDIST)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"source": replace(source, digest="c" * 64)}, id="source"),
        pytest.param({"source": replace(source, subdirectory="")}, id="subdirectory"),
        pytest.param({"source": replace(source, build_number=7)}, id="build-number"),
        pytest.param({"patches": []}, id="no-patches"),
        pytest.param({"patches": [patch(1)]}, id="one-patch-less"),
        pytest.param({"patches": [patch(2, DIFF + b"-more\n"), patch(1)]}, id="other-order"),
        pytest.param({"options": _build.cmake_options("avx2", {"GGML_LTO": True})}, id="option"),
        pytest.param({"release": "debian13"}, id="release"),
        pytest.param({"isa": "avx512"}, id="isa"),
        pytest.param({"programs": []}, id="no-program"),
        pytest.param({"programs": [program("writer")]}, id="name-of-a-program"),
        pytest.param({"programs": [program("reader", b"int main(void) { return 1; }\n")]}, id="program"),
    ],
)
def test_id_follows_every_input(changes: dict[str, object]) -> None:
    assert name(**changes)[-12:] != name()[-12:]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"source": replace(source, type="archive", location="/x")}, id="where-it-came-from"),
        pytest.param(
            {"patches": [patch(3), patch(4, DIFF + b"-more\n")]},
            id="names-of-patches",
        ),
    ],
)
def test_id_ignores_what_does_not_change_the_result(changes: dict[str, object]) -> None:
    assert name(**changes) == name()


@given(st.binary())
def test_recipe_carries_any_bytes_of_patches_and_programs(data: bytes) -> None:
    options = _build.cmake_options("avx2", {})
    recipe = _build.recipe(source, [patch(1, data)], [program("p", data)], options, "avx2", "debian12")
    assert recipe["patches"][0]["text"].encode("latin-1") == data
    assert recipe["programs"][0]["text"].encode("latin-1") == data


def test_one_owner_for_each_build() -> None:
    plans = [
        {"host": "a", "id": "x", "installed": True},
        {"host": "b", "id": "x", "installed": False},
        {"host": "c", "id": "y", "installed": True},
        {"host": "d", "id": "x", "installed": False},
    ]
    assert _build.owners(plans) == [
        {"id": "x", "owner": "b", "hosts": ["a", "b", "d"], "lacking": ["b", "d"]},
        {"id": "y", "owner": "c", "hosts": ["c"], "lacking": []},
    ]
