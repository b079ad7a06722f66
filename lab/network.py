# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A container's own network: one namespace, and slirp4netns as its only way out.

Inside, ``tap0`` has 10.0.2.100, the gateway and this machine's loopback are 10.0.2.2, names are resolved by 10.0.2.3:
the same picture that QEMU's user networking gives a VM. From this machine, ports of 127.0.0.1 lead in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from lab import state
from lab.state import Host, LabError

GUEST = "10.0.2.100"
MACHINE = "10.0.2.2"
RESOLVER = "10.0.2.3"
ROLE = "slirp4netns"
PROGRAMS = ("ip", "slirp4netns")
READY_TIMEOUT_S = 20.0

_NAMESPACES = Path("/run/netns")


def run_directory() -> Path:
    """Return the folder for what ends with the machine's uptime; short, since a socket's path has 108 bytes."""
    path = Path("/run/cpullm-lab")
    path.mkdir(mode=0o755, exist_ok=True)
    return path


def label(name: str, home: Path | None = None) -> str:
    """Return a name for things that the kernel keeps machine-wide, unlike those of another lab on this machine."""
    return f"{label_prefix(home)}{name}"


def label_prefix(home: Path | None = None) -> str:
    """Return what every label of this lab begins with."""
    digest = hashlib.sha256(str(home or state.lab_home()).encode()).hexdigest()
    return f"cpullm-{digest[:8]}-"


def namespace_path(name: str) -> Path:
    """Return the file that names a host's network namespace."""
    return _NAMESPACES / label(name)


def socket_path(name: str) -> Path:
    """Return where the host's slirp4netns listens for orders."""
    return run_directory() / f"{label(name)}.sock"


def start(host: Host) -> None:
    """Make the host's namespace, connect it, and open its forwards; what was left of an earlier start is removed."""
    stop(host)
    _ip(host.name, "netns", "add", label(host.name))
    _ip(host.name, "-n", label(host.name), "link", "set", "lo", "up")
    _start_slirp(host)
    for port, guest_port in [[host.ssh_port, 22], *host.forwards]:
        add_forward(host.name, port, guest_port)


def stop(host: Host) -> None:
    """Remove the host's namespace and end its slirp4netns; do nothing if there is none."""
    for process in [process for process in host.processes if process.role == ROLE]:
        state.stop_process(process)
        host.processes.remove(process)
    remove_namespace(label(host.name))
    socket_path(host.name).unlink(missing_ok=True)


def remove_namespace(namespace: str) -> None:
    """Remove a namespace by its name, also one that was only half made."""
    path = _NAMESPACES / namespace
    if not path.exists():
        return
    done = subprocess.run(["ip", "netns", "del", namespace], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # 'ip netns add' killed between file and mount leaves a plain file, which 'del' refuses.
        if os.path.ismount(path):
            raise LabError(f"cannot remove the network namespace {namespace}: {done.stderr.strip()}")
        path.unlink(missing_ok=True)


def namespaces() -> list[str]:
    """Return the names of all network namespaces of this lab."""
    if not _NAMESPACES.is_dir():
        return []
    return sorted(entry.name for entry in _NAMESPACES.iterdir() if entry.name.startswith(label_prefix()))


def add_forward(name: str, port: int, guest_port: int) -> None:
    """Let a port of this machine's 127.0.0.1 lead to a port of the host."""
    arguments = {
        "proto": "tcp",
        "host_addr": "127.0.0.1",
        "host_port": port,
        "guest_addr": GUEST,
        "guest_port": guest_port,
    }
    try:
        _order(socket_path(name), {"execute": "add_hostfwd", "arguments": arguments})
    except LabError as error:
        raise LabError(
            f"{name}: port {port} of 127.0.0.1 cannot lead to its port {guest_port}: {error}; is the port taken?"
        ) from error


def resolv_conf() -> str:
    """Return the text of a container's /etc/resolv.conf."""
    return f"nameserver {RESOLVER}\n"


def _start_slirp(host: Host) -> None:
    """Start slirp4netns and return once tap0 is configured."""
    reader, writer = os.pipe()
    try:
        process = state.spawn(
            host,
            ROLE,
            [
                "slirp4netns",
                "--configure",
                "--mtu=65520",
                f"--ready-fd={writer}",
                f"--api-socket={socket_path(host.name)}",
                "--netns-type=path",
                str(namespace_path(host.name)),
                "tap0",
            ],
            pass_fds=[writer],
        )
    finally:
        os.close(writer)
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if select.select([reader], [], [], 0.2)[0]:
                break
            if not state.process_alive(process):
                break
        # slirp4netns writes one byte when ready; end of file means that it gave up.
        if not select.select([reader], [], [], 0)[0] or os.read(reader, 1) != b"1":
            log = host.directory / f"{ROLE}.log"
            raise LabError(f"{host.name}: slirp4netns did not connect the network; its last words: {_tail(log)}")
    finally:
        os.close(reader)


def _order(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return slirp4netns's answer to one request, or raise LabError with its reason."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(4096):
                answer += part
        except OSError as error:
            raise LabError(f"slirp4netns does not answer: {error}") from error
    return parse_answer(answer)


def parse_answer(answer: bytes) -> dict[str, Any]:
    """Return the value of an answer from slirp4netns's socket, or raise LabError with its reason."""
    try:
        value = json.loads(answer)
    except ValueError as error:
        raise LabError(f"slirp4netns answered {answer!r}") from error
    if not isinstance(value, dict) or not isinstance(value.get("return"), dict):
        reason = value.get("error") if isinstance(value, dict) else value
        raise LabError(str(reason.get("desc", reason) if isinstance(reason, dict) else reason))
    result: dict[str, Any] = value["return"]
    return result


def marked(name: str) -> dict[str, str]:
    """Return the environment for a program run for a host: 'down' finds it if it outlives a killed lab."""
    return {**os.environ, state.ENVIRONMENT_MARK: str(state.host_directory(name))}


def _ip(name: str, *arguments: str) -> None:
    """Run ip for a host, or raise LabError with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, env=marked(name))
    if done.returncode != 0:
        raise LabError(f"'ip {' '.join(arguments)}' failed: {done.stderr.strip()}")


def _tail(path: Path, size: int = 600) -> str:
    """Return the end of a log, or a word for none."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[-size:].strip() or "none"
    return "none"
