# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.fleet_report: variables of all hosts in, one HTML file out."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _report

ARGUMENT_SPEC = {
    "dest": {"type": "str", "required": True},
    "write": {"type": "bool", "default": True},
    "benchmarks": {"type": "str"},
}
# A result of a host with many figures is some 100 KiB.
LARGEST_RESULT = 8 << 20

# What a record takes of a host's variables: what the roles of this collection leave among them.
VARIABLES = (
    "ansible_facts",
    "__host_plan_read",
    "__host_plan_result",
    "__host_plan_room",
    "__systemd_service_serving",
    "__report_reached",
    "__report_failures",
)
FACTS = tuple(
    f"cpullm_{name}"
    for name in ("numa", "dimm", "hugepages", "grub_hugepages", "plan", "judgement", "bandwidth", "build")
)


def latest_benchmarks(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Return the newest result of the role benchmark for each host; what is no such result is passed over."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")) if folder else ():
        try:
            if path.stat().st_size > LARGEST_RESULT:
                continue
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["name"] == "benchmark" and kept["date"] >= newest.get(kept["host"], kept)["date"]:
                newest[kept["host"]] = kept
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return newest


def record(
    name: str, variables: Mapping[str, Any], ended_early: bool, benchmark: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the report takes of one host's variables, and its latest benchmark."""
    found: dict[str, Any] = {key: variables[key] for key in VARIABLES if key in variables}
    facts = found.get("ansible_facts") or {}
    found["ansible_facts"] = {key: facts[key] for key in FACTS if key in facts}
    return {**found, "inventory_hostname": name, "ended_early": ended_early, "__benchmark": benchmark}


def refusal(path: Path) -> str | None:
    """Return why no report can be written there, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return (
            f"matplotlib: found none for the controller's Python, {sys.executable}; the fleet report draws with it. "
            "Install what requirements/run.txt pins, or set report_file to null: no report is written then"
        )
    if not path.parent.is_dir():
        return (
            f"report_file {path}: found no directory {path.parent} on the controller, expected one. "
            "Make it, or name another file"
        )
    if path.is_dir():
        return f"report_file {path}: found a directory, expected a file or none. Name a file in it"
    return None


def write_atomically(path: Path, page: str) -> None:
    """Replace a file's content in one step; it is readable by everyone, as a page to show around is."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(page)
            os.fchmod(stream.fileno(), 0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class ActionModule(ActionBase):  # type: ignore[misc] # ansible ships no types
    """Writes the report of all hosts of the inventory."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _dummy, args = self.validate_argument_spec(argument_spec=ARGUMENT_SPEC)
        path = Path(self._loader.path_dwim(args["dest"]))
        reason = refusal(path)
        if reason is not None:
            raise AnsibleActionFail(reason)
        result.update(changed=False, dest=str(path))
        if not args["write"]:
            return result
        hostvars = task_vars["hostvars"]
        ended = set(task_vars.get("ansible_play_hosts_all", ())) - set(task_vars.get("ansible_play_hosts", ()))
        names = task_vars.get("groups", {}).get("all", ())
        folder = Path(self._loader.path_dwim(args["benchmarks"])) if args["benchmarks"] else None
        benchmarks = latest_benchmarks(folder)
        views = _report.hosts(
            [record(str(name), hostvars[name], name in ended, benchmarks.get(str(name))) for name in names]
        )
        page = _report.render(views, datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
        try:
            before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            if not self._task.check_mode:
                # Also where nothing but the time and what was measured is new: the page shows the last look.
                write_atomically(path, page)
        except OSError as error:
            raise AnsibleActionFail(f"report_file {path}: {error}") from error
        result["changed"] = _report.signature_of(before) != _report.signature(views)
        return result
