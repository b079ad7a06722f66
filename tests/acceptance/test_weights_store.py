# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store of weights on one real host, and what goes wrong with it: never a wrong token, always a way back.

Needs root, three pages of 1 GiB (one with STORE_MERGED=1: the model as one file) and an engine in the cache.
Run: pytest -m lab tests/acceptance/test_weights_store.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.store_host import LOADER, MODEL, PLAN, RUN, SERVER, STORE, WEIGHTS, StoreHost, store_host

NAME = os.environ.get("STORE_HOST", "test-store")
MERGED = os.environ.get("STORE_MERGED") == "1"
KILLS = 10

pytestmark = [pytest.mark.lab, pytest.mark.faults]


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """An ext4 on a loop device, and the file below it: once that is cut short, the device answers EIO."""
    folder = tmp_path_factory.mktemp("disk")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(mounted)], check=True)
    (mounted / "padding").write_bytes(b"\1" * (40 << 20))
    for shard in MODEL.glob("*.gguf"):
        (mounted / shard.name).write_bytes(shard.read_bytes())
    os.sync()
    try:
        yield image, mounted
    finally:
        # What it still wants to write has nowhere to go.
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, faulty_disk: tuple[Path, Path]) -> Iterator[StoreHost]:
    folder = tmp_path_factory.mktemp("store")
    with store_host(NAME, folder, merged=MERGED, binds=(f"{faulty_disk[1]}:/mnt/faulty",)) as it:
        yield it


@pytest.fixture(autouse=True)
def sound(host: StoreHost) -> Iterator[None]:
    """Each test begins and ends on a host that recites from a complete store."""
    # What stops a loop of starts must not stop the tests.
    host.ssh("systemctl reset-failed")
    yield
    assert host.serves(), host.ssh(f"journalctl --no-pager -u {WEIGHTS} -u {SERVER} | tail -30")
    assert host.recites("opening")["ok"]
    assert host.check()["complete"]


def source(host: StoreHost) -> str:
    """Return the path of the model's last shard on the disk."""
    plan = json.loads(host.ssh(f"cat {PLAN}"))
    return f"{plan['source']}/{plan['shards'][-1]['file']}"


def stored(host: StoreHost) -> str:
    """Return the path of the model's last shard in the store."""
    plan = json.loads(host.ssh(f"cat {PLAN}"))
    return f"{STORE}/{plan['content']}/{plan['shards'][-1]['file']}"


def failed(host: StoreHost) -> str:
    """Return what the loader's unit says of its failure: in its status, and in its journal."""
    assert host.show(WEIGHTS, "ActiveState") == "failed"
    assert host.show(SERVER, "ActiveState") != "active"
    status = host.show(WEIGHTS, "StatusText")
    assert status.startswith("failed: ")
    assert status.removeprefix("failed: ") in host.ssh(f"journalctl --no-pager --output=cat -u {WEIGHTS}")
    return status


# ---- what stays


def test_a_restart_needs_no_disk(host: StoreHost) -> None:
    assert host.recites()["ok"]
    loaded = host.show(WEIGHTS, "InvocationID")
    folder = source(host).rpartition("/")[0]
    host.ssh(f"mv {folder} {folder}.away")
    try:
        host.ssh(f"systemctl restart {SERVER}")
        assert host.recites()["ok"]
    finally:
        host.ssh(f"mv {folder}.away {folder}")
    assert host.show(WEIGHTS, "InvocationID") == loaded


def test_a_run_with_nothing_to_change_touches_nothing(host: StoreHost) -> None:
    before = [host.show(unit, "InvocationID") for unit in (SERVER, WEIGHTS)]
    done = host.site("--tags=serve")
    assert done.returncode == 0 and "changed=0 " in done.stdout, done.stdout[-3000:]
    assert [host.show(unit, "InvocationID") for unit in (SERVER, WEIGHTS)] == before


def test_a_changed_flag_restarts_the_server_alone(host: StoreHost) -> None:
    server, loaded = (host.show(unit, "InvocationID") for unit in (SERVER, WEIGHTS))
    done = host.site("--tags=serve", "--extra-vars=systemd_service_temperature=0.5")
    assert done.returncode == 0 and "changed=2 " in done.stdout, done.stdout[-3000:]
    assert host.show(SERVER, "InvocationID") != server
    assert host.show(WEIGHTS, "InvocationID") == loaded
    assert host.site("--tags=serve").returncode == 0


def test_verification_shows_a_store_that_is_not_complete(host: StoreHost) -> None:
    record = host.ssh(f"cat {RUN}/record.json")
    host.ssh(f"echo '{{}}' > {RUN}/record.json")
    done = host.site(playbook="playbooks/verify.yml")
    assert done.returncode == 2 and "was not loaded to its end" in done.stdout
    host.ssh(f"cat > {RUN}/record.json", text=record)
    assert host.site(playbook="playbooks/verify.yml").returncode == 0


# ---- the pool


def test_pages_that_others_took_are_refused_with_the_numbers(host: StoreHost) -> None:
    host.ssh(f"systemctl stop {WEIGHTS}; rm -r {STORE}/*")
    with host.blocker(1):
        host.ssh(f"systemctl reset-failed; systemctl start {SERVER}", check=False)
        said = failed(host)
        assert f"{host.pages} pages of 1 GiB needed, {host.pages - 1} free of " in said, said
        assert host.ssh(f"find {STORE} -type f") == "", "nothing was touched"
    assert host.comes_back()


def old_content(host: StoreHost) -> str:
    """Fill the store with the pages of another model, and return the last of its files."""
    code = f"""
import mmap, os
os.makedirs("{STORE}/feedfeedfeedfeed")
for number in range({host.pages}):
    fd = os.open(f"{STORE}/feedfeedfeedfeed/old-{{number}}.gguf", os.O_RDWR | os.O_CREAT, 0o640)
    os.ftruncate(fd, 1 << 30)
    with mmap.mmap(fd, 1 << 30) as held:
        held[0] = 1
"""
    host.ssh(f"systemctl stop {WEIGHTS}; rm -r {STORE}/*")
    host.python(f"import os, pwd\nos.setuid(pwd.getpwnam('llama-server').pw_uid)\n{code}")
    return f"{STORE}/feedfeedfeedfeed/old-{host.pages - 1}.gguf"


def test_old_content_makes_room(host: StoreHost) -> None:
    old = old_content(host)
    assert host.check()["other"]
    assert host.comes_back()
    assert f"freed {host.pages} pages of old content" in host.ssh(f"journalctl --output=cat --no-pager -u {WEIGHTS}")
    assert host.ssh(f"test -e {old} || echo gone") == "gone"


def test_old_content_that_a_process_maps_is_not_freed(host: StoreHost) -> None:
    old = old_content(host)
    code = f'import mmap,os,time; m = mmap.mmap(os.open("{old}", os.O_RDONLY), 0, prot=1); m[0]; time.sleep(600)'
    host.ssh(f"systemd-run --unit=mapper --quiet python3 -c '{code}'")
    time.sleep(1)
    try:
        host.ssh(f"systemctl reset-failed; systemctl start {SERVER}", check=False)
        said = failed(host)
        assert f"1 pages are {old}, mapped by " in said and "stop it first" in said, said
        assert host.ssh(f"test -e {old} && echo there") == "there"
    finally:
        host.ssh("systemctl stop mapper")
    assert host.comes_back()


# ---- the loader


def test_a_loader_killed_at_any_point_leaves_a_clear_state(host: StoreHost) -> None:
    begin = time.monotonic()
    assert host.reload().returncode == 0
    whole_s = time.monotonic() - begin
    seed = int(os.environ.get("STORE_SEED", "1"))
    seeded, states = random.Random(seed), []
    for _ in range(KILLS):
        states.append(host.kill_loader(seeded.uniform(0, 1.2 * whole_s)))
        if states[-1] == "failed":
            assert host.show(SERVER, "ActiveState") != "active"
    print(f"seed {seed}, a load takes {whole_s:.1f} s, states {states}")
    assert "failed" in states
    assert host.comes_back()
    assert host.check(deep=True)["complete"]


TWO = f"""
import subprocess
subprocess.run(["systemctl", "stop", "{WEIGHTS}"], check=True)
open("{RUN}/record.json", "w").close()
argv = ["runuser", "-u", "llama-server", "--", "python3", "{LOADER}", "load", "--plan={PLAN}", "--run={RUN}"]
both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
for process in both:
    print(process.communicate()[0], process.returncode)
"""


def test_two_loaders_exclude_each_other(host: StoreHost) -> None:
    told = host.python(TWO)
    assert told.count("another loader works (process ") == 1, told
    assert told.count(" read in ") == 1, told
    assert host.comes_back()


# ---- the disk


@contextlib.contextmanager
def spoilt(host: StoreHost, script: str) -> Iterator[str]:
    """Spoil the last shard on the disk by a script; it is whole again after the block."""
    path = source(host)
    host.ssh(f"cp --preserve {path} /root/kept; {script.replace('SHARD', path)}")
    try:
        yield path
    finally:
        host.ssh(f"cp --preserve /root/kept {path}; chmod 0644 {path}")
        assert host.comes_back()


FLIP = """python3 -c 'import sys; f = open(sys.argv[1], "r+b"); f.seek(70001); b = f.read(1)[0]; f.seek(70001);
f.write(bytes([b ^ 4]))' SHARD"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(FLIP, ["sha256 is ", ", expected ", "damaged"], id="bit-flipped"),
        pytest.param("truncate --size=-4096 SHARD", [" bytes, expected "], id="cut"),
        pytest.param("rm SHARD", ["No such file"], id="gone"),
        pytest.param("chmod 0 SHARD", ["Permission denied"], id="unreadable"),
    ],
)
def test_a_wrong_shard_is_named_and_not_served(host: StoreHost, script: str, said: list[str]) -> None:
    with spoilt(host, script) as path:
        assert host.reload().returncode != 0
        status = failed(host)
        for part in [path, *said]:
            assert part in status
        assert not host.check()["complete"]


TOUCH = f"""
import json, os, subprocess, sys, time
subprocess.run(["systemctl", "stop", "{WEIGHTS}"], check=True)
open("{RUN}/record.json", "w").close()
subprocess.run(["systemctl", "start", "--no-block", "{WEIGHTS}"], check=True)
while os.path.getsize("{RUN}/record.json") == 0:
    time.sleep(0.001)
os.utime(sys.argv[1])
"""


def test_a_shard_that_changes_while_it_is_loaded(host: StoreHost) -> None:
    path = source(host)
    host.python(TOUCH, path)
    deadline = time.monotonic() + 120
    while host.show(WEIGHTS, "ActiveState") == "activating" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert f"{path}: was written to while it was read" in failed(host)
    assert host.comes_back()


def test_a_disk_that_answers_eio(host: StoreHost, faulty_disk: tuple[Path, Path]) -> None:
    image, mounted = faulty_disk
    plan = json.loads(host.ssh(f"cat {PLAN}"))
    last = plan["shards"][-1]["file"]
    for shard in plan["shards"]:
        host.ssh(f"test -e /mnt/faulty/{shard['file']} || cp {plan['source']}/{shard['file']} /mnt/faulty/; sync")
    blocks = subprocess.run(
        ["filefrag", "-e", f"{mounted}/{last}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[3]
    first = int(blocks.split(":")[2].split(".")[0])
    host.ssh(f"cp {PLAN} /root/plan.json")
    try:
        host.ssh(f"cat > {PLAN}", text=json.dumps({**plan, "source": "/mnt/faulty"}))
        os.truncate(image, first * 4096)
        assert host.reload().returncode != 0
        said = failed(host)
        assert f"/mnt/faulty/{last}: read error at byte " in said and "Input/output error" in said, said
    finally:
        host.ssh(f"cp /root/plan.json {PLAN}")
    assert host.comes_back()


# ---- the server


def test_a_server_killed_under_load_says_nothing_wrong(host: StoreHost) -> None:
    loaded = host.show(WEIGHTS, "InvocationID")
    with host.client(600) as client:
        for _ in range(3):
            time.sleep(4)
            host.ssh(f"systemctl kill --kill-whom=main --signal=KILL {SERVER}")
            assert host.serves(60)
        time.sleep(6)
        client.terminate()
        words = client.communicate()[0].split()
    assert words.count("wrong") == 0
    assert words.count("right") > 3 and words.count("none") > 0
    assert words[-1] == "right"
    assert host.show(WEIGHTS, "InvocationID") == loaded


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize(
    "script",
    [
        pytest.param("truncate --size=0 FILE; truncate --size=1G FILE", id="emptied"),
        pytest.param("truncate --size=0 FILE", id="cut"),
        pytest.param("rm FILE", id="removed"),
        pytest.param("fallocate --punch-hole --offset 0 --length 1G FILE", id="hole"),
    ],
)
def test_store_files_changed_by_hand_are_loaded_again(host: StoreHost, script: str, running: bool) -> None:
    if not running:
        host.ssh(f"systemctl stop {SERVER}")
    host.ssh(script.replace("FILE", stored(host)))
    assert not host.check()["complete"]
    # A running one still has what it mapped, or ends with its next touch; what starts then looks first.
    host.ssh(f"systemctl kill --signal=KILL {SERVER}" if running else f"systemctl start {SERVER}", check=False)
    assert host.serves()
    assert host.check(deep=True)["complete"]
