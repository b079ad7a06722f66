# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What forbids reserving pages in a way on a host, beside its memory (_iomem) and GRUB's files (_grub)."""

from __future__ import annotations

from collections.abc import Sequence

from ansible_collections.cpullm.epyc.plugins.module_utils import _cmdline, _grub, _grubenv, _trial
from ansible_collections.cpullm.epyc.plugins.module_utils._build import parse_os_release
from ansible_collections.cpullm.epyc.plugins.module_utils._sysfs import read_number, read_optional

# Where a trial boot was shown, in the lab's VMs.
TRIED = ("debian12", "debian13")
# hugetlb_free_vmemmap= came with this kernel, and the switch for a running one with a later one.
FREE_VMEMMAP_SINCE = (5, 14)
OPTIMIZE_VMEMMAP = "/proc/sys/vm/hugetlb_optimize_vmemmap"


def distribution_faults(os_release: str | None) -> list[str]:
    """Return why a trial boot is not tried on this distribution; [] where it was shown."""
    try:
        label = parse_os_release(os_release or "")
    except ValueError:
        label = "an unknown distribution"
    if label in TRIED:
        return []
    return [
        f"/etc/os-release: found {label}, expected {' or '.join(TRIED)}, where a trial boot was shown. Others change "
        "how GRUB boots once (Ubuntu's recordfail, the settings of cloud images), and nobody showed it there: reserve "
        "without GRUB, early in boot, with grub_hugepages_method: runtime"
    ]


def kernel_faults(release: str, arguments: Sequence[str], pages: Sequence[tuple[int, int]], nodes: int) -> list[str]:
    """Return why this kernel would not do what the arguments ask; `nodes` is how many the host has with memory.

    An older kernel takes a sum and spreads it evenly over all nodes.
    """
    version = _cmdline.parse_release(release)
    found = []
    counts = {count for _node, count in pages}
    if version < _cmdline.PER_NODE_SINCE and nodes > 1 and (len(pages) != nodes or len(counts) > 1):
        wanted = ", ".join(f"{count} on node {node}" for node, count in pages)
        found.append(
            f"the kernel {release} spreads pages evenly over {nodes} nodes, and {wanted} are wanted: expected 5.16 or "
            f"later, or the same number on each node. Install a newer kernel, {_grubenv.INSTEAD}"
        )
    if version < FREE_VMEMMAP_SINCE and any(_cmdline.name_of(each) == "hugetlb_free_vmemmap" for each in arguments):
        found.append(
            f"the kernel {release} does not know hugetlb_free_vmemmap: expected 5.14 or later. Install a newer kernel, "
            "or set grub_hugepages_free_vmemmap and host_plan_free_vmemmap to false"
        )
    return found


def trial_faults(
    host: _grub.Host, found: _trial.Found, wanted: _grub.Wanted, deadline_s: int, root: str = "/"
) -> list[str]:
    """Return why the host below `root` must not be given a trial boot: the one list, asked by whoever is about to."""
    nodes = sum(1 for room in host.memory.rooms if room.memory_bytes)
    return [
        *distribution_faults(read_optional(root, "/etc/os-release")),
        *kernel_faults(host.release, wanted.arguments, wanted.pages, nodes),
        *_grubenv.faults(_grubenv.read(root)),
        *_trial.findings(host, found, wanted.arguments, deadline_s),
    ]


def runtime_faults(free_vmemmap: bool, root: str = "/") -> list[str]:
    """Return why pages cannot be reserved on the running kernel of the host below `root` as wanted."""
    if not free_vmemmap or read_optional(root, OPTIMIZE_VMEMMAP) is not None:
        return []
    return [
        f"{OPTIMIZE_VMEMMAP} does not exist: this kernel cannot give back page descriptions while it runs (expected "
        "6.0 or later). Set grub_hugepages_free_vmemmap and host_plan_free_vmemmap to false"
    ]


def vmemmap_faults(free_vmemmap: bool, root: str = "/") -> list[str]:
    """Return what is missing of page descriptions that were to be given back; the plan may count on that memory."""
    if not free_vmemmap or read_number(root, OPTIMIZE_VMEMMAP):
        return []
    return [
        "the kernel did not give back page descriptions: hugetlb_free_vmemmap=on is wanted, and "
        f"{OPTIMIZE_VMEMMAP} is not 1 (a kernel without HUGETLB_PAGE_OPTIMIZE_VMEMMAP ignores it)"
    ]
