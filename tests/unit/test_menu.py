"""GRUB's menu: the default entry, its copy for a trial, and custom.cfg with what others have in it."""

from __future__ import annotations

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _menu
from hypothesis import given
from hypothesis import strategies as st

WANTED = ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3"]
EXTRA = ["panic=10", "cpullm.trial=1"]

# What grub-mkconfig of Debian 12 writes, less what is not about choosing.
CONFIG = """\
### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="@"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
set timeout=5
### END /etc/grub.d/00_header ###
### BEGIN /etc/grub.d/10_linux ###
function gfxmode {
\tset gfxpayload="${1}"
}
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-1' {
\tload_video
\tif [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
\tsearch --no-floppy --fs-uuid --set=root 1-2
\techo\t'Loading Linux 6.1.0-40-amd64 ...'
\tlinux\t/boot/vmlinuz-6.1.0-40-amd64 root=UUID=1-2 ro console=tty0 console=ttyS0 quiet
\techo\t'Loading initial ramdisk ...'
\tinitrd\t/boot/initrd.img-6.1.0-40-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1' {
\tmenuentry 'Debian GNU/Linux, with Linux 6.1.0-39-amd64' --class debian $menuentry_id_option 'gnulinux-39' {
\t\tlinux\t/boot/vmlinuz-6.1.0-39-amd64 root=UUID=1-2 ro quiet
\t\tinitrd\t/boot/initrd.img-6.1.0-39-amd64
\t}
\tmenuentry "It's the other one" --id other {
\t\tlinux\t/boot/other ro
\t}
}
### END /etc/grub.d/10_linux ###
### BEGIN /etc/grub.d/30_uefi-firmware ###
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
\tfwsetup
}
### END /etc/grub.d/30_uefi-firmware ###
### BEGIN /etc/grub.d/41_custom ###
if [ -f  ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
elif [ -z "${config_directory}" -a -f  $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
### END /etc/grub.d/41_custom ###
"""


def config(default: str = "0") -> str:
    return CONFIG.replace("@", default)


def entry(*lines: str) -> _menu.Item:
    return _menu.Item("e", "i", 1, False, tuple(lines))


def test_the_menu_is_a_tree() -> None:
    menu = _menu.parse(config())
    assert [(item.title, item.id, item.submenu, len(item.children)) for item in menu] == [
        ("Debian GNU/Linux", "gnulinux-simple-1", False, 0),
        ("Advanced options for Debian GNU/Linux", "gnulinux-advanced-1", True, 2),
        ("UEFI Firmware Settings", "uefi-firmware", False, 0),
    ]
    assert menu[1].children[1] == _menu.Item("It's the other one", "other", 40, False, ("\t\tlinux\t/boot/other ro",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("}\n", "line 1: a } that closes nothing", id="closes-nothing"),
        pytest.param("menuentry 'x' {\n", "never closed", id="never-closed"),
    ],
)
def test_half_a_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _menu.parse(text)


@pytest.mark.parametrize(
    ("default", "environment", "title"),
    [
        pytest.param("0", {}, "Debian GNU/Linux", id="first"),
        pytest.param("", {}, "Debian GNU/Linux", id="empty"),
        pytest.param("1>1", {}, "It's the other one", id="numbers"),
        pytest.param("gnulinux-advanced-1>gnulinux-39", {}, "Debian GNU/Linux, with Linux 6.1.0-39-amd64", id="ids"),
        pytest.param(
            "Advanced options for Debian GNU/Linux>0", {}, "Debian GNU/Linux, with Linux 6.1.0-39-amd64", id="title"
        ),
        pytest.param("${saved_entry}", {"saved_entry": "1>other"}, "It's the other one", id="saved"),
        pytest.param("${saved_entry}", {}, "Debian GNU/Linux", id="nothing-saved"),
        pytest.param("gone", {}, "Debian GNU/Linux", id="of-a-removed-kernel"),
        pytest.param("99", {}, "Debian GNU/Linux", id="beyond-the-end"),
    ],
)
def test_default(default: str, environment: dict[str, str], title: str) -> None:
    text = config(default)
    assert _menu.find(_menu.parse(text), _menu.default_of(text, environment)).title == title


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("set default=0\n", "no branch for next_entry", id="no-branch"),
        pytest.param(
            config().replace("   save_env next_entry\n", ""), "does not take the choice back", id="not-taken-back"
        ),
        pytest.param(config("${other}"), "its default is '\\${other}'", id="another-variable"),
    ],
)
def test_a_configuration_that_cannot_boot_once_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _menu.default_of(text, {})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        pytest.param("1", "is the submenu 'Advanced options", id="submenu"),
        pytest.param("0", "no entry", id="empty-menu"),
    ],
)
def test_a_default_without_an_entry_is_refused(wanted: str, message: str) -> None:
    menu = _menu.parse(config()) if wanted == "1" else ()
    with pytest.raises(ValueError, match=message):
        _menu.find(menu, wanted)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        pytest.param(" root=1 ro quiet", " root=1 ro quiet", id="plain"),
        pytest.param(
            " ro console=tty0  console=ttyS0 ro ", " ro console=tty0  console=ttyS0 ro", id="repeated-stay-in-order"
        ),
        pytest.param(" ro hugepagesz=2M hugepages=9 quiet", " ro quiet", id="others-pages-go"),
        pytest.param(" ro default-hugepagesz=1G", " ro", id="dash-is-underscore"),
        pytest.param(" ro transparent_hugepage=never", " ro transparent_hugepage=never", id="another-name-stays"),
        pytest.param(' dyndbg="file a.c  +p" ro', ' dyndbg="file a.c  +p" ro', id="quotes-stay"),
        pytest.param("", "", id="none"),
    ],
)
def test_arguments_keep_their_order(rest: str, expected: str) -> None:
    assert _menu.trial_arguments(rest, WANTED, EXTRA) == f"{expected} {' '.join([*WANTED, *EXTRA])}"


def test_the_trial_is_the_default_entry_with_the_wanted_arguments() -> None:
    text = _menu.render_entry(_menu.parse(config())[0], WANTED, EXTRA)
    assert text == (
        "menuentry 'cpullm.epyc: kernel command line on trial' --id 'cpullm-trial' {\n"
        "\tload_video\n"
        "\tif [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi\n"
        "\tsearch --no-floppy --fs-uuid --set=root 1-2\n"
        "\techo\t'Loading Linux 6.1.0-40-amd64 ...'\n"
        "\tif linux\t/boot/vmlinuz-6.1.0-40-amd64 root=UUID=1-2 ro console=tty0 console=ttyS0 quiet "
        "default_hugepagesz=1G hugepagesz=1G hugepages=0:3,1:3 panic=10 cpullm.trial=1; then true; else\n"
        "\t\treboot\n"
        "\tfi\n"
        "\techo\t'Loading initial ramdisk ...'\n"
        "\tinitrd\t/boot/initrd.img-6.1.0-40-amd64\n"
        "}\n"
    )
    inner = _menu.render_entry(_menu.parse(config())[1].children[0], WANTED, EXTRA)
    assert "\n\tinitrd\t/boot/initrd.img-6.1.0-39-amd64\n}\n" in inner
    assert _menu.parse(text)[0].id == _menu.ENTRY


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param(["\tfwsetup"], "0 lines that load Linux", id="no-linux"),
        pytest.param(["\tlinux /a", "\tlinux /b"], "2 lines that load Linux", id="two"),
        pytest.param(["\tlinux /a ro \\"], "continues its linux line", id="continued"),
        pytest.param(["\tlinux /a ro -- single"], "has -- among its arguments", id="for-init"),
        pytest.param(['\tlinux /a "hugepages=3"'], "quoted huge page arguments", id="quoted"),
        pytest.param(["\tlinux /a " + "x" * 2000], "2068 bytes, and the kernel takes 2047", id="too-long"),
    ],
)
def test_entries_that_cannot_be_tried(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _menu.render_entry(entry(*lines), WANTED, [])


BLOCK = "### BEGIN cpullm.epyc boot trial{} ###\nmenuentry 'x' {{\n}}\n### END cpullm.epyc boot trial ###\n"


@pytest.mark.parametrize(
    ("custom", "expected"),
    [
        pytest.param(None, BLOCK.format(" [new]"), id="no-file"),
        pytest.param("", BLOCK.format(""), id="empty-file"),
        pytest.param("# mine\n", "# mine\n" + BLOCK.format(""), id="others"),
        pytest.param("# mine", "# mine\n" + BLOCK.format(" [newline]"), id="no-line-break-at-the-end"),
        pytest.param("# mine\n\n", "# mine\n\n" + BLOCK.format(""), id="blank-line-stays"),
        pytest.param("\r\n", "\r\n" + BLOCK.format(""), id="dos"),
    ],
)
def test_custom_cfg_is_given_back_byte_for_byte(custom: str | None, expected: str) -> None:
    text = _menu.with_block(custom, "menuentry 'x' {\n}\n")
    assert text == expected
    assert _menu.block_of(text) is not None
    assert _menu.with_block(text, "menuentry 'x' {\n}\n") == text
    assert _menu.without_block(text) == custom
    assert _menu.without_block(custom) == custom


@given(st.one_of(st.none(), st.text()), st.text(alphabet=st.characters(exclude_characters="#")))
def test_what_others_have_stays(custom: str | None, more: str) -> None:
    text = _menu.with_block(custom, "menuentry 'x' {\n}\n")
    assert _menu.without_block(text) == custom
    # What somebody adds while the trial lasts stays as well, on a line of its own.
    if more:
        between = "\n" if "[newline]" in text else ""
        assert _menu.without_block(text + more) == f"{custom or ''}{between}{more}"


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        menu = _menu.parse(text)
    except ValueError:
        return
    assert all(item.line >= 1 for item in menu)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "# GRUB Environment Block\nsaved_entry=0\nnext_entry=a>b\n####",
            {"saved_entry": "0", "next_entry": "a>b"},
            id="two",
        ),
        pytest.param("# GRUB Environment Block\n# WARNING: x=1\n###", {}, id="none"),
        pytest.param("a=b\\\\c=d\n", {"a": "b\\c=d"}, id="escaped"),
    ],
)
def test_environment(text: str, expected: dict[str, str]) -> None:
    assert _menu.parse_environment(text) == expected


@pytest.mark.parametrize(
    ("change", "custom", "waits"),
    [
        pytest.param(("", ""), True, False, id="debian"),
        pytest.param(("  source ${config_directory}/custom.cfg\n", ""), False, False, id="no-41-custom"),
        pytest.param(("set timeout=5", "set timeout=-1"), True, True, id="no-time-limit"),
    ],
)
def test_properties(change: tuple[str, str], custom: bool, waits: bool) -> None:
    text = config().replace(*change) if change[0] else config()
    assert _menu.sources_custom(text) is custom
    assert _menu.waits_for_ever(text) is waits
