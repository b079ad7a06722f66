# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pages without GRUB, in a VM: there early in each boot, loud where they fall short, topped up, and given back.

Needs root; one VM of 8 GiB, four reboots, so several minutes under emulation. The tests build on each other.
Run: pytest -m vm tests/acceptance/test_runtime_pages.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _plan

from tests.support import lab_command
from tests.unit.test_gguf import TINY
from tests.unit.test_plan import manifest

CLONE = Path(__file__).resolve().parents[2]
NAME = "test-runtime-pages"
POOL = "/sys/devices/system/node/node{}/hugepages/hugepages-1048576kB/nr_hugepages"
RESERVE = 1 << 30
NODES = [{"node": 0, "pages": 1}, {"node": 1, "pages": 1}]
RUNTIME = {
    "grub_hugepages_method": "runtime",
    "grub_hugepages_nodes": NODES,
    "grub_hugepages_system_reserve_bytes": RESERVE,
}
# Stands for the engine: what matters here is whether systemd starts it.
SERVER = """[Service]
ExecStart=/bin/sleep infinity
[Install]
WantedBy=multi-user.target
"""

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.faults]


def lab(*words: str) -> str:
    """Run the lab's command line and return its stdout."""
    return lab_command.lab(*words, timeout_s=1800).stdout


def on(command: str) -> str:
    """Return what a shell command prints on the VM."""
    return lab("ssh", NAME, "--", command).strip()


def pools() -> list[int]:
    """Return the pages of each node."""
    return [int(text) for text in on(f"cat {POOL.format(0)} {POOL.format(1)}").split()]


def grub() -> str:
    """Return what tells whether GRUB was touched."""
    return on("sha256sum /boot/grub/grub.cfg /boot/grub/grubenv; ls -R /boot/grub /etc/default/grub.d 2>&1 | sha256sum")


def reboot() -> None:
    """Boot the VM in good order."""
    before = on("cat /proc/sys/kernel/random/boot_id")
    on("systemctl reboot")
    for _attempt in range(120):
        time.sleep(5)
        words = ["ssh", NAME, "--", "cat /proc/sys/kernel/random/boot_id"]
        done = lab_command.lab(*words, check=False, timeout_s=1800)
        if done.returncode == 0 and done.stdout.strip() != before:
            return
    raise AssertionError("it did not come back")


class Ansible:
    """Runs the role, or a module, on the VM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "hosts.yml").write_text(lab("inventory", NAME))
        self.words = [f"--inventory={CLONE}/inventories/lab", f"--inventory={folder}/hosts.yml"]
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_CALLBACK_FORMAT_PRETTY": "false",
            "ANSIBLE_NOCOLOR": "1",
        }

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ansible's in the clone."""
        return subprocess.run(
            argv, cwd=CLONE, env=self.environment, capture_output=True, text=True, timeout=1200, check=False
        )

    def role(self, variables: dict[str, Any], *words: str, entry: str = "main") -> tuple[int, str, int]:
        """Run an entry point of the role; return its status, output and number of changes."""
        book = self.folder / f"{entry}.yml"
        role = {"name": "cpullm.epyc.grub_hugepages", "tasks_from": entry}
        tasks = [{"ansible.builtin.include_role": role}]
        book.write_text(json.dumps([{"hosts": NAME, "gather_facts": False, "tasks": tasks}]))
        done = self.run("ansible-playbook", *self.words, f"--extra-vars={json.dumps(variables)}", str(book), *words)
        changed = re.search(r"changed=(\d+)", done.stdout)
        return done.returncode, done.stdout + done.stderr, int(changed[1]) if changed else -1

    def module(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a module; return its result."""
        words = [f"--module-name=cpullm.epyc.{name}", *(["--args", json.dumps(arguments)] if arguments else [])]
        done = self.run("ansible", *self.words, NAME, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def ansible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ansible]:
    """Make the VM, with a server that stands for the engine, and take it away again."""
    lab("down", NAME)
    try:
        lab("up", NAME, "--kind", "vm", "--memory-gib", "8")
        on(f"printf %s '{SERVER}' > /etc/systemd/system/llama-server@.service; systemctl enable llama-server@0")
        yield Ansible(tmp_path_factory.mktemp("runtime"))
    finally:
        if not os.environ.get("KEEP"):
            lab("down", NAME)


def plan(ansible: Ansible) -> dict[str, Any]:
    """Return the plan that the VM's facts of this moment give."""
    facts = ansible.module("numa_facts", {})["ansible_facts"]["cpullm_numa"]
    return _plan.make_plan(
        facts, manifest(TINY, 1, "recite"), _plan.Overrides(context=256, system_reserve_bytes=RESERVE)
    )


def test_an_environment_block_on_a_mapping_is_refused(ansible):
    """A volume of LVM is to the kernel a mapping whose uuid begins with LVM: made with its own tool, and mounted."""
    on(
        "truncate -s 64M /root/disk; loop=$(losetup --find --show /root/disk);"
        ' dmsetup create vg-grub --uuid LVM-test --table "0 $(blockdev --getsz $loop) linear $loop 0";'
        " mkfs.ext4 -q /dev/mapper/vg-grub; mount /dev/mapper/vg-grub /mnt; cp -a /boot/grub/. /mnt; umount /mnt;"
        " mount /dev/mapper/vg-grub /boot/grub"
    )
    boot = {**RUNTIME, "grub_hugepages_method": "boot"}
    try:
        status, output, changed = ansible.role(boot, entry="preflight")
        assert (status, changed) == (2, 0), output
        assert "/boot/grub/grubenv lies on vg-grub: LVM, expected a partition of a disk" in output
        assert "grub_hugepages_method: runtime" in output
        on("mount -o remount,ro /boot/grub")
        assert "/boot/grub is mounted read-only" in ansible.role(boot, entry="preflight")[1]
    finally:
        on("umount /boot/grub; dmsetup remove vg-grub; losetup --detach-all; rm /root/disk")
    status, output, _changed = ansible.role(boot, entry="preflight")
    assert status == 0, output


def test_pages_are_there_without_a_reboot_and_without_grub(ansible):
    before, boot_id, planned = grub(), on("cat /proc/sys/kernel/random/boot_id"), plan(ansible)
    status, output, changed = ansible.role(RUNTIME, "--check", "--diff")
    assert (status, changed) == (0, 1) and pools() == [0, 0], output
    status, output, changed = ansible.role(RUNTIME)
    assert status == 0 and changed > 0, output
    assert pools() == [1, 1]
    assert (grub(), on("cat /proc/sys/kernel/random/boot_id")) == (before, boot_id)
    assert plan(ansible) == planned
    status, output, changed = ansible.role(RUNTIME)
    assert (status, changed) == (0, 0), output
    status, output, changed = ansible.role(RUNTIME, entry="verify")
    assert (status, changed) == (0, 0), output


def test_they_are_there_early_in_the_next_boot(ansible):
    before = grub()
    reboot()
    assert pools() == [1, 1]
    assert "hugepages" not in on("cat /proc/cmdline")
    assert grub() == before
    times = on(
        "systemctl show -p ExecMainExitTimestampMonotonic --value cpullm-hugepages;"
        " systemctl show -p ActiveEnterTimestampMonotonic --value sysinit.target"
    ).split()
    assert 0 < int(times[0]) < int(times[1])
    assert on("systemctl is-active llama-server@0") == "active"


def test_too_many_keep_the_servers_from_starting_and_the_host_reachable(ansible):
    on("sed -i 's/ 0:1 1:1$/ 0:5 1:1/' /etc/systemd/system/cpullm-hugepages.service")
    reboot()
    assert on("systemctl --failed --plain --no-legend | cut -d' ' -f1") == "cpullm-hugepages.service"
    assert on("systemctl is-active llama-server@0 || true") == "inactive"
    said = on("journalctl -b -u cpullm-hugepages -t cpullm-hugepages -o cat")
    assert re.search(r"node 0: 5 wanted, [0-3] there, .*node 1: 1 wanted, 1 there", said), said
    assert pools()[0] <= 3
    assert int(on("awk '/MemAvailable/ { print $2 }' /proc/meminfo")) * 1024 >= RESERVE // 2
    # The role sets it right, gives back what is too much, and the server starts.
    status, output, changed = ansible.role(RUNTIME)
    assert status == 0 and changed > 0, output
    assert pools() == [1, 1]
    on("systemctl start llama-server@0")
    assert on("systemctl --failed --plain --no-legend") == ""


def test_a_page_that_is_gone_comes_back_before_a_server_starts(ansible):
    on(f"systemctl stop llama-server@0; echo 0 > {POOL.format(1)}; systemctl start llama-server@0")
    assert pools() == [1, 1]
    # Also where systemd restarts a server that died.
    on(
        "mkdir -p /etc/systemd/system/llama-server@.service.d;"
        " printf '[Service]\\nRestart=on-failure\\n' > /etc/systemd/system/llama-server@.service.d/90-test.conf;"
        f" systemctl daemon-reload; echo 0 > {POOL.format(1)}; systemctl kill -s BUS llama-server@0;"
        " for n in $(seq 60); do systemctl is-active -q llama-server@0 && break; sleep 2; done"
    )
    assert on("systemctl is-active llama-server@0") == "active"
    assert pools() == [1, 1]


def test_more_than_a_node_s_whole_gib_are_refused_and_nothing_is_touched(ansible):
    status, output, changed = ansible.role({**RUNTIME, "grub_hugepages_nodes": [{"node": 1, "pages": 4}]})
    assert (status, changed) == (2, 0) and "node 1: 4 pages of 1 GiB are asked, expected at most 3" in output, output
    assert pools() == [1, 1]


def test_absent_gives_the_pages_back(ansible):
    absent = {**RUNTIME, "grub_hugepages_state": "absent"}
    on("systemctl stop llama-server@0")
    status, output, changed = ansible.role(absent)
    assert status == 0 and changed > 0, output
    assert pools() == [0, 0]
    left = "/usr/local/lib/cpullm /etc/systemd/system/cpullm-hugepages.service /etc/systemd/system/sysinit.target.d"
    assert on(f"ls -d {left} 2>/dev/null || true") == ""
    status, output, changed = ansible.role(absent)
    assert (status, changed) == (0, 0), output
    status, output, _changed = ansible.role(absent, entry="verify")
    assert status == 0, output


def test_a_command_line_that_came_up_short_is_topped_up(ansible):
    """One page is asked of GRUB where two are wanted: what a boot with the kernel in the way of the other leaves."""
    arguments = ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=1:1"]
    ansible.module("grub_hugepages", {"arguments": arguments})
    wanted = {
        **RUNTIME,
        "grub_hugepages_method": "boot",
        "grub_hugepages_kernel_arguments": arguments,
        "grub_hugepages_nodes": [{"node": 1, "pages": 2}],
    }
    reboot()
    assert pools() == [0, 1]
    status, output, _changed = ansible.role(wanted)
    assert status == 2 and "node 1: 2 pages of 1 GiB asked, 1 found" in output, output
    status, output, changed = ansible.role({**wanted, "grub_hugepages_top_up_pages": 1})
    assert status == 0 and changed > 0, output
    assert pools() == [0, 2]
    reboot()
    assert pools() == [0, 2]
    assert on("journalctl -b -u cpullm-hugepages -t cpullm-hugepages -o cat").endswith(
        "node 1: 2 wanted, 2 there, +1 now"
    )


def test_page_descriptions_are_given_back(ansible):
    """Goes on from the test before: one page by the command line, one by the unit, with and without."""
    path = "/etc/default/grub.d/60-cpullm-hugepages.cfg"
    before = int(on("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
    on(f"sed -i 's/default_hugepagesz=1G/hugetlb_free_vmemmap=on &/' {path}; update-grub")
    reboot()
    assert pools() == [0, 2]
    assert int(on("awk '/MemTotal/ { print $2 }' /proc/meminfo")) - before == 2 * 16380
    assert on("cat /proc/sys/vm/hugetlb_optimize_vmemmap") == "1"
