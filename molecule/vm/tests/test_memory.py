"""A host on which role memory_tuning ran with its defaults."""

from __future__ import annotations

import json

import pytest

RECORD = "/var/lib/cpullm/memory_tuning.json"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("/proc/sys/vm/swappiness", "1", id="swappiness"),
        pytest.param("/proc/sys/vm/zone_reclaim_mode", "0", id="zone-reclaim"),
        pytest.param("/proc/sys/kernel/numa_balancing", "0", id="numa-balancing"),
        pytest.param("/proc/sys/vm/overcommit_memory", "0", id="overcommit"),
    ],
)
def test_sysctl_holds_now_and_at_boot(host, path: str, value: str) -> None:
    assert host.file(path).content_string.strip() == value
    key = path.removeprefix("/proc/sys/").replace("/", ".")
    # What systemd-sysctl would apply: the last file that names the key wins.
    lines = host.check_output("systemd-analyze cat-config sysctl.d").splitlines()
    said = [line.partition("=")[2].strip() for line in lines if line.lstrip("- ").split("=")[0].strip() == key]
    assert said and said[-1] == value


@pytest.mark.parametrize(("name", "value"), [("enabled", "always"), ("defrag", "defer+madvise")])
def test_transparent_huge_pages(host, name: str, value: str) -> None:
    path = f"/sys/kernel/mm/transparent_hugepage/{name}"
    assert f"[{value}]" in host.file(path).content_string
    assert f"w {path} - - - - {value}" in host.file("/etc/tmpfiles.d/cpullm-memory.conf").content_string


def test_every_governor(host) -> None:
    governors = host.run("cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor").stdout.split()
    assert set(governors) <= {"performance"}


def test_values_from_before_are_kept(host) -> None:
    record = json.loads(host.file(RECORD).content_string)
    assert record
    assert all(isinstance(value, str) for value in record.values())


def test_every_setting_has_its_reason(host) -> None:
    for path in ("/etc/sysctl.d/60-cpullm.conf", "/etc/tmpfiles.d/cpullm-memory.conf"):
        file = host.file(path)
        assert file.user == "root" and file.mode == 0o644
        lines = file.content_string.splitlines()
        assert all(lines[n - 1].startswith("# ") for n, line in enumerate(lines) if line and line[0] not in "#")


def test_mounts(host) -> None:
    listed = host.run("grep -l 'role memory_tuning' /etc/systemd/system/*.mount").stdout.split()
    for unit in listed:
        name = unit.rpartition("/")[2]
        assert host.run("systemctl is-active -- %s", name).stdout.strip() == "active"
        where = host.check_output("systemctl show -P Where -- %s", name)
        assert host.check_output("findmnt -n -o FSTYPE --mountpoint %s", where.strip()) == "hugetlbfs"
