"""What holds for every role: an unknown variable name passes silently in Ansible, so the keys are compared here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CLONE = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (CLONE / "roles").iterdir() if path.is_dir())


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_roles_are_the_ones_of_the_design():
    assert {
        "host_plan",
        "grub_hugepages",
        "memory_tuning",
        "llamacpp_build",
        "model_fetch",
        "systemd_service",
    } <= set(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_specified_and_every_option_has_a_default(role):
    defaults = load(CLONE / "roles" / role / "defaults" / "main.yml")
    specs = load(CLONE / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]
    assert set(specs["main"]["options"]) == set(defaults)
    for name, entry in specs.items():
        assert set(entry.get("options") or {}) <= set(defaults), name


@pytest.mark.parametrize("role", ROLES)
def test_variables_carry_the_role_s_name(role):
    names = set(load(CLONE / "roles" / role / "defaults" / "main.yml"))
    assert all(name.startswith(f"{role}_") for name in names)
    internal = CLONE / "roles" / role / "vars" / "main.yml"
    if internal.exists():
        assert all(name.startswith(f"__{role}_") for name in load(internal) or {})


@pytest.mark.parametrize("role", ROLES)
def test_main_only_imports(role):
    for task in load(CLONE / "roles" / role / "tasks" / "main.yml"):
        assert set(task) & {"ansible.builtin.import_tasks", "ansible.builtin.include_tasks"}, task["name"]


@pytest.mark.parametrize("role", ROLES)
def test_every_entry_point_is_specified(role):
    specs = load(CLONE / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]
    for entry in ("verify", "teardown", "activate"):
        if (CLONE / "roles" / role / "tasks" / f"{entry}.yml").exists():
            assert entry in specs


@pytest.mark.parametrize("role", ROLES)
def test_has_a_page_for_people(role):
    assert (CLONE / "roles" / role / "README.md").read_text(encoding="utf-8").startswith(f"# {role}\n")


def test_no_other_collection_is_needed():
    builtin = re.compile(r"^\s+(?:- )?((?!ansible\.builtin|cpullm\.epyc)[a-z_]+\.[a-z_]+\.[a-z_]+):", re.MULTILINE)
    for folder in ("roles", "playbooks"):
        for path in (CLONE / folder).rglob("*.yml"):
            assert not builtin.findall(path.read_text(encoding="utf-8")), path
