"""Progress: the status protocol, rate, time left, and what people see."""

from __future__ import annotations

import contextlib
import io
import json
import os

import pytest
from ansible_collections.cpullm.epyc.plugins.callback.progress import _Block, _Stream, read_spool
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import (
    Record,
    Status,
    Window,
    clock_record,
    describe,
    format_duration,
    parse_status,
    render_block,
    render_line,
    seconds_left,
)
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            '{"phase": "build", "done": 12, "total": 220, "unit": "steps", "message": "ggml", "updated": 7.5}',
            Status("build", 12.0, 220.0, "steps", "ggml", 7.5),
            id="whole",
        ),
        pytest.param('{"done": 3, "total": null}', Status(done=3.0), id="total-unknown"),
        pytest.param("{}", Status(), id="nothing-said"),
        pytest.param('{"done": "3", "total": true, "phase": 4}', Status(), id="other-types-count-as-not-said"),
        pytest.param('{"done": NaN, "total": Infinity}', Status(), id="no-finite-numbers"),
        pytest.param('{"done": -4, "total": -1}', Status(), id="negative"),
        pytest.param(json.dumps({"message": "a\x1b[2Jb\nc"}), Status(message="a [2Jb c"), id="no-terminal-control"),
    ],
)
def test_parse_status(text: str, expected: Status) -> None:
    assert parse_status(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[1]", "one JSON object, found list", id="list"),
        pytest.param("", "Expecting value", id="empty"),
        pytest.param('{"done": 1', "Expecting", id="half"),
        pytest.param("[" * 100000, "nested too deeply", id="deep"),
    ],
)
def test_parse_status_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_status(text)


@given(st.text())
def test_parse_status_raises_nothing_but_value_errors(text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_status(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.dictionaries(st.sampled_from(["phase", "done", "total", "unit", "message", "updated"]), json_values))
def test_any_object_can_be_drawn(data: dict[str, object]) -> None:
    status = parse_status(json.dumps(data))
    record = Record("host", "title", status, rate=1.5)
    assert Record.from_json(record.to_json()) == record
    assert status.percent is None or 0 <= status.percent <= 100
    (line,) = render_block([record], columns=60, rows=24)
    assert len(line) < 60 and line.isprintable()


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        pytest.param([(0, 0)], None, id="one-reading"),
        pytest.param([(0, 0), (0.1, 5)], None, id="too-short"),
        pytest.param([(0, 0), (10, 50)], 5.0, id="steady"),
        pytest.param([(t, t * t) for t in range(0, 101, 10)], 170.0, id="the-latest-30-s-count"),
        pytest.param([(0, 0), (100, 50)], 0.5, id="slow-polls-keep-two"),
        pytest.param([(0, 0), (10, 50), (11, 0), (21, 10)], 1.0, id="a-step-back-starts-anew"),
        pytest.param([(0, 3), (10, 3)], 0.0, id="stalled"),
    ],
)
def test_rate(readings: list[tuple[float, float]], expected: float | None) -> None:
    window = Window(30.0)
    for now, done in readings:
        window.add(now, Status(done=done))
    assert window.rate() == (expected if expected is None else pytest.approx(expected))


def test_another_phase_has_another_rate() -> None:
    window = Window()
    window.add(0, Status("fetch", 0, unit="bytes"))
    window.add(10, Status("fetch", 1000, unit="bytes"))
    window.add(11, Status("build", 1001, unit="steps"))
    assert window.rate() is None


def test_time_left() -> None:
    assert seconds_left(Status(done=25, total=100), 5.0) == 15.0
    assert seconds_left(Status(done=25, total=100), 0.0) is None
    assert seconds_left(Status(done=25), 5.0) is None
    assert seconds_left(Status(done=125, total=100), 5.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3840, "1 h 04 min"), (-3, "0 s")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("record", "text"),
    [
        pytest.param(
            Record("n", "t", Status("fetch", 1.5 * 2**30, 6 * 2**30, "bytes"), 512 * 2.0**20, 12),
            "fetch, 25 %, 1.5 GiB of 6.0 GiB, 512.0 MiB/s, 9 s left, 12 s elapsed",
            id="bytes",
        ),
        pytest.param(
            Record("n", "t", Status("build", 12, 220, "steps", "ggml.c"), 1.25, 30),
            "build, 5 %, 12 of 220 steps, 1.25 steps/s, 2 min 46 s left, ggml.c, 30 s elapsed",
            id="steps",
        ),
        pytest.param(
            Record("n", "t", Status("down", 30, 300, "s"), 1.0, 40, "gives up after 30 min 00 s"),
            "down, 10 %, 30 s of 5 min 00 s, 4 min 30 s left, gives up after 30 min 00 s, 40 s elapsed",
            id="clock",
        ),
        pytest.param(
            clock_record("n", "t", Status("down", total=300, unit="s"), 30, "gives up after 30 min 00 s"),
            "down, 10 %, 4 min 30 s left, gives up after 30 min 00 s, 30 s elapsed",
            id="wait",
        ),
        pytest.param(
            clock_record("n", "t", Status("down", total=300, unit="s"), 310, ""),
            "down, 5 min 10 s elapsed",
            id="overdue",
        ),
        pytest.param(Record("n", "t", Status(done=7, unit="files"), None, 3), "7 files, 3 s elapsed", id="no-total"),
        pytest.param(Record("n", "t", None, None, 3), "3 s elapsed", id="nothing-known"),
        pytest.param(Record("n", "t", Status("x", 9, 9), 1.0, 3), "x, 100 %, 9 of 9, 1.00/s, 3 s elapsed", id="done"),
    ],
)
def test_describe(record: Record, text: str) -> None:
    assert describe(record) == text
    assert render_line(record) == f"n | t: {text}"


def test_block_aligns_hosts_and_fits_the_terminal() -> None:
    records = [Record("a", "short", Status("x", 1, 2)), Record("long-host", "longer title", None, None, 4)]
    assert render_block(records, columns=200, rows=24) == [
        "a          short         [##########..........]  x, 50 %, 1 of 2, 0 s elapsed",
        "long-host  longer title                          4 s elapsed",
    ]
    many = [Record(f"h{n}", "t") for n in range(50)]
    lines = render_block(many, columns=20, rows=10)
    assert len(lines) == 8
    assert lines[-1] == "... and 43 more"
    assert all(len(line) < 20 for line in lines)


def test_other_output_goes_before_the_block() -> None:
    terminal = io.StringIO()
    block = _Block(terminal)
    out = _Stream(terminal, block)
    block.draw(["one", "two"])
    block.draw(["one", "two"])
    assert terminal.getvalue() == "one\ntwo\n"
    out.write("ok: [host]\n")
    assert terminal.getvalue() == "one\ntwo\n\r\x1b[2A\x1b[Jok: [host]\n"
    out.write("half a line")
    block.draw(["one"])
    assert terminal.getvalue().endswith("half a line")
    out.write(", ended\n")
    block.draw(["one"])
    assert terminal.getvalue().endswith("half a line, ended\none\n")
    block.draw([])
    assert terminal.getvalue().endswith("one\n\r\x1b[1A\x1b[J")


def test_spool_keeps_the_living_and_drops_the_dead(tmp_path) -> None:
    mine = Record("b", "t")
    (tmp_path / f"{os.getpid()}-1.json").write_text(mine.to_json())
    (tmp_path / f"{os.getpid()}-2.json").write_text(Record("a", "t").to_json())
    (tmp_path / f"{os.getpid()}-3.json").write_text('{"half')
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead = tmp_path / f"{child}-4.json"
    dead.write_text(mine.to_json())
    assert [record.host for record in read_spool(tmp_path)] == ["a", "b"]
    assert not dead.exists()
