# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One real host: what is refused before it is touched, and how it serves with key, TLS, other flags and without pages.

Needs root, two pages of 1 GiB and an engine in the cache; takes about three minutes.
Run: pytest -m lab tests/acceptance/test_guards.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hub import Hub
from tools.model.merge import merge

CLONE = Path(__file__).resolve().parents[2]
HOST = "test-guards"
MODEL = CLONE / "tests" / "models" / "recite"
KEY = "sk-" + hashlib.sha256(b"a key of the tests").hexdigest()[:32]

pytestmark = pytest.mark.lab


def run(argv: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the clone, with its output."""
    return subprocess.run(argv, cwd=CLONE, capture_output=True, text=True, check=False, **named)


def on_host(script: str, check: bool = True) -> str:
    """Return what a script prints on the host."""
    done = run([sys.executable, "-m", "lab", "ssh", HOST, "--", script], stdin=subprocess.DEVNULL)
    assert done.returncode == 0 or not check, f"{script}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@dataclass
class Play:
    """A run: exit status, output, each host's counts of the recap, and the messages it failed with."""

    status: int
    output: str
    recap: dict[str, dict[str, int]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """Return the changes on the host."""
        return self.recap[HOST]["changed"]


@dataclass
class Place:
    """What the tests share: a directory, and the variables with which the host serves."""

    path: Path
    lab: dict[str, Any]
    served: dict[str, Any]

    def lock(self, name: str, change: Any) -> str:
        """Return the path of a copy of the lock with a change made to it."""
        data = json.loads(Path(self.served["host_plan_lock"]).read_text())
        change(data)
        path = self.path / f"{name}.json"
        path.write_text(json.dumps(data))
        return str(path)

    def play(self, hosts: dict[str, dict[str, Any]], *words: str, playbook: str = "site.yml") -> Play:
        """Run a playbook against the one host, once under each name with the variables of that name."""
        inventory = json.loads(json.dumps(self.lab))
        group = inventory["all"]["children"]["lab"]["children"]["lab_container"]
        reach = group["hosts"].pop(HOST)
        for name, variables in hosts.items():
            group["hosts"][name] = {**reach, **self.served, **variables}
        path = self.path / "hosts.json"
        path.write_text(json.dumps(inventory))
        # sshd drops connections when too many come at once.
        argv = ["ansible-playbook", playbook, "--forks=6", "--inventory=inventories/lab", f"--inventory={path}", *words]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_CALLBACK_FORMAT_PRETTY": "false",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.path / "cp"),
        }
        done = run(argv, env=environment, timeout=600)
        play = Play(done.returncode, done.stdout + done.stderr)
        for line in done.stdout.splitlines():
            if match := re.match(r"(?:fatal|failed): \[([\w-]+)[^\]]*\].*?=> (\{.*\})$", line):
                play.messages[match[1]] = json.loads(match[2])["msg"]
            elif match := re.match(r"([\w-]+) +: (ok=.*)", line):
                play.recap[match[1]] = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[2])}
        return play

    def site(self, *words: str, **variables: Any) -> Play:
        """Run the site on the host, which must succeed."""
        play = self.play({HOST: variables}, *words)
        assert play.status == 0, play.output
        return play


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Start the host and a hub, and pin the model; removed again at the end."""
    lab = [sys.executable, "-m", "lab"]
    path = tmp_path_factory.mktemp("guards")
    with Hub() as hub:
        model = path / "model"
        model.mkdir()
        merge(sorted(MODEL.glob("*.gguf")), model / "recite.gguf", files=2)
        hub.add("cpullm/recite", model)
        lock = path / "recite.lock.json"
        words = {"lock_file": lock, "lock_repo": "cpullm/recite", "lock_endpoint": hub.url, "lock_name": "recite"}
        pinned = lock_playbook(words)
        assert pinned.returncode == 0, pinned.stdout + pinned.stderr
        up = run([*lab, "up", HOST, "--kind", "container", "--pages", "2"])
        try:
            assert up.returncode == 0, up.stderr
            listing = yaml.safe_load(run([*lab, "inventory", HOST]).stdout)
            served = {
                "host_plan_lock": str(lock),
                "model_fetch_endpoint": hub.url.replace("127.0.0.1", "10.0.2.2"),
                "systemd_service_verify_prompt": "When in the Course of human events,",
                "systemd_service_verify_expect": "it becomes necessary",
                "report_file": None,
            }
            yield Place(path, listing, served)
        finally:
            if not os.environ.get("KEEP"):
                run([*lab, "down", HOST])


def lock_playbook(variables: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run playbooks/lock.yml."""
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "playbooks/lock.yml"]
    return run(
        [*argv, *(f"--extra-vars={key}={value}" for key, value in variables.items())],
        env={**os.environ, "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg")},
    )


# ---- refused before anything on the host is changed

NO_PATCH_FOR_IT = """Add a line where there is none to add it to.
--- a/src/llama-mmap.cpp
+++ b/src/llama-mmap.cpp
@@ -1,3 +1,4 @@
 no line of this file
+one more
 nor this one
 nor this
"""


def bad_inputs(place: Place) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return, by a name for the host, wrong variables and what the refusal must say beside the host's name."""
    scrap = place.path / "scrap.json"
    scrap.write_text("{'name': recite}")
    archive = place.path / "engine.tar.gz"
    archive.write_bytes(b"not what was pinned")
    patches = place.path / "patches"
    patches.mkdir()
    (patches / "0001-nothing-there.patch").write_text(NO_PATCH_FOR_IT)
    short = place.lock("short", lambda data: data["shards"][1].update(sha256="12"))
    sdist = {"version": "0.3.36", "sha256": "a" * 64}
    differs = {"type": "archive", "path": str(archive), "version": "0.3.36", "sha256": "b" * 64}
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {
        "weights": ({"systemd_service_weights": "magic"}, ["host_plan_weights", "anonymous", "magic"]),
        "method": ({"grub_hugepages_method": "foo"}, ["grub_hugepages_method", "boot, runtime, external", "foo"]),
        "connections": ({"model_fetch_connections": "many"}, ["model_fetch_connections", "many", "int"]),
        "tuning": ({"memory_tuning_method": "foo"}, ["memory_tuning_method", "foo"]),
        "source": (
            {"llamacpp_build_source": {"type": "sdits", **sdist}},
            ["llamacpp_build_source.type", "'sdits'", "one of sdist, archive"],
        ),
        "no-lock": ({"host_plan_lock": None}, ["host_plan_lock is not set", "expected the lock file", "lock.yml"]),
        "lost-lock": (
            {"host_plan_lock": "/absent/r1.json"},
            ["host_plan_lock /absent/r1.json", "no such file", "expected a lock file", "lock.yml"],
        ),
        "scrap-lock": ({"host_plan_lock": str(scrap)}, [str(scrap), "found no JSON", "lock.yml"]),
        "short-lock": ({"host_plan_lock": short}, ["shards[1].sha256", "'12'", "64 hexadecimal digits", "lock.yml"]),
        "isa": ({"host_plan_isa": "sse"}, ["host_plan_isa", "'sse'", "avx512"]),
        "memory": (
            {"host_plan_system_reserve_gib": 1000},
            [
                "found",
                "GiB on socket 0",
                "expected at least",
                "1000.00 GiB stay with the system",
                "Lower host_plan_system_reserve_gib",
            ],
        ),
        "disk": (
            {"model_fetch_directory": "/mnt/tiny"},
            ["/mnt/tiny", "64.00 KB free", "expected at least", "larger disk"],
        ),
        "exposed": (
            {"systemd_service_host": "0.0.0.0"},
            ["systemd_service_host is 0.0.0.0", "api_key_file is not set", "expected loopback", "Set all three"],
        ),
        "no-key": (
            {"systemd_service_api_key_file": "/etc/absent.key"},
            ["systemd_service_api_key_file", "/etc/absent.key", "not there", "expected a file"],
        ),
        "no-certificate": (
            {
                "systemd_service_host": "0.0.0.0",
                "systemd_service_api_key_file": "/etc/hostname",
                "systemd_service_tls_certificate_file": "/etc/absent.pem",
                "systemd_service_tls_key_file": "/etc/hostname",
            },
            ["systemd_service_tls_certificate_file", "/etc/absent.pem", "not there", "expected a file"],
        ),
        "no-patches": (
            {"llamacpp_build_patch_set": None, "systemd_service_weights": "anonymous"},
            ["systemd_service_weights is anonymous", "has the patches []", "expected one", "llamacpp_build_patch_set"],
        ),
        "hash": (
            {"llamacpp_build_source": differs},
            ["llamacpp_build_source.sha256", f"found {found}", f"expected {'b' * 64}", "Correct the pin"],
        ),
        "patch": (
            {"llamacpp_build_patch_set": str(patches), "systemd_service_weights": "mmap"},
            ["0001-nothing-there.patch", "apply"],
        ),
    }


def files() -> str:
    """Return every file of the host that a role could have written, with size and time."""
    folders = "/etc /usr/local /opt /srv /var/lib/cpullm /var/cache/cpullm /run/cpullm"
    return on_host(f"find {folders} -xdev -printf '%p %s %T@\\n' 2>&1 | sort")


def test_bad_input_is_refused_before_the_host_is_touched(place: Place) -> None:
    on_host("mkdir -p /mnt/tiny && mount -t tmpfs -o size=64k tmpfs /mnt/tiny")
    cases = bad_inputs(place)
    before = files()
    play = place.play({name: variables for name, (variables, _said) in cases.items()})
    assert files() == before
    wrong = []
    for name, (_variables, said) in cases.items():
        message = play.messages.get(name, "")
        missing = [part for part in said if part not in message]
        # Ansible's own check of an argument leaves the host to the line around its message.
        if missing or not re.search(rf"^({name}:|Validation of arguments failed:)", message):
            wrong.append(f"{name}: {missing} not in: {message!r}")
        # What the controller does to try a patch counts for the host it is done for.
        if name != "patch" and play.recap[name]["changed"]:
            wrong.append(f"{name}: {play.recap[name]}")
    assert not wrong, "\n".join(wrong) + "\n" + play.output[-6000:]


HASWELL = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "pdpe1gb", "sse4_1", "sse4_2"]


def test_a_build_for_a_wider_cpu_is_refused(place: Place) -> None:
    # A container cannot hide flags: the role gets a fact by hand, as an operator without host_plan may give it.
    book = place.path / "isa.yml"
    fact = {"cpullm_numa": {"cpu": {"flags": HASWELL}}, "cacheable": True}
    role = {"name": "cpullm.epyc.llamacpp_build"}
    tasks = [{"ansible.builtin.set_fact": fact}, {"ansible.builtin.include_role": role}]
    book.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    before = files()
    play = place.play({HOST: {"llamacpp_build_isa": "avx512"}}, playbook=str(book))
    assert (play.status, play.changed, files()) == (2, 0, before)
    said = play.messages[HOST]
    assert f"{HOST}: llamacpp_build_isa avx512: found a CPU without avx512f" in said
    assert "Set llamacpp_build_isa to avx2" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(
            lambda folder: (folder / "recite-00002-of-00003.gguf").write_text("no model"),
            ["recite-00002-of-00003.gguf", "GGUF"],
            id="no-gguf",
        ),
        pytest.param(
            lambda folder: (folder / "recite-00003-of-00003.gguf").unlink(),
            ["recite: of 3 shards [3] missing"],
            id="shard-missing",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_not_pinned(spoil: Any, said: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    spoil(folder)
    lock = tmp_path / "model.json"
    done = lock_playbook({"lock_file": lock, "lock_directory": folder})
    assert done.returncode != 0
    assert not lock.exists()
    words = " ".join((done.stdout + done.stderr).split())
    assert not [part for part in [str(folder), *said] if part not in words], words


# ---- fetched, served, changed


def test_a_shard_that_differs_from_the_lock_gets_no_name(place: Place) -> None:
    lock = place.lock("differs", lambda data: data["shards"][1].update(sha256="0" * 64))
    play = place.play({HOST: {"host_plan_lock": lock}}, "--tags=model")
    served = place.path / "model" / "recite-00002-of-00002.gguf"
    right = hashlib.sha256(served.read_bytes()).hexdigest()
    assert play.status == 2
    said = play.messages[HOST]
    assert f"{HOST}: " in said
    assert f"{served.name}: sha256 is {right}, expected {'0' * 64}" in said
    assert "check the source, or the lock, and run again" in said
    assert on_host("find /srv/models -name 'recite-00002*'") == ""


SECRET = {
    "systemd_service_host": "0.0.0.0",
    "systemd_service_api_key_file": "/etc/llama-server/keys",
    "systemd_service_tls_certificate_file": "/etc/llama-server/certificate.pem",
    "systemd_service_tls_key_file": "/etc/llama-server/key.pem",
}
ASK = """
import json, ssl, sys, urllib.error, urllib.request
key = open("/etc/llama-server/keys").read().split()[0]
context = ssl.create_default_context(cafile="/etc/llama-server/certificate.pem")
said = []
for headers in ({}, {"Authorization": "Bearer not-" + key}, {"Authorization": "Bearer " + key}):
    body = {"messages": [{"role": "user", "content": "When in the Course of human events,"}],
            "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request("https://127.0.0.1:8008/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            said.append(json.load(answer)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        said.append(error.code)
print(json.dumps(said))
"""


def give(path: str, text: str) -> None:
    """Write a file on the host that only root reads."""
    argv = [sys.executable, "-m", "lab", "ssh", HOST, "--", f"umask 077; mkdir -p $(dirname {path}); cat > {path}"]
    done = run(argv, input=text)
    assert done.returncode == 0, done.stderr


def process() -> str:
    """Return the server's main process."""
    return on_host("systemctl show --property=MainPID --value llama-server@0")


def arguments() -> list[str]:
    """Return the server's command line."""
    return on_host(f"tr '\\0' '\\n' < /proc/{process()}/cmdline").splitlines()


def starts() -> int:
    """Return how often systemd started the server since the host booted."""
    return int(on_host("journalctl --unit=llama-server@0 --output=cat _PID=1 | grep --count '^Starting ' || true"))


def recites() -> dict[str, Any]:
    """Return what the recitation check says, through a tunnel to the host's loopback."""
    tunnel = run([sys.executable, "-m", "lab", "tunnel", HOST, "8008"])
    address = f"http://127.0.0.1:{tunnel.stdout.split()[-1]}"
    return json.loads(run([sys.executable, "tools/model/recitation.py", address]).stdout)


def test_beyond_loopback_it_serves_with_key_and_tls_and_tells_the_key_to_nobody(place: Place) -> None:
    certificate, private = place.path / "certificate.pem", place.path / "key.pem"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days=2 -subj=/CN=test"
    words = ["-addext=subjectAltName=IP:127.0.0.1", f"-keyout={private}", f"-out={certificate}"]
    made = run([*request.split(), *words])
    assert made.returncode == 0, made.stderr
    give(SECRET["systemd_service_tls_certificate_file"], certificate.read_text())
    give(SECRET["systemd_service_tls_key_file"], private.read_text())
    give(SECRET["systemd_service_api_key_file"], KEY + "\n")
    first = place.site("-vvv", "--diff", **SECRET)
    assert "SERVING" in first.output
    without, wrong, right = json.loads(on_host(f"python3 - <<'END'\n{ASK}\nEND"))
    assert (without, wrong) == (401, 401)
    assert "it becomes necessary" in right
    assert on_host("ss --listening --tcp --numeric --no-header 'sport = :8008'").split()[3] == "0.0.0.0:8008"
    # As another machine sees it: TLS alone, a key for everything but the health, and no server behind the front.
    outer = on_host("ip -4 -br address show tap0").split()[2].split("/")[0]
    ask = "curl --silent --insecure --output /dev/null --write-out '%{http_code}'"
    assert on_host(f"{ask} https://{outer}:8008/health") == "200"
    assert on_host(f"{ask} https://{outer}:8008/v1/models") == "401"
    assert on_host(f"{ask} -H 'X-Api-Key: {KEY}' https://{outer}:8008/v1/models") == "200"
    assert on_host(f"{ask} -H 'X-Api-Key: {KEY}' https://{outer}:8008/slots") == "404"
    assert on_host(f"{ask} http://{outer}:8008/health", check=False) == "000"
    assert on_host(f"{ask} http://{outer}:18008/health", check=False) == "000"
    assert on_host("stat --format='%a %U' /etc/haproxy/llama/keys") == "600 root"
    assert KEY not in first.output
    assert KEY not in on_host("ps -eww -o args=")
    assert KEY not in on_host(f"tr '\\0' '\\n' < /proc/{process()}/environ")
    assert KEY not in on_host("journalctl --no-pager")
    holders = on_host(f"grep --recursive --files-with-matches {KEY} /etc /usr/local /opt /srv /var")
    assert holders == "/etc/llama-server/keys"


def test_a_changed_flag_restarts_once_and_a_further_run_changes_nothing(place: Place) -> None:
    before = starts()
    changed = place.site("--tags=serve", systemd_service_temperature=0.5, **SECRET)
    assert changed.changed == 2, changed.output
    assert starts() == before + 1
    assert arguments()[arguments().index("--temp") + 1] == "0.5"
    again = place.site("--tags=serve", "--diff", systemd_service_temperature=0.5, **SECRET)
    assert again.changed == 0, again.output
    assert starts() == before + 1


def test_a_run_that_died_before_the_restart_is_healed_by_the_next(place: Place) -> None:
    before, old = starts(), process()
    died = place.site("--tags=serve", systemd_service_started=False)
    assert died.changed == 1, died.output
    assert (starts(), process()) == (before, old)
    assert "--host 127.0.0.1" in on_host("cat /etc/systemd/system/llama-server@0.service.d/10-plan.conf")
    healed = place.site("--tags=serve")
    # The front, which left the outer address, and the server.
    assert healed.changed == 2, healed.output
    assert starts() == before + 1
    assert "--api-key-file" not in arguments()
    assert on_host("ss --listening --tcp --numeric --no-header 'sport = :8008'").split()[3] == "127.0.0.1:8008"


def test_without_huge_pages_the_same_text_comes_from_the_page_cache(place: Place) -> None:
    place.site("--tags=serve", systemd_service_weights="mmap")
    assert on_host(f"awk '/^HugetlbPages:/ {{ print $2 }}' /proc/{process()}/status") == "0"
    answer = recites()
    assert answer["ok"], answer
    verified = place.play({HOST: {"systemd_service_weights": "mmap"}}, playbook="playbooks/verify.yml")
    assert (verified.status, verified.changed) == (0, 0), verified.output
