#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Say which shards of a model are on a host, verified and untouched since."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_shards_facts
short_description: Say which shards of a model are verified on a host
version_added: "1.0.0"
description:
  - Compares a model's directory with a list of shards, their sizes and their SHA-256.
  - The directory's name is made from the content, C(DIRECTORY/NAME/ID), so that two revisions never mix.
  - A shard counts as verified when the record of an earlier fetch holds its hash, and the file still has the size,
    the inode and the times of then. Nothing is read but the record, unless O(deep) is set.
options:
  directory:
    description: Directory that holds the models. It may be absent.
    type: path
    required: true
  name:
    description: Name of the model.
    type: str
    required: true
  shards:
    description: The shards that should be there.
    type: list
    elements: dict
    required: true
    suboptions:
      file:
        description: Name below the directory.
        type: str
        required: true
      bytes:
        description: Size in bytes.
        type: int
        required: true
      sha256:
        description: SHA-256 in hexadecimal.
        type: str
        required: true
      pages:
        description: Huge pages that it fills. Not looked at.
        type: int
  deep:
    description: Read each shard and compare its SHA-256, which takes as long as the disk needs for all of them.
    type: bool
    default: false
attributes:
  facts:
    description: Action returns an C(ansible_facts) dictionary that will update existing host facts.
    support: full
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Returns details on what has changed.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: See what is still to be fetched
  cpullm.epyc.model_shards_facts:
    directory: /srv/models
    name: DeepSeek-R1
    shards: "{{ ansible_facts['cpullm_plan'].model.shards }}"
  register: shards
"""

RETURN = r"""
ansible_facts:
  description: Where the model is, or will be.
  type: dict
  returned: always
  contains:
    cpullm_model:
      description: C(path) is the directory of this content, C(first_shard) what the server opens.
      type: dict
path:
  description: Directory of this content.
  type: str
  returned: always
  sample: /srv/models/DeepSeek-R1/3f1c0d5e8a7b9642
downloader:
  description: Whether aria2 is installed.
  type: bool
  returned: always
missing:
  description: Files that are absent, changed, or never verified.
  type: list
  elements: str
  returned: always
needed_bytes:
  description: Bytes that they still need on the file system.
  type: int
  returned: always
free_bytes:
  description: Bytes free there.
  type: int
  returned: always
"""

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._shards import (
    content_id,
    free_bytes,
    needed_bytes,
    sha256_of,
    shards_of,
    verified,
)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "shards": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "file": {"type": "str", "required": True},
                    "bytes": {"type": "int", "required": True},
                    "sha256": {"type": "str", "required": True},
                    "pages": {"type": "int"},
                },
            },
            "deep": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    name = module.params["name"]
    if name in ("", ".", "..") or "/" in name:
        module.fail_json(msg=f"name is {name!r}; expected one folder's name")
    directory = Path(module.params["directory"])
    try:
        shards = shards_of(module.params["shards"])
        directory = directory / name / content_id(shards)
        right = verified(directory, shards)
        if module.params["deep"]:
            right = [shard for shard in right if sha256_of(directory / shard.file, lambda _size: None) == shard.sha256]
        module.exit_json(
            changed=False,
            path=str(directory),
            ansible_facts={"cpullm_model": {"path": str(directory), "first_shard": str(directory / shards[0].file)}},
            downloader=shutil.which("aria2c") is not None,
            missing=[shard.file for shard in shards if shard not in right],
            needed_bytes=needed_bytes(directory, shards),
            free_bytes=free_bytes(directory),
        )
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{directory}: {error}")


if __name__ == "__main__":
    main()
