"""Which build a host gets: the named one, the one that it has, the one before, or one by its id."""

from __future__ import annotations

import os

import pytest
from ansible_collections.cpullm.epyc.plugins.action.llamacpp_build_plan import chosen
from ansible_collections.cpullm.epyc.plugins.module_utils import _engine


def build(name: str, *problems: str) -> dict:
    return {"id": name, "problems": list(problems)}


@pytest.mark.parametrize(
    ("choice", "builds", "current", "previous", "found"),
    [
        pytest.param("wanted", [build("a")], "a", None, None, id="wanted"),
        pytest.param("current", [], None, None, None, id="bare-host"),
        pytest.param("current", [build("a"), build("b")], "a", "b", "a", id="current"),
        pytest.param("current", [build("a", "damaged")], "a", None, None, id="damaged-current"),
        pytest.param("current", [build("b")], "a", None, None, id="link-to-nothing"),
        pytest.param("previous", [build("a"), build("b")], "a", "b", "b", id="previous"),
        pytest.param("c", [build("a"), build("c")], "a", None, "c", id="by-id"),
    ],
)
def test_the_choice(choice, builds, current, previous, found):
    info = {"builds": builds, "current": current, "previous": previous}
    assert (chosen(choice, info) or {}).get("id") == found


@pytest.mark.parametrize(
    ("choice", "previous"),
    [
        pytest.param("previous", None, id="none-before"),
        pytest.param("previous", "gone", id="removed"),
        pytest.param("bad", None, id="damaged"),
        pytest.param("no-such", None, id="unknown"),
    ],
)
def test_a_build_that_is_not_there_is_refused_with_those_that_are(choice, previous):
    info = {"builds": [build("a"), build("bad", "damaged")], "current": "a", "previous": previous}
    with pytest.raises(
        ValueError, match=f"llamacpp_build_choice is {choice}: found the complete builds a, of which a is current"
    ):
        chosen(choice, info)


def test_a_switch_remembers_what_was_before(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    prefix = str(tmp_path)
    assert _engine.previous_build(prefix) is None
    seen = []
    for name in ("a", "b", "b", "a"):
        _engine.activate(prefix, name)
        seen.append((_engine.current_build(prefix), _engine.previous_build(prefix)))
    assert seen == [("a", None), ("b", "a"), ("b", "a"), ("a", "b")]
    assert sorted(os.listdir(prefix)) == ["a", "b", "current", "previous"]
