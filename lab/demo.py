# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole job in a throwaway VM: from a bare machine to a completion out of 1 GiB pages.

``python -m lab.demo up`` runs what an operator runs (lock, check, site) and asks the server for one completion;
``ssh`` looks around, ``down`` removes it all. What an earlier run left is used again, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parent.parent
WORK = CLONE / ".demo"
REPORT = WORK / "report.html"
NAME = "demo"
MODEL = CLONE / "tests" / "models" / "recite"
REPO = "cpullm/recite"
# The front's, before one server per socket.
PORT = 8008


class DemoError(Exception):
    """A step that did not do what it should: the message says which, and what to look at."""


def say(text: str) -> None:
    """Print one line of the demo's own."""
    print(f"\033[1mdemo:\033[0m {text}" if sys.stdout.isatty() else f"demo: {text}", flush=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    say(f"{title} ...")
    begin = time.monotonic()
    yield
    say(f"{title}: {time.monotonic() - begin:.0f} s")


def run(*argv: str, capture: bool = False) -> str:
    """Run a command in the clone, its output shown or returned. Raises DemoError where it fails."""
    done = subprocess.run(argv, cwd=CLONE, check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode != 0:
        raise DemoError(f"`{' '.join(argv)}` ended with {done.returncode}; the VM is still there: make demo-ssh")
    return done.stdout or ""


def lab(*words: str, capture: bool = False) -> str:
    """Run one command of the lab."""
    return run(sys.executable, "-m", "lab", *words, capture=capture)


def release() -> str:
    """Return the VM's Debian release: the controller's own, because the controller builds for it."""
    names = ("bookworm", "trixie")
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME" and value.strip('"') in names:
            return value.strip('"')
    raise DemoError(
        f"/etc/os-release: this is neither of {names}; the demo builds on the controller for the same release"
    )


def host() -> dict[str, Any] | None:
    """Return the lab's record of the demo's VM, or None."""
    hosts = json.loads(lab("list", "--json", capture=True) or "[]")
    return next((entry for entry in hosts if entry["name"] == NAME), None)


@contextlib.contextmanager
def hub() -> Iterator[int]:
    """Serve the model from a hub of our own on loopback while the block runs; gives its port."""
    ready = WORK / "hub.url"
    ready.unlink(missing_ok=True)
    argv = [sys.executable, "tests/support/hub.py", f"--repo={REPO}={MODEL}", f"--ready-file={ready}"]
    with (WORK / "hub.log").open("w") as log:
        process = subprocess.Popen(argv, cwd=CLONE, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the hub does not start; see {WORK / 'hub.log'}")
            time.sleep(0.1)
        yield int(ready.read_text(encoding="utf-8").rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait()


def playbook(name: str, *words: str) -> None:
    """Run a playbook of the clone."""
    run(sys.executable, "-m", "ansible", "playbook", name, *words)


def site(port: int, *words: str) -> None:
    """Run ``site.yml`` against the VM, as an operator does."""
    playbook(
        "site.yml",
        "--inventory=inventories/lab",
        f"--inventory={WORK / 'hosts.yml'}",
        f"--extra-vars=host_plan_lock={WORK / 'recite.lock.json'}",
        # The hub listens on this machine's loopback, which a VM reaches under this address.
        f"--extra-vars=model_fetch_endpoint=http://10.0.2.2:{port}",
        f"--extra-vars=report_file={REPORT}",
        *words,
    )


def complete(local_port: int, reference: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one chat completion. Raises DemoError where it is not the text that was learnt."""
    case = reference["chat"]
    body = json.dumps(case["request"]).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{local_port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=600) as stream:
        answer: dict[str, Any] = json.load(stream)
    text = answer["choices"][0]["message"]["content"]
    if text != case["content"]:
        raise DemoError(f"the completion is {text!r}, expected {case['content']!r}")
    return answer


def plan() -> dict[str, Any]:
    """Return the plan of the VM, as the last run kept it among the facts."""
    for path in (WORK / "facts").glob(f"*{NAME}"):
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # ansible-core 2.19 and later wrap what they cache.
        if "__payload__" in facts:
            facts = json.loads(facts["__payload__"])
        if "cpullm_plan" in facts:
            found: dict[str, Any] = facts["cpullm_plan"]
            return found
    raise DemoError(f"no plan among the facts in {WORK / 'facts'}")


def observed() -> list[str]:
    """Return what the VM itself says: its command line, its pools, and each server's pages and arguments."""
    script = (
        "cat /proc/cmdline; cat /sys/devices/system/node/node*/hugepages/hugepages-1048576kB/nr_hugepages | xargs;"
        " for n in 0 1; do pid=$(systemctl show --property=MainPID --value llama-server@$n);"
        " awk '/^HugetlbPages:/ { print $2 }' /proc/$pid/status; tr '\\0' ' ' </proc/$pid/cmdline; echo; done"
    )
    return lab("ssh", NAME, "--", script, capture=True).splitlines()


def table(planned: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """Return the lines that set what was asked beside what was planned and what the VM shows."""
    cmdline, pools, *servers = observed()
    arguments = planned["kernel_arguments"]
    found = [word for word in cmdline.split() if word in arguments]
    rows = [
        ("", "asked", "planned", "found"),
        ("kernel arguments", "", " ".join(arguments), " ".join(found)),
        (
            "1 GiB pages of each node",
            f"{len(planned['model']['shards'])} shards a server",
            " ".join(str(entry["pages"]) for entry in planned["pages"]["nodes"]),
            pools,
        ),
    ]
    for instance, kib, words in zip(planned["instances"], servers[::2], servers[1::2]):
        options = words.split()
        number = instance["instance"]
        rows += [
            (f"HugetlbPages of server {number}", "", f"{instance['pages'] * 1048576} kB", f"{kib} kB"),
            (
                f"threads of server {number}",
                "all cores of its socket",
                f"{instance['threads']} and {instance['threads_batch']}",
                f"{options[options.index('--threads') + 1]} and {options[options.index('--threads-batch') + 1]}",
            ),
            (
                f"context of server {number}",
                "the largest that fits",
                str(planned["context"]),
                options[options.index("--ctx-size") + 1],
            ),
        ]
    rows.append(("decode, emulated", "", "", f"{answer['timings']['predicted_per_second']:.1f} tokens/s"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def up() -> None:
    """Bring the demo up, or see that it still serves."""
    begin = time.monotonic()
    WORK.mkdir(exist_ok=True)
    known = host()
    bare = known is None
    if known is not None:
        say(f"using the VM `{NAME}` of an earlier run again (make demo-down removes it)")
    with step("make a Debian VM with real GRUB, two sockets and twelve DIMMs"):
        lab("up", NAME, "--kind=vm", f"--release={release()}")
    (WORK / "hosts.yml").write_text(lab("inventory", NAME, capture=True), encoding="utf-8")
    reference = json.loads((MODEL / "reference.json").read_text(encoding="utf-8"))
    with hub() as port:
        with step("pin the model"):
            playbook(
                "playbooks/lock.yml",
                f"--extra-vars=lock_file={WORK / 'recite.lock.json'}",
                f"--extra-vars=lock_repo={REPO}",
                f"--extra-vars=lock_endpoint=http://127.0.0.1:{port}",
                "--extra-vars=lock_name=recite",
            )
        if bare:
            with step("site.yml --check --diff: what it would do"):
                site(port, "--check", "--diff", "--extra-vars=grub_hugepages_reboot_allowed=true")
        with step("site.yml, with consent to reboot"):
            site(port, "--extra-vars=grub_hugepages_reboot_allowed=true")
    local = int(lab("tunnel", NAME, str(PORT), capture=True))
    with step("ask for a completion"):
        answer = complete(local, reference)
    print(f"\n{answer['choices'][0]['message']['content']}\n")
    for line in table(plan(), answer):
        print(f"  {line}")
    print()
    print(f"  address    http://127.0.0.1:{local}/v1, before one server for each socket")
    print(f"  report     {REPORT}: open it in a browser")
    print("  look       make demo-ssh, then: cat /proc/cmdline; systemctl status 'llama-*'")
    print("  again      make demo: quick, and says what it reuses")
    print("  away       make demo-down")
    say(f"serving after {(time.monotonic() - begin) / 60:.1f} minutes")


def down() -> None:
    """Remove the VM and what the demo wrote into the clone."""
    lab("down", NAME)
    shutil.rmtree(WORK, ignore_errors=True)


def main() -> int:
    """Run one of the demo's commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["up", "ssh", "down"])
    command = parser.parse_args().command
    os.environ.setdefault("ANSIBLE_CONFIG", str(CLONE / "ansible.cfg"))
    # Keeps the plan, for the table at the end.
    os.environ["ANSIBLE_CACHE_PLUGIN"] = "ansible.builtin.jsonfile"
    os.environ["ANSIBLE_CACHE_PLUGIN_CONNECTION"] = str(WORK / "facts")
    try:
        if command == "ssh":
            return subprocess.run([sys.executable, "-m", "lab", "ssh", NAME], cwd=CLONE, check=False).returncode
        (up if command == "up" else down)()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
