"""A trial boot's traces on a host: written in order, told apart, taken away again; and the verification's points."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _grub, _hugepages, _iomem, _menu, _trial
from hypothesis import given
from hypothesis import strategies as st
from test_menu import config

WANTED = ("default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3")
OLD = "11111111-2222-3333-4444-555555555555"
NEW = "66666666-7777-8888-9999-000000000000"
RECORD = _trial.Record(
    id="0123456789abcdef",
    arguments=WANTED,
    size_kib=1048576,
    pages=((0, 3), (1, 3)),
    reserve_bytes=1 << 30,
    takeover=False,
    boot_id=OLD,
    failed_units=("old.service",),
    deadline_s=600,
    armed_at=1_700_000_000,
    panic_s=0,
)
MARK = f"cpullm.trial={RECORD.id}"


def pool(node: int | None, total: int) -> _hugepages.Pool:
    return _hugepages.Pool(node, 1048576, total, total, 0, None, None)


def memory(total: int) -> _iomem.Memory:
    rooms = tuple(_iomem.Room(node, total // 2, 3, 3) for node in (0, 1))
    return _iomem.Memory(total, 6, rooms)


def host(**changes: Any) -> _grub.Host:
    base = _grub.Host(
        boot_id=NEW,
        release="6.1.0-40-amd64",
        running=("ro", *WANTED, "panic=10", MARK),
        cpu_flags=frozenset({"pdpe1gb"}),
        memory=memory(8 << 30),
        pools=(pool(None, 6), pool(0, 3), pool(1, 3)),
        default_size_kib=1048576,
        drop_in=None,
        config=config(),
        mkconfig="/usr/sbin/grub-mkconfig",
        drop_ins_read=True,
    )
    return dataclasses.replace(base, **changes)


def found(**changes: Any) -> _trial.Found:
    base = _trial.Found(
        record=RECORD,
        record_text=_trial.render_record(RECORD),
        unit=_trial.render_unit(RECORD.id, 600),
        links=_trial.LINKS,
        custom=_menu.with_block(None, "menuentry 'x' {\n}\n"),
        environment="# GRUB Environment Block\n",
    )
    return dataclasses.replace(base, **changes)


# --- The record -------------------------------------------------------------------------------------------------------


def test_a_record_reads_back() -> None:
    assert _trial.parse_record(_trial.render_record(RECORD)) == RECORD


@given(st.one_of(st.text(), st.binary().map(lambda data: data.decode("latin-1"))))
def test_a_damaged_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"boot_trial\.json is no record of a trial"):
        _trial.parse_record(text)


@given(st.integers(0, len(_trial.render_record(RECORD)) - 3))
def test_half_a_record_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="is no record of a trial"):
        _trial.parse_record(_trial.render_record(RECORD)[:length])


# --- The state --------------------------------------------------------------------------------------------------------

NOTHING: dict[str, Any] = {"record": None, "record_text": None, "unit": None, "links": (), "custom": None}


@pytest.mark.parametrize(
    ("host_changes", "found_changes", "expected"),
    [
        pytest.param({}, NOTHING, "none", id="no-trace"),
        pytest.param({}, {**NOTHING, "custom": "# of others\n"}, "none", id="custom-of-others"),
        pytest.param({}, {**NOTHING, "halves": _trial.HALVES[:1]}, "armed", id="cut-while-the-record-was-written"),
        pytest.param({}, {**NOTHING, "environment": "next_entry=other\n"}, "none", id="next-entry-of-others"),
        pytest.param({"boot_id": OLD, "running": ("ro",)}, {}, "armed", id="before-the-reboot"),
        pytest.param(
            {"boot_id": OLD, "running": ("ro",)},
            {"unit": None, "links": (), "custom": None},
            "armed",
            id="cut-after-the-record",
        ),
        pytest.param({}, {"record": None, "record_text": "{"}, "armed", id="damaged-record"),
        pytest.param({}, {"record": None, "record_text": None}, "armed", id="cut-before-the-end-of-cleaning"),
        pytest.param({}, {**NOTHING, "environment": "next_entry=cpullm-trial\n"}, "armed", id="next-entry-alone"),
        pytest.param({}, {}, "running", id="trial-boot"),
        pytest.param({"running": ("ro",)}, {}, "ended", id="back-on-the-old-line"),
        pytest.param({"running": ("ro", "cpullm.trial=other")}, {}, "ended", id="boot-of-another-trial"),
    ],
)
def test_state(host_changes: dict[str, Any], found_changes: dict[str, Any], expected: str) -> None:
    assert _trial.state(host(**host_changes), found(**found_changes)) == expected


# --- The verification -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_changes", "found_changes", "units", "unit_state", "message"),
    [
        pytest.param({}, {}, [], "active", None, id="right"),
        pytest.param({}, {}, ["old.service"], "active", None, id="failed-before"),
        pytest.param({}, {}, ["llama-server@0.service"], "active", None, id="ignored"),
        pytest.param({}, {"record": None}, [], "active", "boot_trial.json is gone", id="record"),
        pytest.param(
            {"boot_id": OLD}, {}, [], "active", f"boot_id is still {OLD}: the host did not reboot", id="boot-id"
        ),
        pytest.param(
            {"running": ("ro", *WANTED)}, {}, [], "active", f"/proc/cmdline has no {MARK}: GRUB did not", id="mark"
        ),
        pytest.param(
            {"running": ("ro", *WANTED[1:], WANTED[0], MARK)},
            {},
            [],
            "active",
            "runs with hugepagesz=1G hugepages=0:3,1:3 default_hugepagesz=1G, expected default_hugepagesz=1G "
            "hugepagesz=1G hugepages=0:3,1:3 in this order",
            id="order",
        ),
        pytest.param(
            {"pools": (pool(0, 3), pool(1, 2))}, {}, [], "active", "node 1: 3 pages of 1 GiB asked, 2 found", id="pools"
        ),
        pytest.param(
            {"memory": memory((6 << 30) + (1 << 29))},
            {},
            [],
            "active",
            "0.50 GiB are left beside the pages, expected at least 1.00 GiB (grub_hugepages_system_reserve_bytes)",
            id="memory",
        ),
        pytest.param(
            {},
            {},
            ["old.service", "new.service", "a.mount"],
            "active",
            "units failed that had not failed before: a.mount, new.service",
            id="units",
        ),
        pytest.param(
            {}, {"environment": "next_entry=cpullm-trial\n"}, [], "active", "GRUB cannot write there", id="environment"
        ),
        pytest.param({}, {}, [], "inactive", "cpullm-boot-trial.service is inactive", id="deadline"),
    ],
)
def test_each_point_of_the_verification_trips_alone(
    host_changes: dict[str, Any], found_changes: dict[str, Any], units: list[str], unit_state: str, message: str | None
) -> None:
    faults = _trial.faults(host(**host_changes), found(**found_changes), units, unit_state, ["llama-server@*.service"])
    if message is None:
        assert faults == []
    else:
        assert len(faults) == 1 and message in faults[0], faults


# --- What cannot be tried ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_change", "found_changes", "deadline_s", "message"),
    [
        pytest.param(None, {}, 600, None, id="good"),
        pytest.param(None, {"environment": "next_entry=cpullm-trial\n"}, 600, None, id="our-own-choice"),
        pytest.param(None, {}, 5, "grub_hugepages_trial_deadline_s is 5, expected at least 30", id="deadline"),
        pytest.param(
            ("  source ${config_directory}/custom.cfg\n", ""), {}, 600, "does not read custom.cfg", id="custom"
        ),
        pytest.param(("set timeout=5", "set timeout=-1"), {}, 600, "no time limit for the menu", id="timeout"),
        pytest.param(None, {"environment": "next_entry=2\n"}, 600, "next_entry='2': somebody else chose", id="choice"),
        pytest.param(None, {"initramfs_tools": False}, 600, "not of initramfs-tools", id="initramfs"),
        pytest.param(("save_env next_entry", "true"), {}, 600, "does not take the choice back", id="once-for-ever"),
        pytest.param(("\tlinux\t/boot/vmlinuz", "\tfile\t/boot/x"), {}, 600, "0 lines that load Linux", id="entry"),
    ],
)
def test_findings(
    config_change: tuple[str, str] | None, found_changes: dict[str, Any], deadline_s: int, message: str | None
) -> None:
    text = config().replace(*config_change) if config_change else config()
    reasons = _trial.findings(host(config=text), found(**found_changes), WANTED, deadline_s)
    if message is None:
        assert reasons == []
    else:
        assert len(reasons) == 1 and message in reasons[0], reasons


def test_grub_finds_the_old_file_until_the_journal_is_written_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "boot/grub/custom.cfg"
    old = path.stat().st_ino
    seen: list[list[int]] = []
    monkeypatch.setattr(
        _grub, "write_journal_out", lambda folder: seen.append([one.stat().st_ino for one in Path(folder).iterdir()])
    )
    arm(root, runner(root, []))
    # After custom.cfg, and again after the choice.
    assert len(seen) == 2 and old in seen[0] and path.stat().st_ino in seen[0]
    assert old not in [one.stat().st_ino for one in path.parent.iterdir()]


def test_the_unit_needs_no_program_to_reboot() -> None:
    text = _trial.render_unit("abc", 77)
    for line in (
        "DefaultDependencies=no",
        "ConditionKernelCommandLine=cpullm.trial=abc",
        "FailureAction=reboot-force",
        "RuntimeMaxSec=77",
    ):
        assert line in text.splitlines()
    assert "%" not in text


# --- On the host ------------------------------------------------------------------------------------------------------


class Cut(Exception):
    """The power goes."""


@pytest.fixture(autouse=True)
def no_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the journal of the machine that the tests run on alone."""
    monkeypatch.setattr(_grub, "write_journal_out", lambda directory: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a tree with what a trial touches."""
    for name, text in {
        "boot/grub/grub.cfg": config(),
        "boot/grub/grubenv": "# GRUB Environment Block\nsaved_entry=0\n#####",
        "boot/grub/custom.cfg": "# of others\n\nmenuentry 'theirs' {\n}\n",
        "usr/share/initramfs-tools/init": "",
        "etc/systemd/system/sysinit.target.wants/theirs.service": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def runner(root: Path, calls: list[str], fails: str = "") -> Callable[[list[str]], tuple[int, str, str]]:
    """Return a runner that edits the environment block as GRUB's own program does, and notes the rest."""

    def run(command: list[str]) -> tuple[int, str, str]:
        calls.append(" ".join(command))
        if fails and fails in calls[-1]:
            return 1, "", "no"
        if command[0] == "grub-editenv":
            assert command[1] == f"{root}{_trial.ENVIRONMENT}"
            path = root / "boot/grub/grubenv"
            lines = [line for line in path.read_text().splitlines() if not line.startswith("next_entry=")]
            if command[2] == "set":
                # Last of all: everything it leads to is there.
                assert b"BEGIN cpullm.epyc" in (root / "boot/grub/custom.cfg").read_bytes()
                assert all(os.path.lexists(f"{root}{link}") for link in (*_trial.LINKS, _trial.UNIT, _trial.RECORD))
                lines.insert(1, command[3])
            path.write_text("\n".join(lines))
        return 0, "", ""

    return run


def tree(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def arm(root: Path, run: Callable[[list[str]], tuple[int, str, str]]) -> None:
    _trial.arm(host(boot_id=OLD, running=("ro",)), _trial.read(str(root)), RECORD, run, str(root))


def test_armed_and_disarmed(root: Path) -> None:
    before = tree(root)
    calls: list[str] = []
    arm(root, runner(root, calls))
    seen = _trial.read(str(root))
    assert seen.record == RECORD and seen.chosen and len(seen.traces) == 6
    assert (root / "boot/grub/custom.cfg").read_text().startswith("# of others\n\nmenuentry 'theirs' {\n}\n### BEGIN")
    for link in _trial.LINKS:
        assert Path(f"{root}{link}").resolve() == Path(f"{root}{_trial.UNIT}")
    assert calls == [f"grub-script-check {root}/boot/grub/custom.cfg.cpullm-new", calls[1]]
    _trial.disarm(seen, runner(root, calls), str(root))
    assert tree(root) == before
    assert not (root / "etc/systemd/system/emergency.target.wants").exists()
    assert f"systemctl stop {_trial.UNIT_NAME}" in calls


@pytest.mark.parametrize("step", range(1, 30))
def test_a_power_cut_while_arming_is_made_good(root: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(root)
    count = 0

    def cut(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise Cut
            return real(*args, **named)

        return call

    with monkeypatch.context() as patch:
        # Nothing runs after a power cut: neither the rest nor what would tidy up.
        patch.setattr(_trial, "disarm", lambda *args, **named: None)
        for module, name in (
            (_trial.os, "symlink"),
            (_trial.os, "replace"),
            (_trial.os, "fsync"),
            (_grub, "write_durably"),
            (_grub, "sync_directory"),
            (_grub, "write_journal_out"),
            (_trial, "_edit_environment"),
        ):
            patch.setattr(module, name, cut(getattr(module, name)))
        try:
            arm(root, runner(root, []))
        except Cut:
            cut_short = _trial.read(str(root))
            assert not cut_short.chosen or len(cut_short.traces) == 6
        else:
            assert count < step
    seen = _trial.read(str(root))
    assert _trial.state(host(boot_id=OLD, running=("ro",)), seen) in ("none", "armed")
    _trial.disarm(seen, runner(root, []), str(root))
    assert tree(root) == before


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        pytest.param("grub-script-check", "grub-script-check refuses", id="check"),
        pytest.param(
            "next_entry=", "grub-editenv /boot/grub/grubenv set next_entry=cpullm-trial ended with rc 1", id="choice"
        ),
    ],
)
def test_a_failure_while_arming_leaves_no_trace(root: Path, fails: str, message: str) -> None:
    before = tree(root)
    with pytest.raises(ValueError, match=message):
        arm(root, runner(root, [], fails))
    assert tree(root) == before


def test_a_choice_that_does_not_last_is_an_error(root: Path) -> None:
    def run(command: list[str]) -> tuple[int, str, str]:
        return 0, "", ""

    with pytest.raises(ValueError, match="next_entry reads back as None after set"):
        arm(root, run)


def test_custom_cfg_keeps_its_bytes_and_mode(root: Path) -> None:
    path = root / "boot/grub/custom.cfg"
    path.write_bytes(b"# \xff\xfe caf\xc3\xa9\r\nset x=1")
    path.chmod(0o600)
    arm(root, runner(root, []))
    assert path.stat().st_mode & 0o777 == 0o600
    _trial.disarm(_trial.read(str(root)), runner(root, []), str(root))
    assert path.read_bytes() == b"# \xff\xfe caf\xc3\xa9\r\nset x=1"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("full", ["boot_trial.json", "cpullm-boot-trial.service", "custom.cfg"])
def test_a_disk_without_room_is_named(root: Path, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(root)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if full in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=f"No space left on device: '.*{full}'"):
            arm(root, runner(root, []))
    assert tree(root) == before


def test_locks(root: Path) -> None:
    assert _trial.read_lock(str(root)) is None
    _trial.write_lock({"key": "a"}, str(root))
    assert _trial.read_lock(str(root)) == {"key": "a"}
    (root / _trial.LOCK.lstrip("/")).write_text("{")
    assert _trial.read_lock(str(root)) is None
    _trial.write_lock(None, str(root))
    assert not (root / _trial.LOCK.lstrip("/")).exists()


def test_halves_of_a_configuration_go_with_the_rest(root: Path) -> None:
    before = tree(root)
    for path in _trial.HALVES:
        half = Path(f"{root}{path}")
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_text("menuentry 'x")
    seen = _trial.read(str(root))
    assert {f"{_grub.CONFIG}.cpullm", f"{_grub.CONFIG}.cpullm.new", f"{_grub.DROP_IN}.cpullm-new"} <= set(seen.traces)
    _trial.disarm(seen, runner(root, []), str(root))
    assert tree(root) == before
