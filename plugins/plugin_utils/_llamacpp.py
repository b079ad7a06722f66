# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the action plugins of the engine's build share on the controller."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._build import (
    Option,
    Patch,
    Program,
    Source,
    build_id,
    check_patches,
    cmake_options,
    parse_source,
    recipe,
    refusal,
)
from ansible_collections.cpullm.epyc.plugins.module_utils._engine import sha256_file

_PROGRAMS = Path(__file__).parents[2] / "roles" / "llamacpp_build" / "files"

# What decides a build, as arguments of an action plugin.
RECIPE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "source": {"type": "dict", "required": True},
    "patch_set": {"type": "str"},
    "patches_directory": {"type": "path", "required": True},
    "cmake_options": {"type": "dict", "default": {}},
}


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a build that do not depend on the host."""

    source: Source
    patches: list[Patch]
    programs: list[Program]
    extra_options: dict[str, object]

    def options(self, isa: str) -> list[Option]:
        """Return the cmake options for an instruction set."""
        return cmake_options(isa, self.extra_options)

    def id(self, isa: str, release: str) -> str:
        """Return the build id."""
        return build_id(self.source, self.patches, self.programs, self.options(isa), isa, release)

    def recipe(self, isa: str, release: str) -> dict[str, Any]:
        """Return what the build host needs to know."""
        return recipe(self.source, self.patches, self.programs, self.options(isa), isa, release)


def read_inputs(arguments: Mapping[str, Any]) -> Inputs:
    """Return the inputs that RECIPE_ARGUMENTS name; ValueError says which one is wrong and how."""
    extra = {str(name): value for name, value in arguments["cmake_options"].items()}
    cmake_options("avx2", extra)
    patch_set = arguments["patch_set"]
    patches = read_patches(patch_set, Path(arguments["patches_directory"])) if patch_set else []
    return Inputs(parse_source(arguments["source"]), patches, read_programs(), extra)


def read_programs() -> list[Program]:
    """Return our own programs: the C files of the role that builds, by name."""
    files = [(path.stem, path.read_bytes()) for path in sorted(_PROGRAMS.glob("*.c"))]
    return [Program(name, hashlib.sha256(data).hexdigest(), data) for name, data in files]


def read_patches(patch_set: str, directory: Path) -> list[Patch]:
    """Return the patches of a set: a directory below ``directory``, or one given by an absolute path."""
    path = Path(patch_set) if patch_set.startswith("/") else directory / patch_set
    if not path.is_dir():
        known = ", ".join(sorted(entry.name for entry in directory.glob("*/"))) or "none"
        raise ValueError(
            refusal(
                "llamacpp_build_patch_set",
                f"{patch_set!r}, which is no directory",
                f"a set of the collection ({known}), or an absolute path on the controller",
                "Name one, or set it to null to build without patches.",
            )
        )
    return check_patches(str(path), ((entry.name, entry.read_bytes()) for entry in path.glob("*.patch")))


def cache_directory() -> Path:
    """Return the collection's cache on the controller; it may be absent and may be removed at any time."""
    return Path(os.environ.get("CPULLM_CACHE") or Path.home() / ".cache" / "cpullm")


def cached_artifact(cache: Path, identifier: str) -> tuple[Path, str | None]:
    """Return the place of a build's artifact in the cache, and its sha256 where it is whole."""
    path = cache / "artifacts" / f"{identifier}.tar.gz"
    try:
        digest = Path(f"{path}.sha256").read_text(encoding="ascii").split()[0]
        return path, digest if sha256_file(str(path)) == digest else None
    except (OSError, IndexError, UnicodeDecodeError):
        return path, None


def source_path(cache: Path, source: Source) -> Path:
    """Return where the cache keeps a source: sdists under their own name, others under one that holds the pin."""
    if source.type == "archive":
        return Path(source.location)
    if source.type == "sdist":
        name = f"{source.location.replace('-', '_')}-{source.version}.tar.gz"
    elif source.type == "git":
        name = f"{source.digest}.tar.gz"
    else:
        name = f"{source.digest[:16]}-{Path(source.location.split('?')[0]).name or 'archive'}"
    return cache / "sdist" / name


def source_digest(cache: Path, source: Source) -> str | None:
    """Return the sha256 that the archive of a source must have.

    None for a git source that was not fetched yet: its commit is the pin, and the archive made of
    it on this controller is remembered with its hash.
    """
    if source.type != "git":
        return source.digest
    try:
        return Path(f"{source_path(cache, source)}.sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def have_source(cache: Path, source: Source) -> bool:
    """Return whether the archive is there and right.

    ValueError for an archive of the operator's own that is absent or differs; a damaged file of
    the cache merely does not count.
    """
    path = source_path(cache, source)
    expected = source_digest(cache, source)
    try:
        found: str | None = sha256_file(str(path))
    except OSError as error:
        if source.type == "archive":
            raise ValueError(
                refusal("llamacpp_build_source.path", f"{path}: {error.strerror}", "a file", "Correct the path.")
            ) from error
        found = None
    if source.type == "archive" and found != expected:
        raise ValueError(mismatch(str(path), found, expected))
    return found is not None and found == expected


def mismatch(origin: str, found: str | None, expected: str | None) -> str:
    """Return the refusal of a source whose hash differs."""
    return refusal(
        "llamacpp_build_source.sha256",
        f"{found} for {origin}",
        expected,
        "Nothing was unpacked or installed. Correct the pin only if you know why the file differs.",
    )
