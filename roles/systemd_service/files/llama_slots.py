# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep what slots of llama-server have read across a restart: ``save`` before it ends, ``restore`` when it is ready.

A file is named for what it fits, so that another model or another type of cache never meets it. It gets that name only
when it is whole, and loses it before it is read: a file on which the server dies is not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
from pathlib import Path


def post(port: int, slot: int, action: str, name: str, timeout_s: float) -> dict[str, object]:
    """Return the server's answer, as an object. Raises OSError, HTTPException and ValueError where it refuses."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        words = json.dumps({"filename": name})
        connection.request("POST", f"/slots/{slot}?action={action}", words, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {body[:200].decode(errors='replace')}")
        found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError(f"found {body[:200]!r}, expected an object")
    return found


def save(folder: Path, key: str, port: int, slots: int) -> None:
    """Write each slot's file, and remove those of other keys: there is room for one generation."""
    for old in folder.iterdir():
        if not old.name.startswith(f"{key}-"):
            old.unlink()
    for slot in range(slots):
        fresh = f"{key}-{slot}.new"
        try:
            tokens = post(port, slot, "save", fresh, 40).get("n_saved")
        except (OSError, ValueError, http.client.HTTPException) as error:
            print(f"slot {slot} is not kept: {error}")
            (folder / fresh).unlink(missing_ok=True)
            continue
        if tokens:
            (folder / fresh).replace(folder / f"{key}-{slot}.bin")
            print(f"slot {slot}: kept {tokens} tokens")
        else:
            (folder / fresh).unlink(missing_ok=True)


def restore(folder: Path, key: str, port: int, slots: int) -> None:
    """Let each slot read its file, once."""
    for slot in range(slots):
        file, once = folder / f"{key}-{slot}.bin", f"{key}-{slot}.once"
        if not file.exists():
            continue
        file.replace(folder / once)
        try:
            print(f"slot {slot}: has {post(port, slot, 'restore', once, 300).get('n_restored')} tokens again")
        except (OSError, ValueError, http.client.HTTPException) as error:
            print(f"slot {slot} starts empty: {error}")
        (folder / once).unlink(missing_ok=True)


def main() -> int:
    """Run one of the two. A cache that is lost costs time and nothing else, so no failure ends the service."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["save", "restore"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    options = parser.parse_args()
    try:
        options.folder.mkdir(mode=0o700, exist_ok=True)
        run = save if options.action == "save" else restore
        run(options.folder, options.key, options.port, options.slots)
    except OSError as error:
        print(f"prompts are not kept: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
