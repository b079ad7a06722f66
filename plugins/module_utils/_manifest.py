# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifest of a model: its shards, where they come from, and what their headers say; kept as the lock file.

A lock is one JSON object, written by playbooks/lock.yml and by nothing else:

    {"schema": 1, "name": "...",
     "source": {"type": "hub", "endpoint": "...", "repo": "org/name", "commit": "40 hex digits", "prefix": "folder/"}
            or {"type": "directory", "path": "/absolute"},
     "shards": [{"file": "...", "bytes": 1, "sha256": "64 hex digits"}, ...],       in the order of the shards
     "gguf": {"architecture": "...", ... every field of _gguf.Model ...}}
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._gguf import (
    ARCHITECTURE,
    FileSource,
    Header,
    Model,
    PartSum,
    SplitName,
    TypeSum,
    describe_model,
    parse_split_name,
    read_header,
)
from ansible_collections.cpullm.epyc.plugins.module_utils._text import printable

SCHEMA = 1
# Of bytes, as of anything else that is counted here. Larger numbers would end the plan's arithmetic in floats.
MAX_COUNT = (1 << 63) - 1
_HASH_BLOCK = 8 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+@=,()-]{0,250}\.gguf")
REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?")


@dataclass(frozen=True)
class Shard:
    """One file of the model."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class HubSource:
    """A folder of a repository on a hub, at one commit; ``prefix`` is empty or ends in a slash."""

    endpoint: str
    repo: str
    commit: str
    prefix: str


@dataclass(frozen=True)
class DirectorySource:
    """A directory that holds the shards."""

    path: str


@dataclass(frozen=True)
class Manifest:
    """A model at one pinned content."""

    name: str
    source: HubSource | DirectorySource
    shards: tuple[Shard, ...]
    model: Model

    @property
    def bytes(self) -> int:
        """Return the sum of the shards' sizes."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Candidate:
    """A file that may be a shard: its path within repository or directory, and what is known without reading it."""

    path: str
    bytes: int
    sha256: str | None


def _field(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """Return the value under ``key``; raises ValueError that names where, what was found and what was expected."""
    if key not in data:
        raise ValueError(f"{where}{key}: missing, expected {kind.__name__}")
    value = data[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}{key}: found {value!r:.80}, expected {kind.__name__}")
    return value


def _matching(data: Mapping[str, Any], key: str, pattern: re.Pattern[str], wanted: str, where: str) -> str:
    value = str(_field(data, key, str, where))
    if not pattern.fullmatch(value):
        raise ValueError(f"{where}{key}: found {value!r:.80}, expected {wanted}")
    return value


def _count(data: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    value = int(_field(data, key, int, where))
    if value < least:
        raise ValueError(f"{where}{key}: found {value!r:.80}, expected at least {least}")
    if value > MAX_COUNT:
        raise ValueError(f"{where}{key}: found {value!r:.80}, expected at most {MAX_COUNT}")
    return value


def check_name(name: str) -> str:
    """Return the model's name, which becomes the name of a directory; raises ValueError if it cannot be one."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: found {name!r:.80}, expected letters, digits and . _ + - only")
    return name


def check_prefix(prefix: str) -> str:
    """Return a folder within a repository as "" or "a/b/"; raises ValueError if it leaves the repository."""
    parts = [part for part in prefix.split("/") if part]
    if any(part in (".", "..") or not part.isprintable() for part in parts) or prefix.startswith("/"):
        raise ValueError(f"prefix: found {prefix!r:.80}, expected a folder within the repository")
    return "".join(f"{part}/" for part in parts)


def _parse_source(data: Mapping[str, Any]) -> HubSource | DirectorySource:
    where = "source."
    kind = _field(data, "type", str, where)
    if kind == "hub":
        prefix = str(_field({"prefix": "", **data}, "prefix", str, where))
        return HubSource(
            endpoint=_matching(data, "endpoint", _ENDPOINT, "an http or https address", where).rstrip("/"),
            repo=_matching(data, "repo", REPO, "organisation/name", where),
            commit=_matching(data, "commit", _COMMIT, "40 hexadecimal digits", where),
            prefix=check_prefix(prefix),
        )
    if kind == "directory":
        path = str(_field(data, "path", str, where))
        if not os.path.isabs(path) or not path.isprintable():
            raise ValueError(f"{where}path: found {path!r:.80}, expected an absolute path")
        return DirectorySource(path)
    raise ValueError(f"{where}type: found {kind!r:.80}, expected hub or directory")


def _parse_shards(items: Sequence[Any]) -> tuple[Shard, ...]:
    if not items:
        raise ValueError("shards: found none, expected at least one")
    shards: list[Shard] = []
    seen: set[str] = set()
    for index, item in enumerate(items):
        where = f"shards[{index}]."
        if not isinstance(item, dict):
            raise ValueError(f"shards[{index}]: found {item!r:.80}, expected an object")
        shard = Shard(
            file=_matching(item, "file", _FILE, "the name of a .gguf file without folders", where),
            bytes=_count(item, "bytes", where, 1),
            sha256=_matching(item, "sha256", _SHA256, "64 hexadecimal digits", where),
        )
        if shard.file in seen:
            raise ValueError(f"{where}file: {shard.file!r} is there twice")
        seen.add(shard.file)
        split = parse_split_name(shard.file)
        if split is None or split.count != len(items) or split.number != index + 1:
            raise ValueError(f"{where}file: found {shard.file!r}, expected shard {index + 1} of {len(items)} there")
        shards.append(shard)
    return tuple(shards)


# What a plan cannot do without; the rest of Model defaults to 0, for locks written by hand in tests.
_NEEDED = ("layers", "context_trained", "embedding", "heads", "split_count", "tensor_bytes")


def _parse_sums(data: Mapping[str, Any], key: str, label: str, counts: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = data.get(key, [])
    if not isinstance(rows, list):
        raise ValueError(f"gguf.{key}: found {rows!r:.80}, expected a list")
    result = []
    for index, row in enumerate(rows):
        where = f"gguf.{key}[{index}]."
        if not isinstance(row, dict):
            raise ValueError(f"gguf.{key}[{index}]: found {row!r:.80}, expected an object")
        result.append({label: _field(row, label, str, where), **{name: _count(row, name, where) for name in counts}})
    return result


def _parse_model(data: Mapping[str, Any], shard_count: int) -> Model:
    where = "gguf."
    wanted = "up to 64 letters, digits and . _ -"
    values: dict[str, Any] = {"architecture": _matching(data, "architecture", ARCHITECTURE, wanted, where)}
    for item in dataclasses.fields(Model):
        if item.type != "int":
            continue
        if item.name in _NEEDED:
            values[item.name] = _count(data, item.name, where, 1)
        else:
            values[item.name] = _count(data, item.name, where) if data.get(item.name) is not None else 0
    values["mla"] = bool(_field(data, "mla", bool, where))
    values["tensor_types"] = tuple(
        TypeSum(**row) for row in _parse_sums(data, "tensor_types", "type", ("tensors", "bytes"))
    )
    values["parts"] = tuple(PartSum(**row) for row in _parse_sums(data, "parts", "part", ("bytes", "read_per_token")))
    model = Model(**values)
    if model.split_count != shard_count:
        raise ValueError(f"gguf.split_count: found {model.split_count}, expected the number of shards, {shard_count}")
    if model.mla and not (model.kv_lora_rank and model.rope_dims):
        raise ValueError("gguf.kv_lora_rank and gguf.rope_dims: missing or 0, expected both for a model with MLA")
    if not model.mla and not (model.kv_heads and model.key_length and model.value_length):
        raise ValueError("gguf.kv_heads, .key_length and .value_length: missing or 0, expected all without MLA")
    return model


def parse_manifest(data: Any) -> Manifest:
    """Return the manifest of a decoded lock; raises ValueError that names the field, found and expected."""
    if not isinstance(data, dict):
        raise ValueError(f"found {type(data).__name__}, expected an object")
    schema = _field(data, "schema", int, "")
    if schema != SCHEMA:
        raise ValueError(
            f"schema: found {schema!r:.80}, expected {SCHEMA}: write the lock anew with playbooks/lock.yml"
        )
    shards = _parse_shards(_field(data, "shards", list, ""))
    manifest = Manifest(
        name=check_name(str(_field(data, "name", str, ""))),
        source=_parse_source(_field(data, "source", dict, "")),
        shards=shards,
        model=_parse_model(_field(data, "gguf", dict, ""), len(shards)),
    )
    if manifest.model.tensor_bytes > manifest.bytes:
        raise ValueError(
            f"gguf.tensor_bytes: found {manifest.model.tensor_bytes}, "
            f"expected at most the sum of the shards, {manifest.bytes}"
        )
    return manifest


def parse_lock(text: str) -> Manifest:
    """Return the manifest in a lock file's text; raises ValueError."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("found JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"found no JSON: {error}") from None
    return parse_manifest(data)


def source_to_data(source: HubSource | DirectorySource) -> dict[str, Any]:
    """Return the source as it stands in lock and plan."""
    kind = "hub" if isinstance(source, HubSource) else "directory"
    return {"type": kind, **dataclasses.asdict(source)}


def manifest_to_data(manifest: Manifest) -> dict[str, Any]:
    """Return the object that a lock file holds."""
    model = dataclasses.asdict(manifest.model)
    model["tensor_types"] = list(model["tensor_types"])
    model["parts"] = list(model["parts"])
    return {
        "schema": SCHEMA,
        "name": manifest.name,
        "source": source_to_data(manifest.source),
        "shards": [dataclasses.asdict(shard) for shard in manifest.shards],
        "gguf": model,
    }


def lock_text(manifest: Manifest) -> str:
    """Return a lock file's text; the same manifest gives the same text."""
    return json.dumps(manifest_to_data(manifest), indent=2, sort_keys=True) + "\n"


def choose_shards(files: Sequence[Candidate], pattern: str | None) -> tuple[str, str, tuple[Candidate, ...]]:
    """Return stem, folder ("" or "a/b/") and all shards of the one model among the files that match the pattern.

    The pattern is a shell's, for the whole path; None matches all. Raises ValueError if there is no model, more than
    one, or one that is not whole.
    """
    models: dict[tuple[str, str], list[tuple[SplitName, Candidate]]] = {}
    for file in files:
        if pattern is not None and not fnmatch.fnmatchcase(file.path, pattern):
            continue
        folder, slash, name = file.path.rpartition("/")
        split = parse_split_name(name)
        if split is not None:
            models.setdefault((folder + slash, split.stem), []).append((split, file))
    wanted = "" if pattern is None else f" that match {pattern!r}"
    if not models:
        raise ValueError(f"found no GGUF file among {len(files)} files{wanted}")
    if len(models) > 1:
        names = sorted(printable(folder + stem, 200) for folder, stem in models)
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise ValueError(f"found {len(names)} models{wanted}, expected one; narrow the pattern: {shown}")
    ((folder, stem), rows) = next(iter(models.items()))
    where = printable(folder + stem, 200)
    counts = sorted({split.count for split, _file in rows})
    if len(counts) > 1:
        raise ValueError(f"{where}: found shards of {' and of '.join(map(str, counts[:5]))}, expected one count")
    count = counts[0]
    numbers = Counter(split.number for split, _file in rows)
    twice = sorted(number for number, times in numbers.items() if times > 1)
    missing = sorted(set(range(1, count + 1)) - set(numbers)) if count <= 10000 else []
    foreign = sorted(number for number in numbers if not 1 <= number <= count)
    for what, bad in (("twice", twice), ("missing", missing), ("beyond the count", foreign)):
        if bad:
            raise ValueError(f"{where}: of {count} shards {bad[:20]} {what}")
    if len(rows) != count:
        raise ValueError(f"{where}: found {len(rows)} shards, expected {count}")
    return stem, check_prefix(folder), tuple(file for _split, file in sorted(rows, key=lambda row: row[0].number))


def build_manifest(
    name: str,
    source: HubSource | DirectorySource,
    shards: Sequence[tuple[Shard, Header]],
) -> Manifest:
    """Return the manifest of these shards; raises ValueError where they are no whole, loadable model."""
    model = describe_model([(shard.file, header) for shard, header in shards])
    manifest = Manifest(check_name(name), source, tuple(shard for shard, _dummy in shards), model)
    return parse_manifest(manifest_to_data(manifest))


def hash_file(path: str, expected_bytes: int, told: Callable[[int], None]) -> str:
    """Return the sha256 of a file that has the expected size; ``told`` receives the bytes of each block read."""
    digest = hashlib.sha256()
    total = 0
    with open(path, "rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
            total += len(block)
            told(len(block))
    if total != expected_bytes:
        raise ValueError(f"{path}: has {total} bytes now, {expected_bytes} when it was listed: it changes while read")
    return digest.hexdigest()


def read_shard_header(file: str, path: str) -> Header:
    """Return a local shard's header; raises ValueError that names the file."""
    try:
        return read_header(FileSource(path))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def list_directory(path: str) -> list[Candidate]:
    """Return the GGUF files directly in a directory, without their sha256."""
    with os.scandir(path) as entries:
        files = sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
    return [Candidate(name, size, None) for name, size in files if name.endswith(".gguf")]


def manifest_of_directory(
    path: str, name: str | None, pattern: str | None, told: Callable[[str, int, int], None]
) -> Manifest:
    """Return the manifest of the model in a local directory, every shard read once for its sha256.

    Headers come first, so that a model that cannot be loaded is refused before the long part. ``told`` receives the
    file that is read, the bytes done and the bytes in all.
    """
    path = os.path.realpath(path)
    _parse_source(source_to_data(DirectorySource(path)))
    stem, _dummy, files = choose_shards(list_directory(path), pattern)
    headers = [read_shard_header(file.path, os.path.join(path, file.path)) for file in files]
    describe_model([(file.path, header) for file, header in zip(files, headers)])
    total = sum(file.bytes for file in files)
    done = 0
    shards = []
    for file, header in zip(files, headers):

        def advance(count: int, current: str = file.path) -> None:
            nonlocal done
            done += count
            told(current, done, total)

        digest = hash_file(os.path.join(path, file.path), file.bytes, advance)
        shards.append((Shard(file.path, file.bytes, digest), header))
    return build_manifest(name or stem, DirectorySource(path), shards)
