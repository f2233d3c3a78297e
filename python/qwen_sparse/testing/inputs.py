"""Seeded inputs for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_indexes", "random_qkv"]


def random_qkv(
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal ``q [seqlen_q, num_heads, head_dim]`` and ``k, v [seqlen_k, num_kv_heads, head_dim]``, drawn on
    ``device`` (the CPU when None; other devices draw other numbers)."""
    generator = torch.Generator(device or "cpu").manual_seed(seed)

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, head_dim, generator=generator, device=generator.device).to(dtype)

    return normal(seqlen_q, num_heads), normal(seqlen_k, num_kv_heads), normal(seqlen_k, num_kv_heads)


def random_indexes(num_heads: int, num_keys: int, sizes: list[int], *, seed: int = 0) -> Tensor:
    """int32 ``[num_heads, max(sizes)]``: head h holds ``sizes[h % len(sizes)]`` ascending indexes, then -1."""
    generator = torch.Generator().manual_seed(seed)
    indexes = torch.full((num_heads, max(sizes)), -1, dtype=torch.int32)
    for head in range(num_heads):
        count = min(sizes[head % len(sizes)], num_keys)
        chosen = torch.randperm(num_keys, generator=generator)[:count].sort().values
        indexes[head, :count] = chosen.to(torch.int32)
    return indexes
