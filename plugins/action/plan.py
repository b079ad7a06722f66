# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.plan: lock file and facts in, plan out, without a connection to the host."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import Manifest, parse_lock
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import (
    GIB,
    Overrides,
    Refusal,
    make_plan,
)

MAX_LOCK_BYTES = 16 << 20

# Choices are checked by the plan, so that a wrong one is refused like everything else: host, name, found, way out.
ARGUMENT_SPEC = {
    "lock": {"type": "str", "required": True},
    "context": {"type": "int"},
    "slots": {"type": "int", "default": 1},
    "instances": {"type": "int"},
    "system_reserve_gib": {"type": "float"},
    "cache_type_k": {"type": "str", "default": "q8_0"},
    "cache_type_v": {"type": "str"},
    "port": {"type": "int", "default": 18008},
    "isa": {"type": "str"},
    "weights": {"type": "str", "default": "hugetlbfs"},
    "overlap": {"type": "bool"},
    "free_vmemmap": {"type": "bool", "default": False},
}


def read_lock(path: str) -> Manifest:
    """Return the manifest of a lock file on the controller; raises Refusal that names the file and the field."""
    way_out = "Write the lock with playbooks/lock.yml; it is not edited by hand."
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_LOCK_BYTES + 1)
    except OSError as error:
        raise Refusal(
            f"host_plan_lock {path}", str(error.strerror or error).lower(), "a lock file on the controller", way_out
        ) from None
    if len(data) > MAX_LOCK_BYTES:
        raise Refusal(f"host_plan_lock {path}", f"more than {MAX_LOCK_BYTES} bytes", "a lock file", way_out)
    try:
        return parse_lock(data.decode("utf-8"))
    except ValueError as error:
        # The manifest's own errors read "FIELD: found X, expected Y" or "FIELD: missing, expected Y".
        match = re.match(r"(?:([a-z0-9_.\[\]]+): )?(?:found )?(.*?)(?:, expected (.*))?$", str(error), re.DOTALL)
        field, found, expected = match.groups() if match else (None, str(error), None)
        name = f"host_plan_lock {path}" + (f", {field}" if field else "")
        raise Refusal(name, found, expected or "a valid lock", way_out) from None


class ActionModule(ActionBase):  # type: ignore[misc] # ansible ships no types
    """Returns the plan of one host as a fact, or a refusal."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        host = str(task_vars.get("inventory_hostname", "localhost"))
        facts = task_vars.get("ansible_facts") or {}
        reserve_gib = args["system_reserve_gib"]
        try:
            if reserve_gib is not None and not math.isfinite(reserve_gib):
                raise Refusal(
                    "host_plan_system_reserve_gib", str(reserve_gib), "0 or more", "Correct it, or leave it out."
                )
            overrides = Overrides(
                context=args["context"],
                slots=args["slots"],
                instances=args["instances"],
                system_reserve_bytes=None if reserve_gib is None else round(reserve_gib * GIB),
                cache_type_k=args["cache_type_k"],
                cache_type_v=args["cache_type_v"],
                port=args["port"],
                isa=args["isa"],
                weights=args["weights"],
                overlap=args["overlap"],
                free_vmemmap=args["free_vmemmap"],
            )
            manifest = read_lock(self._loader.path_dwim(args["lock"]))
            plan = make_plan(facts.get("cpullm_numa"), manifest, overrides)
        except Refusal as refusal:
            result.update(
                failed=True,
                msg=f"{host}: {refusal}",
                refusal={
                    "host": host,
                    "name": refusal.name,
                    "found": refusal.found,
                    "expected": refusal.expected,
                    "way_out": refusal.way_out,
                },
            )
            return result
        except ValueError as error:
            raise AnsibleActionFail(f"{host}: {error}") from error
        result.update(changed=False, ansible_facts={"cpullm_plan": plan})
        return result
