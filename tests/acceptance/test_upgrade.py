# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One real host: upgraded, rolled back, killed and given a bad build while clients ask it without a pause.

Needs root, pages of 1 GiB (conftest.py) and an engine in the cache; a second engine is built once, of the same source.
Run: pytest -m lab tests/acceptance/test_upgrade.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from typing import Any

import pytest

from tests.support import plays
from tests.support.store_host import CLONE, SERVER, STORE_HOST, WEIGHTS, StoreHost

# Another build of the same source: an option that no code reads changes the id. It is the fleet scenario's, so that the
# two share what is in the caches.
OTHER = '{"llamacpp_build_cmake_options": {"LLAMA_ARG_FLEET_TEST": "ON"}}'

pytestmark = pytest.mark.lab

# Stands still nine tenths of the time, in steps that are shorter than a toy's answer. The process that becomes the
# server has this shell's number.
SLOW = """#!/bin/sh
python3 -c '
import os, signal, sys, time
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(0.018)
    os.kill(int(sys.argv[1]), signal.SIGCONT)
    time.sleep(0.002)
' $$ 2>/dev/null &
exec "$0.fast" "$@"
"""

# Three at once on one slot, so that two always wait in the front.
CLIENT = """
import json, threading, time, urllib.error, urllib.request
from pathlib import Path
running, result = Path("/run/clients"), {"asked": 0, "failed": [], "wrong": [], "slowest": 0.0}
lock = threading.Lock()
body = json.dumps({"messages": [{"role": "user", "content": "When in the Course of human events,"}],
                   "max_tokens": 16, "temperature": 0}).encode()
def ask():
    while running.exists():
        request = urllib.request.Request("http://127.0.0.1:8008/v1/chat/completions", body,
                                         {"Content-Type": "application/json"})
        begin, failed, text = time.time(), None, ""
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                text = json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, ValueError) as error:
            failed = str(error)
        with lock:
            result["asked"] += 1
            result["slowest"] = max(result["slowest"], time.time() - begin)
            if failed:
                result["failed"].append([begin, time.time(), failed])
            elif "it becomes necessary" not in text:
                result["wrong"].append(text)
        time.sleep(0.05)
threads = [threading.Thread(target=ask) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
Path("/run/clients.json").write_text(json.dumps(result))
"""


def on_host(script: str, check: bool = True, data: str | None = None) -> str:
    """Return what a script prints on the host."""
    return StoreHost.ssh_to(STORE_HOST, script, check=check, text=data)


def changed(output: str) -> int:
    """Return the changes on the host, of a run's recap."""
    found = re.search(rf"^{STORE_HOST} +: .*?changed=(\d+)", output, re.MULTILINE)
    assert found, output
    return int(found[1])


class Clients:
    """Clients on the host that ask without a pause while the block runs; then what they saw."""

    def __enter__(self) -> Clients:
        on_host("cat > /run/clients.py; rm -f /run/clients.json; touch /run/clients", data=CLIENT)
        on_host("systemd-run --quiet --collect --unit=clients /usr/bin/python3 /run/clients.py")
        time.sleep(1)
        return self

    def __exit__(self, *reason: object) -> None:
        on_host("rm -f /run/clients; timeout 330 sh -c 'until [ -e /run/clients.json ]; do sleep 0.2; done'")
        self.saw: dict[str, Any] = json.loads(on_host("cat /run/clients.json"))

    def check(self, failures: int = 0) -> None:
        """See that they asked, that every answer was right, and that no more requests failed than allowed."""
        assert self.saw["asked"] >= 3, self.saw
        assert self.saw["wrong"] == [], self.saw
        assert len(self.saw["failed"]) <= failures, self.saw


def current() -> str:
    """Return the build that the link names."""
    return on_host("readlink /opt/llama.cpp/current")


def serving() -> str:
    """Return the build that the server runs from."""
    pid = on_host(f"systemctl show --property=MainPID --value {SERVER}")
    return on_host(f"readlink /proc/{pid}/exe").split("/")[3]


def beside() -> str:
    """Return what is left of a build beside: processes and files."""
    return on_host(
        "pgrep --full '[p]ort 18108' || true; ls -d /etc/systemd/system/llama-server@100* 2>/dev/null || true"
    )


def test_an_upgrade_fails_no_request_and_the_site_leaves_it_alone(host: StoreHost) -> None:
    before, loaded = current(), host.show(WEIGHTS, "InvocationID")
    with Clients() as clients:
        host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}")
    clients.check()
    assert serving() == current() != before
    assert host.show(WEIGHTS, "InvocationID") == loaded, "nothing was read from the disk"
    assert host.recites("opening", "truths")["ok"]
    assert beside() == ""
    # The inventory still names the build before.
    site = host.play("site.yml")
    assert changed(site) == 0, site
    assert f"{STORE_HOST} stays with its build {current()}; the variables llamacpp_build_* name {before}" in " ".join(
        site.split()
    )
    assert serving() == current() != before
    again = host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}")
    assert changed(again) == 0, again


def test_a_killed_server_fails_what_it_had_and_nothing_else(host: StoreHost) -> None:
    with Clients() as clients:
        for _ in range(2):
            assert host.kill_server()
            time.sleep(1)
    # One slot: with each kill the request in flight is lost, and at most one that reaches the dying process after it.
    clients.check(failures=4)


def test_a_rollback_fails_no_request(host: StoreHost) -> None:
    before, loaded = current(), host.show(WEIGHTS, "InvocationID")
    with Clients() as clients:
        host.play("playbooks/rollback.yml")
    clients.check()
    assert serving() == current() != before
    assert host.show(WEIGHTS, "InvocationID") == loaded, "nothing was read from the disk"
    assert host.recites("opening", "truths")["ok"]
    unknown = host.play("playbooks/rollback.yml", "--extra-vars=rollback_build_id=no-such-build", status=2)
    assert f"found the complete builds {before}, {current()}" in " ".join(unknown.split()) or before in unknown


def test_a_build_that_answers_wrong_is_left_again(host: StoreHost) -> None:
    before, wrong = current(), '{"systemd_service_verify_expect": "what it never says"}'
    with Clients() as clients:
        said = " ".join(
            host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}", f"--extra-vars={wrong}", status=2).split()
        )
    clients.check()
    assert "expected it to contain 'what it never says'" in said
    assert "stays as it is, and served all the time" in said
    assert serving() == current() == before
    assert beside() == ""


def replace_server(build: str, script: str) -> None:
    """Put a script in the place of an installed build's server, which lies beside it then, and vouch for it."""
    on_host(
        f"cd /opt/llama.cpp/{build} && mv bin/llama-server bin/llama-server.fast &&"
        " cat > bin/llama-server && chmod 0755 bin/llama-server &&"
        """ python3 -c "
import hashlib, json
record = json.load(open('BUILD.json'))
record['id'] = '"""
        + build
        + """'
for entry in record['files']:
    if entry['path'] == 'bin/llama-server':
        data = open(entry['path'], 'rb').read()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
json.dump(record, open('BUILD.json', 'w'))" """,
        data=script,
    )


def test_a_slower_build_is_not_kept_unless_that_is_asked_for(host: StoreHost) -> None:
    """Right answers, slowly: left again with the numbers, while clients wait at most for the measurement."""
    before = current()
    kept = " ".join(host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}").split())
    # The same code: kept, or no judgement where the machine is too restless for one.
    assert re.search(r"(running build or faster|and some faster): prefill_512 [\d.]+ to [\d.]+ \(", kept), kept
    other = current()
    rolled = host.play("playbooks/rollback.yml")
    assert "Measure | " not in rolled
    assert serving() == current() == before
    replace_server(other, SLOW)
    try:
        with Clients() as clients:
            said = " ".join(host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}", status=2).split())
        clients.check()
        assert "stays as it is, and served all the time" in said
        assert re.search(
            r"slower than the running build by more than 50\.0%: .*decode_d0 [\d.]+ to [\d.]+ \(0\.", said
        ), said
        assert "systemd_service_upgrade_tolerance (0.5)" in said
        assert serving() == current() == before
        assert beside() == ""
        wrong = host.play("playbooks/upgrade.yml", "--extra-vars=systemd_service_upgrade_tolerance=5", status=2)
        assert "systemd_service_upgrade_tolerance is 5" in " ".join(wrong.split())
        opted = '{"systemd_service_upgrade_tolerance": null}'
        out = host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}", f"--extra-vars={opted}")
        assert "Measure | " not in out
        assert serving() == current() == other
    finally:
        host.play("playbooks/rollback.yml", f"--extra-vars=rollback_build_id={before}")
        on_host(f"rm -rf /opt/llama.cpp/{other}")


def test_a_build_that_does_not_start_is_left_again_where_the_old_one_had_to_stop(host: StoreHost) -> None:
    """As where the plan has no room for two: the instance itself gets the broken build, and comes back."""
    before = current()
    broken = f"{before[:-12]}{'0' * 12}"
    on_host(f"cp -a /opt/llama.cpp/{before} /opt/llama.cpp/{broken}")
    replace_server(broken, "#!/bin/sh\nexit 3\n")
    words = [f"--extra-vars=rollback_build_id={broken}", '--extra-vars={"systemd_service_upgrade_beside": false}']
    with Clients() as clients:
        said = " ".join(host.play("playbooks/rollback.yml", *words, status=2).split())
    clients.check()
    assert "serves as before again" in said
    assert serving() == current() == before
    on_host(f"rm -r /opt/llama.cpp/{broken}")


@pytest.mark.faults
@pytest.mark.parametrize(
    "moment",
    ["Start llama-server@100", "Let requests in flight end", "Start llama-server@0", "Let the build beside finish"],
)
def test_a_killed_upgrade_serves_and_the_next_one_ends_right(host: StoreHost, moment: str) -> None:
    argv = host.argv("playbooks/upgrade.yml", f"--extra-vars={OTHER}")
    mark = f"upgrade-{os.getpid()}"
    with Clients() as clients:
        with subprocess.Popen(
            argv,
            cwd=CLONE,
            env={**host.environment, plays.MARK: mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as play:
            lines = []
            for line in play.stdout or ():
                lines.append(line)
                if line.startswith("TASK") and f"Upgrade | {moment}]" in line:
                    time.sleep(1.5)
                    plays.kill(mark)
                    break
            else:
                raise AssertionError("".join(lines))
        host.play("playbooks/upgrade.yml", f"--extra-vars={OTHER}")
    clients.check()
    assert serving() == current()
    assert beside() == ""
    with Clients() as clients:
        host.play("playbooks/rollback.yml")
    clients.check()
