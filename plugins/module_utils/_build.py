# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a build of llama.cpp is made of: source, patches, options and the id that follows from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Part of every id: raise it when the same inputs give other files than before.
RECIPE = 1

TARGETS = ("llama-server", "llama-bench", "llama-gguf-split", "llama-quantize", "llama-perplexity")

SOURCE_TYPES = ("sdist", "archive", "archive_url", "git")

_BASE_OPTIONS = {
    "BUILD_SHARED_LIBS": "OFF",
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_CCACHE": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "ON",
    "GGML_RPC": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_OPENSSL": "ON",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}

# The switches of ggml/src/ggml-cpu/CMakeLists.txt for x86, and the names that /proc/cpuinfo
# has for the instructions which the compiler may then use.
_AVX2_OPTIONS = ("GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_FMA", "GGML_F16C", "GGML_BMI2")
_AVX512_OPTIONS = ("GGML_AVX512", "GGML_AVX512_VNNI", "GGML_AVX512_VBMI", "GGML_AVX512_BF16")
_OTHER_ISA_OPTIONS = ("GGML_AVX_VNNI", "GGML_AMX_TILE", "GGML_AMX_INT8", "GGML_AMX_BF16")
_AVX2_CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "bmi2")
_AVX512_CPU_FLAGS = (
    "avx512f",
    "avx512cd",
    "avx512vl",
    "avx512dq",
    "avx512bw",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
)
_ISA_CPU_FLAGS = {"avx2": _AVX2_CPU_FLAGS, "avx512": _AVX2_CPU_FLAGS + _AVX512_CPU_FLAGS}
_ISA_OPTIONS = {"avx2": _AVX2_OPTIONS, "avx512": _AVX2_OPTIONS + _AVX512_OPTIONS}
# Best first: what a host without a wish gets.
ISAS = ("avx512", "avx2")

_GUARDED_OPTIONS = frozenset(
    _AVX2_OPTIONS
    + _AVX512_OPTIONS
    + _OTHER_ISA_OPTIONS
    + (
        "BUILD_SHARED_LIBS",
        "CMAKE_CXX_COMPILER_LAUNCHER",
        "CMAKE_C_COMPILER_LAUNCHER",
        "GGML_CCACHE",
        "GGML_NATIVE",
        "GGML_RPC",
        "LLAMA_BUILD_COMMIT",
        "LLAMA_BUILD_NUMBER",
        "OpenMP_gomp_LIBRARY",
    )
)

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~]*(?:-[A-Za-z0-9._+~]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATCH_NAME = re.compile(r"(\d{4})-[A-Za-z0-9._+-]+\.patch")
_OPTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_SOURCE_KEYS = {
    "sdist": {"type", "version", "sha256", "package", "subdirectory", "build_number"},
    "archive": {"type", "version", "sha256", "path", "subdirectory", "build_number"},
    "archive_url": {"type", "version", "sha256", "url", "subdirectory", "build_number"},
    "git": {"type", "version", "commit", "url", "subdirectory", "build_number"},
}


@dataclass(frozen=True)
class Source:
    """Where the tree comes from; ``digest`` is the sha256 of the archive, or the commit of a git source."""

    type: str
    version: str
    digest: str
    location: str
    subdirectory: str
    build_number: int


@dataclass(frozen=True)
class Patch:
    """One patch file: its name, the sha256 of its bytes, and the bytes."""

    name: str
    sha256: str
    data: bytes


@dataclass(frozen=True)
class Program:
    """A program of ours that is built beside the engine from one C file: its name, the sha256 of the file, the file."""

    name: str
    sha256: str
    data: bytes


@dataclass(frozen=True)
class Option:
    """One cmake cache entry."""

    name: str
    value: str


def refusal(subject: str, found: object, expected: object, way_out: str) -> str:
    """Return the sentence with which something is refused."""
    return f"{subject}: found {found}; expected {expected}. {way_out}"


def parse_source(raw: object) -> Source:
    """Return the checked form of ``llamacpp_build_source``.

    Raises ValueError with name, found, expected and way out for anything that is not pinned.
    """
    name = "llamacpp_build_source"
    if not isinstance(raw, Mapping):
        raise ValueError(refusal(name, repr(raw), "a dictionary with type and version", "See the role's README."))
    kind = str(raw.get("type"))
    if kind not in SOURCE_TYPES:
        raise ValueError(refusal(f"{name}.type", repr(kind), f"one of {', '.join(SOURCE_TYPES)}", "Name the type."))
    unknown = sorted(str(key) for key in raw if key not in _SOURCE_KEYS[kind])
    if unknown:
        known = ", ".join(sorted(_SOURCE_KEYS[kind]))
        raise ValueError(refusal(name, f"the key {unknown[0]}", f"for type {kind}: {known}", "Remove the key."))
    version = str(raw.get("version", ""))
    if not _VERSION.fullmatch(version) or len(version) > 64:
        raise ValueError(
            refusal(
                f"{name}.version",
                repr(version),
                "up to 64 letters, digits, dots, plus, tilde and single hyphens",
                "The version names the build's directory.",
            )
        )
    if kind == "git":
        pin, digest, form = "commit", raw.get("commit"), _COMMIT
    else:
        pin, digest, form = "sha256", raw.get("sha256"), _SHA256
    if not isinstance(digest, str) or not form.fullmatch(digest):
        length = 40 if kind == "git" else 64
        raise ValueError(
            refusal(f"{name}.{pin}", repr(digest), f"{length} lower-case hex digits", "A source is always pinned.")
        )
    location = _location(name, kind, raw)
    default_subdirectory = "vendor/llama.cpp" if kind == "sdist" else ""
    subdirectory = str(raw.get("subdirectory", default_subdirectory)).strip("/")
    if any(part in (".", "..") for part in subdirectory.split("/")):
        raise ValueError(
            refusal(f"{name}.subdirectory", repr(subdirectory), "a path inside the archive", "Name it without dots.")
        )
    build_number = raw.get("build_number", 0)
    if isinstance(build_number, bool) or not re.fullmatch(r"[0-9]{1,9}", str(build_number)):
        raise ValueError(
            refusal(f"{name}.build_number", repr(build_number), "a number from 0 on", "It only shows in --version.")
        )
    return Source(kind, version, digest, location, subdirectory, int(build_number))


def _location(name: str, kind: str, raw: Mapping[str, object]) -> str:
    """Return the package, path or URL of a source."""
    if kind == "sdist":
        package = str(raw.get("package", "llama-cpp-python"))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", package):
            raise ValueError(refusal(f"{name}.package", repr(package), "a package name", "See the role's README."))
        return package
    key = "path" if kind == "archive" else "url"
    location = raw.get(key)
    if not isinstance(location, str) or not location:
        raise ValueError(refusal(f"{name}.{key}", repr(location), f"the {key} of the source", "Set it."))
    if kind == "archive" and not location.startswith("/"):
        raise ValueError(
            refusal(f"{name}.path", repr(location), "an absolute path on the controller", "Write it in full.")
        )
    if kind == "archive_url" and not re.match(r"(https?|file)://", location):
        raise ValueError(refusal(f"{name}.url", repr(location), "an http, https or file URL", "Write it in full."))
    if location.startswith("-"):
        raise ValueError(refusal(f"{name}.{key}", repr(location), f"a {key}", "It must not begin with a hyphen."))
    return location


def check_patches(origin: str, files: Iterable[tuple[str, bytes]]) -> list[Patch]:
    """Return the patches of a set in the order of their numbers.

    ``files`` are the names and bytes of all files ending in ``.patch``. Raises ValueError for an
    empty set, a name without number, a number that occurs twice, or a file without a hunk.
    """
    patches: list[Patch] = []
    numbers: dict[str, str] = {}
    way_out = "Number the patches 0001-..., 0002-..., or set llamacpp_build_patch_set to null to build without any."
    for name, data in sorted(files):
        match = _PATCH_NAME.fullmatch(name)
        if match is None:
            raise ValueError(refusal(f"patch set {origin}", f"the file {name}", "names like 0001-what.patch", way_out))
        if match[1] in numbers:
            raise ValueError(
                refusal(f"patch set {origin}", f"{numbers[match[1]]} and {name}", "each number once", way_out)
            )
        if b"\n--- " not in b"\n" + data or b"\n+++ " not in data or b"\n@@ " not in data:
            raise ValueError(refusal(f"patch {origin}/{name}", "no hunk", "a unified diff", way_out))
        numbers[match[1]] = name
        patches.append(Patch(name, hashlib.sha256(data).hexdigest(), data))
    if not patches:
        raise ValueError(refusal(f"patch set {origin}", "no file NNNN-*.patch", "at least one", way_out))
    return patches


def missing_cpu_flags(isa: str, cpu_flags: Iterable[str]) -> list[str]:
    """Return the flags of /proc/cpuinfo that a build for ``isa`` needs and the CPU lacks."""
    present = set(cpu_flags)
    return [flag for flag in _ISA_CPU_FLAGS[isa] if flag not in present]


def choose_isa(wish: str | None, cpu_flags: Sequence[str]) -> str:
    """Return the instruction set to build for: the wished one, or the best that the CPU has.

    Raises ValueError naming the missing CPU flags.
    """
    if wish is not None and wish not in ISAS:
        raise ValueError(refusal("llamacpp_build_isa", repr(wish), f"one of {', '.join(ISAS)}, or null", "Correct it."))
    for isa in ISAS if wish is None else (wish,):
        missing = missing_cpu_flags(isa, cpu_flags)
        if not missing:
            return isa
    needs = ", ".join(_ISA_CPU_FLAGS[isa])
    way_out = (
        "This CPU cannot run the engine."
        if isa == "avx2"
        else "Set llamacpp_build_isa to avx2, or to null for the best that the CPU has."
    )
    raise ValueError(refusal(f"llamacpp_build_isa {isa}", f"a CPU without {', '.join(missing)}", needs, way_out))


def cmake_options(isa: str, extra: Mapping[str, object]) -> list[Option]:
    """Return every cmake option of a build, sorted by name.

    ``extra`` are the operator's; ValueError for one that the collection decides.
    """
    options = dict(_BASE_OPTIONS)
    for name in (*_AVX2_OPTIONS, *_AVX512_OPTIONS, *_OTHER_ISA_OPTIONS):
        options[name] = "ON" if name in _ISA_OPTIONS[isa] else "OFF"
    for name, value in extra.items():
        if not _OPTION_NAME.fullmatch(str(name)):
            raise ValueError(
                refusal("llamacpp_build_cmake_options", repr(name), "names of cmake options", "Correct the name.")
            )
        if name in _GUARDED_OPTIONS:
            raise ValueError(
                refusal(
                    "llamacpp_build_cmake_options",
                    f"{name}={_option_value(value)}",
                    "no option that the role decides",
                    "Instruction sets follow llamacpp_build_isa; native and RPC builds are never made.",
                )
            )
        options[str(name)] = _option_value(value)
    return [Option(name, options[name]) for name in sorted(options)]


def _option_value(value: object) -> str:
    """Return a cmake value: ON or OFF for booleans, else the text."""
    if isinstance(value, bool):
        return "ON" if value else "OFF"
    return str(value)


def parse_os_release(text: str) -> str:
    """Return the distribution release that decides which C library a build needs: ``debian12``, ``ubuntu24.04``.

    ``text`` is /etc/os-release (os-release(5)). Debian's testing has no VERSION_ID; its codename serves.
    Raises ValueError when there is no ID or nothing to tell releases apart.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith("#"):
            fields[name] = value.strip().strip("\"'")
    release = fields.get("VERSION_ID") or fields.get("VERSION_CODENAME", "")
    label = (fields.get("ID", "") + release).lower()
    if not fields.get("ID") or not release or not re.fullmatch(r"[a-z0-9][a-z0-9._]*", label):
        raise ValueError(
            refusal(
                "/etc/os-release",
                f"ID={fields.get('ID')!r}, VERSION_ID={fields.get('VERSION_ID')!r}",
                "a distribution and its release",
                "Debian 12 and 13, Ubuntu 22.04 and 24.04 are supported.",
            )
        )
    return label


def parse_cpu_flags(text: str) -> list[str]:
    """Return the sorted flags that every CPU of /proc/cpuinfo has in common."""
    common: set[str] | None = None
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator and name.strip() == "flags":
            flags = set(value.split())
            common = flags if common is None else common & flags
    return sorted(common or ())


def build_id(
    source: Source,
    patches: Sequence[Patch],
    programs: Sequence[Program],
    options: Sequence[Option],
    isa: str,
    release: str,
) -> str:
    """Return the id of a build: ``VERSION-ISA-RELEASE-HASH``, equal exactly when every input is equal.

    The hash covers the source's digest, the patches' hashes in their order, name and hash of our own programs, every
    cmake option, the engine's programs and the release. Names of patches and the place that the source came
    from are not in it: they do not change the result.
    """
    inputs = {
        "recipe": RECIPE,
        "source": source.digest,
        "subdirectory": source.subdirectory,
        "build_number": source.build_number,
        "patches": [patch.sha256 for patch in patches],
        "programs": [[program.name, program.sha256] for program in programs],
        "options": [[option.name, option.value] for option in options],
        "targets": list(TARGETS),
        "isa": isa,
        "release": release,
        "machine": "x86_64",
    }
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return f"{source.version}-{isa}-{release}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def recipe(
    source: Source,
    patches: Sequence[Patch],
    programs: Sequence[Program],
    options: Sequence[Option],
    isa: str,
    release: str,
) -> dict[str, Any]:
    """Return what the build host needs to know, as data for JSON; bytes of patches and programs are Latin-1 text."""
    return {
        "schema": 1,
        "id": build_id(source, patches, programs, options, isa, release),
        "isa": isa,
        "release": release,
        "version": source.version,
        "source": asdict(source),
        "patches": [_as_text(patch) for patch in patches],
        "programs": [_as_text(program) for program in programs],
        "options": [asdict(option) for option in options],
        "targets": list(TARGETS),
    }


def _as_text(file: Patch | Program) -> dict[str, str]:
    """Return a file as data for JSON."""
    return {"name": file.name, "sha256": file.sha256, "text": file.data.decode("latin-1")}


def owners(plans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each build id: ``{"id", "owner", "hosts", "lacking"}``.

    ``plans`` are ``{"host", "id", "installed"}`` in the order of the play. The owner is the first
    host that lacks the build, or the first of all where none does.
    """
    builds: dict[str, dict[str, Any]] = {}
    for plan in plans:
        build = builds.setdefault(plan["id"], {"id": plan["id"], "owner": plan["host"], "hosts": [], "lacking": []})
        build["hosts"].append(plan["host"])
        if not plan["installed"]:
            if not build["lacking"]:
                build["owner"] = plan["host"]
            build["lacking"].append(plan["host"])
    return list(builds.values())
