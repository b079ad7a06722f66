"""The loader of weights on ordinary files: what counts as complete, what is refused, and what a fault leaves behind.

The store is a folder here, with the 4 KiB pages of its file system; tests/acceptance/test_weights_store.py has the real
one, of 1 GiB pages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "roles" / "systemd_service" / "files" / "llama_weights.py"
SIZES = (5_000_000, 40_000_001, 16 << 20)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_weights", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "llama_weights", module)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass
class Place:
    """A model, a store, a run-time directory, and the plan in its file."""

    folder: Path
    data: dict[str, Any]

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def change(self, **values: Any) -> None:
        self.data.update(values)
        self.plan.write_text(json.dumps(self.data))

    def source(self, index: int) -> Path:
        return self.folder / "model" / self.data["shards"][index]["file"]

    def target(self, index: int) -> Path:
        return Path(self.data["store"]) / self.data["content"] / self.data["shards"][index]["file"]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, str(SCRIPT), *words, f"--plan={self.plan}", f"--run={self.run}"]

    def start(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **environment},
        )

    def load(self, **environment: str) -> str:
        done = self.start("load", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self) -> str:
        done = self.start("load")
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def check(self, *words: str) -> dict[str, Any]:
        done = self.start("check", *words)
        answer: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if answer["complete"] else 1)
        return answer

    def whole(self) -> bool:
        """Return whether each store file holds its shard and zeros behind it."""
        for index, shard in enumerate(self.data["shards"]):
            held = self.target(index).read_bytes()
            page = self.data["page_bytes"]
            assert len(held) == -(-shard["bytes"] // page) * page
            if held[: shard["bytes"]] != self.source(index).read_bytes() or any(held[shard["bytes"] :]):
                return False
        return True


@pytest.fixture
def place(tmp_path: Path) -> Place:
    seeded = random.Random(5)
    (tmp_path / "model" / "q8").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "store").mkdir()
    shards = []
    for number, size in enumerate(SIZES):
        text = seeded.randbytes(size)
        name = f"q8/m-{number}.gguf"
        (tmp_path / "model" / name).write_bytes(text)
        shards.append({"file": name, "bytes": size, "sha256": hashlib.sha256(text).hexdigest()})
    it = Place(tmp_path, {})
    it.change(
        instance=0,
        source=str(tmp_path / "model"),
        store=str(tmp_path / "store"),
        content="0123456789abcdef",
        shards=shards,
        page_bytes=os.statvfs(tmp_path).f_bsize,
        nodes=[],
        hash=None,
        threads=3,
    )
    return it


def test_loads_once_and_then_reads_nothing(place: Place) -> None:
    assert place.check()["complete"] is False
    said = place.load()
    assert "loading 3 of 3 shards" in said and "sha256 compared" in said
    assert place.whole()
    assert place.check("--deep") == {
        "complete": True,
        "loading": False,
        "content": "0123456789abcdef",
        "pages": sum(-(-size // place.data["page_bytes"]) for size in SIZES),
        "problems": [],
        "other": [],
    }
    for index in range(3):
        place.source(index).unlink()
    assert "complete, nothing is read" in place.load()


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def shrink_and_grow(path: Path) -> None:
    size = path.stat().st_size
    os.chmod(path, 0o600)
    os.truncate(path, size - 4096)
    os.truncate(path, size)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(Path.unlink, "not in the store", id="removed"),
        pytest.param(touch, "mtime_ns", id="touched"),
        pytest.param(shrink_and_grow, "ctime_ns", id="cut-and-grown"),
        pytest.param(replace, "inode", id="replaced"),
    ],
)
def test_only_what_was_touched_is_loaded_again(place: Place, damage: Any, said: str) -> None:
    place.load()
    before = place.target(0).stat().st_ino
    damage(place.target(1))
    (problem,) = place.check()["problems"]
    assert "q8/m-1.gguf: " in problem and said in problem
    assert "loading 1 of 3 shards" in place.load()
    assert place.whole()
    assert place.target(0).stat().st_ino == before


def test_a_lost_record_loads_everything_again(place: Place) -> None:
    place.load()
    (place.run / "record.json").unlink()
    assert [text.split(": ")[1] for text in place.check()["problems"]] == ["was not loaded to its end"] * 3
    assert "loading 3 of 3 shards" in place.load()
    assert place.whole()


@pytest.mark.parametrize("record", ["", "[]", '{"shards": []}', '{"shards": {"q8/m-0.gguf": 7}}', "[" * 100_000])
def test_a_record_that_says_nothing_is_none(place: Place, record: str) -> None:
    place.load()
    (place.run / "record.json").write_text(record)
    assert len(place.check()["problems"]) == 3
    place.load()
    assert place.whole()


def test_a_deep_check_finds_what_no_time_shows(place: Place) -> None:
    place.load()
    target = place.target(0)
    target.chmod(0o600)
    with target.open("r+b") as stream:
        stream.seek(4_000_000)
        stream.write(b"\x00" if target.read_bytes()[4_000_000] else b"\x01")
    record = json.loads((place.run / "record.json").read_text())
    found = target.stat()
    record["shards"]["q8/m-0.gguf"].update(
        mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns, blocks=found.st_blocks
    )
    (place.run / "record.json").write_text(json.dumps(record))
    assert place.check()["problems"] == []
    (problem,) = place.check("--deep")["problems"]
    assert problem.startswith("q8/m-0.gguf: sha256 of the store is ")


# ---- sources


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(20_000_000)
        byte = stream.read(1)[0]
        stream.seek(20_000_000)
        stream.write(bytes([byte ^ 0x10]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(flip, ["sha256 is ", "expected ", "damaged", "site.yml"], id="bit"),
        pytest.param(cut, ["40000000 bytes, expected 40000001", "site.yml"], id="cut"),
        pytest.param(Path.unlink, ["No such file", "site.yml"], id="gone"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), ["bytes, expected 40000001"], id="folder"),
    ],
)
def test_a_wrong_shard_is_named_and_nothing_of_it_stays(place: Place, damage: Any, said: list[str]) -> None:
    text = place.source(1).read_bytes()
    damage(place.source(1))
    error = place.refused()
    for part in [str(place.source(1)), *said]:
        assert part in error
    assert not place.target(1).exists()
    assert place.check()["complete"] is False
    if place.source(1).is_dir():
        place.source(1).rmdir()
    place.source(1).write_bytes(text)
    place.load()
    assert place.whole()


def test_without_hashes_a_flipped_bit_passes_as_said(place: Place) -> None:
    place.change(hash=False)
    flip(place.source(1))
    assert "sha256 not compared, as set" in place.load()
    assert place.check()["complete"] is True
    (problem,) = place.check("--deep")["problems"]
    assert "q8/m-1.gguf" in problem


def fetched(place: Place, indices: list[int]) -> None:
    """Write the record of a fetch that verified these shards."""
    record = {}
    for index in indices:
        found, shard = place.source(index).stat(), place.data["shards"][index]
        record[shard["file"]] = {
            "sha256": shard["sha256"],
            "bytes": found.st_size,
            "inode": found.st_ino,
            "mtime_ns": found.st_mtime_ns,
            "ctime_ns": found.st_ctime_ns,
        }
    (place.folder / "model" / ".cpullm-record.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("rate", "verified", "compared"),
    [
        pytest.param(1e12, [], [0, 1, 2], id="free"),
        pytest.param(1.0, [0, 1, 2], [], id="costly-and-verified"),
        pytest.param(1.0, [0, 2], [1], id="one-not-verified"),
        pytest.param(1.0, [], [0, 1, 2], id="none-verified"),
    ],
)
def test_hashes_where_that_is_free_or_needed(
    loader: ModuleType,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    verified: list[int],
    compared: list[int],
) -> None:
    fetched(place, verified)
    monkeypatch.setattr(loader, "HASH_BYTES_PER_S", rate)
    plan = loader.read_plan(place.plan)
    names, why = loader.hashing(plan, [loader.Source(plan, shard) for shard in plan.shards])
    assert names == {plan.shards[index].file for index in compared}
    assert why.startswith("sha256 compared")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(os.utime, "was written to while it was read", id="written"),
        pytest.param(lambda path: os.truncate(path, 1 << 20), "ends at byte 1048576, expected ", id="cut"),
    ],
)
def test_a_shard_that_changes_while_it_is_read(
    loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch, spoil: Any, said: str
) -> None:
    plan = loader.read_plan(place.plan)
    read, seen = loader.Source.read, []

    def first_spoil(source: Any, *words: Any) -> None:
        if source.path == place.source(1) and not seen:
            seen.append(1)
            spoil(source.path)
        read(source, *words)

    monkeypatch.setattr(loader.Source, "read", first_spoil)
    with pytest.raises(loader.WeightsError, match=r"m-1\.gguf: ") as caught:
        loader.load(plan, place.run)
    assert said in str(caught.value)
    assert not place.target(1).exists()
    assert place.check()["complete"] is False


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(errno.EIO, "read error at byte 16777216 of 40000001: Input/output error", id="disk"),
        pytest.param(errno.EINVAL, "", id="no-direct"),
    ],
)
def test_reads_that_fail(
    loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch, fault: int, said: str, capsys: Any
) -> None:
    plan = loader.read_plan(place.plan)
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if name.endswith("m-1.gguf") and offset == 16 << 20 and (fault == errno.EIO or direct):
            raise OSError(fault, os.strerror(fault))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    if said:
        with pytest.raises(loader.WeightsError) as caught:
            loader.load(plan, place.run)
        assert said in str(caught.value) and str(place.source(1)) in str(caught.value)
    else:
        loader.load(plan, place.run)
        assert place.whole()
        if (os.O_DIRECT and loader.Source(plan, plan.shards[0]).direct) >= 0:
            assert f"{place.source(1)}: O_DIRECT was refused" in capsys.readouterr().out


def test_short_reads_are_completed(loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        return real(descriptor, [buffers[0][:100_001]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    loader.load(loader.read_plan(place.plan), place.run)
    assert place.whole()


def test_a_file_system_without_o_direct(
    loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = os.open

    def without(path: Any, flags: int, *words: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real(path, flags, *words, **named)

    monkeypatch.setattr(os, "open", without)
    loader.load(loader.read_plan(place.plan), place.run)
    said = capsys.readouterr().out
    assert "no O_DIRECT on this file system" in said and said.rstrip().endswith("buffered")
    assert place.whole()


def test_what_lies_behind_the_end_on_the_disk_does_not_stay(
    loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        got = real(descriptor, buffers, offset)
        rest = len(buffers[0]) - got
        buffers[0][got:] = b"x" * rest
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    loader.load(loader.read_plan(place.plan), place.run)
    assert place.whole()


# ---- the store


def old_content(place: Place) -> Path:
    path = Path(place.data["store"]) / "feedfeedfeedfeed" / "old.gguf"
    path.parent.mkdir()
    path.write_bytes(b"old" * 10_000)
    return path


def test_old_content_makes_room(place: Place) -> None:
    old = old_content(place)
    assert place.check()["other"] == [str(old)]
    said = place.load()
    assert "pages of old content" in said
    assert not old.parent.exists()
    assert place.whole()


def test_old_content_goes_where_nothing_is_to_be_loaded(place: Place) -> None:
    place.load()
    old = old_content(place)
    assert "complete, nothing is read" in place.load()
    assert not old.exists()


@contextlib.contextmanager
def mapping(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Have another process map a file, which it does not keep open itself."""
    code = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
held = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
"""
    argv = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout and user.stdout.readline() == "mapped\n"
        yield user


def test_what_a_process_maps_is_not_freed(place: Place) -> None:
    old = old_content(place)
    with mapping(old) as user:
        said = place.load()
        assert "old content stays" in said and f"({user.pid})" in said
        assert old.exists()
    place.load()
    assert not old.exists()


def test_the_maps_tell_where_the_kernel_grants_no_lease(
    loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_content(place)

    def refuse(*_words: Any) -> None:
        raise OSError(errno.EINVAL, "no leases")

    monkeypatch.setattr(loader.fcntl, "fcntl", refuse)
    assert loader.in_use(old) is False
    with mapping(old):
        assert loader.in_use(old) is True


def test_a_used_store_that_is_not_complete_is_left_alone(place: Place) -> None:
    place.load()
    (place.run / "record.json").unlink()
    with mapping(place.target(0)) as user:
        said = place.refused()
        assert "not complete, and still in use" in said and f"({user.pid})" in said and str(place.target(0)) in said
        assert place.target(0).exists()
    place.load()
    assert place.whole()


def pool(root: Path, page_bytes: int, nodes: dict[int, int], promised: int = 0) -> None:
    """Write a pool as the kernel shows it."""
    name = f"hugepages/hugepages-{page_bytes // 1024}kB"
    counts = {"nr": 30_000, "free": sum(nodes.values()), "resv": promised}
    for folder, values in [
        (root / "kernel/mm" / name, counts),
        *((root / f"devices/system/node/node{node}" / name, {"nr": 9, "free": free}) for node, free in nodes.items()),
    ]:
        folder.mkdir(parents=True)
        for key, value in values.items():
            (folder / f"{key}_hugepages").write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("nodes", "promised", "enough"),
    [
        pytest.param({0: 1, 1: 0}, 0, True, id="just-enough"),
        pytest.param({0: 0, 1: 0}, 0, False, id="one-short"),
        pytest.param({0: 0, 1: 50}, 0, False, id="on-the-other-node"),
        pytest.param({0: 3, 1: 2}, 5, False, id="promised-to-others"),
    ],
)
def test_a_short_pool_is_refused_with_the_numbers_before_anything_is_freed(
    loader: ModuleType,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    nodes: dict[int, int],
    promised: int,
    enough: bool,
) -> None:
    old = old_content(place)
    page = place.data["page_bytes"]
    needed = sum(-(-size // page) for size in SIZES)
    freed = old.stat().st_blocks * 512 // page
    monkeypatch.setattr(loader, "SYS", place.folder / "sys")
    spare = {node: (needed - freed - 1 + free if node == 0 else free) for node, free in nodes.items()}
    if promised:
        spare[0] = needed - freed - 1 + promised - nodes[1]
    pool(place.folder / "sys", page, spare, promised)
    place.change(nodes=[0])
    plan = loader.read_plan(place.plan)
    if enough:
        loader.load(plan, place.run)
        assert place.whole()
        return
    with pytest.raises(loader.WeightsError) as caught:
        loader.load(plan, place.run)
    assert f"{needed} pages of" in str(caught.value) and "needed, " in str(caught.value)
    assert f"{freed} in old content" in str(caught.value) and "on node 0" in str(caught.value)
    assert old.exists() and not place.target(0).exists()


def test_a_store_that_is_not_mounted_is_refused(place: Place) -> None:
    place.change(page_bytes=1 << 30)
    assert f"expected a hugetlbfs of {1 << 30}: is it mounted?" in place.refused()
    place.change(store=str(place.folder / "absent"))
    assert "expected the store's mount: run site.yml" in place.refused()
    assert place.check()["complete"] is False


NUMA_MAPS = """\
7f00 bind:0 file={store}/0123456789abcdef/q8/m-0.gguf huge mapmax=2 N0=2 N1=1 kernelpagesize_kB=1048576
7f01 bind:0 file={store}/feed/x.gguf huge N1=1 kernelpagesize_kB=1048576
7f02 default anon=12 dirty=12 N1=12 kernelpagesize_kB=4
"""


def test_pages_on_another_node_are_found(loader: ModuleType, place: Place) -> None:
    text = NUMA_MAPS.format(store=place.data["store"])
    for nodes, wrong in (([0], {1: 1}), ([0, 1], {}), ([], {}), ([2], {0: 2, 1: 1})):
        place.change(nodes=nodes)
        assert loader.misplaced(loader.read_plan(place.plan), text) == wrong


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"shards": []}, id="no-shard"),
        pytest.param({"shards": [{"file": "../x", "bytes": 1, "sha256": "a"}]}, id="outside"),
        pytest.param({"shards": [{"file": "/x", "bytes": 1, "sha256": "a"}]}, id="absolute"),
        pytest.param({"shards": [{"file": "x", "bytes": 1, "sha256": "a"}] * 2}, id="twice"),
        pytest.param({"shards": [{"file": "x", "bytes": 0, "sha256": "a"}]}, id="empty"),
        pytest.param({"shards": 7}, id="no-list"),
        pytest.param({"content": "../.."}, id="content"),
        pytest.param({"threads": 0}, id="threads"),
        pytest.param({"nodes": None}, id="nodes"),
    ],
)
def test_a_plan_that_is_none_is_refused(place: Place, change: dict[str, Any]) -> None:
    place.change(**change)
    assert str(place.plan) in place.refused()


# ---- killed, and two at once


def slowed(place: Place) -> None:
    """Make the model large enough that a load takes a while."""
    text = random.Random(6).randbytes(1 << 20) * 200
    place.source(2).write_bytes(text)
    shards = place.data["shards"]
    shards[2] |= {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    place.change(shards=shards)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_at_any_point_the_next_load_is_right(place: Place, number: signal.Signals) -> None:
    slowed(place)
    begin = time.monotonic()
    place.load()
    whole = time.monotonic() - begin
    seeded, ended = random.Random(7), 0
    for _ in range(60):
        # Where complete shards count, a load that follows a complete one has nothing to do.
        if place.check()["complete"]:
            place.target(2).unlink()
        with subprocess.Popen(place.command("load"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(seeded.uniform(0, whole))
            process.send_signal(number)
        ended += process.returncode != 0
        # What counts as complete is right, whenever the end came.
        unfinished = {problem.partition(": ")[0] for problem in place.check()["problems"]}
        for index, shard in enumerate(place.data["shards"]):
            if shard["file"] not in unfinished:
                held = place.target(index).read_bytes()[: shard["bytes"]]
                assert hashlib.sha256(held).hexdigest() == shard["sha256"]
        if ended == 8:
            break
    assert ended == 8
    place.load()
    assert place.whole()
    assert place.check("--deep")["problems"] == []


def test_a_second_loader_gives_way(loader: ModuleType, place: Place) -> None:
    with loader.exclusive(place.run):
        said = place.refused()
        assert f"another loader works (process {os.getpid()})" in said
        assert place.check()["loading"] is False
        (place.run / "record.json").write_text(json.dumps({"content": place.data["content"], "shards": {}}))
        assert place.check()["loading"] is True
    place.load()


def test_a_check_turns_no_loader_away(loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with (place.run / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        # The check ends while the loader waits.
        monkeypatch.setattr(loader.time, "sleep", lambda _seconds: fcntl.flock(lock, fcntl.LOCK_UN))
        with loader.exclusive(place.run):
            assert loader.works(place.run)


def test_systemd_hears_how_far_it_is(place: Place, tmp_path: Path) -> None:
    slowed(place)
    address = f"/tmp/llama-weights-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address)
        server.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": address}
        try:
            heard: list[list[str]] = []
            with subprocess.Popen(place.command("load"), stdout=subprocess.DEVNULL, env=environment):
                while not heard or "READY=1" not in heard[-1]:
                    heard.append(server.recv(4096).decode().splitlines())
        finally:
            os.unlink(address)
    assert heard[-1][1].startswith("STATUS=complete: ") and "content 0123456789abcdef" in heard[-1][1]
    states = [entry for line in heard[:-1] for entry in line if entry.startswith("STATUS=")]
    assert any(" of 250.0 MiB" in entry or " MiB of " in entry for entry in states)
    assert any(entry.startswith("EXTEND_TIMEOUT_USEC=") for line in heard for entry in line)
    progress = json.loads((place.run / "progress.json").read_text())
    assert progress["total"] == sum(shard["bytes"] for shard in place.data["shards"])


def test_progress_says_rate_and_time_left(
    loader: ModuleType, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    clock = [100.0]
    monkeypatch.setattr(loader.time, "monotonic", lambda: clock[0])
    progress = loader.Progress(place.run, 10 << 30, 0)
    for second in range(1, 7):
        clock[0] = 100.0 + second
        progress.tell(second << 30)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "50.0 %, 5.0 GiB of 10.0 GiB, 1.07 GB/s, 5 s left"
