"""Shape functions of the ops, for ``torch.compile`` and ``opcheck``: empty outputs, contiguous as the kernels'."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__: list[str] = []

F = TypeVar("F", bound=Callable[..., object])


def _fake(name: str) -> Callable[[F], F]:
    """``torch.library.register_fake`` for functions of tensors on one device.

    Real tensors get here too where one among them is on the meta device.
    """

    def register(function: F) -> F:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def shapes(*arguments: object) -> object:
            tensors = [(n, a) for n, a in zip(names, arguments, strict=False) if isinstance(a, Tensor)]
            first_name, first = tensors[0]
            for other_name, other in tensors:
                if other.device != first.device:
                    raise ValueError(
                        f"{name}: {other_name} must be on the device of {first_name} ({first.device}), "
                        f"got {other.device}"
                    )
            return function(*arguments)

        torch.library.register_fake(f"qwen_sparse::{name}", shapes)
        return function

    return register


def _min(a: int, b: int) -> int:
    """Minimum of possibly symbolic sizes."""
    smaller: int = torch.sym_min(a, b)  # type: ignore[no-untyped-call]
    return smaller


def _attention_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` like q and float32 ``lse`` without the head dimension."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    return _attention_outputs(q)


@_fake("vertical_slash_attention")
def _vertical_slash_attention(
    q: Tensor, k: Tensor, v: Tensor, vertical_indexes: Tensor, slash_indexes: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_attention_outputs(q), q.new_empty(q.shape[1], dtype=torch.int64))


@_fake("dual_chunk_attention")
def _dual_chunk_attention(
    q_intra: Tensor,
    q_succ: Tensor,
    q_inter: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_len: int,
    vertical_indexes: Tensor | None,
    slash_indexes: Tensor | None,
    block_groups: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_attention_outputs(q_intra), q_intra.new_empty(q_intra.shape[1], dtype=torch.int64))


@_fake("block_group_attention")
def _block_group_attention(
    q: Tensor, k: Tensor, v: Tensor, block_groups: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_attention_outputs(q), q.new_empty(q.shape[1], dtype=torch.int64))


@_fake("select_block_groups")
def _select_block_groups(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    softmax_scale: float,
    q_succ: Tensor | None,
    q_inter: Tensor | None,
    chunk_len: int | None,
) -> tuple[Tensor, Tensor]:
    words = (k.shape[0] + 511) // 512
    return q.new_empty((*thresholds.shape, words), dtype=torch.int32), torch.empty_like(thresholds)


@_fake("select_vertical_slash")
def _select_vertical_slash(
    q: Tensor,
    k: Tensor,
    vertical_size: Sequence[int],
    slash_size: Sequence[int],
    last_q: int,
    softmax_scale: float,
    q_succ: Tensor | None,
    q_inter: Tensor | None,
    chunk_len: int | None,
) -> tuple[Tensor, Tensor]:
    def indexes(sizes: Sequence[int]) -> Tensor:
        return q.new_empty(q.shape[1], _min(max(sizes), k.shape[0]), dtype=torch.int32)

    return indexes(vertical_size), indexes(slash_size)


@_fake("vertical_slash_scores")
def _vertical_slash_scores(
    q: Tensor,
    k: Tensor,
    last_q: int,
    softmax_scale: float,
    q_succ: Tensor | None,
    q_inter: Tensor | None,
    chunk_len: int | None,
) -> tuple[Tensor, Tensor]:
    shape = q.shape[1], k.shape[0]
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@_fake("top_indexes")
def _top_indexes(scores: Tensor, sizes: Sequence[int], num_forced: int) -> Tensor:
    return scores.new_empty(scores.shape[0], _min(max(sizes), scores.shape[1]), dtype=torch.int32)


@_fake("rotary")
def _rotary(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, attention_factor: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_fake("rotary_dual_chunk")
def _rotary_dual_chunk(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    attention_factor: float,
    chunk_size: int,
    chunk_len: int,
    critical_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    critical = (_min(critical_rows, q.shape[0]), *q.shape[1:])
    q_intra, q_succ, q_inter = (q.new_empty(q.shape) for _ in range(3))
    return q_intra, q_succ, q_inter, k.new_empty(k.shape), q.new_empty(critical), q.new_empty(critical)


@_fake("quantize_kv")
def _quantize_kv(
    k: Tensor,
    v: Tensor,
    k_bias: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    attention_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)

    return (*quantized(k), *quantized(v))


@_fake("dequantize_kv")
def _dequantize_kv(
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    k_bias: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    attention_factor: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)


@_fake("store_kv")
def _store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_bias: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    attention_factor: float,
) -> None:
    return None


@_fake("gather_kv")
def _gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_bias: Tensor | None,
    inv_freq: Tensor | None,
    attention_factor: float,
    chunk_len: int | None,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    return None


@_fake("decode_attention")
def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_bias: Tensor | None,
    inv_freq: Tensor | None,
    attention_factor: float,
    q_succ: Tensor | None,
    q_inter: Tensor | None,
    chunk_len: int | None,
    softmax_scale: float,
    scale_factors: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return _attention_outputs(q)
