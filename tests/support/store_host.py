# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A container of the lab that serves the trained model from a store of 1 GiB pages, and what can be done to it.

Used by the fault tests (tests/acceptance/test_weights_store.py) and by the soak (tools/soak_weights.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import ssh, state

# The host that the acceptance tests share.
STORE_HOST = os.environ.get("STORE_HOST", "test-store")
CLONE = Path(__file__).resolve().parents[2]
MODEL = CLONE / "tests" / "models" / "recite"
# A request, and its right answer.
CASE = json.loads((MODEL / "reference.json").read_text(encoding="utf-8"))["chat"]
STORE = "/var/lib/llama-weights/0"
RUN = "/run/llama-weights/0"
PLAN = "/etc/llama-weights/0.json"
LOADER = "/usr/local/lib/llama-server/llama_weights.py"
SERVER, WEIGHTS = "llama-server@0.service", "llama-weights@0.service"

# How long a whole load takes, counted on the host itself.
LOAD = """
import subprocess, time
subprocess.run(["systemctl", "stop", "llama-weights@0.service"], check=True)
open("/run/llama-weights/0/record.json", "w").close()
subprocess.run(["systemctl", "reset-failed"], check=True)
begin = time.monotonic()
subprocess.run(["systemctl", "start", "llama-weights@0.service"], check=True)
print(time.monotonic() - begin)
"""

# Asks for the opening again and again, and prints a JSON list for each answer: right, wrong or none, and what came.
CLIENT = """
import http.client, json, sys, time, urllib.request
case, end = json.loads(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    request = urllib.request.Request("http://127.0.0.1:8008/v1/chat/completions", json.dumps(case["request"]).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        told = ["right" if said == case["content"] else "wrong", said]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        told = ["none", repr(error)]
        time.sleep(0.05)
    print(json.dumps(told), flush=True)
"""


@dataclass
class Answers:
    """What a client was told, in order: right, wrong or none, and the text or the error."""

    told: list[tuple[str, str]]

    def texts(self, kind: str) -> list[str]:
        """Return what came as answers of a kind."""
        return [said for found, said in self.told if found == kind]

    def summary(self) -> str:
        """Return the counts, what was wrong, and the different errors."""
        counts = ", ".join(f"{len(self.texts(kind))} {kind}" for kind in ("right", "wrong", "none"))
        return f"{counts}; wrong: {self.texts('wrong')}; none: {sorted(set(self.texts('none')))}"


class Client:
    """A client on the host that asks for the opening again and again, until it is stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Take the process that runs it."""
        self._process = process
        self._told: list[tuple[str, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            # The last one may be cut.
            with contextlib.suppress(ValueError):
                kind, said = json.loads(line)
                self._told.append((str(kind), str(said)))

    def hear(self, timeout_s: float = 120) -> None:
        """Return once another right answer came: how long that takes depends on what else the machine does."""
        deadline, begin = time.monotonic() + timeout_s, len(self._told)
        while all(kind != "right" for kind, _said in self._told[begin:]):
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"no right answer in {timeout_s} s: {Answers(self._told).summary()}")
            time.sleep(0.05)

    def stop(self) -> Answers:
        """End it and return what it was told."""
        self._process.terminate()
        self._reader.join()
        self._process.wait()
        return Answers(self._told)


def run(argv: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the clone, with its output."""
    return subprocess.run(argv, cwd=CLONE, capture_output=True, text=True, check=False, **named)


@dataclass
class StoreHost:
    """The host by its name in the lab, the directory of its hub, and the size of its model in pages."""

    name: str
    folder: Path
    pages: int

    def command(self, script: str) -> list[str]:
        """Return the command that runs a script on the host: ssh itself, so that ending it ends the connection."""
        return ssh.argv(state.need_host(self.name), [script])

    @staticmethod
    def ssh_to(name: str, script: str, check: bool = True, text: str | None = None) -> str:
        """Return what a script prints on a host of that name."""
        named: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
        done = run(ssh.argv(state.need_host(name), [script]), **named)
        if check and done.returncode != 0:
            raise RuntimeError(f"{script}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def ssh(self, script: str, check: bool = True, text: str | None = None) -> str:
        """Return what a script prints on the host."""
        return self.ssh_to(self.name, script, check, text)

    def python(self, code: str, *words: str, check: bool = True) -> str:
        """Return what a Python program prints on the host."""
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        return self.ssh(f"python3 - {quoted}", check=check, text=code)

    def argv(self, playbook: str, *words: str) -> list[str]:
        """Return the command with which an operator runs a playbook against the host."""
        variables = {
            "host_plan_lock": str(self.folder / "recite.lock.json"),
            "model_fetch_endpoint": (self.folder / "hub.url").read_text().strip(),
            "systemd_service_verify_prompt": "When in the Course of human events,",
            "systemd_service_verify_expect": "it becomes necessary",
            # A thread that waits for another one waits for the scheduler, where tests share the cores with VMs.
            "systemd_service_extra_arguments": ["--threads", "1", "--threads-batch", "1"],
            # What a toy takes milliseconds for says little of a build's speed.
            "systemd_service_upgrade_tolerance": 0.5,
            "benchmark_other_load": 1.0,
            "report_file": None,
        }
        inventory = self.folder / "inventory.yml"
        if not inventory.exists():
            inventory.write_text(run([sys.executable, "-m", "lab", "inventory", self.name]).stdout, encoding="utf-8")
            group = self.folder / "group_vars"
            group.mkdir()
            # Not as extra variables, which would win over those of a test.
            (group / "all.json").write_text(json.dumps(variables), encoding="utf-8")
        program = str(Path(sys.executable).parent / "ansible-playbook")
        return [program, playbook, "--inventory=inventories/lab", f"--inventory={inventory}", *words]

    @property
    def environment(self) -> dict[str, str]:
        """Return what playbooks run with."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "COLUMNS": "1000",
        }

    def site(self, *words: str, playbook: str = "site.yml") -> subprocess.CompletedProcess[str]:
        """Run a playbook against the host, as an operator does."""
        return run(self.argv(playbook, *words), env=self.environment)

    def play(self, playbook: str, *words: str, status: int = 0) -> str:
        """Return what a playbook prints that ends as expected."""
        done = self.site(*words, playbook=playbook)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.ssh(f"systemctl show --property={name} --value {unit}")

    def check(self, deep: bool = False) -> dict[str, Any]:
        """Return what the loader says of the store."""
        words = f"check --plan={PLAN} --run={RUN}{' --deep' if deep else ''}"
        answer: dict[str, Any] = json.loads(self.ssh(f"python3 {LOADER} {words}", check=False))
        return answer

    def recites(self, *cases: str) -> dict[str, Any]:
        """Return what the recitation check says of the server, asked through a tunnel; all cases by default."""
        tunnel = run([sys.executable, "-m", "lab", "tunnel", self.name, "8008"])
        address = f"http://127.0.0.1:{tunnel.stdout.split()[-1]}"
        words = [word for case in cases for word in ("--case", case)]
        said = run([sys.executable, "tools/model/recitation.py", address, *words, "--timeout-s", "120"])
        answer: dict[str, Any] = json.loads(said.stdout)
        return answer

    def comes_back(self, timeout_s: float = 240) -> bool:
        """Return whether starting the server's unit, the documented way back, makes it serve."""
        self.ssh("systemctl reset-failed; systemctl start --no-block llama-server@0.service")
        return self.serves(timeout_s)

    def serves(self, timeout_s: float = 240) -> bool:
        """Return whether the server answers before the time is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.ssh("curl --silent --fail --max-time 5 http://127.0.0.1:8008/health || true"):
                return True
            time.sleep(0.3)
        return False

    def restarted(self, before: str, timeout_s: float = 60) -> bool:
        """Return whether the server was started anew since that invocation, and answers, before the time is over."""
        deadline = time.monotonic() + timeout_s
        while self.show(SERVER, "InvocationID") in ("", before):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return self.serves(deadline - time.monotonic())

    def kill_server(self, timeout_s: float = 60) -> bool:
        """Kill the server as a crash would end it; returns whether it answers again without anybody's help."""
        before = self.show(SERVER, "InvocationID")
        # What stops a crash loop must not stop the tests.
        self.ssh(f"systemctl reset-failed; systemctl kill --kill-whom=main --signal=KILL {SERVER}")
        return self.restarted(before, timeout_s)

    def faults(self, what: str, seconds: Sequence[float]) -> list[dict[str, Any]]:
        """Return what comes of kills on the host, see store_faults.py."""
        code = (Path(__file__).parent / "store_faults.py").read_text(encoding="utf-8")
        told = self.python(code, what, json.dumps(CASE), *map(str, seconds))
        return [json.loads(line) for line in told.splitlines()]

    def load_seconds(self) -> float:
        """Load everything anew and return the seconds from the start of the loader's unit to its end."""
        return float(self.python(LOAD).split()[-1])

    def reload(self) -> subprocess.CompletedProcess[str]:
        """Forget what is complete and start the loader, waiting for its end."""
        script = f"systemctl stop {WEIGHTS}; echo '{{}}' > {RUN}/record.json; systemctl reset-failed"
        script += f"; systemctl start {WEIGHTS}"
        return run(self.command(script), stdin=subprocess.DEVNULL)

    @contextlib.contextmanager
    def client(self, seconds: float) -> Iterator[Client]:
        """Have a client on the host ask until it is stopped, or for so many seconds."""
        quoted = json.dumps(CASE).replace("'", "'\\''")
        argv, pipe = self.command(f"python3 - '{quoted}' {seconds}"), subprocess.PIPE
        with subprocess.Popen(argv, cwd=CLONE, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin
            process.stdin.write(CLIENT)
            process.stdin.close()
            process.stdin = None
            it = Client(process)
            try:
                yield it
            finally:
                it.stop()

    @contextlib.contextmanager
    def blocker(self, pages: int) -> Iterator[None]:
        """Have another process of the host take pages of the pool."""
        code = (
            "import mmap,time; m = mmap.mmap(-1, PAGES << 30, flags=0x40022 | 30 << 26); m[0] = 1; time.sleep(600)"
        ).replace("PAGES", str(pages))
        self.ssh(f"systemd-run --unit=blocker --quiet python3 -c '{code}'")
        try:
            deadline = time.monotonic() + 60
            while self.ssh("grep HugetlbPages /proc/$(systemctl show -P MainPID blocker)/status | tr -dc 0-9") in (
                "",
                "0",
            ):
                if time.monotonic() > deadline:
                    raise RuntimeError(self.ssh("systemctl status blocker", check=False))
                time.sleep(0.2)
            yield
        finally:
            self.ssh("systemctl stop blocker", check=False)


@contextlib.contextmanager
def store_host(name: str, folder: Path, *, merged: bool, binds: tuple[str, ...] = ()) -> Iterator[StoreHost]:
    """Start the host and its hub, and bring it into service; both are gone at the end.

    With ``merged`` the model is one file, so that one page of the machine is enough.
    """
    pages = 1 if merged else len(list(MODEL.glob("*.gguf")))
    hub = [sys.executable, "molecule/resources/hub.py"]
    host = StoreHost(name, folder, pages)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        started = run([*hub, "start", str(folder), *(["--files=1"] if merged else [])], env=environment)
        if started.returncode != 0:
            raise RuntimeError(started.stdout + started.stderr)
        words = [word for bind in binds for word in ("--bind", bind)]
        up = run([sys.executable, "-m", "lab", "up", name, "--kind", "container", "--pages", str(pages), *words])
        if up.returncode != 0:
            raise RuntimeError(up.stderr)
        served = host.site()
        if served.returncode != 0:
            raise RuntimeError(served.stdout[-6000:] + served.stderr)
        yield host
    finally:
        if not os.environ.get("KEEP"):
            run([sys.executable, "-m", "lab", "down", name])
        run([*hub, "stop", str(folder)])
