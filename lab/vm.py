# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Virtual machines: QEMU with a real GRUB on the disk, two NUMA nodes, 1 GiB pages and twelve DIMMs.

A host's folder holds its disk (an overlay on the cached image, which is linked in, so that an emptied cache does not
take running hosts with it), the console's log, and the sockets of console and QMP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lab import image, rootfs, smbios, ssh
from lab.state import (
    Host,
    LabError,
    boot_id,
    folder,
    lab_home,
    lock,
    process_alive,
    prune,
    say,
    spawn,
    stop_process,
    stop_processes,
    write_json,
)

DEFAULT_MEMORY_GIB = 10
MEMORY_GIB = (2, 16)
CPUS = (1, 16)
FIRMWARES = ("bios", "uefi")
BOOTED_VERSION = 2
TABLES = smbios.tables(smbios.two_socket_board())
PROGRAM = "qemu-system-x86_64"

_BOOTED_FILES = ("base.qcow2", "booted.qcow2", "state")
# Services that start late are up, what the first Ansible task needs is in memory, and the disk holds everything.
_FINISH_BOOT = """
systemctl is-system-running --wait >/dev/null
python3 -c 'import argparse, ast, base64, grp, json, pwd, runpy, selectors, shlex, subprocess, tempfile, zipfile'
sync
"""

_OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_OVMF_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


# --- the command line ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a guest can tell about its hardware: everything that a saved state depends on."""

    cpus: int = 2
    memory_gib: int = DEFAULT_MEMORY_GIB
    accelerator: str = "tcg"
    firmware: str = "bios"

    @property
    def nodes(self) -> int:
        """Return the number of sockets, which is that of NUMA nodes: two, or one for an odd number of CPUs."""
        return 2 if self.cpus % 2 == 0 else 1


def machine_argv(machine: Machine) -> list[str]:
    """Return QEMU's arguments for the hardware; files are named relative to the host's folder."""
    mib = machine.memory_gib * 1024 // machine.nodes
    cores = machine.cpus // machine.nodes
    argv = ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]
    # Little memory below 4 GiB, so that most of the first node is in whole, aligned GiB above it.
    argv += ["-machine", "q35,usb=off,vmport=off,smbus=off,hpet=off,max-ram-below-4g=512M,smbios-entry-point-type=64"]
    # Without nested virtualisation and five-level page tables, which only cost boot time under emulation.
    argv += ["-cpu", "max,la57=off,svm=off" if machine.accelerator == "tcg" else "max"]
    argv += ["-smp", f"cpus={machine.cpus},sockets={machine.nodes},cores={cores},threads=1"]
    argv += ["-m", f"{machine.memory_gib}G"]
    for node in range(machine.nodes):
        argv += ["-object", f"memory-backend-ram,id=memory{node},size={mib}M,prealloc=off"]
        argv += ["-numa", f"node,nodeid={node},memdev=memory{node}"]
    for node in range(machine.nodes):
        argv += ["-numa", f"cpu,node-id={node},socket-id={node}"]
    if machine.nodes == 2:
        argv += ["-numa", "dist,src=0,dst=1,val=32"]
    for number in range(len(TABLES)):
        argv += ["-smbios", f"file=table{number}.bin"]
    if machine.firmware == "uefi":
        argv += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_OVMF_CODE}"]
        argv += ["-drive", "if=pflash,unit=1,format=qcow2,file=variables.qcow2"]
    return argv


def accelerator_argv(name: str, load: float, cores: int) -> list[str]:
    """Return QEMU's arguments for an accelerator, given this machine's load average and cores.

    Emulated CPUs wait for each other in loops. With a thread each they are fast on an idle machine; on one whose cores
    are taken they spin against each other for minutes (measured: a boot of 80 s took 630 s at six jobs per core), and
    taking turns in one thread is as fast as it gets.
    """
    if name != "tcg":
        return ["-accel", name]
    return ["-accel", f"tcg,thread={'single' if load > 2 * cores else 'multi'}"]


def host_argv(host: Host) -> list[str]:
    """Return QEMU's arguments for one host's disk, network, console and control socket."""
    forwards = [[host.ssh_port, 22], *host.forwards]
    rules = "".join(f",hostfwd=tcp:127.0.0.1:{local}-:{port}" for local, port in forwards)
    argv = ["-name", f"{host.name},process=cpullm-lab-{host.name}"[:60]]
    # The host's page cache outlives a killed QEMU, so what the guest flushed is safe without fsync on this machine's
    # own disk; what the guest did not flush is lost with its memory. That is a power cut, at the price of no fsync.
    argv += ["-drive", "if=none,id=disk,file=disk.qcow2,format=qcow2,cache=unsafe,discard=unmap,detect-zeroes=unmap"]
    argv += ["-device", "virtio-blk-pci,drive=disk,bootindex=1"]
    argv += ["-netdev", f"user,id=net{rules}"]
    # One address for all: each VM is alone in its network, and a booted state fits every host.
    argv += ["-device", "virtio-net-pci,netdev=net,romfile=,mac=52:54:00:6c:61:62"]
    argv += ["-device", "virtio-rng-pci"]
    argv += ["-chardev", "socket,id=console,path=console.sock,server=on,wait=off,logfile=console.log,logappend=on"]
    argv += ["-serial", "chardev:console", "-qmp", "unix:qmp.sock,server=on,wait=off"]
    return argv


def check(machine: Machine) -> None:
    """Raise LabError for a machine that cannot be made."""
    if not MEMORY_GIB[0] <= machine.memory_gib <= MEMORY_GIB[1]:
        raise LabError(f"memory {machine.memory_gib} GiB: a VM takes {MEMORY_GIB[0]} to {MEMORY_GIB[1]} GiB")
    if not CPUS[0] <= machine.cpus <= CPUS[1]:
        raise LabError(f"{machine.cpus} CPUs: a VM takes {CPUS[0]} to {CPUS[1]}")
    if machine.firmware not in FIRMWARES:
        raise LabError(f"firmware {machine.firmware!r}: expected one of {', '.join(FIRMWARES)}")
    if machine.firmware == "uefi" and not _OVMF_CODE.exists():
        raise LabError(f"{_OVMF_CODE} is missing; install with: apt-get install --no-install-recommends ovmf")


# --- QEMU's control socket -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(directory: Path, name: str) -> Iterator[socket.socket]:
    """Connect to a unix socket in a folder whose path may be longer than the 107 bytes of a socket's address."""
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"/proc/self/fd/{handle}/{name}")
            yield connection
    finally:
        os.close(handle)


class Qmp:
    """A connection to QEMU's machine protocol; commands in, results out, events dropped."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        connection.settimeout(timeout_s)
        self._file = connection.makefile("rw", encoding="utf-8")
        json.loads(self._file.readline())
        self.command("qmp_capabilities")

    def close(self) -> None:
        """Let go of the socket."""
        self._file.close()

    def command(self, name: str, **arguments: Any) -> Any:
        """Return the result of a command; raise LabError with QEMU's words if it refuses."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise LabError(f"QEMU closed the control socket during {name}")
            answer = json.loads(line)
            if "error" in answer:
                raise LabError(f"QEMU refused {name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def human(self, line: str) -> None:
        """Run a command of QEMU's human monitor, which prints only when something is wrong."""
        output = self.command("human-monitor-command", **{"command-line": line}).strip()
        if output:
            raise LabError(f"QEMU refused {line!r}: {output}")


@contextlib.contextmanager
def qmp(host: Host, timeout_s: float = 300) -> Iterator[Qmp]:
    """Connect to the QEMU of a running host."""
    try:
        with connected(host.directory, "qmp.sock") as connection:
            control = Qmp(connection, timeout_s)
            try:
                yield control
            finally:
                # QEMU serves one connection at a time, and the file keeps the socket open.
                control.close()
    except OSError as error:
        raise LabError(f"{host.name}: QEMU's control socket does not answer: {error}") from error


# --- the accelerator -------------------------------------------------------------------------------------------------


def accelerator(kernel: Path) -> str:
    """Return "kvm" if this machine's KVM boots that kernel to its first line within 10 s, else "tcg".

    A /dev/kvm that opens proves nothing under nested virtualisation. The verdict is kept until the machine reboots.
    """
    verdict = lab_home() / "accelerator.json"
    with lock("accelerator"):
        try:
            known = json.loads(verdict.read_text(encoding="utf-8"))
            if known["boot_id"] == boot_id():
                return str(known["accelerator"])
        except (OSError, ValueError, KeyError):
            pass
        found = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) and _kvm_boots(kernel) else "tcg"
        write_json(verdict, {"boot_id": boot_id(), "accelerator": found})
    return found


def _kvm_boots(kernel: Path) -> bool:
    argv = ["setpriv", "--pdeathsig", "KILL", PROGRAM, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-machine", "q35", "-accel", "kvm", "-cpu", "max", "-m", "512", "-no-reboot", "-serial", "stdio"]
    argv += ["-kernel", str(kernel), "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"]
    say("trying whether KVM works here (10 s at most)")
    reader, writer = os.pipe()
    output = b""
    deadline = time.monotonic() + 10
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.DEVNULL) as probe:
        os.close(writer)
        try:
            while b"Linux version" not in output and time.monotonic() < deadline:
                ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
                piece = os.read(reader, 65536) if ready else b""
                if not piece:
                    break
                output += piece
        finally:
            probe.kill()
            os.close(reader)
    return b"Linux version" in output


# --- the kind --------------------------------------------------------------------------------------------------------


def machine_of(host: Host) -> Machine:
    """Return the hardware that a host's record asks for."""
    return Machine(
        cpus=host.cpus,
        memory_gib=host.memory_gib,
        accelerator=host.extra["accelerator"],
        firmware=host.extra.get("firmware", "bios"),
    )


class Vm:
    """The kind "vm"; see lab.state.Kind."""

    def prepare(self, host: Host) -> None:
        """Fill in the defaults and refuse what cannot be made."""
        rootfs.require_programs([PROGRAM, "qemu-img", "setpriv"])
        host.memory_gib = host.memory_gib or DEFAULT_MEMORY_GIB
        host.extra.setdefault("firmware", "bios")
        host.extra.setdefault("warm", True)
        check(Machine(cpus=host.cpus, memory_gib=host.memory_gib, firmware=host.extra["firmware"]))

    def up(self, host: Host) -> None:
        """Start QEMU; a new host resumes a kept booted state if there is one, or boots and leaves one."""
        if self.alive(host):
            return
        if (host.directory / "disk.qcow2").exists():
            self._start(host)
            return
        base = image.build(host.release)
        host.extra["image"] = base.name
        host.extra["accelerator"] = accelerator(image.kernel(base))
        if host.extra["accelerator"] != "tcg" or not host.extra["warm"]:
            self._boot(host, base)
            return
        booted = self._booted(host)
        with lock(booted.name):
            if (booted / "state").exists() and self._resume(host, booted):
                return
            self._boot(host, base)
            self._keep(host, booted)

    def _boot(self, host: Host, base: Path) -> None:
        """Start on a new disk."""
        link(base, host.directory / "base.qcow2")
        if host.extra["firmware"] == "uefi":
            argv = ["qemu-img", "convert", "-O", "qcow2", str(_OVMF_VARIABLES), str(host.directory / "variables.qcow2")]
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        overlay(host.directory, "base.qcow2", "disk.qcow2")
        self._start(host)

    def _booted(self, host: Host) -> Path:
        """Return the folder of the booted state that fits a host; it may not exist."""
        version = subprocess.run([PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout
        tables = [table.hex() for table in TABLES]
        parts = [BOOTED_VERSION, host.extra["image"], machine_argv(machine_of(host)), tables, version]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return folder("images") / f"{host.release}-booted-{digest}"

    def _resume(self, host: Host, booted: Path) -> bool:
        """Start a new host from a booted state and return True; if that fails, drop the state and return False."""
        booted.touch()
        for name in _BOOTED_FILES:
            link(booted / name, host.directory / name)
        if host.extra["firmware"] == "uefi":
            copy(booted / "variables.qcow2", host.directory / "variables.qcow2")
        overlay(host.directory, "booted.qcow2", "disk.qcow2")
        try:
            self._start(host, ["-incoming", "exec:cat state"])
            deadline = time.monotonic() + 120
            with qmp(host) as control:
                # It was kept standing still, so that is how it comes back.
                while (status := control.command("query-status")["status"]) != "paused":
                    if time.monotonic() > deadline:
                        raise LabError(f"still in state {status!r}")
                    time.sleep(0.05)
                control.command("cont")
        except LabError as error:
            why = ssh.tail(host.directory / "qemu.log", 3)
            say(f"{host.name}: the booted state in the cache does not start, so the host boots: {error} {why}")
            self.power_cut(host)
            shutil.rmtree(booted, ignore_errors=True)
            for name in (*_BOOTED_FILES, "disk.qcow2", "variables.qcow2"):
                (host.directory / name).unlink(missing_ok=True)
            return False
        (host.directory / "state").unlink()
        return True

    def _keep(self, host: Host, booted: Path) -> None:
        """Let a new host finish its boot, keep its state for others like it, and go on from there."""
        ssh.wait(host, lambda: self.alive(host), self.console_log(host))
        ssh.run(host, _FINISH_BOOT, timeout_s=300)
        with qmp(host) as control:
            control.command("stop")
            control.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            control.command("migrate", uri="exec:cat > state")
            deadline = time.monotonic() + 300
            while (status := control.command("query-migrate").get("status")) != "completed":
                if status == "failed" or time.monotonic() > deadline:
                    say(f"{host.name}: the booted state could not be kept ({status}); the next host boots again")
                    control.command("cont")
                    return
                time.sleep(0.05)
        self.power_cut(host)
        work = booted.with_name(f".work-{booted.name}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (host.directory / "disk.qcow2").rename(host.directory / "booted.qcow2")
        for name in _BOOTED_FILES:
            link(host.directory / name, work / name)
        if host.extra["firmware"] == "uefi":
            copy(host.directory / "variables.qcow2", work / "variables.qcow2")
        work.rename(booted)
        prune(booted.parent.glob(f"{host.release}-booted-*"), keep=booted)
        if not self._resume(host, booted):
            raise LabError(f"{host.name}: does not resume what it just kept; 'lab up --cold' does without")

    def _start(self, host: Host, arguments: Sequence[str] = ()) -> None:
        stop_processes(host, 0)
        for number, table in enumerate(TABLES):
            (host.directory / f"table{number}.bin").write_bytes(table)
        for name in ("qmp.sock", "console.sock", "qemu.log"):
            (host.directory / name).unlink(missing_ok=True)
        machine = machine_of(host)
        argv = [PROGRAM, *accelerator_argv(machine.accelerator, os.getloadavg()[0], os.cpu_count() or 1)]
        argv += [*machine_argv(machine), *host_argv(host), *arguments]
        process = spawn(host, "qemu", argv, directory=host.directory)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(LabError), qmp(host, 10):
                return
            if not process_alive(process) or time.monotonic() > deadline:
                raise LabError(f"{host.name}: QEMU did not start: {ssh.tail(host.directory / 'qemu.log')}")
            time.sleep(0.05)

    def down(self, host: Host) -> None:
        """Kill QEMU."""
        stop_processes(host, 0)

    def alive(self, host: Host) -> bool:
        """Return whether QEMU runs."""
        return host.process("qemu") is not None

    def stop(self, host: Host) -> None:
        """Press the power button and wait until the guest is off."""
        process = host.process("qemu")
        if process is None:
            return
        with qmp(host) as control:
            control.command("system_powerdown")
        deadline = time.monotonic() + 120
        while process_alive(process):
            if time.monotonic() > deadline:
                raise LabError(f"{host.name}: still on 120 s after the power button; 'lab power-cut {host.name} --off'")
            time.sleep(0.2)
        stop_processes(host, 0)

    def power_cut(self, host: Host) -> None:
        """Kill QEMU where it stands."""
        process = host.process("qemu")
        if process is not None:
            stop_process(process, 0, first=signal.SIGKILL)
        stop_processes(host, 0)

    def restart(self, host: Host) -> None:
        """Press the reset button."""
        with qmp(host) as control:
            control.command("system_reset")

    def forward(self, host: Host, local_port: int, port: int) -> None:
        """Add a forwarding to the running QEMU; a later start has it from the record."""
        with qmp(host) as control:
            control.human(f"hostfwd_add net tcp:127.0.0.1:{local_port}-:{port}")

    def snapshot(self, host: Host, name: str) -> None:
        """Keep disk and memory inside the host's disk file."""
        if not self.alive(host):
            raise LabError(f"{host.name}: is off; a snapshot holds the running machine: 'lab up {host.name}' first")
        with qmp(host) as control:
            control.human(f"savevm {name}")

    def reset(self, host: Host, name: str) -> None:
        """Return disk and memory to a snapshot; a host that is off starts there.

        In a new process of QEMU: in the same one the guest's TSC never goes back (cpu_get_ticks), so the guest would
        see its clock leap by what has passed since, and its watchdog would reset it at once.
        """
        self.power_cut(host)
        self._start(host, ["-loadvm", name])

    def settle(self, host: Host) -> None:
        """Set the clock, which stands still in a saved state, and on the first time the name."""
        command = f"date -s @{time.time() + 0.5:.1f} >/dev/null"
        if not host.extra.get("named"):
            name = host.name
            command += f"; echo {name} > /etc/hostname; hostname {name}; echo 127.0.1.1 {name} >> /etc/hosts"
        ssh.run(host, command)
        host.extra["named"] = True
        host.save()

    def console(self, host: Host) -> None:
        """Join terminal and serial port until Ctrl-]."""
        if not self.alive(host):
            raise LabError(f"{host.name}: is off; its console's log is {self.console_log(host)}")
        try:
            with connected(host.directory, "console.sock") as connection:
                print("lab: the serial console; leave with Ctrl-]", file=sys.stderr)
                _converse(connection)
        except OSError as error:
            raise LabError(f"{host.name}: the console is taken or gone: {error}") from error

    def console_log(self, host: Host) -> Path:
        """Return the log of the serial port."""
        return host.directory / "console.log"


def link(source: Path, target: Path) -> None:
    """Make a hard link, replacing what is there."""
    target.unlink(missing_ok=True)
    os.link(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file, never through a link that others hold."""
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)


def overlay(directory: Path, base: str, name: str) -> None:
    """Make a qcow2 disk that holds only the differences to a base in the same folder."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", name]
    subprocess.run(argv, cwd=directory, check=True, stdin=subprocess.DEVNULL)


def _converse(connection: socket.socket) -> None:
    leave = b"\x1d"
    source = sys.stdin.fileno()
    saved = termios.tcgetattr(source) if os.isatty(source) else None
    try:
        if saved is not None:
            tty.setraw(source)
        while True:
            ready, _, _ = select.select([source, connection], [], [])
            if connection in ready:
                data = connection.recv(65536)
                if not data:
                    return
                os.write(sys.stdout.fileno(), data)
            if source in ready:
                data = os.read(source, 4096)
                before, found, _ = data.partition(leave)
                connection.sendall(before)
                if found or not data:
                    return
    finally:
        if saved is not None:
            termios.tcsetattr(source, termios.TCSADRAIN, saved)


KIND = Vm()
