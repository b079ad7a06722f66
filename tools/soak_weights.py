#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kill the loader of the weights, and the server under load, again and again, and count what is wrong afterwards.

After each killed loader the unit is started again, as an operator would: the server must then recite the trained text.
After each killed server nobody does anything: it must come back by itself, and no answer may ever be another text.
The state is kept after each round, so that a run can be stopped and started again; it prints its seed.

    python3 tools/soak_weights.py --loader-kills 100 --server-kills 100
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CLONE))

from bench import record  # noqa: E402 - the clone is no installed package
from tests.support.store_host import SERVER, StoreHost, store_host  # noqa: E402

COUNTS = ("loader_kills", "loaders_killed_midway", "server_kills", "right_answers", "wrong_tokens", "stuck_states")
BATCH = 10


class State:
    """What was counted so far, in a file."""

    def __init__(self, path: Path, seed: int) -> None:
        """Go on with what the file holds, else begin with a seed."""
        self.path = path
        self.data: dict[str, int] = {"seed": seed, **dict.fromkeys(COUNTS, 0)}
        if path.exists():
            self.data.update(json.loads(path.read_text(encoding="utf-8")))

    def add(self, **counts: int) -> None:
        """Add to counts and keep them."""
        for name, count in counts.items():
            self.data[name] += count
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text(json.dumps(self.data) + "\n", encoding="utf-8")
        fresh.replace(self.path)

    def chance(self, kind: str) -> random.Random:
        """Return the random numbers of the next round: the same ones whether or not the run was stopped before."""
        return random.Random(f"{self.data['seed']} {kind} {self.data[kind]}")  # noqa: S311 - no secret


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def answers(host: StoreHost) -> bool:
    """Return whether the server recites the text that was learnt."""
    found: dict[str, Any] = host.recites("opening")
    if not found["ok"]:
        say(f"wrong: {json.dumps(found)[:2000]}")
    return bool(found["ok"])


def kill_loader(host: StoreHost, state: State, whole_s: float) -> None:
    """Kill one loader at a random point, and see that the documented way back works."""
    after = state.chance("loader_kills").uniform(0, 1.1 * whole_s)
    left = host.kill_loader(after)
    back = host.comes_back()
    right = back and answers(host)
    if back and state.data["loader_kills"] % BATCH == 0:
        right = right and bool(host.check(deep=True)["complete"])
    state.add(
        loader_kills=1,
        loaders_killed_midway=int(left == "failed"),
        stuck_states=int(not back),
        right_answers=int(right),
        wrong_tokens=int(back and not right),
    )
    say(
        f"loader {state.data['loader_kills']}: killed after {after:.2f} s, left {left}, {'right' if right else 'WRONG'}"
    )


def kill_servers(host: StoreHost, state: State, count: int) -> None:
    """Kill some servers under load; each must come back by itself."""
    chance = state.chance("server_kills")
    stuck = 0
    with host.client(600) as client:
        for number in range(count):
            time.sleep(chance.uniform(0.2, 2))
            # What stops a crash loop must not stop the soak.
            host.ssh(f"systemctl reset-failed; systemctl kill --kill-whom=main --signal=KILL {SERVER}")
            if not host.serves(60):
                stuck += 1
                say(f"server {state.data['server_kills'] + number + 1}: STUCK {host.show(SERVER, 'ActiveState')}")
                host.comes_back()
        client.terminate()
        words = client.communicate()[0].split()
    right = answers(host)
    state.add(
        server_kills=count,
        stuck_states=stuck,
        right_answers=words.count("right") + int(right),
        wrong_tokens=words.count("wrong") + int(not right),
    )
    say(f"servers {state.data['server_kills']}: {words.count('right')} right, {words.count('none')} dropped answers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak, and write the results when it is whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--loader-kills", type=int, default=100)
    parser.add_argument("--server-kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of a new run")
    parser.add_argument("--state", type=Path, default=CLONE / "build" / "soak-weights.json", help="to go on from")
    parser.add_argument(
        "--merged", action="store_true", help="the model as one file: one page of 1 GiB instead of three"
    )
    parser.add_argument("--host", default="soak-weights", help="name of the container")
    parser.add_argument("--output", type=Path, help="where the results go, by default bench/results/")
    options = parser.parse_args(argv)
    options.state.parent.mkdir(parents=True, exist_ok=True)
    state = State(options.state, options.seed)
    say(f"seed {state.data['seed']}, so far {state.data}")
    with (
        tempfile.TemporaryDirectory() as folder,
        store_host(options.host, Path(folder), merged=options.merged) as host,
    ):
        begin = time.monotonic()
        host.reload()
        whole_s = time.monotonic() - begin
        say(f"a whole load takes {whole_s:.1f} s")
        host.comes_back()
        while state.data["loader_kills"] < options.loader_kills:
            kill_loader(host, state, whole_s)
        while state.data["server_kills"] < options.server_kills:
            kill_servers(host, state, min(BATCH, options.server_kills - state.data["server_kills"]))
    command = ["python3", "tools/soak_weights.py", "--seed", str(state.data["seed"])]
    command += ["--loader-kills", str(options.loader_kills), "--server-kills", str(options.server_kills)]
    figures = {name: float(state.data[name]) for name in COUNTS}
    record.keep("weights-soak", command + (["--merged"] if options.merged else []), figures, options.output)
    options.state.unlink()
    return 1 if state.data["wrong_tokens"] or state.data["stuck_states"] else 0


if __name__ == "__main__":
    sys.exit(main())
