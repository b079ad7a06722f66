# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel command lines: ordered lists of arguments whose names may repeat, never sorted and never a dict."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Documentation/admin-guide/kernel-parameters.txt. `hugepages=` counts for the `hugepagesz=` before it.
HUGEPAGE_NAMES = ("default_hugepagesz", "hugepagesz", "hugepages", "hugetlb_free_vmemmap", "hugetlb_cma")
# `hugepages=<node>:<n>,...` is understood since this kernel; an older one reads it as no number and reserves nothing.
PER_NODE_SINCE = (5, 16)

# The kernel takes `-` and `_` for the same in a name.
_NAMES = "|".join(name.replace("_", "[-_]") for name in HUGEPAGE_NAMES)
_NAMED = re.compile(rf"(?<![A-Za-z0-9_.-])(?:{_NAMES})=[^\s\"'\\]*")
# The same for sed: what stands between blanks, with the blanks before it.
SED_HUGEPAGES = rf"s/(^|[[:space:]]+)({_NAMES})=[^[:space:]]*//g"


def split(text: str) -> list[str]:
    """Return the arguments of a command line in order, as the kernel splits them: at blanks outside double quotes."""
    arguments: list[str] = []
    current = ""
    quoted = False
    for character in text.strip("\0"):
        if character == '"':
            quoted = not quoted
        if character.isspace() and not quoted:
            if current:
                arguments.append(current)
            current = ""
        else:
            current += character
    if current:
        arguments.append(current)
    return arguments


def name_of(argument: str) -> str:
    """Return an argument's name; the kernel takes `-` and `_` for the same in it."""
    return argument.partition("=")[0].strip('"').replace("-", "_")


def hugepage_arguments(arguments: Iterable[str]) -> list[str]:
    """Return the arguments that speak of huge pages, in order."""
    return [argument for argument in arguments if name_of(argument) in HUGEPAGE_NAMES]


def find_hugepage_arguments(text: str) -> list[str]:
    """Return the huge page arguments that appear anywhere in a line of a shell file, quoted or not."""
    return _NAMED.findall(text)


def without_hugepage_arguments(text: str) -> str:
    """Return a command line without its huge page arguments, the rest as it was written."""
    return re.sub(rf"(?:^|\s+)(?:{_NAMES})=[^\s\"']*(?=\s|$)", "", text)


def is_subsequence(wanted: Sequence[str], arguments: Iterable[str]) -> bool:
    """Return whether all wanted arguments are there in their order, whatever stands between them."""
    rest = iter(arguments)
    return all(argument in rest for argument in wanted)


def carries(arguments: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether a command line does what is wanted: all of it in order, and nothing else about huge pages.

    A second `hugepagesz=` of one size counts as something else: the kernel takes the first and ignores the second
    together with its `hugepages=`.
    """
    return is_subsequence(wanted, arguments) and hugepage_arguments(arguments) == hugepage_arguments(wanted)


def size_word(size_kib: int) -> str:
    """Return a page size as the command line writes it; raises ValueError on a size that x86-64 does not have."""
    words = {2048: "2M", 1048576: "1G"}
    if size_kib not in words:
        raise ValueError(f"page size {size_kib} KiB: expected 2048 or 1048576")
    return words[size_kib]


def parse_release(release: str) -> tuple[int, int]:
    """Return major and minor of a kernel release such as `6.1.0-40-amd64`; raises ValueError."""
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", release)
    if not match:
        raise ValueError(f"kernel release {release!r:.80} does not start with two numbers")
    return int(match[1]), int(match[2])


def build(size_kib: int, pages: Sequence[tuple[int, int]], release: str, free_vmemmap: bool = False) -> list[str]:
    """Return the arguments that reserve (node, pages) at boot: per node where the kernel knows it, else in one sum.

    With `free_vmemmap` the kernel gives back what describes the 4 KiB pages of a huge one.
    """
    word = size_word(size_kib)
    if parse_release(release) >= PER_NODE_SINCE:
        count = ",".join(f"{node}:{number}" for node, number in pages)
    else:
        count = str(sum(number for _node, number in pages))
    arguments = [f"default_hugepagesz={word}", f"hugepagesz={word}", f"hugepages={count}"]
    return ["hugetlb_free_vmemmap=on", *arguments] if free_vmemmap else arguments


def check(arguments: Sequence[str]) -> list[str]:
    """Return what is wrong with wanted arguments; [] where they can be written as they are.

    They pass through a shell file and through GRUB's own syntax, so only what needs no quoting anywhere is taken.
    """
    faults = [
        f"kernel argument {argument!r}: expected name=value of letters, digits and the characters . , : _ = / + @ -"
        for argument in arguments
        if not re.fullmatch(r"[A-Za-z0-9_.-]+(?:=[A-Za-z0-9_.,:=/+@-]*)?", argument)
    ]
    size: str | None = None
    sizes: list[str] = []
    for argument in arguments:
        name, _equals, value = argument.partition("=")
        if name_of(name) == "hugepagesz":
            if value in sizes:
                faults.append(
                    f"hugepagesz={value} stands there twice: the kernel ignores the second with its hugepages="
                )
            sizes.append(value)
            size = value
        elif (
            name_of(name) == "hugepages"
            and size is None
            and len(sizes) == 0
            and "default_hugepagesz" not in {name_of(other) for other in arguments}
        ):
            faults.append(f"{argument} has no hugepagesz= before it: the kernel would take it for the default size")
    return faults
