# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.benchmark_record: a program's result in, one JSON file out."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils import _benchmark

ARGUMENT_SPEC = {
    "directory": {"type": "str"},
    "result": {"type": "dict"},
    "settings": {"type": "dict", "default": {}},
}
COLLECTION = Path(__file__).resolve().parents[2]


def commit() -> str:
    """Return the commit of the clone that the collection is, or an empty text where it was installed."""
    if not (COLLECTION / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(COLLECTION), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def file_name(host: str, date: str) -> str:
    """Return the name of a result's file; what a file name cannot hold of a host's name is replaced."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', host)}-{re.sub(r'[^0-9TZ]', '', date)}.json"


class ActionModule(ActionBase):  # type: ignore[misc] # ansible ships no types
    """Writes the result of one host."""

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
        result["changed"] = False
        folder = Path(self._loader.path_dwim(args["directory"])) if args["directory"] else None
        nearest = folder if folder is None or folder.exists() else folder.parent
        if nearest is not None and not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise AnsibleActionFail(
                f"{host}: benchmark_directory {folder}: found no directory {nearest} on the controller that can be "
                "written to, expected one. Make it, or name another one"
            )
        if args["result"] is None:
            return result
        plan = (task_vars.get("ansible_facts") or {}).get("cpullm_plan")
        try:
            kept = _benchmark.document(host, args["result"], args["settings"], plan, commit())
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise AnsibleActionFail(
                f"{host}: result: found {error!r}, expected what the program of the role benchmark writes"
            ) from error
        result["ansible_facts"] = {"cpullm_benchmark": kept}
        if folder is None:
            return result
        path = folder / file_name(host, str(kept["date"]))
        if not self._task.check_mode:
            folder.mkdir(exist_ok=True)
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            fresh.replace(path)
        result.update(changed=True, dest=str(path))
        return result
