# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pure parts of the lab's containers and their network: nothing is started here."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from lab import container, network, ssh
from lab.state import Host, LabError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Give each test a lab of its own."""
    monkeypatch.setenv("CPULLM_CACHE", str(tmp_path))
    return tmp_path / "lab"


def host(**values) -> Host:
    """Return a container's record."""
    extra = {"tree": "/cache/trees/bookworm-1", "overlay": True, **values.pop("extra", {})}
    return Host(name="web", kind="container", ssh_port=2201, extra=extra, **values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("/a:/b", container.Bind("/a", "/b"), id="writable"),
        pytest.param("/a/b c:/d:ro", container.Bind("/a/b c", "/d", True), id="read-only"),
        pytest.param("/a:/b:rw", container.Bind("/a", "/b"), id="writable-said"),
    ],
)
def test_parse_bind(text, expected):
    assert container.parse_bind(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("/a", "expected SOURCE:TARGET", id="no-target"),
        pytest.param("/a:/b:wo", "expected SOURCE:TARGET", id="unknown-mode"),
        pytest.param("/a:/b:ro:x", "expected SOURCE:TARGET", id="too-many"),
        pytest.param("a:/b", "absolute paths without '..', found 'a'", id="relative-source"),
        pytest.param("/a:b", "absolute paths without '..', found 'b'", id="relative-target"),
        pytest.param("/a:/x/../b", "found '/x/../b'", id="dots"),
        pytest.param("/a:/", "own root cannot be replaced", id="root"),
    ],
)
def test_parse_bind_refuses(text, message):
    with pytest.raises(LabError, match=message):
        container.parse_bind(text)


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        pytest.param("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup", id="unified"),
        pytest.param(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
            "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            "/sys/fs/cgroup/unified",
            id="hybrid",
        ),
    ],
)
def test_unified_hierarchy(mounts, expected):
    assert container.unified_hierarchy(mounts) == Path(expected)


def test_unified_hierarchy_is_needed():
    with pytest.raises(LabError, match="no cgroup2 hierarchy"):
        container.unified_hierarchy("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n")


def test_overlay_options_escape_what_mount_divides_by():
    options = container.overlay_options(Path("/a:b"), Path("/c,d"), Path("/e\\f"))
    assert options == "lowerdir=/a\\:b,upperdir=/c\\,d,workdir=/e\\\\f"


def test_nspawn_argv_follows_the_record(monkeypatch):
    monkeypatch.setattr(container.os, "cpu_count", lambda: 8)
    argv = container.nspawn_argv(host(cpus=2, extra={"binds": ["/src:/dst:ro", "/x:/y"]}), Path("/debs"))
    assert "--cpu-affinity=0-1" in argv
    assert "--bind-ro=/src:/dst" in argv
    assert "--bind=/x:/y" in argv
    assert f"--bind=/debs:{container.DEB_CACHE}" in argv
    assert f"--network-namespace-path=/run/netns/{network.label('web')}" in argv
    assert "--hostname=web" in argv
    assert {"--register=no", "--keep-unit", "--boot"} <= set(argv)


@pytest.mark.parametrize("cpus", [pytest.param(0, id="not-said"), pytest.param(8, id="all")])
def test_nspawn_argv_leaves_the_cpus_alone(monkeypatch, cpus):
    monkeypatch.setattr(container.os, "cpu_count", lambda: 8)
    assert not [word for word in container.nspawn_argv(host(cpus=cpus), Path("/debs")) if "affinity" in word]


@pytest.mark.parametrize("overlay", [pytest.param(True, id="overlay"), pytest.param(False, id="copy")])
def test_supervise_text_is_a_script_that_a_shell_takes(tmp_path, overlay):
    script = tmp_path / "supervise.sh"
    argv = ["systemd-nspawn", "--bind=/it's:/here"]
    text = container.supervise_text(host(extra={"overlay": overlay}), argv, Path("/sys/fs/cgroup/x y"))
    script.write_text(text, encoding="utf-8")
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    assert shlex.join(argv) in text
    assert ("mount -t overlay" in text) is overlay


def test_supervise_runs_again_on_a_reboot_only(tmp_path):
    """133 is nspawn's word for a reboot; any other end is the end."""
    counter = tmp_path / "starts"
    fake = tmp_path / "nspawn"
    fake.write_text(f'#!/bin/sh\necho x >> {counter}\n[ "$(wc -l < {counter})" -lt 3 ] && exit 133\nexit 7\n')
    fake.chmod(0o755)
    (tmp_path / "cgroup.procs").touch()
    script = container.supervise_text(host(extra={"overlay": False}), [str(fake)], tmp_path)
    assert subprocess.run(["sh", "-c", script], capture_output=True, check=False).returncode == 7
    assert counter.read_text().count("x") == 3


def test_seeds_hold_the_labs_keys(tmp_path):
    for name in ("client", "host"):
        (tmp_path / name).write_text(f"private {name}\n")
        (tmp_path / f"{name}.pub").write_text(f"ssh-ed25519 {name}\n")
    keys = ssh.Keys(tmp_path / "client", tmp_path / "host", tmp_path / "known_hosts")
    found = {seed.path: seed for seed in container.seeds(host(), keys)}
    assert found["root/.ssh/authorized_keys"].text == "ssh-ed25519 client\n"
    assert found["root/.ssh/authorized_keys"].mode == 0o600
    assert found["etc/ssh/ssh_host_ed25519_key"].text == "private host\n"
    assert found["etc/ssh/ssh_host_ed25519_key"].mode == 0o600
    assert found["etc/resolv.conf"].text == "nameserver 10.0.2.3\n"
    assert "web" in found["etc/hosts"].text
    assert all(not seed.path.startswith("/") for seed in found.values())


def test_the_keeper_of_packages_is_a_script_that_a_shell_takes(tmp_path):
    keys = ssh.Keys(tmp_path / "client", tmp_path / "host", tmp_path / "known_hosts")
    for name in ("client", "client.pub", "host", "host.pub"):
        (tmp_path / name).write_text("x\n")
    seed = next(seed for seed in container.seeds(host(), keys) if seed.path == container.KEEP_DEBS.lstrip("/"))
    assert subprocess.run(["sh", "-n"], input=seed.text, text=True, check=False).returncode == 0
    assert seed.mode == 0o755


def test_labels_tell_labs_apart():
    assert network.label("web", Path("/a")) != network.label("web", Path("/b"))
    assert network.label("web", Path("/a")).startswith(network.label_prefix(Path("/a")))
    assert network.label("web") == network.label_prefix() + "web"


def test_the_socket_of_the_longest_name_fits_a_unix_socket():
    assert len(str(network.socket_path("n" * 32))) < 108


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(
            b'{"error": {"desc": "bad request: add_hostfwd: slirp_add_hostfwd failed"}}', "add_hostfwd", id="error"
        ),
        pytest.param(b'{"error": "odd"}', "odd", id="error-without-description"),
        pytest.param(b"", "answered b''", id="nothing"),
        pytest.param(b"[1]", "1", id="no-object"),
    ],
)
def test_parse_answer_refuses(answer, message):
    with pytest.raises(LabError, match=message):
        network.parse_answer(answer)


def test_parse_answer():
    assert network.parse_answer(json.dumps({"return": {"id": 3}}).encode()) == {"id": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"memory_gib": 4}, "leave --memory-gib out", id="memory"),
        pytest.param({"cpus": 100000}, "but this machine has", id="cpus"),
        pytest.param({"extra": {"binds": ["/nowhere/at/all:/x"]}}, "no such folder", id="bind"),
        pytest.param({"extra": {"pages": -1}}, "pages", id="pages"),
    ],
)
def test_prepare_refuses(monkeypatch, values, message):
    monkeypatch.setattr(container.rootfs, "require_programs", lambda names: None)
    monkeypatch.setattr(container, "unified_hierarchy", lambda mounts: Path("/x"))
    with pytest.raises(LabError, match=message):
        container.KIND.prepare(host(**values))


def test_parents_in_the_upper_part_look_like_those_below(tmp_path):
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    (lower / "root" / ".ssh").mkdir(parents=True)
    (lower / "root").chmod(0o700)
    upper.mkdir()
    container._make_parents(upper, lower, upper / "root" / ".ssh" / "new")
    assert (upper / "root").stat().st_mode & 0o7777 == 0o700
    assert (upper / "root" / ".ssh" / "new").is_dir()
