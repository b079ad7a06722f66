# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is fuzzed: for each parser of foreign bytes a function of one input, which raises where a promise is broken.

A promise is that of the docstrings: which errors may come, that they say something an operator can use, and what
holds of a result. The functions need neither Ansible nor a fuzzer: tests/unit/test_fuzz_corpus.py calls them with the
inputs kept in corpus/, and tests/fuzz/run.py lets libFuzzer look for others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils import (
    _bandwidth,
    _build,
    _cmdline,
    _condition,
    _engine,
    _gguf,
    _grub,
    _grubenv,
    _hub,
    _hugepages,
    _iomem,
    _judgement,
    _manifest,
    _numa,
    _plan,
    _progress,
    _serving,
    _shards,
    _smbios,
    _tunables,
)

GIB = 1 << 30
# In memory where the machine has such a file system: a tree of files is written for each input.
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None


def refused(call: Callable[..., Any], *given: Any, errors: tuple[type[Exception], ...] = (ValueError,)) -> Any:
    """Return what the call returns, or None where it refuses with one of these errors in words of its own."""
    try:
        return call(*given)
    except errors as error:
        # UnicodeError and JSONDecodeError are kinds of ValueError too, and tell an operator nothing.
        assert type(error) in errors or isinstance(error, OSError), f"{type(error).__name__}: {error}"
        message = str(error)
        foreign = r"(Exceeds the limit|invalid literal|embedded null|could not convert|Invalid IPv6|cannot convert)"
        assert message and not re.match(foreign, message), f"an error of Python's own: {message}"
        # It goes to a terminal and into reports.
        assert message.isprintable(), f"an error with control characters: {message!r:.300}"
        assert len(message) <= 4000, f"an error of {len(message)} characters: {message:.300}"
        return None


def text_of(data: bytes) -> str:
    """Return bytes as _sysfs reads them from a host."""
    return data.decode("utf-8", "replace")


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """Give an empty folder for the time of one input."""
    path = tempfile.mkdtemp(prefix="cpullm-fuzz-", dir=SCRATCH)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def tree(data: bytes) -> Iterator[str]:
    """Give a root with the files that an input describes: each a line `== PATH`, then its bytes."""
    with folder() as root:
        for part in re.split(rb"^== /", data, flags=re.MULTILINE)[1:65]:
            path, _newline, content = part.partition(b"\n")
            if not re.fullmatch(rb"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){0,9}", path):
                continue
            file = os.path.join(root, path.decode())
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                Path(file).write_bytes(content)
        yield root


# --- The model ----------------------------------------------------------------------------------------------------


def gguf(data: bytes) -> None:
    """The header as a whole file, and as the start of a large one; the model; and its lock."""
    for size in (len(data), 1 << 44):
        header = refused(_gguf.read_header, _gguf.BytesSource(data, size))
        if header is None:
            continue
        assert header.version in (2, 3) and header.data_start % header.alignment == 0
        at = 0
        for tensor in header.tensors:
            assert tensor.offset >= at and tensor.elements >= 0 and tensor.bytes >= 0
            at = tensor.offset + tensor.bytes
        assert not header.tensors or header.data_start + at <= size
        model = refused(_gguf.describe_model, [("m.gguf", header)])
        if model is None:
            continue
        assert sum(part.bytes for part in model.parts) == sum(kind.bytes for kind in model.tensor_types)
        assert model.tensor_bytes == sum(part.bytes for part in model.parts) <= size
        assert all(0 <= part.read_per_token <= part.bytes for part in model.parts)
        source = _manifest.DirectorySource("/models")
        shard = _manifest.Shard("m.gguf", size, "0" * 64)
        manifest = refused(_manifest.build_manifest, "m", source, [(shard, header)])
        if manifest is not None:
            assert _manifest.parse_lock(_manifest.lock_text(manifest)) == manifest


def lock(data: bytes) -> None:
    """A lock file."""
    manifest = refused(_manifest.parse_lock, text_of(data))
    if manifest is None:
        return
    assert manifest.shards and all(shard.bytes > 0 for shard in manifest.shards)
    assert manifest.model.tensor_bytes <= manifest.bytes
    assert _manifest.parse_lock(_manifest.lock_text(manifest)) == manifest
    entries = [dataclasses.asdict(shard) for shard in manifest.shards]
    assert [dataclasses.asdict(shard) for shard in _shards.shards_of(entries)] == entries


def plan(data: bytes) -> None:
    """A plan for facts and lock of anybody: one JSON object with `numa`, `lock` and `overrides`."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(given, dict):
        return
    manifest = refused(_manifest.parse_manifest, given["lock"]) if "lock" in given else published()[0]
    wishes = given.get("overrides")
    known = {field.name: field.default for field in dataclasses.fields(_plan.Overrides)}
    # Ansible has made them of the types in the argument spec.
    kinds = {"slots": int, "context": int, "instances": int, "system_reserve_bytes": int, "port": int, "overlap": bool}
    chosen: dict[str, Any] = {
        name: wish
        for name, wish in (wishes.items() if isinstance(wishes, dict) else ())
        if name in known
        and (type(wish) is kinds.get(name, str) or (wish is None and known[name] is None))
        and not (isinstance(wish, int) and abs(wish) >= 1 << 63)
    }
    overrides = _plan.Overrides(**chosen)
    if manifest is None:
        return
    made = refused(_plan.make_plan, given.get("numa"), manifest, overrides, errors=(_plan.Refusal,))
    if made is None:
        return
    again = _plan.make_plan(given.get("numa"), manifest, overrides)
    assert made == again and made["hash"] == again["hash"]
    assert made["pages"]["total"] == sum(row["pages"] for row in made["pages"]["nodes"])
    assert all(row["left_bytes"] >= 0 for row in made["memory"])
    assert made["context"] > 0 and made["kv_bytes"] >= 0 and made["start_timeout_s"] > 0
    assert not _cmdline.check(made["kernel_arguments"]), made["kernel_arguments"]


class _Socket:
    """What http.client needs of a connection: the bytes that come over it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


class _Wire(urllib.request.HTTPHandler):
    """Answers each request with the next of some answers, as they come over the network."""

    def __init__(self, answers: list[bytes]) -> None:
        super().__init__()
        self._answers = iter(answers)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        answer = next(self._answers, None)
        if answer is None:
            raise urllib.error.URLError("no more answers")
        response = http.client.HTTPResponse(_Socket(answer), method=req.get_method())  # type: ignore[arg-type]
        response.begin()
        response.msg = response.reason  # type: ignore[assignment] # as urllib.request does
        return response


def hub(data: bytes) -> None:
    """A hub's answers, in the order of the requests: commit, pages of the tree, ranges of the files."""
    client = _hub.Hub("http://hub.test", token=None, attempts=2, sleep=lambda _seconds: None)
    client._opener = urllib.request.build_opener(_hub._Redirects(), _Wire(data.split(b"\n====\n")[:24]))
    errors = (_hub.HubError, ValueError)
    manifest = refused(
        lambda: _hub.manifest_of_repo(
            client, "org/model", "main", name=None, pattern=None, told=lambda _file, _done, _all: None
        ),
        errors=errors,
    )
    if manifest is not None:
        assert _manifest.parse_lock(_manifest.lock_text(manifest)) == manifest


# --- The host -----------------------------------------------------------------------------------------------------


def _entry_point(kind: int, major: int, minor: int, length: int, count: int) -> bytes:
    """Return an entry point whose checksums are right, which a fuzzer hardly finds."""
    if kind % 2:
        body = b"_SM3_\0\x18" + bytes([major, minor, 0, 1, 0]) + length.to_bytes(4, "little") + bytes(8)
        return body[:5] + bytes([-sum(body) & 0xFF]) + body[6:]
    inner = b"_DMI_\0" + length.to_bytes(2, "little") + bytes(4) + count.to_bytes(2, "little") + bytes([0x28])
    inner = inner[:5] + bytes([-sum(inner) & 0xFF]) + inner[6:]
    outer = b"_SM_\0\x1f" + bytes([major, minor]) + bytes(8)
    return outer[:4] + bytes([-sum(outer + inner) & 0xFF]) + outer[5:] + inner


@cache
def published() -> tuple[_manifest.Manifest, dict[str, Any], dict[str, Any]]:
    """Return a small model, the fact cpullm_numa of a machine with one socket, and the plan of both."""
    flags = [flag for _isa, needed in _plan.ISA_FLAGS for flag in needed]
    numa = {
        "readable": True,
        "cpu": {"model": "AMD EPYC 9135 16-Core Processor", "flags": [*flags, "pdpe1gb"], "smt": True},
        "sockets": [{"socket": 0, "nodes": [0], "cpus": "0-31", "physical_cores": 16, "threads": 32}],
        "nodes": [{"node": 0, "memory_bytes": 768 * GIB, "gib_ranges": 700}],
        "l3": [{"id": number, "socket": 0} for number in range(2)],
        "kernel": {"release": "6.1.0-37-amd64"},
    }
    manifest = _manifest.parse_manifest(
        {
            "schema": 1,
            "name": "m",
            "source": {"type": "directory", "path": "/m"},
            "shards": [{"file": "m.gguf", "bytes": 3 * GIB, "sha256": "0" * 64}],
            "gguf": {
                "architecture": "deepseek2",
                "layers": 61,
                "context_trained": 163840,
                "embedding": 7168,
                "heads": 128,
                "mla": True,
                "kv_lora_rank": 512,
                "rope_dims": 64,
                "vocabulary": 129280,
                "split_count": 1,
                "tensor_bytes": 2 * GIB,
                "parts": [{"part": "experts", "bytes": 2 * GIB, "read_per_token": GIB}],
            },
        }
    )
    return manifest, numa, _plan.make_plan(numa, manifest, _plan.Overrides())


def smbios(data: bytes) -> None:
    """The two exported files: as they are after a byte that tells the first one's length, or with right checksums."""
    if len(data) < 8:
        return
    head, table = data[:8], data[8:]
    if head[0] < 64:
        entry, table = data[1 : 1 + head[0]], data[1 + head[0] :]
    else:
        # A length of 0 stands for that of the table, so that a changed table stays whole.
        length = int.from_bytes(head[4:6], "little") or len(table)
        entry = _entry_point(head[0], head[1], head[2], min(length, 0xFFFF), int.from_bytes(head[6:8], "little"))
    found = refused(_smbios.decode, entry, table)
    if found is None:
        return
    for slot in found.slots:
        assert (slot.size_bytes is None) == (slot.populated is None) and (slot.size_bytes or 0) >= 0
        assert slot.channel is None or 0 <= slot.channel < 100
        assert slot.socket is None or 0 <= slot.socket < max(len(found.processors), 100)
    _manifest_dummy, numa, planned = published()
    dimm = {"readable": True, "reason": None, "slots": [dataclasses.asdict(slot) for slot in found.slots]}
    json.dumps(_judgement.judge(_judgement.Host(numa, planned, dimm)))


def numa(data: bytes) -> None:
    """A tree of /sys and /proc, or one of their files."""
    if data.startswith(b"== /"):
        with tree(data) as root:
            fact = _numa.gather(root)
            assert json.dumps(fact) and (fact["readable"] or fact["reason"])
            topology = refused(_numa.read, root, errors=(ValueError, OSError))
        if topology is None:
            return
        online = set(_numa.parse_cpulist(topology.cpu.online))
        for group in (*topology.sockets, *topology.nodes, *topology.l3):
            cpus = set(_numa.parse_cpulist(group.cpus))
            assert cpus <= online and 0 <= group.physical_cores <= len(cpus)
        assert all((node.memory_bytes or 0) >= 0 and (node.gib_ranges or 0) >= 0 for node in topology.nodes)
        assert sum(socket.threads for socket in topology.sockets) == topology.cpu.logical == len(online)
        return
    text = text_of(data)
    cpus = refused(_numa.parse_cpulist, text)
    if cpus is not None:
        assert _numa.parse_cpulist(_numa.format_cpulist(cpus)) == cpus
    assert (refused(_numa.parse_size, text) or 0) >= 0
    zones = refused(_numa.parse_zoneinfo, text) or {}
    assert all(zone.present >= 0 and 0 <= zone.start <= zone.end for zone in zones.values())
    ranges = _numa.parse_system_ram(text)
    if ranges is not None:
        whole = _numa.whole_gib(ranges, 0, 1 << 52)
        assert 0 <= whole <= sum(max(0, end - start) for start, end in ranges) // GIB
        assert (
            0 <= _iomem.reservable(ranges, "6.1.0") <= _iomem.reservable(ranges, "6.15.0") <= _iomem.whole_gib(ranges)
        )
    _numa.parse_cpuinfo(text)
    _build.parse_cpu_flags(text)


def hugepages(data: bytes) -> None:
    """A tree of /sys and /proc, or one of their files."""
    if data.startswith(b"== /"):
        with tree(data) as root:
            fact = _hugepages.gather(root)
            assert json.dumps(fact) and (fact["readable"] or fact["reason"])
        assert all(pool["total"] >= 0 and pool["free"] >= 0 for pool in fact["pools"]), fact["pools"]
        return
    text = text_of(data)
    for mount in _hugepages.parse_mounts(text, 2048):
        assert mount.size_kib is None or mount.size_kib > 0
    for name in ("Hugepagesize", "HardwareCorrupted", "MemTotal"):
        assert (_hugepages.parse_meminfo(text, name) or 0) >= 0
    for word in text.split()[:8]:
        assert (_hugepages.parse_pool_size(word) or 0) >= 0
        assert (_hugepages.parse_page_size(word) or 1) > 0
        _hugepages.unescape(word)


def condition(data: bytes) -> None:
    """A tree of /sys, what ipmitool prints, or what cpullm-bandwidth does."""
    if data.startswith(b"== /"):
        with tree(data) as root:
            found = _condition.gather("/", root, (259, 0))
        _manifest_dummy, numa, planned = published()
        json.dumps(_judgement.judge(_judgement.Host(numa, planned, condition=found)))
        return
    text = text_of(data)
    for row in _condition.parse_ipmi_temperatures(text):
        assert row.sensor and abs(row.celsius) < 1000
    measured = refused(_bandwidth.parse_measurement, text)
    if measured is not None:
        assert 0 < measured.gbs_min <= measured.gbs <= measured.gbs_max


def cmdline(data: bytes) -> None:
    """A kernel command line and a kernel's release."""
    line, _newline, release = text_of(data).partition("\n")
    arguments = _cmdline.split(line)
    assert all(arguments) and _cmdline.is_subsequence(arguments, arguments)
    named = _cmdline.hugepage_arguments(arguments)
    assert _cmdline.is_subsequence(named, arguments) and _cmdline.carries(arguments, named)
    _cmdline.find_hugepage_arguments(line)
    if arguments and not _cmdline.check(arguments):
        # What passes the check goes through a shell file and comes back the same.
        assert _cmdline.split(" ".join(arguments)) == arguments
        assert _grub.drop_in_arguments(_grub.render_drop_in(arguments)) == arguments
    version = refused(_cmdline.parse_release, release)
    if version is not None:
        built = _cmdline.build(1048576, [(0, 3), (1, 4)], release)
        assert not _cmdline.check(built) and len(_cmdline.hugepage_arguments(built)) == 3


def grub(data: bytes) -> None:
    """A tree with GRUB's files, or one of them."""
    if data.startswith(b"== /"):
        with tree(data) as root:
            host = refused(_grub.read_host, root, errors=(ValueError, OSError))
        if host is None:
            return
        wanted = _grub.Wanted(pages=((0, 3),), arguments=("hugepagesz=1G", "hugepages=0:3"))
        assert json.dumps(_grub.survey(host, wanted))
        for arguments in (wanted.arguments, None):
            change = _grub.plan(host, arguments)
            _grub.difference(change)
        return
    text = text_of(data)
    count = text.count("\n") + 1 + sum(text.count(mark) for mark in "\v\f\r\x1c\x1d\x1e\x85\u2028\u2029")
    for place in (*_grub.find_conflicts("file", text), *_grub.find_overwrites("file", text)):
        assert 1 <= place.line <= count and place.text in text
    assert all(1 <= entry.line <= count for entry in _grub.parse_entries(text))
    for argument in _grub.drop_in_arguments(text):
        assert argument in text
    assert isinstance(_grub.config_faults(text, ["hugepagesz=1G", "hugepages=3"]), list)


def grubenv(data: bytes) -> None:
    """An environment block, mounts, or a tree with both."""
    if data.startswith(b"== /"):
        with tree(data) as root:
            for fault in _grubenv.faults(_grubenv.read(root)):
                assert fault.isprintable() and len(fault) <= 2000, repr(fault)
        return
    pairs = refused(_grubenv.parse_block, data)
    if pairs is not None:
        assert len(data) == _grubenv.SIZE and all(name and "=" not in name for name, _value in pairs)
        # What GRUB writes of the same pairs comes back as they were.
        lines = "".join(f"{name}={value}".replace("\\", "\\\\").replace("\n", "\\\n") + "\n" for name, value in pairs)
        written = (_grubenv.SIGNATURE + lines).encode("latin-1")
        if len(written) <= _grubenv.SIZE:
            assert _grubenv.parse_block(written.ljust(_grubenv.SIZE, b"#")) == pairs
    mounts = _grubenv.parse_mountinfo(text_of(data))
    for path in ("/boot/grub/grubenv", "/"):
        mount = _grubenv.mount_of(mounts, path)
        assert mount is None or path.startswith(mount.path.rstrip("/"))


def settings(data: bytes) -> None:
    """Files of a host that hold settings: sysctl.d, the record of earlier values, os-release."""
    if data.startswith(b"== /"):
        wanted = [
            _tunables.Setting("/proc/sys/vm/swappiness", "1"),
            _tunables.Setting("/sys/kernel/mm/*/enabled", "never"),
        ]
        with tree(data) as root:
            found, faults = _tunables.survey(root, wanted)
            overrides = _tunables.find_overrides(root, wanted, "/etc/sysctl.d/60-cpullm.conf")
            record = refused(_tunables.read_record, root, "/var/lib/cpullm/record.json")
            refused(_tunables.restorable, root, "/var/lib/cpullm/record.json")
        assert json.dumps([[dataclasses.asdict(item) for item in found], faults, overrides, record])
        return
    text = text_of(data)
    value, choices = _tunables.parse_value(text)
    assert not choices or value in choices
    release = refused(_build.parse_os_release, text)
    assert release is None or re.fullmatch(r"[a-z0-9._]+", release)


# --- The engine ---------------------------------------------------------------------------------------------------


def serving(data: bytes) -> None:
    """What a server answers, and what the kernel says of its memory."""
    text = text_of(data)
    for name in ("VmRSS", "HugetlbPages"):
        assert (_serving.status_kib(text, name) or 0) >= 0
    rows = _serving.pages_by_node(text, 1048576)
    assert rows == sorted(rows, key=lambda row: row["node"]) and all(row["pages"] >= 0 for row in rows)
    body = _serving.answer_of(200, data).body
    found = {
        "active_state": "active",
        "health": 200,
        "error": None,
        "hugetlb_kib": 3 << 20,
        "nodes": rows,
        "pid": 7,
        "private_kib": _serving.status_kib(text, "RssAnon"),
        "no_repack": True,
        "store_pages": _serving.store_pages(text, "/var/lib/llama-weights/0", 1048576),
        "store_problems": [],
        "text": _serving.chat_text(body),
        "without_key": 401,
    }
    wanted = {"pages": 3, "size_kib": 1 << 20, "nodes": [0], "hugepages": True, "expect": "ok", "key_needed": True}
    wanted |= {"stored": True, "private_kib": 1 << 20}
    assert isinstance(_serving.deviations(found, wanted), list)
    rate = _serving.decode_rate(body)
    assert rate is None or json.loads(json.dumps(rate, allow_nan=False)) == rate


def progress(data: bytes) -> None:
    """The status file of long work, and the record of it that one process hands to another."""
    text = text_of(data)
    status = refused(_progress.parse_status, text, errors=(ValueError, json.JSONDecodeError))
    if status is not None:
        record = _progress.Record("host", "title", status, 1.0, 2.0)
        assert _progress.Record.from_json(record.to_json()) == record
        assert status.percent is None or 0 <= status.percent <= 100
        lines = [_progress.render_line(record), *_progress.render_block([record] * 3, 80, 4)]
        assert all(line.isprintable() for line in lines)
        window = _progress.Window()
        for moment in range(3):
            window.add(float(moment), status)
        assert window.rate() == 0
    refused(_progress.Record.from_json, text, errors=(ValueError, json.JSONDecodeError))


def engine(data: bytes) -> None:
    """An archive of a build, and the record in it."""
    _engine._MAX_BYTES, _engine._MAX_MEMBERS = 1 << 20, 1000
    with folder() as place:
        archive = os.path.join(place, "archive")
        Path(archive).write_bytes(data)
        for number, (below, strip) in enumerate(itertools.product(("", "a"), (False, True))):
            inside = os.path.join(place, f"deep/{number}")
            os.makedirs(inside)
            refused(_unpack, archive, inside, below, strip)
            refused(_engine.read_record, inside)
            assert isinstance(_engine.find_damage(inside, "id", True), list)
        assert set(os.listdir(place)) == {"archive", "deep"}, "written outside of the destination"
        assert set(os.listdir(os.path.join(place, "deep"))) == set("0123"), "written outside of the destination"


def _unpack(archive: str, destination: str, below: str, strip: bool) -> None:
    _engine.unpack(archive, destination, below, strip)
    top = os.path.realpath(destination)
    for at, folders, files in os.walk(destination):
        for name in (*folders, *files):
            assert os.path.realpath(os.path.join(at, name)).startswith(top + "/"), "a link that leads out"


@dataclass(frozen=True)
class Target:
    """A fuzzed function, the longest input in bytes that is tried, words of its format, and whether that is JSON."""

    run: Callable[[bytes], None]
    longest: int
    words: tuple[str, ...] = ()
    json: bool = False


_PROC = (
    "/proc/cpuinfo",
    "/proc/zoneinfo",
    "/proc/iomem",
    "/proc/meminfo",
    "/proc/cmdline",
    "== /",
    "/sys/devices/system/",
)
_HUGE = ("default_hugepagesz=1G", "hugepagesz=2M", "hugepages=0:3,1:3", "hugetlb_free_vmemmap=on", "hugetlb_cma=1G")

TARGETS: dict[str, Target] = {
    "gguf": Target(
        gguf,
        1 << 16,
        (
            "GGUF",
            "general.architecture",
            "general.alignment",
            "split.count",
            "split.no",
            "split.tensors.count",
            "tokenizer.ggml.tokens",
            *(f"deepseek2.{key}" for key in ("block_count", "context_length", "embedding_length", "vocab_size")),
            *("deepseek2.attention.head_count", "deepseek2.expert_count", "deepseek2.expert_used_count"),
            *("token_embd.weight", "output.weight", "blk.0.attn_k_b.", "blk.0.attn_v_b.", "blk.0.ffn_gate_exps."),
        ),
    ),
    "lock": Target(
        lock,
        1 << 14,
        ('"schema"', '"shards"', '"gguf"', '"source"', '"hub"', '"directory"', "-00001-of-00002.gguf"),
        json=True,
    ),
    "plan": Target(
        plan, 1 << 14, ('"numa"', '"lock"', '"overrides"', '"nodes"', '"sockets"', '"cpu"', '"hugetlbfs"'), json=True
    ),
    "hub": Target(
        hub,
        1 << 14,
        (
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 206 Partial Content\r\n",
            "HTTP/1.1 302 Found\r\n",
            "HTTP/1.1 429 Busy\r\n",
            "Location: ",
            "Link: <",
            '>; rel="next"',
            "Content-Range: bytes 0-",
            "Content-Length: ",
            "Transfer-Encoding: chunked\r\n",
            "Retry-After: 1\r\n",
            "\n====\n",
            '"sha"',
            '"lfs"',
            '"oid"',
        ),
    ),
    "smbios": Target(
        smbios, 1 << 14, ("_SM3_", "_SM_", "_DMI_", "DIMM_P0_A0", "P0 CHANNEL A", "CPU1_DIMM_B2", "Dell Inc.")
    ),
    "numa": Target(
        numa, 1 << 15, (*_PROC, "Node 0, zone   Normal", " spanned ", " present ", "start_pfn:", " : System RAM")
    ),
    "hugepages": Target(
        hugepages, 1 << 13, (*_PROC, "hugetlbfs", "pagesize=1024M", "hugepages-1048576kB", "nr_hugepages")
    ),
    "condition": Target(
        condition,
        1 << 13,
        (
            *("/sys/devices/system/edac/mc/mc0/ce_count", "/sys/class/hwmon/hwmon0/name", "spd5118", "temp1_input"),
            *("/sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "/affected_cpus", " | 48 degrees C", '"gbs"'),
        ),
    ),
    "cmdline": Target(cmdline, 1 << 12, _HUGE),
    "grub": Target(
        grub,
        1 << 14,
        (
            *_HUGE,
            "/etc/default/grub",
            "/boot/grub/grub.cfg",
            "menuentry '",
            "GRUB_CMDLINE_LINUX_DEFAULT=",
            "### BEGIN /etc/grub.d/10_linux ###",
            "\tlinux\t/vmlinuz ",
            "${GRUB_CMDLINE_LINUX_DEFAULT:+$GRUB_CMDLINE_LINUX_DEFAULT }",
        ),
    ),
    "grubenv": Target(
        grubenv,
        1 << 12,
        (
            "# GRUB Environment Block\n",
            "next_entry=cpullm\n",
            "25 1 253:0 / / ro,relatime shared:1 - ext4 /dev/mapper/vg-root ro\n",
            *("== /boot/grub/grubenv\n", "== /proc/self/mountinfo\n", "== /sys/dev/block/253:0/dm/uuid\nLVM-"),
        ),
    ),
    "settings": Target(
        settings, 1 << 13, ("/etc/sysctl.d/99-x.conf", "vm.swappiness=", "always [madvise] never", "VERSION_ID=")
    ),
    "serving": Target(
        serving,
        1 << 13,
        ("kernelpagesize_kB=1048576", " N0=16", "HugetlbPages:", '"choices"', '"message"', '"content"', '"timings"'),
        json=True,
    ),
    "progress": Target(
        progress, 1 << 12, ('"phase"', '"done"', '"total"', '"unit"', '"message"', '"updated"', '"status"'), json=True
    ),
    "engine": Target(engine, 1 << 14, ("ustar\00000", "BUILD.json", '"files"', '"path"', '"sha256"', "../", "./")),
}
