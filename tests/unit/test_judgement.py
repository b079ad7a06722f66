# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the judgement says of machines: the published one, and one for each fault."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.filter.judgement_table import FilterModule, judgement_table
from ansible_collections.cpullm.epyc.plugins.module_utils import _numa, _smbios
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Host, judge, platform_of
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import GIB, Overrides, make_plan
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_gguf import TINY
from tests.unit.test_plan import R1, machine, manifest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
Facts = dict[str, Any]


def board(
    sockets: int = 1, channels: int = 12, *, rated: int = 6000, configured: int = 6000, per_channel: int = 1
) -> Facts:
    """Return cpullm_dimm of a board whose every slot has an equal module of 64 GiB."""
    slots = [
        {
            "handle": 100 * socket + 10 * channel + place,
            "locator": f"DIMM_P{socket}_{chr(65 + channel)}{place}",
            "socket": socket,
            "channel": channel,
            "populated": True,
            "size_bytes": 64 * GIB,
            "rated_mts": rated,
            "configured_mts": configured,
            "rank": 2,
            "ecc": True,
            "part_number": "M321R8GA0PB2-CCPPC",
        }
        for socket in range(sockets)
        for channel in range(channels)
        for place in range(per_channel)
    ]
    return {"readable": True, "reason": None, "slots": slots}


def numa(name: str = "AMD EPYC 9135 16-Core Processor", sockets: int = 1, ccds: int = 8, smt: bool = True) -> Facts:
    """Return cpullm_numa of a machine with that processor."""
    facts = machine([768.0] * sockets)
    facts["cpu"].update(model=name, smt=smt, smt_control="on" if smt else "notsupported")
    facts["l3"] = [
        {"id": i, "socket": socket, "node": socket, "cpus": ""} for socket in range(sockets) for i in range(ccds)
    ]
    return facts


def judged(facts: Facts, dimm: Facts, hugepages: Facts | None = None, **others: Facts) -> Facts:
    """Return the judgement of DeepSeek-R1 on a machine."""
    plan = make_plan(facts, manifest(R1, 16), Overrides(context=32768))
    result = judge(Host(facts, plan, dimm, hugepages or {"poisoned_bytes": 0}, **others))
    json.dumps(result)
    return result


def only(result: Facts) -> Facts:
    """Return the one finding that there is."""
    (finding,) = result["findings"]
    return dict(finding)


def without(dimm: Facts, *locators: str) -> Facts:
    """Return a board on which these slots are empty."""
    dimm = copy.deepcopy(dimm)
    for slot in dimm["slots"]:
        if slot["locator"] in locators:
            slot.update(populated=False, size_bytes=0, rated_mts=None, configured_mts=None, rank=None, part_number=None)
    return dimm


@pytest.mark.parametrize(
    ("name", "channels", "mts"),
    [
        ("AMD EPYC 9135 16-Core Processor", 12, 6000),
        ("AMD EPYC 9965 192-Core Processor", 12, 6000),
        ("AMD EPYC 9754 128-Core Processor", 12, 4800),
        ("AMD EPYC 9354P 32-Core Processor", 12, 4800),
        ("AMD EPYC 8024P 8-Core Processor", 6, 4800),
        ("AMD EPYC 7763 64-Core Processor", 8, 3200),
    ],
)
def test_platforms(name: str, channels: int, mts: int) -> None:
    platform = platform_of(name)
    assert platform is not None
    assert (platform.channels, platform.mts) == (channels, mts)


@pytest.mark.parametrize("name", [None, "", "AMD EPYC-Genoa Processor", "QEMU TCG CPU version 2.5+", "EPYC 91355"])
def test_an_unknown_processor_is_not_guessed(name: str | None) -> None:
    assert platform_of(name) is None


def test_a_whole_machine_has_nothing_to_say_and_two_roofs() -> None:
    result = judged(numa(), board())
    assert result["findings"] == []
    memory, links = result["roofs"]
    assert memory["name"] == "12 channels x 8 bytes x 6000 MT/s"
    assert memory["gbs"] == pytest.approx(576.0)
    assert (memory["hypothesis"], links["hypothesis"]) == (False, True)


@pytest.mark.parametrize(("mts", "gbs"), [(4800, 460.8), (5600, 537.6), (6000, 576.0)])
def test_the_published_machine_s_roof(mts: int, gbs: float) -> None:
    # 39.23 GB a token, from the shapes of DeepSeek-R1 in Q8_0, and at depth the KV cache on top.
    roof = judged(numa(), board(rated=mts, configured=mts))["roofs"][0]
    assert roof["gbs"] == pytest.approx(gbs)
    at = {entry["depth"]: entry["tokens_per_second"] for entry in roof["tokens"]}
    assert at[0] == pytest.approx(gbs / 39.23, rel=0.01)
    assert sorted(at) == [0, 4096, 16384]
    assert at[0] > at[4096] > at[16384]


def test_two_ccds_are_a_lower_roof_and_said_to_be_a_hypothesis() -> None:
    result = judged(numa(ccds=2), board())
    finding = only(result)
    assert finding["severity"] == "advice"
    assert "280 GB/s, below the memory's 576 GB/s (a hypothesis)" in finding["found"]
    # The recipe's 7.17 tokens/s, from which the hypothesis comes.
    assert result["roofs"][1]["tokens"][0]["tokens_per_second"] == pytest.approx(7.14, abs=0.05)


def test_an_empty_channel_is_named_with_its_share() -> None:
    finding = only(judged(numa(), without(board(), "DIMM_P0_L0")))
    assert finding["severity"] == "warning"
    assert finding["found"] == "11 of 12 channels populated, empty: DIMM_P0_L0"
    # 11 channels at 6000 MT/s are 528 GB/s, and a token reads 39.23 GB.
    assert finding["loss"].startswith("up to 1.2 tokens/s: 8% of the memory's read rate")


def test_a_board_that_shows_fewer_slots_than_the_processor_has_channels() -> None:
    assert only(judged(numa(), board(channels=8)))["found"] == "8 of 12 channels populated"


def test_each_socket_is_judged_by_itself() -> None:
    result = judged(numa(sockets=2), without(board(sockets=2), "DIMM_P1_C0", "DIMM_P1_D0"))
    finding = only(result)
    assert finding["name"] == "socket 1, memory"
    assert finding["found"] == "10 of 12 channels populated, empty: DIMM_P1_C0, DIMM_P1_D0"
    assert [roof["gbs"] for roof in result["roofs"] if not roof["hypothesis"]] == pytest.approx([576.0, 480.0])


def test_a_slower_setting_is_named_with_the_speed_that_the_processor_takes() -> None:
    finding = only(judged(numa(), board(rated=6400, configured=4800)))
    assert finding["found"] == "4800 MT/s configured, modules rated for 6400 MT/s"
    assert finding["expected"] == "6000 MT/s, which EPYC 9005 takes"
    assert finding["loss"].startswith("up to 2.9 tokens/s: 20%")


def test_slower_modules_than_the_processor_takes_are_advice() -> None:
    finding = only(judged(numa(), board(rated=5600, configured=5600)))
    assert (finding["severity"], finding["found"]) == ("advice", "modules rated for 5600 MT/s")
    assert finding["loss"].startswith("up to 1.0 tokens/s: 7%")


def test_a_slow_setting_of_modules_that_tell_no_rating_is_advice() -> None:
    dimm = board(configured=4800)
    dimm["slots"][3]["rated_mts"] = None
    finding = only(judged(numa(), dimm))
    assert (finding["severity"], finding["found"]) == ("advice", "4800 MT/s, and modules that tell no rating")
    assert finding["loss"].startswith("up to 2.9 tokens/s: 20%")


def test_faster_modules_than_the_processor_takes_cost_nothing() -> None:
    assert judged(numa("AMD EPYC 9354 32-Core Processor"), board(rated=5600, configured=4800))["findings"] == []


def test_a_speed_that_no_table_tells_is_unknown_and_no_roof() -> None:
    dimm = board()
    dimm["slots"][3]["configured_mts"] = None
    result = judged(numa(), dimm)
    assert only(result)["severity"] == "unknown"
    assert [roof["hypothesis"] for roof in result["roofs"]] == [True]


def test_different_sizes_name_the_odd_ones_once() -> None:
    dimm = board()
    dimm["slots"][0].update(size_bytes=32 * GIB, part_number="other")
    finding = only(judged(numa(), dimm))
    assert finding["found"] == "modules of different sizes: 11 x 64 GiB, 1 x 32 GiB (DIMM_P0_A0)"


def test_two_modules_in_a_channel_are_advice() -> None:
    finding = only(judged(numa(), board(per_channel=2)))
    assert finding["found"] == "two modules in 12 of 12 channels"


def test_modules_without_ecc_and_lost_memory_are_warnings() -> None:
    dimm = board()
    dimm["slots"][5]["ecc"] = False
    result = judged(numa(), dimm, {"poisoned_bytes": 4096})
    assert [finding["severity"] for finding in result["findings"]] == ["warning", "warning"]
    text = json.dumps(result["findings"])
    assert "DIMM_P0_F0" in text
    assert "4096 bytes out of use" in text


def test_modules_raised_beyond_their_rating_cost_nothing() -> None:
    assert judged(numa(), board(rated=5600, configured=6000))["findings"] == []


def test_attention_is_a_roof_where_the_clock_is_known() -> None:
    dimm = {**board(), "processors": [{"populated": True, "socket": 0, "maximum_mhz": 4300}]}
    attention = judged(numa(), dimm)["roofs"][-1]
    assert attention["name"] == "attention in F32, 16 cores x 64 operations x 4.30 GHz"
    assert (attention["gbs"], attention["hypothesis"]) == (None, True)
    # 61 layers x 128 heads x 2 x (512 + 64 + 512) are 17.0 MFLOP for each token of context.
    assert {row["depth"]: row["tokens_per_second"] for row in attention["tokens"]} == pytest.approx(
        {depth: 16 * 64 * 4.3e9 / (depth * 16_990_208) for depth in (4096, 16384)}
    )


@pytest.mark.parametrize(
    "processors",
    [
        pytest.param([], id="none"),
        pytest.param([{"populated": True, "socket": 0, "maximum_mhz": None}], id="unknown-clock"),
        pytest.param([{"populated": False, "socket": 0, "maximum_mhz": 4300}], id="empty-socket"),
        pytest.param([{"populated": True, "socket": 1, "maximum_mhz": 4300}], id="the-other-socket"),
    ],
)
def test_attention_is_no_roof_where_the_clock_is_not_known(processors: list[Facts]) -> None:
    assert all(roof["gbs"] for roof in judged(numa(), {**board(), "processors": processors})["roofs"])


def test_a_measured_rate_stands_beside_the_roofs() -> None:
    rows = [{"socket": 0, "gbs": 281.0, "gbs_min": 280.0, "gbs_max": 282.0}]
    (measured,) = judged(numa(), board(), bandwidth={"available": True, "sockets": rows})["measured"]
    assert (measured["socket"], measured["gbs"]) == (0, 281.0)
    # What the published machine reached.
    assert measured["tokens"][0]["tokens_per_second"] == pytest.approx(7.17, abs=0.02)


ERRORS = [
    {"controller": "mc0", "module": None, "corrected": 12, "uncorrected": 1},
    {"controller": "mc0", "module": "P0_DIMMC0", "corrected": 12, "uncorrected": 0},
    {"controller": "mc0", "module": "P0_DIMMD0", "corrected": 0, "uncorrected": 1},
]
LINK = {"gts": 8.0, "lanes": 4, "best_gts": 16.0, "best_lanes": 4}
DISK = {"name": "nvme0n1", "model": "X", "rotational": False, "link": LINK}


@pytest.mark.parametrize(
    ("others", "severity", "name", "found", "loss"),
    [
        pytest.param(
            {"condition": {"memory_errors": [*ERRORS[:2], {**ERRORS[0], "corrected": 0, "uncorrected": 0}]}},
            "warning",
            "memory errors",
            "1 uncorrected since the driver was loaded",
            "the page that holds such a byte",
            id="uncorrected",
        ),
        pytest.param(
            {"condition": {"memory_errors": [{**ERRORS[0], "uncorrected": 0}, ERRORS[1]]}},
            "advice",
            "memory errors",
            "12 corrected since the driver was loaded: 12 in P0_DIMMC0",
            "none yet",
            id="corrected",
        ),
        pytest.param(
            {
                "condition": {
                    "governors": [
                        {"governor": "performance", "driver": "acpi-cpufreq", "cpus": 31},
                        {"governor": "schedutil", "driver": "acpi-cpufreq", "cpus": 1},
                    ]
                }
            },
            "advice",
            "governor",
            "schedutil (acpi-cpufreq) on 1 CPUs",
            "not measured here",
            id="governor",
        ),
        pytest.param(
            {
                "condition": {
                    "module_temperatures": [
                        {"sensor": "spd5118 1-0050", "celsius": 84.75, "critical": 85.0},
                        {"sensor": "spd5118 1-0051", "celsius": 85.0, "critical": None},
                    ]
                }
            },
            "warning",
            "memory temperature",
            "1 module(s) at or above their limit: spd5118 1-0051 85 C",
            "up to 20%",
            id="hot",
        ),
        pytest.param(
            {"condition": {"module_temperatures": [{"sensor": "jc42 0-0018", "celsius": 70.0, "critical": 70.0}]}},
            "warning",
            "memory temperature",
            "1 module(s) at or above their limit: jc42 0-0018 70 C",
            "up to 20%",
            id="at-the-sensor-s-limit",
        ),
        pytest.param(
            {"condition": {"disks": [DISK]}},
            "advice",
            "disk nvme0n1",
            "a PCIe link of 8 GT/s x 4",
            "50% of the rate at which weights load",
            id="link",
        ),
        pytest.param(
            {"disk_read": {"available": True, "gbs": 1.0, "source": "/dev/sda"}},
            "advice",
            "load time",
            "1.00 GB/s from /dev/sda: 12 min for each start",
            "none in decode",
            id="slow-disk",
        ),
        pytest.param(
            {"disk_read": {"available": True, "gbs": 0.2, "source": "/dev/sda"}},
            "warning",
            "load time",
            "0.20 GB/s from /dev/sda: 59 min for each start",
            "the start, which is ended before it is done",
            id="slower-than-the-timeout",
        ),
    ],
)
def test_what_changes_while_the_host_runs(others: Facts, severity: str, name: str, found: str, loss: str) -> None:
    finding = next(row for row in judged(numa(), board(), **others)["findings"])
    assert (finding["severity"], finding["name"]) == (severity, name)
    assert finding["found"].startswith(found)
    assert finding["loss"].startswith(loss)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"condition": {"memory_errors": [{**ERRORS[0], "corrected": 0, "uncorrected": 0}]}}, id="errors"),
        pytest.param({"condition": {"disks": [{**DISK, "link": None}]}}, id="no-link"),
        pytest.param({"condition": {"disks": [{**DISK, "link": {**LINK, "gts": 16.0}}]}}, id="full-link"),
        pytest.param({"disk_read": {"available": True, "gbs": 6.0, "source": "x"}}, id="fast-disk"),
        pytest.param({"disk_read": {"available": False, "gbs": None, "reason": "no shard"}}, id="no-rate"),
    ],
)
def test_what_is_well_is_not_a_finding(others: Facts) -> None:
    assert judged(numa(), board(), **others)["findings"] == []


def test_a_refused_host_is_judged_without_tokens() -> None:
    result = judge(Host(numa(sockets=2), None, without(board(sockets=2), "DIMM_P1_C0")))
    finding = only(result)
    assert finding["name"] == "socket 1, memory"
    assert finding["loss"].startswith("8% of the memory's read rate")
    assert [roof["tokens"] for roof in result["roofs"]] == [[]] * 4
    assert "socket 0: 12 channels x 8 bytes x 6000 MT/s = 576 GB/s" in " ".join(judgement_table(result))


def test_a_single_thread_per_core_is_advice() -> None:
    assert only(judged(numa(smt=False), board()))["name"] == "cpu.smt"


def test_tables_that_cannot_be_read_are_said_to_be_unread() -> None:
    result = judged(numa(), {"readable": False, "reason": "not root", "slots": []})
    assert only(result)["found"] == "none could be read: not root"


def test_firmware_that_reports_every_slot_empty() -> None:
    dimm = board()
    finding = only(judged(numa(), without(dimm, *(slot["locator"] for slot in dimm["slots"]))))
    assert finding["severity"] == "unknown"
    assert "none of them populated" in finding["found"]


def test_locators_that_name_no_channel() -> None:
    dimm = board()
    for slot in dimm["slots"]:
        slot.update(channel=None)
    assert "locators that name no channel" in only(judged(numa(), dimm))["found"]


def test_a_locator_without_a_channel_leaves_the_others_unjudged() -> None:
    dimm = board()
    dimm["slots"][3]["channel"] = None
    result = judged(numa(), dimm)
    assert only(result)["severity"] == "unknown"
    assert "1 of 12 module(s) with locators that name no channel (DIMM_P0_D0)" in only(result)["found"]
    assert [roof["hypothesis"] for roof in result["roofs"]] == [True]


@pytest.mark.parametrize("instances", [1, 2])
def test_slots_that_name_no_socket_are_nobody_s_on_two_sockets(instances: int) -> None:
    dimm = board(sockets=2)
    for slot in dimm["slots"]:
        slot["socket"] = None
    facts = numa(sockets=2)
    plan = make_plan(facts, manifest(R1, 16), Overrides(context=32768, instances=instances))
    findings = judge(Host(facts, plan, dimm))["findings"]
    assert [row["found"] for row in findings] == ["24 slot(s) whose locators name no socket"] * instances


@pytest.mark.parametrize("refused", [False, True])
def test_nodes_per_socket_are_a_finding_with_the_menu_s_path(refused: bool) -> None:
    facts = {**machine([1536], cores=64, nps=4), "l3": []}
    plan = None if refused else make_plan(facts, manifest(R1, 16), Overrides())
    finding = judge(Host(facts, plan, board()))["findings"][0]
    assert (finding["severity"], finding["found"]) == ("warning", "4 NUMA nodes (NPS4)")
    assert "AMD CBS" in finding["way_out"]


def test_slots_that_name_no_socket_are_the_only_socket_s() -> None:
    dimm = board()
    for slot in dimm["slots"]:
        slot["socket"] = None
    assert judged(numa(), dimm)["findings"] == []


VALUES = {
    "locator": st.none() | st.text(max_size=5),
    "socket": st.none() | st.integers(0, 2),
    "channel": st.none() | st.integers(0, 15),
    "populated": st.none() | st.booleans(),
    "size_bytes": st.none() | st.integers(0, 1 << 40),
    "rated_mts": st.none() | st.integers(1, 10000),
    "configured_mts": st.none() | st.integers(1, 10000),
    "rank": st.none() | st.integers(1, 8),
    "ecc": st.none() | st.booleans(),
    "part_number": st.none() | st.text(max_size=5),
}


@given(slots=st.lists(st.fixed_dictionaries({"handle": st.integers(0, 65535), **VALUES}), max_size=30))
def test_any_tables_are_judged_and_shown(slots: list[Facts]) -> None:
    result = judged(numa(sockets=2), {"readable": True, "reason": None, "slots": slots})
    assert all(roof["gbs"] > 0 for roof in result["roofs"])
    assert all(len(line) <= 110 for line in judgement_table(result, "r1"))


def test_the_table() -> None:
    lines = judgement_table(judged(numa(ccds=2), without(board(), "DIMM_P0_L0")), "r1", 200)
    assert lines[0] == "r1: 2 finding(s) on the hardware"
    assert lines[1].startswith("roof, socket 0: 11 channels x 8 bytes x 6000 MT/s = 528 GB/s: tokens/s at most 13.")
    assert any(line.startswith("warning: socket 0, memory: found 11 of 12 channels") for line in lines)
    with pytest.raises(AnsibleFilterError, match="found no judgement"):
        judgement_table({})
    assert set(FilterModule().filters()) == {"judgement_table"}


def test_the_lab_s_vm_runs_its_modules_below_their_rating() -> None:
    root = str(FIXTURES / "lab-vm-bookworm")
    facts, dimm = _numa.gather(root), _smbios.gather(root)
    plan = make_plan(facts, manifest(TINY, 3), Overrides(weights="mmap"))
    result = judge(Host(facts, plan, dimm, {"poisoned_bytes": 0}))
    assert [finding["name"] for finding in result["findings"]] == ["socket 0, memory", "socket 1, memory"]
    assert {finding["found"] for finding in result["findings"]} == {"4800 MT/s configured, modules rated for 5600 MT/s"}
    assert [roof["name"] for roof in result["roofs"]] == ["6 channels x 8 bytes x 4800 MT/s"] * 2
