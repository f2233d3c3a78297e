"""The layout of vLLM's pages for Dual Chunk Attention layers.

16-bit and float32 pages are vLLM's, ``[blocks, num_kv_heads, block_size, 2 head_size]``, K then V. Pages in int8 hold
one row per token, ``[blocks, 1, block_size, bytes]``: K of all kv heads, V of all kv heads, then the float32 scales of
K and of V, padded to a multiple of 16 bytes. Ops take strided views of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.kv_cache import LayerPages

__all__ = ["int8_row_bytes", "split_cache"]

_ROW_ALIGNMENT = 16  # bytes: what CUDA kernels load at a time


def int8_row_bytes(num_kv_heads: int, head_size: int) -> int:
    """Bytes per token of an int8 page: values and scales of K and V, padded."""
    content = 2 * num_kv_heads * (head_size + 4)
    return -(-content // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def split_cache(kv_cache: Tensor, num_kv_heads: int, head_size: int) -> LayerPages:
    """K, V and scales of one layer's cache, as views ``[blocks, block_size, num_kv_heads(, head_size)]``."""
    if kv_cache.dtype != torch.int8:
        heads = kv_cache.transpose(1, 2)
        return LayerPages(heads[..., :head_size], heads[..., head_size:], None, None)
    rows, size = kv_cache[:, 0], num_kv_heads * head_size
    values = rows[..., : 2 * size].view(*rows.shape[:2], 2 * num_kv_heads, head_size)
    scales = rows.view(torch.float32)[..., size // 2 :]  # behind 2 size bytes
    return LayerPages(
        values[:, :, :num_kv_heads],
        values[:, :, num_kv_heads:],
        scales[..., :num_kv_heads],
        scales[..., num_kv_heads : 2 * num_kv_heads],
    )
