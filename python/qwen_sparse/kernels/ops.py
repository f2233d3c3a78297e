"""Tensor ops: dense, sparse and dual-chunk attention, index selection, rotary embedding, int8 KV cache.

Layout is NHD, ``[seqlen, num_heads, head_dim]``, everywhere; ``head_dim`` is 64 or 128; ``bfloat16``, ``float16``
and ``float32`` are supported. Grouped-query attention reads kv head ``h // (num_heads / num_kv_heads)`` for query
head h. The last query row aligns with the last key: row r stands at position ``seqlen_k - seqlen_q + r``.
``lse`` is the natural-log sum of exponentials of the scaled scores, float32 ``[seqlen_q, num_heads]``.

Inputs may be strided as long as their last dimension is contiguous; outputs are contiguous. Arguments that break a
rule raise ``ValueError`` with the argument, the rule and the value. Ops run forward only (no autograd).

``qwen_sparse.reference`` holds the definition of each function, with the same arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C as _C  # registers torch.ops.qwen_sparse
from . import fake as fake  # and their shape functions

__all__ = [
    "DualChunkRotary",
    "attention",
    "block_group_attention",
    "decode_attention",
    "dequantize_kv",
    "dual_chunk_attention",
    "gather_kv",
    "quantize_kv",
    "rotary",
    "row_blocks",
    "select_block_groups",
    "select_vertical_slash",
    "store_kv",
    "vertical_slash_attention",
    "vertical_slash_scores",
]

_ops = torch.ops.qwen_sparse
_ARGUMENT_ERRORS = tuple(f"{name}: " for name in __all__)  # how the extension's messages about arguments begin


def _call(op: Any, *arguments: Any) -> Any:
    """Calls an operator of the extension.

    What it throws for a bad argument, std::invalid_argument, reaches Python as ValueError up to torch 2.14 and as
    RuntimeError from 2.15 on.
    """
    if torch.is_grad_enabled():
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.requires_grad:
                schema = getattr(torch.ops.qwen_sparse, op.__name__).default._schema
                raise ValueError(
                    f"{op.__name__}: {schema.arguments[index].name} must not require grad, since ops run forward only "
                    "(call them under torch.no_grad() or torch.inference_mode()), got requires_grad=True"
                )
    try:
        return op(*arguments)
    except RuntimeError as error:
        message = str(error)
        if message.startswith(_ARGUMENT_ERRORS):
            raise ValueError(message) from None
        raise


class DualChunkRotary(NamedTuple):
    """The rotations of Dual Chunk Attention for the rows of one call (see :func:`rotary`)."""

    q_intra: Tensor
    """``[n, num_heads, head_dim]``, rotated at the in-chunk index i."""
    q_succ: Tensor
    """Rotated at min(i + chunk_len, chunk_size)."""
    q_inter: Tensor
    """Rotated at min(2 chunk_len - 1, chunk_size)."""
    k: Tensor
    """``[n, num_kv_heads, head_dim]``, rotated at i."""
    q_succ_critical: Tensor
    """Last ``critical_rows`` rows at i + chunk_len, unclamped; for :func:`select_vertical_slash`."""
    q_inter_critical: Tensor
    """Last ``critical_rows`` rows at i + chunk_size, unclamped; for :func:`select_vertical_slash`."""


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if softmax_scale is None else float(softmax_scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention with an online softmax.

    Args:
        q: ``[seqlen_q, num_heads, head_dim]``.
        k: ``[seqlen_k, num_kv_heads, head_dim]``; ``num_heads`` is a multiple of ``num_kv_heads``.
        v: shaped like ``k``.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        causal: row p attends keys j <= p only.
        window: row p attends keys j > p - window only; None for no limit.
        return_lse: also return the log-sum-exp.

    Returns:
        ``out`` like ``q``, or ``(out, lse)``. A row that attends no key gets 0 and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride rule is broken.

    Example:
        >>> q = torch.randn(128, 4, 64, dtype=torch.bfloat16)
        >>> k = v = torch.randn(1024, 2, 64, dtype=torch.bfloat16)
        >>> attention(q, k, v).shape
        torch.Size([128, 4, 64])
    """
    out, lse = _call(_ops.attention, q, k, v, _scale(softmax_scale, q.shape[-1]), causal, window)
    return (out, lse) if return_lse else out


def vertical_slash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vertical_indexes: Tensor,
    slash_indexes: Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over vertical columns and slash diagonals (MInference, arXiv 2407.02490).

    Row p attends key j iff j <= p and j is a vertical index, or some slash index s has
    ``a - s <= j < a - s + 64`` with ``a = 64 * (p // 64)``.

    Args:
        q: ``[seqlen_q, num_heads, head_dim]``.
        k: ``[seqlen_k, num_kv_heads, head_dim]``.
        v: shaped like ``k``.
        vertical_indexes: int32 ``[num_heads, V]``: key columns, strictly increasing, then padded with -1.
        slash_indexes: int32 ``[num_heads, S]``: distances p - j, strictly increasing, then padded with -1.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the log-sum-exp over the attended keys.

    Returns:
        ``out`` like ``q``, or ``(out, lse)``. A row that attends no key gets 0 and -inf.

    Raises:
        ValueError: a shape or dtype rule is broken, or an index is unsorted or not in [0, seqlen_k).
    """
    out, lse, _ = _call(
        _ops.vertical_slash_attention, q, k, v, vertical_indexes, slash_indexes, _scale(softmax_scale, q.shape[-1])
    )
    return (out, lse) if return_lse else out


def row_blocks(seqlen_q: int, seqlen_k: int) -> int:
    """Number of blocks of 64 rows, by absolute position, that ``seqlen_q`` rows lie in, ending with the last key."""
    return 0 if seqlen_q == 0 else -(-seqlen_k // 64) - (seqlen_k - seqlen_q) // 64


def block_group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_groups: Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over groups of 16 keys, chosen for each head and block of 64 rows.

    Row p attends key j iff j <= p and the bit of group j // 16 is set in the words of its head and of row block
    p // 64. Bits of keys after a row, or past the last key, count nothing.

    Args:
        q: ``[seqlen_q, num_heads, head_dim]``.
        k: ``[seqlen_k, num_kv_heads, head_dim]``.
        v: shaped like ``k``.
        block_groups: int32 ``[num_heads, num_blocks, ceil(seqlen_k / 512)]``, as :func:`select_block_groups` returns
            them: bit i of word w stands for the keys ``16 (32 w + i) ... + 15``; ``num_blocks`` is
            :func:`row_blocks`, and the first block is that of the first row.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the log-sum-exp over the attended keys.

    Returns:
        ``out`` like ``q``, or ``(out, lse)``. A row that attends no key gets 0 and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride rule is broken.
    """
    out, lse, _ = _call(_ops.block_group_attention, q, k, v, block_groups, _scale(softmax_scale, q.shape[-1]))
    return (out, lse) if return_lse else out


def dual_chunk_attention(
    q_intra: Tensor,
    q_succ: Tensor,
    q_inter: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_len: int,
    vertical_indexes: Tensor | None = None,
    slash_indexes: Tensor | None = None,
    block_groups: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dual Chunk Attention (arXiv 2402.17463): one pass over inter-, successive- and intra-chunk keys, one softmax.

    A row in chunk n meets keys of its own chunk with ``q_intra`` (causally), of chunk n - 1 with ``q_succ`` and of
    all earlier ones with ``q_inter``. Dense when no indexes are given, else over the vertical-slash set or the block
    groups, which are the same sets as without DCA: columns, distances and groups are absolute.

    Args:
        q_intra, q_succ, q_inter: ``[seqlen_q, num_heads, head_dim]``, the rotations that :func:`rotary` returns.
        k: ``[seqlen_k, num_kv_heads, head_dim]``, rotated at position mod ``chunk_len``.
        v: shaped like ``k``.
        chunk_len: chunk_size - local_size; a multiple of 64.
        vertical_indexes, slash_indexes: as in :func:`vertical_slash_attention`; both or neither.
        block_groups: as in :func:`block_group_attention`; not together with indexes.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None. The temperature of prompts longer than
            the training length goes here, squared (``qwen_sparse.model.rope.dual_chunk_temperature``).
        return_lse: also return the log-sum-exp.

    Returns:
        ``out`` like ``q_intra``, or ``(out, lse)``.

    Raises:
        ValueError: a shape, dtype or index rule is broken, or ``chunk_len`` is not a positive multiple of 64.
    """
    out, lse, _ = _call(
        _ops.dual_chunk_attention,
        q_intra,
        q_succ,
        q_inter,
        k,
        v,
        chunk_len,
        vertical_indexes,
        slash_indexes,
        block_groups,
        _scale(softmax_scale, q_intra.shape[-1]),
    )
    return (out, lse) if return_lse else out


def _sizes(name: str, size: int | Sequence[int] | Tensor, num_heads: int) -> list[int]:
    values = size.tolist() if isinstance(size, Tensor) else size
    try:
        sizes = [operator.index(value) for value in (values if isinstance(values, Iterable) else [values] * num_heads)]
    except TypeError:
        raise ValueError(f"select_vertical_slash: {name} must be an int or hold ints, got {size!r}") from None
    if len(sizes) != num_heads:
        raise ValueError(
            f"select_vertical_slash: {name} must be an int or hold num_heads = {num_heads} sizes, got {len(sizes)}"
        )
    return sizes


def select_vertical_slash(
    q: Tensor,
    k: Tensor,
    *,
    vertical_size: int | Sequence[int] | Tensor,
    slash_size: int | Sequence[int] | Tensor,
    last_q: int = 64,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the columns and distances that the last rows attend most (MInference; Qwen2.5-1M "critical queries").

    The last ``last_q`` rows attend all keys causally. The score of a column is the sum of its weights over those
    rows; the score of a distance is the sum along its diagonal, distance 0 being the last row's own. Columns 0..29
    and distances 0..99 are forced. Two passes over the keys; no ``last_q x seqlen_k`` matrix is stored.

    Args:
        q: ``[seqlen_q, num_heads, head_dim]``; only the last ``last_q`` rows are read.
        k: ``[seqlen_k, num_kv_heads, head_dim]``.
        vertical_size, slash_size: how many to choose: one number, or one per head (sequence or int32 ``[num_heads]``).
            Clipped to ``seqlen_k``.
        last_q: number of rows that vote.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        q_succ, q_inter: the unclamped critical rotations under DCA (``rotary(...).q_succ_critical`` and
            ``.q_inter_critical``), at least ``min(last_q, seqlen_q)`` rows each.
        chunk_len: DCA chunk length; given together with ``q_succ`` and ``q_inter``.

    Returns:
        ``(vertical_indexes, slash_indexes)``, int32 ``[num_heads, max size]``, ascending, padded with -1. Equal
        scores go to the lower index.

    Raises:
        ValueError: a shape or dtype rule is broken, a size is negative, or DCA arguments are incomplete.
    """
    num_heads = q.shape[1]
    vertical, slash = _call(
        _ops.select_vertical_slash,
        q,
        k,
        _sizes("vertical_size", vertical_size, num_heads),
        _sizes("slash_size", slash_size, num_heads),
        last_q,
        _scale(softmax_scale, q.shape[-1]),
        q_succ,
        q_inter,
        chunk_len,
    )
    return vertical, slash


def vertical_slash_scores(
    q: Tensor,
    k: Tensor,
    *,
    last_q: int = 64,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`select_vertical_slash` chooses by: attention weights of the last rows, summed up.

    Args:
        q, k, last_q, softmax_scale, q_succ, q_inter, chunk_len: as of :func:`select_vertical_slash`.

    Returns:
        ``(vertical_scores, slash_scores)``, float32 ``[num_heads, seqlen_k]``: by column, and by distance from the
        last row's own key. Each sums up to the number of rows that vote.

    Raises:
        ValueError: a shape or dtype rule is broken, or DCA arguments are incomplete.
    """
    vertical, slash = _call(
        _ops.vertical_slash_scores, q, k, last_q, _scale(softmax_scale, q.shape[-1]), q_succ, q_inter, chunk_len
    )
    return vertical, slash


def select_block_groups(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    *,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the groups of 16 keys that each head and block of 64 rows attends, by what pooled rows and keys estimate.

    Rows and keys are averaged over each 16 positions (by absolute position, rounded to their dtype). A softmax over the
    pooled keys up to its own gives the weights of each pooled row; their mean over the (up to four) pooled rows of a
    block is the share of the block's attention that a group is estimated to hold. A block attends a group iff that
    share is at least ``16 * threshold``; and always the prompt's first 32 keys, its own and those of the block before.
    Costs 0.2 % of dense attention.

    Args:
        q: ``[seqlen_q, num_heads, head_dim]``; under DCA the intra-chunk rotation.
        k: ``[seqlen_k, num_kv_heads, head_dim]``, with ``seqlen_k >= seqlen_q``.
        thresholds: float32 ``[num_heads, num_blocks]``, ``num_blocks`` being :func:`row_blocks`: least share per key
            of a group that is attended; 0 for every causal group (dense).
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        q_succ, q_inter: like ``q``, the other rotations under DCA.
        chunk_len: DCA chunk length; given together with ``q_succ`` and ``q_inter``.

    Returns:
        ``(block_groups, kept)``: the bitmap that :func:`block_group_attention` takes, int32
        ``[num_heads, num_blocks, ceil(seqlen_k / 512)]``, and the share of attention that the chosen groups are
        estimated to hold, float32 ``[num_heads, num_blocks]``. A block whose shares are not numbers attends all.

    Raises:
        ValueError: a shape or dtype rule is broken, or DCA arguments are incomplete.
    """
    block_groups, kept = _call(
        _ops.select_block_groups, q, k, thresholds, _scale(softmax_scale, q.shape[-1]), q_succ, q_inter, chunk_len
    )
    return block_groups, kept


def rotary(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    attention_factor: float = 1.0,
    chunk_size: int | None = None,
    chunk_len: int | None = None,
    critical_rows: int = 64,
) -> tuple[Tensor, Tensor] | DualChunkRotary:
    """Rotary position embedding, half-split: channel c is paired with channel c + head_dim / 2.

    Angles are reduced in float64, so positions of several million keep full precision.

    Args:
        q: ``[n, num_heads, head_dim]``.
        k: ``[n, num_kv_heads, head_dim]``.
        positions: int64 ``[n]``, absolute positions.
        inv_freq: float64 ``[head_dim / 2]``, radians per position (``qwen_sparse.model.rope.inverse_frequencies``).
        attention_factor: factor on cos and sin (YaRN).
        chunk_size, chunk_len: given together, return all rotations of Dual Chunk Attention.
        critical_rows: how many of the last rows get the unclamped rotations that selection needs.

    Returns:
        ``(q, k)`` rotated, or a :class:`DualChunkRotary`.

    Raises:
        ValueError: a shape or dtype rule is broken, or only one of ``chunk_size`` and ``chunk_len`` is given.
    """
    if (chunk_size is None) != (chunk_len is None):
        raise ValueError(
            "rotary: chunk_size and chunk_len must be given together, "
            f"got chunk_size = {chunk_size}, chunk_len = {chunk_len}"
        )
    if chunk_size is None or chunk_len is None:
        rotated_q, rotated_k = _call(_ops.rotary, q, k, positions, inv_freq, attention_factor)
        return rotated_q, rotated_k
    return DualChunkRotary(
        *_call(
            _ops.rotary_dual_chunk, q, k, positions, inv_freq, attention_factor, chunk_size, chunk_len, critical_rows
        )
    )


def quantize_kv(
    k: Tensor,
    v: Tensor,
    *,
    k_bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise keys and values to int8, symmetric, one scale per token and kv head.

    Qwen2's key bias is huge in a few channels; what is stored is therefore k minus the bias rotated to the key's
    position, and :func:`dequantize_kv` and :func:`decode_attention` add it back exactly.

    Args:
        k: rotated keys ``[n, num_kv_heads, head_dim]``.
        v: values, shaped like ``k``.
        k_bias: unrotated bias of the key projection, float32 ``[num_kv_heads, head_dim]``; None for none.
        positions: int64 ``[n]``, the position each key was rotated at (j mod chunk_len under DCA); with ``k_bias``.
        inv_freq, attention_factor: as in :func:`rotary`; with ``k_bias``.

    Returns:
        ``(k_int8, k_scale, v_int8, v_scale)``; scales are float32 ``[n, num_kv_heads]``, value = int8 * scale.

    Raises:
        ValueError: a shape or dtype rule is broken, or ``k_bias`` lacks ``positions`` or ``inv_freq``.
    """
    k_int8, k_scale, v_int8, v_scale = _call(_ops.quantize_kv, k, v, k_bias, positions, inv_freq, attention_factor)
    return k_int8, k_scale, v_int8, v_scale


def dequantize_kv(
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    k_bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`quantize_kv`.

    Args:
        k, v: int8 ``[n, num_kv_heads, head_dim]``.
        k_scale, v_scale: float32 ``[n, num_kv_heads]``.
        dtype: of the result: bfloat16, float16 or float32.
        k_bias, positions, inv_freq, attention_factor: the values given to :func:`quantize_kv`.

    Returns:
        ``(k, v)`` in ``dtype``.

    Raises:
        ValueError: a shape or dtype rule is broken.
    """
    full_k, full_v = _call(
        _ops.dequantize_kv, k, k_scale, v, v_scale, k_bias, positions, inv_freq, attention_factor, dtype
    )
    return full_k, full_v


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
) -> None:
    """Write keys and values to slots of a paged cache; where it is int8, quantised as by :func:`quantize_kv`.

    Args:
        k: rotated keys ``[n, num_kv_heads, head_dim]``.
        v: values, shaped like ``k``.
        k_cache, v_cache: written; ``[num_pages, page_size, num_kv_heads, head_dim]``, dtype of ``k`` or int8.
        slot_mapping: int64 ``[n]``: row i goes to row ``slot % page_size`` of page ``slot // page_size``. Slots must be
            distinct: what two rows leave in one slot is undefined. On a GPU, rows without an existing slot are skipped.
        k_scale, v_scale: written; float32 ``[num_pages, page_size, num_kv_heads]``; required for int8 caches.
        k_bias, positions, inv_freq, attention_factor: as in :func:`quantize_kv`; for int8 caches only.

    Raises:
        ValueError: a shape or dtype rule is broken, or (on the CPU) a slot does not exist.
    """
    _call(
        _ops.store_kv,
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k_scale,
        v_scale,
        k_bias,
        positions,
        inv_freq,
        attention_factor,
    )


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
    chunk_len: int | None = None,
) -> None:
    """Copy the first n keys and values of a paged cache to contiguous buffers; int8 is dequantised on the way.

    Args:
        k_cache, v_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, dtype of ``k_out`` or int8.
        block_table: int32 ``[max_pages]``, page numbers of the sequence in order.
        k_out, v_out: written; ``[n, num_kv_heads, head_dim]``, bfloat16, float16 or float32, whole rows contiguous.
        k_scale, v_scale: float32 ``[num_pages, page_size, num_kv_heads]``; required for int8 caches.
        k_bias: the bias that :func:`quantize_kv` subtracted, float32 ``[num_kv_heads, head_dim]``; with ``inv_freq``.
        inv_freq, attention_factor: as in :func:`rotary`; with ``k_bias``.
        chunk_len: keys were rotated at their position modulo this (Dual Chunk Attention); None: at their position.

    Raises:
        ValueError: a shape or dtype rule is broken, or ``block_table`` is short or names a page that does not exist.
    """
    _call(
        _ops.gather_kv,
        k_cache,
        v_cache,
        block_table,
        k_scale,
        v_scale,
        k_bias,
        inv_freq,
        attention_factor,
        chunk_len,
        k_out,
        v_out,
    )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
    softmax_scale: float | None = None,
    scale_factors: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of a few rows per sequence over a paged cache, 16-bit, float32 or int8; work is split over keys.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``; the rows stand at the end of their sequence. Under DCA these
            are the intra-chunk rotations.
        k_cache, v_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, dtype of ``q`` or int8.
        block_table: int32 ``[batch, max_pages]``, page numbers of each sequence in order.
        seqlens_k: int32 ``[batch]``, number of keys, the rows' own included; at least ``seqlen_q``.
        k_scale, v_scale: float32 ``[num_pages, page_size, num_kv_heads]``; required for int8 caches.
        k_bias: the bias that :func:`quantize_kv` subtracted, float32 ``[num_kv_heads, head_dim]``; with ``inv_freq``.
        inv_freq, attention_factor: as in :func:`rotary`; with ``k_bias``.
        q_succ, q_inter: successive- and inter-chunk rotations, shaped like ``q``; with ``chunk_len``.
        chunk_len: DCA chunk length, a multiple of 64.
        softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.
        scale_factors: float32 ``[batch]``, a factor on ``softmax_scale`` by sequence, on the device of ``q``; 1 when
            None. For what differs in a batch and grows with every token, such as the squared temperature of Dual Chunk
            Attention (``qwen_sparse.model.rope.dual_chunk_scale_factors``). Like ``softmax_scale`` it may be zero or
            negative and must be finite; on a GPU, whose values the host does not read, a sequence with another factor
            gets NaN.
        window: row p attends keys j > p - window only.
        return_lse: also return the log-sum-exp, ``[batch, seqlen_q, num_heads]``.

    Returns:
        ``out`` like ``q``, or ``(out, lse)``.

    Raises:
        ValueError: a shape, dtype or stride rule is broken, or (on the CPU) a page number or length is out
            of range or a scale factor is not finite.
    """
    out, lse = _call(
        _ops.decode_attention,
        q,
        k_cache,
        v_cache,
        block_table,
        seqlens_k,
        k_scale,
        v_scale,
        k_bias,
        inv_freq,
        attention_factor,
        q_succ,
        q_inter,
        chunk_len,
        _scale(softmax_scale, q.shape[-1]),
        scale_factors,
        window,
    )
    return (out, lse) if return_lse else out
