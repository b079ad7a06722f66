"""What disturbs a run, read from the kernel's text; what a unit runs; the unit of a second server beside it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark_host as host
from hypothesis import given
from hypothesis import strategies as st

CALM = host.Snapshot(
    seconds=100.0,
    server=1000,
    program=10,
    busy=5000,
    stolen=7,
    faults=3,
    swapped=0,
    migrated=0,
    throttled=0,
    huge_kib=3145728,
    swap_kib=0,
    hottest=50.0,
    too_hot=False,
)


def later(seconds: float = 10.0, **change: Any) -> host.Snapshot:
    """Return what a calm run of that many seconds on two CPUs leaves, with these differences."""
    ticks = round(seconds * 200)
    calm = {"seconds": 100.0 + seconds, "server": 1000 + ticks, "program": 12, "busy": 5000 + ticks + 2}
    return dataclasses.replace(CALM, **{**calm, **change})


def test_a_calm_run_counts():
    assert host.disturbances(CALM, later(), 2, 0.05) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"busy": 7400}, "other processes took 0.40 of the server's 2 CPUs, at most 0.10", id="load"),
        pytest.param({"stolen": 307}, "the hypervisor took 0.30 of the server's 2 CPUs", id="steal"),
        pytest.param({"faults": 5003}, "the server read 5000 pages from the disk", id="page-cache"),
        pytest.param({"swapped": 12}, "the machine swapped 12 pages", id="swapping"),
        pytest.param({"swap_kib": 64}, "64 KiB of the server are swapped out", id="swapped-before"),
        pytest.param({"migrated": 9000}, "the kernel moved 9000 pages between nodes", id="balancing"),
        pytest.param({"throttled": 2}, "the CPUs throttled 2 times", id="throttling"),
        pytest.param({"too_hot": True, "hottest": 95.0}, "at its critical temperature, 95 degrees", id="hot-module"),
        pytest.param({"huge_kib": 0}, "huge pages went from 3145728 to 0 KiB", id="pages-went"),
    ],
)
def test_a_confounded_run_says_why(change, message):
    (said,) = host.disturbances(CALM, later(**change), 2, 0.05)
    assert message in said


def test_a_short_run_is_not_judged_by_the_steps_of_the_clock():
    before, after = CALM, later(0.02, busy=5000 + 4 + host.SLACK_TICKS)
    assert host.disturbances(before, after, 2, 0.05) == []
    assert host.disturbances(before, dataclasses.replace(after, busy=after.busy + 9), 2, 0.05) != []


def test_a_machine_that_shows_no_throttling_is_not_blamed_for_it():
    none = dataclasses.replace(CALM, throttled=None)
    assert host.disturbances(none, later(throttled=None), 2, 0.05) == []


@pytest.mark.parametrize(
    ("nodes", "expected", "messages"),
    [
        pytest.param([0], 2097152, [], id="as-planned"),
        pytest.param([], None, [], id="nothing-planned"),
        pytest.param([1], None, ["2097152 KiB in huge pages lie on node 0, bound to [1]"], id="other-node"),
        pytest.param([0], 3145728, ["2097152 KiB lie in huge pages, 3145728 planned"], id="too-few"),
    ],
)
def test_memory_that_lies_elsewhere_is_no_measurement_of_the_plan(nodes, expected, messages):
    held = [{"size_kib": 4, "node": 1, "kib": 400}, {"size_kib": 1048576, "node": 0, "kib": 2097152}]
    assert host.misplaced(held, nodes, expected) == messages


# --- The kernel's text


def test_reads_counters():
    stat = "77 (a) b) S 1 2 3 0 -1 4194560 11 0 42 0 150 50 0 0 20 0 5 0 9999 1 2"
    assert host.process_counters(stat) == (200, 42)
    text = (
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 1 5 900 3 1 2 7 0 0\n"
        "cpu1 20 0 0 900 0 0 0 1 0 0\ncpu10 99 0 0 0 0 0 0 0 0 0\n"
    )
    assert host.cpu_counters(text, (0, 1)) == (39, 8)
    assert host.counter("pswpin 3\npswpout 4\nnr_free 5\n", "pswpin", "pswpout") == 7
    assert host.counter("nr_free 5\n", "numa_pages_migrated") == 0


def test_counts_open_connections_to_a_port():
    head = "  sl  local_address rem_address   st tx_queue\n"
    rows = [
        "   0: 0100007F:1F48 00000000:0000 0A 00000000:00000000",
        "   1: 0100007F:1F48 0100007F:C001 01 00000000:00000000",
        "   2: 0100007F:C001 0100007F:1F48 01 00000000:00000000",
        "   3: 0100007F:1F48 0100007F:C002 06 00000000:00000000",
    ]
    assert host.established(head + "\n".join(rows), 8008) == 1
    assert host.established("", 8008) == 0


NUMA_MAPS = """\
7f00 bind:0 file=/anon_hugepage\\040(deleted) huge anon=2 dirty=2 N0=2 kernelpagesize_kB=1048576
7f10 bind:0 file=/hugepages/weights/a huge mapped=3 N0=2 N1=1 kernelpagesize_kB=1048576
7f20 bind:0 anon=12 dirty=12 N0=12 kernelpagesize_kB=4
7f30 default file=/usr/lib/libc.so mapped=5 N1=5 kernelpagesize_kB=4
"""


def test_says_where_memory_lies_by_page_size_and_node():
    assert host.pages(NUMA_MAPS) == [
        {"size_kib": 4, "node": 0, "kib": 48},
        {"size_kib": 4, "node": 1, "kib": 20},
        {"size_kib": 1048576, "node": 0, "kib": 4 << 20},
        {"size_kib": 1048576, "node": 1, "kib": 1 << 20},
    ]
    # What lies in a file of hugetlbfs is shared with a second server; what is anonymous is not.
    assert host.anonymous_huge_kib(NUMA_MAPS) == 2 << 20


def test_reads_this_very_process():
    found = host.snapshot(os.getpid(), (0,))
    assert found.server > 0
    assert found.busy > 0
    assert host.memory(os.getpid())["rss_kib"] > 1000
    assert host.machine()["cores"] == os.cpu_count()


@pytest.mark.parametrize("text", ["0-3,8", "0", ""])
def test_reads_a_list_of_cpus(text):
    assert host.cpus_of(text + "\n") == {"0-3,8": (0, 1, 2, 3, 8), "0": (0,), "": ()}[text]


def test_one_cpu_of_each_core(tmp_path):
    for number, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert host.primary_cpus((0, 1, 2, 3), str(tmp_path)) == (0, 1)
    assert host.primary_cpus((2, 3), str(tmp_path)) == (2, 3)


# --- Units

UNIT = r"""
# /etc/systemd/system/llama-server@.service
[Unit]
Description=llama.cpp server, instance %i
[Service]
User=llama-server
ExecStartPre=+/usr/bin/python3 /usr/local/lib/llama-server/llama_instance.py record %i
Restart=on-failure
RuntimeDirectory=llama-server/%i
[Install]
WantedBy=multi-user.target

# /etc/systemd/system/llama-server@1.service.d/10-plan.conf
[Unit]
Requires=llama-weights@%i.service
[Service]
CPUAffinity=16-31
NUMAPolicy=bind
NUMAMask=1
LoadCredential=api-keys:/etc/cpullm/keys
LoadCredential=tls-certificate:/etc/cpullm/tls.pem
ExecStart=/opt/llama.cpp/a/bin/llama-server --model "/srv/models/a b/50%% $$x.gguf" --host 0.0.0.0 \
  --port 8009 --api-key-file ${CREDENTIALS_DIRECTORY}/api-keys --ssl-cert-file ${CREDENTIALS_DIRECTORY}/tls-certificate
ExecStartPost=/usr/bin/python3 llama_instance.py wait-ready --pid $MAINPID \
  --url https://127.0.0.1:8009
"""


def test_reads_what_a_unit_runs():
    unit = host.parse_unit(
        UNIT.replace("${CREDENTIALS_DIRECTORY}/api-keys", "api-keys").replace(
            "${CREDENTIALS_DIRECTORY}/tls-certificate", "tls-certificate"
        )
    )
    assert (unit.binary, unit.url, unit.nodes) == ("/opt/llama.cpp/a/bin/llama-server", "https://127.0.0.1:8009", (1,))
    assert host.plain_word(unit.words[2]) == "/srv/models/a b/50% $x.gguf"


def test_finds_the_secrets_behind_systemd_s_credentials():
    unit = host.parse_unit(UNIT)
    assert (unit.key_file, unit.certificate) == ("/etc/cpullm/keys", "/etc/cpullm/tls.pem")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[Service]\n", "no ExecStart=", id="no-command"),
        pytest.param("[Service]\nExecStart=/a --port x\n", "found --port x", id="no-port"),
        pytest.param("[Service]\nExecStart=/a --port \u00b2\n", "found --port \u00b2", id="a-digit-and-no-decimal"),
        pytest.param("[Service]\nExecStart=/a --port 1\nExecStart=\n", "no ExecStart=", id="taken-back"),
    ],
)
def test_refuses_a_unit_without_what_is_needed(text, message):
    with pytest.raises(ValueError, match=message):
        host.parse_unit(text)


def test_the_last_port_counts_as_it_does_for_the_server():
    assert host.parse_unit("ExecStart=/a --port 1 --port 2\n").port == 2


def test_a_second_server_runs_as_the_first_but_for_what_is_compared():
    text = host.second_unit(
        UNIT,
        1,
        "cpullm-benchmark-b",
        40001,
        binary="/opt/llama.cpp/b c/bin/llama-server",
        arguments=["--threads", "8"],
        environment={"LLAMA_WEIGHTS_HUGEPAGES": "off"},
        most_seconds=600,
        returns_to="llama-server@1.service",
    )
    unit = host.parse_unit(text)
    assert unit.binary == "/opt/llama.cpp/b c/bin/llama-server"
    assert (unit.host, unit.port, unit.nodes) == ("127.0.0.1", 40001, (1,))
    assert unit.words[-2:] == ("--threads", "8")
    assert host.settings(text, "CPUAffinity") == ["16-31"]
    assert host.settings(text, "User") == ["llama-server"]
    # Weights that the instance needs are needed here as well, and nothing of the instance's own is taken or ended.
    assert host.settings(text, "Requires") == ["llama-weights@1.service"]
    assert host.settings(text, "RuntimeDirectory") == []
    assert host.settings(text, "ExecStartPre") == host.settings(text, "ExecStartPost") == []
    assert host.settings(text, "Restart")[-1] == "no"
    assert host.settings(text, "RuntimeMaxSec") == ["600"]
    assert host.settings(text, "OnFailure") == ["llama-server@1.service"]
    assert host.settings(text, "WantedBy") == []
    assert host.settings(text, "Environment") == ["LLAMA_WEIGHTS_HUGEPAGES=off"]
    assert "50%% $$x" in text


@given(st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc")), min_size=1))
def test_a_quoted_word_is_read_back(text):
    quoted = host.quoted_word(text)
    assert host.plain_word(quoted) == text
    assert host.split_words(f"a {quoted} b") == ["a", quoted, "b"]


def test_a_line_break_is_no_argument():
    with pytest.raises(ValueError, match="expected one line"):
        host.quoted_word("a\nExecStart=/b")
