# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""1 GiB pages of this machine for containers: reserved at run time, accounted for, and given back.

The account lies in /run, since pages and account end with the machine's uptime, and is shared by all labs of the
machine, since the pool is. It is written before the pool is changed: after a crash between the two, the account claims
too much, and giving back never takes the pool below what was there before the first reservation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab import network, state
from lab.state import LabError, say

SIZE_KIB = 1048576
NODES = Path("/sys/devices/system/node")
# What the machine keeps for everything else when pages are reserved.
KEPT_GIB = 2
ATTEMPTS = 6


@dataclasses.dataclass(frozen=True)
class Reservation:
    """Pages of one node that one owner asked for."""

    owner: str
    node: int
    pages: int


@dataclasses.dataclass
class Account:
    """Who reserved what, and what each node's pool held before anyone did."""

    before: dict[int, int] = dataclasses.field(default_factory=dict)
    reservations: list[Reservation] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the account as JSON values."""
        return {
            "before": [{"node": node, "pages": count} for node, count in sorted(self.before.items())],
            "reservations": [dataclasses.asdict(entry) for entry in self.reservations],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Account:
        """Return the account that to_json() wrote."""
        return cls(
            before={entry["node"]: entry["pages"] for entry in data["before"]},
            reservations=[Reservation(**entry) for entry in data["reservations"]],
        )

    def held(self, node: int) -> int:
        """Return the pages of a node that all owners hold together."""
        return sum(entry.pages for entry in self.reservations if entry.node == node)


def owner_label(owner: str) -> str:
    """Return an owner's name that no other lab of this machine uses."""
    return network.label(owner)


def nodes(root: Path = NODES) -> list[int]:
    """Return the NUMA nodes that have a pool of 1 GiB pages."""
    found = []
    for entry in root.glob("node*"):
        match = re.fullmatch(r"node(\d+)", entry.name)
        if match and _file(int(match[1]), "nr_hugepages", root).exists():
            found.append(int(match[1]))
    return sorted(found)


def spread(count: int, over: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many pages each node gives, as even as can be; the first nodes give the odd ones."""
    if count < 1:
        raise LabError(f"{count} pages: expected at least 1")
    if not over:
        raise LabError("this machine has no pool of 1 GiB pages (its CPU or kernel lacks them)")
    each, rest = divmod(count, len(over))
    shares = [(node, each + (1 if place < rest else 0)) for place, node in enumerate(over)]
    return [(node, share) for node, share in shares if share]


def reserve(count: int, owner: str = "manual", node: int | None = None, root: Path = NODES) -> list[Reservation]:
    """Reserve 1 GiB pages for an owner and return what was reserved, or raise LabError and reserve nothing.

    Without a node the pages are spread over all nodes. The pages come from free memory; memory is compacted, and the
    page cache dropped, as often as it takes, before the number is called unreachable.
    """
    shares = spread(count, nodes(root) if node is None else [node])
    with _account() as account:
        for place, share in shares:
            _check_memory(place, share, root)
        made: list[Reservation] = []
        try:
            for place, share in shares:
                made.append(_grow(account, place, share, owner_label(owner), root))
        except BaseException:
            for entry in made:
                _shrink(account, entry, root)
            raise
    return made


def release(owner: str = "manual", root: Path = NODES) -> int:
    """Give back everything that an owner reserved, and return the number of pages."""
    return _release(lambda label: label == owner_label(owner), root)


def release_all(root: Path = NODES) -> int:
    """Give back everything that owners of this lab reserved, and return the number of pages."""
    return _release(lambda label: label.startswith(network.label_prefix()), root)


def reserved(owner: str) -> int:
    """Return how many pages an owner holds by the account."""
    with _account() as account:
        return sum(entry.pages for entry in account.reservations if entry.owner == owner_label(owner))


def report(root: Path = NODES) -> list[dict[str, Any]]:
    """Return one entry per node: pages in the pool, free, before the first reservation, and by whom they are held."""
    with _account() as account:
        return [
            {
                "node": node,
                "total": _read(node, "nr_hugepages", root),
                "free": _read(node, "free_hugepages", root),
                "before": account.before.get(node, _read(node, "nr_hugepages", root)),
                "held": [
                    {"owner": entry.owner, "pages": entry.pages} for entry in account.reservations if entry.node == node
                ],
            }
            for node in nodes(root)
        ]


def _release(mine: Callable[[str], bool], root: Path) -> int:
    with _account() as account:
        entries = [entry for entry in account.reservations if mine(entry.owner)]
        for entry in entries:
            _shrink(account, entry, root)
        return sum(entry.pages for entry in entries)


def _grow(account: Account, node: int, count: int, owner: str, root: Path) -> Reservation:
    """Add pages to a node's pool; on failure the pool is as it was."""
    total = _read(node, "nr_hugepages", root)
    if not account.held(node):
        account.before[node] = total
    entry = Reservation(owner, node, count)
    account.reservations.append(entry)
    _save(account)
    for attempt in range(ATTEMPTS):
        _write(node, "nr_hugepages", total + count, root)
        found = _read(node, "nr_hugepages", root)
        if found >= total + count:
            return entry
        _make_room(node, root, drop_cache=attempt > 0)
        time.sleep(0.2 * attempt)
    found = _read(node, "nr_hugepages", root) - total
    _write(node, "nr_hugepages", total, root)
    account.reservations.remove(entry)
    _settle(account)
    raise LabError(
        f"node {node} gave {found} of {count} pages of 1 GiB after {ATTEMPTS} attempts with compaction: its free "
        f"memory ({_free_gib(node, root):.1f} GiB) is not in whole, aligned GiB. Ask for {found}, or reserve earlier"
    )


def _shrink(account: Account, entry: Reservation, root: Path) -> None:
    """Give one reservation back; the pool never goes below what it was before the first one."""
    floor = account.before.get(entry.node, 0)
    held_by_others = account.held(entry.node) - entry.pages
    total = _read(entry.node, "nr_hugepages", root)
    # Pages that somebody added by hand meanwhile stay his.
    wanted = max(floor + held_by_others, total - entry.pages)
    if wanted < total:
        _write(entry.node, "nr_hugepages", wanted, root)
    account.reservations.remove(entry)
    _settle(account)


def _settle(account: Account) -> None:
    """Forget the earlier state of nodes that nobody holds pages of, and write the account."""
    account.before = {node: count for node, count in account.before.items() if account.held(node)}
    _save(account)


def _check_memory(node: int, count: int, root: Path) -> None:
    """Raise LabError if a node has not that much memory to give."""
    free = _free_gib(node, root)
    if free - KEPT_GIB < count:
        raise LabError(
            f"node {node}: {count} pages of 1 GiB wanted, {free:.1f} GiB of memory are free or cached, and "
            f"{KEPT_GIB} GiB are kept for the machine: at most {max(0, int(free - KEPT_GIB))}"
        )


def _free_gib(node: int, root: Path) -> float:
    """Return a node's memory that is free or could be freed, in GiB."""
    found = {}
    for line in (root / f"node{node}" / "meminfo").read_text(encoding="ascii").splitlines():
        fields = line.split()
        found[fields[2].rstrip(":")] = int(fields[3])
    return (found.get("MemFree", 0) + found.get("Active(file)", 0) + found.get("Inactive(file)", 0)) / 2**20


def _make_room(node: int, root: Path, *, drop_cache: bool) -> None:
    """Ask the kernel to move memory together; drop the page cache first if that was not enough."""
    if root != NODES:
        return
    if drop_cache:
        say("dropping this machine's caches to make room for 1 GiB pages")
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
        # What the kernel keeps for objects to come lies scattered, and a page of it holds a whole GiB back.
        for cache in Path("/sys/kernel/slab").glob("*/shrink"):
            with contextlib.suppress(OSError):
                cache.write_text("1", encoding="ascii")
    with contextlib.suppress(OSError):
        (root / f"node{node}" / "compact").write_text("1", encoding="ascii")


def _file(node: int, name: str, root: Path) -> Path:
    return root / f"node{node}" / "hugepages" / f"hugepages-{SIZE_KIB}kB" / name


def _read(node: int, name: str, root: Path) -> int:
    return int(_file(node, name, root).read_text(encoding="ascii"))


def _write(node: int, name: str, value: int, root: Path) -> None:
    """Set a value of a pool."""
    path = _file(node, name, root)
    try:
        path.write_text(str(value), encoding="ascii")
    except OSError as error:
        raise LabError(f"{path} cannot be set to {value}: {error}; the lab needs root of a real machine") from error


def _account_path() -> Path:
    return network.run_directory() / "pages.json"


def _save(account: Account) -> None:
    state.write_json(_account_path(), account.to_json())


@contextlib.contextmanager
def _account() -> Iterator[Account]:
    """Hold the machine's account of pages; another lab waits meanwhile."""
    path = _account_path()
    with path.with_suffix(".lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            account = Account.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            account = Account()
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(f"{path}: cannot be read: {error}; compare with 'lab pages list' and delete it") from error
        yield account
