# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the plan to the loader: a store on each socket's node, with the pages that the plan counted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import GIB, Overrides, make_plan

from tests.unit.test_plan import AVX2, machine, manifest, recite

CLONE = Path(__file__).resolve().parents[2]
ROLE = CLONE / "roles" / "systemd_service"


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_weights", ROLE / "files" / "llama_weights.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "llama_weights", module)
    spec.loader.exec_module(module)
    return module


# A process of its own: Ansible's way to a collection's filters changes how Python imports, for good.
RENDER = """
import json, sys
import yaml
from ansible.plugins.loader import init_plugin_loader
init_plugin_loader([sys.argv[1]])
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

def trusted(value):
    if isinstance(value, dict):
        return {key: trusted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value

asked = json.load(sys.stdin)
values = {}
for path in asked["files"]:
    values |= trusted(yaml.safe_load(open(path, encoding="utf-8")))
texts = [
    Templar(DataLoader(), {**values, **asked["variables"], "item": item}).template(
        trust_as_template(open(template, encoding="utf-8").read()), convert_data=False
    )
    for item in asked["items"]
    for template in asked["templates"]
]
json.dump(texts, sys.stdout)
"""
FILES = (
    "llama-weights/plan.json.j2",
    "systemd/system/llama-weights@.service.d/10-plan.conf.j2",
    "systemd/system/llama-weights.mount.j2",
    "systemd/system/llama-server@.service.d/10-plan.conf.j2",
)


def render(plan: dict[str, Any]) -> list[list[str]]:
    """Return FILES of each instance, from the role's own defaults and variables."""
    asked = {
        "files": [str(ROLE / name / "main.yml") for name in ("defaults", "vars")],
        "variables": {
            "ansible_managed": "managed",
            "ansible_facts": {"cpullm_plan": plan},
            "systemd_service_model": f"/srv/models/x/{plan['model']['shards'][0]['file']}",
        },
        "items": plan["instances"],
        "templates": [str(ROLE / "templates" / "etc" / name) for name in FILES],
    }
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(CLONE / ".collections")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    return [texts[at : at + len(FILES)] for at in range(0, len(texts), len(FILES))]


TWO = [
    pytest.param(machine([5, 5], cores=1, smt=1, flags=AVX2), recite(), id="lab-vm"),
    pytest.param(machine([1536, 1536], cores=64), manifest(), id="two-sockets-of-R1"),
]


@pytest.mark.parametrize(("found", "model"), TWO)
def test_each_socket_has_a_store_of_its_own(
    loader: ModuleType, tmp_path: Path, found: dict[str, Any], model: Any
) -> None:
    plan = make_plan(found, model, Overrides())
    assert [row["instance"] for row in plan["instances"]] == [0, 1]
    loads = []
    for number, (row, texts) in enumerate(zip(plan["instances"], render(plan), strict=True)):
        path = tmp_path / f"{number}.json"
        path.write_text(texts[0], encoding="utf-8")
        load = loader.read_plan(path)
        loads.append(load)
        assert str(load.store) == f"/var/lib/llama-weights/{number}"
        assert load.nodes == (number,)
        assert load.page_bytes == GIB
        assert (
            sum(load.pages(shard) for shard in load.shards) == row["pages"] == plan["pages"]["nodes"][number]["pages"]
        )
        unit, mount, server = (text.splitlines() for text in texts[1:])
        assert {"NUMAPolicy=bind", f"NUMAMask={number}", f"CPUAffinity={row['cpus']}"} <= set(unit)
        assert f'RequiresMountsFor="/var/lib/llama-weights/{number}" "/srv/models/x"' in unit
        assert f"Where=/var/lib/llama-weights/{number}" in mount
        assert f"size={row['pages'] * 1048576}K," in next(line for line in mount if line.startswith("Options="))
        assert {f"Requires=llama-weights@{number}.service", f"NUMAMask={number}"} <= set(server)
        (start,) = [line for line in server if line.startswith("ExecStart=")]
        assert f" /var/lib/llama-weights/{number}/{load.content}/" in start and f"--port {row['port']}" in start
    # The same model, and once on the disk.
    first, second = loads
    assert first.content == second.content and first.shards == second.shards
    assert str(first.source) == str(second.source) == "/srv/models/x"
