"""A host on which role grub_hugepages ran with method boot, and rebooted."""

from __future__ import annotations

import re

import pytest

DROP_IN = "/etc/default/grub.d/60-cpullm-hugepages.cfg"
CONFIG = "/boot/grub/grub.cfg"


@pytest.fixture(scope="module")
def arguments(host) -> list[str]:
    """Return the arguments that our drop-in adds, in order."""
    match = re.search(r'^GRUB_CMDLINE_LINUX_DEFAULT="\$\{[^}]*\}([^"]*)"$', host.file(DROP_IN).content_string, re.M)
    assert match
    return match[1].split()


@pytest.fixture(scope="module")
def pages(arguments: list[str]) -> list[tuple[int, int, int]]:
    """Return (node, size in kB, pages) as the arguments ask; a form without nodes counts for none."""
    found = []
    size = 2048
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "hugepagesz":
            size = {"1G": 1048576, "2M": 2048}[value]
        elif name == "hugepages" and ":" in value:
            found += [(int(n), size, int(count)) for n, count in (part.split(":") for part in value.split(","))]
    return found


def test_drop_in(host) -> None:
    file = host.file(DROP_IN)
    assert file.user == file.group == "root" and file.mode == 0o644
    assert "Managed by cpullm.epyc" in file.content_string


def test_running_command_line_has_them_in_order(host, arguments: list[str]) -> None:
    running = host.file("/proc/cmdline").content_string.split()
    names = ("default_hugepagesz", "hugepagesz", "hugepages", "hugetlb_free_vmemmap")
    assert [argument for argument in running if argument.partition("=")[0] in names] == [
        argument for argument in arguments if argument.partition("=")[0] in names
    ]


def test_ordinary_entries_have_them_and_recovery_has_not(host, arguments: list[str]) -> None:
    config = host.file(CONFIG).content_string
    kernels = re.findall(r"menuentry '([^']*)'[^\n]*\{.*?\n\s*linux\s+(\S+[^\n]*)", config, re.S)
    assert kernels
    for title, line in kernels:
        if "recovery mode" in title:
            assert "hugepages" not in line
        else:
            assert " ".join(arguments) in line
    assert host.run("grub-script-check %s", CONFIG).rc == 0


def test_pools_of_each_node(host, pages: list[tuple[int, int, int]]) -> None:
    assert pages
    for node, size, asked in pages:
        path = f"/sys/devices/system/node/node{node}/hugepages/hugepages-{size}kB/nr_hugepages"
        assert int(host.file(path).content_string) >= asked


def test_nothing_is_left_half_done(host) -> None:
    assert host.run("ls /boot/grub/*.cpullm* /etc/default/grub.d/*.cpullm-new").stdout == ""
    assert not host.file("/var/lib/cpullm/grub_hugepages.json").exists


def test_the_boot_failed_no_unit(host) -> None:
    assert host.check_output("systemctl list-units --failed --no-legend --plain") == ""
