#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let the current link name a build of llama.cpp."""

from __future__ import annotations

DOCUMENTATION = r"""
module: llamacpp_activate
short_description: Let the current link name a build of llama.cpp
version_added: "1.0.0"
description:
  - Switches the C(current) link in one step, and then removes the least recently used builds beyond O(keep).
  - A build that is current, was current before the switch, or that a process runs from, is never removed.
options:
  id:
    description: Name of the installed build.
    type: str
    required: true
  prefix:
    description: Directory that holds the builds.
    type: path
    default: /opt/llama.cpp
  keep:
    description: Number of builds to keep, the current one included.
    type: int
    default: 3
attributes:
  check_mode:
    description: Says what would change and touches nothing; there the build need not be installed.
    support: full
  diff_mode:
    description: Shows link and builds before and after.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: activate | Switch to the engine
  cpullm.epyc.llamacpp_activate:
    id: 0.3.36-avx2-debian12-0123456789ab
"""

RETURN = r"""
previous:
  description: What the link named before, or null.
  type: str
  returned: always
removed:
  description: Builds that were removed, or would be.
  type: list
  elements: str
  returned: always
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._engine import (
    LINK,
    activate,
    choose_old,
    current_build,
    find_damage,
    list_builds,
    locked,
    remove_builds,
    running_builds,
)


def main() -> None:
    """Compare, then switch and prune unless in check mode."""
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str", "required": True},
            "prefix": {"type": "path", "default": "/opt/llama.cpp"},
            "keep": {"type": "int", "default": 3},
        },
        supports_check_mode=True,
    )
    prefix, identifier = module.params["prefix"], module.params["id"]
    link = Path(prefix, LINK)
    try:
        if link.exists() and not link.is_symlink():
            module.fail_json(msg=f"{link}: found no symbolic link, expected one. Move it out of the way.")
        problems = find_damage(f"{prefix}/{identifier}", identifier, deep=False)
        if problems and not module.check_mode:
            module.fail_json(msg="; ".join(problems) + ". Run the role llamacpp_build first.")
        previous = current_build(prefix)
        removed: list[str] = []
        if previous != identifier:
            needed = {identifier, previous or identifier} | running_builds(prefix)
            removed = choose_old(list_builds(prefix), module.params["keep"], needed)
            if not module.check_mode:
                with locked(prefix):
                    activate(prefix, identifier)
                    remove_builds(prefix, removed)
    except OSError as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=previous != identifier,
        previous=previous,
        removed=removed,
        diff={
            "before_header": str(link),
            "after_header": str(link),
            "before": f"{previous or 'absent'}\n" + "".join(f"{name}\n" for name in removed),
            "after": f"{identifier}\n",
        },
    )


if __name__ == "__main__":
    main()
