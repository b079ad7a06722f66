#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: plan
short_description: Plan a host from its topology and a model's lock file
version_added: "1.0.0"
description:
  - Decides every number of a host's set-up once, each with its reason in words. These are pages for each node, kernel
    arguments, instances, threads, context, KV cache and compute buffers, the memory that stays with the system, and
    the time that a start may take.
  - Runs on the controller and opens no connection. It needs the fact C(cpullm_numa) of M(cpullm.epyc.numa_facts).
  - Uses only facts that neither a reservation of pages nor a reboot changes, so that the plan before equals the plan
    after; nothing measured enters it.
  - Fails for what cannot work, and says the name, what was found, what was expected, and the way out.
options:
  lock:
    description: The lock file of the model on the controller, written by C(playbooks/lock.yml).
    type: path
    required: true
  context:
    description:
      - Tokens of context of each slot. By default the largest that fits, at most what the model was trained for.
    type: int
  slots:
    description: Requests that an instance decodes side by side. Each has a context of its own.
    type: int
    default: 1
  instances:
    description: Instances, the first sockets first. By default one for each socket.
    type: int
  system_reserve_gib:
    description: GiB that stay with the system. By default computed from the memory.
    type: float
  cache_type_k:
    description: Type of the K cache.
    type: str
    choices: [f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl]
    default: q8_0
  cache_type_v:
    description: Type of the V cache. By default that of O(cache_type_k) where the model uses MLA, else V(f16).
    type: str
    choices: [f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl]
  port:
    description: Port of the first instance; the others take the next ones.
    type: int
    default: 18008
  isa:
    description: Instruction set of the build. By default the widest that the CPU has.
    type: str
    choices: [avx512, avx2]
  weights:
    description:
      - Where weights live. V(anonymous) are pages of 1 GiB of the process, V(hugetlbfs) files in such pages that
        outlive it, V(mmap) the page cache without huge pages.
    type: str
    choices: [anonymous, hugetlbfs, mmap]
    default: hugetlbfs
  overlap:
    description:
      - Keep room for a second server on the same weights while an upgrade overlaps. By default where the weights can
        be shared, that is not with V(anonymous), and the context does not shrink for it.
    type: bool
  free_vmemmap:
    description:
      - Have the kernel give back what describes the 4 KiB pages of a huge one, with C(hugetlb_free_vmemmap=on), and
        leave that out of the system reserve. Needs Linux 5.14.
    type: bool
    default: false
attributes:
  facts:
    description: Action returns an C(ansible_facts) dictionary that will update existing host facts.
    support: full
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
author:
  - The cpullm.epyc authors (@cpullm)
"""

EXAMPLES = r"""
- name: Read the topology
  cpullm.epyc.numa_facts:

- name: Plan the host
  cpullm.epyc.plan:
    lock: "{{ inventory_dir }}/locks/DeepSeek-R1-Q8_0.json"

- name: Show why
  ansible.builtin.debug:
    var: ansible_facts['cpullm_plan'].reasons
"""

RETURN = r"""
ansible_facts:
  description: The plan.
  type: dict
  returned: success
  contains:
    cpullm_plan:
      description: The plan.
      type: dict
      returned: success
      contains:
        schema:
          description: Version of this form.
          type: int
          returned: success
          sample: 1
        hash:
          description: SHA-256 of everything below but reasons, findings, memory and the model's source.
          type: str
          returned: success
        model:
          description:
            - C(name), C(bytes), C(architecture), C(source) as in the lock, C(read_per_token_bytes),
              C(attention_flops_per_context_token), and C(shards) with C(file), C(bytes), C(sha256) and C(pages).
          type: dict
          returned: success
        isa:
          description: Instruction set of the build.
          type: str
          returned: success
          sample: avx512
        weights:
          description: Where weights live.
          type: str
          returned: success
          sample: anonymous
        pages:
          description: C(size_kib), C(total) and, for each node that holds some, C(node) and C(pages).
          type: dict
          returned: success
          sample: {size_kib: 1048576, total: 6, nodes: [{node: 0, pages: 3}, {node: 1, pages: 3}]}
        kernel_arguments:
          description: Arguments that reserve the pages at boot, in the order that they must have.
          type: list
          elements: str
          returned: success
          sample: [default_hugepagesz=1G, hugepagesz=1G, "hugepages=0:3,1:3"]
        instances:
          description:
            - Each with C(instance), C(socket), C(nodes), C(cpus), C(threads), C(threads_batch), C(port) and C(pages).
          type: list
          elements: dict
          returned: success
        servers_at_once:
          description: Servers for each instance that the memory is planned for; 2 while an upgrade overlaps.
          type: int
          returned: success
          sample: 1
        context:
          description: Tokens of context of each slot.
          type: int
          returned: success
          sample: 163840
        slots:
          description: Requests decoded side by side.
          type: int
          returned: success
          sample: 1
        cache_type_k:
          description: Type of the K cache.
          type: str
          returned: success
          sample: q8_0
        cache_type_v:
          description: Type of the V cache; llama.cpp takes only that of K where the model uses MLA.
          type: str
          returned: success
          sample: q8_0
        flash_attention:
          description: Whether the compute buffers are those of flash attention.
          type: bool
          returned: success
          sample: true
        kv_bytes:
          description: KV cache of one server, all slots.
          type: int
          returned: success
        compute_bytes:
          description: Upper estimate of what one server needs beside weights and KV cache.
          type: int
          returned: success
        system_reserve_bytes:
          description: Memory that stays with the system.
          type: int
          returned: success
        disk_bytes:
          description: Space that the shards take.
          type: int
          returned: success
        start_timeout_s:
          description: Seconds that a start may take on a slow disk.
          type: int
          returned: success
        reasons:
          description: For each number C(output), C(value) and C(reason).
          type: list
          elements: dict
          returned: success
        findings:
          description: What works, but could be better, with C(severity), C(name), C(found), C(expected), C(way_out).
          type: list
          elements: dict
          returned: success
        memory:
          description:
            - Where the memory of each serving socket goes, in bytes. C(struct_pages_bytes) are a part of
              C(reserve_bytes), and C(vmemmap_bytes) are what hugetlb_free_vmemmap=on would give back of them.
          type: list
          elements: dict
          returned: success
refusal:
  description: What cannot work, with C(host), C(name), C(found), C(expected) and C(way_out).
  type: dict
  returned: refused
"""
