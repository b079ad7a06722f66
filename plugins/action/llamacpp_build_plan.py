# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.llamacpp_build_plan: name the build that a host needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._build import choose_isa
from ansible_collections.cpullm.epyc.plugins.plugin_utils._llamacpp import RECIPE_ARGUMENTS, read_inputs

ARGUMENT_SPEC = {
    **RECIPE_ARGUMENTS,
    "isa": {"type": "str"},
    "cpu_flags": {"type": "list", "elements": "str"},
    "prefix": {"type": "path", "default": "/opt/llama.cpp"},
    "choice": {"type": "str", "default": "wanted"},
}


def chosen(choice: str, info: dict[str, Any]) -> dict[str, Any] | None:
    """Return the installed build that is meant in place of the named one, or None; ValueError where it is absent."""
    if choice == "wanted":
        return None
    whole: dict[str, dict[str, Any]] = {build["id"]: build for build in info["builds"] if not build["problems"]}
    if choice == "current":
        return whole.get(info["current"])
    identifier = info["previous"] if choice == "previous" else choice
    if identifier not in whole:
        raise ValueError(
            f"llamacpp_build_choice is {choice}: found the complete builds {', '.join(whole) or 'none'}, of which "
            f"{info['current'] or 'none'} is current and {info['previous'] or 'none'} was before; expected one of "
            "them. Name it with -e rollback_build_id=..., or install another one with playbooks/upgrade.yml."
        )
    return whole[identifier]


class ActionModule(ActionBase):  # type: ignore[misc]
    """Computes the build id here and compares it with what is installed there."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        host = str(task_vars.get("inventory_hostname", "localhost"))
        prefix = args["prefix"]
        try:
            inputs = read_inputs(args)
        except ValueError as error:
            raise AnsibleActionFail(f"{host}: {error}") from error
        info: dict[str, Any] = self._execute_module(
            module_name="cpullm.epyc.llamacpp_build_info", module_args={"prefix": prefix}, task_vars=task_vars
        )
        if info.get("failed"):
            return info
        try:
            isa = choose_isa(args["isa"], args["cpu_flags"] or info["cpu_flags"])
        except ValueError as error:
            raise AnsibleActionFail(f"{host}: {error}") from error
        identifier = inputs.id(isa, info["release"])
        wanted = identifier
        try:
            instead = chosen(args["choice"], info)
        except ValueError as error:
            raise AnsibleActionFail(f"{host}: {error}") from error
        if instead is not None:
            identifier = instead["id"]
        found = next((build for build in info["builds"] if build["id"] == identifier), None)
        if args["choice"] == "current" and identifier != wanted:
            result["warnings"] = [
                f"{host} stays with its build {identifier}; the variables llamacpp_build_* name {wanted}. "
                "playbooks/upgrade.yml goes there."
            ]
        result["ansible_facts"] = {
            "cpullm_build": {
                "id": identifier,
                "path": f"{prefix}/{identifier}",
                "isa": isa,
                "release": info["release"],
                "version": inputs.source.version,
                "source": {
                    "type": inputs.source.type,
                    "location": inputs.source.location,
                    "digest": inputs.source.digest,
                },
                "patches": [{"name": patch.name, "sha256": patch.sha256} for patch in inputs.patches],
                "options": [asdict(option) for option in inputs.options(isa)],
            }
        }
        if instead is not None:
            record = instead["record"]
            source = {key: record["source"][key] for key in ("type", "location", "digest")}
            result["ansible_facts"]["cpullm_build"].update({**record, "source": source})
        result.update(
            changed=False,
            id=identifier,
            wanted=wanted,
            installed=found is not None and not found["problems"],
            problems=found["problems"] if found else [],
            missing_packages=found["missing_packages"] if found else [],
            current=info["current"],
            previous=info["previous"],
        )
        result["request"] = {
            "host": host,
            "id": identifier,
            "installed": result["installed"],
            "release": info["release"],
            "source": args["source"],
        }
        return result
