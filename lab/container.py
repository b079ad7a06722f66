# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Containers of the lab: a whole Debian with its own systemd under systemd-nspawn, at this machine's native speed.

Below ``hosts/NAME/`` a container keeps::

    upper/ work/       the overlay over the unpacked root file system (or root/: a copy, where overlay is refused)
    root/              where the overlay is mounted, inside the container's own mount namespace only
    snapshots/SNAP/    copies of upper/ (or root/)
    supervise.sh       mounts, starts nspawn, and starts it again when the container reboots
    console.log        what the container's console and nspawn say

What makes ``down`` certain: every process of a container lives in one cgroup of the unified hierarchy, which the kernel
ends as a whole; every mount lives in a mount namespace that ends with those processes; and the namespace, cgroups and
socket outside have names that follow from the host's name, not from a record that a crash may have lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lab import network, pages, rootfs, ssh, state
from lab.state import Host, LabError, say

ROLE = "supervisor"
PROGRAMS = ("systemd-nspawn", "unshare", "nsenter", "mount", "tar", "cp", *network.PROGRAMS)
BOOT_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 20
DEB_CACHE = "/var/cache/cpullm-lab-debs"
KEEP_DEBS = "/usr/local/lib/cpullm-lab/keep-debs"

# systemd's wish to power off, sent to the container's first process (systemd(1), "SIGNALS").
_POWER_OFF = 38
# What nspawn says when the container asked for a reboot and it was told to keep its unit.
_REBOOT = 133
_CGROUPS = Path("/sys/fs/cgroup")
_NSPAWN = Path("/run/systemd/nspawn")


# --- the record's part of a container --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bind:
    """A folder of this machine that the container sees."""

    source: str
    target: str
    read_only: bool = False


def parse_bind(text: str) -> Bind:
    """Return what SOURCE:TARGET[:ro] asks for; both are absolute paths."""
    parts = text.split(":")
    read_only = len(parts) == 3 and parts[2] == "ro"
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise LabError(f"bind {text!r}: expected SOURCE:TARGET or SOURCE:TARGET:ro")
    for part in parts[:2]:
        if not part.startswith("/") or ".." in Path(part).parts:
            raise LabError(f"bind {text!r}: expected absolute paths without '..', found {part!r}")
    if parts[1] == "/":
        raise LabError(f"bind {text!r}: the container's own root cannot be replaced")
    return Bind(parts[0], parts[1], read_only)


def binds(host: Host) -> list[Bind]:
    """Return the folders that the user wants in the container."""
    return [parse_bind(text) for text in host.extra.get("binds", [])]


# --- cgroups ---------------------------------------------------------------------------------------------------------


def unified_hierarchy(mounts: str) -> Path:
    """Return where /proc/mounts text shows the unified cgroup hierarchy, or raise LabError."""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "cgroup2":
            return Path(fields[1])
    raise LabError("no cgroup2 hierarchy is mounted on this machine: containers of the lab need one")


def cgroup(name: str) -> Path:
    """Return the cgroup of the unified hierarchy that holds every process of a container."""
    return unified_hierarchy(Path("/proc/mounts").read_text(encoding="utf-8")) / network.label(name)


def _cgroup_remains(name: str) -> list[Path]:
    """Return the container's cgroups in all hierarchies; nspawn mirrors its own in the one that systemd names."""
    label = network.label(name)
    places = {cgroup(name), _CGROUPS / label, *(entry / label for entry in _CGROUPS.iterdir() if entry.is_dir())}
    return sorted(place for place in places if place.is_dir())


def _members(group: Path) -> list[int]:
    """Return the processes of a cgroup and of those below it."""
    found: list[int] = []
    for listing in [group / "cgroup.procs", *group.glob("**/cgroup.procs")]:
        with contextlib.suppress(OSError):
            found += [int(line) for line in listing.read_text(encoding="ascii").split()]
    return sorted(set(found))


def _kill_group(name: str, timeout_s: float = 20.0) -> None:
    """End every process of a container at once and return when they are gone."""
    group = cgroup(name)
    if not group.is_dir():
        return
    switch = group / "cgroup.kill"
    if not switch.exists():
        raise LabError(f"{name}: {switch} does not exist: containers of the lab need Linux 5.14 or newer")
    switch.write_text("1", encoding="ascii")
    deadline = time.monotonic() + timeout_s
    while "populated 1" in (group / "cgroup.events").read_text(encoding="ascii"):
        if time.monotonic() > deadline:
            raise LabError(f"{name}: processes {_members(group)} did not end after SIGKILL: they hang in the kernel")
        time.sleep(0.02)


def _remove_groups(name: str) -> None:
    """Remove a container's cgroups, whose processes have ended."""
    for top in _cgroup_remains(name):
        for path, _folders, _files in os.walk(top, topdown=False):
            # A cgroup stays busy for a moment after its last process.
            for _ in range(50):
                try:
                    Path(path).rmdir()
                    break
                except OSError:
                    time.sleep(0.02)
        if top.exists():
            raise LabError(f"{name}: the cgroup {top} cannot be removed; processes in it: {_members(top)}")


@contextlib.contextmanager
def _frozen(name: str) -> Iterator[None]:
    """Hold every process of a container still."""
    group = cgroup(name)
    if not group.is_dir():
        yield
        return
    switch = group / "cgroup.freeze"
    try:
        switch.write_text("1", encoding="ascii")
        deadline = time.monotonic() + 20
        while "frozen 0" in (group / "cgroup.events").read_text(encoding="ascii"):
            if time.monotonic() > deadline:
                raise LabError(f"{name}: its processes could not be held still for the snapshot")
            time.sleep(0.01)
        yield
    finally:
        switch.write_text("0", encoding="ascii")


def leader(name: str) -> int | None:
    """Return the container's first process as this machine numbers it, or None."""
    with contextlib.suppress(LabError):
        for pid in _members(cgroup(name)):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
                numbers = [line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")]
                if numbers and len(numbers[0]) > 1 and numbers[0][-1] == "1":
                    return pid
    return None


# --- the root file system --------------------------------------------------------------------------------------------


def tree(release: str) -> Path:
    """Return the unpacked root file system of a release, made if it is not in the cache; it is never written to."""
    archive = rootfs.build(release)
    place = state.folder("trees")
    path = place / archive.stem
    if path.is_dir():
        return path
    with state.lock(f"tree-{release}"):
        if path.is_dir():
            return path
        say(f"unpacking the root file system of Debian {release}")
        work = place / f".{archive.stem}.work"
        _delete(work)
        work.mkdir()
        _run(["tar", "-C", str(work), "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", str(archive)])
        work.rename(path)
        _prune_trees(release, path)
    return path


def _prune_trees(release: str, newest: Path) -> None:
    """Delete unpacked trees of a release that no container uses any more."""
    used = {newest.name}
    for name in state.host_names():
        with contextlib.suppress(LabError):
            host = state.load_host(name)
            if host is not None:
                used.add(Path(str(host.extra.get("tree", "none"))).name)
    for entry in newest.parent.glob(f"{release}-*"):
        if entry.name not in used:
            _delete(entry)


def overlay_works(place: Path, environment: dict[str, str]) -> bool:
    """Return whether this kernel lets the lab stack one folder on another there."""
    probe = place / ".overlay-probe"
    _delete(probe)
    parts = [probe / part for part in ("lower", "upper", "work", "root")]
    for part in parts:
        part.mkdir(parents=True)
    options = overlay_options(parts[0], parts[1], parts[2])
    argv = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "overlay", "overlay", "-o", options]
    done = subprocess.run([*argv, str(parts[3])], capture_output=True, check=False, env=environment)
    _delete(probe)
    return done.returncode == 0


def overlay_options(lower: Path, upper: Path, work: Path) -> str:
    """Return mount's options for an overlay; a comma, colon or backslash in a path is escaped."""

    def escaped(path: Path) -> str:
        return "".join(f"\\{character}" if character in "\\:," else character for character in str(path))

    return f"lowerdir={escaped(lower)},upperdir={escaped(upper)},workdir={escaped(work)}"


def _layer(host: Host) -> Path:
    """Return the folder that holds what this container changed: the overlay's upper part, or the whole copy."""
    return host.directory / ("upper" if host.extra["overlay"] else "root")


def _make_root(host: Host) -> None:
    """Give a new container its root file system, with its name, keys and network settings in it."""
    lower = tree(host.release)
    host.extra["tree"] = str(lower)
    host.extra["overlay"] = overlay_works(host.directory, network.marked(host.name))
    host.save()
    for part in ("upper", "work", "root"):
        _delete(host.directory / part)
    (host.directory / "root").mkdir()
    layer = _layer(host)
    if host.extra["overlay"]:
        layer.mkdir()
        (host.directory / "work").mkdir()
        # The overlay's root takes its mode and owner from the upper part.
        layer.chmod(0o755)
    else:
        say(f"{host.name}: overlayfs is refused here; copying the root file system")
        _copy(host, lower, layer)
    for seed in seeds(host, ssh.keys()):
        path = layer / seed.path
        _make_parents(layer, lower, path.parent)
        path.unlink(missing_ok=True)
        path.write_text(seed.text, encoding="utf-8")
        path.chmod(seed.mode)
    (host.directory / "seeded").touch()


@dataclasses.dataclass(frozen=True)
class Seed:
    """A file that a container has before its first boot."""

    path: str
    text: str
    mode: int = 0o644


def seeds(host: Host, keys: ssh.Keys) -> list[Seed]:
    """Return the files that make a root file system this container's own."""
    return [
        Seed("etc/hostname", f"{host.name}\n"),
        Seed("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n::1 localhost ip6-localhost\n"),
        Seed("etc/resolv.conf", network.resolv_conf()),
        Seed("root/.ssh/authorized_keys", f"{keys.client_public}\n", 0o600),
        Seed("etc/ssh/ssh_host_ed25519_key", keys.host.read_text(encoding="ascii"), 0o600),
        Seed("etc/ssh/ssh_host_ed25519_key.pub", f"{keys.host_public}\n"),
        Seed("etc/apt/apt.conf.d/90cpullm-lab", _APT),
        Seed(KEEP_DEBS.lstrip("/"), _KEEP_DEBS, 0o755),
        # Nothing in a throwaway host is worth waiting for the disk.
        Seed("etc/dpkg/dpkg.cfg.d/90cpullm-lab", "force-unsafe-io\n"),
    ]


# Packages that one container downloaded are there for the next. They are copied, not shared: apt locks its folder.
_APT = f"""\
Binary::apt::APT::Keep-Downloaded-Packages "true";
DPkg::Pre-Install-Pkgs {{ "{KEEP_DEBS}"; }};
"""

_KEEP_DEBS = f"""\
#!/bin/sh
# Part of the lab: keeps what apt downloaded for other containers. Never fails an installation.
for package in /var/cache/apt/archives/*.deb; do
    kept="{DEB_CACHE}/${{package##*/}}"
    [ ! -e "$package" ] || [ -e "$kept" ] || {{ cp "$package" "$kept.$$" && mv "$kept.$$" "$kept"; }}
done
exit 0
"""


def _make_parents(layer: Path, lower: Path, folder: Path) -> None:
    """Make a folder in the upper part, each level with the owner and mode that the lower part gives it."""
    missing = []
    while folder != layer and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir()
        below = lower / path.relative_to(layer)
        if below.is_dir():
            found = below.stat()
            os.chown(path, found.st_uid, found.st_gid)
            path.chmod(found.st_mode & 0o7777)


def _share_packages(host: Host) -> Path:
    """Return the cache of downloaded packages of a release, after linking what it holds into the container."""
    cache = state.folder("debs", host.release)
    layer = _layer(host)
    archives = layer / "var/cache/apt/archives"
    _make_parents(layer, Path(host.extra["tree"]), archives)
    for package in cache.glob("*.deb"):
        target = archives / package.name
        if not target.exists():
            try:
                os.link(package, target)
            except OSError:
                shutil.copy2(package, target)
    return cache


# --- starting --------------------------------------------------------------------------------------------------------


def nspawn_argv(host: Host, debs: Path) -> list[str]:
    """Return the command line that boots a container."""
    argv = [
        "systemd-nspawn",
        "--quiet",
        "--boot",
        # This machine's first process need not be systemd: nothing is asked of it.
        "--register=no",
        "--keep-unit",
        f"--directory={host.directory / 'root'}",
        f"--machine={network.label(host.name)}",
        f"--hostname={host.name}",
        f"--network-namespace-path={network.namespace_path(host.name)}",
        "--resolv-conf=off",
        "--timezone=off",
        "--link-journal=no",
        "--console=read-only",
        # As on a real server: memory may be locked, and a program may ask where its pages are and count events.
        "--capability=CAP_IPC_LOCK,CAP_PERFMON",
        "--system-call-filter=@resources perf_event_open io_uring_setup io_uring_enter io_uring_register",
        f"--bind={_colons(str(debs))}:{DEB_CACHE}",
    ]
    machine_cpus = os.cpu_count() or 1
    if 0 < host.cpus < machine_cpus:
        argv.append(f"--cpu-affinity=0-{host.cpus - 1}")
    for bind in binds(host):
        option = "--bind-ro" if bind.read_only else "--bind"
        argv.append(f"{option}={_colons(bind.source)}:{_colons(bind.target)}")
    # The first process takes what a kernel command line would say.
    return [*argv, "systemd.show_status=true", "systemd.log_color=false"]


def _colons(path: str) -> str:
    """Return a path as nspawn wants it in an option whose parts are divided by colons."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


def supervise_text(host: Host, argv: list[str], group: Path) -> str:
    """Return the script that mounts the root, boots the container, and boots it again whenever it reboots."""
    lines = [
        "#!/bin/sh",
        "set -eu",
        f"echo $$ > {shlex.quote(str(group / 'cgroup.procs'))}",
    ]
    if host.extra["overlay"]:
        options = overlay_options(Path(host.extra["tree"]), host.directory / "upper", host.directory / "work")
        lines.append(f"mount -t overlay overlay -o {shlex.quote(options)} {shlex.quote(str(host.directory / 'root'))}")
    lines += [
        # With the machine's cgroup version 1 hierarchies a present-day systemd in the container refuses to boot.
        "export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1",
        # A Debian server keeps /tmp on its disk.
        "export SYSTEMD_NSPAWN_TMPFS_TMP=0",
        "while :; do",
        "  status=0",
        f"  {shlex.join(argv)} || status=$?",
        f"  [ $status -eq {_REBOOT} ] || exit $status",
        '  echo "lab: the container reboots"',
        "done",
    ]
    return "\n".join(lines) + "\n"


class Container:
    """The lab's containers, as lab.state.Kind wants them."""

    def prepare(self, host: Host) -> None:
        """Check what the user asked for against what a container can give."""
        rootfs.require_programs(PROGRAMS)
        unified_hierarchy(Path("/proc/mounts").read_text(encoding="utf-8"))
        if host.memory_gib:
            raise LabError(
                f"{host.name}: a container sees this machine's memory; leave --memory-gib out, or use --kind vm"
            )
        machine_cpus = os.cpu_count() or 1
        if host.cpus > machine_cpus:
            raise LabError(f"{host.name}: --cpus {host.cpus}, but this machine has {machine_cpus}")
        wanted = host.extra.get("pages", 0)
        if not isinstance(wanted, int) or wanted < 0:
            raise LabError(f"{host.name}: pages {wanted!r}: expected 0 or more pages of 1 GiB")
        for bind in binds(host):
            if not Path(bind.source).is_dir():
                raise LabError(f"{host.name}: --bind {bind.source}: there is no such folder on this machine")

    def up(self, host: Host) -> None:
        """Boot the container, made from the cache if it is new."""
        self._end(host)
        if not (host.directory / "seeded").exists():
            _make_root(host)
        if not Path(host.extra["tree"]).is_dir():
            raise LabError(f"{host.name}: {host.extra['tree']} is gone from the cache: 'lab down {host.name}', then up")
        wanted = int(host.extra.get("pages", 0))
        if wanted and not pages.reserved(host.name):
            pages.reserve(wanted, host.name)
        network.start(host)
        group = cgroup(host.name)
        group.mkdir(exist_ok=True)
        argv = nspawn_argv(host, _share_packages(host))
        script = host.directory / "supervise.sh"
        state.write_text(script, supervise_text(host, argv, group), 0o755)
        log = self.console_log(host)
        supervisor = state.spawn(
            host, ROLE, ["unshare", "--mount", "--propagation", "private", "sh", str(script)], log=log
        )
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while leader(host.name) is None:
            if not state.process_alive(supervisor) or time.monotonic() > deadline:
                raise LabError(f"{host.name}: the container did not start; the end of {log}:\n{ssh.tail(log)}")
            time.sleep(0.02)

    def down(self, host: Host) -> None:
        """End the container and remove what it has outside its folder."""
        self._end(host)
        pages.release(host.name)

    def alive(self, host: Host) -> bool:
        """Return whether the container runs."""
        return leader(host.name) is not None

    def stop(self, host: Host) -> None:
        """Power the container off in good order."""
        first = leader(host.name)
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, _POWER_OFF)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while leader(host.name) is not None and time.monotonic() < deadline:
                time.sleep(0.05)
            if leader(host.name) is not None:
                say(f"{host.name}: did not power off in {STOP_TIMEOUT_S:.0f} s; taking the power away")
        self._end(host)

    def power_cut(self, host: Host) -> None:
        """End every process at once. What they wrote stays: the kernel that holds it is this machine's."""
        self._end(host)

    def snapshot(self, host: Host, name: str) -> None:
        """Keep the container's files; its processes are held still meanwhile, and are not part of it."""
        kept = host.directory / "snapshots"
        kept.mkdir(exist_ok=True)
        work = kept / f".{name}.work"
        _delete(work)
        with _frozen(host.name):
            _copy(host, _layer(host), work)
        old = kept / f".{name}.old"
        _delete(old)
        if (kept / name).exists():
            (kept / name).rename(old)
        work.rename(kept / name)
        _delete(old)
        if name not in host.snapshots:
            host.snapshots.append(name)
        host.save()

    def reset(self, host: Host, name: str) -> None:
        """Put the kept files back and boot."""
        source = host.directory / "snapshots" / name
        if not source.is_dir():
            raise LabError(f"{host.name}: the snapshot {name!r} is gone from {source.parent}")
        self._end(host)
        layer = _layer(host)
        work = host.directory / "restored"
        _delete(work)
        _copy(host, source, work)
        _delete(layer)
        work.rename(layer)
        _delete(host.directory / "work")
        if host.extra["overlay"]:
            (host.directory / "work").mkdir()
        self.up(host)

    def settle(self, host: Host) -> None:
        """Wait for the end of the boot, which ssh is ahead of; a unit that takes long is not waited for."""
        ssh.run(host, f"timeout {SETTLE_TIMEOUT_S} systemctl is-system-running --wait >/dev/null 2>&1; true")

    def restart(self, host: Host) -> None:
        """End every process at once and boot again."""
        self._end(host)
        self.up(host)

    def forward(self, host: Host, local_port: int, port: int) -> None:
        """Lead a port of 127.0.0.1 to a port of the running container."""
        network.add_forward(host.name, local_port, port)

    def console(self, host: Host) -> None:
        """Give the user a root shell in the container that needs no network."""
        first = leader(host.name)
        if first is None:
            raise LabError(f"{host.name}: does not run; its console said: {ssh.tail(self.console_log(host))}")
        say("a root shell in the container; 'exit' leaves it")
        argv = ["nsenter", f"--target={first}", "--all", "--wd=/root", "env", "-i", "HOME=/root"]
        argv += [f"TERM={os.environ.get('TERM', 'dumb')}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "bash", "--login"]
        subprocess.run(argv, check=False)

    def console_log(self, host: Host) -> Path:
        """Return the file that collects the console's output."""
        return host.directory / "console.log"

    def _end(self, host: Host) -> None:
        """End every process of the container and remove namespace and cgroups; its files stay."""
        _kill_group(host.name)
        state.stop_processes(host)
        network.stop(host)
        _remove_groups(host.name)
        _forget_machine(network.label(host.name))


def sweep() -> list[str]:
    """Remove what containers of this lab left that have no folder any more; return the names of what was removed."""
    removed = []
    known = {network.label(name) for name in state.host_names()}
    prefix = network.label_prefix()
    found = {name for name in network.namespaces() if name not in known}
    with contextlib.suppress(LabError):
        hierarchy = cgroup("x").parent
        found |= {entry.name for entry in hierarchy.glob(f"{prefix}*") if entry.name not in known}
    for label in sorted(found):
        name = label[len(prefix) :]
        _kill_group(name)
        for process in state.host_processes(name):
            state.stop_process(process)
        network.remove_namespace(label)
        network.socket_path(name).unlink(missing_ok=True)
        _remove_groups(name)
        _forget_machine(label)
        removed.append(name)
    return removed


def _forget_machine(label: str) -> None:
    """Remove what nspawn leaves: a folder to pass mounts into the container, and a lock that nobody holds.

    The lock is named for a device number that died with the mount, so that only a try tells whose it was.
    """
    with contextlib.suppress(OSError):
        (_NSPAWN / "propagate" / label).rmdir()
    for lock in (_NSPAWN / "locks").glob("inode-*"):
        with contextlib.suppress(OSError), lock.open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # nspawn looks for the file again once it has the lock, and makes another if this one is gone.
            lock.unlink()


def _copy(host: Host, source: Path, target: Path) -> None:
    """Copy a tree with owners, modes, devices, links and all extended attributes (overlay's among them)."""
    target.mkdir(exist_ok=True)
    _run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], network.marked(host.name))


def _delete(path: Path) -> None:
    """Delete a tree, whatever its modes are."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _run(argv: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a program, or raise LabError with what it said."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise LabError(f"'{shlex.join(argv)}' ended with {done.returncode}: {done.stderr.strip()[-800:]}")


KIND: state.Kind = Container()
