"""Kernel settings: compare, set, refuse, bring back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.filter.systemd_mount_unit import systemd_mount_unit
from ansible_collections.cpullm.epyc.plugins.module_utils import _tunables
from ansible_collections.cpullm.epyc.plugins.module_utils._tunables import Setting
from hypothesis import given
from hypothesis import strategies as st

RECORD = "/var/lib/cpullm/memory_tuning.json"
SWAPPINESS = "/proc/sys/vm/swappiness"
THP = "/sys/kernel/mm/transparent_hugepage/enabled"
GOVERNORS = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
WANTED = [Setting(SWAPPINESS, "1"), Setting(GOVERNORS, "performance", optional=True)]


@pytest.fixture
def root(tmp_path: Path) -> str:
    files = {SWAPPINESS: "60\n", THP: "always [madvise] never\n"}
    for cpu in (0, 1, 10):
        files[GOVERNORS.replace("*", str(cpu))] = "schedutil\n"
    for path, text in files.items():
        target = tmp_path / path.lstrip("/")
        target.parent.mkdir(parents=True)
        target.write_text(text)
    (tmp_path / "sys/devices/system/cpu/cpufreq").mkdir()
    return str(tmp_path)


def write(root: str, path: str, text: str) -> None:
    Path(root + path).parent.mkdir(parents=True, exist_ok=True)
    Path(root + path).write_text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("60\n", ("60", ()), id="number"),
        pytest.param("always [madvise] never\n", ("madvise", ("always", "madvise", "never")), id="choices"),
        pytest.param("4096\t131072  6291456\n", ("4096 131072 6291456", ()), id="several"),
        pytest.param("", ("", ()), id="empty"),
        pytest.param("[a] [b]", ("[a] [b]", ()), id="two-brackets-are-no-choice"),
    ],
)
def test_parse_value(text: str, expected: tuple[str, tuple[str, ...]]) -> None:
    assert _tunables.parse_value(text) == expected


@given(st.text())
def test_parse_value_takes_anything(text: str) -> None:
    value, choices = _tunables.parse_value(text)
    assert not choices or value in choices


def test_set_again_and_bring_back(root: str) -> None:
    found, faults = _tunables.survey(root, WANTED)
    assert faults == [] and [item.before for item in found] == ["60", "schedutil", "schedutil", "schedutil"]
    _tunables.apply(root, found, RECORD)
    again, _faults = _tunables.survey(root, WANTED)
    assert all(item.right for item in again)
    # A second change keeps what was there before the first.
    _tunables.apply(root, _tunables.survey(root, [Setting(SWAPPINESS, "10")])[0], RECORD)
    assert json.loads(Path(root + RECORD).read_text())[SWAPPINESS] == "60"
    _tunables.restore(root, _tunables.restorable(root, RECORD), RECORD)
    assert Path(root + SWAPPINESS).read_text().strip() == "60"
    assert Path(root + GOVERNORS.replace("*", "10")).read_text() == "schedutil"
    assert not Path(root + RECORD).exists()
    assert _tunables.restorable(root, RECORD) == []


def test_what_is_right_is_not_recorded(root: str) -> None:
    found, _faults = _tunables.survey(root, [Setting(SWAPPINESS, "60")])
    _tunables.apply(root, found, RECORD)
    assert not Path(root + RECORD).exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param(Setting("/proc/sys/vm/none", "1"), "/proc/sys/vm/none does not exist", id="absent"),
        pytest.param(Setting(THP, "sometimes"), "'sometimes' is asked, the kernel knows always, madvise", id="choice"),
    ],
)
def test_faults(root: str, setting: Setting, message: str) -> None:
    _found, faults = _tunables.survey(root, [setting])
    assert len(faults) == 1 and message in faults[0]


def test_optional_may_be_absent(root: str) -> None:
    assert _tunables.survey(root, [Setting("/proc/sys/vm/none", "1", optional=True)]) == ([], [])


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/sys/../etc/passwd", "relative", "/proc/sys/../../etc/x", "/sys/\0/*", "/sys/\x1b[2J"]
)
def test_other_files_are_out_of_reach(root: str, path: str) -> None:
    with pytest.raises(ValueError, match=r"^[ -~]+: expected a file below /proc/sys/ or /sys/$"):
        _tunables.survey(root, [Setting(path, "1")])


def test_a_file_that_cannot_be_written(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tunables.os, "access", lambda path, mode: False)
    _found, faults = _tunables.survey(root, [Setting(SWAPPINESS, "1")])
    assert "is 60, 1 is asked, and it cannot be written: in a container it belongs to the machine" in faults[0]
    # What is right already needs no right to write.
    assert _tunables.survey(root, [Setting(SWAPPINESS, "60")])[1] == []


def test_files_that_are_read_later_win(root: str) -> None:
    ours = "/etc/sysctl.d/60-cpullm.conf"
    write(root, "/etc/sysctl.d/10-first.conf", "vm.swappiness = 5\n")
    write(root, "/usr/lib/sysctl.d/70-same.conf", "-vm/swappiness=1\n")
    write(root, "/etc/sysctl.conf", "# vm.swappiness = 3\nvm.swappiness=30\nvm.other = 1\n")
    (line,) = _tunables.find_overrides(root, WANTED, ours)
    assert line.startswith("/etc/sysctl.conf:2: vm.swappiness=30 is read after /etc/sysctl.d/60-cpullm.conf")


def test_a_masked_file_says_nothing(root: str) -> None:
    write(root, "/usr/lib/sysctl.d/70-x.conf", "vm.swappiness = 5\n")
    write(root, "/etc/sysctl.d/70-x.conf", "")
    assert _tunables.find_overrides(root, WANTED, "/etc/sysctl.d/60-cpullm.conf") == []


def test_a_broken_record_is_said(root: str) -> None:
    write(root, RECORD, "[1]")
    with pytest.raises(ValueError, match="is not a record of earlier values"):
        _tunables.restorable(root, RECORD)


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        pytest.param("/mnt", "mnt.mount", id="plain"),
        pytest.param("/dev/hugepages-1G", r"dev-hugepages\x2d1G.mount", id="dash"),
        pytest.param("/var//lib/x/", "var-lib-x.mount", id="slashes"),
        pytest.param("/.hidden/a b", r"\x2ehidden-a\x20b.mount", id="first-dot-and-blank"),
        pytest.param("/ä", r"\xc3\xa4.mount", id="utf-8"),
    ],
)
def test_mount_unit(path: str, unit: str) -> None:
    assert systemd_mount_unit(path) == unit


@pytest.mark.parametrize("path", ["", "/", "relative", "/a/../b"])
def test_mount_unit_refuses(path: str) -> None:
    with pytest.raises(AnsibleFilterError, match="expected an absolute path below /"):
        systemd_mount_unit(path)
