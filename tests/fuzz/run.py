# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run libFuzzer on one target, with its own options: python -m tests.fuzz.run TARGET [-OPTION=VALUE ...] [FOLDER ...].

Needs atheris alone beside the clone; tools/fuzz.py starts it, and watches over its time and memory.
"""

from __future__ import annotations

import functools
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

CLONE = Path(__file__).resolve().parents[2]
for entry in (CLONE, CLONE / ".collections"):
    sys.path.insert(0, str(entry))

with atheris.instrument_imports(
    include=["ansible_collections.cpullm.epyc.plugins.module_utils"], enable_loader_override=False
):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutate import mutate_json  # noqa: E402  (the clone is not installed)


def _mutate_json(data: bytes, longest: int, seed: int) -> bytes:
    """Change values of a JSON text mostly, and bytes of it or of anything else."""
    changed = mutate_json(data, seed) if seed % 4 else None
    return atheris.Mutate(data, longest) if changed is None or len(changed) > longest else changed


# CPU time for one input. libFuzzer's own limit counts by the clock, which a busy machine lets pass.
LIMIT_S = 10.0


def _end(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"an input took more than {LIMIT_S:g} s of CPU time")


def _run(run: Callable[[bytes], None], data: bytes) -> None:
    """Call a target; its error ends the process, which libFuzzer's timer must not do before the input is written."""
    try:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        run(data)
        signal.setitimer(signal.ITIMER_PROF, 0)
    except BaseException:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise


def main() -> None:
    """Hand over to libFuzzer, which ends the process itself."""
    name = sys.argv[1]
    target = TARGETS[name]
    # libFuzzer starts itself again for a merge, by this word and a shell.
    again = f"{shlex.quote(sys.executable)} -m tests.fuzz.run {name}"
    options = {"custom_mutator": _mutate_json} if target.json else {}
    atheris.Setup([again, f"-max_len={target.longest}", *sys.argv[2:]], functools.partial(_run, target.run), **options)
    signal.signal(signal.SIGPROF, _end)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
