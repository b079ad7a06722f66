#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Own a set of small files whole: write those that are wanted, remove those that are not."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: owned_files
short_description: Own a set of small text files whole
version_added: "1.0.0"
description:
  - Writes files with the given contents, each in one step and owned by root, and makes absent folders.
  - Removes files that match O(patterns) and are not in O(files), and the folders of these that are empty then.
  - One call does what a loop over C(template) would do in two round trips a file.
options:
  files:
    description: The files that are to be there.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path.
        type: path
        required: true
      content:
        description: The whole content. A line feed is added at the end where there is none.
        type: str
        required: true
      mode:
        description: Permissions in octal.
        type: str
        default: "0644"
  patterns:
    description: Shell patterns of absolute paths that belong to the caller.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Can run in check mode and say what it would do.
    support: full
  diff_mode:
    description: Returns the contents before and after.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Own the drop-ins of all instances
  cpullm.epyc.owned_files:
    files:
      - path: /etc/systemd/system/example@0.service.d/10-plan.conf
        content: "{{ lookup('ansible.builtin.template', 'plan.conf.j2') }}"
    patterns: ["/etc/systemd/system/example@*.service.d/10-plan.conf"]
"""

RETURN = r"""
paths:
  description: The files that were written or removed, or in check mode would be.
  type: list
  elements: str
  returned: always
"""

import glob
import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def found(path: str) -> dict[str, Any] | None:
    """Return content, mode and owner of a file, or None where there is none. Raises OSError for anything but a file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if os.path.islink(path) or not os.path.isfile(path):
        raise OSError(f"{path} is no regular file; move it away")
    text = Path(path).read_bytes().decode("utf-8", "backslashreplace")
    return {"content": text, "mode": status.st_mode & 0o7777, "owner": (status.st_uid, status.st_gid)}


def plan(
    wanted: list[dict[str, Any]], before: dict[str, dict[str, Any] | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the files to write and the paths to remove.

    ``wanted`` holds path, content and mode (as a number); ``before`` what :func:`found` says of each path that is
    wanted or that the caller owns.
    """
    write = [
        entry
        for entry in wanted
        if before[entry["path"]] != {"content": entry["content"], "mode": entry["mode"], "owner": (0, 0)}
    ]
    kept = {entry["path"] for entry in wanted}
    return write, sorted(path for path, state in before.items() if state is not None and path not in kept)


def apply(write: list[dict[str, Any]], remove: list[str]) -> None:
    """Write and remove. Each file changes in one step.

    A plain rename, because AnsibleModule.atomic_move gives the file the mode of what was there, or the umask's.
    """
    for entry in write:
        folder = os.path.dirname(entry["path"])
        os.makedirs(folder, mode=0o755, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(dir=folder, prefix=".ansible-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(entry["content"])
            handle.flush()
            os.fchmod(handle.fileno(), entry["mode"])
            os.fchown(handle.fileno(), 0, 0)
            os.fsync(handle.fileno())
        os.replace(fresh, entry["path"])
    for path in remove:
        os.unlink(path)
        folder = os.path.dirname(path)
        if not os.listdir(folder):
            os.rmdir(folder)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                    "mode": {"type": "str", "default": "0644"},
                },
            },
            "patterns": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    wanted = [
        {
            "path": entry["path"],
            "content": entry["content"] if entry["content"].endswith("\n") else entry["content"] + "\n",
            "mode": int(entry["mode"], 8),
        }
        for entry in module.params["files"]
    ]
    try:
        owned = {path for pattern in module.params["patterns"] for path in glob.glob(pattern)}
        before = {path: found(path) for path in sorted(owned | {entry["path"] for entry in wanted})}
        write, remove = plan(wanted, before)
        if not module.check_mode:
            apply(write, remove)
    except OSError as error:
        module.fail_json(msg=str(error))
    after = {entry["path"]: entry["content"] for entry in write}
    touched = [entry["path"] for entry in write] + remove
    module.exit_json(
        changed=bool(touched),
        paths=touched,
        diff=[
            {
                "before_header": path,
                "after_header": path,
                "before": (before[path] or {}).get("content", ""),
                "after": after.get(path, ""),
            }
            for path in touched
        ],
    )


if __name__ == "__main__":
    main()
