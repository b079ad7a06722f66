#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Install or remove builds of llama.cpp."""

from __future__ import annotations

DOCUMENTATION = r"""
module: llamacpp_install
short_description: Install or remove builds of llama.cpp
version_added: "1.0.0"
description:
  - Unpacks the artifact of a build, so that its directory is complete or absent at any moment, also after a power cut.
  - The artifact comes from C(artifacts) in the controller's cache; its sha256 is checked there and on the host, and
    every file against the artifact's record.
  - The C(current) link stays as it is; see M(cpullm.epyc.llamacpp_activate).
options:
  id:
    description: Name of the build. Required to install.
    type: str
  prefix:
    description: Directory that holds the builds. It is made where absent.
    type: path
    default: /opt/llama.cpp
  state:
    description:
      - V(present) installs the build O(id).
      - V(absent) removes the link and every build, and the prefix where nothing else is in it.
    type: str
    choices: [present, absent]
    default: present
  builder_error:
    description: What the build host reported, for the message where the artifact is not there.
    type: str
  archive:
    description: Set by the action plugin, the artifact on the host.
    type: path
  sha256:
    description: Set by the action plugin, the artifact's hash.
    type: str
attributes:
  check_mode:
    description: Says what would change and touches nothing.
    support: full
  diff_mode:
    description: Shows the builds before and after.
    support: full
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: install | Unpack the engine
  cpullm.epyc.llamacpp_install:
    id: 0.3.36-avx2-debian12-0123456789ab

- name: teardown | Remove all engines
  cpullm.epyc.llamacpp_install:
    state: absent
"""

RETURN = r"""
missing_packages:
  description: Packages that the build needs and the host lacks.
  type: list
  elements: str
  returned: O(state=present), outside of check mode
left:
  description: What stays in the prefix because this collection did not put it there.
  type: list
  elements: str
  returned: O(state=absent)
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._engine import (
    LINK,
    PREVIOUS,
    current_build,
    find_damage,
    install,
    list_builds,
    locked,
    missing_runtime_packages,
    read_record,
    remove_builds,
    sweep,
)


def state_of(prefix: str) -> str:
    """Return the content of a prefix as text for a diff."""
    lines = [str(build["id"]) for build in list_builds(prefix)]
    current = current_build(prefix)
    return "".join(f"{line}\n" for line in lines + ([f"{LINK} -> {current}"] if current else []))


def ensure_present(module: AnsibleModule) -> None:
    """Install one build where it is absent or damaged."""
    prefix, identifier = module.params["prefix"], module.params["id"]
    root = f"{prefix}/{identifier}"
    problems = find_damage(root, identifier, deep=False)
    before = state_of(prefix)
    after = before if f"{identifier}\n" in before else f"{before}{identifier}\n"
    missing: list[str] = []
    if not module.check_mode:
        if problems:
            if not module.params["archive"] or not module.params["sha256"]:
                module.fail_json(msg="archive and sha256: found none; the action plugin sets them")
            install(module.params["archive"], module.params["sha256"], prefix, identifier)
        missing = missing_runtime_packages(read_record(root).get("runtime_packages", []))
    module.exit_json(
        changed=bool(problems),
        missing_packages=missing,
        diff={"before_header": prefix, "after_header": prefix, "before": before, "after": after},
    )


def ensure_absent(module: AnsibleModule) -> None:
    """Remove link and builds, and the prefix where it is then empty."""
    prefix = module.params["prefix"]
    builds = [str(build["id"]) for build in list_builds(prefix)]
    link = Path(prefix, LINK)
    ours = link.is_symlink() and current_build(prefix) in builds
    before = state_of(prefix)
    names = {path.name for path in Path(prefix).glob("*")}
    before_link = Path(prefix, PREVIOUS)
    left = sorted(
        names - set(builds) - ({LINK} if ours else set()) - ({PREVIOUS} if before_link.is_symlink() else set())
    )
    changed = bool(builds) or ours
    if changed and not module.check_mode:
        with locked(prefix):
            if ours:
                link.unlink()
            if before_link.is_symlink():
                before_link.unlink()
            remove_builds(prefix, builds)
            sweep(prefix)
            if not any(Path(prefix).iterdir()):
                Path(prefix).rmdir()
    module.exit_json(
        changed=changed,
        left=left,
        diff={"before_header": prefix, "after_header": prefix, "before": before, "after": ""},
    )


def main() -> None:
    """Compare, then act unless in check mode."""
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str"},
            "prefix": {"type": "path", "default": "/opt/llama.cpp"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "builder_error": {"type": "str"},
            "archive": {"type": "path"},
            "sha256": {"type": "str"},
        },
        required_if=[("state", "present", ("id",))],
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "present":
            ensure_present(module)
        else:
            ensure_absent(module)
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
