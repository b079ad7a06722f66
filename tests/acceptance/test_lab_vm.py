# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM of the lab, started for real: its hardware, its boot loader, its snapshots, and that nothing of it stays behind.

Needs root and the packages of lab/packages.txt; three boots, so minutes under emulation. Run: pytest -m lab
tests/acceptance/test_lab_vm.py; CPULLM_LAB_TEST_MEMORY_GIB makes the VM smaller than the default.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _smbios

from lab import state
from tests.support import lab_command

NAME = "test-vm"
MEMORY_GIB = int(os.environ.get("CPULLM_LAB_TEST_MEMORY_GIB", "10"))

pytestmark = [pytest.mark.lab, pytest.mark.vm]


def lab(*words: str, timeout_s: float = 1800) -> str:
    """Run the lab's command line and return its stdout."""
    return lab_command.lab(*words, timeout_s=timeout_s).stdout


def on(command: str) -> str:
    """Return what a shell command prints on the VM."""
    return lab("ssh", NAME, "--", command, timeout_s=300).strip()


def boot_id() -> str:
    """Return the id of the VM's present boot."""
    return on("cat /proc/sys/kernel/random/boot_id")


@pytest.fixture(scope="module", autouse=True)
def vm() -> Iterator[dict]:
    """Make the VM, and take it away again."""
    lab("down", NAME)
    lab("up", NAME, "--kind", "vm", "--memory-gib", str(MEMORY_GIB), "--forward", "8008")
    yield next(row for row in json.loads(lab("list", "--json")) if row["name"] == NAME)
    lab("down", NAME)


def test_a_second_up_does_nothing(vm):
    before = boot_id()
    begin = time.monotonic()
    lab("up", NAME)
    assert boot_id() == before
    assert time.monotonic() - begin < 60


def test_it_is_a_machine_of_its_own(vm):
    assert on("hostname") == NAME
    assert on("systemctl is-system-running || systemctl --failed --no-legend") == "running"
    assert abs(float(on("date +%s.%N")) - time.time()) < 30
    assert on("ss -Htln 'sport = :22' | wc -l") != "0"


def test_two_nodes_with_their_cpus_and_memory(vm):
    assert on("cat /sys/devices/system/node/online") == "0-1"
    assert on("cat /sys/devices/system/node/node0/cpulist /sys/devices/system/node/node1/cpulist").split() == ["0", "1"]
    assert on("cat /sys/devices/system/node/node0/distance") == "10 32"
    sizes = on("grep -h MemTotal /sys/devices/system/node/node*/meminfo | awk '{print $4}'").split()
    assert all(abs(int(size) / 2**20 - MEMORY_GIB / 2) < 0.4 for size in sizes)
    assert on("grep -c pdpe1gb /proc/cpuinfo") == "2"


def test_twelve_dimms(vm, tmp_path):
    folder = "/sys/firmware/dmi/tables"
    encoded = on(f"base64 -w0 {folder}/smbios_entry_point; echo; base64 -w0 {folder}/DMI")
    entry, table = (base64.b64decode(line) for line in encoded.splitlines())
    found = _smbios.decode(entry, table)
    assert [(slot.bank_locator, slot.socket, slot.channel) for slot in found.slots] == [
        (f"P{socket} CHANNEL {letter}", socket, channel) for socket in (0, 1) for channel, letter in enumerate("ABCDEF")
    ]
    assert {(slot.size_bytes, slot.type, slot.rated_mts, slot.configured_mts, slot.ecc) for slot in found.slots} == {
        (64 << 30, "DDR5", 5600, 4800, True)
    }
    assert len(found.arrays) == 2
    assert len(found.processors) == 2


def test_real_grub_boots_the_default_entry(vm):
    assert on("test -s /boot/grub/grub.cfg && grub-editenv - list; echo ok").endswith("ok")
    assert "root=UUID=" in on("cat /proc/cmdline")
    assert on("findmnt -no FSTYPE,SOURCE /").split() == ["ext4", "/dev/vda3"]


def test_snapshot_and_reset(vm):
    on("echo before > /root/state; sync")
    before = boot_id()
    lab("snapshot", NAME, "here")
    on("echo after > /root/state; sync")
    begin = time.monotonic()
    lab("reset", NAME, "here")
    assert time.monotonic() - begin < 120
    assert on("cat /root/state") == "before"
    assert boot_id() == before
    assert abs(float(on("date +%s.%N")) - time.time()) < 30


def test_power_cut_keeps_what_was_flushed_and_nothing_else(vm):
    before = boot_id()
    on("echo flushed > /root/flushed; sync; echo 1 > /proc/sys/vm/laptop_mode; echo lost > /root/lost")
    lab("power-cut", NAME)
    assert boot_id() != before
    assert on("cat /root/flushed") == "flushed"
    assert on("cat /root/lost 2>/dev/null; true") == ""
    assert "GRUB" in lab("console", NAME, "--log")


def test_grub_takes_a_drop_in_and_reboots_into_it(vm):
    before = boot_id()
    on(
        "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX default_hugepagesz=1G hugepagesz=1G hugepages=0:1,1:1\"'"
        " > /etc/default/grub.d/99-test.cfg; update-grub 2>/dev/null; sync"
    )
    lab("reset", NAME)
    assert boot_id() != before
    assert "hugepages=0:1,1:1" in on("cat /proc/cmdline")
    pools = "/sys/devices/system/node/node*/hugepages/hugepages-1048576kB/nr_hugepages"
    assert on(f"cat {pools}").split() == ["1", "1"]


def test_down_leaves_nothing_even_after_a_crash(vm):
    record = state.load_host(NAME)
    pids = [process.pid for process in record.processes]
    assert pids
    # As if the lab had died between the start of QEMU and the writing of the record.
    record.processes = []
    record.save()
    lab("down", NAME)
    assert not any(state.start_ticks(pid) for pid in pids)
    assert state.host_processes(NAME) == []
    assert not state.host_directory(NAME).exists()
    images = str(state.lab_home() / "images")
    assert images not in subprocess.run(["losetup", "--list"], check=True, capture_output=True, text=True).stdout
    assert images not in Path("/proc/self/mounts").read_text()
