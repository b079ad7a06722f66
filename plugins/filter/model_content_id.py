# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of the contents of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.module_utils._shards import content_id, shards_of

DOCUMENTATION = r"""
name: model_content_id
short_description: Name of a model's content
version_added: "1.0.0"
author:
  - The cpullm.epyc authors (@cpullm)
description:
  - Returns 16 hexadecimal digits made from the names and the SHA-256 of all shards, wherever they come from.
  - The model's directory on the host and its place in the store of weights are named so.
options:
  _input:
    description: The shards, each with C(file), C(bytes) and C(sha256).
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the name
  ansible.builtin.debug:
    msg: "{{ ansible_facts['cpullm_plan'].model.shards | cpullm.epyc.model_content_id }}"
"""

RETURN = r"""
_value:
  description: The name.
  type: str
  sample: 3f1c0d5e8a7b9642
"""


def model_content_id(shards: Any) -> str:
    """Return the content's name. Raises AnsibleFilterError for what is no list of shards."""
    try:
        return content_id(shards_of(list(shards)))
    except (ValueError, KeyError, TypeError) as error:
        raise AnsibleFilterError(f"model_content_id: {error!r}; expected shards with file, bytes and sha256") from None


class FilterModule:
    """Names the filter."""

    def filters(self) -> dict[str, Callable[[Any], str]]:
        """Return the filters of this file."""
        return {"model_content_id": model_content_id}
