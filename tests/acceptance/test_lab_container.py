# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Containers of the lab, started for real: what they are, and that nothing of them stays behind.

Needs root and the packages of lab/packages.txt; takes about two minutes. Run: pytest -m lab tests/acceptance
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from lab import container, network, pages, state
from tests.support.lab_command import lab

CLONE = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.lab

MAP_A_PAGE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
# MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_1GB
address = libc.mmap(None, 1 << 30, 3, 0x02 | 0x20 | 0x40000 | (30 << 26), -1, 0)
assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
ctypes.memset(address, 1, 1)
print(os.getuid(), *[line.split()[1] for line in open("/proc/self/status") if line.startswith("HugetlbPages")])
"""


def inside(name: str, command: str, data: str | None = None) -> str:
    """Return the output of a command in a container."""
    return lab("ssh", name, "--", command, data=data).stdout.strip()


def entry(name: str) -> dict:
    """Return a host's line of the list."""
    return next(row for row in json.loads(lab("list", "--json").stdout) if row["name"] == name)


def remains(name: str) -> list[str]:
    """Return whatever this machine still has of a container."""
    label, folder = network.label(name), str(state.host_directory(name))
    found = [f"process {process.pid}" for process in state.host_processes(name)]
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"**/{label}")]
    found += [f"namespace {entry}" for entry in network.namespaces() if entry == label]
    found += [f"file {path}" for path in network.run_directory().iterdir() if label in path.name]
    found += [f"file {path}" for path in Path("/run/systemd/nspawn").glob("*/*") if label in path.name]
    for mounts in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            if folder in mounts.read_text(encoding="utf-8", errors="replace"):
                found.append(f"mount in process {mounts.parent.name}")
    if Path(folder).exists():
        found.append(f"folder {folder}")
    if pages.reserved(name):
        found.append(f"{pages.reserved(name)} pages")
    return found


def nspawn_locks() -> set[str]:
    """Return the lock files of nspawn on this machine."""
    folder = Path("/run/systemd/nspawn/locks")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Give the module a lab of its own that shares the caches of the user's."""
    user = state.lab_home()
    place = tmp_path_factory.mktemp("cache")
    (place / "lab").mkdir()
    for cache in ("rootfs", "trees", "debs"):
        (user / cache).mkdir(parents=True, exist_ok=True)
        (place / "lab" / cache).symlink_to(user / cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPULLM_CACHE", str(place))
        yield place / "lab"
        lab("down", "--all")


@pytest.fixture
def hosts():
    """Return a function that starts a container, which is gone after the test."""
    names = []

    def start(name: str, *words: str) -> str:
        names.append(name)
        lab("up", name, "--kind", "container", *words)
        return name

    yield start
    for name in names:
        lab("down", name)


@pytest.fixture(scope="module")
def pair():
    """Return two containers side by side, the first with a page of 1 GiB."""
    lab("up", "one", "--kind", "container", "--pages", "1")
    lab("up", "two", "--kind", "container")
    yield "one", "two"
    lab("down", "one", "two")


def test_two_run_side_by_side(pair):
    names = [inside(name, "hostname") for name in pair]
    boots = [inside(name, "cat /proc/sys/kernel/random/boot_id") for name in pair]
    assert names == list(pair)
    assert len({*boots, state.boot_id()}) == 3


def test_systemd_is_whole(pair):
    for name in pair:
        assert inside(name, "systemctl is-system-running --wait; systemctl --failed --no-legend") == "running"


def test_apt_reaches_debian(pair):
    assert "E:" not in inside(pair[0], "apt-get update 2>&1")


def test_a_package_is_downloaded_once(pair, home):
    inside(pair[0], "apt-get update -qq && apt-get install -y -qq --no-install-recommends tree 2>&1")
    assert list((home / "debs" / "bookworm").glob("tree_*.deb"))
    assert entry(pair[0])["state"] == "running"


def test_an_ordinary_user_maps_a_page(pair):
    assert inside(pair[0], "runuser -u nobody -- python3 -", data=MAP_A_PAGE) == "65534 1048576"


def test_hugetlbfs_can_be_mounted(pair):
    command = "mkdir -p /mnt/h && mount -t hugetlbfs -o pagesize=1G none /mnt/h && findmnt -no OPTIONS /mnt/h"
    assert "pagesize=1024M" in inside(pair[0], command)
    inside(pair[0], "umount /mnt/h")


def test_the_machine_s_settings_are_out_of_reach(pair):
    for path in ("/proc/sys/vm/swappiness", "/sys/kernel/mm/transparent_hugepage/enabled"):
        assert inside(pair[0], f"test -r {path} && ! sh -c 'cat {path} > {path}' 2>&1").endswith(
            "Read-only file system"
        )


def test_the_machine_s_loopback_is_within_reach(pair):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the hub")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert inside(pair[0], f"curl -sS http://{network.MACHINE}:{server.server_port}/") == "the hub"
        finally:
            server.shutdown()


def test_a_port_leads_in(pair):
    inside(pair[1], "mkdir -p /srv/web && echo hello > /srv/web/x")
    inside(pair[1], "systemd-run --quiet --unit=web python3 -m http.server --directory /srv/web 8008")
    port = int(lab("forward", pair[1], "8008").stdout)
    inside(pair[1], "timeout 30 sh -c 'until curl -s 127.0.0.1:8008 >/dev/null; do sleep 0.1; done'")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/x", timeout=10) as answer:
        assert answer.read() == b"hello\n"


def test_a_hardened_service_runs(pair):
    """What systemd_service asks of systemd, and containers are said to refuse."""
    wishes = ["NUMAPolicy=bind", "NUMAMask=0", "CPUAffinity=0", "DynamicUser=yes", "PrivateDevices=yes"]
    wishes += ["ProtectKernelTunables=yes", "ProtectProc=invisible", "SystemCallFilter=@system-service"]
    wishes += ["MemoryDenyWriteExecute=yes", "PrivateUsers=yes", "LimitMEMLOCK=infinity"]
    options = " ".join(f"-p {wish}" for wish in wishes)
    inside(
        pair[0], f"systemd-run --quiet --wait {options} python3 -c 'import os; assert os.sched_getaffinity(0) == {{0}}'"
    )


def test_ansible_reaches_both(pair, tmp_path):
    ansible = Path(sys.executable).with_name("ansible")
    if not ansible.exists():
        pytest.skip("ansible is not in this environment")
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(lab("inventory", *pair).stdout)
    argv = [str(ansible), "-i", str(inventory), "all", "-m", "ansible.builtin.ping"]
    done = subprocess.run(argv, cwd=CLONE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ping: pong") + done.stdout.count('"ping": "pong"') == 2


def test_a_reboot_is_a_reboot(hosts):
    name = hosts("boot")
    before = inside(name, "cat /proc/sys/kernel/random/boot_id; touch /srv/kept")
    lab("ssh", name, "--", "systemctl reboot", check=False)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = lab("ssh", name, "--", "cat /proc/sys/kernel/random/boot_id; ls /srv", check=False)
        if done.returncode == 0 and before not in done.stdout:
            assert "kept" in done.stdout
            return
        time.sleep(0.2)
    raise AssertionError("the container did not come back with another boot id")


def test_snapshot_and_reset(hosts):
    name = hosts("snap")
    inside(
        name,
        "echo 1 > /srv/x && rm /etc/debian_version && rm -r /usr/share/zoneinfo && setcap cap_net_raw+ep /bin/true",
    )
    lab("snapshot", name, "clean")
    inside(name, "echo 2 > /srv/x && touch /srv/y /etc/debian_version && mkdir -p /usr/share/zoneinfo/new")
    lab("reset", name, "clean")
    assert inside(
        name, "cat /srv/x; ls /srv; ls /etc/debian_version /usr/share/zoneinfo 2>/dev/null; getcap /bin/true"
    ) == ("1\nx\n/bin/true cap_net_raw=ep")
    assert entry(name)["snapshots"] == ["clean"]


def test_stop_keeps_the_files(hosts):
    name = hosts("off")
    inside(name, "touch /srv/kept")
    port = entry(name)["ssh_port"]
    lab("stop", name)
    assert entry(name)["state"] == "off"
    assert [thing for thing in remains(name) if not thing.startswith("folder")] == []
    lab("up", name)
    assert inside(name, "ls /srv") == "kept"
    assert entry(name)["ssh_port"] == port


def test_a_folder_of_the_machine_can_be_shared(hosts, tmp_path):
    (tmp_path / "x").write_text("y")
    name = hosts("share", "--bind", f"{tmp_path}:/mnt/here:ro", "--bind", f"{tmp_path}:/mnt/there")
    assert inside(name, "cat /mnt/here/x; touch /mnt/here/z 2>/dev/null || touch /mnt/there/w") == "y"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w", "x"]


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_down_leaves_nothing(release):
    locks = nspawn_locks()
    lab("up", "gone", "--kind", "container", "--pages", "1", "--release", release)
    assert inside("gone", "systemctl is-system-running --wait") == "running"
    assert pages.reserved("gone") == 1
    lab("down", "gone")
    assert remains("gone") == []
    assert nspawn_locks() <= locks


def _pieces(name: str) -> dict[str, int]:
    """Return the processes of this machine that hold a container up, by command, and its own first process."""
    found = {
        Path(f"/proc/{process.pid}/comm").read_text().strip(): process.pid for process in state.host_processes(name)
    }
    first = container.leader(name)
    assert first is not None
    return {**found, "init": first}


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(["sh"], id="supervisor"),
        pytest.param(["systemd-nspawn"], id="nspawn"),
        pytest.param(["slirp4netns"], id="network"),
        pytest.param(["init"], id="init"),
        pytest.param(["sh", "systemd-nspawn", "slirp4netns"], id="all"),
    ],
)
@pytest.mark.parametrize("then", ["down", "up"])
def test_after_kill_9_of_the_pieces(victims, then):
    lab("up", "hit", "--kind", "container", "--pages", "1")
    pieces = _pieces("hit")
    for victim in victims:
        os.kill(pieces[victim], signal.SIGKILL)
    if then == "up":
        lab("up", "hit")
        assert inside("hit", "systemctl is-system-running --wait") == "running"
        assert pages.reserved("hit") == 1
    lab("down", "hit")
    assert remains("hit") == []


@pytest.mark.parametrize("after_s", [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5])
def test_after_kill_9_of_the_lab_itself(after_s):
    argv = [sys.executable, "-m", "lab", "up", "half", "--kind", "container", "--pages", "1"]
    started = subprocess.Popen(argv, cwd=CLONE, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    started.kill()
    started.wait()
    lab("down", "half")
    assert remains("half") == []


def test_a_folder_without_a_record_is_removed(home):
    (home / "hosts" / "early").mkdir(parents=True)
    (home / "hosts" / "early" / ".host.json.x1").touch()
    lab("down", "early")
    assert remains("early") == []


def test_a_damaged_record_does_not_save_a_container(home):
    lab("up", "odd", "--kind", "container")
    (home / "hosts" / "odd" / "host.json").write_text("{")
    lab("down", "odd")
    assert remains("odd") == []


def test_down_all_finds_what_no_record_names(home):
    lab("up", "lost", "--kind", "container", "--pages", "1")
    shutil.rmtree(home / "hosts" / "lost")
    lab("down", "--all")
    assert remains("lost") == []


def test_a_page_too_many_is_refused_with_both_numbers():
    done = lab("up", "greedy", "--kind", "container", "--pages", "100000", check=False)
    lab("down", "greedy")
    assert done.returncode == 1
    assert "100000 pages of 1 GiB wanted" in done.stderr
    assert remains("greedy") == []
