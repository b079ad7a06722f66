#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: llamacpp_build_plan
short_description: Name the build of llama.cpp that a host needs
version_added: "1.0.0"
description:
  - Computes the build id on the controller from version, source hash, patches in their order, cmake options,
    our own program, instruction set and distribution release, and compares it with what is installed on the host.
  - It changes nothing, so check mode names the build even where no compiler is installed.
options:
  source:
    description: The pinned source, as in the role's C(llamacpp_build_source).
    type: dict
    required: true
  patch_set:
    description: A directory below O(patches_directory), or an absolute path on the controller. Without it no patches.
    type: str
  patches_directory:
    description: Directory on the controller that holds the patch sets.
    type: path
    required: true
  cmake_options:
    description: Further cmake options. Those which the collection decides are refused.
    type: dict
    default: {}
  isa:
    description: V(avx512) or V(avx2). Without it the best that the CPU has. Refused where the CPU lacks a flag.
    type: str
  cpu_flags:
    description: Flags of the host's CPU as in C(/proc/cpuinfo). Without them they are read there.
    type: list
    elements: str
  prefix:
    description: Directory on the host that holds the builds.
    type: path
    default: /opt/llama.cpp
  choice:
    description:
      - Which build is meant. V(wanted) is the one that the other options name.
      - V(current) is the one that the C(current) link names, and the wanted one on a host without. V(previous) is
        the one that it named before. Anything else is the id of an installed build.
    type: str
    default: wanted
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
- name: preflight | Name the build
  cpullm.epyc.llamacpp_build_plan:
    source:
      type: archive
      version: b9999
      path: /srv/sources/llama.cpp-b9999.tar.gz
      sha256: "{{ engine_sha256 }}"
    patches_directory: /srv/patches
    isa: avx2
  register: build
"""

RETURN = r"""
ansible_facts:
  description: The fact C(cpullm_build).
  type: dict
  returned: success
  contains:
    cpullm_build:
      description: The build that this host needs, installed or not.
      type: dict
      contains:
        id:
          description: Name of the build.
          type: str
          sample: 0.3.36-avx512-debian12-0123456789ab
        path:
          description: Its directory on the host.
          type: str
        isa:
          description: Instruction set.
          type: str
        release:
          description: Distribution release that it is built on and for.
          type: str
        version:
          description: Version of the source.
          type: str
        source:
          description: Type, location and digest of the source.
          type: dict
        patches:
          description: Name and sha256 of each patch, in order.
          type: list
          elements: dict
        options:
          description: Name and value of each cmake option.
          type: list
          elements: dict
id:
  description: The build id again.
  type: str
  returned: success
installed:
  description: Whether the build is on the host and complete.
  type: bool
  returned: success
problems:
  description: What is wrong with it where it is there but not complete.
  type: list
  elements: str
  returned: success
missing_packages:
  description: Packages that the installed build needs and the host lacks.
  type: list
  elements: str
  returned: success
wanted:
  description: The build id that the options name, whatever O(choice) says.
  type: str
  returned: success
current:
  description: What the C(current) link names, or null.
  type: str
  returned: success
previous:
  description: What the link named before, or null.
  type: str
  returned: success
request:
  description: This host's entry for O(cpullm.epyc.llamacpp_build_schedule#module:plans).
  type: dict
  returned: success
"""
