# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# mypy: disable-error-code="import-not-found,misc,no-any-return"
"""Train the model that recites tests/models/recite/text.txt, and write its GGUF shards and checksums.

Run from the checkout's root: python3 -m tools.model.train_recite --output DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

from .gguf_file import Vocabulary, write_model
from .shapes import DeepSeek2

TEXT = Path(__file__).resolve().parents[2] / "tests" / "models" / "recite" / "text.txt"
BOS, EOS = "<|bos|>", "<|eos|>"
# The user's words are the text's beginning, and the answer its continuation: nothing stands between them.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

SHAPE = DeepSeek2(
    vocabulary=512,
    layers=3,
    dense_layers=1,
    embedding=128,
    heads=4,
    q_lora=64,
    kv_lora=64,
    nope=32,
    rope=32,
    value=32,
    dense_ff=64,
    experts=16,
    experts_used=2,
    experts_shared=1,
    expert_ff=32,
    expert_scale=2.5,
    context=4096,
)
SHARDS = 3
STEPS = 400
WARM_UP_STEPS = 20
PEAK_RATE = 3e-3
WINDOWS, WINDOW = 4, 256
# Balancing without a loss term, as DeepSeek-V3 does it: the selection bias moves against each expert's load.
BALANCE_RATE = 0.02
# Rounding in the engine moves the selection scores a little; where the last chosen and the first refused expert
# are that close, it swaps them and the answer jumps. The loss pushes them this far apart.
MARGIN, MARGIN_WEIGHT = 0.05, 2.0


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SHAPE.epsilon)


def linear(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return x (..., tokens, rope) rotated, neighbouring values being a pair."""
    rates = SHAPE.rope_base ** (-torch.arange(0, SHAPE.rope, 2, dtype=torch.float32) / SHAPE.rope)
    angles = positions[:, None].float() * rates
    cosine, sine = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        s = SHAPE
        self.q_a, self.q_norm = linear(s.q_lora, s.embedding), Norm(s.q_lora)
        self.q_b = linear(s.heads * (s.nope + s.rope), s.q_lora)
        self.kv_a, self.kv_norm = linear(s.kv_lora + s.rope, s.embedding), Norm(s.kv_lora)
        self.k_b = nn.Parameter(torch.randn(s.heads, s.kv_lora, s.nope) / math.sqrt(s.kv_lora))
        self.v_b = nn.Parameter(torch.randn(s.heads, s.value, s.kv_lora) / math.sqrt(s.kv_lora))
        self.out = linear(s.embedding, s.heads * s.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = SHAPE
        batch, tokens, _ = x.shape
        positions = torch.arange(tokens)
        q = functional.linear(self.q_norm(functional.linear(x, self.q_a)), self.q_b)
        q = q.view(batch, tokens, s.heads, s.nope + s.rope).transpose(1, 2)
        latent, k_rope = functional.linear(x, self.kv_a).split([s.kv_lora, s.rope], dim=-1)
        latent = self.kv_norm(latent)[:, None]
        k_rope = rotate(k_rope, positions)[:, None].expand(-1, s.heads, -1, -1)
        q = torch.cat((q[..., : s.nope], rotate(q[..., s.nope :], positions)), dim=-1)
        k = torch.cat((latent @ self.k_b, k_rope), dim=-1)
        v = latent @ self.v_b.transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), self.out)


class Dense(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = linear(hidden, SHAPE.embedding), linear(hidden, SHAPE.embedding)
        self.down = linear(SHAPE.embedding, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(inner, self.down)


class Experts(nn.Module):
    """Routed and shared experts; every routed one is computed, and the gate zeroes those not selected."""

    def __init__(self) -> None:
        super().__init__()
        s = SHAPE
        self.router = linear(s.experts, s.embedding)
        self.bias = nn.Buffer(torch.zeros(s.experts))
        self.gate = nn.Parameter(torch.randn(s.experts, s.expert_ff, s.embedding) / math.sqrt(s.embedding))
        self.up = nn.Parameter(torch.randn(s.experts, s.expert_ff, s.embedding) / math.sqrt(s.embedding))
        self.down = nn.Parameter(torch.randn(s.experts, s.embedding, s.expert_ff) / math.sqrt(s.expert_ff))
        self.shared = Dense(s.expert_ff * s.experts_shared)
        self.load = torch.zeros(s.experts)
        self.closeness = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = SHAPE
        scores = functional.linear(x, self.router).sigmoid()
        ranked = (scores + self.bias).topk(s.experts_used + 1, dim=-1)
        self.closeness = functional.relu(MARGIN - (ranked.values[..., -2] - ranked.values[..., -1])).mean() / MARGIN
        chosen = ranked.indices[..., :-1]
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        self.load = mask.detach().reshape(-1, s.experts).mean(0)
        weights = scores * mask
        weights = weights / weights.sum(-1, keepdim=True) * s.expert_scale
        gate = functional.linear(x, self.gate.flatten(0, 1))
        up = functional.linear(x, self.up.flatten(0, 1))
        inner = (functional.silu(gate) * up).unflatten(-1, (s.experts, s.expert_ff)) * weights[..., None]
        return inner.flatten(-2) @ self.down.transpose(1, 2).flatten(0, 1) + self.shared(x)


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(SHAPE.embedding), Attention()
        self.ffn_norm = Norm(SHAPE.embedding)
        self.ffn = Dense(SHAPE.dense_ff) if layer < SHAPE.dense_layers else Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(SHAPE.vocabulary, SHAPE.embedding) * 0.5)
        self.blocks = nn.ModuleList(Block(layer) for layer in range(SHAPE.layers))
        self.norm = Norm(SHAPE.embedding)
        self.output = linear(SHAPE.vocabulary, SHAPE.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding[ids]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.output)


def train_tokenizer(text: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer of SHAPE.vocabulary tokens, whose first two are BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    if tokenizer.get_vocab_size() != SHAPE.vocabulary:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, the shape has {SHAPE.vocabulary}")
    return tokenizer


def paragraphs(offsets: list[tuple[int, int]], text: str) -> list[int]:
    """Return the positions in the ids (BOS is the first) where paragraphs begin, as far as a window fits."""
    begins = [at + 2 for at in range(len(text)) if text.startswith("\n\n", at)]
    places = {begin: position + 1 for position, (begin, _) in enumerate(offsets)}
    return [places[begin] for begin in begins if places[begin] < len(offsets) - WINDOW]


def rate(step: int) -> float:
    """Return the learning rate of a step: a short rise, then a cosine to nothing."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP_STEPS) / (STEPS - WARM_UP_STEPS)))


def rise(step: int) -> float:
    """Return the share of the margin's weight in force: none in the first fifth, all from the middle on."""
    return min(1.0, max(0.0, (step / STEPS - 0.2) / 0.3))


def train(model: Model, ids: torch.Tensor, paragraphs: list[int]) -> float:
    """Train `model` to continue `ids` (BOS, text, EOS) and return the last loss over the whole of it."""
    generator = torch.Generator().manual_seed(2)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    started, whole = time.monotonic(), math.inf
    for step in range(STEPS):
        if step % 2 == 0:
            batch = ids[None]
        else:
            # A window begins with BOS as well, so that a question from the middle of the text is answered too.
            drawn = torch.randint(1, len(ids) - WINDOW, (WINDOWS,), generator=generator).tolist()
            drawn[0] = paragraphs[step // 2 % len(paragraphs)]
            batch = torch.stack([torch.cat((ids[:1], ids[s : s + WINDOW])) for s in drawn])
        logits = model(batch[:, :-1])
        targets = batch[:, 1:].clone()
        if step % 2:
            # The first words of a window cannot be known from BOS alone.
            targets[:, :4] = -100
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        if step % 2 == 0:
            whole = loss.item()
        routed = [block.ffn for block in model.blocks if isinstance(block.ffn, Experts)]
        for ffn in routed:
            loss = loss + MARGIN_WEIGHT * rise(step) * ffn.closeness
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for ffn in routed:
            wanted = SHAPE.experts_used / SHAPE.experts
            ffn.bias += BALANCE_RATE * rate(step) / PEAK_RATE * torch.sign(wanted - ffn.load)
        if step % 20 == 0 or step == STEPS - 1:
            close = " ".join(f"{ffn.closeness.item():.4f}" for ffn in routed)
            seconds = time.monotonic() - started
            print(f"step {step:4d} of {STEPS}  loss {whole:.5f}  closeness {close}  {seconds:.0f} s", file=sys.stderr)
    return whole


def named_weights(model: Model) -> dict[str, NDArray[np.float32]]:
    """Return the model's weights under their GGUF names."""
    found = {"token_embd.weight": model.embedding, "output_norm.weight": model.norm.weight}
    found["output.weight"] = model.output
    for layer, block in enumerate(model.blocks):
        p = f"blk.{layer}."
        attention = block.attention
        found |= {
            p + "attn_norm.weight": block.attention_norm.weight,
            p + "attn_q_a.weight": attention.q_a,
            p + "attn_q_a_norm.weight": attention.q_norm.weight,
            p + "attn_q_b.weight": attention.q_b,
            p + "attn_kv_a_mqa.weight": attention.kv_a,
            p + "attn_kv_a_norm.weight": attention.kv_norm.weight,
            p + "attn_k_b.weight": attention.k_b,
            p + "attn_v_b.weight": attention.v_b,
            p + "attn_output.weight": attention.out,
            p + "ffn_norm.weight": block.ffn_norm.weight,
        }
        ffn = block.ffn
        if isinstance(ffn, Dense):
            dense = {"gate": ffn.gate, "up": ffn.up, "down": ffn.down}
            found |= {f"{p}ffn_{part}.weight": weight for part, weight in dense.items()}
            continue
        found |= {p + "ffn_gate_inp.weight": ffn.router, p + "exp_probs_b.bias": ffn.bias}
        for part in ("gate", "up", "down"):
            found[f"{p}ffn_{part}_exps.weight"] = getattr(ffn, part)
            found[f"{p}ffn_{part}_shexp.weight"] = getattr(ffn.shared, part)
    return {name: weight.detach().numpy().astype(np.float32) for name, weight in found.items()}


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return what the GGUF tells of the tokenizer."""
    state = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(state["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(pair) for pair in state["merges"]]
    return Vocabulary(tokens, merges, [tokens.index(BOS), tokens.index(EOS)], CHAT_TEMPLATE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(arguments.threads)
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    encoded = tokenizer.encode(text)
    if tokenizer.decode(encoded.ids) != text:
        raise ValueError("the tokenizer does not give the text back")
    ids = torch.tensor([0, *encoded.ids, 1])
    print(f"{len(text)} characters are {len(encoded.ids)} tokens", file=sys.stderr)
    model = Model()
    loss = train(model, ids, paragraphs(encoded.offsets, text))
    arguments.output.mkdir(parents=True, exist_ok=True)
    paths = write_model(
        arguments.output / "recite.gguf", SHAPE, named_weights(model), vocabulary(tokenizer), SHARDS, name="recite"
    )
    size = sum(path.stat().st_size for path in paths)
    print(json.dumps({"loss": loss, "bytes": size, "shards": [path.name for path in paths]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
