#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Break the boot of a host again and again at random moments, and count whether it comes back by itself.

A VM with real GRUB is brought to a kept state; then the power is cut, the controller killed, or a command line booted
that cannot work. After each fault the host has to answer on a command line that was verified before, within two boots;
now and then the play runs again, and has to end where it was to end. The figures are written after each fault, and a
later run on the same sources goes on from them with the seed that they began with. Several runs on hosts of their own
(``--host``) share the figures: one for each free core.

    python3 tools/soak_boot.py --faults 200
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

CLONE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CLONE))

from bench import record  # noqa: E402 - the clone is no installed package
from lab import state  # noqa: E402
from tests.support.boot_host import HANG, TRIAL, WANTED, BootHost, Stranded, boot_host  # noqa: E402

RESULT = record.RESULTS / "boot-soak.json"
# What decides how a fault ends. A change of these begins anew.
SOURCES = (
    "lab",
    "plugins/action/boot_trial.py",
    "plugins/action/reboot.py",
    "plugins/modules/boot_trial_step.py",
    "plugins/modules/grub_hugepages.py",
    "plugins/module_utils/_cmdline.py",
    "plugins/module_utils/_grub.py",
    "plugins/module_utils/_menu.py",
    "plugins/module_utils/_preflight.py",
    "plugins/module_utils/_trial.py",
    "roles/grub_hugepages/tasks",
    "tests/support/boot_host.py",
    "tools/soak_boot.py",
)
COUNTS = (
    "begun",
    "faults",
    "boots",
    "stranded",
    "recovered_within_two_boots",
    "needed_power_cycle",
    "played_again",
    "played_again_wrong",
)
DEADLINE_S = 30
# A boot that is not up by then, its deadline included, has hung.
LIMIT_S = 120.0
# Of so many faults the play runs once more: to see what it finds, and to the end.
LOOK_EVERY, PLAY_EVERY = 3, 12


class Soak:
    """The host in its kept states, what was counted, and what a fault needs to know."""

    # How often each kind of fault is made: the cheap ones more.
    KINDS: ClassVar[dict[str, int]] = {
        "cut_while_armed": 4,
        "cut_while_kept": 6,
        "cut_while_booted": 5,
        "cut_while_taken_back": 3,
        "boot_what_fails": 4,
        "boot_what_hangs": 1,
        "kill_the_play": 1,
        "cut_in_the_play": 1,
    }

    def __init__(self, host: BootHost, seed: int) -> None:
        """Bring the host to each state and keep it; the seed is that of new figures."""
        self.host = host
        self.seed = seed
        self.former = host.line()
        self.verified = [*self.former, *WANTED]
        begin = host.clock()
        host.arm(deadline_s=DEADLINE_S)
        self.arm_s = host.clock() - begin
        host.keep("armed")
        # In a trial boot that has time.
        host.go_to("clean")
        host.arm(deadline_s=3600)
        begin = host.clock()
        since = host.press_reset()
        host.needs(TRIAL, since)
        host.await_up(since)
        self.boot_s = host.clock() - begin
        host.on("systemctl is-system-running --wait; rm /var/lib/cpullm/boot_trial.lock")
        host.keep("trial")
        begin = host.clock()
        host.do(*self.step("promote"))
        self.promote_s = host.clock() - begin
        since = host.press_reset()
        host.await_up(since)
        if host.line() != self.verified:
            raise RuntimeError(f"kept {host.line()}, expected {self.verified}")
        host.keep("kept")
        say(
            f"arming takes {self.arm_s:.0f} s, a boot {self.boot_s:.0f} s, keeping {self.promote_s:.0f} s; "
            f"a whole play is taken to be {self.play_s:.0f} s"
        )

    @property
    def play_s(self) -> float:
        """Return about how long a play takes from its start to its end."""
        return 2 * self.arm_s + self.boot_s + 2 * self.promote_s

    def step(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the module, and its arguments, of a step of a trial."""
        return "boot_trial_step", self.host.step(name, deadline_s=DEADLINE_S)

    def played(self, after_s: float) -> None:
        """Start the play and kill it after so many seconds."""
        with (self.host.path / "killed.log").open("w") as log:
            variables = {"grub_hugepages_reboot_allowed": True, "grub_hugepages_trial_deadline_s": DEADLINE_S}
            process = self.host.start(log, **variables)
            self.host.pass_time(after_s, lambda: process.poll() is not None)
            self.host.kill_plays()
            process.wait()

    # --- faults: each returns where the console was when it happened, and how it is called

    def cut_while_armed(self, chance: random.Random) -> tuple[int, str]:
        """Cut the power while the trial is written."""
        after = chance.uniform(0.3, 1.1) * self.arm_s
        self.host.go_to("clean")
        return self.host.cut_during(after, *self.step("arm")), f"power cut {after:.2f} s after arming began"

    def cut_while_kept(self, chance: random.Random) -> tuple[int, str]:
        """Cut the power while the trial boot is verified and kept."""
        after = chance.uniform(0.2, 1.1) * self.promote_s
        self.host.go_to("trial")
        return self.host.cut_during(after, *self.step("promote")), f"power cut {after:.2f} s after verification began"

    def cut_while_booted(self, chance: random.Random) -> tuple[int, str]:
        """Cut the power during the trial boot."""
        after = chance.uniform(0, 1.2) * self.boot_s
        self.host.go_to("armed")
        self.host.press_reset()
        self.host.pass_time(after)
        return self.host.cut(), f"power cut {after:.2f} s into the trial boot"

    def cut_while_taken_back(self, chance: random.Random) -> tuple[int, str]:
        """Cut the power while the kept line is taken back."""
        after = chance.uniform(0.2, 1.1) * self.promote_s
        self.host.go_to("kept")
        return self.host.cut_during(
            after, "grub_hugepages", {"state": "absent"}
        ), f"power cut {after:.2f} s after taking back began"

    def boot_what_fails(self, chance: random.Random) -> tuple[int, str]:
        """Boot a command line that cannot work."""
        more = chance.choice(
            [
                ["hugepagesz=2M", f"hugepages={chance.randint(1700, 3000)}"],
                ["init=/bin/false"],
                ["init=/does/not/exist"],
                HANG,
                ["root=UUID=00000000-0000-0000-0000-000000000000", "rootdelay=1"],
                ["systemd.unit=emergency.target"],
                ["systemd.mask=ssh.service"],
                ["systemd.mask=systemd-networkd.service"],
                [f"mem={chance.randint(24, 200)}M"],
            ]
        )
        self.host.go_to("clean")
        self.host.arm([*WANTED, *more], DEADLINE_S)
        return self.host.press_reset(), f"trial boot with {' '.join(more)}"

    def boot_what_hangs(self, chance: random.Random) -> tuple[int, str]:
        """Boot with so many pages that the kernel mostly hangs."""
        pages = ["hugepagesz=2M", f"hugepages={chance.randint(1700, 3000)}"]
        self.host.go_to("clean")
        self.host.arm_for_a_hang([*WANTED, *pages], DEADLINE_S)
        return self.host.press_reset(), f"trial boot with {' '.join(pages)} and a kernel at a random place"

    def kill_the_play(self, chance: random.Random) -> tuple[int, str]:
        """Kill the controller's side of a whole play."""
        after = chance.uniform(0.1, 1.1) * self.play_s
        self.host.go_to("clean")
        since = self.host.mark()
        self.played(after)
        return since, f"controller killed after {after:.2f} s of the play"

    def cut_in_the_play(self, chance: random.Random) -> tuple[int, str]:
        """Cut the power, and the controller's side, of a whole play."""
        after = chance.uniform(0.1, 1.1) * self.play_s
        self.host.go_to("clean")
        self.played(after)
        return self.host.cut(), f"power cut after {after:.2f} s of the play"

    # --- a round

    def fault(self) -> None:
        """Make the next fault, follow the host, and write what is counted."""
        with shared(self.seed) as figures:
            number = int(figures["begun"])
            figures["begun"] += 1
        chance = random.Random(f"{figures['seed']:.0f} {number}")  # noqa: S311 - no secret
        kind = chance.choices(list(self.KINDS), list(self.KINDS.values()))[0]
        counts = dict.fromkeys(COUNTS, 0)
        begin, console = time.monotonic(), self.host.mark()
        since, what = getattr(self, kind)(chance)
        counts["faults"] = 1
        say(f"fault {number + 1}: {what}")
        try:
            settled = kind == "kill_the_play" and self.stayed(since)
            boots, cycles = (0, 0) if settled else self.recovered(since)
            counts["recovered_within_two_boots"] = int(boots <= 2)
            counts["needed_power_cycle"] = int(cycles > 0)
            said = f"back after {boots} boot(s)" + (f" and {cycles} power cycle(s)" if cycles else "")
            if chance.randrange(LOOK_EVERY) == 0:
                whole = chance.randrange(PLAY_EVERY // LOOK_EVERY) == 0
                wrong = self.play_again(whole)
                counts["played_again"], counts["played_again_wrong"] = 1, int(wrong != "")
                said += f"; the play again{' to its end' if whole else ''}: {wrong or 'right'}"
        except Stranded as error:
            counts["stranded"], said = 1, f"STRANDED: {error}"
        counts["boots"] = self.host.boots(console)
        with shared(self.seed) as figures:
            for name, count in counts.items():
                figures[name] += count
        say(f"fault {number + 1}: {said}; {time.monotonic() - begin:.0f} s, so far {json.dumps(figures)}")

    def stayed(self, since: int) -> bool:
        """Return whether a host whose controller died is in the boot that it was in, and stays there."""
        # A reboot that was asked for comes two seconds later.
        time.sleep(5)
        return self.host.boots(since) == 0 and self.host.answers_with([self.former]) != []

    def recovered(self, since: int) -> tuple[int, int]:
        """Return after how many boots and power cycles the host answers on a line that was verified."""
        back = self.host.recover(since, [self.former, self.verified], LIMIT_S)
        return back.boots, back.cycles

    def play_again(self, whole: bool) -> str:
        """Run the play again, and return what is wrong afterwards."""
        line = self.host.line()
        done = self.host.play(grub_hugepages_reboot_allowed=whole)
        if done.status != 0:
            return done.output[-3000:]
        left = [trace for trace in self.host.traces() if not trace.endswith("boot_trial.lock")]
        if left:
            return f"it left {left}"
        now = self.host.line()
        if whole and now[: len(self.verified)] != self.verified:
            return f"the host runs with {now}"
        if not whole and now != line:
            return f"without consent the host went from {line} to {now}"
        return ""


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def stale(changed: set[str]) -> set[str]:
    """Return which of the files decide how a fault ends."""
    return {path for path in changed if any(f"{path}/".startswith(f"{source}/") for source in SOURCES)}


def earlier(seed: int) -> dict[str, float]:
    """Return the figures to go on from: those that are kept where this machine would find them again, or none."""
    fresh = {"seed": float(seed), **dict.fromkeys(COUNTS, 0.0)}
    if not RESULT.exists():
        return fresh
    before = json.loads(RESULT.read_text(encoding="utf-8"))
    changed = record.changed_since(before)
    if changed is None or stale(changed):
        return fresh
    return {**fresh, **before["figures"]}


@contextlib.contextmanager
def shared(seed: int) -> Iterator[dict[str, float]]:
    """Give the figures, and write what becomes of them; no other run has them meanwhile."""
    with state.host_lock("soak-boot-figures"):
        figures = earlier(seed)
        yield figures
        command = ["python3", "tools/soak_boot.py", "--seed", f"{figures['seed']:.0f}"]
        record.keep("boot-soak", command, figures, RESULT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak until so many faults were made, by this and earlier runs on the same sources."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--faults", type=int, default=200, help="in all")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no fault after so long; 0: no limit")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of a new run")
    parser.add_argument("--pause-while", type=Path, help="begin no fault while this file exists")
    parser.add_argument("--host", default="soak-boot", help="name of the VM")
    options = parser.parse_args(argv)
    if dirty := stale(record.changed_since({"commit": record.commit(), "machine": record.machine()}) or set()):
        parser.error(f"{', '.join(sorted(dirty))}: changed, expected what a commit holds, which the figures can name")
    with shared(options.seed) as figures:
        say(f"seed {figures['seed']:.0f}, so far {json.dumps(figures)}")
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        boot_host(options.host, Path(folder), trim=True) as host,
    ):
        soak = Soak(host, options.seed)
        while earlier(options.seed)["begun"] < options.faults:
            while options.pause_while and options.pause_while.exists():
                time.sleep(1)
            if options.minutes and time.monotonic() - begin > 60 * options.minutes:
                break
            soak.fault()
    figures = earlier(options.seed)
    return 1 if figures["stranded"] or figures["played_again_wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
