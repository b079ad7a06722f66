# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pure parts of the lab's VMs, their disks and the command line: nothing is started here."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from lab import cli, image, rootfs, ssh, vm
from lab.state import Host, LabError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Give each test a lab of its own."""
    monkeypatch.setenv("CPULLM_CACHE", str(tmp_path))
    return tmp_path / "lab"


def values(argv: list[str], option: str) -> list[str]:
    """Return what follows each occurrence of an option."""
    return [argv[number + 1] for number, word in enumerate(argv) if word == option]


@pytest.mark.parametrize(
    ("cpus", "topology", "nodes", "mib"),
    [
        pytest.param(1, "cpus=1,sockets=1,cores=1,threads=1", 1, 8192, id="1"),
        pytest.param(2, "cpus=2,sockets=2,cores=1,threads=1", 2, 4096, id="2"),
        pytest.param(3, "cpus=3,sockets=1,cores=3,threads=1", 1, 8192, id="3"),
        pytest.param(4, "cpus=4,sockets=2,cores=2,threads=1", 2, 4096, id="4"),
    ],
)
def test_sockets_are_nodes_and_share_the_memory(cpus, topology, nodes, mib):
    argv = vm.machine_argv(vm.Machine(cpus=cpus, memory_gib=8))
    assert values(argv, "-smp") == [topology]
    assert values(argv, "-object") == [
        f"memory-backend-ram,id=memory{node},size={mib}M,prealloc=off" for node in range(nodes)
    ]
    numa = values(argv, "-numa")
    assert [word for word in numa if word.startswith("node,")] == [
        f"node,nodeid={node},memdev=memory{node}" for node in range(nodes)
    ]
    assert [word for word in numa if word.startswith("cpu,")] == [
        f"cpu,node-id={node},socket-id={node}" for node in range(nodes)
    ]


@pytest.mark.parametrize(
    ("name", "load", "argument"),
    [
        pytest.param("kvm", 50.0, "kvm", id="kvm"),
        pytest.param("tcg", 4.0, "tcg,thread=multi", id="idle"),
        pytest.param("tcg", 4.1, "tcg,thread=single", id="busy"),
    ],
)
def test_emulated_cpus_take_turns_on_a_busy_machine(name, load, argument):
    assert vm.accelerator_argv(name, load, 2) == ["-accel", argument]


def test_every_table_is_given_to_qemu():
    argv = vm.machine_argv(vm.Machine())
    assert values(argv, "-smbios") == [f"file=table{number}.bin" for number in range(14)]


def test_only_loopback_is_forwarded():
    argv = vm.host_argv(Host(name="web", kind="vm", ssh_port=2201, forwards=[[18008, 8008]]))
    assert values(argv, "-netdev") == ["user,id=net,hostfwd=tcp:127.0.0.1:2201-:22,hostfwd=tcp:127.0.0.1:18008-:8008"]


def test_uefi_gets_its_firmware_and_variables():
    bios, uefi = (vm.machine_argv(vm.Machine(firmware=firmware)) for firmware in vm.FIRMWARES)
    assert values(bios, "-drive") == []
    assert [word.rpartition("=")[2] for word in values(uefi, "-drive")] == [str(vm._OVMF_CODE), "variables.qcow2"]


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        pytest.param(vm.Machine(memory_gib=1), "memory 1 GiB: a VM takes 2 to 16 GiB", id="little"),
        pytest.param(vm.Machine(memory_gib=64), "memory 64 GiB: a VM takes 2 to 16 GiB", id="much"),
        pytest.param(vm.Machine(cpus=0), "0 CPUs: a VM takes 1 to 16", id="no-cpu"),
        pytest.param(vm.Machine(firmware="coreboot"), "firmware 'coreboot': expected one of bios, uefi", id="firmware"),
    ],
)
def test_machines_that_are_refused(machine, message):
    with pytest.raises(LabError, match=message):
        vm.check(machine)


def serve(directory: Path, answers: list[dict]) -> list[dict]:
    """Play QEMU on DIRECTORY/qmp.sock: greet, then answer each command in turn; return the commands received."""
    received: list[dict] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(directory / "qmp.sock"))
    server.listen()

    def play() -> None:
        with server, server.accept()[0] as connection, connection.makefile("rw") as file:
            file.write(json.dumps({"QMP": {}}) + "\n")
            file.flush()
            for answer in [{"return": {}}, *answers]:
                received.append(json.loads(file.readline()))
                file.write(json.dumps({"event": "STOP"}) + "\n" + json.dumps(answer) + "\n")
                file.flush()

    threading.Thread(target=play, daemon=True).start()
    return received


def test_qmp_returns_results_past_events(tmp_path, monkeypatch):
    host = Host(name="web", kind="vm")
    monkeypatch.setattr(Host, "directory", tmp_path)
    received = serve(tmp_path, [{"return": {"status": "running"}}, {"return": ""}])
    with vm.qmp(host) as control:
        assert control.command("query-status") == {"status": "running"}
        control.human("loadvm x")
    assert received[-1] == {"execute": "human-monitor-command", "arguments": {"command-line": "loadvm x"}}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(
            {"error": {"desc": "no such thing"}}, "QEMU refused 'x': .*no such thing|refused .*: no such thing"
        ),
        pytest.param({"return": "Error: no snapshot\r\n"}, "QEMU refused 'x': Error: no snapshot"),
    ],
)
def test_qmp_refusals_carry_qemus_words(tmp_path, monkeypatch, answer, message):
    monkeypatch.setattr(Host, "directory", tmp_path)
    serve(tmp_path, [answer])
    with vm.qmp(Host(name="web", kind="vm")) as control, pytest.raises(LabError, match=message):
        control.human("x")


def test_no_socket_is_a_lab_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Host, "directory", tmp_path)
    with (
        pytest.raises(LabError, match="web: QEMU's control socket does not answer"),
        vm.qmp(Host(name="web", kind="vm")),
    ):
        pass


def test_socket_below_a_path_longer_than_a_socket_address(tmp_path):
    deep = tmp_path / ("d" * 120)
    short = tmp_path / "s"
    deep.mkdir()
    short.symlink_to(deep)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(short / "x.sock"))
    server.listen()
    with server, vm.connected(deep, "x.sock") as connection:
        assert connection.fileno() >= 0


# --- root file system and image --------------------------------------------------------------------------------------


def test_mirrors_are_those_of_this_machine(tmp_path):
    old = tmp_path / "sources.list"
    old.write_text("# deb http://commented/debian x main\ndeb [arch=amd64] http://mirror.test/debian bookworm main\n")
    new = tmp_path / "debian.sources"
    new.write_text("Types: deb\nURIs: https://mirror.test/debian-security/\nSuites: x\n")
    other = tmp_path / "other.list"
    other.write_text("deb https://packages.test/apt sdk main\n")
    assert rootfs.mirrors([old, new, other, tmp_path / "absent"]) == (
        "http://mirror.test/debian",
        "https://mirror.test/debian-security",
    )
    assert rootfs.mirrors([other, old]) == ("http://mirror.test/debian", "http://mirror.test/debian-security")
    with pytest.raises(LabError, match="name no Debian archive"):
        rootfs.mirrors([other])


def test_sources_hold_updates_and_security():
    text = rootfs.sources_text("trixie", ("http://a/debian", "http://a/debian-security"))
    assert "Suites: trixie trixie-updates\n" in text
    assert "Suites: trixie-security\n" in text


def test_recipe_hash_follows_release_and_mirror():
    one, two = ("http://a/debian", "http://a/debian-security"), ("http://b/debian", "http://a/debian-security")
    digests = {rootfs.recipe_hash(release, urls) for release in ("bookworm", "trixie") for urls in (one, two)}
    assert len(digests) == 4
    assert rootfs.recipe_hash("bookworm", one) == rootfs.recipe_hash("bookworm", one)


def test_missing_programs_name_the_packages():
    with pytest.raises(
        LabError, match=r"missing on this machine: no-such-program; install with: apt-get install .*ovmf"
    ):
        rootfs.require_programs(["no-such-program"])


def test_unknown_release():
    with pytest.raises(LabError, match="release 'sid': expected one of bookworm, trixie"):
        rootfs.build("sid")


def test_image_carries_the_labs_keys():
    keys = ssh.keys()
    files = image.overlay(keys)
    assert files["root/.ssh/authorized_keys"] == (0o600, keys.client_public + "\n")
    assert files["etc/ssh/ssh_host_ed25519_key"][0] == 0o600
    base = Path("bookworm-1.tar")
    assert image.recipe_hash(base, files, "a") != image.recipe_hash(base, files, "b")


def test_known_hosts_pins_the_key_for_every_port():
    keys = ssh.keys()
    found = subprocess.run(
        ["ssh-keygen", "-F", "[127.0.0.1]:40123", "-f", keys.known_hosts], check=True, capture_output=True, text=True
    )
    assert keys.host_public.split()[1] in found.stdout
    assert ssh.keys() == keys


def test_the_image_script_is_clean():
    subprocess.run(["shellcheck", Path(image.__file__).with_name("make-image.sh")], check=True)


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "pair"), [("8008", (0, 8008)), ("18008:8008", (18008, 8008)), ("0:22", (0, 22))])
def test_forwards(text, pair):
    assert cli.parse_forward(text) == pair


@pytest.mark.parametrize("text", ["", "x", "1:2:3", "70000", "8008:0", "-1"])
def test_bad_forwards(text):
    with pytest.raises(LabError, match="expected PORT or LOCAL:PORT"):
        cli.parse_forward(text)


def test_inventory_is_yaml_that_reaches_the_hosts():
    hosts = [Host(name="a", kind="vm", ssh_port=2201), Host(name="b", kind="container", ssh_port=2202)]
    keys = ssh.keys()
    lab = yaml.safe_load(cli.inventory_text(hosts, keys))["all"]["children"]["lab"]
    assert lab["children"] == {
        "lab_vm": {"hosts": {"a": {"ansible_port": 2201}}},
        "lab_container": {"hosts": {"b": {"ansible_port": 2202}}},
    }
    assert lab["vars"]["ansible_host"] == "127.0.0.1"
    assert lab["vars"]["ansible_ssh_private_key_file"] == str(keys.client)
    assert f"UserKnownHostsFile={keys.known_hosts}" in lab["vars"]["ansible_ssh_common_args"]
    assert yaml.safe_load(cli.inventory_text([], keys))["all"]["children"]["lab"]["children"]["lab_vm"] == {"hosts": {}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["ssh", "web"], "there is no host 'web' (known: none)", id="ssh"),
        pytest.param(["up", "web"], "say which kind to make: --kind vm or --kind container", id="up-without-kind"),
        pytest.param(["up", "Web", "--kind", "vm"], "expected 1 to 32 lower-case letters", id="bad-name"),
        pytest.param(["down"], "which hosts? name them, or --all", id="down-nothing"),
        pytest.param(["reset", "web", "x"], "there is no host 'web'", id="reset"),
        pytest.param(["snapshot", "web", "../x"], "snapshot name '../x'", id="snapshot"),
    ],
)
def test_errors_end_with_status_1(argv, message, capsys):
    assert cli.main(argv) == 1
    assert message in capsys.readouterr().err


def test_list_shows_a_damaged_record(capsys, home):
    (home / "hosts" / "web").mkdir(parents=True)
    (home / "hosts" / "web" / "host.json").write_text("{")
    assert cli.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "damaged"


def test_reset_names_the_known_snapshots(capsys):
    Host(name="web", kind="vm", snapshots=["fresh"]).save()
    assert cli.main(["reset", "web", "old"]) == 1
    assert "no snapshot 'old' (known: fresh)" in capsys.readouterr().err
