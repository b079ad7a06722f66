# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The account of this machine's 1 GiB pages, on a folder that looks like the kernel's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import network, pages
from lab.state import LabError


def make_tree(root: Path, totals: dict[int, int], free_gib: int = 64) -> Path:
    """Return a folder like /sys/devices/system/node."""
    for node, total in totals.items():
        pool = root / f"node{node}" / "hugepages" / "hugepages-1048576kB"
        pool.mkdir(parents=True)
        (pool / "nr_hugepages").write_text(str(total))
        (pool / "free_hugepages").write_text(str(total))
        (root / f"node{node}" / "meminfo").write_text(
            f"Node {node} MemFree:        {free_gib << 20} kB\nNode {node} Inactive(file):        0 kB\n"
        )
    (root / "possible").write_text("0-1")
    return root


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Return two nodes, of which the second already has a page."""
    monkeypatch.setenv("CPULLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(network, "run_directory", lambda: tmp_path)
    return make_tree(tmp_path / "node", {0: 0, 1: 1})


def total(tree: Path, node: int) -> int:
    return int((tree / f"node{node}/hugepages/hugepages-1048576kB/nr_hugepages").read_text())


def limit(monkeypatch, node: int, most: int) -> None:
    """Let a node's pool take no more than that, as the kernel does when memory is in pieces."""
    write = pages._write

    def capped(place, name, value, root):
        write(place, name, min(value, most) if place == node else value, root)

    monkeypatch.setattr(pages, "_write", capped)
    monkeypatch.setattr(pages.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("count", "over", "expected"),
    [
        pytest.param(1, [0], [(0, 1)], id="one"),
        pytest.param(5, [0, 1], [(0, 3), (1, 2)], id="odd"),
        pytest.param(1, [0, 1], [(0, 1)], id="fewer-than-nodes"),
        pytest.param(4, [0, 2], [(0, 2), (2, 2)], id="gap"),
    ],
)
def test_spread(count, over, expected):
    assert pages.spread(count, over) == expected


@pytest.mark.parametrize(
    ("count", "over", "message"),
    [
        pytest.param(0, [0], "at least 1", id="none"),
        pytest.param(-2, [0], "at least 1", id="negative"),
        pytest.param(1, [], "no pool of 1 GiB pages", id="no-pool"),
    ],
)
def test_spread_refuses(count, over, message):
    with pytest.raises(LabError, match=message):
        pages.spread(count, over)


@given(st.integers(1, 2000), st.integers(1, 16))
def test_spread_is_even_and_complete(count, number):
    shares = pages.spread(count, range(number))
    assert sum(share for _, share in shares) == count
    assert max(share for _, share in shares) - min(share for _, share in shares) <= 1
    assert len(shares) == min(count, number)


def test_reserve_and_release_account_for_everything(tree):
    pages.reserve(3, "a", root=tree)
    pages.reserve(2, "b", node=1, root=tree)
    assert (total(tree, 0), total(tree, 1)) == (2, 4)
    assert pages.reserved("a") == 3
    report = pages.report(tree)
    assert [entry["before"] for entry in report] == [0, 1]
    assert [entry["held"] for entry in report][1] == [
        {"owner": pages.owner_label("a"), "pages": 1},
        {"owner": pages.owner_label("b"), "pages": 2},
    ]
    assert pages.release("a", tree) == 3
    assert (total(tree, 0), total(tree, 1)) == (0, 3)
    assert pages.release("a", tree) == 0
    assert pages.release_all(tree) == 2
    assert (total(tree, 0), total(tree, 1)) == (0, 1)


def test_release_all_leaves_another_labs_pages_alone(tree, tmp_path, monkeypatch):
    pages.reserve(1, "a", node=0, root=tree)
    monkeypatch.setenv("CPULLM_CACHE", str(tmp_path / "other"))
    pages.reserve(2, "a", node=0, root=tree)
    assert pages.release_all(tree) == 2
    assert total(tree, 0) == 1


def test_a_shortfall_reserves_nothing(tree, monkeypatch):
    limit(monkeypatch, node=1, most=2)
    with pytest.raises(LabError, match="node 1 gave 1 of 2 pages"):
        pages.reserve(4, "a", root=tree)
    assert (total(tree, 0), total(tree, 1)) == (0, 1)
    assert pages.reserved("a") == 0


def test_too_little_memory_is_refused_before_anything_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "run_directory", lambda: tmp_path)
    tree = make_tree(tmp_path / "node", {0: 0}, free_gib=4)
    with pytest.raises(LabError, match=r"node 0: 3 pages of 1 GiB wanted, 4\.0 GiB .* at most 2"):
        pages.reserve(3, root=tree)
    assert not (tmp_path / "pages.json").exists()


def test_a_crash_between_account_and_pool_takes_nothing_from_others(tree, monkeypatch):
    """The account says 4, the pool never grew: giving back stops at what was there before."""

    class Crash(BaseException):
        pass

    def crash(*arguments):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(pages, "_write", crash)
        patch.setattr(pages, "_shrink", crash)
        with pytest.raises(Crash):
            pages.reserve(4, "a", node=1, root=tree)
    assert pages.reserved("a") == 4
    assert pages.release("a", tree) == 4
    assert total(tree, 1) == 1


def test_a_damaged_account_is_said(tree, tmp_path):
    (tmp_path / "pages.json").write_text("{")
    with pytest.raises(LabError, match=r"pages\.json: cannot be read"):
        pages.report(tree)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from("abc"), st.integers(1, 5)),
        st.tuples(st.just("release"), st.sampled_from("abc"), st.just(0)),
        st.tuples(st.just("by hand"), st.just(""), st.integers(1, 3)),
    ),
    max_size=20,
)


# Each step writes the account to the disk for good, which takes what it takes.
@settings(deadline=None, max_examples=40)
@given(before=st.integers(0, 4), steps=STEPS)
def test_whatever_happened_the_pool_ends_as_it_began(before, steps):
    """Pages that somebody else added by hand meanwhile are still there at the end."""
    with tempfile.TemporaryDirectory() as place, mock.patch.object(network, "run_directory", lambda: Path(place)):
        tree = make_tree(Path(place) / "node", {0: before})
        by_hand = 0
        for step, owner, count in steps:
            if step == "reserve":
                pages.reserve(count, owner, root=tree)
            elif step == "release":
                pages.release(owner, root=tree)
            else:
                by_hand += count
                pages._write(0, "nr_hugepages", total(tree, 0) + count, tree)
        pages.release_all(tree)
        assert total(tree, 0) == before + by_hand
        assert pages.report(tree)[0]["held"] == []
