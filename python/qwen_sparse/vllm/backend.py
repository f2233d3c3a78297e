"""The attention backend that layers with a Dual Chunk Attention config get: names, sizes of pages, classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from ..model.config import HEAD_DIMS, PAGE_SIZE
from .pages import int8_row_bytes
from .support import INT8

__all__ = ["DualChunkBackend"]


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
