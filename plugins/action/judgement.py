# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.judgement: facts in, findings and roofs out, without a connection to the host."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._judgement import Host, judge


class ActionModule(ActionBase):  # type: ignore[misc] # ansible ships no types
    """Returns the judgement of one host as a fact."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        self.validate_argument_spec(argument_spec={})
        facts = task_vars.get("ansible_facts") or {}
        if not (facts.get("cpullm_numa") or {}).get("readable"):
            host = task_vars.get("inventory_hostname", "localhost")
            raise AnsibleActionFail(
                f"{host}: ansible_facts['cpullm_numa']: found none that could be read, expected the host's topology. "
                "Gather it with cpullm.epyc.numa_facts."
            )
        others = {name: facts.get(f"cpullm_{name}") or {} for name in ("dimm", "hugepages", "condition", "bandwidth")}
        judgement = judge(
            Host(
                numa=facts["cpullm_numa"],
                plan=facts.get("cpullm_plan"),
                disk_read=facts.get("cpullm_disk_read") or {},
                **others,
            )
        )
        result.update(changed=False, ansible_facts={"cpullm_judgement": judgement})
        return result
