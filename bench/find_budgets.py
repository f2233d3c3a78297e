"""Budgets with which the real selection attends a wanted share of the causal pairs, on a model with random weights.

Every head of every layer gets the same two numbers, columns and distances in the ratio of :data:`PAIR`, times a factor
that is found by bisection. Candidates are tried on samples of what the model will select from: keys and voting queries
with the biases and rotations of some of its layers and, instead of what projections give, normal numbers of the same
deviation. So the density that a prefill counts comes out near the wanted one, not at it.

How selection behaves there: rotated, the biases make a score that depends on the distance alone, so the chosen
distances come in clusters, as they do in trained heads. Keys stand out little by themselves, so columns lie where the
distances are, and many within their runs: those cost no time, so columns cost less than in a trained model. Without
biases, distances would be scattered, each a block of 64 keys for itself, and the same budget would attend several times
as much. :class:`Budgets` has figures of the sets that were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from indexes import BAND, BLOCK_M, SINKS, attended_keys, evenly_spaced
from qwen_sparse import ops
from qwen_sparse.engine.prefill import chunk_ends
from qwen_sparse.model.config import ModelConfig, SparseConfig
from qwen_sparse.model.decoder import Decoder

PAIR = (1000, 6096)
"""Columns and distances; the pair that is most frequent in the published budgets of Qwen2.5-7B-Instruct-1M."""
LAST_Q = 64
SAMPLED_LAYERS, SAMPLED_CHUNKS = 3, 6
STEPS = 14
"""Bisections of the factor, between sinks and band alone and everything; on a scale of logarithms."""


@dataclass(frozen=True)
class Budgets:
    """What was found, and the index sets that it gives on the sample of most keys; means over heads."""

    vertical_size: int
    slash_size: int
    keys: int
    density: float
    """Of the last row."""
    runs: float
    """Of slashes: distances at most 64 apart join (docs/vertical-slash.md)."""
    columns_outside_runs: float
    """Share of the columns that no run covers for the last row."""

    def for_model(self, config: ModelConfig) -> SparseConfig:
        """The same for every head."""
        return uniform_budgets(config.num_layers, config.num_heads, self.vertical_size, self.slash_size)


@dataclass(frozen=True)
class Sample:
    """What one layer selects from at the end of one prefill chunk."""

    q: Tensor
    k: Tensor
    options: dict[str, Any]

    @property
    def num_keys(self) -> int:
        return self.k.shape[0]

    def select(self, vertical_size: int, slash_size: int) -> tuple[Tensor, Tensor]:
        """The real selection."""
        sizes = {"vertical_size": vertical_size, "slash_size": slash_size}
        return ops.select_vertical_slash(self.q, self.k, **sizes, **self.options)

    def attended(self, columns: Tensor, slashes: Tensor) -> float:
        """Keys that the last row attends, mean over heads."""
        return float(attended_keys(columns, slashes, self.num_keys).double().mean())

    def describe(self, vertical_size: int, slash_size: int) -> Budgets:
        columns, slashes = self.select(vertical_size, slash_size)
        attended = self.attended(columns, slashes)
        outside = attended - self.attended(columns[:, :0], slashes)
        # Ascending and of one length, so no head is padded.
        runs = float((slashes.diff(dim=1) > BLOCK_M).sum(1).double().mean()) + 1
        share = outside / columns.shape[1]
        return Budgets(vertical_size, slash_size, self.num_keys, attended / self.num_keys, runs, share)


def uniform_budgets(num_layers: int, num_heads: int, vertical_size: int, slash_size: int) -> SparseConfig:
    """The same budget for every head."""
    return SparseConfig(
        vertical_sizes=((vertical_size,) * num_heads,) * num_layers,
        slash_sizes=((slash_size,) * num_heads,) * num_layers,
        threshold=0,
        last_q=LAST_Q,
    )


@torch.inference_mode()
def find_budgets(model: Decoder, seqlen: int, chunk_tokens: int, density: float, seed: int) -> Budgets:
    """Budgets for about ``density``: attended over causal pairs of a whole prompt of ``seqlen`` tokens.

    Raises:
        ValueError: sinks and band alone attend more.
    """
    samples = list(_samples(model, seqlen, chunk_tokens, seed))
    keys = sum(sample.num_keys for sample in samples)

    def sizes(factor: float) -> tuple[int, int]:
        vertical, slash = (round(factor * size) for size in PAIR)
        return max(SINKS, min(vertical, seqlen)), max(BAND, min(slash, seqlen))

    def expected(factor: float) -> float:
        # Each sample counts by its keys, as the rows of its chunk do.
        return sum(sample.attended(*sample.select(*sizes(factor))) for sample in samples) / keys

    low, high = BAND / PAIR[1] / 2, 2 * seqlen / PAIR[0]
    least = expected(low)
    if density < least:
        raise ValueError(
            f"density must be at least what {SINKS} columns and {BAND} distances attend of {seqlen} tokens, "
            f"{least:.2%}, got {density:.2%}"
        )
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if expected(middle) < density else (low, middle)
    return max(samples, key=lambda sample: sample.num_keys).describe(*sizes(low))


def _samples(model: Decoder, seqlen: int, chunk_tokens: int, seed: int) -> Iterator[Sample]:
    config, generator = model.config, torch.Generator(model.device).manual_seed(seed)
    dual_chunk = config.dual_chunk
    chunk_len = None if dual_chunk is None else dual_chunk.chunk_len
    scale = model.softmax_scale(seqlen)
    ends = chunk_ends(0, seqlen, chunk_tokens)
    chosen_ends = [ends[i] for i in sorted(set(evenly_spaced(len(ends), SAMPLED_CHUNKS)))]
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def projected(rows: int, bias: Tensor) -> Tensor:
        heads = bias.view(-1, config.head_dim)
        content = torch.empty(rows, *heads.shape, dtype=model.dtype, device=model.device)
        return content.normal_(generator=generator).add_(heads)

    for layer in sorted(set(evenly_spaced(config.num_layers, SAMPLED_LAYERS))):
        bias = model.weights.layers[layer].qkv_bias
        if bias is None:
            raise ValueError("find_budgets needs query and key biases (attention_bias), this model has none")
        q_bias, k_bias, _ = torch.split(bias, [q_size, kv_size, kv_size])
        positions = torch.arange(chosen_ends[-1], device=model.device)
        k = projected(len(positions), k_bias)
        _, k = ops.rotary(k, k, positions if chunk_len is None else positions % chunk_len, model.inv_freq)
        for end in chosen_ends:
            rows = min(LAST_Q, end)
            q, options = projected(rows, q_bias), {"softmax_scale": scale, "last_q": LAST_Q}
            where = positions[end - rows : end].contiguous()
            if dual_chunk is None or end <= dual_chunk.chunk_len:
                q, _ = ops.rotary(q, k[:rows], where, model.inv_freq)
            else:
                sizes = {"chunk_size": dual_chunk.chunk_size, "chunk_len": dual_chunk.chunk_len}
                rotated = ops.rotary(q, k[:rows], where, model.inv_freq, critical_rows=rows, **sizes)
                assert isinstance(rotated, ops.DualChunkRotary)
                q = rotated.q_intra
                critical = {"q_succ": rotated.q_succ_critical, "q_inter": rotated.q_inter_critical}
                options |= {**critical, "chunk_len": chunk_len}
            yield Sample(q, k[:end], options)
