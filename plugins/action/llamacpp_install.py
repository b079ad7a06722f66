# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.llamacpp_install: bring the artifact to the host."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.plugin_utils._llamacpp import cache_directory, cached_artifact


class ActionModule(ActionBase):  # type: ignore[misc]
    """Copies the artifact out of the controller's cache and lets the module unpack it."""

    TRANSFERS_FILES = True
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        host = str(task_vars.get("inventory_hostname", "localhost"))
        module_args = {name: value for name, value in self._task.args.items() if name != "builder_error"}
        if module_args.get("state", "present") == "present" and not self._task.check_mode:
            identifier = str(module_args.get("id"))
            path, digest = cached_artifact(cache_directory(), identifier)
            if digest is None:
                reason = self._task.args.get("builder_error") or f"found no whole artifact {path}"
                raise AnsibleActionFail(f"{host}: the engine {identifier} was not built: {reason}")
            module_args["sha256"] = digest
            remote = self._connection._shell.join_path(self._make_tmp_path(), path.name)
            self._transfer_file(str(path), remote)
            self._fixup_perms2((self._connection._shell.tmpdir, remote))
            module_args["archive"] = remote
        try:
            result.update(
                self._execute_module(
                    module_name="cpullm.epyc.llamacpp_install", module_args=module_args, task_vars=task_vars
                )
            )
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result
