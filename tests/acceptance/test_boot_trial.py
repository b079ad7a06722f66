# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel command line on trial, in VMs with real GRUB: kept when it is right, and the ways back when it is not.

Needs root and the packages of lab/packages.txt; some thirty boots.
Run: pytest -m vm tests/acceptance/test_boot_trial.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CLONE = Path(__file__).resolve().parents[2]
HOST = "test-boot"
# One CPU boots fastest under emulation; 3 GiB hold two aligned GiB above the first 4.
HARDWARE = ["--kind", "vm", "--cpus", "1", "--memory-gib", "3"]
WANTED = ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:1"]
BOOT_S = 900
PLAY = """\
- hosts: all
  gather_facts: false
  roles:
    - role: cpullm.epyc.grub_hugepages
"""
VARIABLES: dict[str, Any] = {
    "grub_hugepages_nodes": [{"node": 0, "pages": 1}],
    "grub_hugepages_system_reserve_bytes": 1 << 29,
    "grub_hugepages_trial_deadline_s": 300,
    "grub_hugepages_reboot_timeout_s": BOOT_S,
    # A busy machine makes services of an emulated one run into their own timeouts.
    "grub_hugepages_ignored_units": ["systemd-*", "serial-getty@*"],
}
# Everything that a trial writes, and whatever looks like it.
TRACES = """
ls -d /boot/grub/custom.cfg /boot/grub/*.cpullm* /etc/systemd/system/cpullm* /etc/systemd/system/*/cpullm* \
  /var/lib/cpullm/boot_trial* 2>/dev/null
grub-editenv /boot/grub/grubenv list | grep next_entry
true
"""

# What a test writes where GRUB reads, which knows no journal; the collection itself sees to its own files.
SETTLE = "sync; fsfreeze --freeze / && fsfreeze --unfreeze /"

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.faults]


def lab(*words: str, timeout_s: float = 2 * BOOT_S) -> str:
    """Run the lab's command line and return its stdout."""
    argv = [sys.executable, "-m", "lab", *words]
    done = subprocess.run(
        argv, cwd=CLONE, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"lab {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass
class Play:
    """A run: exit status, output, the host's counts of the recap, and the message it failed with."""

    status: int
    output: str
    recap: dict[str, int] = field(default_factory=dict)
    message: str = ""


@dataclass
class Vm:
    """A host of the lab with a snapshot of its first boot, and the ways to run the role against it."""

    name: str
    path: Path

    def on(self, script: str, timeout_s: float = 300) -> str:
        """Return what a script prints on the host."""
        return lab("ssh", self.name, "--", script, timeout_s=timeout_s).strip()

    def boot_id(self) -> str:
        """Return the id of the present boot."""
        return self.on("cat /proc/sys/kernel/random/boot_id")

    def command_line(self) -> list[str]:
        """Return the running kernel's arguments."""
        return self.on("cat /proc/cmdline").split()

    def traces(self) -> list[str]:
        """Return the files in which something of a trial is."""
        return self.on(TRACES).splitlines()

    def await_boot(self, known: set[str]) -> str:
        """Return the id of the first boot that answers and is none of the known ones."""
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                if (found := self.boot_id()) not in known:
                    return found
            time.sleep(1)
        pytest.fail(f"no other boot than {known} answered in {BOOT_S} s: {lab('console', self.name, '--log')[-2000:]}")

    def argv(self, words: tuple[str, ...], variables: dict[str, Any]) -> list[str]:
        """Return the command that runs the role."""
        (self.path / "play.yml").write_text(PLAY)
        (self.path / "hosts.yml").write_text(lab("inventory", self.name))
        program = str(Path(sys.executable).parent / "ansible-playbook")
        extra = json.dumps({**VARIABLES, **variables})
        return [program, f"--inventory={self.path / 'hosts.yml'}", str(self.path / "play.yml"), "-e", extra, *words]

    def environment(self) -> dict[str, str]:
        """Return the environment of a run."""
        return {
            **os.environ,
            "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_CALLBACK_FORMAT_PRETTY": "false",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.path / "cp"),
        }

    def kill_plays(self) -> None:
        """End every process of a run at once: workers are sessions of their own, so their group is not enough."""
        mark = f"ANSIBLE_SSH_CONTROL_PATH_DIR={self.path / 'cp'}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)

    def play(self, *words: str, **variables: Any) -> Play:
        """Run the role."""
        done = subprocess.run(
            self.argv(words, variables),
            cwd=CLONE,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=4 * BOOT_S,
            check=False,
        )
        play = Play(done.returncode, done.stdout + done.stderr)
        for line in done.stdout.splitlines():
            if match := re.match(r"fatal: \[[^\]]*\].*?=> (\{.*\})$", line):
                play.message = json.loads(match[1])["msg"]
            elif match := re.match(rf"{self.name} +: (ok=.*)", line):
                play.recap = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[1])}
        return play

    def allowed(self, *words: str, **variables: Any) -> Play:
        """Run the role with consent to reboot."""
        return self.play(*words, grub_hugepages_reboot_allowed=True, **variables)

    def arm(self, arguments: list[str] | None = None, deadline_s: int = 300, **owner: Any) -> None:
        """Arm a trial as a play does that dies before it asks for the reboot."""
        who = {"key": "dead", "controller": os.uname().nodename, "machine": "an earlier boot", "pid": 1, "started": "0"}
        values = {
            "step": "arm",
            "nodes": VARIABLES["grub_hugepages_nodes"],
            "arguments": arguments or WANTED,
            "reserve_bytes": VARIABLES["grub_hugepages_system_reserve_bytes"],
            "deadline_s": deadline_s,
            "owner": {**who, **owner},
        }
        (self.path / "hosts.yml").write_text(lab("inventory", self.name))
        program = str(Path(sys.executable).parent / "ansible")
        argv = [program, "all", f"--inventory={self.path / 'hosts.yml'}", "--module-name=cpullm.epyc.boot_trial_step"]
        done = subprocess.run(
            [*argv, "--args", json.dumps(values)],
            cwd=CLONE,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "/var/lib/cpullm/boot_trial.json" in self.traces()

    def is_as_before(self, command_line: list[str]) -> None:
        """Require the former command line, running and by default, and no trace of a trial."""
        assert self.command_line() == command_line
        assert self.traces() == []
        assert "cpullm" not in self.on("ls /etc/default/grub.d")
        assert "hugepages" not in self.on("cat /boot/grub/grub.cfg")


@contextlib.contextmanager
def machine(name: str, path: Path, *words: str) -> Iterator[Vm]:
    """Start a VM and keep its first boot; removed at the end."""
    lab("down", name)
    try:
        lab("up", name, *HARDWARE, *words)
        lab("snapshot", name, "clean")
        yield Vm(name, path)
    finally:
        if not os.environ.get("KEEP"):
            lab("down", name)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """Start the VM that the tests share."""
    with machine(HOST, tmp_path_factory.mktemp("boot")) as vm:
        yield vm


@pytest.fixture
def vm(shared: Vm) -> Vm:
    """Return the VM as it was after its first boot."""
    lab("reset", shared.name, "clean")
    return shared


def keep(vm: Vm) -> None:
    """Let a command line become the default, see that it is, and that nothing else is left."""
    before = vm.command_line()
    play = vm.allowed()
    assert play.status == 0, play.output
    running = vm.command_line()
    assert running[: len(before)] == before
    assert running[len(before) : len(before) + 3] == WANTED
    assert vm.on("cat /sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages") == "1"
    assert vm.traces() == []
    assert vm.on("cat /proc/sys/kernel/panic") == "0"
    again = vm.play()
    assert again.status == 0 and again.recap["changed"] == 0, again.output
    # The next boot has it by default, without what belonged to the trial.
    lab("reset", vm.name)
    assert vm.command_line() == [*before, *WANTED]


def test_a_good_command_line_is_kept_and_given_back(vm: Vm) -> None:
    before = vm.command_line()
    files = vm.on("sha256sum /boot/grub/* /etc/default/grub.d/* /etc/default/grub 2>/dev/null; true")
    foreseen = vm.allowed("--check", "--diff")
    assert foreseen.status == 0 and foreseen.recap["changed"] == 1, foreseen.output
    for text in ("cpullm-trial", "/etc/default/grub.d/60-cpullm-hugepages.cfg", "hugepages=0:1"):
        assert text in foreseen.output
    without = vm.play()
    assert without.status == 0 and without.recap["changed"] == 0, without.output
    assert "NOT SERVING: reboot required" in without.output
    assert vm.on("sha256sum /boot/grub/* /etc/default/grub.d/* /etc/default/grub 2>/dev/null; true") == files
    keep(vm)
    absent = vm.allowed(grub_hugepages_state="absent")
    assert absent.status == 0, absent.output
    vm.is_as_before(before)
    assert vm.on("sha256sum /boot/grub/* /etc/default/grub.d/* /etc/default/grub 2>/dev/null; true") == files


def test_arguments_of_others_are_refused_or_taken_over(vm: Vm) -> None:
    line = 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX hugepagesz=2M hugepages=16"'
    vm.on(f"echo '{line}' > /etc/default/grub.d/50-others.cfg; update-grub 2>/dev/null; {SETTLE}")
    refused = vm.allowed()
    assert refused.status == 2
    assert "/etc/default/grub.d/50-others.cfg:1: GRUB_CMDLINE_LINUX=" in refused.message
    assert "grub_hugepages_takeover" in refused.message and vm.traces() == []
    before = vm.command_line()
    kept = vm.allowed(grub_hugepages_takeover=True)
    assert kept.status == 0, kept.output
    assert [word for word in vm.command_line() if "hugepages" in word] == WANTED
    assert vm.on("cat /etc/default/grub.d/50-others.cfg") == line
    absent = vm.play(grub_hugepages_state="absent")
    assert absent.status == 0, absent.output
    lab("reset", vm.name)
    theirs = [*before[: before.index("quiet")], "hugepagesz=2M", "hugepages=16", *before[before.index("quiet") :]]
    assert vm.command_line() == theirs


def test_too_few_pages_lead_back(vm: Vm) -> None:
    before, first = vm.command_line(), vm.boot_id()
    play = vm.allowed(
        grub_hugepages_size_kib=2048,
        grub_hugepages_nodes=[{"node": 0, "pages": 64}],
        grub_hugepages_kernel_arguments=["hugepagesz=2M", "hugepages=63"],
    )
    assert play.status == 2
    assert "node 0: 64 pages of 2 MiB asked, 63 found" in play.message
    assert "back on its former command line" in play.message
    # The kernel's log of the boot that failed.
    assert "HugeTLB: registered 2.00 MiB page size, pre-allocated 63 pages" in play.message
    assert vm.boot_id() != first
    vm.is_as_before(before)


def test_a_unit_that_fails_leads_back(vm: Vm) -> None:
    unit = "[Unit]\\nConditionKernelCommandLine=cpullm.trial\\n[Service]\\nType=oneshot\\nExecStart=/bin/false\\n"
    vm.on(
        f"printf '{unit}[Install]\\nWantedBy=multi-user.target\\n' > /etc/systemd/system/trip.service;"
        "systemctl -q enable trip.service; sync"
    )
    before = vm.command_line()
    play = vm.allowed()
    assert play.status == 2
    assert "units failed that had not failed before: trip.service" in play.message
    vm.is_as_before(before)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["init=/bin/false"], id="init-that-dies"),
        pytest.param(["root=UUID=00000000-0000-0000-0000-000000000000", "rootdelay=3"], id="no-root-file-system"),
        pytest.param(["systemd.unit=emergency.target"], id="emergency-mode"),
    ],
)
def test_a_boot_that_does_not_come_through_comes_back_by_itself(vm: Vm, more: list[str]) -> None:
    before, first = vm.command_line(), vm.boot_id()
    play = vm.allowed(grub_hugepages_kernel_arguments=[*WANTED, *more], grub_hugepages_trial_deadline_s=60)
    assert play.status == 2
    assert "the trial boot did not come through" in play.message, play.message
    assert "power cycle" not in play.message
    assert vm.boot_id() != first
    vm.is_as_before(before)


def test_a_boot_that_hangs_needs_its_power_cycled(vm: Vm) -> None:
    before = vm.command_line()
    # A first process that waits for the console for ever.
    play = vm.allowed(
        grub_hugepages_kernel_arguments=[*WANTED, "init=/bin/cat"],
        grub_hugepages_trial_deadline_s=30,
        grub_hugepages_reboot_timeout_s=240,
        grub_hugepages_power_cycle=[sys.executable, "-m", "lab", "power-cut", vm.name, "--no-wait"],
    )
    assert play.status == 2
    assert "back after a power cycle on its former command line" in play.message, play.message
    vm.is_as_before(before)


def test_the_deadline_ends_a_boot_whose_controller_is_gone(vm: Vm) -> None:
    before, first = vm.command_line(), vm.boot_id()
    log = (vm.path / "gone.log").open("w")
    variables = {"grub_hugepages_reboot_allowed": True, "grub_hugepages_trial_deadline_s": 60}
    play = subprocess.Popen(
        vm.argv((), variables), cwd=CLONE, env=vm.environment(), stdout=log, stderr=log, start_new_session=True
    )
    armed = "Booting `cpullm.epyc: kernel command line on trial'"
    known = lab("console", vm.name, "--log").count(armed)
    deadline = time.monotonic() + BOOT_S
    while lab("console", vm.name, "--log").count(armed) == known:
        assert play.poll() is None and time.monotonic() < deadline, (vm.path / "gone.log").read_text()
        time.sleep(0.5)
    vm.kill_plays()
    play.wait()
    trial = vm.await_boot({first})
    if any(word.startswith("cpullm.trial=") for word in vm.command_line()):
        vm.await_boot({first, trial})
    assert vm.command_line() == before
    # The next run reads what that boot left, and takes it away.
    after = vm.play()
    assert after.status == 0, after.output
    assert "ended, and no play was there to see it" in after.output
    assert "nobody verified the boot within 60 s" in after.output
    vm.is_as_before(before)


def test_a_power_cut_with_the_trial_armed_is_taken_up_and_an_upgrade_does_no_harm(vm: Vm) -> None:
    before = vm.command_line()
    vm.arm()
    lab("power-cut", vm.name)
    running = vm.command_line()
    assert [word for word in running if "hugepages" in word] == WANTED and running[-1].startswith("cpullm.trial=")
    assert running[0] == before[0]
    # As when a package brings a newer kernel: that one is the default from here on.
    vm.on(
        "for kind in vmlinuz initrd.img; do cp /boot/$kind-$(uname -r) /boot/$kind-99.0.0-cloud-amd64; done;"
        f"update-grub 2>/dev/null; {SETTLE}"
    )
    trial = vm.boot_id()
    # It needs no consent: nothing reboots.
    play = vm.play()
    assert play.status == 0, play.output
    assert vm.boot_id() == trial and vm.traces() == []
    lab("reset", vm.name)
    assert vm.command_line() == ["BOOT_IMAGE=/boot/vmlinuz-99.0.0-cloud-amd64", *before[1:], *WANTED]


def test_a_trial_that_was_armed_and_not_booted_is_taken_away(vm: Vm) -> None:
    before = vm.command_line()
    vm.arm()
    play = vm.play()
    assert play.status == 0, play.output
    vm.is_as_before(before)


def test_a_kernel_that_is_gone_leads_to_the_default(vm: Vm) -> None:
    before, first = vm.command_line(), vm.boot_id()
    vm.arm()
    vm.on(f"sed -i 's,/boot/vmlinuz,&-removed,' /boot/grub/custom.cfg; grep -q removed /boot/grub/custom.cfg; {SETTLE}")
    # The one that answers first may still be the boot before: GRUB starts the machine a second time.
    lab("reset", vm.name)
    vm.await_boot({first})
    assert vm.command_line() == before
    assert vm.on("grub-editenv /boot/grub/grubenv list") == "next_entry="


def test_a_second_play_is_refused(vm: Vm) -> None:
    vm.arm(key="elsewhere", controller="elsewhere", pid=77)
    play = vm.allowed()
    assert play.status == 2
    assert "another play is at work on its boot: process 77 on elsewhere" in play.message
    assert "rm /var/lib/cpullm/boot_trial.lock" in play.message
    assert "/var/lib/cpullm/boot_trial.json" in vm.traces()


def test_debian_13_on_uefi(tmp_path: Path) -> None:
    with machine(f"{HOST}-13", tmp_path, "--release", "trixie", "--firmware", "uefi") as vm:
        assert vm.on("test -d /sys/firmware/efi && . /etc/os-release && echo $VERSION_CODENAME") == "trixie"
        keep(vm)
