#!/usr/bin/env python3
"""Train the passkey model of this package from scratch, on CPU:

    python examples/train_passkey.py --out python/qwen_sparse/assets/passkey

A byte-level Qwen2 of 0.8 M parameters learns to copy a number out of filler text and to model Python source.
It never sees a sequence of more than 512 bytes and knows only plain RoPE; longer prompts are left to Dual Chunk
Attention.

How it learns. Retrieval is a chain of attention steps (an induction circuit) that forms suddenly or not at
all, so training starts where that is easiest: 64-byte episodes "The pass key is 12345. … The pass key is
12345". Once enough answers are right the episodes grow to 128, 192, 256, 384 and 512 bytes. From 192 bytes
on they have distractors, other labels, wordings and key lengths, and many keys with repeated digits, on
which merely continuing after the last digit fails. The last stage gives half of each batch to source text
and decays the learning rate. Queries are scaled at random: down for retrieval (the circuit must win with a
margin, because a longer prompt dilutes the softmax), up for source text in the last stage (Dual Chunk
Attention's temperature sharpens every head). A seed that stalls is abandoned for the next one. Results are
reproducible for a seed, a torch version, a kind of CPU and a Python version (whose library is the source
text).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning barriers cost 5x when the machine is shared

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_sparse.passkey import HEADER, LABELS, draw_key, filler_text, question, source_text, statement

EOS, PAD = 256, 257
WARMUP_STEPS = 50
LOG_EVERY = 25
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 384,
    "vocab_size": 264,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dual_chunk_attention_config": {
        "chunk_size": 512,
        "local_size": 128,
        "original_max_position_embeddings": 512,
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": 2048,
    },
}

# Sparse prefill of every head: columns, distances, and the share of attention kept (0: not measured).
# A head attends to 3 % of a 65536-byte prompt; a calibration may replace the file.
BUDGET = ["vertical_and_slash", 512, 110, 0.0]

# What a target byte belongs to; the value is its class in `Batch.kinds`, the weight its share of the loss.
UNUSED, ANSWER, REPEAT, COPY, SOURCE = range(5)
LOSS_WEIGHTS = {ANSWER: 1.0, REPEAT: 0.3, COPY: 0.4, SOURCE: 0.3}

DISTRACTORS = (
    "The serial number is {}. ",
    "The zip code is {}. Do not confuse it. ",
    "The room number is {}. ",
    "Invoice {} was paid. ",
    "The order id is {}. Ignore it. ",
    "In total {} bytes were read. ",
)


class Episode(NamedTuple):
    """One training sequence: token ids and what each of them is."""

    ids: list[int]
    kinds: list[int]


@dataclass(frozen=True)
class Mixture:
    """What a batch is made of. Shares not given to source text and copying go to passkey episodes."""

    source_share: float
    copy_share: float
    repeated_digits: float = 0.0  # share of keys made of three different digits at most
    distractors: bool = False
    variants: bool = False  # labels, wordings, key lengths, questions without their trailing space
    retrieval_scale: tuple[float, float] = (1.0, 1.0)
    source_scale: tuple[float, float] = (1.0, 1.0)


START = Mixture(source_share=0.15, copy_share=0.25)
KEYS = Mixture(
    source_share=0.12,
    copy_share=0.08,
    repeated_digits=0.3,
    distractors=True,
    variants=True,
    retrieval_scale=(0.85, 1.0),
)
FINAL = Mixture(
    source_share=0.45,
    copy_share=0.04,
    repeated_digits=0.2,
    distractors=True,
    variants=True,
    retrieval_scale=(0.75, 1.0),
    source_scale=(0.9, 1.8),
)


class Stage(NamedTuple):
    """A length, what to train on there, and the share of right answers that ends the stage."""

    length: int
    mixture: Mixture
    enough: float


STAGES = (
    Stage(64, START, 0.60),
    Stage(128, START, 0.70),
    Stage(192, KEYS, 0.85),
    Stage(256, KEYS, 0.85),
    Stage(384, KEYS, 0.85),
    Stage(512, KEYS, 0.90),
    Stage(512, FINAL, math.inf),
)


class Batch(NamedTuple):
    """Sequences, what their bytes are, and the factor on each sequence's queries."""

    ids: Tensor  # [batch, length], int64
    kinds: Tensor  # [batch, length], int64
    query_scale: Tensor  # [batch, 1, 1, 1], float32


class Episodes:
    """Makes training sequences; everything comes from the training side of `qwen_sparse.passkey`'s split."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.source = source_text("train")

    def filler(self, length: int) -> str:
        """Irrelevant text of one of four sorts."""
        rng, u = self.rng, self.rng.random()
        if u < 0.40:  # the well-known one, often from the middle of a sentence
            start = rng.choice([0, 0, rng.randrange(90)])
            return filler_text("grass", length + start, rng)[start:]
        if u < 0.65:
            return filler_text("sentences", length, rng, split="train")
        if u < 0.88:
            return filler_text("source", length, rng, split="train")
        alphabet = rng.sample(range(32, 127), rng.randint(4, 90))
        return bytes(rng.choices(alphabet, k=length)).decode()

    def number(self, mixture: Mixture) -> str:
        """A key of 5 digits or, among variants, sometimes 3 to 8."""
        rng = self.rng
        digits = rng.randint(3, 8) if mixture.variants and rng.random() < 0.2 else 5
        most = 3 if rng.random() < mixture.repeated_digits else digits
        while len(set(key := draw_key(rng, digits=digits, split="train"))) > most:
            pass
        return key

    def distractors(self, label: str, room: int, mixture: Mixture) -> str:
        """Other numbers: a few in passing or, among variants, one in the needle's own wording."""
        rng, text = self.rng, ""
        if mixture.variants and rng.random() < 0.5:
            other = rng.choice([name for name in LABELS if name != label])
            text = statement(self.number(mixture), label=other, wording=rng.choice(["remember", "short"]))
            return text if len(text) < room // 2 else ""
        for _ in range(rng.randint(1, 3)):
            sentence = rng.choice(DISTRACTORS).format(self.number(mixture))
            if len(text) + len(sentence) < room // 2:
                text += sentence
        return text

    def wording(self, length: int, key: str, mixture: Mixture) -> tuple[str, str, str]:
        """Needle, question, and the needle's label."""
        rng = self.rng
        if length < 112:  # no room for the whole wording
            return f"The pass key is {key}. ", "The pass key is ", LABELS[0]
        varied = mixture.variants and length >= 192
        label = rng.choice(LABELS) if varied and rng.random() < 0.4 else LABELS[0]
        short = varied and rng.random() < 0.25
        needle = statement(key, label=label, wording="short" if short else "remember")
        return needle, question(label=label), label

    def passkey(self, length: int, mixture: Mixture) -> Episode:
        """Exactly `length` tokens: [header] filler needle filler question answer EOS."""
        rng, key = self.rng, self.number(mixture)
        needle, ask, label = self.wording(length, key, mixture)
        header = HEADER if length >= 300 and rng.random() < 0.7 else ""
        answer = key
        if mixture.variants and rng.random() < 0.15:
            ask, answer = ask[:-1], " " + key
        room = length - len(header) - len(needle) - len(ask) - len(answer) - 1
        extra = ""
        if mixture.distractors and rng.random() < 0.5:
            extra = self.distractors(label, room, mixture)
        filler = self.filler(room - len(extra))
        cut = rng.randint(0, len(filler)) if rng.random() < 0.8 else rng.choice([0, len(filler)])
        sides = [filler[:cut], filler[cut:]]
        side = rng.randrange(2)
        place = rng.randint(0, len(sides[side]))
        sides[side] = sides[side][:place] + extra + sides[side][place:]
        text = header + sides[0] + needle + sides[1] + ask + answer
        kinds = [UNUSED] * length
        kinds[-len(answer) - 1 :] = [ANSWER] * (len(answer) + 1)
        if needle.count(key) > 1:
            second = len(header) + len(sides[0]) + needle.rindex(key)
            kinds[second : second + len(key)] = [REPEAT] * len(key)
        return Episode([*text.encode(), EOS], kinds)

    def copying(self, length: int) -> Episode:
        """A random segment, again and again after random gaps: forms the induction circuit."""
        rng = self.rng
        if rng.random() < 0.6:
            alphabet = rng.sample(range(32, 127), rng.randint(16, 90))
        else:
            alphabet = list(b"0123456789 .,:abcdef")
        size = int(math.exp(rng.uniform(math.log(6), math.log(length // 3))))
        segment, longest_gap = rng.choices(alphabet, k=size), rng.choice([0, 0, 4, 16])
        ids, kinds = [*segment], [UNUSED] * size
        while len(ids) < length:
            gap = rng.choices(alphabet, k=rng.randint(0, longest_gap))
            ids += gap + segment
            kinds += [UNUSED] * (len(gap) + 2) + [COPY] * (size - 2)
        return Episode(ids[:length], kinds[:length])

    def source_piece(self, length: int) -> Episode:
        """A stretch of Python source."""
        start = self.rng.randrange(len(self.source) - length)
        return Episode([*self.source[start : start + length].encode()], [SOURCE] * length)

    def batch(self, length: int, size: int, mixture: Mixture) -> Batch:
        """`size` sequences, divided as the mixture says."""
        episodes, scales = [], []
        for row in range(size):
            u = (row + 0.5) / size
            if u < mixture.source_share:
                episodes.append(self.source_piece(length))
                scales.append(self.rng.uniform(*mixture.source_scale))
                continue
            scales.append(self.rng.uniform(*mixture.retrieval_scale))
            copies = u < mixture.source_share + mixture.copy_share
            episodes.append(self.copying(length) if copies else self.passkey(length, mixture))
        return Batch(
            torch.tensor([episode.ids for episode in episodes]),
            torch.tensor([episode.kinds for episode in episodes]),
            torch.tensor(scales).view(-1, 1, 1, 1),
        )


class Attention(nn.Module):
    """Causal grouped-query attention with plain RoPE."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        q_size, kv_size = (self.head_dim * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
        self.q_proj = nn.Linear(hidden, q_size)
        self.k_proj = nn.Linear(hidden, kv_size)
        self.v_proj = nn.Linear(hidden, kv_size)
        self.o_proj = nn.Linear(q_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q * query_scale, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, query_scale)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Qwen2(nn.Module):
    """Qwen2 with tied embeddings; parameter names are those of a Hugging Face checkpoint, less "model."."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        channels = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        angles = torch.outer(torch.arange(config["max_position_embeddings"]), config["rope_theta"] ** -channels)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialize(config["num_hidden_layers"])

    def initialize(self, num_layers: int) -> None:
        """Normal weights of standard deviation 1/sqrt(inputs), less for what adds to the residual stream."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = 0.02 if name.startswith("embed") else parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * num_layers)
                nn.init.normal_(parameter, 0, std)

    def forward(self, ids: Tensor, query_scale: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of `ids` [batch, length]."""
        x: Tensor = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin, query_scale)
        logits: Tensor = self.norm(x) @ self.embed_tokens.weight.t()
        return logits


class StepResult(NamedTuple):
    """What a training step measured."""

    losses: dict[int, float]
    exact: float  # share of passkey episodes whose answer, EOS included, is right


def train_step(model: Qwen2, optimizers: list[torch.optim.Optimizer], batch: Batch) -> StepResult:
    """One optimizer step on the weighted sum of the four losses."""
    logits = model(batch.ids[:, :-1], batch.query_scale)
    target, kinds = batch.ids[:, 1:], batch.kinds[:, 1:]
    # Full logits on purpose: the backward pass of indexing the hidden states is three times slower.
    entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    losses = {kind: (entropy * (kinds == kind)).sum() / (kinds == kind).sum().clamp(min=1) for kind in LOSS_WEIGHTS}
    model.zero_grad()
    torch.stack([weight * losses[kind] for kind, weight in LOSS_WEIGHTS.items()]).sum().backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    asked = kinds == ANSWER
    right = ((logits.argmax(-1) == target) | ~asked).all(1)[asked.any(1)]
    return StepResult({kind: loss.item() for kind, loss in losses.items()}, right.float().mean().item())


class Curriculum:
    """Which stage training is at; the last one lasts `final_steps` steps."""

    def __init__(self, seed: int, final_steps: int) -> None:
        self.rng = random.Random(seed + 7)
        self.level, self.exact, self.steps_at_level = 0, 0.0, 0
        self.final_steps, self.final_done = final_steps, 0

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return STAGES[self.level]

    @property
    def finished(self) -> bool:
        """Whether the last stage is over."""
        return self.final_done >= self.final_steps

    def next_length(self) -> int:
        """The current length, or now and then that of one of the two stages before it."""
        if self.rng.random() < 0.7:
            return self.stage.length
        return STAGES[self.rng.randint(max(0, self.level - 2), self.level)].length

    def record(self, length: int, exact: float) -> None:
        """Takes a step's result; moves on to the next stage when it is good enough."""
        if length == self.stage.length:
            self.exact = 0.9 * self.exact + 0.1 * exact if self.steps_at_level else exact
            self.steps_at_level += 1
        if self.level == len(STAGES) - 1:
            self.final_done += 1
        elif self.steps_at_level >= 15 and self.exact > self.stage.enough:
            self.level, self.exact, self.steps_at_level = self.level + 1, 0.0, 0

    def rate(self, step: int) -> float:
        """The learning rate's factor: warm-up, constant, cosine decay over the last stage."""
        decay = 0.5 * (1 + math.cos(math.pi * self.final_done / self.final_steps))
        return max(0.02, decay) * min(1.0, (step + 1) / WARMUP_STEPS)


def make_optimizers(model: Qwen2) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embeddings, norms and biases.

    With Muon instead of AdamW alone, START's mixture is learnt up to 512 bytes in 330 steps instead of 1100.
    """
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith("embed")]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save(model: Qwen2, out: Path) -> None:
    """Writes a Hugging Face checkpoint: weights (bf16), config, and sparse budgets where there are none yet."""
    tensors = {f"model.{name}": tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    budgets = [{str(head): BUDGET for head in range(CONFIG["num_attention_heads"])} for _ in model.layers]
    if not (out / "sparse_attention_config.json").exists():
        (out / "sparse_attention_config.json").write_text(json.dumps(budgets, indent=2) + "\n")


def train(seed: int, args: argparse.Namespace, log: Path) -> Qwen2 | None:
    """One run from scratch; None when a length is not learnt within `args.stall` steps."""
    torch.manual_seed(seed)
    episodes, model = Episodes(seed), Qwen2(CONFIG)
    optimizers, curriculum = make_optimizers(model), Curriculum(seed, args.final_steps)
    start, step = time.time(), 0
    while not curriculum.finished:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * curriculum.rate(step)
        length = curriculum.next_length()
        tokens = args.tokens if length > 128 else args.tokens * 2 // 3
        batch = episodes.batch(length, tokens // length, curriculum.stage.mixture)
        result = train_step(model, optimizers, batch)
        step += 1
        curriculum.record(length, result.exact)
        if step % LOG_EVERY == 0:
            line = {
                "seed": seed,
                "step": step,
                "seconds": round(time.time() - start),
                "stage": curriculum.level,
                "length": curriculum.stage.length,
                "exact": round(curriculum.exact, 4),
                "answer_loss": round(result.losses[ANSWER], 4),
                "source_loss": round(result.losses[SOURCE], 4),
                "lr": round(args.lr * curriculum.rate(step), 6),
            }
            print(" ".join(f"{key} {value}" for key, value in line.items()), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if curriculum.level < len(STAGES) - 1 and curriculum.steps_at_level > args.stall:
            print(f"seed {seed} stalled at stage {curriculum.level}", flush=True)
            return None
        if args.save_every and step % args.save_every == 0:
            save(model, args.out)
    return model


def main() -> None:
    """Trains seed after seed until one learns the task."""
    parser = argparse.ArgumentParser(description="Train the byte-level passkey model from scratch, on CPU.")
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder for weights, config and training log")
    option("--seed", type=int, default=1, help="first seed to try (default: %(default)s)")
    option("--seeds", type=int, default=6, help="how many seeds to try (default: %(default)s)")
    option("--final-steps", type=int, default=1000, help="steps of the last phase (default: %(default)s)")
    option("--stall", type=int, default=900, help="steps at one length before a seed is abandoned")
    option("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    option("--tokens", type=int, default=6144, help="bytes in a batch (default: %(default)s)")
    option("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    option("--save-every", type=int, default=200, help="steps between snapshots, 0 for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "training_log.jsonl"
    log.write_text("")
    for seed in range(args.seed, args.seed + args.seeds):
        model = train(seed, args, log)
        if model is not None:
            save(model, args.out)
            return
    raise SystemExit(f"none of {args.seeds} seeds learnt the task")


if __name__ == "__main__":
    main()
