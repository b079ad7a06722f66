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
        pytest.param((8, 8, 8), (6, 7, 9), "unknown", "the rounds do not agree", id="restless-machine"),
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


# --- What is asked


def test_asks_what_the_context_has_room_for_and_says_what_it_has_not():
    steps, omitted = _benchmark.steps([512, 8192], [0, 4096, 16384], 64, 8192, 4)
    assert [step.figure for step in steps] == ["prefill_512", "decode_d0", "decode_d4096", "batch_4"]
    assert [(row["figure"], row["reason"]) for row in omitted] == [
        ("prefill_8192", "needs 8194 tokens of context, a slot of the server has 8192"),
        ("decode_d16384", "needs 16449 tokens of context, a slot of the server has 8192"),
    ]
    assert _benchmark.steps([], [], 64, 8192, 1)[1] == [{"figure": "batch", "reason": "the server has one slot"}]


@pytest.mark.parametrize(("figure", "depth"), [("decode_d256", 256), ("decode_d\u00b2", None), ("prefill_64", None)])
def test_depth_of(figure, depth):
    assert _benchmark.depth_of(figure) == depth


def test_prompts_repeat_for_every_server_and_only_a_depth_s_for_every_round():
    prefill, depth = _benchmark.Step("prefill_64", 64, 1), _benchmark.Step("decode_d64", 64, 8, cached=True)
    assert _benchmark.prompts(prefill, 0, 1, 512) == _benchmark.prompts(prefill, 0, 1, 512)
    assert _benchmark.prompts(prefill, 0, 1, 512) != _benchmark.prompts(prefill, 1, 1, 512)
    assert _benchmark.prompts(prefill, 0, 1, 512) != _benchmark.prompts(prefill, 0, 2, 512)
    assert _benchmark.prompts(depth, 0, 1, 512) == _benchmark.prompts(depth, 1, 1, 512)
    side_by_side = _benchmark.prompts(_benchmark.Step("batch_2", 16, 8, 2), 0, 1, 512)
    assert len(side_by_side) == 2
    assert side_by_side[0] != side_by_side[1]
    assert all(64 <= token < 448 for prompt in side_by_side for token in prompt)


PREFILL, DECODE = _benchmark.Step("prefill_64", 64, 1), _benchmark.Step("decode_d64", 64, 8, cached=True)
GOOD = {"prompt_n": 64, "cache_n": 0, "predicted_n": 1, "prompt_per_second": 80.0, "predicted_per_second": 0.0}


@pytest.mark.parametrize(
    ("step", "change", "value", "reason"),
    [
        pytest.param(PREFILL, {}, 80.0, None, id="prefill"),
        pytest.param(PREFILL, {"prompt_n": 4, "cache_n": 60}, 80.0, "kept 60 tokens of the prompt before", id="cached"),
        pytest.param(PREFILL, {"prompt_n": 60}, 80.0, "prompt had 60 tokens, 64 were sent", id="short-prompt"),
        pytest.param(PREFILL, {"prompt_per_second": None}, None, "answers prompt_per_second None", id="no-rate"),
        pytest.param(
            PREFILL, {"prompt_per_second": float("inf")}, None, "answers prompt_per_second inf", id="infinite"
        ),
        pytest.param(
            DECODE,
            {"prompt_n": 1, "cache_n": 63, "predicted_n": 8, "predicted_per_second": 7.2},
            7.2,
            None,
            id="decode",
        ),
        pytest.param(DECODE, {"predicted_per_second": 7.2}, 7.2, "decoded 1 tokens, 8 were asked for", id="early-end"),
    ],
)
def test_a_rate_counts_only_where_the_server_did_what_was_asked(step, change, value, reason):
    found, reasons = _benchmark.rate(step, [{**GOOD, **change}], 1.0)
    assert found == value
    assert (reasons == []) if reason is None else any(reason in each for each in reasons)


def test_requests_side_by_side_count_together():
    timings = [{**GOOD, "prompt_n": 16, "predicted_n": 8}] * 2
    assert _benchmark.rate(_benchmark.Step("batch_2", 16, 8, 2), timings, 4.0) == (4.0, [])


# --- What is kept

PLAN = {
    "hash": "ab" * 32,
    "context": 4096,
    "slots": 1,
    "kv_bytes": 4096 * 100,
    "model": {"name": "m", "read_per_token_bytes": 10_000_000},
}
SETTINGS = {"tokens": 64}


def result(*measurements: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2026-11-25T19:00:00Z",
        "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 24.0, "kernel": "6"},
        "interleaved": len(measurements) == 2,
        "measurements": list(measurements),
    }


def side(name: str, *runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "instance": 0, "runs": list(runs), "omitted": [], **more}


def test_keeps_a_result_in_the_project_s_form():
    omitted = [{"figure": "batch", "reason": "the server has one slot"}]
    running = side("running", run("read", 20.0), run("decode_d0", 1000.0), run("load", 2.0), omitted=omitted)
    kept = _benchmark.document("epyc-01", result(running), SETTINGS, PLAN, "c0ffee")
    assert {"name", "commit", "date", "machine", "command", "figures"} <= set(kept)
    assert (kept["commit"], kept["plan"], kept["model"]) == ("c0ffee", PLAN["hash"], "m")
    assert kept["figures"]["instance0_decode_d0"] == 1000.0
    # 1000 tokens/s of 10 MB and of 48 tokens of KV cache, of 20 GB/s.
    assert kept["figures"]["instance0_decode_d0_share"] == pytest.approx(0.50024)
    lines = "\n".join(_benchmark.table(kept))
    for part in (
        "epyc-01, 2026-11-25T19:00:00Z",
        "50%",
        "left out: instance 0, running, batch: the server has one slot",
    ):
        assert part in lines


def test_keeps_the_ratios_of_two_variants_and_says_what_was_disturbed():
    first = side("a", run("decode_d0", 8.0), run("decode_d0", 9.0, 1, "the machine swapped 3 pages"))
    second = side("b", run("decode_d0", 12.0), run("decode_d0", 3.0, 1))
    kept = _benchmark.document("h", result(first, second), SETTINGS)
    assert kept["figures"]["instance0_a_decode_d0"] == 8.0
    assert kept["figures"]["instance0_ratio_decode_d0"] == 1.5
    (row,) = kept["ratios"]
    assert (row["first_name"], row["second_name"], row["ratio"]["count"]) == ("a", "b", 1)
    lines = _benchmark.table(kept)
    assert "b over a:" in lines
    assert lines[-1] == (
        "disturbed: instance 0, a, decode_d0: 1 run(s) do not count, such as: the machine swapped 3 pages"
    )


def test_a_slow_model_keeps_its_digits():
    kept = _benchmark.document("h", result(side("running", run("decode_d0", 0.123456))), SETTINGS)
    assert kept["figures"]["instance0_decode_d0"] == 0.12346
    assert kept["plan"] == ""
