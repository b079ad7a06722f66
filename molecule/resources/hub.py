# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Serve the trained model to a scenario's hosts from a hub on loopback, and pin it.

usage: hub.py start|stop DIRECTORY [--files=N]

With --files the model is that many files, each of which needs one 1 GiB page of the machine, instead of three.

DIRECTORY then holds hub.pid, hub.url (with the address under which lab hosts see this machine) and recite.lock.json.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
REPO = "cpullm/recite"


def start(directory: Path, files: str | None) -> None:
    """Start the hub, wait until it listens, and write the lock."""
    stop(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ready = directory / "hub.ready"
    ready.unlink(missing_ok=True)
    model = CLONE / "tests" / "models" / "recite"
    if files:
        shards = sorted(map(str, model.glob("*.gguf")))
        model = directory / "merged"
        model.mkdir(exist_ok=True)
        argv = [sys.executable, "-m", "tools.model.merge", files, *shards, str(model / "recite.gguf")]
        subprocess.run(argv, cwd=CLONE, check=True)
    argv = [sys.executable, str(CLONE / "tests/support/hub.py"), f"--repo={REPO}={model}", f"--ready-file={ready}"]
    with (directory / "hub.log").open("w") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    (directory / "hub.pid").write_text(str(process.pid))
    deadline = time.monotonic() + 20
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the hub does not start: {(directory / 'hub.log').read_text()}")
        time.sleep(0.1)
    url = ready.read_text().strip()
    (directory / "hub.url").write_text(url.replace("127.0.0.1", "10.0.2.2"))
    lock = {"lock_file": directory / "recite.lock.json", "lock_repo": REPO, "lock_endpoint": url, "lock_name": "recite"}
    words = [f"--extra-vars={key}={value}" for key, value in lock.items()]
    subprocess.run(
        ["ansible-playbook", "playbooks/lock.yml", *words],
        cwd=CLONE,
        check=True,
        env={**os.environ, "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg")},
    )


def stop(directory: Path) -> None:
    """End the hub, if this is still its process."""
    try:
        pid = int((directory / "hub.pid").read_text())
        if b"support/hub.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    except OSError:
        pass
    (directory / "hub.pid").unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1] == "start":
        start(Path(sys.argv[2]), next(iter(sys.argv[3:]), None))
    else:
        stop(Path(sys.argv[2]))
