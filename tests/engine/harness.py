# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the engine's tests are made of: the machine's pool of 1 GiB pages, a split model, and servers."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import pages as lab_pages

GIB = 1 << 30
POOL = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB")
OWNER = "engine-tests"


def cache() -> Path:
    """Return the folder that outlives the checkout."""
    return Path(os.environ.get("CPULLM_CACHE") or Path.home() / ".cache" / "cpullm")


def count(name: str) -> int:
    """Return one number of the pool of 1 GiB pages."""
    return int((POOL / name).read_text(encoding="ascii"))


def free_pages() -> int:
    """Return the pages that are neither in use nor promised."""
    return count("free_hugepages") - count("resv_hugepages")


def wait_for_free(pages: int, timeout_s: float = 10) -> None:
    """Wait until that many pages are free: what a process had comes back while it ends."""
    deadline = time.monotonic() + timeout_s
    while free_pages() != pages:
        assert time.monotonic() < deadline, f"{free_pages()} pages are free, expected {pages}"
        time.sleep(0.05)


class Pool:
    """Sets how many pages are free, whatever else the machine's pool holds."""

    def __init__(self) -> None:
        self._blocker: mmap.mmap | None = None

    def free_exactly(self, wanted: int) -> None:
        """Leave `wanted` pages free: reserve what lacks, promise to ourselves what is too much."""
        self._unblock()
        lacking = wanted - free_pages()
        if lacking > 0:
            lab_pages.reserve(lacking, OWNER)
        elif lacking < 0:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000 | 30 << 26  # MAP_HUGETLB | MAP_HUGE_1GB
            self._blocker = mmap.mmap(-1, -lacking * GIB, flags=flags)
        assert free_pages() == wanted

    def _unblock(self) -> None:
        if self._blocker is not None:
            self._blocker.close()
            self._blocker = None

    def close(self) -> None:
        """Give everything back."""
        self._unblock()
        lab_pages.release(OWNER)


@dataclass(frozen=True)
class Model:
    """A split model."""

    shards: tuple[Path, ...]

    @property
    def pages(self) -> int:
        """Pages of 1 GiB: each shard is rounded up by itself."""
        return sum(-(-shard.stat().st_size // GIB) for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.stat().st_size for shard in self.shards)


def open_to_all(path: Path) -> Path:
    """Let every user of the machine reach a folder; pytest's own are closed to others."""
    for folder in (path, *path.parents):
        if folder.stat().st_uid == os.getuid() and folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o755)
    return path


@dataclass
class Server:
    """A llama-server that has ended, or answers."""

    process: subprocess.Popen[bytes]
    log_file: Path
    port: int
    ready: bool = False

    @property
    def log(self) -> str:
        """Everything it has said so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def status(self, key: str) -> int:
        """Return a value of /proc/PID/status in KiB."""
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path(f"/proc/{self.process.pid}/status").read_text("ascii"), re.M)
        assert found
        return int(found[1])

    def maps(self) -> str:
        """Return its memory map."""
        return Path(f"/proc/{self.process.pid}/maps").read_text(encoding="utf-8")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the answer to a request, as JSON."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def complete(self) -> list[tuple[int, float]]:
        """Return the tokens of a greedy completion with their log-probabilities, to the last bit."""
        body = {"prompt": "The ", "n_predict": 24, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        answer = self.ask("/completion", body)
        return [(entry["id"], entry["logprob"]) for entry in answer["completion_probabilities"]]

    def stop(self) -> None:
        """End it, and wait until it is gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass
class Servers:
    """Starts servers, and ends them all."""

    engine: Path
    folder: Path
    running: list[Server] = field(default_factory=list)

    def start(
        self,
        model: Model,
        arguments: Sequence[str] = (),
        wrapper: Sequence[str] = (),
        **environment: str,
    ) -> Server:
        """Start a server, as the argument of a wrapper command if there is one; wait until it answers or ends."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [
            *wrapper,
            str(self.engine / "llama-server"),
            *("-m", str(model.shards[0]), "--host", "127.0.0.1", "--port", str(port)),
            *("-t", "2", "-c", "256", "-np", "1", "--fit", "off", "-lv", "4"),
            *arguments,
        ]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_")}
        log_file = self.folder / f"server-{len(self.running)}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**clean, **environment},
            )
        server = Server(process, log_file, port)
        self.running.append(server)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not server.ready:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                server.ready = server.ask("/health")["status"] == "ok"
            time.sleep(0.05)
        assert server.ready or process.poll() is not None, server.log
        return server
