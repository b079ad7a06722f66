# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Helpers of llama-server@.service: what an instance runs with, whether it is ready, how far its load is.

``digest N``      print the SHA-256 of the unit files of instance N, as they are on disk
``record N``      keep that digest in the instance's run-time directory: what the process that starts now runs with;
                  where the instance has a store of weights that is not complete, have it loaded and start again
``wait-ready``    wait until a server has loaded its model; ends when the process does
``status N:P...`` print one JSON line that says how far instances N are in filling P huge pages each
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PAGE_BYTES = 1 << 30
RUNTIME = Path("/run/llama-server")
PLANS = Path("/etc/llama-weights")
STORES = Path("/run/llama-weights")
FOLDERS = [Path(f"{root}/systemd/system") for root in ("/etc", "/run", "/usr/local/lib", "/usr/lib")]


def unit(number: int) -> str:
    """Return the unit's name of an instance."""
    return f"llama-server@{number}.service"


def weights_unit(number: int) -> str:
    """Return the name of the unit that fills the store of an instance."""
    return f"llama-weights@{number}.service"


def show(name: str, *properties: str) -> dict[str, str]:
    """Return properties of a unit as systemd shows them."""
    out = subprocess.run(
        ["systemctl", "show", f"--property={','.join(properties)}", name],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def digest(number: int) -> str:
    """Return the SHA-256 of the files on disk that define an instance: the unit's and every drop-in's.

    They are looked up where systemd looks (systemd.unit(5)), because what it has loaded may be older than the disk.
    """
    sha = hashlib.sha256()
    for folder in FOLDERS:
        units = [folder / "llama-server@.service", folder / unit(number)]
        drop_ins = [drop_in for owner in units for drop_in in sorted(folder.glob(f"{owner.name}.d/*.conf"))]
        for path in [*units, *drop_ins]:
            if path.is_file():
                sha.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


def store_problems(number: int) -> list[str]:
    """Return why the store of an instance must not be served, empty where it is complete or there is none."""
    path = PLANS / f"{number}.json"
    if not path.exists():
        return []
    # What is compiled would be a file that no teardown knows.
    sys.dont_write_bytecode = True
    import llama_weights  # noqa: PLC0415 - only beside a store

    try:
        found: list[str] = llama_weights.problems(llama_weights.read_plan(path), STORES / str(number))
    except llama_weights.WeightsError as error:
        found = [str(error)]
    return found


def record(number: int) -> int:
    """Keep the digest for as long as the unit runs: systemd removes the directory when it stops.

    Returns 1 where the store is not what was loaded: restarting its unit loads it again, and starts this one after it.
    """
    found = store_problems(number)
    if found:
        print(f"{'; '.join(found)}; loading the store again: {weights_unit(number)}", file=sys.stderr)
        subprocess.run(["systemctl", "restart", "--no-block", weights_unit(number)], check=False)
        return 1
    target = RUNTIME / str(number) / "configuration"
    fresh = target.with_suffix(".new")
    fresh.write_text(digest(number) + "\n", encoding="ascii")
    fresh.replace(target)
    return 0


def wait_ready(url: str, pid: int) -> int:
    """Return 0 once the server answers that its model is loaded, 1 when its process is gone.

    The unit's start timeout bounds the wait. The certificate is not checked: the address is this host's own, the
    process is known, and the answer holds no secret.
    """
    import ssl  # noqa: PLC0415 - the server waits for the other commands, and need not wait for this
    import urllib.error  # noqa: PLC0415
    import urllib.request  # noqa: PLC0415

    context = ssl._create_unverified_context() if url.startswith("https:") else None  # noqa: S323
    while Path(f"/proc/{pid}").exists():
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5, context=context) as answer:  # noqa: S310
                if answer.status == 200:
                    return 0
        except (urllib.error.URLError, OSError):
            pass  # not listening yet, or 503 while it loads
        time.sleep(0.1)
    print(f"process {pid} ended before the model was loaded", file=sys.stderr)
    return 1


def hugetlb_bytes(pid: int) -> int:
    """Return the bytes of huge pages that a process holds, 0 where it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("HugetlbPages:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def failure(name: str, shown: dict[str, str]) -> dict[str, Any]:
    """Return the status of a unit that gave up, with its last lines of the journal."""
    journal = subprocess.run(
        ["journalctl", "--no-pager", "--output=cat", "--lines=10", f"--unit={name}"],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    said = f"{name} is {shown['ActiveState']} ({shown['SubState']}); its last lines:\n{journal[-1500:]}"
    return {"phase": "failed", "done": 0, "total": None, "message": said}


def store_status(number: int) -> dict[str, Any] | None:
    """Return how far the store of an instance is, or None where it is complete or there is none."""
    if not (PLANS / f"{number}.json").exists():
        return None
    shown = show(weights_unit(number), "ActiveState", "SubState", "Job")
    if shown["ActiveState"] == "active":
        return None
    if shown["ActiveState"] not in ("activating", "reloading") and shown.get("Job", "0") in ("", "0"):
        return failure(weights_unit(number), shown)
    try:
        told = json.loads((STORES / str(number) / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    fresh = time.time() - told.get("updated", 0) < 30
    return {
        "done": told["done"] if fresh else 0,
        "total": told["total"] if fresh else None,
        "message": told["message"] if fresh else "",
    }


def status(wanted: list[tuple[int, int]]) -> dict[str, Any]:
    """Return how far the instances are, or the journal's last lines of one that failed."""
    done = total = 0
    messages = []
    for number, pages in wanted:
        planned = max(pages * PAGE_BYTES, 1)
        store = store_status(number)
        if store is not None:
            if store.get("phase") == "failed":
                return store
            # A byte stays open until the server answers.
            total += (store["total"] or planned) + 1
            done += store["done"]
            messages.append(f"{weights_unit(number)} {store['message']}".strip())
            continue
        total += planned
        shown = show(unit(number), "ActiveState", "SubState", "MainPID", "NRestarts", "Job")
        state = shown["ActiveState"]
        if state == "active":
            done += planned
        elif state == "activating" and shown["SubState"] != "auto-restart" and shown["NRestarts"] == "0":
            messages.append(unit(number))
            done += min(hugetlb_bytes(int(shown["MainPID"])), planned - 1)
        elif state in ("inactive", "deactivating", "failed") and shown.get("Job", "0") not in ("", "0"):
            messages.append(unit(number))
        else:
            return failure(unit(number), shown)
    message = f"waiting for {', '.join(messages)}" if messages else "ready"
    return {"phase": "load", "done": done, "total": total, "unit": "bytes", "message": message}


def pair(text: str) -> tuple[int, int]:
    """Return instance and pages of ``N:P``."""
    number, pages = text.split(":")
    return int(number), int(pages)


def main() -> int:
    """Run one of the helpers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("digest", "record"):
        commands.add_parser(name).add_argument("number", type=int)
    wait = commands.add_parser("wait-ready")
    wait.add_argument("--url", required=True)
    wait.add_argument("--pid", type=int, required=True)
    commands.add_parser("status").add_argument("wanted", type=pair, nargs="+")
    options = parser.parse_args()
    if options.command == "digest":
        print(digest(options.number))
    elif options.command == "record":
        return record(options.number)
    elif options.command == "wait-ready":
        return wait_ready(options.url, options.pid)
    else:
        print(json.dumps({**status(options.wanted), "updated": time.time()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
