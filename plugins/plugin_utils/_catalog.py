# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The catalog of known models, read from catalog.yml beside this file.

There, because a clone and an installed collection both hold it at the same place, and no target needs it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import REPO, check_name

CATALOG = Path(__file__).with_name("catalog.yml")
_TEXTS = ("name", "title", "repo", "pattern", "note")
_OPTIONAL = {"mla", "note"}


@dataclass(frozen=True)
class KnownModel:
    """Where a model is; ``mla`` is None where nobody knows, or where the architecture has no MLA."""

    name: str
    title: str
    repo: str
    pattern: str
    mla: bool | None = None
    note: str = ""


def _parse_entry(entry: Any) -> KnownModel:
    if not isinstance(entry, dict):
        raise ValueError(f"found {entry!r:.80}, expected an object")
    fields = KnownModel.__dataclass_fields__
    foreign = sorted(str(key) for key in set(entry) - set(fields))
    if foreign:
        raise ValueError(f"found {', '.join(foreign)}, expected only {', '.join(fields)}")
    missing = sorted(set(fields) - _OPTIONAL - set(entry))
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing")
    for key in _TEXTS:
        if key in entry and not (isinstance(entry[key], str) and entry[key].isprintable() and entry[key].strip()):
            raise ValueError(f"{key}: found {entry[key]!r:.80}, expected one line of text")
    if not isinstance(entry.get("mla"), (bool, type(None))):
        raise ValueError(f"mla: found {entry['mla']!r:.80}, expected true or false")
    if not REPO.fullmatch(entry["repo"]):
        raise ValueError(f"repo: found {entry['repo']!r:.80}, expected organisation/name")
    if not entry["pattern"].endswith(".gguf"):
        raise ValueError(f"pattern: found {entry['pattern']!r:.80}, expected one that ends in .gguf")
    check_name(entry["name"])
    return KnownModel(**entry)


def parse_catalog(text: str) -> tuple[KnownModel, ...]:
    """Return the models of a catalog's text; raises ValueError that names the entry, found and expected."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"found no YAML: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("models"), list):
        raise ValueError("models: missing, expected a list")
    models: list[KnownModel] = []
    for index, entry in enumerate(data["models"]):
        try:
            model = _parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"models[{index}]: {error}") from None
        if any(model.name == other.name for other in models):
            raise ValueError(f"models[{index}]: the name {model.name} is there twice")
        models.append(model)
    return tuple(models)


def read_catalog() -> tuple[KnownModel, ...]:
    """Return the collection's catalog."""
    return parse_catalog(CATALOG.read_text(encoding="utf-8"))


def find_model(name: str, models: Sequence[KnownModel]) -> KnownModel:
    """Return the model of this name; raises ValueError with the near ones."""
    names = [model.name for model in models]
    if name in names:
        return models[names.index(name)]
    near = difflib.get_close_matches(name.casefold(), names, n=4, cutoff=0.5)
    such = f" such as {', '.join(near)}" if near else ""
    raise ValueError(f"model: found {name!r:.80}, expected a name{such}; playbooks/models.yml lists all {len(names)}")
