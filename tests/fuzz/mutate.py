# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes to JSON texts that leave them JSON: most changes of a byte end in the first lines of a JSON parser."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_DEEP = "@deep@"
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 255, 1 << 31, (1 << 63) - 1, 1 << 64, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *("", "0", "x" * 300, "\ud800", "\x1b[2J\n", "../x", "/", [], {}, [[]], {"": None}, ["x"], [0], _DEEP),
)


def mutate_json(data: bytes, seed: int) -> bytes | None:
    """Return a JSON text with one to three values changed, or None where the data is no JSON with values inside."""
    chance = random.Random(seed)
    try:
        root = [json.loads(data)]
        for _dummy in range(chance.randint(1, 3)):
            _change(root, chance)
        text = json.dumps(root[0]) if root else ""
    except (ValueError, RecursionError):
        return None
    # About as deep as the interpreter goes: near the limit some function below the parser may pass it.
    depth = chance.randint(900, 1000)
    return text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth).encode()


def _change(root: list[Any], chance: random.Random) -> None:
    """Change one value somewhere below the root."""
    places = list(_places(root))
    container, key = chance.choice(places)
    value = container[key]
    kind = chance.randrange(6)
    if kind == 0 and container is not root:
        del container[key]
    elif kind == 1:
        other, name = chance.choice(places)
        container[key] = copy.deepcopy(other[name])
    elif kind == 2 and isinstance(value, list) and value:
        value.insert(chance.randrange(len(value) + 1), copy.deepcopy(chance.choice(value)))
    elif kind == 3 and isinstance(value, int):
        container[key] = chance.choice(
            (value + 1, value - 1, value * 2, -value, value << 20, 2.5 * max(min(value, 1 << 99), -1 << 99))
        )
    elif kind == 3 and isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        container[key] = (
            value[:at] + chance.choice(("", "0", "/", "-", ".", "é", "\n", "-00001-of-00002")) + value[at + 1 :]
        )
    else:
        container[key] = copy.deepcopy(chance.choice(_ODD))


def _places(container: list[Any] | dict[str, Any]) -> Any:
    """Yield every container below one, itself included, with each of its keys."""
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        yield container, key
        if isinstance(value, (list, dict)):
            yield from _places(value)
