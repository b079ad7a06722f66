#!/usr/bin/env python3
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kill the loader of the weights, and the server under load, again and again, and count what is wrong afterwards.

A loader counts as killed where it had not ended yet. Its unit is then started again, as an operator would: the server
must recite the trained text.
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

CLONE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CLONE))

from bench import record  # noqa: E402 - the clone is no installed package
from tests.support.store_host import StoreHost, store_host  # noqa: E402

COUNTS = (
    "loader_rounds",
    "loader_kills",
    "server_kills",
    "right_answers",
    "dropped_answers",
    "wrong_tokens",
    "stuck_states",
)
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


def kill_loaders(host: StoreHost, state: State, whole_s: float) -> None:
    """Kill some loaders at random points of their work, and see that the documented way back works."""
    chance = state.chance("loader_rounds")
    for found in host.faults("loaders", [chance.uniform(0, whole_s) for _ in range(BATCH)]):
        state.add(
            loader_rounds=1,
            loader_kills=int(found["left"] == "failed"),
            stuck_states=int(not found["back"] or found["answer"] == "none"),
            right_answers=int(found["answer"] == "right"),
            wrong_tokens=int(found["answer"] == "wrong"),
        )
        say(f"loader {state.data['loader_kills']} of round {state.data['loader_rounds']}: {json.dumps(found)}")
    if not host.check(deep=True)["complete"] or not host.recites("opening")["ok"]:
        say("WRONG: the store differs from the model")
        state.add(wrong_tokens=1)


def kill_servers(host: StoreHost, state: State, count: int) -> None:
    """Kill some servers under load; each must come back by itself."""
    chance = state.chance("server_kills")
    *kills, answers = host.faults("servers", [chance.uniform(0.2, 2) for _ in range(count)])
    kinds = [kind for kind, _said in answers["told"]]
    for kind, said in answers["told"]:
        if kind == "wrong":
            say(f"WRONG: {said!r}")
    state.add(
        server_kills=sum(found["killed"] for found in kills),
        stuck_states=sum(not found["back"] for found in kills),
        right_answers=kinds.count("right"),
        wrong_tokens=kinds.count("wrong"),
        dropped_answers=kinds.count("none"),
    )
    errors = sorted({said for kind, said in answers["told"] if kind == "none"})
    say(f"servers {state.data['server_kills']}: {kinds.count('right')} right, {kinds.count('none')} dropped: {errors}")


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
        whole_s = host.load_seconds()
        say(f"a whole load takes {whole_s:.2f} s")
        host.comes_back()
        while state.data["loader_kills"] < options.loader_kills:
            kill_loaders(host, state, whole_s)
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
