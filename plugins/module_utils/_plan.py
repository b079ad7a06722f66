# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan: every number of a host's set-up, from the machine, the model and the operator's wishes.

One pure function of stable inputs. The facts used are those that neither a reservation of pages nor a reboot
changes, so that the plan before equals the plan after; nothing measured enters it. Each number carries its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.cpullm.epyc.plugins.module_utils._gguf import Model
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import Manifest, source_to_data
from ansible_collections.cpullm.epyc.plugins.module_utils._text import printable

SCHEMA = 1
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_BYTES = GIB
PAGE_KIB = PAGE_BYTES // KIB

# Names of the kernel's flags (arch/x86/include/asm/cpufeatures.h) that the two builds need.
ISA_FLAGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "avx512",
        (
            "avx2",
            "avx512_bf16",
            "avx512_vnni",
            "avx512bw",
            "avx512cd",
            "avx512dq",
            "avx512f",
            "avx512vbmi",
            "avx512vl",
            "bmi2",
            "f16c",
            "fma",
        ),
    ),
    ("avx2", ("avx2", "bmi2", "f16c", "fma")),
)

# Types of the KV cache that llama.cpp offers: name -> (elements per block, bytes per block).
CACHE_TYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}

WEIGHTS = ("anonymous", "hugetlbfs", "mmap")

# llama.cpp rounds a slot's context up to this.
CONTEXT_STEP = 256
# Less is of no use for a chat; a model trained for less gets what it was trained for.
LEAST_CONTEXT = 4096
# Tokens that one step of the prefill computes: llama.cpp's default.
MICRO_BATCH = 512
# A server without its buffers: code, vocabulary, graphs, HTTP, the workers' scratch memory.
PROCESS_BYTES = 256 * MIB
SCRATCH_BYTES_PER_THREAD = MIB
# Memory changes by a few MiB between kernels; the plan's sums look at it in steps of this.
MEMORY_STEP = 64 * MIB
# A slow SATA SSD; the published machine's NVMe is ten times as fast.
LOAD_BYTES_PER_S = 500_000_000
START_SLACK_S = 300
# Per-node `hugepages=` came with this kernel.
PER_NODE_KERNEL = (5, 16)
STRUCT_PAGE_SHARE = 64
# The kernel describes a page of 1 GiB in 16 MiB, and with hugetlb_free_vmemmap=on keeps 4 KiB of them
# (Documentation/mm/vmemmap_dedup.rst).
VMEMMAP_BYTES_PER_PAGE = 16 * MIB - 4 * KIB
FREE_VMEMMAP_KERNEL = (5, 14)
MAX_SLOTS = 256
MLA_WAY_OUT = "Take a conversion from after April 2025, or convert anew with the pinned llama.cpp."


class Refusal(ValueError):
    """What cannot work: the name of a fact, variable or file, what was found, what was expected, and a way out."""

    def __init__(self, name: str, found: str, expected: str, way_out: str) -> None:
        super().__init__(f"{name}: found {found}, expected {expected}. {way_out}")
        self.name = name
        self.found = found
        self.expected = expected
        self.way_out = way_out


@dataclass(frozen=True)
class Overrides:
    """The operator's wishes; None leaves a number to the plan."""

    context: int | None = None
    slots: int = 1
    instances: int | None = None
    system_reserve_bytes: int | None = None
    cache_type_k: str = "q8_0"
    cache_type_v: str | None = None
    port: int = 18008
    isa: str | None = None
    weights: str = "hugetlbfs"
    overlap: bool | None = None
    free_vmemmap: bool = False


@dataclass(frozen=True)
class Node:
    """A NUMA node: its memory, and how many whole GiB of it lie aligned (None: not known)."""

    node: int
    memory_bytes: int
    gib_ranges: int | None


@dataclass(frozen=True)
class Socket:
    """A socket with the nodes that have memory."""

    socket: int
    nodes: tuple[Node, ...]
    cpus: str
    physical_cores: int
    threads: int

    @property
    def memory_bytes(self) -> int:
        """Return the memory of the socket's nodes."""
        return sum(node.memory_bytes for node in self.nodes)


@dataclass(frozen=True)
class Machine:
    """What the plan uses of the fact cpullm_numa."""

    flags: frozenset[str]
    sockets: tuple[Socket, ...]
    node_count: int
    kernel_release: str

    @property
    def memory_bytes(self) -> int:
        """Return the memory of all sockets' nodes."""
        return sum(socket.memory_bytes for socket in self.sockets)


_FACT = "ansible_facts['cpullm_numa']"


def _fact(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = data.get(key)
    # No machine has as much of anything, and a larger number would end the arithmetic in floats.
    countable = not isinstance(value, int) or abs(value) < 1 << 63
    if not isinstance(value, kind) or isinstance(value, bool) or not countable:
        found = "nothing" if value is None else f"{value!r:.60}"
        raise Refusal(
            f"{_FACT}{where}.{key}",
            found,
            {"int": "a number", "str": "a text", "list": "a list", "dict": "a dictionary"}[kind.__name__],
            "Gather it with cpullm.epyc.numa_facts as root on the host itself.",
        )
    return value


def _entry(row: object, where: str) -> None:
    """Raise Refusal unless an entry of a list of facts is a dictionary."""
    if not isinstance(row, Mapping):
        raise Refusal(f"{_FACT}{where}", f"{row!r:.60}", "a dictionary", "Gather it with cpullm.epyc.numa_facts.")


def parse_machine(numa: Any) -> Machine:
    """Return the machine of a cpullm_numa fact; raises Refusal that names what is missing."""
    if not isinstance(numa, Mapping):
        raise Refusal(_FACT, "nothing", "the fact", "Gather it with cpullm.epyc.numa_facts before the plan.")
    if not numa.get("readable"):
        # The reason comes from the host, and goes to a terminal.
        reason = printable(numa.get("reason") or "no reason given")
        raise Refusal(
            f"{_FACT}.readable", f"false ({reason})", "true", "Gather it as root on a Linux host with /proc and /sys."
        )
    cpu = _fact(numa, "cpu", dict, "")
    flags = frozenset(str(flag) for flag in _fact(cpu, "flags", list, ".cpu"))
    nodes: dict[int, Node] = {}
    rows = _fact(numa, "nodes", list, "")
    for index, row in enumerate(rows):
        where = f".nodes[{index}]"
        _entry(row, where)
        ranges = row.get("gib_ranges")
        known = isinstance(ranges, int) and not isinstance(ranges, bool)
        number = _fact(row, "node", int, where)
        memory = max(0, _fact(row, "memory_bytes", int, where)) // MEMORY_STEP * MEMORY_STEP
        nodes[number] = Node(number, memory, ranges if known else None)
    sockets = []
    for index, row in enumerate(_fact(numa, "sockets", list, "")):
        where = f".sockets[{index}]"
        _entry(row, where)
        numbers = _fact(row, "nodes", list, where)
        members = [nodes[number] for number in numbers if isinstance(number, int) and number in nodes]
        sockets.append(
            Socket(
                socket=_fact(row, "socket", int, where),
                nodes=tuple(node for node in members if node.memory_bytes),
                cpus=_fact(row, "cpus", str, where),
                physical_cores=_fact(row, "physical_cores", int, where),
                threads=_fact(row, "threads", int, where),
            )
        )
    if not sockets:
        raise Refusal(f"{_FACT}.sockets", "an empty list", "at least one socket", "Gather it on the host itself.")
    kernel = numa.get("kernel")
    release = kernel.get("release") if isinstance(kernel, Mapping) else None
    with_memory = sum(1 for node in nodes.values() if node.memory_bytes)
    return Machine(flags, tuple(sockets), with_memory, str(release or ""))


def gib(count: int) -> str:
    """Return bytes as text, in GiB from a tenth of one on, else in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / MIB:.1f} MiB"


def choose_isa(flags: frozenset[str], wish: str | None) -> tuple[str, str]:
    """Return the widest instruction set that the CPU has, or the wished one, and the reason."""
    missing = {name: sorted(set(needed) - flags) for name, needed in ISA_FLAGS}
    if wish is not None:
        if wish not in missing:
            raise Refusal("host_plan_isa", f"{wish!r:.80}", f"one of {', '.join(missing)}", "Leave it out.")
        if missing[wish]:
            raise Refusal(
                "host_plan_isa",
                f"{wish}, but the CPU lacks {' '.join(missing[wish])}",
                "an instruction set that the CPU has",
                "Leave it out: the plan takes the widest that works.",
            )
        return wish, "set by host_plan_isa"
    for name, needed in ISA_FLAGS:
        if not missing[name]:
            return name, f"the CPU has {' '.join(needed)}"
    raise Refusal(
        f"{_FACT}.cpu.flags",
        f"no {' '.join(missing['avx2'])}",
        f"at least {' '.join(dict(ISA_FLAGS)['avx2'])}",
        "llama.cpp needs an x86-64 CPU with AVX2 here; in a VM pass the host's CPU flags through.",
    )


def row_bytes(cache_type: str, elements: int) -> int:
    """Return the bytes of a row of the KV cache: whole blocks of its type."""
    block, size = CACHE_TYPES[cache_type]
    return -(-elements // block) * size


def kv_bytes_per_token(model: Model, cache_type_k: str, cache_type_v: str) -> int:
    """Return the bytes that one token of context takes in the KV cache of one slot.

    With MLA a layer keeps one latent row, kv_lora_rank + rope_dims wide, in the type of K and nothing for V
    (llama-kv-cache.cpp: has_v = !is_mla). Without it, a row of K and one of V, each as wide as all KV heads.
    A sparse-attention indexer keeps one more row of keys.
    """
    if model.mla:
        row = row_bytes(cache_type_k, model.kv_lora_rank + model.rope_dims)
    else:
        row = row_bytes(cache_type_k, model.kv_heads * model.key_length)
        row += row_bytes(cache_type_v, model.kv_heads * model.value_length)
    if model.indexer_key_length:
        row += row_bytes(cache_type_k, model.indexer_key_length)
    return model.layers * row


def attention_flops_per_context_token(model: Model) -> int:
    """Return the floating-point operations that a token of context costs each generated token, all layers.

    For each head a dot product of the query with a key, and a value added to the sum: two operations for each element.
    With MLA in its absorbed form keys are kv_lora_rank + rope_dims wide and values kv_lora_rank.
    """
    if model.mla:
        key, value = model.kv_lora_rank + model.rope_dims, model.kv_lora_rank
    else:
        key, value = model.key_length, model.value_length
    return model.layers * model.heads * 2 * (key + value)


def padded(context: int) -> int:
    """Return a slot's context as llama.cpp rounds it."""
    return -(-context // CONTEXT_STEP) * CONTEXT_STEP


def compute_bytes(model: Model, context: int, slots: int, threads: int) -> int:
    """Return an upper estimate of what one server needs beside weights and KV cache.

    The widest moment of a prefill step of 512 tokens, in F32: either attention (Q, and with MLA the absorbed Q, its
    concatenation with the rotary part, and the result in latent width; without it K, V, Q and result), or the experts
    (gate, up and their product, and each expert's output twice). Beside that the attention mask in F16, one row for
    each token of the step, the logits, scratch memory of the threads, and the process itself. Flash attention is
    assumed: without it the scores alone take heads x context x 512 x 4 bytes. Checked against the pinned llama.cpp
    with the shapes of DeepSeek-R1, where it reports 412 MiB at 4K and 568 MiB at 160K of context with MLA, and
    284 MiB at 4K without.
    """
    if model.mla:
        key = max(model.key_length, model.kv_lora_rank + model.rope_dims)
        attention = model.heads * (key + key + 2 * model.kv_lora_rank)
    else:
        attention = model.heads * 3 * (model.key_length + model.value_length)
    expert = model.experts_used * (3 * model.expert_feed_forward + 2 * model.embedding)
    feed_forward = max(3 * model.feed_forward, expert) + 4 * model.embedding
    widest = 4 * MICRO_BATCH * max(attention, feed_forward)
    mask = 2 * MICRO_BATCH * padded(context) * slots
    logits = 4 * model.vocabulary * (slots + 8)
    return widest + mask + logits + threads * SCRATCH_BYTES_PER_THREAD + PROCESS_BYTES


def system_reserve(memory_bytes: int) -> tuple[int, str]:
    """Return the memory that stays with the system, and the reason.

    The memory of the facts is what firmware gave the kernel, so its struct pages (64 bytes for each 4 KiB) come first.
    Then 4 GiB for kernel, daemons, SSH and the page cache that a fetch runs through, or an eighth of a small machine,
    but at least 1.25 GiB, below which a Debian with a build or fetch running starts to swap or kill; and 1 % for
    slab and page tables, which grow with the machine.
    """
    struct_pages = memory_bytes // STRUCT_PAGE_SHARE
    base = min(4 * GIB, max(5 * GIB // 4, memory_bytes // 8))
    total = -(-(struct_pages + base + memory_bytes // 100) // MEMORY_STEP) * MEMORY_STEP
    return total, (
        f"{gib(struct_pages)} struct pages, {gib(base)} for kernel, daemons and page cache, "
        f"{gib(memory_bytes // 100)} (1 %) for slab and page tables"
    )


def spread(pages: int, nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Return (node, pages) for an even spread, the first nodes taking the remainder."""
    each, more = divmod(pages, len(nodes))
    return [(node.node, each + (1 if index < more else 0)) for index, node in enumerate(nodes)]


def kernel_arguments(
    pages: Sequence[tuple[int, int]], node_count: int, release: str, free_vmemmap: bool = False
) -> list[str]:
    """Return the ordered kernel arguments that reserve these (node, pages); raises Refusal where they cannot."""
    wanted = [(node, count) for node, count in pages if count]
    if not wanted:
        return []
    size = ["default_hugepagesz=1G", "hugepagesz=1G"]
    match = re.match(r"(\d+)\.(\d+)", release)
    if free_vmemmap:
        if match and (int(match[1]), int(match[2])) < FREE_VMEMMAP_KERNEL:
            raise Refusal(
                f"{_FACT}.kernel.release",
                release,
                "5.14 or later, for hugetlb_free_vmemmap=on",
                "Install a newer kernel, or set host_plan_free_vmemmap to false.",
            )
        size.insert(0, "hugetlb_free_vmemmap=on")
    if node_count == 1:
        return [*size, f"hugepages={wanted[0][1]}"]
    if match and (int(match[1]), int(match[2])) < PER_NODE_KERNEL:
        if len(wanted) == node_count and len({count for _dummy, count in wanted}) == 1:
            return [*size, f"hugepages={sum(count for _dummy, count in wanted)}"]
        raise Refusal(
            f"{_FACT}.kernel.release",
            printable(release, 80),
            "5.16 or later, for pages that differ between nodes",
            "Install a newer kernel, or serve on all sockets alike.",
        )
    return [*size, "hugepages=" + ",".join(f"{node}:{count}" for node, count in wanted)]


def _check_overrides(overrides: Overrides, model: Model) -> str:
    """Return the type of the V cache; raises Refusal for a wish that is no wish for anything."""

    def refuse(name: str, found: object, expected: str) -> Refusal:
        return Refusal(f"host_plan_{name}", f"{found!r:.80}", expected, "Correct it, or leave it out.")

    if not 1 <= overrides.slots <= MAX_SLOTS:
        raise refuse("slots", overrides.slots, f"1 to {MAX_SLOTS}")
    if overrides.context is not None and overrides.context < 1:
        raise refuse("context", overrides.context, "at least 1")
    if overrides.system_reserve_bytes is not None and overrides.system_reserve_bytes < 0:
        raise refuse("system_reserve_gib", round(overrides.system_reserve_bytes / GIB, 2), "0 or more")
    if overrides.weights not in WEIGHTS:
        raise refuse("weights", overrides.weights, f"one of {', '.join(WEIGHTS)}")
    if overrides.cache_type_k not in CACHE_TYPES:
        raise refuse("cache_type_k", overrides.cache_type_k, f"one of {', '.join(CACHE_TYPES)}")
    if overrides.cache_type_v is not None and overrides.cache_type_v not in CACHE_TYPES:
        raise refuse("cache_type_v", overrides.cache_type_v, f"one of {', '.join(CACHE_TYPES)}")
    if model.mla and overrides.cache_type_v not in (None, overrides.cache_type_k):
        raise Refusal(
            "host_plan_cache_type_v",
            f"{overrides.cache_type_v!r:.80}",
            f"{overrides.cache_type_k!r}, as host_plan_cache_type_k",
            "llama.cpp takes one type for both where a model uses MLA; leave it out.",
        )
    return overrides.cache_type_v or (overrides.cache_type_k if model.mla else "f16")


def _choose_sockets(machine: Machine, overrides: Overrides) -> tuple[Socket, ...]:
    able = tuple(socket for socket in machine.sockets if socket.nodes and socket.physical_cores)
    if not able:
        raise Refusal(
            f"{_FACT}.sockets",
            "no socket with memory of its own",
            "at least one",
            "Set NPS1 in the firmware (AMD CBS, DF Common Options, Memory Addressing), and populate the socket.",
        )
    count = len(able) if overrides.instances is None else overrides.instances
    if not 1 <= count <= len(able):
        raise Refusal(
            "host_plan_instances",
            str(count),
            f"1 to {len(able)}: one for each socket with memory",
            "Two instances on a socket share its bandwidth; raise host_plan_slots instead.",
        )
    if not 1 <= overrides.port <= 65536 - count:
        raise Refusal(
            "host_plan_port", str(overrides.port), f"1 to {65536 - count}", "Each instance takes the next one."
        )
    return able[:count]


@dataclass(frozen=True)
class _Room:
    """The memory of one instance's socket, in bytes."""

    socket: Socket
    weights: int
    reserve: int
    servers: int
    threads: int

    @property
    def left(self) -> int:
        """Return what remains for KV caches and compute buffers."""
        return self.socket.memory_bytes - self.weights - self.reserve


def _needed(model: Model, room: _Room, context: int, slots: int, kv_per_token: int) -> int:
    """Return what the servers at once need of a room for this context."""
    kv = kv_per_token * padded(context) * slots
    return room.servers * (kv + compute_bytes(model, context, slots, room.threads))


def largest_context(model: Model, room: _Room, slots: int, kv_per_token: int) -> int:
    """Return the largest context of a slot that fits the room, at most the trained one; 0 if none does.

    A multiple of 256, or the trained context itself.
    """
    if _needed(model, room, model.context_trained, slots, kv_per_token) <= room.left:
        return model.context_trained
    low, high = 0, -(-model.context_trained // CONTEXT_STEP)
    while high - low > 1:
        middle = (low + high) // 2
        if _needed(model, room, middle * CONTEXT_STEP, slots, kv_per_token) <= room.left:
            low = middle
        else:
            high = middle
    return low * CONTEXT_STEP


def _choose_context(model: Model, rooms: Sequence[_Room], overrides: Overrides, kv_per_token: int) -> tuple[int, str]:
    fits, room = min(
        ((largest_context(model, room, overrides.slots, kv_per_token), room) for room in rooms),
        key=lambda pair: (pair[0], pair[1].socket.socket),
    )
    where = (
        f"socket {room.socket.socket} has {gib(max(0, room.left))} after weights and reserve for "
        f"{room.servers} server(s) of {overrides.slots} slot(s)"
    )
    if overrides.context is not None:
        if overrides.context > model.context_trained:
            raise Refusal(
                "host_plan_context",
                str(overrides.context),
                f"at most {model.context_trained}, which the model was trained for",
                "Ask for less, or leave it out for the largest that fits.",
            )
        wanted = _needed(model, room, overrides.context, overrides.slots, kv_per_token)
        if padded(overrides.context) > padded(fits):
            raise Refusal(
                "host_plan_context",
                f"{overrides.context} tokens, which need {gib(wanted)}",
                f"at most {fits}: {where}",
                "Ask for less, lower host_plan_slots or host_plan_system_reserve_gib, or add memory.",
            )
        return overrides.context, f"set by host_plan_context; {fits} would fit"
    least = min(LEAST_CONTEXT, model.context_trained)
    if fits < least:
        raise Refusal(
            f"{_FACT}.nodes[].memory_bytes",
            f"{gib(max(0, room.left))} on socket {room.socket.socket} after weights and reserve, "
            f"room for {fits} tokens of context",
            f"{gib(_needed(model, room, least, overrides.slots, kv_per_token))} for {least} tokens",
            "Take a smaller model or quantisation, lower host_plan_slots, or add memory.",
        )
    if fits == model.context_trained:
        return fits, f"the context that the model was trained for; {where}"
    return fits, f"the largest that fits: {where}"


def missing_mla(model: Model, cache_k: str, cache_v: str) -> str | None:
    """Return what a GGUF without MLA tensors costs, or None where they are there or the architecture has no MLA."""
    if model.mla or not model.kv_lora_rank:
        return None
    now = kv_bytes_per_token(model, cache_k, cache_v)
    with_mla = kv_bytes_per_token(dataclasses.replace(model, mla=True), cache_k, cache_k)
    return (
        f"a GGUF without attn_k_b and attn_v_b: {now} bytes of KV cache for each token of context, "
        f"{now / with_mla:.0f} times the {with_mla} with MLA"
    )


def _findings(model: Model, cache_k: str, cache_v: str, context: int) -> list[dict[str, str]]:
    found = []
    if missing := missing_mla(model, cache_k, cache_v):
        found.append(
            {
                "severity": "warning",
                "name": "gguf.mla",
                "found": f"{missing}; {context} tokens remain",
                "expected": "a GGUF with MLA tensors",
                "way_out": MLA_WAY_OUT,
            }
        )
    return found


def _servers_reason(servers: int, overrides: Overrides) -> str:
    """Return why memory is planned for one server or two."""
    if servers == 2:
        return "an upgrade starts the new server beside the old one on the same weights"
    if overrides.weights == "anonymous":
        return "a second server would need a second copy of the weights"
    if overrides.overlap is None:
        return "a second KV cache would take context away: an upgrade stops the old server first"
    return "set by host_plan_overlap"


def canonical_hash(plan: Mapping[str, Any]) -> str:
    """Return the sha256 of what a plan decides: not of its reasons, findings and notes, nor of where the model is from.

    So the plan from a hub's manifest equals the one from the directory that it was fetched into.
    """
    content = {key: value for key, value in plan.items() if key not in ("hash", "reasons", "findings", "memory")}
    content["model"] = {key: value for key, value in content["model"].items() if key != "source"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def make_plan(numa: Any, manifest: Manifest, overrides: Overrides) -> dict[str, Any]:
    """Return the plan of one host; raises Refusal for what cannot work.

    ``numa`` is the host's fact cpullm_numa as it was gathered.
    """
    model = manifest.model
    machine = parse_machine(numa)
    cache_v = _check_overrides(overrides, model)
    isa, isa_reason = choose_isa(machine.flags, overrides.isa)
    sockets = _choose_sockets(machine, overrides)
    paged = overrides.weights != "mmap"

    shard_pages = [-(-shard.bytes // PAGE_BYTES) if paged else 0 for shard in manifest.shards]
    copy_pages = sum(shard_pages)
    if paged and "pdpe1gb" not in machine.flags:
        raise Refusal(
            f"{_FACT}.cpu.flags",
            "no pdpe1gb",
            "pdpe1gb, pages of 1 GiB",
            "In a VM pass the flag through; or set host_plan_weights to mmap, without huge pages.",
        )
    weights = copy_pages * PAGE_BYTES if paged else manifest.bytes
    reserve, reserve_reason = system_reserve(machine.memory_bytes)
    if overrides.system_reserve_bytes is not None:
        reserve, reserve_reason = overrides.system_reserve_bytes, "set by host_plan_system_reserve_gib"
    elif overrides.free_vmemmap and paged:
        freed = VMEMMAP_BYTES_PER_PAGE * copy_pages * len(sockets) // MEMORY_STEP * MEMORY_STEP
        reserve -= freed
        reserve_reason += f", less {gib(freed)} that hugetlb_free_vmemmap=on gives back"
    if overrides.overlap and overrides.weights == "anonymous":
        raise Refusal(
            "host_plan_overlap",
            "true with host_plan_weights anonymous",
            "weights that two servers share",
            "Set host_plan_weights to hugetlbfs, or leave it out: an upgrade then stops the old server first.",
        )
    servers = 2 if overrides.overlap else 1
    threads = max(socket.threads for socket in sockets)
    rooms = [
        _Room(socket, weights, -(-reserve * socket.memory_bytes // machine.memory_bytes), servers, threads)
        for socket in sockets
    ]
    node_pages: list[tuple[int, int]] = []
    for room in rooms:
        if room.left < 0:
            raise Refusal(
                f"{_FACT}.nodes[].memory_bytes",
                f"{gib(room.socket.memory_bytes)} on socket {room.socket.socket}, "
                f"of which {gib(room.reserve)} stay with the system",
                f"at least {gib(weights + room.reserve)} on each socket: a copy of {manifest.name} takes "
                + (f"{copy_pages} pages of 1 GiB" if paged else gib(weights)),
                ("" if overrides.system_reserve_bytes is None else "Lower host_plan_system_reserve_gib. ")
                + "Take a smaller model or quantisation, or add memory to the socket.",
            )
        for node, count in zip(room.socket.nodes, (pages for _dummy, pages in spread(copy_pages, room.socket.nodes))):
            if node.gib_ranges is not None and count > node.gib_ranges:
                raise Refusal(
                    f"{_FACT}.nodes[].gib_ranges",
                    f"{node.gib_ranges} whole aligned GiB on node {node.node}",
                    f"at least {count}, the pages of 1 GiB of {manifest.name} there",
                    "Take a smaller model or quantisation, or add memory to the node.",
                )
            node_pages.append((node.node, count))

    kv_per_token = kv_bytes_per_token(model, overrides.cache_type_k, cache_v)
    context, context_reason = _choose_context(model, rooms, overrides, kv_per_token)
    if overrides.overlap is None and overrides.weights != "anonymous":
        twice = [dataclasses.replace(room, servers=2) for room in rooms]
        if all(_needed(model, room, context, overrides.slots, kv_per_token) <= room.left for room in twice):
            servers, rooms = 2, twice
            context, context_reason = _choose_context(model, rooms, overrides, kv_per_token)
    kv = kv_per_token * padded(context) * overrides.slots
    buffers = compute_bytes(model, context, overrides.slots, threads)
    start_timeout_s = -(-manifest.bytes * len(sockets) // LOAD_BYTES_PER_S) + START_SLACK_S
    arguments = kernel_arguments(node_pages, machine.node_count, machine.kernel_release, overrides.free_vmemmap)
    instances = [
        {
            "instance": index,
            "socket": socket.socket,
            "nodes": [node.node for node in socket.nodes],
            "cpus": socket.cpus,
            "threads": socket.physical_cores,
            "threads_batch": socket.threads,
            "port": overrides.port + index,
            "pages": copy_pages,
        }
        for index, socket in enumerate(sockets)
    ]
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "name": manifest.name,
            "bytes": manifest.bytes,
            "shards": [
                {"file": shard.file, "bytes": shard.bytes, "sha256": shard.sha256, "pages": pages}
                for shard, pages in zip(manifest.shards, shard_pages)
            ],
            "source": source_to_data(manifest.source),
            "architecture": model.architecture,
            "read_per_token_bytes": sum(part.read_per_token for part in model.parts),
            "attention_flops_per_context_token": attention_flops_per_context_token(model),
        },
        "isa": isa,
        "weights": overrides.weights,
        "pages": {
            "size_kib": PAGE_KIB,
            "total": sum(count for _dummy, count in node_pages),
            "nodes": [{"node": node, "pages": count} for node, count in node_pages],
        },
        "kernel_arguments": arguments,
        "instances": instances,
        "servers_at_once": servers,
        "context": context,
        "slots": overrides.slots,
        "cache_type_k": overrides.cache_type_k,
        "cache_type_v": cache_v,
        "flash_attention": True,
        "kv_bytes": kv,
        "compute_bytes": buffers,
        "system_reserve_bytes": reserve,
        "disk_bytes": manifest.bytes,
        "start_timeout_s": start_timeout_s,
    }
    plan["findings"] = _findings(model, overrides.cache_type_k, cache_v, context)
    plan["memory"] = [
        {
            "socket": room.socket.socket,
            "bytes": room.socket.memory_bytes,
            "weights_bytes": room.weights,
            "reserve_bytes": room.reserve,
            "struct_pages_bytes": room.socket.memory_bytes // STRUCT_PAGE_SHARE,
            "vmemmap_bytes": VMEMMAP_BYTES_PER_PAGE * copy_pages,
            "kv_bytes": kv * servers,
            "compute_bytes": buffers * servers,
            "left_bytes": room.left - servers * (kv + buffers),
        }
        for room in rooms
    ]
    rounded_once = -(-manifest.bytes // PAGE_BYTES)
    rounding = (
        f"rounded up each; the sum rounded once would be {rounded_once}" if len(shard_pages) > 1 else "rounded up"
    )
    cache = (
        f"MLA: {model.layers} layers x {model.kv_lora_rank} + {model.rope_dims} values in {overrides.cache_type_k}"
        if model.mla
        else f"{model.layers} layers x {model.kv_heads} heads x ({model.key_length} in {overrides.cache_type_k} + "
        f"{model.value_length} in {cache_v})"
    )
    copies = f"x {len(sockets)} sockets, a whole copy on each" if len(sockets) > 1 else "on one socket"
    reasons: list[tuple[str, object, str]] = [
        ("isa", isa, isa_reason),
        (
            "pages.total",
            plan["pages"]["total"],
            f"{len(shard_pages)} shard(s) of {gib(manifest.bytes)} in pages of 1 GiB, {rounding}: {copy_pages} {copies}"
            if paged
            else "weights stay in the page cache: host_plan_weights is mmap",
        ),
        (
            "kernel_arguments",
            " ".join(arguments) or "none",
            "pages are reserved on the nodes that read them" if machine.node_count > 1 else "one node with memory",
        ),
        (
            "instances",
            len(instances),
            "one per socket: across sockets the bandwidth between them is the limit"
            if overrides.instances is None
            else "set by host_plan_instances",
        ),
        ("threads", instances[0]["threads"], "generation: one per physical core of the socket"),
        ("threads_batch", instances[0]["threads_batch"], "prefill: one per hardware thread of the socket"),
        ("context", context, context_reason),
        (
            "kv_bytes",
            gib(kv),
            f"{cache} = {kv_per_token} bytes a token, x {padded(context)} tokens x {overrides.slots} slot(s)",
        ),
        (
            "compute_bytes",
            gib(buffers),
            "upper estimate for a prefill step of 512 tokens with flash attention, with the server's own 0.25 GiB",
        ),
        ("system_reserve_bytes", gib(reserve), reserve_reason),
        (
            "struct_pages",
            gib(machine.memory_bytes // STRUCT_PAGE_SHARE),
            "64 bytes for each 4 KiB, in the reserve"
            + (
                f"; hugetlb_free_vmemmap=on gives back {gib(VMEMMAP_BYTES_PER_PAGE * plan['pages']['total'])} of them, "
                + (
                    "which the reserve leaves out"
                    if overrides.free_vmemmap and overrides.system_reserve_bytes is None
                    else "on which the plan does not count"
                )
                if paged
                else ""
            ),
        ),
        (
            "servers_at_once",
            servers,
            _servers_reason(servers, overrides),
        ),
        ("disk_bytes", gib(manifest.bytes), "the shards, once for all instances"),
        (
            "start_timeout_s",
            start_timeout_s,
            f"{gib(manifest.bytes)} for {len(sockets)} instance(s) at a pessimistic 0.5 GB/s, and {START_SLACK_S} s",
        ),
    ]
    plan["reasons"] = [{"output": name, "value": str(value), "reason": reason} for name, value, reason in reasons]
    plan["hash"] = canonical_hash(plan)
    return plan
