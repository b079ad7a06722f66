"""Kernel command lines as ordered lists."""

from __future__ import annotations

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline
from hypothesis import given
from hypothesis import strategies as st

WANTED = ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", [], id="empty"),
        pytest.param("root=/dev/sda1 ro  quiet\n", ["root=/dev/sda1", "ro", "quiet"], id="blanks"),
        pytest.param('dyndbg="file a.c +p" ro', ['dyndbg="file a.c +p"', "ro"], id="quotes"),
        pytest.param("console=tty0 console=ttyS0", ["console=tty0", "console=ttyS0"], id="repeated-names-stay"),
        pytest.param('a="open to the end', ['a="open to the end'], id="unclosed-quote"),
    ],
)
def test_split(text: str, expected: list[str]) -> None:
    assert _cmdline.split(text) == expected


@given(st.lists(st.from_regex(r"[a-z_]{1,8}(=[a-z0-9:,.]{0,8})?", fullmatch=True)))
def test_split_undoes_join(arguments: list[str]) -> None:
    assert _cmdline.split(" ".join(arguments)) == arguments


@given(st.text())
def test_split_loses_nothing_but_blanks(text: str) -> None:
    joined = "".join(_cmdline.split(text))
    assert [c for c in joined if not c.isspace()] == [c for c in text.strip("\0") if not c.isspace()]


@pytest.mark.parametrize(
    ("running", "wanted", "expected"),
    [
        pytest.param(["ro", *WANTED, "quiet"], WANTED, True, id="all-in-order"),
        pytest.param(["ro", WANTED[0], "quiet", *WANTED[1:]], WANTED, True, id="others-between"),
        pytest.param(["ro", *WANTED[1:], WANTED[0]], WANTED, False, id="other-order"),
        pytest.param([*WANTED[:2], "hugepages=0:3,1:2"], WANTED, False, id="other-number"),
        pytest.param(["hugepagesz=1G", "hugepages=4", *WANTED], WANTED, False, id="an-earlier-one-of-that-size"),
        pytest.param([*WANTED, "hugepagesz=2M", "hugepages=8"], WANTED, False, id="another-size"),
        pytest.param(["ro"], WANTED, False, id="none"),
        pytest.param(["ro", "quiet"], [], True, id="none-wanted-none-there"),
        pytest.param(["hugepages=8"], [], False, id="none-wanted-one-there"),
        pytest.param([*WANTED, "panic=30"], [*WANTED, "panic=30"], True, id="more-than-pages-wanted"),
        pytest.param(WANTED, [*WANTED, "panic=30"], False, id="the-other-one-missing"),
    ],
)
def test_carries(running: list[str], wanted: list[str], expected: bool) -> None:
    assert _cmdline.carries(running, wanted) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(
            'GRUB_CMDLINE_LINUX="quiet hugepagesz=1G hugepages=671"', ["hugepagesz=1G", "hugepages=671"], id="two"
        ),
        pytest.param("X='default_hugepagesz=2M'", ["default_hugepagesz=2M"], id="single-quotes"),
        pytest.param('GRUB_CMDLINE_LINUX="transparent_hugepage=never"', [], id="thp-is-another-thing"),
        pytest.param("my_hugepages=4", [], id="longer-name"),
    ],
)
def test_find_in_a_shell_line(line: str, expected: list[str]) -> None:
    assert _cmdline.find_hugepage_arguments(line) == expected


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        pytest.param("6.1.0-40-amd64", "hugepages=0:3,1:2", id="per-node"),
        pytest.param("5.16.0", "hugepages=0:3,1:2", id="the-first-that-knows"),
        pytest.param("5.15.0-91-generic", "hugepages=5", id="older-one-sum"),
    ],
)
def test_build(release: str, expected: str) -> None:
    plain = ["default_hugepagesz=1G", "hugepagesz=1G", expected]
    assert _cmdline.build(1048576, [(0, 3), (1, 2)], release) == plain
    assert _cmdline.build(1048576, [(0, 3), (1, 2)], release, True) == ["hugetlb_free_vmemmap=on", *plain]


def test_build_refuses() -> None:
    with pytest.raises(ValueError, match="page size 4 KiB: expected 2048 or 1048576"):
        _cmdline.build(4, [(0, 1)], "6.1")
    with pytest.raises(ValueError, match=r"^kernel release .{,90} does not start with two numbers$"):
        _cmdline.build(2048, [(0, 1)], "unknown" * 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["hugepages=3; reboot"], "expected name=value", id="shell"),
        pytest.param(['x="a b"'], "expected name=value", id="quotes"),
        pytest.param(
            ["hugepagesz=1G", "hugepages=1", "hugepagesz=1G", "hugepages=2"], "stands there twice", id="twice"
        ),
        pytest.param(["hugepages=2", "hugepagesz=1G"], "no hugepagesz= before it", id="no-size-before"),
    ],
)
def test_check_refuses(arguments: list[str], message: str) -> None:
    assert any(message in fault for fault in _cmdline.check(arguments))


def test_check_takes_what_the_plan_makes() -> None:
    assert _cmdline.check([*WANTED, "hugetlb_free_vmemmap=on", "panic=30"]) == []
