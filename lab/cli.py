# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's command line. Data goes to stdout, progress and errors to stderr; see lab/README.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lab import ssh, state
from lab.state import Host, LabError, host_lock, kind, lock, need_host, say

# Twenty times what an idle machine takes: under emulation, everything else on the machine slows a boot down.
BOOT_TIMEOUT_S = 900.0


# --- commands --------------------------------------------------------------------------------------------------------


def up(arguments: argparse.Namespace) -> None:
    """Make hosts, or start those that are off."""
    for name in arguments.name:
        with host_lock(name):
            begin = time.monotonic()
            host = state.load_host(name)
            if host is None:
                host = _new_host(name, arguments)
            elif arguments.kind not in (None, host.kind):
                raise LabError(f"{name}: is a {host.kind}, not a {arguments.kind}; 'lab down {name}' removes it")
            elif kind(host.kind).alive(host) and ssh.answers(host):
                say(f"{name}: runs already, nothing to do")
                continue
            kind(host.kind).up(host)
            _await(host)
            say(f"{name}: up after {time.monotonic() - begin:.0f} s; {_way_in(host)}")


def down(arguments: argparse.Namespace) -> None:
    """Remove hosts with everything that is theirs."""
    names = arguments.name or (state.host_names() if arguments.all else [])
    if not names and not arguments.all:
        raise LabError("which hosts? name them, or --all")
    failed = []
    for name in names:
        with host_lock(name):
            try:
                _remove(name)
            except LabError as error:
                if not arguments.all:
                    raise
                failed.append(str(error))
    if arguments.all:
        _sweep()
    if failed:
        raise LabError("; ".join(failed))


def list_hosts(arguments: argparse.Namespace) -> None:
    """Print the hosts and what they are."""
    rows = []
    for name in state.host_names():
        try:
            host = state.load_host(name)
        except LabError as error:
            rows.append({"name": name, "state": "damaged", "reason": str(error)})
            continue
        if host is not None:
            rows.append(_row(host))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("name", "kind", "release", "state", "cpus", "memory_gib", "ssh_port", "snapshots")
    table = [[column.upper() for column in columns]]
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.append([",".join(value) if isinstance(value, list) else str(value) for value in values])
    widths = [max(len(line[column]) for line in table) for column in range(len(columns))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def run_ssh(arguments: argparse.Namespace) -> int:
    """Log in, or run a command; the exit status is that of ssh."""
    host = need_host(arguments.name)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    return subprocess.run(ssh.argv(host, command), check=False).returncode


def console(arguments: argparse.Namespace) -> None:
    """Join the console, or print its log."""
    host = need_host(arguments.name)
    if arguments.log:
        print(kind(host.kind).console_log(host).read_text(encoding="utf-8", errors="replace"), end="")
        return
    kind(host.kind).console(host)


def snapshot(arguments: argparse.Namespace) -> None:
    """Keep the present state under a name."""
    state.check_snapshot_name(arguments.snapshot)
    with host_lock(arguments.name):
        host = need_host(arguments.name)
        begin = time.monotonic()
        kind(host.kind).snapshot(host, arguments.snapshot)
        if arguments.snapshot not in host.snapshots:
            host.snapshots.append(arguments.snapshot)
        host.save()
        say(f"{host.name}: kept as {arguments.snapshot} after {time.monotonic() - begin:.0f} s")


def reset(arguments: argparse.Namespace) -> None:
    """Return to a kept state, or press the reset button."""
    with host_lock(arguments.name):
        host = need_host(arguments.name)
        begin = time.monotonic()
        if arguments.snapshot is None:
            kind(host.kind).restart(host)
        else:
            if arguments.snapshot not in host.snapshots:
                known = ", ".join(host.snapshots) or "none"
                raise LabError(f"{host.name}: no snapshot {arguments.snapshot!r} (known: {known})")
            kind(host.kind).reset(host, arguments.snapshot)
        _await(host)
        say(f"{host.name}: back after {time.monotonic() - begin:.0f} s")


def stop(arguments: argparse.Namespace) -> None:
    """Shut hosts down in good order."""
    for name in arguments.name:
        with host_lock(name):
            host = need_host(name)
            kind(host.kind).stop(host)
            say(f"{name}: off; 'lab up {name}' starts it again")


def power_cut(arguments: argparse.Namespace) -> None:
    """Take the power away, and give it back unless told not to."""
    with host_lock(arguments.name):
        host = need_host(arguments.name)
        kind(host.kind).power_cut(host)
        say(f"{host.name}: power cut")
        if arguments.off:
            return
        begin = time.monotonic()
        kind(host.kind).up(host)
        if not arguments.no_wait:
            _await(host)
            say(f"{host.name}: booted again after {time.monotonic() - begin:.0f} s")


def forward(arguments: argparse.Namespace) -> None:
    """Lead a port of 127.0.0.1 to a port of the host; print the former."""
    with host_lock(arguments.name):
        host = need_host(arguments.name)
        for local, port in host.forwards:
            if port == arguments.port and arguments.local in (0, local):
                print(local)
                return
        with lock("ports"):
            local = arguments.local or state.free_port()
            kind(host.kind).forward(host, local, arguments.port)
            host.forwards.append([local, arguments.port])
            host.save()
        print(local)


def tunnel(arguments: argparse.Namespace) -> None:
    """Lead a port of 127.0.0.1 through ssh to a port of the host's own loopback; print the former.

    A forward ends at the host's outer address, where a server on 127.0.0.1 does not listen. A tunnel ends with the
    host's boot; calling this again makes it anew on the same port.
    """
    with host_lock(arguments.name):
        host = need_host(arguments.name)
        known: list[list[int]] = host.extra.setdefault("tunnels", [])
        local = next((pair[0] for pair in known if pair[1] == arguments.port), 0)
        role = f"tunnel-{arguments.port}"
        if host.process(role) is None:
            if not local:
                with lock("ports"):
                    local = state.free_port()
                    known.append([local, arguments.port])
            state.spawn(host, role, ssh.tunnel_argv(host, local, arguments.port))
            ssh.await_port(host, role, local)
        print(local)


def inventory(arguments: argparse.Namespace) -> None:
    """Print an Ansible inventory of the hosts in YAML."""
    hosts = [need_host(name) for name in (arguments.name or state.host_names())]
    print(inventory_text(hosts, ssh.keys()), end="")


def pages(arguments: argparse.Namespace) -> None:
    """Reserve 1 GiB pages of this machine for containers, give them back, or print who holds them."""
    from lab import pages as machine  # noqa: PLC0415 - VMs need nothing of it

    if arguments.action == "reserve":
        for entry in machine.reserve(arguments.count, arguments.owner):
            say(f"node {entry.node}: {entry.pages} pages reserved for {arguments.owner}")
    elif arguments.action == "release":
        say(f"{machine.release_all() if arguments.all else machine.release(arguments.owner)} pages given back")
    else:
        print(json.dumps(machine.report(), indent=2))


# --- parts -----------------------------------------------------------------------------------------------------------


def _new_host(name: str, arguments: argparse.Namespace) -> Host:
    if arguments.kind is None:
        raise LabError(f"{name}: there is no such host yet; say which kind to make: --kind vm or --kind container")
    host = Host(
        name=name,
        kind=arguments.kind,
        release=arguments.release,
        cpus=arguments.cpus,
        memory_gib=arguments.memory_gib,
        created=time.time(),
    )
    if host.kind == "vm":
        host.extra["firmware"] = arguments.firmware
        host.extra["warm"] = not arguments.cold
    elif arguments.firmware != "bios":
        raise LabError(f"{name}: a container has no firmware; leave --firmware out, or use --kind vm")
    if arguments.bind:
        host.extra["binds"] = arguments.bind
    if arguments.pages:
        host.extra["pages"] = arguments.pages
    kind(host.kind).prepare(host)
    # The record is what makes a port taken, so it is written before the lock goes.
    with lock("ports"):
        host.ssh_port = state.free_port()
        host.save()
        for wish in arguments.forward:
            local, port = parse_forward(wish)
            host.forwards.append([local or state.free_port(), port])
            host.save()
    return host


def parse_forward(text: str) -> tuple[int, int]:
    """Return (port of 127.0.0.1, port of the host) of "LOCAL:PORT" or "PORT"; 0 means any free one."""
    local, colon, port = text.rpartition(":")
    try:
        pair = (int(local) if colon else 0, int(port))
    except ValueError:
        pair = (-1, -1)
    if not (0 <= pair[0] <= 65535 and 1 <= pair[1] <= 65535):
        raise LabError(
            f"forward {text!r}: expected PORT or LOCAL:PORT with ports up to 65535, such as 8008 or 18008:8008"
        )
    return pair


def _await(host: Host) -> None:
    implementation = kind(host.kind)
    ssh.wait(host, lambda: implementation.alive(host), implementation.console_log(host), BOOT_TIMEOUT_S)
    implementation.settle(host)


def _way_in(host: Host) -> str:
    ports = "".join(f", 127.0.0.1:{local} leads to port {port}" for local, port in host.forwards)
    return f"'python3 -m lab ssh {host.name}', ssh port {host.ssh_port}{ports}"


def _row(host: Host) -> dict[str, Any]:
    return {
        "name": host.name,
        "kind": host.kind,
        "release": host.release,
        "state": "running" if kind(host.kind).alive(host) else "off",
        "cpus": host.cpus,
        "memory_gib": host.memory_gib,
        "ssh_port": host.ssh_port,
        "forwards": host.forwards,
        "snapshots": host.snapshots,
        "created": host.created,
        "directory": str(host.directory),
        "console_log": str(kind(host.kind).console_log(host)),
        "processes": [process.pid for process in host.processes if state.process_alive(process)],
        "extra": host.extra,
    }


def _remove(name: str) -> None:
    try:
        host = state.load_host(name)
    except LabError as error:
        # The record is gone, so nobody knows the kind; each clears away what it finds under the name.
        say(str(error))
        for word in state.KINDS:
            kind(word).down(Host(name=name, kind=word))
        state.forget_host(name)
        return
    if host is None:
        for process in state.host_processes(name):
            state.stop_process(process)
        if state.host_directory(name).exists():
            # The lab was killed while it wrote the first record: there is a folder, and nothing else yet.
            state.forget_host(name)
            say(f"{name}: had no record yet; its folder is gone")
        else:
            say(f"{name}: there is no such host, nothing to do")
        return
    kind(host.kind).down(host)
    state.forget_host(name)
    say(f"{name}: gone")


def _sweep() -> None:
    """Clear away what a crash left without a record: processes, namespaces, pages, half-made images."""
    from lab import container, image  # noqa: PLC0415 - only this command needs all of them
    from lab import pages as machine  # noqa: PLC0415

    owned = {process.pid for name in state.host_names() for process in state.host_processes(name)}
    for process in state.lab_processes():
        if process.pid in owned:
            continue
        say(f"ending process {process.pid}, which no host owns")
        state.stop_process(process)
    for name in container.sweep():
        say(f"removed what the container {name} left")
    given_back = machine.release_all()
    if given_back:
        say(f"{given_back} pages given back")
    image.sweep()


def inventory_text(hosts: Sequence[Host], keys: ssh.Keys) -> str:
    """Return the YAML inventory of hosts: group ``lab`` with one child group per kind, and how to reach them."""
    lines = ["---", "all:", "  children:", "    lab:"]
    # Every value below is a JSON string, which is YAML too.
    common = " ".join(
        [
            "-F none",
            "-o IdentitiesOnly=yes",
            f"-o UserKnownHostsFile={keys.known_hosts}",
            "-o GlobalKnownHostsFile=none",
            "-o StrictHostKeyChecking=yes",
            "-o UpdateHostKeys=no",
            f"-o {ssh.KEY_EXCHANGE}",
            # After a reset or a power cut an open connection is dead, and only this tells.
            "-o ServerAliveInterval=10 -o ServerAliveCountMax=6",
        ]
    )
    settings = {
        "ansible_host": "127.0.0.1",
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(keys.client),
        "ansible_ssh_common_args": common,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    lines.append("      vars:")
    lines += [f"        {name}: {json.dumps(value)}" for name, value in settings.items()]
    groups = {word: [host for host in hosts if host.kind == word] for word in state.KINDS}
    lines.append("      children:")
    for word, members in groups.items():
        lines.append(f"        lab_{word}:")
        lines.append("          hosts:" if members else "          hosts: {}")
        for host in members:
            lines.append(f"            {host.name}:")
            lines.append(f"              ansible_port: {host.ssh_port}")
    return "\n".join(lines) + "\n"


# --- arguments -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main_parser = argparse.ArgumentParser(prog="python3 -m lab", description="Throwaway hosts: VMs and containers.")
    commands = main_parser.add_subparsers(dest="name_of_command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        one.set_defaults(function=function)
        return one

    one = command("up", up, "make hosts, or start those that are off, and wait for ssh")
    one.add_argument("name", nargs="+")
    one.add_argument("--kind", choices=state.KINDS)
    one.add_argument("--release", choices=state.RELEASES, default="bookworm")
    one.add_argument("--cpus", type=int, default=2)
    one.add_argument("--memory-gib", type=int, default=0, help="default: the kind's own")
    one.add_argument("--firmware", choices=("bios", "uefi"), default="bios", help="VM only")
    one.add_argument("--cold", action="store_true", help="VM only: boot, even if a booted state is in the cache")
    one.add_argument("--forward", action="append", default=[], metavar="[LOCAL:]PORT", help="lead 127.0.0.1 to PORT")
    one.add_argument("--bind", action="append", default=[], metavar="SOURCE:TARGET[:ro]", help="container only")
    one.add_argument("--pages", type=int, default=0, help="container only: 1 GiB pages to reserve on this machine")

    one = command("down", down, "remove hosts with everything that is theirs")
    one.add_argument("name", nargs="*")
    one.add_argument("--all", action="store_true", help="all hosts, and whatever a crash left behind")

    one = command("list", list_hosts, "print the hosts")
    one.add_argument("--json", action="store_true")

    one = command("ssh", run_ssh, "log in to a host, or run a command there")
    one.add_argument("name")
    one.add_argument("command", nargs=argparse.REMAINDER)

    one = command("console", console, "join a host's console")
    one.add_argument("name")
    one.add_argument("--log", action="store_true", help="print what it said so far instead")

    one = command("snapshot", snapshot, "keep a host's state")
    one.add_argument("name")
    one.add_argument("snapshot")

    one = command("reset", reset, "return to a kept state; without one, press the reset button")
    one.add_argument("name")
    one.add_argument("snapshot", nargs="?")

    one = command("stop", stop, "shut hosts down in good order")
    one.add_argument("name", nargs="+")

    one = command("power-cut", power_cut, "take the power away, and give it back")
    one.add_argument("name")
    one.add_argument("--off", action="store_true", help="do not give it back")
    one.add_argument("--no-wait", action="store_true", help="do not wait for ssh")

    one = command("forward", forward, "lead a port of 127.0.0.1 to a host's port, and print it")
    one.add_argument("name")
    one.add_argument("port", type=int)
    one.add_argument("--local", type=int, default=0, help="default: a free one")

    one = command("tunnel", tunnel, "lead a port of 127.0.0.1 to one of the host's own loopback, and print it")
    one.add_argument("name")
    one.add_argument("port", type=int)

    one = command("inventory", inventory, "print an Ansible inventory")
    one.add_argument("name", nargs="*")

    one = command("pages", pages, "reserve or give back 1 GiB pages of this machine")
    one.add_argument("action", choices=("reserve", "release", "show"))
    one.add_argument("count", nargs="?", type=int, default=1)
    one.add_argument("--owner", default="manual")
    one.add_argument("--all", action="store_true", help="release: those of every owner")
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.function(arguments) or 0
    except LabError as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; 'python3 -m lab list' shows what is there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
