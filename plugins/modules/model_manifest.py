#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_manifest
short_description: Pin a model's shards, hashes and header facts
version_added: "1.0.0"
description:
  - Resolves a model on a hub, or in a directory of the controller, to its shards with sizes and SHA-256 at one content,
    and to what their GGUF headers say. With O(dest) the result becomes the lock file that a plan is made from.
  - Of a hub's model only the headers are read, by range requests. A local model is read once, for its hashes.
  - Runs on the controller. The certificate of the hub is verified.
  - Fails for a model that is not whole or that the engine cannot load, such as a missing or doubled shard, a split
    count that differs, a truncated file, overlapping tensors, or tensors of a type that crashes llama.cpp.
  - Warns of a GGUF without MLA tensors of an architecture that has them, with what that costs.
options:
  model:
    description:
      - Name in the collection's catalog, which stands for O(repo) and O(pattern). C(playbooks/models.yml) lists it.
    type: str
  repo:
    description: Repository on the hub, as C(organisation/name).
    type: str
  revision:
    description: Branch, tag or commit of O(repo). It is resolved to a commit.
    type: str
    default: main
  endpoint:
    description: Address of the hub. By default the environment variable E(HF_ENDPOINT), else the public hub.
    type: str
  token_file:
    description:
      - File on the controller with the hub's token. By default the environment variable E(HF_TOKEN).
      - The token is sent to the hub alone, never to where it redirects, and only over TLS or to this machine.
    type: path
  directory:
    description: Directory on the controller that holds the shards.
    type: path
  pattern:
    description:
      - Shell pattern for the shards' paths in repository or directory, such as C(DeepSeek-R1-Q8_0/*.gguf). Exactly
        one model must match.
    type: str
  name:
    description: Name of the model. By default O(model), else that of its files, without number and extension.
    type: str
  dest:
    description: Lock file on the controller to write.
    type: path
  timeout_s:
    description: Seconds that the hub may be silent.
    type: float
    default: 30
  attempts:
    description: Tries of a request that fails in passing.
    type: int
    default: 5
attributes:
  check_mode:
    description: Resolves the model, and says whether the lock file changes, without writing it.
    support: full
  diff_mode:
    description: Shows what changes in the lock file.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Pin a known model
  cpullm.epyc.model_manifest:
    model: deepseek-r1-0528-q8_0
    dest: "{{ inventory_dir }}/locks/r1.json"

- name: Pin a model of the hub
  cpullm.epyc.model_manifest:
    repo: example/DeepSeek-R1-GGUF
    pattern: DeepSeek-R1-Q8_0/*.gguf
    dest: "{{ inventory_dir }}/locks/DeepSeek-R1-Q8_0.json"

- name: Pin a model in a directory of the controller
  cpullm.epyc.model_manifest:
    directory: /srv/import/recite
    dest: "{{ inventory_dir }}/locks/recite.json"
"""

RETURN = r"""
manifest:
  description:
    - What the lock file holds. C(schema), C(name), C(source) and C(shards) with C(file), C(bytes) and C(sha256), and
      C(gguf) with what the headers say.
  type: dict
  returned: success
dest:
  description: Path of the lock file.
  type: str
  returned: when O(dest) is given
"""
