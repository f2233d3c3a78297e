"""The rotary embedding of Dual Chunk Attention layers: keys are rotated, queries are left to the attention backend.

A query has three rotations (five with those that selection needs). vLLM's own class hands them over side by side, five
times the memory of the queries; the backend has the positions and rotates queries as it needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.rotary_embedding.dual_chunk_rope import DualChunkRotaryEmbedding

from ..model import rope
from .support import check_version

__all__ = ["KeyRotaryEmbedding", "replace_rotary_embedding", "rotate_keys"]


class KeyRotaryEmbedding(DualChunkRotaryEmbedding):
    """Rotates keys at their position modulo ``chunk_len`` and returns queries as they came."""

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position_embeddings: int,
        base: float,
        is_neox_style: bool,
        dtype: torch.dtype,
        chunk_size: int,
        local_size: int,
        **_: Any,
    ) -> None:
        check_version()
        CustomOp.__init__(self)  # the parent's would put tables of cosines on a GPU
        if rotary_dim != head_size or not is_neox_style:
            raise ValueError(
                "qwen_sparse: Dual Chunk Attention needs rotary embedding of whole heads in half-split layout, got "
                f"rotary_dim = {rotary_dim} of head_size = {head_size}, is_neox_style = {is_neox_style}"
            )
        self.head_size = head_size
        self.chunk_size = chunk_size
        self.local_size = local_size
        self.chunk_len = chunk_size - local_size
        self.register_buffer("inv_freq", rope.plain_frequencies(base, head_size), persistent=False)

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``query`` itself, and ``key [n, num_kv_heads * head_size]`` rotated; ``positions`` is int64 ``[n]``."""
        if offsets is not None:
            positions = positions + offsets
        heads = key.view(*key.shape[:-1], -1, self.head_size)
        return query, rotate_keys(heads, positions % self.chunk_len, self.inv_freq).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"head_size={self.head_size}, chunk_size={self.chunk_size}, local_size={self.local_size}"


def rotate_keys(keys: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Keys ``[n, num_kv_heads, head_size]`` rotated at int64 ``positions [n]``."""
    rotated: Tensor = torch.ops.qwen_sparse.rotary(keys, keys[:, :0], positions, inv_freq, 1.0)[0]
    return rotated


def replace_rotary_embedding() -> None:
    """Register the class as vLLM's out-of-tree version of ``DualChunkRotaryEmbedding``."""
    registered = op_registry_oot.get(DualChunkRotaryEmbedding.__name__)
    if registered is KeyRotaryEmbedding:
        return
    if registered is not None:
        raise AttributeError(f"DualChunkRotaryEmbedding is already replaced by {registered.__module__}")
    DualChunkRotaryEmbedding.register_oot(KeyRotaryEmbedding)
