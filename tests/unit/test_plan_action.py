# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail, AnsibleFilterError
from ansible.parsing.dataloader import DataLoader
from ansible_collections.cpullm.epyc.plugins.action import judgement as judgement_action
from ansible_collections.cpullm.epyc.plugins.action import model_manifest as manifest_action
from ansible_collections.cpullm.epyc.plugins.action import plan as plan_action
from ansible_collections.cpullm.epyc.plugins.filter.plan_table import FilterModule, plan_table
from ansible_collections.cpullm.epyc.plugins.module_utils import _manifest

from tests.support import gguf_file, hub
from tests.unit.test_gguf import TINY
from tests.unit.test_plan import R1, machine, manifest, recite


def run(plugin: Any, args: dict[str, Any], facts: Any = None, check: bool = False) -> dict[str, Any]:
    """Run an action plugin as the task executor does, without a connection."""
    task = SimpleNamespace(args=args, async_val=0, check_mode=check, diff=True, action="cpullm.epyc.x", collections=[])
    connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None))
    action = plugin.ActionModule(task, connection, SimpleNamespace(), DataLoader(), None, None)
    result: dict[str, Any] = action.run(
        None, {"inventory_hostname": "host1", "ansible_facts": {} if facts is None else facts}
    )
    return result


@pytest.fixture
def lock(tmp_path: Path) -> str:
    path = tmp_path / "recite.json"
    path.write_text(_manifest.lock_text(recite()))
    return str(path)


VM = machine([5, 5], cores=1, smt=1)


@pytest.mark.parametrize("check", [False, True])
def test_the_plan_is_a_fact(check: bool, lock: str) -> None:
    result = run(plan_action, {"lock": lock}, {"cpullm_numa": VM}, check)
    plan = result["ansible_facts"]["cpullm_plan"]
    assert result["changed"] is False
    assert plan["kernel_arguments"][2] == "hugepages=0:3,1:3"
    assert json.loads(json.dumps(plan)) == plan


@pytest.mark.parametrize("check", [False, True])
def test_the_judgement_is_a_fact(check: bool, lock: str) -> None:
    plan = run(plan_action, {"lock": lock}, {"cpullm_numa": VM}, check)["ansible_facts"]
    result = run(judgement_action, {}, {"cpullm_numa": VM, **plan}, check)
    (finding,) = result["ansible_facts"]["cpullm_judgement"]["findings"]
    assert result["changed"] is False
    assert (finding["severity"], finding["name"]) == ("unknown", "memory slots")


@pytest.mark.parametrize("facts", [{}, {"cpullm_numa": {"readable": False, "reason": "no /proc"}}])
def test_nothing_is_judged_without_a_topology(facts: dict[str, Any]) -> None:
    with pytest.raises(
        AnsibleActionFail, match="host1: ansible_facts\\['cpullm_numa'\\]: found none that could be read"
    ):
        run(judgement_action, {}, facts)


def test_values_arrive_as_text(lock: str) -> None:
    args = {
        "lock": lock,
        "context": "1024",
        "slots": "2",
        "port": "9000",
        "system_reserve_gib": "1.5",
        "instances": None,
    }
    plan = run(plan_action, args, {"cpullm_numa": VM})["ansible_facts"]["cpullm_plan"]
    assert (plan["context"], plan["slots"], plan["instances"][1]["port"]) == (1024, 2, 9001)
    assert plan["system_reserve_bytes"] == 3 << 29


@pytest.mark.parametrize(
    ("args", "facts", "message"),
    [
        pytest.param({}, {}, "host1: ansible_facts['cpullm_numa']: found nothing, expected the fact", id="no-facts"),
        pytest.param(
            {"system_reserve_gib": "inf"},
            {"cpullm_numa": VM},
            "host1: host_plan_system_reserve_gib: found inf, expected 0 or more",
            id="no-number",
        ),
        pytest.param({"context": 9999}, {"cpullm_numa": VM}, "host1: host_plan_context: found 9999", id="wish"),
        pytest.param(
            {"lock": "/nonexistent.json"},
            {},
            "host1: host_plan_lock /nonexistent.json: found no such file",
            id="no-lock",
        ),
        pytest.param(
            {"lock": "/"}, {}, "host1: host_plan_lock /: found is a directory, expected a lock file", id="directory"
        ),
    ],
)
def test_refusals_name_the_host(args: dict[str, Any], facts: Any, message: str, lock: str) -> None:
    result = run(plan_action, {"lock": lock, **args}, facts)
    assert result["failed"] is True
    assert result["msg"].startswith(message)
    assert set(result["refusal"]) == {"host", "name", "found", "expected", "way_out"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "found no JSON"),
        ("{}", ", schema: found missing, expected int"),
        ('{"schema": 7}', ", schema: found 7, expected 1"),
        ("\udcff", "utf-8"),
    ],
)
def test_damaged_locks_name_file_and_field(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = run(plan_action, {"lock": str(path)}, {"cpullm_numa": VM})
    assert f"host1: host_plan_lock {path}" in result["msg"]
    assert message in result["msg"]
    assert "playbooks/lock.yml" in result["msg"]


# --- The lock file --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    gguf_file.write_model(directory, "tiny", TINY.pairs(), TINY.tensors(), 3)
    return directory


def test_a_lock_is_written_once_and_whole(folder: Path, tmp_path: Path) -> None:
    dest = tmp_path / "tiny.json"
    args = {"directory": str(folder), "dest": str(dest)}
    assert run(manifest_action, args, check=True)["changed"] is True
    assert not dest.exists()
    first = run(manifest_action, args)
    assert first["changed"] is True
    assert first["diff"]["before"] == ""
    assert json.loads(dest.read_text()) == first["manifest"]
    assert stat.S_IMODE(dest.stat().st_mode) & 0o600 == 0o600
    inode = dest.stat().st_ino
    assert run(manifest_action, args)["changed"] is False
    assert dest.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("mla", [False, True])
def test_missing_mla_tensors_are_warned_of(mla: bool, tmp_path: Path) -> None:
    model = dataclasses.replace(TINY, mla=mla)
    gguf_file.write_model(tmp_path, "tiny", model.pairs(), model.tensors(), 1)
    # 3 layers of 4 heads: 4 x 64 values in q8_0 and 4 x 32 in F16; with MLA 64 + 32 values in q8_0.
    cost = (
        "tiny: a GGUF without attn_k_b and attn_v_b: 1584 bytes of KV cache for each token of context, 5 times the 306"
    )
    warnings = run(manifest_action, {"directory": str(tmp_path)}).get("warnings", [])
    assert [warning.startswith(cost) and "The plan shows" in warning for warning in warnings] == [True] * (not mla)


def test_a_lock_from_a_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    secret = tmp_path / "token"
    secret.write_text("hf_secret\n")
    with hub.Hub(token="hf_secret") as server:
        server.add("org/name", folder)
        args = {"repo": "org/name", "endpoint": server.url, "dest": str(tmp_path / "x.json"), "token_file": str(secret)}
        result = run(manifest_action, args)
        assert result["manifest"]["source"]["endpoint"] == server.url
        assert "hf_secret" not in json.dumps(result)
        with pytest.raises(AnsibleActionFail, match=r"org/name: .*HTTP 401.*give a token"):
            run(manifest_action, {**args, "token_file": None})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "one of the following is required: model, repo, directory"),
        ({"repo": "a/b", "directory": "/x"}, "mutually exclusive"),
        ({"repo": "a/b", "model": "deepseek-r1-q8_0"}, "mutually exclusive: model|repo|directory"),
        ({"pattern": "*", "model": "deepseek-r1-q8_0"}, "mutually exclusive: model|pattern"),
        ({"model": "deepseek-r1"}, "model: found 'deepseek-r1', expected a name such as deepseek-r1-q8_0"),
        ({"directory": "/nonexistent"}, "/nonexistent: .*No such file"),
    ],
)
def test_what_cannot_be_resolved(args: dict[str, Any], message: str) -> None:
    with pytest.raises(AnsibleActionFail, match=message):
        run(manifest_action, args)


# --- The table ------------------------------------------------------------------------------------------------------


def test_the_table_of_the_published_machine(tmp_path: Path) -> None:
    path = tmp_path / "r1.json"
    path.write_text(_manifest.lock_text(manifest(R1, 16)))
    plan = run(plan_action, {"lock": str(path)}, {"cpullm_numa": machine([768])})["ansible_facts"]["cpullm_plan"]
    lines = plan_table(plan, "r1", 100)
    assert max(len(line) for line in lines if "weights + " not in line) <= 100
    text = "\n".join(lines)
    assert text.startswith("r1: DeepSeek-R1-Q8_0 (deepseek2, 16 shard(s)), plan ")
    assert "default_hugepagesz=1G hugepagesz=1G hugepages=668" in text
    assert "node 0: 668 pages of 1 GiB" in text
    assert "instance 0: socket 0, CPUs 0-15,16-31, -t 16 -tb 32, port 18008" in text
    assert "socket 0: 768.00 GiB = 668.00 weights + 11.39 kv" in text


def test_no_plan_no_table() -> None:
    with pytest.raises(AnsibleFilterError, match="found no plan"):
        plan_table({})
    assert set(FilterModule().filters()) == {"plan_table"}
