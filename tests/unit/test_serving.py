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
        "text": "We hold these truths",
        "without_key": None,
        **change,
    }


WANTED = {"pages": 3, "size_kib": 1048576, "nodes": [0], "hugepages": True, "expect": "hold these", "key_needed": False}


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
        pytest.param({"hugetlb_kib": None}, {}, "HugetlbPages is None kB", id="unreadable"),
        pytest.param({"nodes": [{"node": 1, "pages": 3}]}, {}, "3 pages lie on node 1", id="other-node"),
        pytest.param({"text": "We hold"}, {}, "expected it to contain 'hold these'", id="wrong-text"),
        pytest.param({"text": ""}, {"expect": None}, "the completion is empty", id="no-text"),
        pytest.param({"without_key": 200}, {"key_needed": True}, "without a key answers 200", id="open"),
    ],
)
def test_says_each_deviation_with_both_values(change, wish, message):
    (said,) = _serving.deviations(found(**change), {**WANTED, **wish})
    assert message in said


def test_stock_weights_need_no_pages():
    assert _serving.deviations(found(hugetlb_kib=0, nodes=[]), {**WANTED, "hugepages": False}) == []


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
    ("wanted", "before", "actions"),
    [
        pytest.param([0, 1], {}, ["start 0", "start 1"], id="bare"),
        pytest.param([0], {0: "running"}, [], id="nothing-to-do"),
        pytest.param([0], {0: "changed"}, ["restart 0"], id="other-configuration"),
        pytest.param([0], {0: "running", 1: "running"}, ["stop 1"], id="one-too-many"),
        pytest.param([], {0: "running"}, ["stop 0"], id="teardown"),
        pytest.param([0], {0: "stopped"}, ["start 0"], id="stopped"),
    ],
)
def test_plans_the_instances(wanted, before, actions):
    said = server_instances.plan(wanted, before)
    assert [f"{entry['action']} {entry['unit'][13:-8]}" for entry in said] == actions
