# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the fleet report says of hosts, and what it survives; tests/browser opens it."""

from __future__ import annotations

import copy
import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible.parsing.dataloader import DataLoader
from ansible_collections.cpullm.epyc.plugins.action import fleet_report
from ansible_collections.cpullm.epyc.plugins.filter.serving_table import FilterModule, serving_table
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark, _numa, _smbios
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Host, judge
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import GIB, Overrides, make_plan
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _fleet, _report
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit import fleet_builder, tree_builder
from tests.unit.fleet_builder import channels, host, pooled, served
from tests.unit.smbios_builder import Device
from tests.unit.test_plan import recite

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    return fleet_builder.fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """Return a host without a fault, planned."""
    machine = tree_builder.Machine(model=fleet_builder.NINE_64, cores=64)
    return host("whole", tmp_path_factory.mktemp("whole"), machine, channels())


def view(record: Facts) -> _report.Host:
    """Return the one view of a host."""
    (only,) = _report.hosts([record])
    return only


# --- States, and the table that ends a run --------------------------------------------------------------------------

PLANNED: Facts = {"cpullm_plan": {"instances": []}}
REFUSED: Facts = {"failed": True, "msg": "h: no"}


@pytest.mark.parametrize(
    ("variables", "state"),
    [
        pytest.param({}, "NOT PLANNED", id="nothing-known"),
        pytest.param({"ansible_facts": PLANNED}, "NOT SERVING", id="planned"),
        pytest.param({"ansible_facts": PLANNED, "__host_plan_room": REFUSED}, "REFUSED", id="no-room-on-the-disk"),
        pytest.param({"__host_plan_result": REFUSED}, "REFUSED", id="no-plan"),
        pytest.param({"__host_plan_read": {"unreachable": True, "msg": "m"}}, "UNREACHABLE", id="site-unreachable"),
        pytest.param({"__report_reached": {"unreachable": True, "msg": "m"}}, "UNREACHABLE", id="report-unreachable"),
        pytest.param({"__host_plan_read": REFUSED}, "NOT READ", id="no-python"),
        pytest.param(
            {"ansible_facts": {**PLANNED, "cpullm_grub_hugepages": {"reboot_required": True}}},
            "NOT SERVING: reboot required",
            id="before-the-reboot",
        ),
        pytest.param({"__systemd_service_serving": {"as_planned": False}}, "NOT AS PLANNED", id="deviates"),
        pytest.param({"__systemd_service_serving": {"as_planned": True}}, "SERVING", id="serves"),
        pytest.param(
            {"ansible_facts": PLANNED, "__systemd_service_serving": {"skipped": True}}, "NOT SERVING", id="no"
        ),
    ],
)
def test_states(variables: Facts, state: str) -> None:
    assert _fleet.state(variables) == state


def test_the_table_that_ends_a_run(fleet: list[Facts]) -> None:
    lines = serving_table([*fleet, {"inventory_hostname": "late"}])
    assert [line.split("  ")[0] for line in lines[:6]] == ["host", "epyc-01", "epyc-02", "epyc-02", "epyc-03", "late"]
    assert " ".join(lines[1].split()) == "epyc-01 SERVING 0 668 (0) 668 (0:668) 16/32 163840 6.4 -"
    assert "REFUSED" in lines[4]
    assert lines[-1].startswith("To reboot: run again with -e grub_hugepages_reboot_allowed=true")
    assert "To reboot" not in "\n".join(serving_table(fleet[:1]))
    assert set(FilterModule().filters()) == {"serving_table"}


# --- What is said of a host -----------------------------------------------------------------------------------------


def test_a_whole_host_that_serves_has_nothing_to_change(whole: Facts) -> None:
    host = view(served(whole, 12.34))
    assert (host.state, host.tone, host.first) == ("SERVING", "good", None)
    assert (host.expected, host.hypothesis, host.measured) == ("14.7", "", "12.3")
    assert (host.machine, host.memory) == ("1 x AMD EPYC 9575F 64-Core", "12 x 64 GiB DDR5")
    assert (host.pages_planned, host.pages_found) == ("668", "668")
    assert {slot.mark for channel in host.sockets[0].channels for slot in channel.slots} == {"good"}


def test_the_least_known_roof_is_expected_and_a_hypothesis_stands_beside_it(fleet: list[Facts]) -> None:
    host = view(fleet[0])
    assert (host.expected, host.hypothesis, host.measured) == ("13.5", "7.1", "6.4")
    assert [row.severity for row in host.findings] == ["warning", "advice"]


def test_instances_stand_side_by_side(fleet: list[Facts]) -> None:
    host = view(fleet[1])
    assert (host.expected, host.measured) == ("11.7 / 14.7", _report.NOTHING)
    assert [line.title for line in host.rooflines] == [
        "Decode speed of socket 0, over context depth",
        "Decode speed of socket 1, over context depth",
    ]
    assert [bar.label for bar in host.bars] == ["sockets 0 and 1, each: 1,152 GiB"]


def test_findings_of_a_severity_stand_in_the_order_of_what_they_cost(whole: Facts) -> None:
    losses = (None, "8% of the rate at which weights load; none in decode", "up to 47% of the decode speed")
    losses = (*losses, "up to 1.2 tokens/s: 8% of the memory's read rate", "up to 2.9 tokens/s: 20% of it")
    findings = [
        {"severity": "advice", "name": f"{number}", "found": "", "loss": loss} for number, loss in enumerate(losses)
    ]
    record = copy.deepcopy(whole)
    record["ansible_facts"]["cpullm_judgement"]["findings"] = findings
    assert [row.name for row in view(record).findings if row.severity == "advice"] == ["2", "4", "3", "0", "1"]


def test_a_refusal_says_both_numbers_and_the_way_out(fleet: list[Facts]) -> None:
    host = view(fleet[2])
    # Behind the refusal stands what the machine lacks besides.
    assert (host.state, host.tone) == ("REFUSED", "bad")
    assert [row.severity for row in host.findings] == ["refused", "advice"]
    assert host.first is not None
    assert host.first.found == "384.00 GiB on socket 0, of which 13.88 GiB stay with the system"
    assert host.first.expected.startswith("at least 681.88 GiB on each socket")
    assert host.first.way_out.startswith("Take a smaller model")
    assert (host.model, host.bars, host.rooflines) == ("", (), ())
    assert len(host.sockets[0].channels) == 12


def test_a_server_with_its_weights_elsewhere_is_what_to_change_first(whole: Facts) -> None:
    record = served(whole, 5.0, hugetlb_kib=0)
    # The role's own refusal repeats the difference; the failure of another role does not.
    record["__report_failures"] = [
        {"role": "systemd_service", "msg": "whole: llama-server@0: HugetlbPages is 0 kB"},
        {"role": "memory_tuning", "msg": "whole: vm.swappiness is 60. "},
    ]
    host = view(record)
    assert host.state == "NOT AS PLANNED"
    assert [(row.name, row.found) for row in host.findings] == [
        ("llama-server@0", "HugetlbPages is 0 kB, expected 700448768 kB (668 pages)"),
        ("memory_tuning", "vm.swappiness is 60"),
    ]
    assert (host.pages_found, host.pages_planned) == ("0", "668")


def test_what_ended_the_plan_is_said_once(fleet: list[Facts]) -> None:
    message = fleet[2]["__host_plan_result"]["msg"]
    failed = view({**fleet[2], "__report_failures": [{"role": "host_plan", "msg": message}]})
    assert failed.findings == view(fleet[2]).findings


@pytest.mark.parametrize(
    ("record", "first"),
    [
        pytest.param({}, "none in this run", id="nothing-known"),
        pytest.param({"ended_early": True}, "it ended for this host before its end", id="ended"),
        pytest.param({"__host_plan_read": {"unreachable": True, "msg": "no route."}}, "no route", id="unreachable"),
        pytest.param({"__host_plan_read": {"failed": True}}, "no reason given", id="no-message"),
        pytest.param({"__host_plan_room": {"failed": True, "msg": "h: found 1 GB free"}}, "found 1 GB free", id="disk"),
    ],
)
def test_hosts_with_missing_facts_have_their_row(record: Facts, first: str) -> None:
    host = view({"inventory_hostname": "h", **record})
    assert host.first is not None
    assert host.first.found == first
    assert (host.expected, host.measured, host.pages_planned) == (_report.NOTHING, _report.NOTHING, _report.NOTHING)
    assert "h</a>" in _report.render([host], "now")


def test_pages_are_those_of_the_pools_where_nothing_serves(whole: Facts) -> None:
    assert view(whole).pages_found == _report.NOTHING
    host = view(pooled(whole, 3))
    assert host.pages_found == "3"
    assert (host.sockets[0].nodes[0].pages_found, host.sockets[0].nodes[0].pages_planned) == (3, 668)


def test_the_lab_s_vm() -> None:
    root = str(FIXTURES / "lab-vm-bookworm")
    numa, dimm = _numa.gather(root), _smbios.gather(root)
    plan = make_plan(numa, recite(), Overrides(weights="mmap"))
    judgement = judge(Host(numa, plan, dimm, {"poisoned_bytes": 0}))
    facts = {"cpullm_numa": numa, "cpullm_dimm": dimm, "cpullm_plan": plan, "cpullm_judgement": judgement}
    host = view({"inventory_hostname": "vm", "ansible_facts": facts})
    assert [len(socket.channels) for socket in host.sockets] == [6, 6]
    assert {slot.mark for socket in host.sockets for channel in socket.channels for slot in channel.slots} == {"slow"}
    assert len(host.rooflines) == 1, "equal sockets share a picture"


# --- The board ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "mark", "words"),
    [
        pytest.param({}, "good", "DIMM_P0_A0: 64 GiB, 6000 MT/s, rated 6000, Samsung, M321R8GA0PB2-CCPPC", id="good"),
        pytest.param({"configured_speed": 4800}, "slow", "slower than the 6000 MT/s it could run at", id="slow"),
        pytest.param({"speed": 6400}, "good", "rated 6400", id="faster-than-the-processor"),
        pytest.param({"extended_size": 32768}, "odd", "32 GiB", id="odd-size"),
        pytest.param({"total_width": 64}, "no-ecc", "without ECC", id="no-ecc"),
        pytest.param({"size": 0xFFFF, "extended_size": 0}, "unknown", "the firmware does not know it", id="unknown"),
        pytest.param({"size": 0, "extended_size": 0}, "empty", "empty", id="empty"),
        pytest.param({"configured_speed": 0}, "good", "speed unknown", id="speed-unknown"),
    ],
)
def test_marks_of_slots(changes: dict[str, Any], mark: str, words: str, tmp_path: Path) -> None:
    devices = channels()
    devices[0] = Device(**{**vars(devices[0]), **changes})
    machine = tree_builder.Machine(model=fleet_builder.NINE_16)
    board = view(host("h", tmp_path, machine, devices)).sockets[0]
    slot = board.channels[0].slots[0]
    assert slot.mark == mark
    assert words in slot.words
    others = "11 good" if mark != "good" else "12 good"
    assert others in board.words


def test_a_free_second_slot_is_no_fault_and_slots_without_a_channel_are_shown(whole: Facts) -> None:
    record = copy.deepcopy(whole)
    slots = record["ansible_facts"]["cpullm_dimm"]["slots"]
    slots.append({**slots[0], "locator": "DIMM_P0_A1", "populated": False, "size_bytes": 0})
    slots.append({**slots[0], "locator": "DIMM_X", "channel": None, "channel_label": None})
    board = view(record).sockets[0].channels
    assert [slot.mark for slot in board[0].slots] == ["good", "free"]
    assert (board[-1].label, board[-1].slots[0].locator) == ("", "DIMM_X")


def test_no_tables_say_so(tmp_path: Path) -> None:
    record = host("h", tmp_path, tree_builder.Machine(), None)
    page = _report.render(_report.hosts([record]), "now")
    assert "smbios_entry_point does not exist" in page
    assert view(record).sockets[0].channels == ()


# --- Where the memory goes, and the roofs ---------------------------------------------------------------------------


def test_a_bar_is_all_of_the_socket_s_memory(whole: Facts) -> None:
    (bar,) = view(whole).bars
    assert [part.name for part in bar.segments] == ["weights", "KV cache", "compute", "struct pages", "system", "free"]
    assert sum(part.share for part in bar.segments) == pytest.approx(100)
    assert bar.segments[0].size == "668 GiB"
    assert bar.segments[3].size == "12 GiB"


def test_the_plan_s_own_struct_pages_are_shown_where_it_tells_them(whole: Facts) -> None:
    record = copy.deepcopy(whole)
    record["ansible_facts"]["cpullm_plan"]["memory"][0]["struct_pages_bytes"] = 2 * GIB
    assert view(record).bars[0].segments[3].size == "2 GiB"


def test_measured_bandwidth_and_a_roof_without_one_are_drawn(whole: Facts) -> None:
    record = copy.deepcopy(served(whole, 6.5))
    judgement = record["ansible_facts"]["cpullm_judgement"]
    tokens = [{"depth": 0, "tokens_per_second": 7.0}, {"depth": 4096, "tokens_per_second": 6.9}]
    judgement["measured"] = [{"socket": 0, "gbs": 281.0, "tokens": tokens}]
    judgement["roofs"].append(
        {"socket": 0, "name": "attention compute", "gbs": None, "hypothesis": False, "tokens": tokens[1:]}
    )
    (line,) = view(record).rooflines
    assert [(roof.kind, roof.gbs) for roof in line.roofs][2:] == [
        ("hypothesis", None),
        ("roof", None),
        ("measured", 281.0),
    ]
    assert line.depths == (0, 4096, 16384)
    assert line.measured == (6.5,)
    page = _report.render([view(record)], "now")
    assert "measured read rate" in page
    assert "host-1-r0-measured" in page


# --- The latest benchmark -------------------------------------------------------------------------------------------


def test_a_benchmark_is_drawn_under_the_roofs_of_its_own_plan(fleet: list[Facts]) -> None:
    host = view(fleet[0])
    (line,) = host.rooflines
    assert line.benchmarks == (((0, 6.41, 6.38, 6.45), (4096, 6.07, 6.02, 6.11), (16384, 5.24, 5.1, 5.3)),)
    assert "benchmark-0" in line.svg
    assert [(roof.kind, roof.gbs) for roof in line.roofs if roof.kind == "measured"] == [("measured", 263.0)]
    page = _report.render([host], "now")
    assert "measured, the latest benchmark" in page
    assert "under another plan" not in page


def test_a_benchmark_of_another_plan_or_setting_is_told_and_not_drawn(fleet: list[Facts]) -> None:
    other = {**fleet[0], "__benchmark": {**fleet[0]["__benchmark"], "plan": "0" * 64}}
    host = view(other)
    assert host.rooflines[0].benchmarks == ()
    assert host.benchmark is not None
    assert not host.benchmark.planned
    assert "Measured under another plan than today" in _report.render([host], "now")
    changed = fleet_builder.measured(fleet[0], fleet_builder.FIGURES, arguments=["--threads", "1"])
    assert view(changed).rooflines[0].benchmarks == ()
    assert view(fleet_builder.measured(fleet[0], fleet_builder.FIGURES, as_unit=False)).rooflines[0].benchmarks == ()


def test_a_benchmark_says_what_was_left_out_and_what_never_counted(fleet: list[Facts]) -> None:
    benchmark = view(fleet[0]).benchmark
    assert benchmark is not None
    assert benchmark.notes == (
        "instance 0, running: restart was left out: benchmark_downtime_allowed is false",
        "instance 0, running: no run of batch_4 counts: the machine swapped 3 pages",
    )
    rows = {row.name: (row.median, row.spread, row.unit, row.runs, row.share) for row in benchmark.figures}
    assert rows["prefill_512"] == ("58.4", "58.1 to 58.9", "tokens/s", "3 of 3", "")
    # 6.41 tokens/s of 39.2 GB, of 263 GB/s.
    assert rows["decode_d0"][4] == "96%"
    assert "batch_4" not in rows
    assert view(fleet[1]).benchmark is None


def test_ratios_of_two_variants_are_shown(whole: Facts) -> None:
    record = fleet_builder.measured(whole, {"decode_d0": (8.0, 8.0)})
    first = record["__benchmark"]["measurements"][0]
    second = {**first, "name": "candidate", "runs": [{**run, "value": 12.0} for run in first["runs"]]}
    result = {**record["__benchmark"], "interleaved": True, "measurements": [first, second]}
    kept = _benchmark.document("whole", result, {"tokens": 64}, record["ansible_facts"]["cpullm_plan"])
    benchmark = view({**record, "__benchmark": kept}).benchmark
    assert benchmark is not None
    assert (benchmark.compared, benchmark.ratios[0].median) == ("candidate over running", "1.500")
    assert "candidate over running" in _report.render([view({**record, "__benchmark": kept})], "now")


def test_the_newest_result_of_each_host_is_taken(fleet: list[Facts], tmp_path: Path) -> None:
    kept = fleet[0]["__benchmark"]
    for number, date in enumerate(("2026-11-24T00:00:00Z", "2026-11-25T00:00:00Z", "2026-11-23T00:00:00Z")):
        (tmp_path / f"{number}.json").write_text(json.dumps({**kept, "date": date}))
    (tmp_path / "other.json").write_text('{"name": "kernels", "figures": {}}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    found = fleet_report.latest_benchmarks(tmp_path)
    assert {name: row["date"] for name, row in found.items()} == {"epyc-01": "2026-11-25T00:00:00Z"}
    assert fleet_report.latest_benchmarks(tmp_path / "none") == fleet_report.latest_benchmarks(None) == {}


@pytest.mark.parametrize("odd", [[], "text", {"plan": "x"}, {"measurements": [{}]}, {"measurements": None, "plan": 1}])
def test_a_result_of_any_shape_costs_only_its_own_host(odd: Any, fleet: list[Facts]) -> None:
    views = _report.hosts([{**fleet[0], "__benchmark": odd}, fleet[1]])
    assert views[1].state == "NOT SERVING: reboot required"
    _report.render(views, "now")


def test_a_drawing_is_the_same_each_time(fleet: list[Facts]) -> None:
    first = view(fleet[0]).rooflines[0].svg
    _report.draw.cache_clear()
    assert view(fleet[0]).rooflines[0].svg == first
    assert "#0" not in first.replace("#host-1-", ""), "a colour that no scheme of the page rules"
    assert "<style" not in first


# --- Foreign input --------------------------------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>"


def test_what_a_host_tells_ends_escaped(fleet: list[Facts]) -> None:
    record = copy.deepcopy(fleet[0])
    record["inventory_hostname"] = f'a"{SCRIPT}'
    record["ansible_facts"]["cpullm_dimm"]["slots"][0].update(part_number=SCRIPT, locator=f'"{SCRIPT}')
    record["ansible_facts"]["cpullm_numa"]["cpu"]["model"] = SCRIPT
    record["ansible_facts"]["cpullm_judgement"]["findings"][0]["found"] = SCRIPT
    record["ansible_facts"]["cpullm_judgement"]["roofs"][0]["name"] = f"$x_{SCRIPT}$"
    record["__systemd_service_serving"]["instances"][0]["deviations"] = [f"'{SCRIPT}"]
    page = _report.render(_report.hosts([record]), SCRIPT)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("a\u202eb\u0000c\ud800", "a\ufffdb\ufffdc\ufffd", id="marks-of-direction-nul-and-surrogates"),
        pytest.param("one\ntwo\tthree", "one two three", id="lines"),
        pytest.param("x" * 10_000, "x" * 599 + "…", id="long"),
        pytest.param([float("nan"), float("inf"), 1.5, True, None], [None, None, 1.5, True, None], id="numbers"),
        pytest.param({1: (object,)}, {"1": [None]}, id="other-types"),
    ],
)
def test_clean(value: Any, expected: Any) -> None:
    assert _report.clean(value) == expected


FACTS = ("cpullm_numa", "cpullm_dimm", "cpullm_plan", "cpullm_judgement", "cpullm_grub_hugepages", "cpullm_build")
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(fact=st.sampled_from(FACTS), key=st.text(max_size=4), value=ANY, number=st.integers(0, 5))
def test_facts_of_any_shape_cost_only_their_own_host(
    fact: str, key: str, value: Any, number: int, fleet: list[Facts]
) -> None:
    whole = fleet[0]
    facts = whole["ansible_facts"]
    known = sorted(facts.get(fact) or {"x": 0})
    broken = {**facts, fact: {**(facts.get(fact) or {}), key or known[number % len(known)]: value}}
    views = _report.hosts([{**whole, "ansible_facts": broken}, {**whole, "ansible_facts": {fact: value}}, whole])
    assert views[2].state == "SERVING"
    assert "epyc-01</a>" in _report.render(views, "now")


@pytest.mark.parametrize("count", [0, 1, 3, 60])
def test_fleets_of_every_size(count: int, fleet: list[Facts]) -> None:
    names = [f"host-{number}" for number in range(count)]
    records = [{**fleet[number % 3], "inventory_hostname": name} for number, name in enumerate(names)]
    page = _report.render(_report.hosts(records), "now")
    assert page.count("<section") == count
    assert all(f">{name}</a>" in page for name in names)
    assert ("The inventory has no hosts." in page) == (count == 0)


# --- The file -------------------------------------------------------------------------------------------------------


def act(args: Facts, records: list[Facts], check: bool = False, ended: tuple[str, ...] = ()) -> Facts:
    """Run the action plugin as the task executor does, for these hosts."""
    task = SimpleNamespace(args=args, async_val=0, check_mode=check, diff=False, action="cpullm.epyc.x", collections=[])
    connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None))
    action = fleet_report.ActionModule(task, connection, SimpleNamespace(), DataLoader(), None, None)
    names = [record["inventory_hostname"] for record in records]
    variables = {
        "hostvars": {record["inventory_hostname"]: record for record in records},
        "groups": {"all": names},
        "ansible_play_hosts_all": names,
        "ansible_play_hosts": [name for name in names if name not in ended],
    }
    result: Facts = action.run(None, variables)
    return result


def test_the_file_is_written_whole_and_says_when_it_changes(fleet: list[Facts], tmp_path: Path) -> None:
    dest = tmp_path / "report.html"
    args = {"dest": str(dest)}
    assert act(args, fleet, check=True)["changed"] is True
    assert list(tmp_path.iterdir()) == []
    assert act(args, fleet) == {"changed": True, "dest": str(dest)}
    assert stat.S_IMODE(dest.stat().st_mode) == 0o644
    before = dest.read_text()
    faster = [served(fleet[0], 6.9), *fleet[1:]]
    assert act(args, faster)["changed"] is False, "a measurement alone is no change"
    assert ">6.9<" in dest.read_text()
    assert before != dest.read_text(), "and is shown all the same"
    assert act(args, fleet[:2])["changed"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_is_no_report_is_replaced(fleet: list[Facts], tmp_path: Path) -> None:
    dest = tmp_path / "report.html"
    dest.write_bytes(b"\xff\xfe other")
    assert act({"dest": str(dest)}, fleet)["changed"] is True
    assert act({"dest": str(dest)}, fleet)["changed"] is False


def test_a_host_for_which_the_run_ended_says_so(whole: Facts, tmp_path: Path) -> None:
    act({"dest": str(tmp_path / "r.html")}, [whole], ended=("whole",))
    assert "it ended for this host before its end" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("write", [True, False])
def test_a_report_that_cannot_be_written_is_refused(write: bool, tmp_path: Path) -> None:
    for dest, message in ((tmp_path / "none" / "r.html", "found no directory"), (tmp_path, "found a directory")):
        with pytest.raises(AnsibleActionFail, match=rf"report_file {dest}: {message}"):
            act({"dest": str(dest), "write": write}, [])
    assert list(tmp_path.iterdir()) == []


def test_only_looking_writes_nothing(tmp_path: Path) -> None:
    assert act({"dest": str(tmp_path / "r.html"), "write": False}, [])["changed"] is False
    assert list(tmp_path.iterdir()) == []


def test_a_controller_without_matplotlib_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AnsibleActionFail, match=r"matplotlib: found none .* set report_file to null"):
        act({"dest": str(tmp_path / "r.html"), "write": False}, [])
