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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[2]
MODEL = CLONE / "tests" / "models" / "recite"
STORE = "/var/lib/llama-weights/0"
RUN = "/run/llama-weights/0"
PLAN = "/etc/llama-weights/0.json"
LOADER = "/usr/local/lib/llama-server/llama_weights.py"
SERVER, WEIGHTS = "llama-server@0.service", "llama-weights@0.service"

# Kills the loader after so many seconds, counted on the host itself: an ssh connection takes longer than a load.
KILL_AFTER = """
import subprocess, sys, time
subprocess.run(["systemctl", "stop", "llama-weights@0.service"], check=True)
open("/run/llama-weights/0/record.json", "w").close()
subprocess.run(["systemctl", "reset-failed"], check=True)
subprocess.run(["systemctl", "start", "--no-block", "llama-server@0.service"], check=True)
time.sleep(float(sys.argv[1]))
done = subprocess.run(["systemctl", "kill", "--kill-whom=main", "--signal=KILL", "llama-weights@0.service"],
                      capture_output=True, check=False)
shown = subprocess.run(["systemctl", "show", "--property=ActiveState", "--value", "llama-weights@0.service"],
                       capture_output=True, text=True, check=True).stdout.strip()
print(done.returncode, shown)
"""

# Asks for the opening again and again, and prints a line for each answer: right, wrong or none.
CLIENT = """
import json, sys, time, urllib.request
case, end = json.loads(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    request = urllib.request.Request("http://127.0.0.1:8008/v1/chat/completions", json.dumps(case["request"]).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        print("right" if said == case["content"] else "wrong", flush=True)
    except (OSError, ValueError, KeyError):
        print("none", flush=True)
        time.sleep(0.05)
"""


def run(argv: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the clone, with its output."""
    return subprocess.run(argv, cwd=CLONE, capture_output=True, text=True, check=False, **named)


@dataclass
class StoreHost:
    """The host by its name in the lab, the directory of its hub, and the size of its model in pages."""

    name: str
    folder: Path
    pages: int

    def ssh(self, script: str, check: bool = True, text: str | None = None) -> str:
        """Return what a script prints on the host."""
        named: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
        done = run([sys.executable, "-m", "lab", "ssh", self.name, "--", script], **named)
        if check and done.returncode != 0:
            raise RuntimeError(f"{script}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def python(self, code: str, *words: str, check: bool = True) -> str:
        """Return what a Python program prints on the host."""
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        return self.ssh(f"python3 - {quoted}", check=check, text=code)

    def site(self, *words: str, playbook: str = "site.yml") -> subprocess.CompletedProcess[str]:
        """Run a playbook against the host, as an operator does."""
        variables = {
            "host_plan_lock": str(self.folder / "recite.lock.json"),
            "model_fetch_endpoint": (self.folder / "hub.url").read_text().strip(),
            "systemd_service_verify_prompt": "When in the Course of human events,",
            "systemd_service_verify_expect": "it becomes necessary",
            "report_file": None,
        }
        (self.folder / "inventory.yml").write_text(
            run([sys.executable, "-m", "lab", "inventory", self.name]).stdout, encoding="utf-8"
        )
        inventories = ["--inventory=inventories/lab", f"--inventory={self.folder / 'inventory.yml'}"]
        program = str(Path(sys.executable).parent / "ansible-playbook")
        argv = [program, playbook, *inventories, f"--extra-vars={json.dumps(variables)}", *words]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
        }
        return run(argv, env=environment)

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

    def kill_loader(self, after_s: float) -> str:
        """Begin a whole load and kill the loader after so many seconds; returns the state of its unit then."""
        return self.python(KILL_AFTER, str(after_s)).split()[-1]

    def reload(self) -> subprocess.CompletedProcess[str]:
        """Forget what is complete and start the loader, waiting for its end."""
        script = f"systemctl stop {WEIGHTS}; echo '{{}}' > {RUN}/record.json; systemctl reset-failed"
        script += f"; systemctl start {WEIGHTS}"
        return run([sys.executable, "-m", "lab", "ssh", self.name, "--", script], stdin=subprocess.DEVNULL)

    @contextlib.contextmanager
    def client(self, seconds: float) -> Iterator[subprocess.Popen[str]]:
        """Have a client on the host ask for the whole time; its output has a word for each answer."""
        case = json.dumps(json.loads((MODEL / "reference.json").read_text(encoding="utf-8"))["chat"])
        quoted = case.replace("'", "'\\''")
        argv = [sys.executable, "-m", "lab", "ssh", self.name, "--", f"python3 - '{quoted}' {seconds}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, cwd=CLONE, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdin
            process.stdin.write(CLIENT)
            process.stdin.close()
            process.stdin = None
            yield process

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
        started = run([*hub, "start", str(folder), *(["--merged"] if merged else [])], env=environment)
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
