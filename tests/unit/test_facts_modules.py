# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The edges of the facts modules: what Ansible runs, and documentation that tells what is returned."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import smbios_builder as build
import yaml
from ansible_collections.cpullm.epyc.plugins.module_utils import _hugepages, _numa, _smbios

CLONE = Path(__file__).resolve().parents[2]
FIXTURES = CLONE / "tests" / "fixtures"
VM = str(FIXTURES / "lab-vm-bookworm-pages")

FACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "numa_facts": ("cpullm_numa", _numa.gather(VM)),
    "dimm_facts": ("cpullm_dimm", _smbios.gather(VM, include_serial=True)),
    "hugepage_facts": ("cpullm_hugepages", _hugepages.gather(VM)),
}


def documentation(name: str, part: str) -> dict[str, Any]:
    module = importlib.import_module(f"ansible_collections.cpullm.epyc.plugins.modules.{name}")
    loaded: dict[str, Any] = yaml.safe_load(getattr(module, part))
    return loaded


def undocumented(documented: dict[str, Any], value: object, path: str) -> list[str]:
    """Return where a value and the documentation of its keys, kinds and elements differ."""
    problems = []
    kind = documented["type"]
    kinds = {"dict": dict, "list": list, "str": str, "int": int, "float": float, "bool": bool}
    if value is not None and not isinstance(value, kinds[kind]):
        problems.append(f"{path} is {type(value).__name__}, documented as {kind}")
    if isinstance(value, bool) and kind != "bool":
        problems.append(f"{path} is a bool, documented as {kind}")
    contents = documented.get("contains")
    if isinstance(value, dict) and contents is not None:
        problems += [f"{path}.{key}" for key in set(value) ^ set(contents)]
        for key in set(value) & set(contents):
            problems += undocumented(contents[key], value[key], f"{path}.{key}")
    if isinstance(value, list):
        for item in value:
            problems += undocumented({**documented, "type": documented["elements"]}, item, f"{path}[]")
    return problems


@pytest.mark.parametrize("name", sorted(FACTS))
def test_the_documentation_tells_what_is_returned(name: str) -> None:
    fact_name, fact = FACTS[name]
    documented = documentation(name, "RETURN")["ansible_facts"]["contains"]
    assert list(documented) == [fact_name]
    assert fact["readable"]
    assert undocumented(documented[fact_name], fact, fact_name) == []


@pytest.mark.parametrize("name", sorted(FACTS))
def test_an_unreadable_host_has_the_same_keys(name: str, tmp_path: Path) -> None:
    gather = {"numa_facts": _numa.gather, "dimm_facts": _smbios.gather, "hugepage_facts": _hugepages.gather}[name]
    fact = gather(str(tmp_path))
    assert set(fact) == set(FACTS[name][1])
    assert fact["readable"] is False
    assert fact["reason"]
    assert all(value in (None, [], False) for key, value in fact.items() if key != "reason")


@pytest.mark.parametrize("name", sorted(FACTS))
def test_the_examples_are_tasks(name: str) -> None:
    module = importlib.import_module(f"ansible_collections.cpullm.epyc.plugins.modules.{name}")
    tasks = yaml.safe_load(module.EXAMPLES)
    assert any(f"cpullm.epyc.{name}" in task for task in tasks)
    assert all(task["name"] for task in tasks)


PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - cpullm.epyc.numa_facts:
    - cpullm.epyc.hugepage_facts:
    - cpullm.epyc.dimm_facts:
        include_serial: true
    - ansible.builtin.copy:
        content: "{{ ansible_facts | to_json }}"
        dest: "%s"
        mode: "0600"
      check_mode: false
"""


@pytest.mark.parametrize("mode", [pytest.param([], id="run"), pytest.param(["--check"], id="check")])
def test_ansible_runs_them(mode: list[str], tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYBOOK % (tmp_path / "facts.json"))
    playbook = Path(sys.executable).parent / "ansible-playbook"
    result = subprocess.run(
        [str(playbook), *mode, "-i", "localhost,", "-e", f"ansible_python_interpreter={sys.executable}", "play.yml"],
        cwd=tmp_path,
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(CLONE / ".collections"),
            "ANSIBLE_INJECT_FACT_VARS": "false",
            "ANSIBLE_LOCAL_TEMP": str(tmp_path / "ansible"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["cpullm_numa"] == _numa.gather()
    assert facts["cpullm_hugepages"]["boot_id"] == _hugepages.gather()["boot_id"]
    assert facts["cpullm_dimm"] == _smbios.gather(include_serial=True)


@pytest.mark.parametrize("wanted", [False, True])
def test_serial_numbers_are_opt_in(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("ansible_collections.cpullm.epyc.plugins.modules.dimm_facts")
    table = build.single_socket_12()
    files = {_smbios.ENTRY_POINT: build.entry_point_3(table), _smbios.TABLE: table}
    left: dict[str, Any] = {}

    class Module:
        params: dict[str, Any]

        def __init__(self, argument_spec: dict[str, Any], supports_check_mode: bool) -> None:
            assert supports_check_mode
            assert argument_spec["include_serial"] == {"type": "bool", "default": False}
            self.params = {"include_serial": wanted}

        def exit_json(self, **result: Any) -> None:
            left.update(result)

    monkeypatch.setattr(_smbios, "_read_bounded", lambda path, _limit: files[path])
    monkeypatch.setattr(module, "AnsibleModule", Module)
    module.main()
    assert left["changed"] is False
    slots = left["ansible_facts"]["cpullm_dimm"]["slots"]
    assert [("serial_number" in slot, "asset_tag" in slot) for slot in slots] == [(wanted, wanted)] * 12
