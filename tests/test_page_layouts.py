"""Pages as vLLM lays them out, taken as strided views: the results are those of contiguous pages, bit for bit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qwen_sparse import ops

PAGES, PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM, KEYS = 12, 16, 6, 3, 64, 150


class Pages(NamedTuple):
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def contiguous(dtype: torch.dtype) -> Pages:
    shape = (PAGES, PAGE_SIZE, KV_HEADS)
    values = [torch.zeros(*shape, HEAD_DIM, dtype=dtype) for _ in range(2)]
    return Pages(*values, *([torch.zeros(shape), torch.zeros(shape)] if dtype == torch.int8 else []))


def side_by_side(dtype: torch.dtype) -> Pages:
    """``[pages, num_kv_heads, page_size, 2 head_dim]``: a head's keys and values beside each other."""
    cache = torch.zeros(PAGES, KV_HEADS, PAGE_SIZE, 2 * HEAD_DIM, dtype=dtype).transpose(1, 2)
    return Pages(cache[..., :HEAD_DIM], cache[..., HEAD_DIM:])


def row_by_row(_: torch.dtype) -> Pages:
    """``[pages, page_size, bytes]``: int8 keys of all heads, values of all heads, scales of both, padding."""
    size = KV_HEADS * HEAD_DIM
    rows = torch.zeros(PAGES, PAGE_SIZE, 2 * size + 32, dtype=torch.int8)
    values = rows[..., : 2 * size].view(PAGES, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM)
    scales = rows.view(torch.float32)[..., size // 2 :]
    return Pages(
        values[:, :, :KV_HEADS], values[:, :, KV_HEADS:], scales[..., :KV_HEADS], scales[..., KV_HEADS : 2 * KV_HEADS]
    )


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(side_by_side, torch.bfloat16), (row_by_row, torch.int8)],
    ids=["bfloat16, K beside V", "int8, row by row"],
)
def test_views_of_pages(layout: type[Pages], dtype: torch.dtype, kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(KEYS, KV_HEADS, HEAD_DIM, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(1, 2, HEADS, HEAD_DIM, generator=generator).bfloat16()
    block_table = torch.randperm(PAGES, generator=generator).int()
    slots = block_table.long().repeat_interleave(PAGE_SIZE)[:KEYS] * PAGE_SIZE + torch.arange(KEYS) % PAGE_SIZE
    inv_freq = 1e4 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    bias = torch.randn(KV_HEADS, HEAD_DIM, generator=generator)
    is_int8 = dtype == torch.int8
    with_bias = {"k_bias": bias, "inv_freq": inv_freq} if is_int8 else {}
    results = []
    for pages in (contiguous(dtype), layout(dtype)):
        scales = {"k_scale": pages.k_scale, "v_scale": pages.v_scale}
        positions = torch.arange(KEYS) % 64 if is_int8 else None
        ops.store_kv(k, v, pages.k, pages.v, slots, positions=positions, **scales, **with_bias)
        gathered = torch.empty_like(k), torch.empty_like(v)
        ops.gather_kv(pages.k, pages.v, block_table, *gathered, chunk_len=64, **scales, **with_bias)
        out = ops.decode_attention(
            q,
            pages.k,
            pages.v,
            block_table[None],
            torch.tensor([KEYS], dtype=torch.int32),
            q_succ=q,
            q_inter=q,
            chunk_len=64,
            **scales,
            **with_bias,
        )
        results.append((*gathered, out))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert float((results[0][0].float() - k.float()).abs().max()) < 0.05
