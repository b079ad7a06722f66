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
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import judge, platform_of
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


def judged(facts: Facts, dimm: Facts, hugepages: Facts | None = None) -> Facts:
    """Return the judgement of DeepSeek-R1 on a machine."""
    plan = make_plan(facts, manifest(R1, 16), Overrides(context=32768))
    result = judge(facts, dimm, hugepages or {"poisoned_bytes": 0}, plan)
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
    assert finding["loss"].startswith("8% of the memory's read rate")


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
    assert finding["loss"].startswith("20%")


def test_slower_modules_than_the_processor_takes_are_advice() -> None:
    finding = only(judged(numa(), board(rated=5600, configured=5600)))
    assert (finding["severity"], finding["found"]) == ("advice", "modules rated for 5600 MT/s")
    assert finding["loss"].startswith("7%")


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
    result = judge(facts, dimm, {"poisoned_bytes": 0}, plan)
    assert [finding["name"] for finding in result["findings"]] == ["socket 0, memory", "socket 1, memory"]
    assert {finding["found"] for finding in result["findings"]} == {"4800 MT/s configured, modules rated for 5600 MT/s"}
    assert [roof["name"] for roof in result["roofs"]] == ["6 channels x 8 bytes x 4800 MT/s"] * 2
