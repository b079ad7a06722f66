# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GRUB's menu: which entry a grub.cfg of grub-mkconfig boots by default, and a copy of it for one trial boot.

The copy lives in custom.cfg, which such a grub.cfg sources at its end, between two marks. What others have in that file
is kept byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline

ENTRY = "cpullm-trial"
TITLE = "cpullm.epyc: kernel command line on trial"
# linux/arch/x86: COMMAND_LINE_SIZE is 2048 with its end; GRUB puts BOOT_IMAGE= before the arguments.
COMMAND_LINE_BYTES = 2047

_BEGIN = "### BEGIN cpullm.epyc boot trial"
_END = "### END cpullm.epyc boot trial ###\n"
_BLOCK = re.compile(
    r"(?P<newline>\n)?^" + re.escape(_BEGIN) + r"(?P<flags>(?: \[[a-z-]+\])*) ###\n.*?^" + re.escape(_END),
    re.MULTILINE | re.DOTALL,
)
_WORD = r"(?:'(?:[^']|'\\'')*'|\"[^\"]*\"|[^\s'\"{]+)"
_NEXT = re.compile(
    r'^\s*if \[ "\$\{next_entry\}" \] *; *then\n(?P<once>.*?)^\s*else\n\s*set default="(?P<default>[^"\n]*)"\n\s*fi$',
    re.MULTILINE | re.DOTALL,
)
_LINUX = re.compile(r"^(?P<indent>\s*)(?P<command>linux(?:16|efi)?)(?P<blank>\s+)(?P<kernel>\S+)(?P<rest>.*)$")


@dataclass(frozen=True)
class Item:
    """An entry or a submenu; lines are those between its braces."""

    title: str
    id: str
    line: int
    submenu: bool
    lines: tuple[str, ...] = ()
    children: tuple[Item, ...] = ()


def _unquote(word: str) -> str:
    if word[:1] == "'":
        return word[1:-1].replace("'\\''", "'")
    return word[1:-1] if word[:1] == '"' else word


def parse(text: str) -> tuple[Item, ...]:
    """Return the menu of a grub.cfg as a tree; raises ValueError where braces do not match.

    Read by lines, as grub-mkconfig writes them: a block opens with a line that ends in `{` and closes with a `}` of its
    own.
    """
    root = Item("", "", 0, True)
    stack: list[tuple[Item | None, list[str], list[Item]]] = [(root, [], [])]
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if re.fullmatch(r"\}", bare):
            if len(stack) == 1:
                raise ValueError(f"line {number}: a }} that closes nothing")
            item, lines, children = stack.pop()
            if item is None:
                # What a function defines inside an entry is a part of that entry.
                lines.append(line)
            else:
                stack[-1][2].append(replace(item, lines=tuple(lines), children=tuple(children)))
            continue
        menu = re.match(rf"(menuentry|submenu)\s+({_WORD})(.*)\{{$", bare)
        if menu:
            found = re.search(rf"(?:--id|\$\{{?menuentry_id_option\}}?)[\s=]+({_WORD})", menu[3])
            entry = Item(_unquote(menu[2]), _unquote(found[1]) if found else "", number, menu[1] == "submenu")
            stack.append((entry, [], []))
        elif bare.endswith("{") and not bare.startswith("#"):
            stack[-1][1].append(line)
            stack.append((None, stack[-1][1], stack[-1][2]))
        else:
            stack[-1][1].append(line)
    if len(stack) != 1:
        raise ValueError("a { that is never closed")
    return tuple(stack[0][2])


def default_of(text: str, environment: dict[str, str]) -> str:
    """Return what a grub.cfg boots when nothing is chosen for once; raises ValueError where once is not known to it."""
    match = _NEXT.search(text)
    if match is None:
        raise ValueError("it has no branch for next_entry, so nothing can be booted once")
    once = match["once"]
    if 'set default="${next_entry}"' not in once or "save_env next_entry" not in once:
        raise ValueError("its branch for next_entry does not take the choice back, so once would be for ever")
    wanted = match["default"]
    if wanted in ("${saved_entry}", "$saved_entry"):
        return environment.get("saved_entry", "") or "0"
    if "$" in wanted:
        raise ValueError(f"its default is {wanted!r}: expected an entry's number, id or title, or saved_entry")
    return wanted or "0"


def find(menu: Sequence[Item], wanted: str) -> Item:
    """Return the entry that GRUB takes for a default such as `0`, `1>2`, an id or a title; raises ValueError.

    As in GRUB, a default that names nothing means the first entry.
    """
    if not menu:
        raise ValueError("it has no entry")
    head, _mark, rest = wanted.partition(">")
    if re.fullmatch(r"[0-9]{1,6}", head):
        number = int(head)
        item = menu[number] if number < len(menu) else menu[0]
    else:
        item = next((one for one in menu if head and head in (one.id, one.title)), menu[0])
    if item.submenu:
        if not rest:
            raise ValueError(f"its default is the submenu '{item.title}', in which GRUB waits")
        return find(item.children, rest)
    return item


def parse_environment(text: str) -> dict[str, str]:
    """Return the variables of GRUB's environment block."""
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            found[name] = re.sub(r"\\(.)", r"\1", value)
    return found


def sources_custom(text: str) -> bool:
    """Return whether a grub.cfg reads the custom.cfg beside it."""
    return re.search(r"^\s*source\s+\$\{config_directory\}/custom\.cfg\s*$", text, re.MULTILINE) is not None


def waits_for_ever(text: str) -> bool:
    """Return whether the menu has no time limit, so that every boot waits for a key."""
    return re.search(r"^\s*set timeout=[\"']?-1\b", text, re.MULTILINE) is not None


def trial_arguments(rest: str, wanted: Sequence[str], extra: Sequence[str]) -> str:
    """Return the arguments of a `linux` line with the wanted ones in place of all that speak of huge pages.

    The rest stays as it is written, in its order, with its repetitions and quotes.
    """
    kept = _cmdline.without_hugepage_arguments(rest).rstrip()
    return " ".join([kept, *wanted, *extra]) if kept else " " + " ".join([*wanted, *extra])


def render_entry(entry: Item, wanted: Sequence[str], extra: Sequence[str]) -> str:
    """Return a trial entry made from another one; raises ValueError where that one is not understood.

    A kernel that cannot be loaded reboots at once: GRUB would otherwise wait in its menu for ever.
    """
    lines = list(entry.lines)
    matches = [(number, match) for number, line in enumerate(lines) if (match := _LINUX.match(line))]
    if len(matches) != 1:
        raise ValueError(f"entry '{entry.title}' has {len(matches)} lines that load Linux, expected one")
    place, match = matches[0]
    if match["rest"].rstrip().endswith("\\"):
        raise ValueError(f"entry '{entry.title}' continues its linux line on the next one, which is not understood")
    if "--" in match["rest"].split():
        raise ValueError(f"entry '{entry.title}' has -- among its arguments: what follows is for init, not the kernel")
    arguments = trial_arguments(match["rest"], wanted, extra)
    line = f"{match['command']}{match['blank']}{match['kernel']}{arguments}"
    size = len(f"BOOT_IMAGE={match['kernel']}{arguments}".encode("utf-8", "surrogateescape"))
    if size > COMMAND_LINE_BYTES:
        raise ValueError(f"the command line would have {size} bytes, and the kernel takes {COMMAND_LINE_BYTES}")
    if not _cmdline.carries(_cmdline.split(arguments), wanted):
        raise ValueError(f"entry '{entry.title}' has quoted huge page arguments, which are not understood: {line}")
    # The entry may be in a submenu: its lines lose that indentation.
    depth = min((len(one) - len(one.lstrip("\t")) for one in lines if one.strip()), default=0)
    body = [one[depth:] if one[:depth].strip() == "" else one for one in lines]
    body[place] = f"if {line}; then true; else\n\t\treboot\n\tfi"
    text = "\n".join(f"\t{one}" if one.strip() else "" for one in body)
    return f"menuentry '{TITLE}' --id '{ENTRY}' {{\n{text}\n}}\n"


def block_of(custom: str) -> str | None:
    """Return our part of custom.cfg, or None."""
    match = _BLOCK.search(custom)
    return match[0] if match else None


def without_block(custom: str | None) -> str | None:
    """Return custom.cfg as others have it; None is a file that is not there."""
    if custom is None:
        return None
    match = _BLOCK.search(custom)
    if match is None:
        return custom
    begin, end = match.span()
    # A line break before the block is ours only where it says so, and stays where others wrote more after it.
    if match["newline"] and ("[newline]" not in match["flags"] or end < len(custom)):
        begin += 1
    rest = custom[:begin] + custom[end:]
    if not rest and "[new]" in match["flags"]:
        return None
    return without_block(rest)


def with_block(custom: str | None, entry: str) -> str:
    """Return custom.cfg with our part at its end, in place of an older one."""
    others = without_block(custom)
    flags = " [new]" if others is None else " [newline]" if others and not others.endswith("\n") else ""
    text = f"{others or ''}{chr(10) if 'newline' in flags else ''}"
    return f"{text}{_BEGIN}{flags} ###\n{entry}{_END}"
