# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel command line on trial, in whole VMs: kept, given back, taken over, and on Debian 13 with UEFI.

What each boot may go through is in test_boot_faults.py; this is what takes longer.
Needs root and the packages of lab/packages.txt; some twenty boots.
Run: pytest -m vm tests/acceptance/test_boot_trial.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.boot_host import SETTLE, TRIAL, WANTED, BootHost, boot_host

HOST = "test-boot"
FILES = "sha256sum /boot/grub/* /etc/default/grub.d/* /etc/default/grub 2>/dev/null; true"

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.faults]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootHost]:
    """Start the VM that the tests share."""
    with boot_host(HOST, tmp_path_factory.mktemp("boot")) as vm:
        yield vm


@pytest.fixture
def vm(shared: BootHost) -> BootHost:
    """Return the VM as it was after its first boot."""
    shared.go_to("clean")
    return shared


def reset(vm: BootHost) -> None:
    """Boot the default."""
    vm.await_up(vm.press_reset())


def keep(vm: BootHost) -> None:
    """Let a command line become the default, see that it is, and that nothing else is left."""
    before = vm.line()
    play = vm.allowed()
    assert play.status == 0, play.output
    running = vm.line()
    assert running[: len(before)] == before
    assert running[len(before) : len(before) + 3] == WANTED
    assert vm.pages() == 1
    assert vm.traces() == []
    assert vm.on("cat /proc/sys/kernel/panic") == "0"
    again = vm.play()
    assert again.status == 0 and again.recap["changed"] == 0, again.output
    # The next boot has it by default, without what belonged to the trial.
    reset(vm)
    assert vm.line() == [*before, *WANTED]


def test_a_good_command_line_is_kept_and_given_back(vm: BootHost) -> None:
    before = vm.line()
    files = vm.on(FILES)
    foreseen = vm.allowed("--check", "--diff")
    assert foreseen.status == 0 and foreseen.recap["changed"] == 1, foreseen.output
    for text in ("cpullm-trial", "/etc/default/grub.d/60-cpullm-hugepages.cfg", "hugepages=0:1"):
        assert text in foreseen.output
    without = vm.play()
    assert without.status == 0 and without.recap["changed"] == 0, without.output
    assert "NOT SERVING: reboot required" in without.output
    assert vm.on(FILES) == files
    keep(vm)
    absent = vm.allowed(grub_hugepages_state="absent")
    assert absent.status == 0, absent.output
    vm.is_as_before(before)
    assert vm.on(FILES) == files


def test_arguments_of_others_are_refused_or_taken_over(vm: BootHost) -> None:
    line = 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX hugepagesz=2M hugepages=16"'
    vm.on(f"echo '{line}' > /etc/default/grub.d/50-others.cfg; update-grub 2>/dev/null; {SETTLE}")
    refused = vm.allowed()
    assert refused.status == 2
    assert "/etc/default/grub.d/50-others.cfg:1: GRUB_CMDLINE_LINUX=" in refused.message
    assert "grub_hugepages_takeover" in refused.message and vm.traces() == []
    before = vm.line()
    kept = vm.allowed(grub_hugepages_takeover=True)
    assert kept.status == 0, kept.output
    assert [word for word in vm.line() if "hugepages" in word] == WANTED
    assert vm.on("cat /etc/default/grub.d/50-others.cfg") == line
    absent = vm.play(grub_hugepages_state="absent")
    assert absent.status == 0, absent.output
    reset(vm)
    theirs = [*before[: before.index("quiet")], "hugepagesz=2M", "hugepages=16", *before[before.index("quiet") :]]
    assert vm.line() == theirs


def test_too_few_pages_lead_back(vm: BootHost) -> None:
    before, first = vm.line(), vm.boot_id()
    play = vm.allowed(
        grub_hugepages_size_kib=2048,
        grub_hugepages_nodes=[{"node": 0, "pages": 64}],
        grub_hugepages_kernel_arguments=["hugepagesz=2M", "hugepages=0:63"],
    )
    assert play.status == 2
    assert "node 0: 64 pages of 2 MiB asked, 63 found" in play.message
    assert "back on its former command line" in play.message
    # The kernel's log of the boot that failed.
    assert "HugeTLB: registered 2.00 MiB page size, pre-allocated 63 pages" in play.message
    assert vm.boot_id() != first
    vm.is_as_before(before)


def test_a_boot_that_hangs_needs_its_power_cycled(vm: BootHost) -> None:
    before = vm.line()
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


def test_a_power_cut_with_the_trial_armed_is_taken_up_and_an_upgrade_does_no_harm(vm: BootHost) -> None:
    before = vm.line()
    vm.arm()
    vm.await_up(vm.cut())
    running = vm.line()
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
    reset(vm)
    assert vm.line() == ["BOOT_IMAGE=/boot/vmlinuz-99.0.0-cloud-amd64", *before[1:], *WANTED]


def test_a_kernel_that_is_gone_leads_to_the_default(vm: BootHost) -> None:
    before = vm.line()
    vm.arm()
    vm.on(f"sed -i 's,/boot/vmlinuz,&-removed,' /boot/grub/custom.cfg; grep -q removed /boot/grub/custom.cfg; {SETTLE}")
    since = vm.press_reset()
    vm.needs(TRIAL, since)
    vm.await_up(since)
    # GRUB starts the machine a second time.
    assert vm.boots(since) == 2
    assert vm.line() == before
    assert vm.on("grub-editenv /boot/grub/grubenv list") == "next_entry="


def test_debian_13_on_uefi(tmp_path: Path) -> None:
    with boot_host(f"{HOST}-13", tmp_path, "--release", "trixie", "--firmware", "uefi") as vm:
        assert vm.on("test -d /sys/firmware/efi && . /etc/os-release && echo $VERSION_CODENAME") == "trixie"
        keep(vm)
