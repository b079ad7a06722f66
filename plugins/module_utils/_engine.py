# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds of the engine as files: archives, the BUILD.json record, installed trees and the current link.

The build program on the build host is copied there together with this file, so nothing but the
standard library is imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

RECORD = "BUILD.json"
LINK = "current"
# What it named before: where a rollback goes.
PREVIOUS = "previous"
BUILD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*-(avx2|avx512)-[a-z0-9][a-z0-9._]*-[0-9a-f]{12}")
_TEMPORARY = ".cpullm-"

# A release of llama.cpp has about 3,000 files and 150 MB; ten times that is no longer one.
_MAX_MEMBERS = 100_000
_MAX_BYTES = 4 << 30


def sha256_file(path: str) -> str:
    """Return the sha256 of a file as hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: str, data: bytes, mode: int = 0o644) -> None:
    """Replace a file as a whole: temporary file beside it, fsync, rename."""
    descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def to_json(value: object) -> bytes:
    """Return the one JSON text of a value that hashes and files use."""
    return (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()


def fsync_directory(path: str) -> None:
    """Make the names of a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unpack(archive: str, destination: str, below: str = "", strip_top: bool = False) -> None:
    """Unpack a tar archive (any compression that tarfile knows) into an existing empty directory.

    Only the members below ``below`` are taken, relative to it; ``strip_top`` first drops the one
    directory that holds everything. Regular files, directories and links that stay inside are
    taken; anything else, absolute names and dots raise ValueError. (The ``data`` filter of
    tarfile came with Python 3.11.4; Debian 12 has 3.11.2.)
    """
    links: list[tuple[str, str]] = []
    total = count = 0
    top: str | None = None
    prefix = below.strip("/")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                count += 1
                total += max(member.size, 0)
                if count > _MAX_MEMBERS or total > _MAX_BYTES:
                    raise ValueError(f"{archive}: more than {_MAX_MEMBERS} files or {_MAX_BYTES} bytes unpacked")
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.name.startswith("/") or ".." in parts:
                    raise ValueError(f"{archive}: the name {member.name!r} leads out of the archive")
                if strip_top and parts:
                    top = top or parts[0]
                    if parts[0] != top or (len(parts) == 1 and not member.isdir()):
                        raise ValueError(f"{archive}: {member.name!r} lies beside the top directory {top!r}")
                    parts = parts[1:]
                name = "/".join(parts)
                if prefix:
                    if not name.startswith(prefix + "/"):
                        continue
                    name = name[len(prefix) + 1 :]
                if not name:
                    continue
                if member.issym():
                    links.append((name, member.linkname))
                else:
                    _unpack_member(tar, member, os.path.join(destination, name))
    except (tarfile.TarError, EOFError, OSError) as error:
        # tarfile tells of each way to open an archive on a line of its own.
        raise ValueError(f"{archive}: no readable tar archive: {' '.join(str(error).split())}") from error
    # Last, so that no file is ever written through a link.
    root = os.path.realpath(destination)
    for name, target in links:
        inside = os.path.normpath(os.path.join(os.path.dirname(name), target))
        path = os.path.join(root, name)
        parent = os.path.dirname(path)
        os.makedirs(parent, mode=0o755, exist_ok=True)
        # Dots only at the front, and no link below a link: otherwise the names would not tell where it leads.
        plain = re.fullmatch(r"(\.\./)*(?!\.\.(/|$))[^/]+(/(?!\.\.(/|$))[^/]+)*/?", target)
        if (
            not plain
            or inside.split("/")[0] == ".."
            or os.path.realpath(os.path.dirname(path)) != os.path.dirname(path)
        ):
            raise ValueError(f"{archive}: the link {name!r} leads out of the archive, to {target!r}")
        os.symlink(target, path)


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    """Write one file or directory."""
    os.makedirs(path if member.isdir() else os.path.dirname(path), mode=0o755, exist_ok=True)
    if member.isdir():
        return
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        raise ValueError(f"{tar.name!r}: {member.name!r} is neither file, directory nor symbolic link")
    with content, open(path, "xb") as stream:
        shutil.copyfileobj(content, stream, 1 << 20)
        os.fchmod(stream.fileno(), 0o755 if member.mode & 0o100 else 0o644)


def missing_build_packages(ccache: bool) -> list[str]:
    """Return the Debian packages that a build host lacks, judged by the programs and headers themselves."""
    programs = {"cmake": "cmake", "ninja": "ninja-build", "g++": "g++", "patch": "patch"}
    if ccache:
        programs["ccache"] = "ccache"
    missing = [package for program, package in programs.items() if shutil.which(program) is None]
    if not os.path.exists("/usr/include/openssl/ssl.h"):
        missing.append("libssl-dev")
    return sorted(missing)


def missing_runtime_packages(packages: Sequence[str], dpkg: str = "/var/lib/dpkg/info") -> list[str]:
    """Return which packages dpkg has no files of; quicker than asking dpkg-query."""
    return [
        package
        for package in packages
        if not any(os.path.exists(os.path.join(dpkg, f"{package}{suffix}.list")) for suffix in ("", ":amd64"))
    ]


def list_files(root: str) -> list[dict[str, Any]]:
    """Return path, bytes, sha256 and whether executable of every file below ``root``, sorted; the record left out."""
    files = []
    for directory, _names, names in sorted(os.walk(root)):
        for name in sorted(names):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, root)
            if relative != RECORD:
                status = os.lstat(path)
                files.append(
                    {
                        "path": relative,
                        "bytes": status.st_size,
                        "sha256": sha256_file(path),
                        "executable": bool(status.st_mode & 0o100),
                    }
                )
    return sorted(files, key=lambda entry: str(entry["path"]))


def _is(value: object, kind: type) -> bool:
    """Return whether a value of JSON is of a kind; true and false are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def read_record(root: str) -> dict[str, Any]:
    """Return the BUILD.json of a build; ValueError where it is absent or is not one."""
    path = os.path.join(root, RECORD)
    try:
        with open(path, encoding="utf-8") as stream:
            record = json.load(stream)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != 1 or not isinstance(record.get("files"), list):
        raise ValueError(f"{path}: no record of a build")
    kinds = {"path": str, "bytes": int, "sha256": str, "executable": bool}
    for entry in record["files"]:
        if not isinstance(entry, dict) or any(not _is(entry.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"{path}: a file without one of {', '.join(kinds)}")
        parts = entry["path"].split("/")
        if ".." in parts or parts[0] == "" or not entry["path"].isprintable():
            raise ValueError(f"{path}: a file that lies outside of the build")
    return record


def find_damage(root: str, identifier: str, deep: bool) -> list[str]:
    """Return what is wrong with an installed build; an empty list means complete.

    Sizes and modes are always compared, contents (sha256) when ``deep``.
    """
    try:
        record = read_record(root)
    except ValueError as error:
        return [str(error)]
    problems = []
    if record.get("id") != identifier:
        problems.append(f"{root}/{RECORD}: found id {record.get('id')}, expected {identifier}")
    for entry in record["files"]:
        path = os.path.join(root, entry["path"])
        try:
            status = os.lstat(path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if status.st_size != entry["bytes"]:
            problems.append(f"{path}: found {status.st_size} bytes, expected {entry['bytes']}")
        elif bool(status.st_mode & 0o100) != entry["executable"]:
            problems.append(f"{path}: found mode {status.st_mode & 0o777:04o}, another than the build's")
        elif deep and (found := sha256_file(path)) != entry["sha256"]:
            problems.append(f"{path}: found sha256 {found}, expected {entry['sha256']}")
    return problems


def current_build(prefix: str) -> str | None:
    """Return the name that the current link holds, or None."""
    try:
        return os.readlink(os.path.join(prefix, LINK))
    except OSError:
        return None


def previous_build(prefix: str) -> str | None:
    """Return the build that was current before, or None."""
    try:
        return os.readlink(os.path.join(prefix, PREVIOUS))
    except OSError:
        return None


def list_builds(prefix: str) -> list[dict[str, Any]]:
    """Return ``{"id", "used"}`` of every build below ``prefix``, the least recently installed or activated first."""
    try:
        names = os.listdir(prefix)
    except FileNotFoundError:
        return []
    builds = []
    for name in names:
        path = os.path.join(prefix, name)
        if BUILD_NAME.fullmatch(name) and os.path.isdir(path) and not os.path.islink(path):
            builds.append({"id": name, "used": os.stat(path).st_mtime})
    return sorted(builds, key=lambda build: (build["used"], build["id"]))


def running_builds(prefix: str, proc: str = "/proc") -> set[str]:
    """Return the ids of the builds that some process was started from."""
    found = set()
    root = os.path.realpath(prefix) + "/"
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                program = os.readlink(os.path.join(proc, name, "exe"))
            except OSError:
                continue
            if program.startswith(root):
                found.add(program[len(root) :].split("/")[0])
    return found


def choose_old(builds: Sequence[Mapping[str, Any]], keep: int, needed: Collection[str]) -> list[str]:
    """Return the ids to remove so that ``keep`` builds stay; those in ``needed`` always stay, then the latest used."""
    others = [str(build["id"]) for build in builds if build["id"] not in needed]
    room = max(keep - (len(builds) - len(others)), 0)
    return others[: len(others) - room] if room else others


def install(archive: str, sha256: str, prefix: str, identifier: str) -> None:
    """Unpack an artifact so that ``prefix/identifier`` is complete or absent at any moment.

    ValueError where the archive's hash, or the content against its record, differs; nothing is left then.
    """
    found = sha256_file(archive)
    if found != sha256:
        raise ValueError(f"{archive}: found sha256 {found}, expected {sha256}")
    # The service's user must read what root installs, whatever umask root's shell has.
    umask = os.umask(0o022)
    try:
        os.makedirs(prefix, mode=0o755, exist_ok=True)
        with locked(prefix):
            _install_locked(archive, prefix, identifier)
    finally:
        os.umask(umask)


def _install_locked(archive: str, prefix: str, identifier: str) -> None:
    """Do the work of install() for an archive whose hash is right."""
    sweep(prefix)
    temporary = os.path.join(prefix, f"{_TEMPORARY}{identifier}")
    os.mkdir(temporary, 0o755)
    try:
        unpack(archive, temporary, strip_top=True)
        problems = find_damage(temporary, identifier, deep=True)
        if problems:
            raise ValueError(f"{archive}: " + "; ".join(problems))
        for directory, _names, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(directory, name), "rb") as stream:
                    os.fsync(stream.fileno())
            fsync_directory(directory)
        path = os.path.join(prefix, identifier)
        if os.path.lexists(path):
            # Damaged, or the caller would not install: processes keep the files that they have open.
            os.rename(path, f"{temporary}.old")
        os.rename(temporary, path)
        fsync_directory(prefix)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sweep(prefix)


@contextlib.contextmanager
def locked(prefix: str) -> Iterator[None]:
    """Keep other writers of this collection out of a directory."""
    descriptor = os.open(prefix, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sweep(prefix: str) -> None:
    """Remove what interrupted installations left behind."""
    for name in os.listdir(prefix):
        if name.startswith(_TEMPORARY):
            path = os.path.join(prefix, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)


def activate(prefix: str, identifier: str) -> None:
    """Let the current link name a build, atomically, and note the build as the latest used, and the one before."""
    path = os.path.join(prefix, identifier)
    os.utime(path)
    before = current_build(prefix)
    if before not in (None, identifier):
        _link(prefix, PREVIOUS, str(before))
    _link(prefix, LINK, identifier)
    fsync_directory(prefix)


def _link(prefix: str, name: str, target: str) -> None:
    """Let a link name a directory beside it, in one step."""
    temporary = os.path.join(prefix, f"{_TEMPORARY}{name}-{os.getpid()}")
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, os.path.join(prefix, name))


def remove_builds(prefix: str, identifiers: Collection[str]) -> None:
    """Remove builds; each disappears at once under its own name."""
    for identifier in identifiers:
        doomed = tempfile.mkdtemp(prefix=_TEMPORARY, dir=prefix)
        os.rename(os.path.join(prefix, identifier), doomed)
        shutil.rmtree(doomed)
