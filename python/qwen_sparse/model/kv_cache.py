"""Paged KV cache: pages of 128 tokens in the model's dtype or in int8 with one scale per token and kv head.

``KVPool`` holds the pages of every layer, ``PagedKVCache`` is one sequence in some of them. A cache that was made alone
has a pool to itself, which grows with it; sequences that are served together share one.

Attention always reads keys and values back from the cache, those of the current prefill chunk too, so int8
results do not depend on where a prompt was cut. Memory is O(layers x tokens); one workspace of O(tokens),
shared by all layers, holds dequantised keys and values during an int8 prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..base.arguments import check_integer
from ..kernels import ops
from .config import PAGE_SIZE, ModelConfig

__all__ = ["KVPool", "KVRotation", "LayerPages", "PagedKVCache", "Slots", "kv_cache_bytes", "resolve_kv_cache_dtype"]

_GROWTH = 8  # an append beyond the reserved pages adds at least 1/8 of them: O(1) copies per token


class _BiasArguments(TypedDict, total=False):
    """The keyword arguments that store_kv, gather_kv and decode_attention need when keys carry a bias."""

    k_bias: Tensor
    inv_freq: Tensor
    attention_factor: float


class LayerPages(NamedTuple):
    """The pools of one layer, as :func:`qwen_sparse.ops.decode_attention` takes them."""

    k: Tensor
    """``[num_pages, 128, num_kv_heads, head_dim]``, model dtype or int8."""
    v: Tensor
    k_scale: Tensor | None
    """float32 ``[num_pages, 128, num_kv_heads]``; None unless int8."""
    v_scale: Tensor | None


class Slots(NamedTuple):
    """Where the keys and values of a step go, the same in every layer; int64 ``[n]`` each, on the cache's device."""

    positions: Tensor
    """In the sequence."""
    rotations: Tensor
    """The positions that keys are rotated at: those in the chunk under Dual Chunk Attention."""
    slot_mapping: Tensor
    """As :func:`qwen_sparse.ops.store_kv` takes it."""


@dataclass(frozen=True)
class KVRotation:
    """How keys were rotated: what int8 storage takes off them and adds back (the rotated bias)."""

    inv_freq: Tensor
    """float64 ``[head_dim / 2]``."""
    attention_factor: float = 1.0
    chunk_len: int | None = None
    """Keys are rotated at their position modulo this (Dual Chunk Attention); None: at their position."""
    k_bias: Sequence[Tensor] | None = None
    """By layer: unrotated key bias, float32 ``[num_kv_heads, head_dim]``."""


def resolve_kv_cache_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Storage dtype: ``"auto"`` is the model's, ``"int8"`` is int8, ``"bfloat16"`` needs a bfloat16 model.

    Raises:
        ValueError: any other name, or bfloat16 storage for a model of another dtype.
    """
    if kv_cache_dtype == "auto":
        return dtype
    if kv_cache_dtype == "int8":
        return torch.int8
    if kv_cache_dtype != "bfloat16":
        raise ValueError(f"kv_cache_dtype must be 'auto', 'bfloat16' or 'int8', got {kv_cache_dtype!r}")
    if dtype != torch.bfloat16:
        raise ValueError(
            "kv_cache_dtype 'bfloat16' needs a model in bfloat16 (16-bit pages hold the model's dtype), "
            f"got dtype {str(dtype).removeprefix('torch.')}; use 'auto' or 'int8'"
        )
    return torch.bfloat16


def kv_cache_bytes(config: ModelConfig, seqlen: int, storage_dtype: torch.dtype) -> int:
    """Bytes of the pages that hold ``seqlen`` tokens in every layer, scales included."""
    values = 2 * config.num_kv_heads * config.head_dim * storage_dtype.itemsize
    scales = 2 * config.num_kv_heads * 4 if storage_dtype == torch.int8 else 0
    return -(-seqlen // PAGE_SIZE) * PAGE_SIZE * config.num_layers * (values + scales)


class KVPool:
    """Pages of keys and values, by layer. Which sequence has which page is up to its users.

    Args:
        config: sizes of the model.
        dtype: compute dtype; also the storage dtype when ``kv_cache_dtype`` is "auto".
        kv_cache_dtype: "auto", "bfloat16" or "int8".
        num_pages: pages to make.
        rotation: how keys were rotated; required for int8.
        device: where the pages live.

    Raises:
        ValueError: a dtype rule is broken, or ``rotation`` is missing for int8.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype | None = None,
        kv_cache_dtype: str = "auto",
        num_pages: int = 0,
        rotation: KVRotation | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.dtype = config.dtype if dtype is None else dtype
        self.storage_dtype = resolve_kv_cache_dtype(kv_cache_dtype, self.dtype)
        if self.is_int8 and rotation is None:
            raise ValueError("KVPool: rotation must be given for kv_cache_dtype 'int8', got None")
        self.rotation = rotation
        self.device = torch.empty(
            0, device=device
        ).device  # with an index: growing must not follow the current CUDA device
        self.num_pages = num_pages
        self._layers = [self._empty_pages(num_pages) for _ in range(config.num_layers)]
        self._workspace: tuple[Tensor, Tensor] | None = None

    @property
    def is_int8(self) -> bool:
        """Whether pages are int8."""
        return self.storage_dtype == torch.int8

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, without the workspace."""
        return sum(pool.nbytes for pages in self._layers for pool in pages if pool is not None)

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of the workspace; 0 while keys and values can be read in place."""
        return 0 if self._workspace is None else sum(buffer.nbytes for buffer in self._workspace)

    def _empty_pages(self, num_pages: int) -> LayerPages:
        shape = (num_pages, PAGE_SIZE, self.config.num_kv_heads)

        def values() -> Tensor:
            return torch.empty(*shape, self.config.head_dim, dtype=self.storage_dtype, device=self.device)

        def scales() -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32, device=self.device) if self.is_int8 else None

        return LayerPages(values(), values(), scales(), scales())

    @torch.inference_mode()
    def grow(self, num_pages: int, keep: int) -> None:
        """Have ``num_pages`` pages; never fewer. Layers are copied one at a time, of each the first ``keep`` pages."""
        for layer, old in enumerate(self._layers):
            if old.k.shape[0] >= num_pages:  # an interrupted call got this far
                continue
            new = self._empty_pages(num_pages)
            for target, source in zip(new, old, strict=True):
                if target is not None and source is not None:
                    target[:keep].copy_(source[:keep])
            self._layers[layer] = new
        self.num_pages = max(self.num_pages, num_pages)

    def pages(self, layer: int) -> LayerPages:
        """The pages of one layer, for attention that reads them through a block table."""
        return self._layers[layer]

    @torch.inference_mode()
    def slots(self, positions: Tensor, block_table: Tensor) -> Slots:
        """Where tokens at ``positions`` go. Nothing here waits for the device.

        Args:
            positions: int64 ``[batch, n]``; within the pages of their sequence.
            block_table: int32 ``[batch, max_pages]``, page numbers of each sequence in order.

        Returns:
            Slots of all rows, ``[batch * n]``.
        """
        pages = block_table.gather(1, positions // PAGE_SIZE).long()
        slot_mapping = (pages * PAGE_SIZE + positions % PAGE_SIZE).flatten()
        positions = positions.flatten()
        chunk_len = self.rotation.chunk_len if self.rotation else None
        return Slots(positions, positions if chunk_len is None else positions % chunk_len, slot_mapping)

    @torch.inference_mode()
    def append(self, layer: int, k: Tensor, v: Tensor, slots: Slots) -> None:
        """Write the keys and values of one step.

        Args:
            layer: layer number.
            k: rotated keys ``[n, num_kv_heads, head_dim]``.
            v: values, shaped like ``k``.
            slots: where they go.

        Raises:
            ValueError: a wrong shape, or (on the CPU) a slot that does not exist.
        """
        shape = (self.config.num_kv_heads, self.config.head_dim)
        if k.shape[1:] != shape or v.shape != k.shape:
            raise ValueError(
                f"append: k and v must have shape [n, num_kv_heads, head_dim] = [*, {shape[0]}, {shape[1]}], "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        bias, pages = self.bias_arguments(layer), self._layers[layer]
        ops.store_kv(
            k,
            v,
            pages.k,
            pages.v,
            slots.slot_mapping,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            positions=slots.rotations if bias else None,
            **bias,
        )

    def bias_arguments(self, layer: int) -> _BiasArguments:
        """What the ops that read or write int8 pages need to know of the layer's key bias; empty without one."""
        rotation = self.rotation
        if not self.is_int8 or rotation is None or rotation.k_bias is None:
            return {}
        return {
            "k_bias": rotation.k_bias[layer],
            "inv_freq": rotation.inv_freq,
            "attention_factor": rotation.attention_factor,
        }

    @torch.inference_mode()
    def gather(self, layer: int, pages: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's first tokens in the workspace, which all layers and sequences share.

        Args:
            layer: layer number.
            pages: int32 ``[n]``, the sequence's pages in order.
            num_tokens: how many tokens, within these pages.

        Returns:
            Two tensors ``[num_tokens, num_kv_heads, head_dim]`` in the compute dtype; the next call overwrites them.
        """
        stored = self._layers[layer]
        k, v = (buffer[:num_tokens] for buffer in self._buffers(pages.shape[0] * PAGE_SIZE))
        ops.gather_kv(
            stored.k,
            stored.v,
            pages,
            k,
            v,
            k_scale=stored.k_scale,
            v_scale=stored.v_scale,
            chunk_len=self.rotation.chunk_len if self.rotation else None,
            **self.bias_arguments(layer),
        )
        return k, v

    def _buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        shape = (num_tokens, self.config.num_kv_heads, self.config.head_dim)
        if self._workspace is None or self._workspace[0].shape != shape:
            self._workspace = None  # free before the next one is made
            k, v = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            self._workspace = k, v
        return self._workspace

    def release_workspace(self) -> None:
        """Free the workspace; prefill calls it at its end, since decoding reads pages."""
        self._workspace = None


class PagedKVCache:
    """Keys and values of one sequence, by layer, in pages of 128 tokens.

    A prefill chunk is written layer by layer with :meth:`KVPool.append`, at the :meth:`next_slots`, and becomes part of
    the sequence with :meth:`commit`; until then :attr:`seqlen` does not move, so that an interrupt or an error in
    between leaves the cache as it was after the last whole chunk.

    Made by the constructor, it is a sequence in pages of a pool that others share: it gets more pages through
    :meth:`extend` and never grows the pool. Made by :meth:`owning`, it has the pool to itself.

    Args:
        pool: the pages.
        pages: numbers of the sequence's pages, in order.
        seqlen: tokens that they hold already.

    Raises:
        ValueError: a page that does not exist or is given twice, or more tokens than the pages hold.
    """

    def __init__(self, pool: KVPool, pages: Sequence[int] = (), seqlen: int = 0) -> None:
        self.pool = pool
        self.block_table = torch.empty(1, 0, dtype=torch.int32, device=pool.device)
        """int32 ``[1, max_pages]``."""
        self._owns_pool = False
        self._pages: list[int] = []
        self._held: set[int] = set()
        self._consecutive = True
        self._seqlen = 0
        self._add(pages)
        self.commit(seqlen)

    @classmethod
    def owning(cls, pool: KVPool, capacity: int = 0) -> PagedKVCache:
        """A sequence that is alone in ``pool``, which grows with it.

        Args:
            pool: without pages.
            capacity: tokens to reserve now.

        Raises:
            ValueError: the pool has pages, or a negative capacity.
        """
        if pool.num_pages > 0:
            raise ValueError(f"owning: pool must have no pages yet, got {pool.num_pages}")
        cache = cls(pool)
        cache._owns_pool = True
        cache.reserve(capacity)
        return cache

    def _add(self, pages: Sequence[int]) -> None:
        if not all(0 <= page < self.pool.num_pages for page in pages):
            raise ValueError(f"pages must be in [0, num_pages = {self.pool.num_pages}), got {list(pages)}")
        if len(set(pages)) < len(pages) or not self._held.isdisjoint(pages):
            raise ValueError(f"pages must be distinct and new to the sequence, got {list(pages)}")
        self._consecutive &= all(b == a + 1 for a, b in pairwise([*self._pages[-1:], *pages]))
        self._pages += pages
        self._held.update(pages)
        added = torch.tensor([list(pages)], dtype=torch.int32, device=self.pool.device)
        self.block_table = torch.cat((self.block_table, added), dim=1)

    @property
    def _first(self) -> int:
        return self._pages[0] if self._pages else 0

    @property
    def seqlen(self) -> int:
        """Committed tokens."""
        return self._seqlen

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return len(self._pages) * PAGE_SIZE

    @property
    def nbytes(self) -> int:
        """Bytes of the sequence's pages (those reserved included), without the workspace."""
        return self.pool.nbytes * len(self._pages) // max(self.pool.num_pages, 1)

    def __repr__(self) -> str:
        name = str(self.pool.storage_dtype).removeprefix("torch.")
        return f"PagedKVCache(seqlen={self.seqlen}, capacity={self.capacity}, {name}, nbytes={self.nbytes})"

    def reserve(self, num_tokens: int) -> None:
        """Make room for ``num_tokens`` in total; never shrinks. Layers are copied one at a time.

        Raises:
            ValueError: a negative number, or more than the pages hold of a sequence in a shared pool.
        """
        num_tokens = check_integer("reserve: num_tokens", num_tokens, least=0)
        num_pages, old_pages = -(-num_tokens // PAGE_SIZE), len(self._pages)
        if num_pages <= old_pages:
            return
        if not self._owns_pool:
            raise ValueError(
                f"reserve: num_tokens must be at most {self.capacity}, what the sequence's pages of a shared pool hold "
                f"(extend it first), got {num_tokens}"
            )
        self.pool.grow(num_pages, keep=-(-self._seqlen // PAGE_SIZE))
        self._add(range(old_pages, num_pages))

    def extend(self, pages: Sequence[int]) -> None:
        """Use more pages of the shared pool, behind those the sequence has.

        Raises:
            ValueError: a page that does not exist, or a cache with a pool of its own.
        """
        if self._owns_pool:
            raise ValueError("extend: the cache must be one in a shared pool; this one has its own and grows by itself")
        self._add(pages)

    @torch.inference_mode()
    def next_slots(self, num_tokens: int) -> Slots:
        """Where the next ``num_tokens`` tokens go, behind the committed ones; makes room for them."""
        end = self._seqlen + num_tokens
        if end > self.capacity:
            self.reserve(max(end, self.capacity + self.capacity // _GROWTH) if self._owns_pool else end)
        positions = torch.arange(self._seqlen, end, device=self.pool.device)
        return self.pool.slots(positions[None], self.block_table)

    def commit(self, num_tokens: int) -> None:
        """Make ``num_tokens`` appended tokens part of the sequence; call it once every layer holds them.

        Raises:
            ValueError: a negative number, or more than fits the reserved pages.
        """
        free = self.capacity - self._seqlen
        self._seqlen += check_integer("commit: num_tokens", num_tokens, least=0, most=free)

    def truncate(self, num_tokens: int) -> None:
        """Drop every token from position ``num_tokens`` on; their pages stay reserved.

        Raises:
            ValueError: a number outside [0, seqlen].
        """
        self._seqlen = check_integer("truncate: num_tokens", num_tokens, least=0, most=self._seqlen)

    @torch.inference_mode()
    def workspace(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Contiguous keys and values of the first ``num_tokens`` tokens, ``[n, num_kv_heads, head_dim]``.

        A view of the pool when its pages hold the compute dtype and are consecutive. Otherwise the pool's workspace:
        the next call overwrites it.

        Raises:
            ValueError: more tokens than are reserved.
        """
        if not 0 <= num_tokens <= self.capacity:
            raise ValueError(f"workspace: num_tokens must be in [0, capacity = {self.capacity}], got {num_tokens}")
        if self.pool.is_int8 or not self._consecutive:
            return self.pool.gather(layer, self.block_table[0], num_tokens)
        stored, start = self.pool.pages(layer), self._first * PAGE_SIZE
        k, v = (pages.flatten(0, 1)[start : start + num_tokens] for pages in (stored.k, stored.v))
        return k, v
