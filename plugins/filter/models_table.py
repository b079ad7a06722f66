# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A filter that shows the catalog of known models to people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.plugin_utils._catalog import KnownModel, read_catalog

DOCUMENTATION = r"""
name: models_table
short_description: Show the known models as a table
version_added: "1.0.0"
description:
  - Returns the models that O(cpullm.epyc.model_manifest#module:model) knows by name, as lines of text.
options:
  _input:
    description: A text; only models with it in name or title are shown. The empty text shows all.
    type: str
    required: true
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Show the known models of one family
  ansible.builtin.debug:
    msg: "{{ 'deepseek' | cpullm.epyc.models_table }}"
"""

RETURN = r"""
_value:
  description: Lines of text.
  type: list
  elements: str
"""

_MLA = {True: "MLA", False: "no MLA", None: ""}


def _lines(model: KnownModel, name_width: int, title_width: int) -> list[str]:
    """Return the line of a model, and its note on one below."""
    source = f"{model.repo} {model.pattern}"
    line = f"{model.name:{name_width}}  {model.title:{title_width}}  {_MLA[model.mla]:6}  {source}"
    return [line, f"{'':{name_width}}  {model.note}"] if model.note else [line]


def models_table(text: Any) -> list[str]:
    """Return the known models with a text in name or title as lines; raises AnsibleFilterError where there is none."""
    wanted = str(text).casefold()
    known = read_catalog()
    models = [model for model in known if wanted in f"{model.name} {model.title}".casefold()]
    if not models:
        raise AnsibleFilterError(
            f"models_table: found no model with {str(text)!r:.80} in name or title, expected one of {len(known)}; "
            "without a text all are shown"
        )
    widths = max(len(model.name) for model in models), max(len(model.title) for model in models)
    lines = [line for model in models for line in _lines(model, *widths)]
    if any(model.mla is False for model in models):
        lines.append("no MLA: the KV cache takes about 100 times the memory; playbooks/lock.yml says how much.")
    return lines


class FilterModule:
    """The collection's filter for the catalog."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"models_table": models_table}
