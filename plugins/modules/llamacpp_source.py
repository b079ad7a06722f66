#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: llamacpp_source
short_description: Get one pinned source of llama.cpp into the controller's cache
version_added: "1.0.0"
description:
  - Runs on the controller. Fetches the source once, checks its sha256 (the commit, for git) and keeps it under
    C(sdist) in E(CPULLM_CACHE), or C(~/.cache/cpullm).
  - A source distribution is downloaded with pip, so that the operator's index, mirrors, proxy and certificates count,
    and with C(--require-hashes), so that nothing of an unknown file runs.
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
    description: Instruction set of the build.
    type: str
    required: true
  release:
    description: Distribution release of the build.
    type: str
    required: true
attributes:
  check_mode:
    description: Says whether it would fetch; checks what is there.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: build | Get the pinned source
  cpullm.epyc.llamacpp_source:
    source:
      type: git
      version: b9999
      url: https://git.example.com/llama.cpp.git
      commit: 0123456789abcdef0123456789abcdef01234567
    patches_directory: /srv/patches
    isa: avx2
    release: debian12
"""

RETURN = r"""
path:
  description: The archive on the controller.
  type: str
  returned: success
sha256:
  description: Its hash.
  type: str
  returned: outside of check mode
recipe:
  description: What the build program needs, as JSON.
  type: str
  returned: outside of check mode
"""
