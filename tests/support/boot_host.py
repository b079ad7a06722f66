# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM of the lab whose boots are broken on purpose, and what can be done to it.

Used by the fault tests (tests/acceptance/test_boot_faults.py, test_boot_trial.py) and by the soak (tools/soak_boot.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ansible

from lab import cli, ssh, state
from tests.support import plays

CLONE = Path(__file__).resolve().parents[2]
# Two sockets, each with an aligned GiB that the kernel's own tables leave whole.
HARDWARE = ("--kind", "vm", "--cpus", "2", "--memory-gib", "4")
WANTED = ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:1"]
# More pages than memory.
TOO_MANY = ["hugepagesz=2M", "hugepages=1800"]
# It waits for ever for a root file system that never comes: a hang there in any case.
HANG = ["rdinit=/does/not/exist", "root=/dev/does-not-exist", "rootwait"]
RESERVE = 1 << 29
BOOT_S = 900
VARIABLES: dict[str, Any] = {
    "grub_hugepages_nodes": [{"node": 0, "pages": 1}],
    "grub_hugepages_system_reserve_bytes": RESERVE,
    "grub_hugepages_trial_deadline_s": 300,
    "grub_hugepages_reboot_timeout_s": BOOT_S,
    # A busy machine makes services of an emulated one run into their own timeouts.
    "grub_hugepages_ignored_units": ["systemd-*", "serial-getty@*"],
}
ROLE = [{"hosts": "all", "gather_facts": False, "roles": [{"role": "cpullm.epyc.grub_hugepages"}]}]
RECORD = "/var/lib/cpullm/boot_trial.json"
# Everything that a trial writes, and whatever looks like it.
TRACES = """
ls -d /boot/grub/custom.cfg /boot/grub/*.cpullm* /etc/systemd/system/cpullm* /etc/systemd/system/*/cpullm* \
  /var/lib/cpullm/boot_trial* 2>/dev/null
grub-editenv /boot/grub/grubenv list | grep next_entry
true
"""
# What a test writes where GRUB reads, which knows no journal; the collection itself sees to its own files.
SETTLE = "sync; fsfreeze --freeze / && fsfreeze --unfreeze /"
# What GRUB says when it has chosen.
BOOTING = "Booting `"
TRIAL = f"{BOOTING}cpullm.epyc: kernel command line on trial'"
UP = "test: the host lets people in"
HELD = "test: held at "

# Units that a reachable host does without: most of a boot's time under emulation is in units like these.
SPARED = (
    "apparmor apt-daily-upgrade.timer apt-daily.timer cron dbus.service dbus.socket dev-hugepages.mount"
    " dev-mqueue.mount dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap fstrim.timer getty.target kmod-static-nodes"
    " logrotate.timer man-db.timer modprobe@configfs modprobe@dm_mod modprobe@drm modprobe@efi_pstore modprobe@fuse"
    " modprobe@loop proc-sys-fs-binfmt_misc.automount serial-getty@ttyS0 sys-fs-fuse-connections.mount"
    " sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount systemd-ask-password-console.path"
    " systemd-ask-password-wall.path systemd-binfmt systemd-logind systemd-machine-id-commit systemd-modules-load"
    " systemd-network-generator systemd-networkd systemd-networkd.socket systemd-networkd-wait-online"
    " systemd-pcrphase systemd-pcrphase-sysinit"
    " systemd-pstore systemd-random-seed systemd-resolved systemd-rfkill systemd-sysctl systemd-sysusers"
    " systemd-timesyncd systemd-tmpfiles-clean.timer systemd-tmpfiles-setup systemd-tmpfiles-setup-dev"
    " systemd-udev-trigger systemd-udevd systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-update-done"
    " systemd-update-utmp systemd-update-utmp-runlevel systemd-user-sessions"
)

# The host says when ssh is up, so that nobody has to try: a connection that comes too early waits for seconds.
_PREPARE = f"""\
set -e
mkdir -p /etc/systemd/system/ssh.service.d
cat > /etc/systemd/system/ssh.service.d/test.conf <<'END'
[Service]
ExecStartPost=-/bin/sh -c 'echo "{UP}" > /dev/ttyS0'
END
# Where a test says so the host waits: before it edits GRUB's variables, and while its configuration is generated.
cat > /usr/local/sbin/test-hold <<'END'
#!/bin/sh
test ! -e /run/hold-$1 || echo "{HELD}$1." > /dev/ttyS0
while test -e /run/hold-$1; do sleep 0.1; done
END
printf '#!/bin/sh\\ntest-hold grub-editenv-$2\\nexec /usr/bin/grub-editenv "$@"\\n' > /usr/sbin/grub-editenv
printf '#!/bin/sh\\n/usr/local/sbin/test-hold generate\\n' > /etc/grub.d/09_test
chmod 755 /usr/local/sbin/test-hold /usr/sbin/grub-editenv /etc/grub.d/09_test
# At a random place the kernel takes the only aligned GiB of a node now and then, and the page comes from the other one.
echo 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX nokaslr"' > /etc/default/grub.d/20_test.cfg
"""
# GRUB, the kernel, systemd and sshd stay as they are; the devices are set up by a script instead of udev. One CPU boots
# fastest under emulation.
_TRIM = f"""
set -e
systemctl --quiet mask {SPARED} 2>/dev/null
mkdir -p /etc/systemd/system-generators
for each in $(ls /usr/lib/systemd/system-generators | grep -v -e debug -e fstab); do
  ln -sf /dev/null /etc/systemd/system-generators/$each
done
root=$(findmnt -no SOURCE /)
cat > /usr/local/sbin/test-devices <<END
#!/bin/sh
mkdir -p /dev/disk/by-uuid
ln -sf $root /dev/disk/by-uuid/$(findmnt -no UUID /)
modprobe virtio_net
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
END
chmod 755 /usr/local/sbin/test-devices
cat > /etc/systemd/system/test-devices.service <<'END'
[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/test-devices
[Install]
WantedBy=multi-user.target
END
systemctl --quiet enable test-devices
printf 'UsePAM no\nUseDNS no\n' > /etc/ssh/sshd_config.d/test.conf
: > /etc/fstab
cat >> /etc/default/grub.d/20_test.cfg <<'END'
GRUB_TIMEOUT=0
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX rw maxcpus=1 mitigations=off audit=0"
GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
END
work=$(mktemp -d)
cd $work
zstd -dcq /boot/initrd.img-$(uname -r) | cpio -id --quiet
rm -rf usr/lib/udev usr/lib/systemd usr/bin/udevadm etc/udev
printf '#!/bin/sh\n' > scripts/init-top/udev
printf '#!/bin/sh\nmount -n -o move /dev $rootmnt/dev\n' > scripts/init-bottom/udev
find . | cpio -o -H newc --quiet | zstd -q1 > /boot/initrd.img-$(uname -r)
rm -r $work
"""
# Modules as they run on the host, without a controller: by name, with their arguments as JSON.
_RUNNER = """
import importlib, json, sys
sys.path.insert(0, "/root/test")
from ansible.module_utils import basic
basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": json.loads(sys.argv[2])}).encode()
basic._ANSIBLE_PROFILE = "legacy"
importlib.import_module(f"ansible_collections.cpullm.epyc.plugins.modules.{sys.argv[1]}").main()
"""
_PARTS = ("module_utils", "modules/boot_trial_step.py", "modules/grub_hugepages.py")


def _sources(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Return what of a folder goes to the host."""
    return entry if entry.isdir() or entry.name.endswith(".py") else None


def lab(*words: str) -> str:
    """Do what a command of the lab does, and return what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(words))
    if status != 0:
        raise RuntimeError(f"lab {' '.join(words)}: {err.getvalue()}")
    return out.getvalue()


@dataclass
class Play:
    """A run that is over: exit status, output, the host's counts of the recap, and the results of tasks that failed."""

    status: int
    output: str
    recap: dict[str, int] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def message(self) -> str:
        """Return the message of the last task that failed."""
        return str(self.failed[-1]["msg"]) if self.failed else ""


@dataclass
class Recovery:
    """How a host came back after a fault: boots since then, power cycles, its command line and the seconds it took."""

    boots: int
    cycles: int
    line: list[str]
    seconds: float


class Stranded(Exception):
    """The host did not come back."""


@dataclass
class BootHost:
    """The host by its name in the lab, and a folder for what runs against it leave here."""

    name: str
    path: Path
    runs: int = 0

    # --- the machine

    @property
    def console(self) -> Path:
        """Return the log of the serial port."""
        return state.host_directory(self.name) / "console.log"

    def clock(self) -> float:
        """Return seconds that stand still while the emulator waits for a core of this machine; only differences count.

        A busy machine makes a boot ten times as long. Limits and random moments are meant for the host, so they are
        counted in what its emulator had.
        """
        waited, ran = 0.0, -1
        process = state.need_host(self.name).process("qemu")
        for task in Path(f"/proc/{process.pid if process else 0}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                on, off, _slices = map(int, task.read_text().split())
                if on > ran:
                    ran, waited = on, off / 1e9
        return time.monotonic() - waited

    def pass_time(self, seconds: float, ended: Callable[[], bool] = lambda: False) -> None:
        """Return after so many seconds of the clock, or when something has ended."""
        until = self.clock() + seconds
        while self.clock() < until and not ended():
            time.sleep(0.01)

    def mark(self) -> int:
        """Return how much the console has said."""
        return self.console.stat().st_size

    def said(self, since: int) -> str:
        """Return what the console said from there on."""
        with self.console.open("rb") as stream:
            stream.seek(since)
            return stream.read().decode("utf-8", "replace")

    def await_said(self, text: str, since: int, limit_s: float = BOOT_S) -> int | None:
        """Return where the console has said a text that it had not said before, or None after so many seconds."""
        deadline = self.clock() + limit_s
        while self.clock() < deadline:
            with self.console.open("rb") as stream:
                stream.seek(since)
                place = stream.read().find(text.encode())
            if place >= 0:
                return since + place + len(text)
            time.sleep(0.1)
        return None

    def needs(self, text: str, since: int, limit_s: float = BOOT_S) -> int:
        """Return where the console has said a text; raise where it does not."""
        found = self.await_said(text, since, limit_s)
        if found is None:
            raise RuntimeError(f"{self.name}: no {text!r} in {limit_s:.0f} s; its console:\n{self.said(since)[-2000:]}")
        return found

    def let_go(self) -> None:
        """End the connections that are kept open: after a power cut they lead nowhere."""
        for socket in self.path.glob("cp*/*"):
            argv = ["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "host"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
            socket.unlink(missing_ok=True)

    def kept(self) -> list[str]:
        """Return the names of the states that are kept."""
        found = state.load_host(self.name)
        return found.snapshots if found else []

    def keep(self, snapshot: str) -> None:
        """Keep the host as it is."""
        lab("snapshot", self.name, snapshot)

    def go_to(self, snapshot: str) -> None:
        """Return to a host that was kept."""
        self.let_go()
        lab("reset", self.name, snapshot)

    def press_reset(self) -> int:
        """Start the machine anew, without any order, and return where the console was."""
        self.let_go()
        since = self.mark()
        host = state.need_host(self.name)
        state.kind("vm").restart(host)
        return since

    def cut(self) -> int:
        """Take the power away, give it back, and return where the console was."""
        self.let_go()
        # QEMU is gone then, so what it wrote is whole.
        lab("power-cut", self.name, "--off")
        since = self.mark()
        with state.host_lock(self.name):
            state.kind("vm").up(state.need_host(self.name))
        return since

    def cut_during(self, after_s: float, name: str, arguments: dict[str, Any]) -> int:
        """Run a module on the host, and cut the power after so many seconds of the clock, as `cut` does."""
        self.on("true")
        socket = ["-o", f"ControlPath={self.path}/cp/m"]
        argv = ssh.argv(state.need_host(self.name), [self.module(name, arguments)], socket)
        none = subprocess.DEVNULL
        with subprocess.Popen(argv, stdin=none, stdout=none, stderr=none) as process:
            self.pass_time(after_s)
            since = self.cut()
            process.kill()
        return since

    def on(self, script: str, timeout_s: float = BOOT_S) -> str:
        """Return what a script prints on the host; raise RuntimeError where it fails or the host does not answer."""
        folder = self.path / "cp"
        folder.mkdir(exist_ok=True)
        shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={folder}/m", "-o", "ControlPersist=60"]
        # A host that has no core for half a minute is not gone.
        alive = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=12", "-o", "ConnectTimeout=120"]
        try:
            done = subprocess.run(
                ssh.argv(state.need_host(self.name), [script], [*shared, *alive]),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{self.name}: {script!r} took longer than {timeout_s:.0f} s") from error
        if done.returncode != 0:
            raise RuntimeError(f"{self.name}: {script!r} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def boot_id(self) -> str:
        """Return the id of the present boot."""
        return self.on("cat /proc/sys/kernel/random/boot_id")

    def line(self) -> list[str]:
        """Return the running kernel's arguments."""
        return self.on("cat /proc/cmdline").split()

    def traces(self) -> list[str]:
        """Return the files in which something of a trial is."""
        return self.on(TRACES).splitlines()

    def pages(self) -> int:
        """Return the pages of 1 GiB on the first node."""
        return int(self.on("cat /sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages"))

    # --- boots

    def await_up(self, since: int, limit_s: float = BOOT_S) -> int:
        """Return where the console said that ssh is up, once the host answers there."""
        place = self.needs(UP, since, limit_s)
        self.let_go()
        self.on("true")
        return place

    def boots(self, since: int) -> int:
        """Return how often GRUB has booted something."""
        return self.said(since).count(BOOTING)

    def recover(self, since: int, good: Sequence[list[str]], limit_s: float) -> Recovery:
        """Follow the host since a fault until it answers with one of the good command lines; raise Stranded.

        A boot that is not up after `limit_s` has hung, and its power is cycled. A trial boot that answers either was
        kept, or has to be ended by its deadline, which `limit_s` covers.
        """
        begin, at, cycles = time.monotonic(), since, 0
        while True:
            if self.boots(since) > 4 or cycles > 1:
                raise Stranded(f"{self.boots(since)} boots, {cycles} power cycles: {self.said(since)[-3000:]}")
            found = self.await_said(UP, at, limit_s)
            if found is None:
                self.cut()
                cycles += 1
                continue
            at = found
            self.let_go()
            deadline = self.clock() + limit_s
            while self.clock() < deadline and BOOTING not in self.said(at):
                if line := self.answers_with(good):
                    return Recovery(self.boots(since), cycles, line, time.monotonic() - begin)
                time.sleep(1)

    def answers_with(self, good: Sequence[list[str]]) -> list[str]:
        """Return the running command line if it is one of these, or the kept trial of one of these, else []."""
        try:
            first, *rest = self.on(f"cat /proc/cmdline; test ! -e {RECORD} || echo {RECORD}").splitlines()
        except RuntimeError:
            return []
        line = first.split()
        return line if line in good or (not rest and any(line[: len(one)] == one for one in good)) else []

    # --- plays

    def argv(self, words: Sequence[str], variables: dict[str, Any], play: Any = None) -> list[str]:
        """Return the command that runs the role, or another play."""
        (self.path / "play.json").write_text(json.dumps(play or ROLE))
        (self.path / "hosts.yml").write_text(lab("inventory", self.name))
        (self.path / "group_vars").mkdir(exist_ok=True)
        (self.path / "group_vars" / "all.json").write_text(json.dumps(VARIABLES))
        program = str(Path(sys.executable).parent / "ansible-playbook")
        inventory = f"--inventory={self.path / 'hosts.yml'}"
        return [program, inventory, str(self.path / "play.json"), "-e", json.dumps(variables), *words]

    def environment(self) -> dict[str, str]:
        """Return the environment of a run; each has connections of its own, since a cut leaves dead ones."""
        self.runs += 1
        return {
            **os.environ,
            "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_CALLBACK_FORMAT_PRETTY": "false",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.path / f"cp{self.runs}"),
            plays.MARK: str(self.path),
        }

    def kill_plays(self) -> None:
        """End every run on this host at once."""
        plays.kill(self.path)

    def start(self, log: IO[str], *words: str, play: Any = None, **variables: Any) -> subprocess.Popen[str]:
        """Start the role, or another play, with its output in a file."""
        return subprocess.Popen(
            self.argv(words, variables, play),
            cwd=CLONE,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )

    def play(self, *words: str, play: Any = None, **variables: Any) -> Play:
        """Run the role, or another play, to its end."""
        path = self.path / "play.log"
        with path.open("w") as log:
            process = self.start(log, *words, play=play, **variables)
            try:
                process.wait(4 * BOOT_S)
            finally:
                if process.poll() is None:
                    self.kill_plays()
                    process.wait()
        # The host may have booted since.
        self.let_go()
        return self.outcome(process.returncode, path.read_text(errors="replace"))

    def outcome(self, status: int, output: str) -> Play:
        """Return what a run said."""
        play = Play(status, output)
        for line in output.splitlines():
            if match := re.match(r"fatal: \[[^\]]*\].*?=> (\{.*\})$", line):
                play.failed.append(json.loads(match[1]))
            elif match := re.match(rf"{self.name} +: (ok=.*)", line):
                play.recap = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[1])}
        return play

    def allowed(self, *words: str, **variables: Any) -> Play:
        """Run the role with consent to reboot."""
        return self.play(*words, grub_hugepages_reboot_allowed=True, **variables)

    def step(self, name: str, arguments: Sequence[str] = WANTED, deadline_s: int = 300, **owner: Any) -> dict[str, Any]:
        """Return the arguments of one step of a trial, for a play that is known to be dead unless told otherwise."""
        who = {"key": "dead", "controller": os.uname().nodename, "machine": "an earlier boot", "pid": 1, "started": "0"}
        return {
            "step": name,
            "nodes": VARIABLES["grub_hugepages_nodes"],
            "arguments": list(arguments),
            "reserve_bytes": RESERVE,
            "deadline_s": deadline_s,
            "ignored_units": VARIABLES["grub_hugepages_ignored_units"],
            "owner": {**who, **owner},
        }

    def arm(self, arguments: Sequence[str] = WANTED, deadline_s: int = 300) -> None:
        """Arm a trial as a play does that dies before it asks for the reboot."""
        # A play that was killed before may have left its own.
        self.on("rm -f /var/lib/cpullm/boot_trial.lock")
        done = self.do("boot_trial_step", self.step("arm", arguments, deadline_s))
        if not done.get("changed"):
            raise RuntimeError(f"{self.name}: not armed: {done}")

    def arm_for_a_hang(self, arguments: Sequence[str] = (*WANTED, *TOO_MANY), deadline_s: int = 300) -> None:
        """Arm a trial with more 2 MiB pages than memory: on two sockets, with the kernel at a random place, it hangs.

        Mostly: now and then the kernel finds in time that there is no memory, and panics as it does elsewhere.
        """
        self.arm(arguments, deadline_s)
        entry = "/boot/grub/custom.cfg"
        self.on(f"sed -i 's/ nokaslr / /' {entry}; ! grep nokaslr {entry}; {SETTLE}")

    def do(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a module on the host without a controller, and return its result."""
        result: dict[str, Any] = json.loads(self.on(self.module(name, arguments)).splitlines()[-1])
        return result

    def bring_modules(self) -> None:
        """Put the modules that a test runs without a controller on the host, compiled."""
        plugins = "ansible_collections/cpullm/epyc/plugins"
        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
                for each in _PARTS:
                    tar.add(CLONE / "plugins" / each, f"{plugins}/{each}", filter=_sources)
                tar.add(Path(ansible.__file__).parent / "module_utils", "ansible/module_utils", filter=_sources)
                version = f'__version__ = "{ansible.__version__}"\n__author__ = ""\n'
                for path, text in (("run.py", _RUNNER), ("ansible/__init__.py", version)):
                    entry = tarfile.TarInfo(path)
                    entry.size = len(text)
                    tar.addfile(entry, io.BytesIO(text.encode()))
            file.seek(0)
            unpack = "mkdir -p /root/test; tar -C /root/test -xz"
            subprocess.run(ssh.argv(state.need_host(self.name), [unpack]), stdin=file, check=True)
        # The first run compiles.
        self.on(self.module("boot_trial_step", {"step": "look"}))

    @staticmethod
    def module(name: str, arguments: dict[str, Any]) -> str:
        """Return the shell command that runs a module on the host."""
        return f"python3 -I /root/test/run.py {name} {shlex.quote(json.dumps(arguments))}"

    def is_as_before(self, line: list[str]) -> None:
        """Require a former command line, running and by default, and no trace of a trial."""
        seen = self.on(
            f"cat /proc/cmdline; ls /etc/default/grub.d; grep -c hugepages /boot/grub/grub.cfg; echo --; {TRACES}"
        ).splitlines()
        assert seen[0].split() == line
        assert not any("cpullm" in name for name in seen)
        assert seen[seen.index("--") - 1] == "0"
        assert seen[seen.index("--") + 1 :] == []


@contextlib.contextmanager
def boot_host(name: str, path: Path, *words: str, trim: bool = False) -> Iterator[BootHost]:
    """Start a VM and keep its first boot as `clean`; removed at the end, unless KEEP is set: then the next one has it.

    Trimmed, it does without what a host needs neither to boot nor to be reached: a boot takes a fraction of the time.
    """
    host = BootHost(name, path)
    if os.environ.get("KEEP") and "clean" in host.kept():
        yield host
        host.let_go()
        return
    lab("down", name)
    try:
        lab("up", name, *HARDWARE, *words)
        host.on(_PREPARE + (_TRIM if trim else "") + f"update-grub 2>/dev/null; systemctl daemon-reload; {SETTLE}")
        host.await_up(host.press_reset())
        host.bring_modules()
        host.keep("clean")
        yield host
    finally:
        host.let_go()
        if not os.environ.get("KEEP"):
            lab("down", name)
