#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Say what the headers of a model's GGUF files on a host state."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gguf_info
short_description: Say what the headers of a model's GGUF files state
version_added: "1.0.0"
description:
  - Reads the header of each shard and returns architecture, layers, heads, context trained, MLA or not, experts, and
    the bytes of each tensor type and part.
  - Reads no tensor data and trusts nothing. A file that is truncated, or whose counts, lengths or tensors do not fit
    together, is an error that names file and offset.
options:
  path:
    description: The model's file, or its first shard. The others are looked for beside it.
    type: path
    required: true
attributes:
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Look at a model
  cpullm.epyc.gguf_info:
    path: /srv/models/recite/recite-00001-of-00003.gguf
  register: model

- name: Refuse a model without MLA
  ansible.builtin.assert:
    that: model.gguf.mla
"""

RETURN = r"""
shards:
  description: Each file with C(file), C(bytes), C(tensors) and C(data_start), the offset of its tensor data.
  type: list
  elements: dict
  returned: success
gguf:
  description: What the headers say, as in the C(gguf) of a lock file.
  type: dict
  returned: success
  sample:
    architecture: deepseek2
    layers: 61
    context_trained: 163840
    heads: 128
    mla: true
    experts: 256
    experts_used: 8
    split_count: 16
    tensor_bytes: 713281210368
"""

import dataclasses
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._gguf import describe_model, parse_split_name
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import read_shard_header


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec={"path": {"type": "path", "required": True}}, supports_check_mode=True)
    path: str = module.params["path"]
    folder, first = os.path.split(path)
    split = parse_split_name(first)
    if split is None:
        module.fail_json(msg=f"{path}: expected the name of a .gguf file")
        return
    names = [first]
    if split.count > 1:
        names = [f"{split.stem}-{number:05d}-of-{split.count:05d}.gguf" for number in range(1, split.count + 1)]
    try:
        headers = [(name, read_shard_header(name, os.path.join(folder, name))) for name in names]
        model = describe_model(headers)
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{path}: {error}")
        return
    module.exit_json(
        changed=False,
        shards=[
            {"file": name, "bytes": header.file_bytes, "tensors": len(header.tensors), "data_start": header.data_start}
            for name, header in headers
        ],
        gguf=dataclasses.asdict(model),
    )


if __name__ == "__main__":
    main()
