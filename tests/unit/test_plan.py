# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils import _numa, _plan
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import (
    DirectorySource,
    HubSource,
    Manifest,
    Shard,
    build_manifest,
)
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import GIB, Overrides, Refusal, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import gguf_file
from tests.support.gguf_file import DeepSeek
from tests.unit import tree_builder
from tests.unit.test_gguf import TINY

AVX2 = ("avx2", "bmi2", "f16c", "fma", "pdpe1gb")
ZEN4 = (
    *AVX2,
    "avx512_bf16",
    "avx512_vnni",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512f",
    "avx512vbmi",
    "avx512vl",
)
R1 = DeepSeek()
HUB = HubSource("https://hub.example", "org/R1-GGUF", "ab" * 20, "Q8_0/")


def machine(
    gib: list[float],
    cores: int = 16,
    smt: int = 2,
    *,
    flags: tuple[str, ...] = ZEN4,
    nps: int = 1,
    release: str = "6.1.0-37-amd64",
    ranges: int | None = None,
) -> dict[str, Any]:
    """Return cpullm_numa of a machine with these GiB for each socket."""
    sockets, nodes = [], []
    for number, size in enumerate(gib):
        first = number * cores
        second = len(gib) * cores + first
        cpus = f"{first}-{first + cores - 1}" + (f",{second}-{second + cores - 1}" if smt == 2 else "")
        own = list(range(number * nps, (number + 1) * nps))
        sockets.append({"socket": number, "nodes": own, "cpus": cpus, "physical_cores": cores, "threads": cores * smt})
        nodes += [
            {"node": node, "socket": number, "memory_bytes": int(size / nps * GIB), "gib_ranges": ranges}
            for node in own
        ]
    return {
        "readable": True,
        "reason": None,
        "cpu": {"flags": sorted(flags)},
        "sockets": sockets,
        "nodes": nodes,
        "kernel": {"release": release, "cmdline": "quiet"},
    }


@cache
def manifest(model: DeepSeek = R1, count: int = 16, name: str = "DeepSeek-R1-Q8_0") -> Manifest:
    parts = gguf_file.split(model.pairs(), model.tensors(), count)
    headers = [gguf_file.header(*part) for part in parts]
    return build_manifest(
        name,
        HUB,
        [
            (Shard(f"{name}-{number:05d}-of-{count:05d}.gguf", header.file_bytes, f"{number:064x}"), header)
            for number, header in enumerate(headers, 1)
        ],
    )


def recite() -> Manifest:
    return manifest(TINY, 3, "recite")


def reason(plan: dict[str, Any], output: str) -> str:
    return str(next(row["reason"] for row in plan["reasons"] if row["output"] == output))


# --- Golden machines ------------------------------------------------------------------------------------------------


def test_the_published_machine() -> None:
    """12 x 64 GB, one socket of 16 cores, DeepSeek-R1 Q8_0 in 16 shards."""
    plan = make_plan(machine([768]), manifest(), Overrides())
    # Each shard is mapped by itself. The recipe reserves 671 for the sum of 664.3 GiB; what is needed follows from
    # the shards: 668 for 16 of about equal size, up to 680 for others.
    assert plan["pages"] == {"size_kib": 1048576, "total": 668, "nodes": [{"node": 0, "pages": 668}]}
    assert [shard["pages"] for shard in plan["model"]["shards"]] == [41, 42, 42, 42, 42, 42, 42, 42] + [42] * 7 + [39]
    assert plan["kernel_arguments"] == ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=668"]
    # -t 16 -tb 32, as in the recipe.
    assert plan["instances"] == [
        {
            "instance": 0,
            "socket": 0,
            "nodes": [0],
            "cpus": "0-15,16-31",
            "threads": 16,
            "threads_batch": 32,
            "port": 18008,
            "pages": 668,
        }
    ]
    # The recipe's 22K were what 3.59 MB a token left; with MLA all that the model was trained for fits.
    assert plan["context"] == 163840
    assert plan["kv_bytes"] == 61 * 18 * 34 * 163840 == 6_116_474_880
    assert plan["compute_bytes"] == 1_044_841_472
    assert plan["system_reserve_bytes"] == 25_434_259_456
    assert plan["isa"] == "avx512"
    assert (plan["cache_type_k"], plan["cache_type_v"], plan["slots"]) == ("q8_0", "q8_0", 1)
    assert plan["disk_bytes"] == plan["model"]["bytes"] == manifest().bytes
    assert plan["start_timeout_s"] == 1727
    assert round(plan["model"]["read_per_token_bytes"] / 1e9, 2) == 39.23
    assert plan["findings"] == []
    assert plan["servers_at_once"] == 2
    assert plan["memory"][0]["left_bytes"] == 67_617_290_240
    assert "the sum rounded once would be 665: 668 on one socket" in reason(plan, "pages.total")
    assert {row["output"] for row in plan["reasons"]} >= {"pages.total", "context", "threads", "system_reserve_bytes"}


def test_the_published_context_of_a_gguf_without_mla() -> None:
    """The first uploads: 3.59 MB for each token. What fits is what the recipe found by hand: 22K."""
    old = manifest(DeepSeek(mla=False), 16)
    assert _plan.kv_bytes_per_token(old.model, "q8_0", "f16") == 61 * 128 * (204 + 256) == 3_591_680
    plan = make_plan(machine([768]), old, Overrides())
    assert plan["context"] == 22 * 1024
    assert plan["cache_type_v"] == "f16"
    assert plan["findings"][0]["name"] == "gguf.mla"
    assert "96 times the 37332 with MLA" in plan["findings"][0]["found"]


def test_mla_takes_what_was_published_for_it() -> None:
    assert _plan.kv_bytes_per_token(manifest().model, "f16", "f16") == 70_272
    assert _plan.kv_bytes_per_token(manifest().model, "q8_0", "q8_0") == 37_332


def test_two_sockets_hold_a_copy_each() -> None:
    plan = make_plan(machine([1536, 1536], cores=64), manifest(), Overrides())
    assert plan["pages"]["total"] == 2 * 668
    assert plan["kernel_arguments"][2] == "hugepages=0:668,1:668"
    assert [(row["nodes"], row["port"], row["threads"], row["threads_batch"]) for row in plan["instances"]] == [
        ([0], 18008, 64, 128),
        ([1], 18009, 64, 128),
    ]
    assert plan["disk_bytes"] == manifest().bytes
    assert plan["start_timeout_s"] == math.ceil(2 * manifest().bytes / 5e8) + 300


def test_one_instance_on_two_sockets() -> None:
    plan = make_plan(machine([768, 768]), manifest(), Overrides(instances=1))
    assert plan["kernel_arguments"][2] == "hugepages=0:668"
    assert len(plan["instances"]) == 1


def test_the_lab_vm() -> None:
    plan = make_plan(machine([5, 5], cores=1, smt=1, flags=AVX2), recite(), Overrides())
    assert plan["pages"]["nodes"] == [{"node": 0, "pages": 3}, {"node": 1, "pages": 3}]
    assert plan["kernel_arguments"] == ["default_hugepagesz=1G", "hugepagesz=1G", "hugepages=0:3,1:3"]
    assert plan["isa"] == "avx2"
    assert plan["context"] == 4096
    assert plan["system_reserve_bytes"] < 2 * GIB


def test_a_9004_with_eleven_of_twelve_modules() -> None:
    plan = make_plan(machine([704], cores=32), manifest(), Overrides())
    assert plan["context"] == 163840
    assert plan["memory"][0]["left_bytes"] < 10 * GIB


def test_less_memory_gives_less_context() -> None:
    plan = make_plan(machine([696]), manifest(), Overrides())
    assert plan["context"] == 148480
    assert plan["context"] % 256 == 0
    assert 0 <= plan["memory"][0]["left_bytes"] < 256 * 40_000
    assert "the largest that fits: socket 0 has" in reason(plan, "context")


def test_nodes_per_socket_share_the_pages() -> None:
    plan = make_plan(machine([1536], cores=64, nps=4), manifest(), Overrides())
    assert [row["pages"] for row in plan["pages"]["nodes"]] == [167] * 4
    assert plan["instances"][0]["nodes"] == [0, 1, 2, 3]


def test_weights_in_the_page_cache_reserve_nothing() -> None:
    plan = make_plan(machine([768], flags=ZEN4[:4] + ZEN4[5:]), manifest(), Overrides(weights="mmap"))
    assert plan["pages"]["total"] == 0
    assert plan["kernel_arguments"] == []


def test_shared_weights_leave_room_for_a_second_server() -> None:
    one = make_plan(machine([768]), manifest(), Overrides(weights="hugetlbfs", overlap=False))
    two = make_plan(machine([768]), manifest(), Overrides(weights="hugetlbfs"))
    assert (one["servers_at_once"], two["servers_at_once"]) == (1, 2)
    used = one["kv_bytes"] + one["compute_bytes"]
    assert one["memory"][0]["left_bytes"] - two["memory"][0]["left_bytes"] == used


def test_no_room_for_a_second_server_where_it_would_cost_context() -> None:
    alone = make_plan(machine([696]), manifest(), Overrides(overlap=False))
    found = make_plan(machine([696]), manifest(), Overrides())
    assert (found["servers_at_once"], found["context"]) == (1, alone["context"])
    assert "would take context away" in reason(found, "servers_at_once")
    asked = make_plan(machine([696]), manifest(), Overrides(context=4096))
    assert (asked["servers_at_once"], asked["context"]) == (2, 4096)
    forced = make_plan(machine([696]), manifest(), Overrides(overlap=True))
    assert forced["servers_at_once"] == 2
    assert forced["context"] < alone["context"]


def test_an_old_kernel_spreads_evenly_or_is_refused() -> None:
    even = make_plan(machine([768, 768], release="5.15.0-100-generic"), manifest(), Overrides())
    assert even["kernel_arguments"][2] == "hugepages=1336"
    with pytest.raises(Refusal, match=r"release: found 5\.15\?\[2J, expected 5.16 or later"):
        make_plan(machine([768, 1536], release="5.15\x1b[2J"), manifest(), Overrides(instances=1))
    with pytest.raises(Refusal, match=r"release: found 5.15.0-100-generic, expected 5.16 or later"):
        make_plan(machine([768, 768], release="5.15.0-100-generic"), manifest(), Overrides(instances=1))


# --- Stability ------------------------------------------------------------------------------------------------------


def test_the_plan_before_the_reservation_equals_the_one_after(tmp_path: Path) -> None:
    shape = tree_builder.Machine(sockets=2, gib_per_node=768)
    tree_builder.build(shape, tmp_path)
    tree_builder.write(tmp_path, "proc/cpuinfo", f"processor\t: 0\nflags\t\t: {' '.join(AVX2)}\n\n")
    before = _numa.gather(str(tmp_path))
    plan = make_plan(before, manifest(), Overrides(isa="avx2"))
    tree_builder.write(tmp_path, "proc/cmdline", "BOOT_IMAGE=/vmlinuz ro " + " ".join(plan["kernel_arguments"]) + "\n")
    zoneinfo = (tmp_path / "proc/zoneinfo").read_text()
    rows = [
        f"        managed  {int(line.split()[1]) + 9 * GIB // 4096}" if "managed" in line else line
        for line in zoneinfo.splitlines()
    ]
    tree_builder.write(tmp_path, "proc/zoneinfo", "\n".join(rows) + "\n")
    after = _numa.gather(str(tmp_path))
    assert after != before
    assert make_plan(after, manifest(), Overrides(isa="avx2")) == plan


def test_page_descriptions_that_are_given_back_are_context() -> None:
    """On a machine that is limited by memory; the 10.43 GiB of the published one, in steps of 64 MiB."""
    plain = make_plan(machine([700]), manifest(), Overrides(overlap=True))
    freed = make_plan(machine([700]), manifest(), Overrides(overlap=True, free_vmemmap=True))
    assert freed["kernel_arguments"] == ["hugetlb_free_vmemmap=on", *plain["kernel_arguments"]]
    gain = plain["system_reserve_bytes"] - freed["system_reserve_bytes"]
    assert gain == plain["pages"]["total"] * _plan.VMEMMAP_BYTES_PER_PAGE // (64 << 20) * (64 << 20)
    assert freed["context"] > plain["context"]
    reasons = {row["output"]: row["reason"] for row in freed["reasons"]}
    assert "GiB that hugetlb_free_vmemmap=on gives back" in reasons["system_reserve_bytes"]
    assert reasons["struct_pages"].endswith("which the reserve leaves out")
    # A reserve by hand is what the operator said, and the page cache has nothing to give back.
    by_hand = Overrides(free_vmemmap=True, system_reserve_bytes=20 * GIB)
    assert make_plan(machine([768]), manifest(), by_hand)["system_reserve_bytes"] == 20 * GIB
    cached = [make_plan(machine([768]), manifest(), Overrides(weights="mmap", free_vmemmap=on)) for on in (False, True)]
    assert cached[0]["hash"] == cached[1]["hash"]
    with pytest.raises(Refusal, match=r"5\.14 or later, for hugetlb_free_vmemmap=on"):
        make_plan(machine([768], release="5.10.0-30-amd64"), manifest(), Overrides(free_vmemmap=True))


def test_the_plan_from_the_hub_equals_the_one_from_the_files() -> None:
    local = dataclasses.replace(manifest(), source=DirectorySource("/srv/models/x"))
    one = make_plan(machine([768]), manifest(), Overrides())
    two = make_plan(machine([768]), local, Overrides())
    assert one["hash"] == two["hash"]
    assert one["model"]["source"] != two["model"]["source"]


def test_the_hash_is_of_what_is_decided() -> None:
    plan = make_plan(machine([768]), manifest(), Overrides())
    # Some MiB that another kernel keeps for itself decide nothing.
    assert (
        make_plan(machine([767.99]), manifest(), Overrides(system_reserve_bytes=plan["system_reserve_bytes"]))["hash"]
        == plan["hash"]
    )
    for other in (Overrides(context=8192), Overrides(slots=2), Overrides(port=9000), Overrides(cache_type_k="f16")):
        assert make_plan(machine([768]), manifest(), other)["hash"] != plan["hash"]
    assert plan["hash"] == _plan.canonical_hash(json.loads(json.dumps(plan)))


# --- Refusals -------------------------------------------------------------------------------------------------------


def broken(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(machine([768]))
    place: Any = data
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("numa", "overrides", "message"),
    [
        pytest.param(None, Overrides(), "ansible_facts['cpullm_numa']: found nothing, expected the fact", id="no-fact"),
        pytest.param(
            {"readable": False, "reason": "no /sys"},
            Overrides(),
            "found false (no /sys), expected true",
            id="unreadable",
        ),
        pytest.param(
            {"readable": False, "reason": "\x1b[2J\n"}, Overrides(), "found false (?[2J?), expected true", id="escapes"
        ),
        pytest.param(broken("cpu", None), Overrides(), "['cpullm_numa'].cpu: found nothing", id="no-cpu"),
        pytest.param(broken("sockets", []), Overrides(), ".sockets: found an empty list", id="no-socket"),
        pytest.param(
            broken("nodes.0.memory_bytes", None),
            Overrides(),
            ".nodes[0].memory_bytes: found nothing, expected a number",
            id="no-memory",
        ),
        pytest.param(
            broken("nodes.0.memory_bytes", 0), Overrides(), "found no socket with memory of its own", id="bare-node"
        ),
        pytest.param(
            machine([24], cores=8),
            Overrides(),
            "found 24.00 GiB on socket 0, of which 3.62 GiB stay with the system, expected at least 671.62 GiB on each "
            "socket: a copy of DeepSeek-R1-Q8_0 takes 668 pages of 1 GiB",
            id="laptop",
        ),
        pytest.param(
            {**machine([768]), "nodes": [{"node": 0, "memory_bytes": 10**400}]},
            Overrides(),
            "nodes[0].memory_bytes: found 1000000",
            id="no-number-of-bytes",
        ),
        pytest.param(machine([384, 384]), Overrides(), "found 384.00 GiB on socket 0", id="half-on-each-socket"),
        pytest.param(
            machine([690]),
            Overrides(),
            "room for 0 tokens of context, expected 0.96 GiB for 4096 tokens",
            id="no-context",
        ),
        pytest.param(
            machine([768], ranges=660),
            Overrides(),
            "found 660 whole aligned GiB on node 0, expected at least 668",
            id="aligned-ranges",
        ),
        pytest.param(
            machine([768], flags=("avx2", "fma", "pdpe1gb")),
            Overrides(),
            "cpu.flags: found no bmi2 f16c, expected at least avx2 bmi2 f16c fma",
            id="flags",
        ),
        pytest.param(
            machine([768], flags=AVX2[:4]), Overrides(), "cpu.flags: found no pdpe1gb, expected pdpe1gb", id="pdpe1gb"
        ),
        pytest.param(
            machine([768], flags=AVX2),
            Overrides(isa="avx512"),
            "host_plan_isa: found avx512, but the CPU lacks avx512_bf16 avx512_vnni",
            id="isa",
        ),
        pytest.param(
            machine([768]), Overrides(isa="sse"), "host_plan_isa: found 'sse', expected one of", id="isa-name"
        ),
        pytest.param(
            machine([768]),
            Overrides(context=200_000),
            "host_plan_context: found 200000, expected at most 163840",
            id="trained",
        ),
        pytest.param(
            machine([696]),
            Overrides(context=163840),
            "found 163840 tokens, which need 6.67 GiB, expected at most 148480",
            id="fits",
        ),
        pytest.param(machine([768]), Overrides(context=0), "host_plan_context: found 0", id="context-0"),
        pytest.param(machine([768]), Overrides(slots=0), "host_plan_slots: found 0, expected 1 to 256", id="slots"),
        pytest.param(
            machine([768]), Overrides(instances=2), "host_plan_instances: found 2, expected 1 to 1", id="inst"
        ),
        pytest.param(machine([768]), Overrides(port=65536), "host_plan_port: found 65536", id="port"),
        pytest.param(
            machine([768]), Overrides(weights="x"), "host_plan_weights: found 'x', expected one of", id="weights"
        ),
        pytest.param(machine([768]), Overrides(cache_type_k="q9"), "host_plan_cache_type_k: found 'q9'", id="type-k"),
        pytest.param(
            machine([768]),
            Overrides(cache_type_v="f16"),
            "found 'f16', expected 'q8_0', as host_plan_cache",
            id="type-v",
        ),
        pytest.param(
            machine([768]),
            Overrides(overlap=True, weights="anonymous"),
            "host_plan_overlap: found true with host_plan_weights",
            id="overlap",
        ),
        pytest.param(
            machine([768]),
            Overrides(system_reserve_bytes=-GIB),
            "host_plan_system_reserve_gib: found -1.0,",
            id="reserve",
        ),
    ],
)
def test_refused(numa: Any, overrides: Overrides, message: str) -> None:
    with pytest.raises(Refusal) as caught:
        make_plan(numa, manifest(), overrides)
    assert message in str(caught.value)
    assert caught.value.way_out.endswith(".")


# --- Properties -----------------------------------------------------------------------------------------------------

MODELS = st.builds(
    DeepSeek,
    layers=st.integers(4, 8),
    embedding=st.sampled_from([256, 1024, 2048]),
    heads=st.sampled_from([8, 32]),
    experts=st.sampled_from([16, 64, 256]),
    expert_ff=st.sampled_from([256, 1024]),
    mla=st.booleans(),
)
WISHES = st.builds(
    Overrides,
    slots=st.integers(1, 8),
    cache_type_k=st.sampled_from(["f16", "q8_0", "q4_0"]),
    weights=st.sampled_from(["anonymous", "hugetlbfs", "mmap"]),
)
MEMORY = st.lists(st.integers(2, 256), min_size=1, max_size=4)


def attempt(gib: list[float], model: Manifest, wishes: Overrides) -> dict[str, Any] | None:
    try:
        return make_plan(machine(gib), model, wishes)
    except Refusal:
        return None


@settings(max_examples=150, deadline=None)
@given(MEMORY, MODELS, st.integers(1, 5), WISHES)
def test_a_plan_fits_and_is_reproducible(gib: list[float], model: DeepSeek, count: int, wishes: Overrides) -> None:
    made = manifest(model, count, "m")
    plan = attempt(gib, made, wishes)
    if plan is None:
        return
    assert plan == make_plan(machine(gib), made, wishes)
    assert plan["pages"]["total"] == sum(row["pages"] for row in plan["pages"]["nodes"])
    assert plan["pages"]["total"] == sum(row["pages"] for row in plan["instances"])
    for size, row, instance in zip(gib, plan["memory"], plan["instances"]):
        if wishes.weights != "mmap":
            assert instance["pages"] == sum(math.ceil(shard.bytes / GIB) for shard in made.shards)
            assert instance["pages"] * GIB >= made.bytes
        assert row["left_bytes"] >= 0
        parts = [row[f"{part}_bytes"] for part in ("weights", "reserve", "kv", "compute", "left")]
        assert sum(parts) == row["bytes"] <= size * GIB
    assert 1 <= plan["context"] <= made.model.context_trained
    assert len({row["port"] for row in plan["instances"]}) == len(plan["instances"])


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 200), st.integers(0, 64), MODELS, WISHES)
def test_more_memory_never_gives_less(gib: int, more: int, model: DeepSeek, wishes: Overrides) -> None:
    made = manifest(model, 2, "m")
    small, large = attempt([gib], made, wishes), attempt([gib + more], made, wishes)
    if small is not None:
        assert large is not None
        assert large["context"] >= small["context"]
        assert large["pages"] == small["pages"]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 128), MODELS, WISHES)
def test_the_largest_context_is_the_largest(gib: int, model: DeepSeek, wishes: Overrides) -> None:
    made = manifest(model, 2, "m")
    plan = attempt([gib], made, wishes)
    if plan is None:
        return
    fits = plan["context"]
    assert attempt([gib], made, dataclasses.replace(wishes, context=fits)) is not None
    if fits < made.model.context_trained:
        assert attempt([gib], made, dataclasses.replace(wishes, context=fits + 256)) is None


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value within nested lists and dictionaries."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in inner for found in ((*path, key), *places(value, (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(places(machine([768, 768]))),
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.just(10**400)
    | st.text(max_size=3)
    | st.just([])
    | st.just({})
    | st.just([[]]),
)
def test_spoiled_facts_raise_nothing_but_refusals(path: tuple[Any, ...], value: Any) -> None:
    numa = machine([768, 768])
    place: Any = numa
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    try:
        make_plan(numa, manifest(), Overrides())
    except Refusal as refusal:
        assert "expected" in str(refusal)


@pytest.mark.parametrize("gib", [2, 6, 10, 24, 64, 256, 768, 1536, 6144])
def test_the_reserve_grows_and_stays_below_the_memory(gib: int) -> None:
    reserve, text = _plan.system_reserve(gib * GIB)
    assert 5 * GIB // 4 < reserve < gib * GIB
    assert reserve >= _plan.system_reserve((gib - 1) * GIB)[0]
    assert "struct pages" in text
