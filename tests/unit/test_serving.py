"""What a running server holds, read from the kernel's text, and how it is compared with its plan."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _serving
from ansible_collections.cpullm.epyc.plugins.modules import server_instances

NUMA_MAPS = """\
7f0000000000 bind:0 file=/anon_hugepage\\040(deleted) huge anon=2 dirty=2 N0=2 kernelpagesize_kB=1048576
7f0080000000 bind:0 file=/anon_hugepage\\040(deleted) huge anon=2 dirty=2 N0=1 N1=1 kernelpagesize_kB=1048576
7f0100000000 bind:0 anon=12 dirty=12 active=0 N0=12 kernelpagesize_kB=4
7f0200000000 bind:0
"""


def found(**change: Any) -> dict[str, Any]:
    return {
        "active_state": "active",
        "health": 200,
        "error": None,
        "hugetlb_kib": 3145728,
        "nodes": [{"node": 0, "pages": 3}],
        "pid": 7,
        "private_kib": 400_000,
        "no_repack": True,
        "store_pages": 3,
        "store_problems": [],
        "text": "We hold these truths",
        "without_key": None,
        **change,
    }


WANTED = {
    "pages": 3,
    "size_kib": 1048576,
    "nodes": [0],
    "hugepages": True,
    "stored": True,
    "private_kib": 500_000,
    "expect": "hold these",
    "key_needed": False,
}


def test_reads_a_size_of_proc_status():
    text = "Name:\tllama-server\nVmRSS:\t   31744 kB\nHugetlbPages:\t 3145728 kB\n"
    assert _serving.status_kib(text, "HugetlbPages") == 3145728
    assert _serving.status_kib(text, "VmSwap") is None
    assert _serving.status_kib(f"VmSwap: {'9' * 5000} kB\n", "VmSwap") is None


def test_counts_pages_of_one_size_by_node():
    assert _serving.pages_by_node(NUMA_MAPS, 1048576) == [{"node": 0, "pages": 3}, {"node": 1, "pages": 1}]
    assert _serving.pages_by_node(NUMA_MAPS, 4) == [{"node": 0, "pages": 12}]
    assert _serving.pages_by_node("", 4) == []
    assert _serving.pages_by_node(f"7f00 N0={'9' * 5000} kernelpagesize_kB=4", 4) == []


def test_no_difference_is_no_deviation():
    assert _serving.deviations(found(), WANTED) == []


@pytest.mark.parametrize(
    ("change", "wish", "message"),
    [
        pytest.param({"active_state": "failed"}, {}, "the unit is failed, expected active", id="unit"),
        pytest.param({"health": 503}, {}, "GET /health answers 503, expected 200", id="loading"),
        pytest.param({"health": 0, "error": "refused"}, {}, "GET /health answers refused", id="silent"),
        pytest.param({"hugetlb_kib": 2097152}, {}, "HugetlbPages is 2097152 kB, expected 3145728 kB", id="short"),
        pytest.param({"hugetlb_kib": None}, {}, "HugetlbPages is not known, expected", id="unreadable"),
        pytest.param({"nodes": [{"node": 1, "pages": 3}]}, {}, "3 pages lie on node 1", id="other-node"),
        pytest.param({"text": "We hold"}, {}, "expected it to contain 'hold these'", id="wrong-text"),
        pytest.param({"text": ""}, {"expect": None}, "the completion is empty", id="no-text"),
        pytest.param({"without_key": 200}, {"key_needed": True}, "without a key answers 200", id="open"),
        pytest.param({"store_problems": ["a.gguf: not in the store"]}, {}, "a.gguf: not in the store", id="store"),
        pytest.param({"store_pages": 2}, {}, "2 pages of the store are mapped, expected 3", id="store-pages"),
        pytest.param({"no_repack": False}, {}, "--no-repack", id="repack"),
        pytest.param({"private_kib": 500_001}, {}, "RssAnon is 500001 kB, expected at most 500000 kB", id="copy"),
    ],
)
def test_says_each_deviation_with_both_values(change, wish, message):
    (said,) = _serving.deviations(found(**change), {**WANTED, **wish})
    assert message in said


def test_stock_weights_need_no_pages():
    stock = {**WANTED, "hugepages": False, "stored": False}
    assert _serving.deviations(found(hugetlb_kib=0, nodes=[], store_pages=0), stock) == []
    assert _serving.deviations(found(store_pages=0), {**WANTED, "stored": False, "private_kib": None}) == []


STORE_MAPS = """\
7f00 bind:0 file=/var/lib/llama-weights/0/ab/x\\040y.gguf huge mapmax=2 N0=2 kernelpagesize_kB=1048576
7f01 bind:0 file=/var/lib/llama-weights/0/ab/z.gguf huge N0=1 kernelpagesize_kB=1048576
7f02 bind:0 file=/var/lib/llama-weights/01/ab/z.gguf huge N0=1 kernelpagesize_kB=1048576
7f03 bind:0 file=/anon_hugepage\\040(deleted) huge anon=2 dirty=2 N0=2 kernelpagesize_kB=1048576
7f04 bind:0 anon=12 dirty=12 active=0 N0=12 kernelpagesize_kB=4
"""


def test_counts_the_pages_of_a_store():
    assert _serving.store_pages(STORE_MAPS, "/var/lib/llama-weights/0", 1048576) == 3
    assert _serving.store_pages(STORE_MAPS, "/var/lib/llama-weights/1", 1048576) == 0
    assert _serving.store_pages("", "/var/lib/llama-weights/0", 1048576) == 0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"choices": [{"message": {"content": "a", "reasoning_content": "b"}}]}, "ba"),
        ({"choices": [{"message": {"content": "a"}}]}, "a"),
        ({"choices": []}, ""),
        ({}, ""),
        ({"choices": [{"message": {"content": None}}]}, ""),
        ({"choices": [{"message": "a"}]}, ""),
    ],
)
def test_takes_thoughts_and_text_of_an_answer(answer, text):
    assert _serving.chat_text(answer) == text


@pytest.mark.parametrize(
    ("timings", "rate"),
    [
        pytest.param({"predicted_per_second": 7.17}, 7.17, id="measured"),
        pytest.param({"predicted_per_second": 7}, 7.0, id="whole"),
        pytest.param({"predicted_per_second": True}, None, id="boolean"),
        pytest.param({"predicted_per_second": float("nan")}, None, id="nan"),
        pytest.param({"predicted_per_second": 10**400}, None, id="larger-than-a-float"),
        pytest.param([], None, id="no-object"),
    ],
)
def test_takes_the_rate_of_an_answer(timings, rate):
    assert _serving.decode_rate({"timings": timings}) == rate


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        pytest.param(b'{"a": 1}', {"a": 1}, id="object"),
        pytest.param(b"[1]", {}, id="list"),
        pytest.param(b"\xff", {}, id="no-text"),
        pytest.param(b"[" * 100_000, {}, id="deep"),
    ],
)
def test_an_answer_that_is_no_object_is_empty(raw, body):
    assert _serving.answer_of(200, raw) == _serving.Answer(200, body)


@pytest.mark.parametrize(
    ("wanted", "before", "stores", "actions"),
    [
        pytest.param([0, 1], {}, {}, ["start server@0", "start server@1"], id="bare"),
        pytest.param([0], {0: "running"}, {}, [], id="nothing-to-do"),
        pytest.param([0], {0: "changed"}, {}, ["restart server@0"], id="other-configuration"),
        pytest.param([0], {0: "running", 1: "running"}, {}, ["stop server@1"], id="one-too-many"),
        pytest.param([], {0: "running"}, {}, ["stop server@0"], id="teardown"),
        pytest.param([0], {0: "stopped"}, {}, ["start server@0"], id="stopped"),
        pytest.param([0], {}, {0: "absent"}, ["load weights@0", "start server@0"], id="bare-store"),
        pytest.param([0], {0: "running"}, {0: "complete"}, [], id="nothing-to-do-with-a-store"),
        pytest.param([0], {0: "changed"}, {0: "complete"}, ["restart server@0"], id="no-load-for-a-flag"),
        pytest.param([0], {0: "running"}, {0: "incomplete"}, ["load weights@0", "start server@0"], id="damaged-store"),
        pytest.param([0], {0: "stopped"}, {0: "loading"}, ["start server@0"], id="a-load-goes-on"),
        pytest.param(
            [0], {0: "changed"}, {0: "other"}, ["free weights@0", "load weights@0", "start server@0"], id="size"
        ),
        pytest.param(
            [0], {0: "changed"}, {0: "unwanted"}, ["free weights@0", "start server@0"], id="no-store-any-more"
        ),
        pytest.param(
            [], {0: "running"}, {0: "unwanted"}, ["stop server@0", "free weights@0"], id="teardown-of-a-store"
        ),
    ],
)
def test_plans_the_instances(wanted, before, stores, actions):
    stored = [number for number, found in stores.items() if found != "unwanted"]
    said = server_instances.plan(wanted, before, stored, stores)
    assert [f"{entry['action']} {entry['unit'][6:-8]}" for entry in said] == actions


def test_systemd_reads_what_nothing_else_makes_it_read():
    assert server_instances.plan([0], {0: "running"}, [], {}, stale=True) == [{"unit": "systemd", "action": "reload"}]
    assert server_instances.plan([0], {0: "running"}, [], {}) == []


MOUNTINFO = """\
29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 29 0:39 / /var/lib/llama-weights/0 rw shared:9 - hugetlbfs hugetlbfs rw,uid=9,mode=750,pagesize=1024M,size=3221225472
41 29 0:40 / /var/lib/llama-weights/1 rw,nosuid - hugetlbfs hugetlbfs rw,pagesize=1024M
42 29 0:41 / /var/lib/llama-weights/2 rw - tmpfs tmpfs rw,size=1024k
43 29 0:42 / /dev/hugepages rw - hugetlbfs hugetlbfs rw,pagesize=2M
44 29 0:43 / /srv/with\\040space/0 rw - hugetlbfs hugetlbfs rw,pagesize=1024M,size=1073741824
"""


def test_finds_the_mounted_stores():
    assert server_instances.mounted(MOUNTINFO, "/var/lib/llama-weights") == {0: 3221225472, 1: None}
    assert server_instances.mounted(MOUNTINFO, "/srv/with space/") == {0: 1073741824}
