# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Molecule, testinfra and the lab speak of the same hosts."""

from __future__ import annotations


def test_the_host_is_the_one_that_converged(host):
    name = host.backend.get_pytest_id().removeprefix("ansible://")
    assert host.file("/etc/smoke").content_string == f"{name} from the group\n"
    assert host.check_output("hostname") == name
    assert name.endswith(host.system_info.codename)


def test_systemd_runs_whole(host):
    assert host.check_output("systemctl is-system-running") == "running"
    assert host.service("ssh").is_running


def test_the_machine_s_pages_are_in_sight(host):
    assert host.file("/sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages").exists
