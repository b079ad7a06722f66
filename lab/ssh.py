# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's ssh: one client key, one pinned host key for all lab hosts, and running commands there."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.state import Host, LabError, folder, lock, say, write_text

# A second less per connection to an emulated host than the default, which is for machines of one's own speed.
KEY_EXCHANGE = "KexAlgorithms=ecdh-sha2-nistp256"


@dataclasses.dataclass(frozen=True)
class Keys:
    """Paths of the lab's keys; a public key lies beside its private key with the suffix .pub."""

    client: Path
    """Private key that may log in as root of every lab host."""
    host: Path
    """Private host key that every lab host presents (/etc/ssh/ssh_host_ed25519_key)."""
    known_hosts: Path
    """Pins the host key for every port of 127.0.0.1."""

    @property
    def client_public(self) -> str:
        """Return the line for authorized_keys, without line feed."""
        return Path(f"{self.client}.pub").read_text(encoding="ascii").strip()

    @property
    def host_public(self) -> str:
        """Return the hosts' public key line, without line feed."""
        return Path(f"{self.host}.pub").read_text(encoding="ascii").strip()


def keys() -> Keys:
    """Return the lab's keys, made on first use."""
    home = folder("keys")
    found = Keys(home / "id_ed25519", home / "ssh_host_ed25519_key", home / "known_hosts")
    if found.known_hosts.exists():
        return found
    with lock("keys"):
        for path in (found.client, found.host):
            if not Path(f"{path}.pub").exists():
                path.unlink(missing_ok=True)
                argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cpullm-lab", "-f", str(path)]
                subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        kind, key = found.host_public.split()[:2]
        write_text(found.known_hosts, f"[127.0.0.1]:* {kind} {key}\n")
    return found


def options() -> list[str]:
    """Return ssh's options that make it use the lab's keys and nothing of the user's."""
    mine = keys()
    return [
        "-F",
        "none",
        "-i",
        str(mine.client),
        "-o",
        "IdentitiesOnly=yes",
        "-o",
        f"UserKnownHostsFile={mine.known_hosts}",
        "-o",
        "GlobalKnownHostsFile=none",
        "-o",
        "StrictHostKeyChecking=yes",
        "-o",
        "UpdateHostKeys=no",
        "-o",
        KEY_EXCHANGE,
        "-o",
        "LogLevel=ERROR",
        "-o",
        "ConnectTimeout=10",
    ]


def argv(host: Host, command: Sequence[str] = (), settings: Sequence[str] = ()) -> list[str]:
    """Return the command line that logs in to a host, or runs a command there; settings go before the lab's own."""
    return ["ssh", *settings, *options(), "-p", str(host.ssh_port), "root@127.0.0.1", *command]


def tunnel_argv(host: Host, local: int, port: int) -> list[str]:
    """Return the command line that leads a port of this machine's loopback to one of the host's loopback."""
    way = f"127.0.0.1:{local}:127.0.0.1:{port}"
    settings = ["-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=10"]
    return ["ssh", *options(), *settings, "-p", str(host.ssh_port), "-N", "-L", way, "root@127.0.0.1"]


def await_port(host: Host, role: str, port: int, timeout_s: float = 30) -> None:
    """Return once something listens on a port of 127.0.0.1; raise LabError if the host's process ends before."""
    deadline = time.monotonic() + timeout_s
    while host.process(role) is not None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise LabError(f"{host.name}: {role} does not listen on port {port}; see {host.directory / role}.log")


def run(host: Host, command: str, *, timeout_s: float = 120, data: str | None = None) -> str:
    """Return the output of a shell command on the host; raise LabError if it fails or takes too long."""
    try:
        done = subprocess.run(
            [*argv(host), command],
            input=data if data is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{host.name}: {command!r} took longer than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise LabError(f"{host.name}: {command!r} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def answers(host: Host, timeout_s: float = 10) -> bool:
    """Return whether the host lets the lab in by ssh right now."""
    try:
        done = subprocess.run(
            [*argv(host), "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def wait(host: Host, alive: Callable[[], bool], log: Path, timeout_s: float = 900) -> float:
    """Return the seconds until ssh answered; raise LabError with the console's end if the host dies or stays silent."""
    begin = time.monotonic()
    said = begin
    while True:
        if not alive():
            raise LabError(f"{host.name}: stopped while it booted; the end of {log}:\n{tail(log)}")
        if answers(host, timeout_s=max(2.0, min(15.0, begin + timeout_s - time.monotonic()))):
            return time.monotonic() - begin
        now = time.monotonic()
        if now - begin > timeout_s:
            raise LabError(f"{host.name}: no ssh after {timeout_s:.0f} s; the end of {log}:\n{tail(log)}")
        if now - said >= 10:
            said = now
            last = tail(log, 1).strip()
            say(f"{host.name}: waiting for ssh, {now - begin:.0f} s; console: {last[-100:]}")
        time.sleep(0.25)


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a log, without control characters."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return "(no output)"
    clean = "".join(character for character in text if character.isprintable() or character == "\n")
    return "\n".join([line for line in clean.splitlines() if line.strip()][-lines:])
