# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The VM after its reboot: reserved pages on both nodes, and a server on each socket that recites from them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "resources"))
from recite_checks import hugetlb_kib, recites


def test_the_kernel_reserved_the_pages_of_each_node(host):
    assert "hugepagesz=1G hugepages=0:3,1:3" in host.file("/proc/cmdline").content_string
    for node in (0, 1):
        pool = f"/sys/devices/system/node/node{node}/hugepages/hugepages-1048576kB/nr_hugepages"
        assert host.file(pool).content_string.strip() == "3"


@pytest.mark.parametrize("socket", [0, 1])
def test_each_socket_s_server_fills_its_own_node(host, socket):
    assert hugetlb_kib(host, socket) == 3 * 1048576
    pid = host.check_output(f"systemctl show --property=MainPID --value llama-server@{socket}")
    maps = host.check_output(f"grep kernelpagesize_kB=1048576 /proc/{pid}/numa_maps")
    assert f"N{1 - socket}=" not in maps
    # Each from its own store.
    assert maps.count(f" file=/var/lib/llama-weights/{socket}/") == len(maps.splitlines()) == 3


@pytest.mark.parametrize("port", [18008, 18009])
def test_each_server_recites(host, port):
    # The whole text is 1,523 tokens: a minute each under emulation, and containers recite it at native speed.
    answer = recites(host, port, ("opening", "truths"))
    assert answer["ok"], answer
