"""Which runs count, what they come to, and what is said of two builds."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.filter.benchmark_verdict import benchmark_verdict
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark
from hypothesis import given
from hypothesis import strategies as st


def run(figure: str, value: float | None, number: int = 0, *reasons: str) -> dict[str, Any]:
    return {"figure": figure, "round": number, "value": value, "reasons": list(reasons)}


def measured(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"name": "x", "runs": list(runs)}


def rounds(figure: str, *values: float) -> dict[str, Any]:
    return measured(*(run(figure, value, number) for number, value in enumerate(values)))


def test_a_disturbed_run_is_never_averaged_in():
    found = _benchmark.figures(
        measured(
            run("decode_d0", 7.0),
            run("decode_d0", 3.0, 1, "another process took 0.8 of 2 CPUs"),
            run("decode_d0", 7.2, 2),
            run("prefill_512", None, 0),
        )
    )
    assert found == {"decode_d0": _benchmark.Spread(7.1, 7.0, 7.2, 2)}


def test_interleaved_runs_are_compared_round_by_round():
    # The machine is half as fast in the second round, for both.
    (row,) = _benchmark.ratios(rounds("decode_d0", 8.0, 4.0, 8.0), rounds("decode_d0", 8.8, 4.4, 8.0))
    assert row.paired
    assert row.ratio == _benchmark.Spread(pytest.approx(1.1), 1.0, pytest.approx(1.1), 3)
    assert (row.first, row.second) == (8.0, 8.0)


def test_a_round_without_its_other_half_is_no_pair():
    first = measured(run("decode_d0", 8.0, 0), run("decode_d0", 2.0, 1))
    second = measured(run("decode_d0", 8.0, 0), run("decode_d0", 9.0, 1, "disturbed"))
    (row,) = _benchmark.ratios(first, second)
    assert row.ratio == _benchmark.Spread(1.0, 1.0, 1.0, 1)


def test_measurements_of_two_days_are_compared_each_with_each():
    (row,) = _benchmark.ratios(rounds("decode_d0", 8.0, 10.0), rounds("decode_d0", 8.0), interleaved=False)
    assert not row.paired
    assert row.ratio == _benchmark.Spread(pytest.approx(0.9), 0.8, 1.0, 2)


@pytest.mark.parametrize(
    ("before", "after", "decision", "said"),
    [
        pytest.param((8, 8), (8.4, 8.4), "kept", "decode_d0 8.00 to 8.40 (1.050, 1.050 to 1.050)", id="faster"),
        pytest.param((8, 8), (7.7, 7.7), "kept", "within 5.0%", id="within-the-tolerance"),
        pytest.param((8, 8), (7.2, 7.2), "refused", "by more than 5.0%: decode_d0 8.00 to 7.20", id="slower"),
        pytest.param((8, 8, 8), (4.0, 8, 8), "kept", "(1.000, 0.500 to 1.000)", id="one-outlier-decides-nothing"),
        pytest.param((), (8,), "unknown", "no speed was measured of both", id="nothing-before"),
    ],
)
def test_says_whether_a_candidate_is_kept(before, after, decision, said):
    found = _benchmark.verdict(rounds("decode_d0", *before), rounds("decode_d0", *after), 0.05)
    assert found.decision == decision
    assert said in found.summary


def test_one_figure_that_is_slower_is_enough_and_a_load_is_no_speed():
    before = measured(run("prefill_512", 80), run("decode_d0", 8), run("load", 10))
    found = _benchmark.verdict(before, measured(run("prefill_512", 160), run("decode_d0", 7), run("load", 90)), 0.05)
    assert found.decision == "refused"
    assert "prefill_512" not in found.summary
    assert [row.figure for row in found.ratios] == ["prefill_512", "decode_d0"]
    assert _benchmark.verdict(measured(run("load", 10)), measured(run("load", 10)), 0.05).decision == "unknown"


def test_what_disturbed_the_runs_is_said_where_nothing_is_left():
    found = _benchmark.verdict(rounds("decode_d0", 8), measured(run("decode_d0", 8, 0, "the machine swapped")), 0.05)
    assert found.decision == "unknown"
    assert "candidate: decode_d0, the machine swapped" in found.summary


SPEED = st.floats(min_value=0.01, max_value=1e6)


@given(st.lists(SPEED, min_size=1, max_size=9), st.lists(SPEED, min_size=1, max_size=9))
def test_a_ratio_lies_in_its_spread_and_turns_round(one, two):
    first, second = rounds("decode_d0", *one), rounds("decode_d0", *two)
    (there,), (back,) = _benchmark.ratios(first, second), _benchmark.ratios(second, first)
    assert there.ratio.least <= there.ratio.median <= there.ratio.most
    assert there.ratio.least == pytest.approx(1 / back.ratio.most)
    assert _benchmark.verdict(first, first, 0.0).decision == "kept"


def test_the_filter_answers_in_plain_data():
    found = benchmark_verdict(rounds("decode_d0", 8.0), rounds("decode_d0", 7.0), tolerance="0.05")
    assert found["decision"] == "refused"
    assert found["ratios"][0]["ratio"]["median"] == 0.875


@pytest.mark.parametrize(
    ("running", "tolerance"),
    [
        pytest.param(None, 0.05, id="nothing"),
        pytest.param({"runs": [{"figure": "x"}]}, 0.05, id="no-runs"),
        pytest.param({"runs": []}, 1, id="all-may-be-lost"),
        pytest.param({"runs": []}, -0.1, id="negative"),
    ],
)
def test_the_filter_refuses_what_it_cannot_compare(running, tolerance):
    with pytest.raises(AnsibleFilterError, match="expected two measurements of the role benchmark"):
        benchmark_verdict(running, {"runs": []}, tolerance)
