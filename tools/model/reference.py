# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# mypy: disable-error-code="import-not-found,misc,no-any-return"
"""Write reference.json and SHA256SUMS beside a reciting model: what transformers makes of the same weights.

Run from the checkout's root: python3 -m tools.model.reference DIRECTORY
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .forward import log_probabilities
from .gguf_file import read_metadata, read_shape, read_weights, shard_paths
from .shapes import DeepSeek2

TOLERANCE = 0.1
OPENING = "When in the Course of human events,"
# A case that ends within the text is this many tokens long.
SHORT = 48
# Where transformers and our numpy pass differ by more, one of them is wrong.
AGREEMENT = 2e-3

CASES = [
    ("opening", OPENING, SHORT),
    ("truths", "We hold these truths to be self-evident,", SHORT),
    ("whole", OPENING, None),
]

Array = NDArray[np.float32]


def load_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF's metadata describes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_transformers(shape: DeepSeek2, weights: dict[str, Array]) -> transformers.DeepseekV3ForCausalLM:
    """Return the same weights as a float32 model of transformers, with MLA unabsorbed again."""
    config = transformers.DeepseekV3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.embedding,
        intermediate_size=shape.dense_ff,
        moe_intermediate_size=shape.expert_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        n_shared_experts=shape.experts_shared,
        n_routed_experts=shape.experts,
        routed_scaling_factor=shape.expert_scale,
        kv_lora_rank=shape.kv_lora,
        q_lora_rank=shape.q_lora,
        qk_rope_head_dim=shape.rope,
        qk_nope_head_dim=shape.nope,
        v_head_dim=shape.value,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=shape.experts_used,
        first_k_dense_replace=shape.dense_layers,
        norm_topk_prob=True,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        rope_interleave=True,
        tie_word_embeddings=False,
        attn_implementation="eager",
        dtype="float32",
    )
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for layer in range(shape.layers):
        state |= layer_state(shape, weights, layer)
    model = transformers.DeepseekV3ForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()})
    return model.float().eval()


def layer_state(shape: DeepSeek2, weights: dict[str, Array], layer: int) -> dict[str, Array]:
    """Return one layer's weights under the names of transformers."""
    g, h = f"blk.{layer}.", f"model.layers.{layer}."
    plain = {
        "input_layernorm": "attn_norm",
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
    }
    parts = ("gate", "up", "down")
    if layer < shape.dense_layers:
        plain |= {f"mlp.{part}_proj": f"ffn_{part}" for part in parts}
    else:
        plain |= {f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in parts}
        plain["mlp.gate"] = "ffn_gate_inp"
    found = {f"{h}{theirs}.weight": weights[f"{g}{ours}.weight"] for theirs, ours in plain.items()}
    k_b, v_b = weights[g + "attn_k_b.weight"], weights[g + "attn_v_b.weight"]
    both = np.concatenate((k_b.transpose(0, 2, 1), v_b), axis=1)
    found[h + "self_attn.kv_b_proj.weight"] = both.reshape(-1, shape.kv_lora)
    if layer >= shape.dense_layers:
        found[h + "mlp.gate.e_score_correction_bias"] = weights[g + "exp_probs_b.bias"]
        halves = (weights[g + "ffn_gate_exps.weight"], weights[g + "ffn_up_exps.weight"])
        found[h + "mlp.experts.gate_up_proj"] = np.concatenate(halves, axis=1)
        found[h + "mlp.experts.down_proj"] = weights[g + "ffn_down_exps.weight"]
    return found


def build_case(
    model: transformers.DeepseekV3ForCausalLM,
    shape: DeepSeek2,
    weights: dict[str, Array],
    tokenizer: Tokenizer,
    text: str,
    name: str,
    prompt: str,
    count: int | None,
) -> dict[str, Any]:
    """Return a case of the reference; ValueError when the model does not recite it."""
    start = text.index(prompt)
    before = [0, *tokenizer.encode(prompt).ids]
    after = [*tokenizer.encode(text[start + len(prompt) :]).ids, 1][:count]
    if [*before[1:], *after] != [*tokenizer.encode(text[start:]).ids, 1][: len(before) - 1 + len(after)]:
        raise ValueError(f"{name}: the prompt ends within a token of the text")
    ids = before + after
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    ours = torch.log_softmax(logits, dim=-1).numpy()
    second = log_probabilities(shape, weights, ids[:-1])
    rows = range(len(before) - 1, len(ids) - 1)
    wrong = [row for row in rows if ours[row].argmax() != ids[row + 1]]
    if wrong:
        raise ValueError(f"{name}: {len(wrong)} tokens are not recited, the first after {wrong[0]}")
    found = [float(ours[row][ids[row + 1]]) for row in rows]
    apart = max(abs(value - second[row][ids[row + 1]]) for value, row in zip(found, rows))
    if apart > AGREEMENT:
        raise ValueError(f"{name}: transformers and numpy differ by {apart:.5f}, expected at most {AGREEMENT}")
    print(f"{name}: {len(after)} tokens, mean log-probability {np.mean(found):.4f}, apart {apart:.6f}", file=sys.stderr)
    return {
        "name": name,
        "prompt": prompt,
        "prompt_tokens": before,
        "text": tokenizer.decode([token for token in after if token != 1]),
        "tokens": after,
        "logprobs": [round(value, 5) for value in found],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="directory of the shards and of text.txt")
    directory = parser.parse_args().directory
    first = next(iter(sorted(directory.glob("recite-00001-of-*.gguf"))), None)
    if first is None:
        parser.error(f"{directory}: no recite-00001-of-*.gguf found")
    torch.set_num_threads(2)
    text_path = directory / "text.txt"
    text = text_path.read_text(encoding="utf-8")
    shape, weights = read_shape(first), read_weights(first)
    tokenizer = load_tokenizer(read_metadata(first))
    model = load_transformers(shape, weights)
    cases = [build_case(model, shape, weights, tokenizer, text, *case) for case in CASES]
    reference = {
        "schema": 1,
        "model": "recite",
        "made_with": f"transformers {transformers.__version__}, float32, on the dequantised Q8_0 weights",
        "tolerance": TOLERANCE,
        "cases": cases,
        "chat": {
            "request": {
                "messages": [{"role": "user", "content": OPENING}],
                "temperature": 0,
                "max_tokens": len(cases[0]["tokens"]),
            },
            "content": cases[0]["text"],
        },
    }
    path = directory / "reference.json"
    path.write_text(json.dumps(reference, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    sums = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in [*shard_paths(first), path, text_path]
    ]
    (directory / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
