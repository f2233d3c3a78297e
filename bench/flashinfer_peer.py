"""flashinfer as a peer on GPUs, where it is installed: dense and block-sparse prefill, decode over pages.

Its documented interface (single_prefill_with_kv_cache, VariableBlockSparseAttentionWrapper,
BatchDecodeWithPagedKVCacheWrapper). It plans on the host once for many runs and compiles a kernel before its first run:
both happen here or in a first call, outside of what is timed. Anything of it may fail; callers report what did.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from indexes import BLOCK_M

WORKSPACE_BYTES = 512 * 2**20  # it recommends 128 MiB; long sequences of many blocks want more


def dense_prefill(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Causal attention of ``[seqlen, heads, head_dim]`` tensors; the result is like q."""
    flashinfer = import_module("flashinfer")
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)


def block_sparse_prefill(q: Tensor, k: Tensor, v: Tensor, occupied: Tensor) -> Callable[[], Tensor]:
    """Causal attention over whole blocks of 64 rows and 64 keys; the result is like q.

    flashinfer's masks belong to kv heads, and ours to query heads, so each query head is handed keys and values of its
    own. A block of rows sees the keys of its blocks as one short sequence that ends where the rows do, so causality
    inside of the diagonal block, which must be occupied, is flashinfer's usual one.

    Args:
        q: ``[seqlen, num_heads, head_dim]``.
        k: ``[seqlen, num_kv_heads, head_dim]``.
        v: like k.
        occupied: bool ``[num_heads, blocks, blocks]``, none after the diagonal.
    """
    flashinfer = import_module("flashinfer")
    seqlen, heads, head_dim = q.shape
    listed = int(occupied.sum()) * BLOCK_M
    if listed >= 2**31:
        raise ValueError(f"plan() lists every key of every block of rows with 32-bit offsets, here {listed} of them")
    group = heads // k.shape[1]
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(_workspace(q.device))
    starts = torch.arange(0, seqlen, BLOCK_M, device=q.device)
    sizes = (seqlen - starts).clamp(max=BLOCK_M).int().expand(heads, -1).contiguous()
    wrapper.plan(occupied, sizes, sizes, heads, heads, head_dim, causal=True, q_data_type=q.dtype)
    by_head = [q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)]
    by_head = [x.transpose(0, 1).contiguous() for x in by_head]
    return lambda: wrapper.run(*by_head).transpose(0, 1)


def paged_decode(
    block_table: Tensor, last_page_len: int, page_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Decode of one sequence in bfloat16.

    Args:
        block_table: int32 ``[1, pages of the sequence]``.
        last_page_len: keys on the last of them.
        page_size: keys on the others.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: channels per head.

    Returns:
        A function of q ``[1, 1, num_heads, head_dim]`` and of keys and values ``[num_pages, page_size, num_kv_heads,
        head_dim]``, whose result is like q.
    """
    flashinfer = import_module("flashinfer")
    device = block_table.device
    # Tensor cores: what it recommends for grouped queries, and all that it has for groups such as 7.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=True)
    indptr, last = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in ([0, block_table.shape[1]], [last_page_len])
    )
    wrapper.plan(
        indptr,
        block_table[0].int(),
        last,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    return lambda q, k, v: wrapper.run(q[:, 0], (k, v))[:, None]


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
