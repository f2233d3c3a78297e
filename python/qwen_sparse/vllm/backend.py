"""The attention backend that layers with a Dual Chunk Attention config get: names, cache layout, classes.

16-bit and float32 pages are vLLM's, ``[blocks, num_kv_heads, block_size, 2 head_size]``, K then V. Pages in int8 hold
one row per token, ``[blocks, 1, block_size, bytes]``: K of all kv heads, V of all kv heads, then the float32 scales of
K and of V, padded to a multiple of 16 bytes. Ops take strided views of both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from ..config import HEAD_DIMS, PAGE_SIZE
from ..kv_cache import LayerPages
from .support import INT8

__all__ = ["DualChunkBackend", "split_cache"]

_ROW_ALIGNMENT = 16  # bytes: what CUDA kernels load at a time


class DualChunkBackend(AttentionBackend):
    """See the module."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", INT8]

    @staticmethod
    def get_name() -> str:
        """The name of vLLM's slot for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """What runs a layer."""
        from .attention import DualChunkImpl

        return DualChunkImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """What prepares a batch."""
        from .metadata import DualChunkMetadataBuilder

        return DualChunkMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any size works; multiples of 16 keep tables short."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """128 tokens: a million tokens in blocks of 16 would be a table of 63,000 entries per request."""
        return PAGE_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """64 and 128."""
        return list(HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Rows of a kv head lie together within a block."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Room for the scales in pages of int8."""
        if spec.kv_quant_mode != KVQuantMode.INT8_PER_TOKEN_HEAD or spec.state_content_bytes is not None:
            return spec
        return replace(spec, num_head_slots=1, state_content_bytes=int8_row_bytes(spec.num_kv_heads, spec.head_size))


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
