# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kills loaders of a store, or servers under load, on the host itself: an ssh connection takes longer than a load.

usage: store_faults.py loaders|servers CASE SECONDS ...

CASE is a request to the server and its right answer in JSON. A loader is killed after so many seconds of its work; then
the server's unit is started, which is the documented way back. A server is killed so many seconds after it was up, and
must come back by itself. Prints a JSON line for each.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

SERVER, WEIGHTS = "llama-server@0.service", "llama-weights@0.service"
FRONT = "http://127.0.0.1:8008"


def systemctl(*words: str) -> int:
    """Run systemctl and return its exit status."""
    return subprocess.run(["systemctl", *words], check=False, capture_output=True).returncode


def show(unit: str, name: str) -> str:
    """Return a property of a unit."""
    argv = ["systemctl", "show", f"--property={name}", "--value", unit]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def serves(deadline: float, other_than: str | None = None) -> bool:
    """Return whether the front has a server, of another invocation than one, before a point in time."""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{FRONT}/health", timeout=5):
                if other_than is None or show(SERVER, "InvocationID") not in ("", other_than):
                    return True
        except OSError:
            pass
        time.sleep(0.05)
    return False


def ask(case: dict[str, Any]) -> tuple[str, str]:
    """Return right, wrong or none, and what came."""
    body = json.dumps(case["request"]).encode()
    request = urllib.request.Request(f"{FRONT}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        return "none", repr(error)
    return "right" if said == case["content"] else "wrong", said


def loader(case: dict[str, Any], after_s: float) -> dict[str, Any]:
    """Begin a whole load, kill the loader, and go the way back; returns what was left and what came of it."""
    systemctl("stop", WEIGHTS)
    with open("/run/llama-weights/0/record.json", "w", encoding="ascii"):
        pass  # nothing is known as complete
    systemctl("reset-failed")
    systemctl("start", "--no-block", SERVER)
    time.sleep(after_s)
    killed = systemctl("kill", "--kill-whom=main", "--signal=KILL", WEIGHTS) == 0
    # For systemd it has ended a little later.
    end = time.monotonic() + 30
    while killed and show(WEIGHTS, "ActiveState") == "activating" and time.monotonic() < end:
        time.sleep(0.02)
    left, served = show(WEIGHTS, "ActiveState"), show(SERVER, "ActiveState")
    systemctl("reset-failed")
    systemctl("start", "--no-block", SERVER)
    back = serves(time.monotonic() + 240)
    kind, said = ask(case)
    return {"after_s": after_s, "left": left, "server": served, "back": back, "answer": kind, "said": said}


def servers(case: dict[str, Any], delays: list[float]) -> None:
    """Kill servers one after the other while a client asks without a pause."""
    told: list[tuple[str, str]] = []
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            told.append(ask(case))

    thread = threading.Thread(target=client)
    thread.start()
    for delay in delays:
        time.sleep(delay)
        before = show(SERVER, "InvocationID")
        # What stops a crash loop must not stop this.
        systemctl("reset-failed")
        killed = systemctl("kill", "--kill-whom=main", "--signal=KILL", SERVER) == 0
        back = serves(time.monotonic() + 60, before)
        if not back:
            systemctl("start", SERVER)
        print(json.dumps({"after_s": delay, "killed": killed, "back": back}), flush=True)
    ended.set()
    thread.join()
    told.append(ask(case))
    print(json.dumps({"told": told}), flush=True)


def main() -> None:
    """Kill what was asked for."""
    what, case, seconds = sys.argv[1], json.loads(sys.argv[2]), list(map(float, sys.argv[3:]))
    if what == "servers":
        servers(case, seconds)
    else:
        for after_s in seconds:
            print(json.dumps(loader(case, after_s)), flush=True)


if __name__ == "__main__":
    main()
