#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: llamacpp_build_schedule
short_description: Decide which host builds which engine
version_added: "1.0.0"
description:
  - Groups the hosts of a play by their build id and names one owner for each, who has it built.
  - A build whose artifact is whole in the controller's cache needs no builder.
  - It changes nothing and reaches no host.
options:
  plans:
    description: What each host needs.
    type: list
    elements: dict
    required: true
    suboptions:
      host:
        description: Name of the host.
        type: str
        required: true
      id:
        description: Build id.
        type: str
        required: true
      installed:
        description: Whether the host has the build.
        type: bool
        required: true
      release:
        description: Distribution release of the host.
        type: str
        required: true
      source:
        description: The pinned source, as in the role's C(llamacpp_build_source).
        type: dict
        required: true
  build_host:
    description: Host that builds everything. V(localhost) is the controller. Without it each owner builds.
    type: str
  ccache:
    description: Whether the build host needs ccache.
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
- name: preflight | Decide who builds
  cpullm.epyc.llamacpp_build_schedule:
    plans:
      - host: web1
        id: 0.3.36-avx2-debian12-0123456789ab
        installed: false
        release: debian12
        source: "{{ llamacpp_build_source }}"
    build_host: localhost
"""

RETURN = r"""
cache:
  description: The cache directory on the controller.
  type: str
  returned: always
builds:
  description: One entry for each build id.
  type: list
  elements: dict
  returned: always
  contains:
    id:
      description: Build id.
      type: str
    owner:
      description: The host that has it built.
      type: str
    builder:
      description: The host that builds it.
      type: str
    hosts:
      description: All hosts of this id.
      type: list
      elements: str
    lacking:
      description: Those that do not have the build.
      type: list
      elements: str
    needed:
      description: Whether it must be built.
      type: bool
    artifact:
      description: Its place in the controller's cache.
      type: str
    sha256:
      description: Hash of the artifact, or null where there is none.
      type: str
    reason:
      description: Why it cannot be built, or null.
      type: str
"""
