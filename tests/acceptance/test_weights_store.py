# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store of weights on one real host, and what goes wrong with it: never a wrong token, always a way back.

Needs root, a page of 1 GiB (three with STORE_MERGED=0: the model in its three files) and an engine in the cache.
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

from tests.support.store_host import CASE, LOADER, PLAN, RUN, SERVER, STORE, WEIGHTS, StoreHost

# `make soak-weights` does a hundred.
KILLS = 5
# Outside of a load a store is read-only, for root as well.
WRITABLE = f"mount -o remount,bind,rw {STORE}"

pytestmark = pytest.mark.lab


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
    assert host.recites("opening", "truths")["ok"]
    loaded = host.show(WEIGHTS, "InvocationID")
    folder = source(host).rpartition("/")[0]
    host.ssh(f"mv {folder} {folder}.away")
    try:
        host.ssh(f"systemctl restart {SERVER}")
        assert host.recites("opening", "truths")["ok"]
    finally:
        host.ssh(f"mv {folder}.away {folder}")
    assert host.show(WEIGHTS, "InvocationID") == loaded


def test_a_run_with_nothing_to_change_touches_nothing(host: StoreHost) -> None:
    before = [host.show(unit, "InvocationID") for unit in (SERVER, WEIGHTS)]
    done = host.site("--tags=serve")
    assert done.returncode == 0 and "changed=0 " in done.stdout, done.stdout[-3000:]
    assert [host.show(unit, "InvocationID") for unit in (SERVER, WEIGHTS)] == before


def test_verification_shows_a_store_that_is_not_complete(host: StoreHost) -> None:
    record = host.ssh(f"cat {RUN}/record.json")
    host.ssh(f"echo '{{}}' > {RUN}/record.json")
    done = host.site(playbook="playbooks/verify.yml")
    assert done.returncode == 2 and "was not loaded to its end" in done.stdout
    host.ssh(f"cat > {RUN}/record.json", text=record)
    assert host.site(playbook="playbooks/verify.yml").returncode == 0


def cached(host: StoreHost) -> int:
    """Return the tokens of the opening's prompt that the server had already read."""
    asked = host.ssh(
        "curl --silent --fail --json @- http://127.0.0.1:8008/v1/chat/completions",
        text=json.dumps({**CASE["request"], "max_tokens": 4}),
    )
    return int(json.loads(asked)["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_changed_flag_restarts_the_server_alone_and_slots_stay_while_they_are_wanted(host: StoreHost) -> None:
    server, loaded = (host.show(unit, "InvocationID") for unit in (SERVER, WEIGHTS))
    host.play("site.yml", "--tags=serve", "--extra-vars=systemd_service_slot_directory=/srv/slots")
    assert host.show(SERVER, "InvocationID") != server
    assert host.show(WEIGHTS, "InvocationID") == loaded
    cached(host)
    host.ssh(f"systemctl restart {SERVER}; touch /srv/slots/note")
    assert cached(host) > 0, host.ssh(f"journalctl --no-pager -u {SERVER} | grep slot")
    # They hold prompts, so they go with the wish; what is not ours stays.
    host.play("site.yml", "--tags=serve")
    assert host.ssh("ls /srv/slots; ls /etc/llama-slots 2>&1", check=False).startswith("note\nls: cannot access")
    host.ssh(f"systemctl restart {SERVER}; rm -r /srv/slots")
    assert cached(host) == 0


# ---- the pool


def test_pages_that_others_took_are_refused_with_the_numbers(host: StoreHost) -> None:
    host.ssh(f"systemctl stop {WEIGHTS}; {WRITABLE}; rm -r {STORE}/*")
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
    host.ssh(f"systemctl stop {WEIGHTS}; {WRITABLE}; rm -r {STORE}/*")
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
    whole_s = host.load_seconds()
    seed = int(os.environ.get("STORE_SEED", "1"))
    seeded = random.Random(seed)
    rounds = host.faults("loaders", [seeded.uniform(0, whole_s) for _ in range(KILLS)])
    print(f"seed {seed}, a load takes {whole_s:.1f} s, {rounds}")
    killed = [found for found in rounds if found["left"] == "failed"]
    assert killed
    assert all(found["server"] != "active" for found in killed), rounds
    assert all(found["back"] and found["answer"] == "right" for found in rounds), rounds
    assert host.check(deep=True)["complete"]


# The first one is held up where it has the lock, so that the second one meets it whatever else this machine does.
TWO = f"""
import fcntl, os, signal, subprocess, time
subprocess.run("systemctl stop {WEIGHTS}; {WRITABLE}", shell=True, check=True)
open("{RUN}/record.json", "w").close()
os.truncate("{RUN}/lock", 0)
argv = ["python3", "{LOADER}", "load", "--plan={PLAN}", "--run={RUN}"]
def start():
    return subprocess.Popen(argv, user="llama-server", group="llama-server", extra_groups=[], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
first = start()
while not (pid := open("{RUN}/lock").read().strip()) and first.poll() is None:
    time.sleep(0.001)
os.kill(int(pid), signal.SIGSTOP)
second = start()
print(pid, second.communicate()[0], second.returncode, sep="\\n")
os.kill(int(pid), signal.SIGCONT)
print(first.communicate()[0], first.returncode, sep="\\n")
"""


def test_two_loaders_exclude_each_other(host: StoreHost) -> None:
    told = host.python(TWO).splitlines()
    assert f"another loader works (process {told[0]})" in told[1], told
    assert told[2] == "" and told[3] == "1", told
    assert any(" read in " in line for line in told[4:]) and told[-1] == "0", told
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
            client.hear()
            assert host.kill_server()
        client.hear()
        answers = client.stop()
    assert answers.texts("wrong") == [], answers.summary()
    # With each kill the request in flight is lost, and at most the one that reaches the dying process right after it.
    assert len(answers.texts("none")) <= 6, answers.summary()
    assert host.show(WEIGHTS, "InvocationID") == loaded


CHANGES = {
    "cut": "truncate --size=0 FILE",
    "emptied": "truncate --size=0 FILE; truncate --size=1G FILE",
    "removed": "rm FILE",
    "hole": "fallocate --punch-hole --offset 0 --length 1G FILE",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_is_not_changed_by_mistake(host: StoreHost, change: str) -> None:
    said = host.ssh(f"{CHANGES[change].replace('FILE', stored(host))} 2>&1", check=False)
    assert "Read-only file system" in said
    assert host.check()["complete"]


@pytest.mark.parametrize("change", CHANGES)
def test_store_files_changed_by_hand_are_loaded_again(host: StoreHost, change: str) -> None:
    host.ssh(f"systemctl stop {SERVER}; {WRITABLE}; {CHANGES[change].replace('FILE', stored(host))}")
    assert not host.check()["complete"]
    # The first start sees it, and has the store loaded.
    host.ssh(f"systemctl start {SERVER}", check=False)
    assert host.serves()
    assert host.check(deep=True)["complete"]


@pytest.mark.parametrize("change", ["cut", "removed"])
def test_a_running_server_whose_files_go_away_says_nothing_wrong(host: StoreHost, change: str) -> None:
    """Cut: the next touch ends it, and what starts then is right. Removed: it keeps what it mapped."""
    before = host.show(SERVER, "InvocationID")
    with host.client(600) as client:
        client.hear()
        host.ssh(f"{WRITABLE}; {CHANGES[change].replace('FILE', stored(host))}")
        if change == "removed":
            assert not host.check()["complete"]
            client.hear()
            assert host.show(SERVER, "InvocationID") == before
            assert host.kill_server()
        assert host.restarted(before)
        client.hear()
        answers = client.stop()
    assert answers.texts("wrong") == [], answers.summary()
    assert len(answers.texts("none")) <= 2, answers.summary()
    assert host.check(deep=True)["complete"]
