#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read which builds of llama.cpp a host has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: llamacpp_build_info
short_description: Read which builds of llama.cpp a host has
version_added: "1.0.0"
description:
  - Lists the builds below a prefix, compares each with its record, and reads what a new build depends on.
  - It changes nothing.
options:
  prefix:
    description: Directory that holds the builds.
    type: path
    default: /opt/llama.cpp
  deep:
    description: Compare the sha256 of every file too, and start each C(llama-server) for its version.
    type: bool
    default: false
  ccache:
    description: Whether ccache counts among the build tools.
    type: bool
    default: false
attributes:
  check_mode:
    description: Changes nothing in any mode.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: verify | Look at the installed builds
  cpullm.epyc.llamacpp_build_info:
    deep: true
  register: builds
"""

RETURN = r"""
builds:
  description: The builds, the least recently used first.
  type: list
  elements: dict
  returned: always
  contains:
    id:
      description: Name of the build.
      type: str
    used:
      description: When it was last installed or activated, in seconds since the epoch.
      type: float
    problems:
      description: What differs from its record.
      type: list
      elements: str
    missing_packages:
      description: Packages that it needs and the host lacks.
      type: list
      elements: str
    record:
      description: What it was made of, from its record. Empty where it is not complete.
      type: dict
    version:
      description: What C(llama-server --version) printed. Null unless O(deep).
      type: str
current:
  description: What the C(current) link names, or null.
  type: str
  returned: always
previous:
  description: What it named before, or null.
  type: str
  returned: always
release:
  description: Distribution and release.
  type: str
  returned: always
  sample: debian12
cpu_flags:
  description: Flags that all CPUs have.
  type: list
  elements: str
  returned: always
missing_build_packages:
  description: Packages that a build on this host would need first.
  type: list
  elements: str
  returned: always
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cpullm.epyc.plugins.module_utils._build import parse_cpu_flags, parse_os_release
from ansible_collections.cpullm.epyc.plugins.module_utils._engine import (
    current_build,
    find_damage,
    list_builds,
    missing_build_packages,
    missing_runtime_packages,
    previous_build,
    read_record,
)


def describe(module: AnsibleModule, build: dict[str, Any]) -> dict[str, Any]:
    """Return a build with its problems, missing packages and version."""
    root = f"{module.params['prefix']}/{build['id']}"
    deep = module.params["deep"]
    build["problems"] = find_damage(root, build["id"], deep)
    build["missing_packages"] = []
    build["record"] = {}
    build["version"] = None
    if not build["problems"]:
        record = read_record(root)
        build["record"] = {
            key: record.get(key) for key in ("isa", "release", "version", "source", "patches", "options")
        }
        build["missing_packages"] = missing_runtime_packages(record.get("runtime_packages", []))
        if deep:
            code, out, err = module.run_command([f"{root}/bin/llama-server", "--version"])
            build["version"] = (out + err).strip()
            if code != 0 or build["id"] not in build["version"]:
                build["problems"].append(
                    f"{root}/bin/llama-server --version: found exit {code} and {build['version']!r},"
                    f" expected 0 and the id {build['id']}"
                )
    return build


def main() -> None:
    """Read, and say what was found."""
    module = AnsibleModule(
        argument_spec={
            "prefix": {"type": "path", "default": "/opt/llama.cpp"},
            "deep": {"type": "bool", "default": False},
            "ccache": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    prefix = module.params["prefix"]
    try:
        module.exit_json(
            changed=False,
            builds=[describe(module, build) for build in list_builds(prefix)],
            current=current_build(prefix),
            previous=previous_build(prefix),
            release=parse_os_release(Path("/etc/os-release").read_text(encoding="utf-8")),
            cpu_flags=parse_cpu_flags(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
            missing_build_packages=missing_build_packages(module.params["ccache"]),
        )
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
