# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong with a kernel command line on trial, in one VM with real GRUB: refused, verified, or survived.

The short form of tools/soak_boot.py: each fault once, at a chosen moment. Tests go on from a kept state of the host.
Needs root and the packages of lab/packages.txt. Run: pytest -m vm tests/acceptance/test_boot_faults.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.boot_host import HANG, HELD, RECORD, TOO_MANY, TRIAL, UP, WANTED, BootHost, boot_host

HOST = "test-boot-faults"
# A boot that is not up by then hangs: many times what one takes on an idle machine. Shorter where one is to hang.
LIMIT_S, HANG_LIMIT_S = 300, 80
DEADLINE_S = 30
POOL = "/sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages"

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.boots]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootHost]:
    """Make the VM, kept as `clean` after its first boot, and as `trial` in a trial boot that no play has seen yet."""
    with boot_host(HOST, tmp_path_factory.mktemp("boot"), trim=True) as made:
        if "trial" in made.kept():
            yield made
            return
        made.arm(deadline_s=3600)
        since = made.press_reset()
        made.needs(TRIAL, since)
        made.await_up(since)
        made.on("systemctl is-system-running --wait; rm /var/lib/cpullm/boot_trial.lock")
        assert made.line()[-1].startswith("cpullm.trial="), made.line()
        made.keep("trial")
        yield made


@pytest.fixture
def clean(host: BootHost) -> BootHost:
    """Return the host as it was after its first boot."""
    host.go_to("clean")
    return host


@pytest.fixture
def trial(host: BootHost) -> BootHost:
    """Return the host in its trial boot."""
    host.go_to("trial")
    return host


def former_of(trial: BootHost) -> list[str]:
    """Return the command line before the trial that runs."""
    line = trial.line()
    return line[: line.index(WANTED[0])]


def raw(script: str) -> dict[str, Any]:
    """Return the task that runs a script on the host."""
    return {"ansible.builtin.raw": script}


def step(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the task that does one step of a trial."""
    return {"cpullm.epyc.boot_trial_step": arguments}


def play(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a playbook with one play."""
    return [{"hosts": "all", "gather_facts": False, "tasks": tasks}]


def role(entry: str = "main", **variables: Any) -> dict[str, Any]:
    """Return the task that runs an entry point of the role, whether or not it fails."""
    include = {"name": "cpullm.epyc.grub_hugepages", "tasks_from": entry}
    return {
        "block": [{"ansible.builtin.include_role": include, "vars": variables}],
        "rescue": [{"ansible.builtin.meta": "noop"}],
    }


# --- Refused, and nothing was touched ---------------------------------------------------------------------------------

LOOP = "modprobe -a loop dm_mod; truncate -s 64M /root/disk; loop=$(losetup --find --show /root/disk)"
MOUNT = (
    "mkfs.ext4 -F -q $disk; mount $disk /mnt; cp -a /boot/grub/grub.cfg /boot/grub/grubenv /mnt; umount /mnt;"
    " mount $disk /boot/grub"
)
# The lean host has no udev that would make the node.
VOLUME = (
    f'{LOOP}; dmsetup create vg-grub --uuid LVM-test --table "0 $(blockdev --getsz $loop) linear $loop 0";'
    f" dmsetup mknodes; disk=/dev/mapper/vg-grub; {MOUNT}"
)
OTHERS = "/etc/default/grub.d/50-others.cfg"
# What is done to the host, what is asked of the role, how the refusal begins, and what undoes the first.
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "true",
        {"grub_hugepages_nodes": [{"node": 0, "pages": 3}]},
        "node 0: 3 pages are 3.0 GiB, and it has 2.0 GiB",
        "true",
    ),
    ("true", {"grub_hugepages_trial_deadline_s": 5}, "grub_hugepages_trial_deadline_s is 5, expected", "true"),
    (
        VOLUME,
        {},
        "/boot/grub/grubenv lies on vg-grub: LVM, expected a partition of a disk",
        "umount /boot/grub; dmsetup remove vg-grub; dmsetup mknodes; losetup --detach-all",
    ),
    (
        f"{LOOP}; disk=$loop; {MOUNT}; dd if=/dev/zero of=/boot/grub/full bs=64k || true",
        {},
        "/boot/grub has ",
        "rm /boot/grub/full",
    ),
    (
        "mount -o remount,ro /boot/grub",
        {},
        "/boot/grub/grubenv: /boot/grub is mounted read-only",
        "umount /boot/grub; losetup --detach-all; rm /root/disk",
    ),
    (
        "chattr +i /boot/grub/grubenv",
        {},
        "/boot/grub/grubenv cannot be written: Operation not permitted",
        "chattr -i /boot/grub/grubenv",
    ),
    (
        f"echo 'GRUB_CMDLINE_LINUX=\"hugepagesz=2M hugepages=16\"' > {OTHERS}",
        {},
        f"{OTHERS}:1: GRUB_CMDLINE_LINUX=",
        f"rm {OTHERS}",
    ),
]


def test_what_cannot_work_is_refused_and_nothing_is_touched(clean: BootHost) -> None:
    files = "find /boot /etc/default /etc/systemd /var/lib/cpullm ! -type d 2>/dev/null"
    tree = f"{files} | sort | xargs -d '\\n' sha256sum"
    before = clean.on(tree)
    tasks = []
    for spoil, variables, _says, undo in REFUSED:
        tasks += [raw(spoil), role(grub_hugepages_reboot_allowed=True, **variables), raw(undo)]
    done = clean.play(play=play(tasks))
    assert len(done.failed) == len(REFUSED), done.output
    for (_spoil, _variables, says, _undo), result in zip(REFUSED, done.failed, strict=True):
        text = result["msg"].partition("nothing was touched. ")[2] or result["msg"].partition("left alone: ")[2]
        assert text.startswith(says) and "; /" not in text, result["msg"]
    assert clean.on(tree) == before


def test_an_armed_trial_waits_for_its_play_and_goes_where_it_is_not_wanted(clean: BootHost) -> None:
    """In one play: another controller's, then a dead one's, for the method boot without consent, runtime and absent."""
    # A small host has no GiB in one piece for sure once it runs.
    pages = {"grub_hugepages_size_kib": 2048, "grub_hugepages_nodes": [{"node": 0, "pages": 8}]}
    runtime = {"grub_hugepages_method": "runtime", **pages}
    absent = {"grub_hugepages_state": "absent"}
    left = {"ansible.builtin.command": f"test ! -e {RECORD}"}
    done = clean.play(
        play=play(
            [
                step(clean.step("arm", key="elsewhere", controller="elsewhere", pid=77)),
                role(grub_hugepages_reboot_allowed=True),
                role("verify", **absent),
                raw("rm /var/lib/cpullm/boot_trial.lock"),
                role(),
                left,
                step(clean.step("arm")),
                role(**runtime),
                left,
                role(**absent),
                step(clean.step("arm")),
                role(**absent),
                left,
                role("verify", **absent),
            ]
        )
    )
    said = [result["msg"] for result in done.failed]
    assert len(said) == 2 and done.status == 0, done.output
    assert "another play is at work on its boot: process 77 on elsewhere" in said[0]
    assert "rm /var/lib/cpullm/boot_trial.lock" in said[0]
    assert f"a trial boot left {RECORD}" in said[1]
    assert "NOT SERVING: reboot required" in done.output
    assert clean.traces() == []


# --- Verified ---------------------------------------------------------------------------------------------------------

# What is done in the trial boot, the one fault that is found then, and what undoes the first.
KEPT = f"cp {RECORD} /run/record"
BACK = f"cp /run/record {RECORD}"
TRIP = (
    "printf '[Service]\\nType=oneshot\\nExecStart=/bin/false\\n' > /run/systemd/system/trip.service;"
    " systemctl start trip"
)
POINTS = [
    ("true", "", "true"),
    (
        f'{KEPT}; sed -i "s/\\"boot_id.*,/\\"boot_id\\": \\"$(cat /proc/sys/kernel/random/boot_id)\\",/" {RECORD}',
        "boot_id is still ",
        BACK,
    ),
    (f'sed -i "s/\\"id.*,/\\"id\\": \\"0\\",/" {RECORD}', "/proc/cmdline has no cpullm.trial=0", BACK),
    (f"sed -i s/hugepages=0:1/hugepages=0:2/ {RECORD}", "the kernel runs with default_hugepagesz=1G", BACK),
    (
        f'sed -i "s/\\"reserve_bytes.*,/\\"reserve_bytes\\": 9999999999,/" {RECORD}',
        "GiB are left beside the pages",
        BACK,
    ),
    (
        TRIP,
        "units failed that had not failed before: trip.service",
        "systemctl reset-failed",
    ),
    (
        "grub-editenv /boot/grub/grubenv set next_entry=cpullm-trial",
        "GRUB cannot write there",
        "grub-editenv /boot/grub/grubenv set next_entry=",
    ),
    ("systemctl stop cpullm-boot-trial", "cpullm-boot-trial.service is inactive", "systemctl start cpullm-boot-trial"),
    (f"echo 0 > {POOL}", "node 0: 1 pages of 1 GiB asked, 0 found", "true"),
]


def test_each_point_of_the_verification_trips_alone(trial: BootHost) -> None:
    tasks = []
    for spoil, _says, undo in POINTS:
        # Failing shows the result.
        verify = {**step(trial.step("verify")), "failed_when": True, "ignore_errors": True}
        tasks += [{**raw(spoil), "ignore_errors": True}, verify, raw(undo)]
    done = trial.play(play=play(tasks))
    results = [result for result in done.failed if "faults" in result]
    assert len(results) == len(POINTS), done.output
    for (_spoil, says, _undo), result in zip(POINTS, results, strict=True):
        assert len(result["faults"]) == (says != ""), result["faults"]
        assert says in "".join(result["faults"])


def test_what_is_not_right_leads_back(trial: BootHost) -> None:
    trial.on(f"{TRIP}; echo 0 > {POOL}")
    former = former_of(trial)
    since = trial.mark()
    done = trial.allowed()
    assert done.status == 2
    for says in (
        "units failed that had not failed before: trip.service",
        "node 0: 1 pages of 1 GiB asked, 0 found",
        "back on its former command line, which stays the default",
        "kernel log of that boot",
    ):
        assert says in done.message, done.message
    assert trial.boots(since) == 1
    trial.is_as_before(former)


# --- Survived ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        pytest.param(TOO_MANY, "deadlocked on memory", id="more-2-MiB-pages-than-memory"),
        pytest.param(["init=/bin/false"], "Attempted to kill init", id="init-that-dies"),
        pytest.param(
            ["root=UUID=00000000-0000-0000-0000-000000000000", "rootdelay=1"], "Rebooting", id="no-root-file-system"
        ),
        pytest.param(["systemd.unit=emergency.target"], "", id="emergency-mode"),
        pytest.param([], UP, id="nobody-verifies"),
    ],
)
def test_a_boot_that_does_not_come_through_comes_back_by_itself(clean: BootHost, more: list[str], says: str) -> None:
    former = clean.line()
    clean.arm([*WANTED, *more], DEADLINE_S)
    since = clean.press_reset()
    back = clean.recover(since, [former], LIMIT_S)
    assert (back.boots, back.cycles) == (2, 0)
    assert TRIAL in clean.said(since) and says in clean.said(since)
    after = clean.play()
    assert after.status == 0 and "ended, and no play was there to see it" in after.output
    clean.is_as_before(former)


def test_a_boot_that_hangs_before_the_first_process_comes_back_with_the_power(clean: BootHost) -> None:
    former = clean.line()
    clean.arm_for_a_hang(deadline_s=DEADLINE_S)
    since = clean.press_reset()
    back = clean.recover(since, [former], HANG_LIMIT_S)
    assert back.boots == 2 and TRIAL in clean.said(since)
    if back.cycles == 0:
        # The kernel found in time that there is no memory. This one waits for a root file system in any case.
        assert "deadlocked on memory" in clean.said(since)
        clean.arm([*WANTED, *HANG], DEADLINE_S)
        since = clean.press_reset()
        back = clean.recover(since, [former], HANG_LIMIT_S)
    assert (back.boots, back.cycles) == (2, 1)
    after = clean.play()
    assert after.status == 0 and "ended, and no play was there to see it" in after.output
    clean.is_as_before(former)


def interrupted(host: BootHost, place: str, *words: str, **variables: Any) -> None:
    """Run the role until the host is held at a place, and kill it there."""
    host.on(f"touch /run/hold-{place}")
    since = host.mark()
    with (host.path / "interrupted.log").open("w") as log:
        process = host.start(log, *words, **variables)
        try:
            host.needs(f"{HELD}{place}.", since)
        finally:
            host.kill_plays()
            process.wait()


def test_power_cuts_and_dead_controllers_until_it_is_kept(clean: BootHost) -> None:
    former = clean.line()
    # The entry is written, the choice is not.
    interrupted(clean, "grub-editenv-set", grub_hugepages_reboot_allowed=True)
    back = clean.recover(clean.cut(), [former], LIMIT_S)
    assert back.boots == 1 and {RECORD, "/boot/grub/custom.cfg"} <= set(clean.traces())
    # Chosen, not rebooted yet; and again in the trial boot that follows.
    clean.arm()
    clean.needs(TRIAL, clean.cut())
    clean.pass_time(3)
    back = clean.recover(clean.cut(), [former], LIMIT_S)
    assert back.boots == 1
    # The next run gets there, and the one after it has nothing to do.
    done = clean.allowed()
    assert done.status == 0, done.output
    line = clean.line()
    assert line[: len(former) + 3] == [*former, *WANTED] and line[-1].startswith("cpullm.trial=")
    assert clean.traces() == [] and clean.on("cat /proc/sys/kernel/panic " + POOL).split() == ["0", "1"]
    again = clean.play()
    assert again.status == 0 and again.recap["changed"] == 0, again.output


# Once a play is at work, takes the lock that each step needs, and says when one waits for it.
VERIFYING = f"""
cat > /run/verifying <<'END'
until test -e /var/lib/cpullm/boot_trial.lock; do sleep 0.05; done
exec 9> /run/cpullm/grub_hugepages.lock
flock 9
until grep -q -e '->' /proc/locks; do sleep 0.1; done
echo '{HELD}verify.' > /dev/ttyS0
sleep 600
END
setsid sh /run/verifying > /dev/null 2>&1 < /dev/null &
"""


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        pytest.param("verify", False, id="while-it-is-verified"),
        pytest.param("generate", False, id="while-the-configuration-is-generated"),
        pytest.param("grub-editenv-unset", True, id="after-the-rename"),
    ],
)
def test_a_power_cut_in_the_trial_boot(trial: BootHost, place: str, kept: bool) -> None:
    former = former_of(trial)
    if place == "verify":
        trial.on(VERIFYING)
    interrupted(trial, place)
    wanted = [*former, *WANTED] if kept else former
    back = trial.recover(trial.cut(), [wanted], LIMIT_S)
    assert back.boots == 1
    # Without consent what is left is taken away; where the drop-in is there already, with consent it gets there.
    after = trial.allowed() if place == "generate" else trial.play()
    assert after.status == 0, after.output
    if place == "verify":
        trial.is_as_before(former)
    else:
        assert trial.line()[: len(former) + 3] == [*former, *WANTED]
        assert trial.traces() == [] and trial.pages() == 1


def test_a_controller_that_dies_while_it_is_kept(trial: BootHost) -> None:
    interrupted(trial, "generate")
    # What runs on the host goes on to its end.
    trial.on("rm /run/hold-generate; flock /run/cpullm/grub_hugepages.lock true")
    again = trial.play()
    assert again.status == 0 and again.recap["changed"] == 0, again.output
    assert set(trial.traces()) <= {"/var/lib/cpullm/boot_trial.lock"}
    assert "hugepages=0:1" in trial.on("cat /boot/grub/grub.cfg")
