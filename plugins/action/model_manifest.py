# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Controller side of cpullm.epyc.model_manifest: resolve a model, show progress, write the lock in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.cpullm.epyc.plugins.module_utils._hub import Hub, HubError, manifest_of_repo
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import (
    Manifest,
    lock_text,
    manifest_of_directory,
    manifest_to_data,
)
from ansible_collections.cpullm.epyc.plugins.module_utils._plan import MLA_WAY_OUT, missing_mla
from ansible_collections.cpullm.epyc.plugins.module_utils._progress import Status
from ansible_collections.cpullm.epyc.plugins.plugin_utils._catalog import find_model, read_catalog
from ansible_collections.cpullm.epyc.plugins.plugin_utils._reporter import Reporter

DEFAULT_ENDPOINT = "https://huggingface.co"

ARGUMENT_SPEC = {
    "model": {"type": "str"},
    "repo": {"type": "str"},
    "revision": {"type": "str", "default": "main"},
    "endpoint": {"type": "str"},
    "token_file": {"type": "str"},
    "directory": {"type": "str"},
    "pattern": {"type": "str"},
    "name": {"type": "str"},
    "dest": {"type": "str"},
    "timeout_s": {"type": "float", "default": 30.0},
    "attempts": {"type": "int", "default": 5},
}


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, durable before the new name stands."""
    mask = os.umask(0)
    os.umask(mask)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), 0o666 & ~mask)
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class ActionModule(ActionBase):  # type: ignore[misc] # ansible ships no types
    """Resolves a model to its manifest and keeps it in the lock file."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the task's result."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _dummy, args = self.validate_argument_spec(
            argument_spec=ARGUMENT_SPEC,
            mutually_exclusive=[("model", "repo", "directory"), ("model", "pattern")],
            required_one_of=[("model", "repo", "directory")],
        )
        asked, way_out = args["repo"] or args["directory"], ""
        try:
            if args["model"] is not None:
                known = find_model(args["model"], read_catalog())
                args.update(repo=known.repo, pattern=known.pattern, name=args["name"] or known.name)
                asked = f"{known.name}, {known.repo}"
                way_out = " (from the catalog; give lock_repo and lock_pattern if the upload moved)"
            manifest = self._resolve(args, str((task_vars or {}).get("inventory_hostname", "localhost")))
        except (HubError, ValueError, OSError) as error:
            raise AnsibleActionFail(f"{asked}: {error}{way_out}" if asked else str(error)) from error
        text = lock_text(manifest)
        result.update(changed=False, manifest=manifest_to_data(manifest))
        # The types of cache that a plan takes by default.
        if missing := missing_mla(manifest.model, "q8_0", "f16"):
            result["warnings"] = [f"{manifest.name}: {missing}. {MLA_WAY_OUT} The plan shows the context that remains."]
        if args["dest"]:
            result.update(self._write(Path(self._loader.path_dwim(args["dest"])), text))
        return result

    def _resolve(self, args: dict[str, Any], host: str) -> Manifest:
        if args["directory"]:
            directory = self._loader.path_dwim(args["directory"])
            with Reporter(host, f"read {Path(directory).name}") as reporter:

                def hashed(file: str, done: int, total: int) -> None:
                    reporter.tell(Status(phase="hash", done=done, total=total, unit="bytes", message=file))

                return manifest_of_directory(directory, args["name"], args["pattern"], hashed)
        endpoint = args["endpoint"] or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
        hub = Hub(endpoint, token=self._token(args, endpoint), timeout_s=args["timeout_s"], attempts=args["attempts"])
        with Reporter(host, f"ask for {args['repo']}") as reporter:

            def asked(file: str, done: int, total: int) -> None:
                reporter.tell(Status(phase="headers", done=done, total=total, unit="steps", message=file))

            return manifest_of_repo(
                hub, args["repo"], args["revision"], name=args["name"], pattern=args["pattern"], told=asked
            )

    def _token(self, args: dict[str, Any], endpoint: str) -> str | None:
        """Return the token of the file, else of HF_TOKEN where the endpoint may see it."""
        if args["token_file"]:
            return Path(self._loader.path_dwim(args["token_file"])).read_text(encoding="utf-8").strip()
        token = os.environ.get("HF_TOKEN", "").strip()
        return token if token and endpoint.startswith("https://") else None

    def _write(self, path: Path, text: str) -> dict[str, Any]:
        try:
            before = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            before = ""
        if before != text and not self._task.check_mode:
            write_atomically(path, text)
        return {
            "changed": before != text,
            "dest": str(path),
            "diff": {"before": before, "after": text, "before_header": str(path), "after_header": str(path)},
        }
