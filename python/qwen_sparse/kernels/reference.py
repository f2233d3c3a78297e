"""The definitions, executable: every op in plain PyTorch, without structure to exploit.

Each function takes the arguments of the op of the same name in :mod:`qwen_sparse.ops` and returns the same
things, computed in float64 (or float32 when ``compute_dtype`` says so) from the definition rather than from any
data structure of the kernels: attention scores are a full ``seqlen_q x seqlen_k`` matrix, the attended set of
vertical-slash attention is a boolean matrix filled key by key. Memory is O(n^2); use it on short inputs.

Kernels on every device are tested against this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import DualChunkRotary

__all__ = [
    "attention",
    "block_group_attention",
    "block_group_mask",
    "block_group_shares",
    "decode_attention",
    "dequantize_kv",
    "dual_chunk_attention",
    "quantize_kv",
    "rotary",
    "select_block_groups",
    "select_vertical_slash",
    "store_kv",
    "vertical_slash_attention",
    "vertical_slash_mask",
]

BLOCK_M = 64
GROUP_KEYS = 16
NUM_FORCED_GROUPS = 2
NUM_FORCED_COLUMNS = 30
NUM_FORCED_DISTANCES = 100


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[n, num_kv_heads, d] -> [n, num_heads, d]``, query head h reading kv head h // (num_heads / num_kv_heads)."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Unscaled scores ``[num_heads, seqlen_q, seqlen_k]``."""
    return torch.einsum("qhd,khd->hqk", q, _repeat_heads(k, q.shape[1]))


def _softmax_times_v(scores: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of ``scores`` (-inf where not attended); rows without keys give 0 and -inf."""
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    out = torch.einsum("hqk,khd->qhd", weights, _repeat_heads(v, scores.shape[0]))
    return out.to(dtype), lse.transpose(0, 1).float()


def _positions(seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Absolute positions of the rows ``[seqlen_q, 1]`` and of the keys ``[1, seqlen_k]``; the last ones align."""
    return torch.arange(seqlen_k - seqlen_q, seqlen_k)[:, None], torch.arange(seqlen_k)[None]


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention; row p attends j <= p (``causal``) and j > p - window (``window``)."""
    p, j = _positions(q.shape[0], k.shape[0])
    attended = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if causal:
        attended &= j <= p
    if window is not None:
        attended &= j > p - window
    scores = _scores(q.to(compute_dtype), k.to(compute_dtype)) * _scale(softmax_scale, q.shape[2])
    out, lse = _softmax_times_v(scores.masked_fill(~attended, -math.inf), v.to(compute_dtype), q.dtype)
    return (out, lse) if return_lse else out


def vertical_slash_mask(vertical_indexes: Tensor, slash_indexes: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The attended set ``[num_heads, seqlen_q, seqlen_k]`` (bool), key by key from the definition.

    Row p attends key j iff j <= p and (j is a vertical index, or some slash index s has
    a - s <= j < a - s + 64 with a = 64 * (p // 64)).
    """
    p, j = _positions(seqlen_q, seqlen_k)
    block_starts = (p // BLOCK_M * BLOCK_M).flatten()
    masks = []
    for columns, distances in zip(vertical_indexes.tolist(), slash_indexes.tolist(), strict=True):
        attended = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
        for a in sorted(set(block_starts.tolist())):  # the rows of a block differ in the causal limit only
            keys = torch.zeros(seqlen_k, dtype=torch.bool)
            for column in columns:
                if column >= 0:
                    keys[column] = True
            for distance in distances:
                if distance >= 0:
                    keys[max(0, a - distance) : max(0, a - distance + BLOCK_M)] = True
            attended[block_starts == a] = keys
        masks.append(attended & (j <= p))
    return torch.stack(masks)


def vertical_slash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vertical_indexes: Tensor,
    slash_indexes: Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over :func:`vertical_slash_mask`."""
    attended = vertical_slash_mask(vertical_indexes, slash_indexes, q.shape[0], k.shape[0])
    scores = _scores(q.to(compute_dtype), k.to(compute_dtype)) * _scale(softmax_scale, q.shape[2])
    out, lse = _softmax_times_v(scores.masked_fill(~attended, -math.inf), v.to(compute_dtype), q.dtype)
    return (out, lse) if return_lse else out


def block_group_mask(block_groups: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The attended set ``[num_heads, seqlen_q, seqlen_k]`` (bool) of a bitmap of block groups.

    Row p attends key j iff j <= p and bit g % 32 of word g // 32 is set for g = j // 16, in the words of row block
    p // 64 (the first one given is that of the first row).
    """
    p, j = _positions(seqlen_q, seqlen_k)
    group = j[0] // GROUP_KEYS
    attended = (block_groups[:, :, group // 32] >> (group % 32)) & 1
    blocks = p[:, 0] // BLOCK_M
    return attended.bool()[:, blocks - blocks[:1]] & (j <= p)


def block_group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_groups: Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over :func:`block_group_mask`."""
    attended = block_group_mask(block_groups, q.shape[0], k.shape[0])
    scores = _scores(q.to(compute_dtype), k.to(compute_dtype)) * _scale(softmax_scale, q.shape[2])
    out, lse = _softmax_times_v(scores.masked_fill(~attended, -math.inf), v.to(compute_dtype), q.dtype)
    return (out, lse) if return_lse else out


def _dual_chunk_scores(q_intra: Tensor, q_succ: Tensor, q_inter: Tensor, k: Tensor, chunk_len: int) -> Tensor:
    """Unscaled scores ``[num_heads, seqlen_q, seqlen_k]``: the key's chunk picks the query's rotation."""
    p, j = _positions(q_intra.shape[0], k.shape[0])
    chunks_back = p // chunk_len - j // chunk_len
    return torch.where(
        chunks_back <= 0,
        _scores(q_intra, k),
        torch.where(chunks_back == 1, _scores(q_succ, k), _scores(q_inter, k)),
    )


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
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over the intra-, successive- and inter-chunk keys, dense or over a sparse set."""
    p, j = _positions(q_intra.shape[0], k.shape[0])
    if vertical_indexes is not None and slash_indexes is not None:
        attended = vertical_slash_mask(vertical_indexes, slash_indexes, q_intra.shape[0], k.shape[0])
    elif block_groups is not None:
        attended = block_group_mask(block_groups, q_intra.shape[0], k.shape[0])
    else:
        attended = j <= p
    scores = _dual_chunk_scores(
        q_intra.to(compute_dtype), q_succ.to(compute_dtype), q_inter.to(compute_dtype), k.to(compute_dtype), chunk_len
    )
    scores = scores * _scale(softmax_scale, k.shape[2])
    out, lse = _softmax_times_v(scores.masked_fill(~attended, -math.inf), v.to(compute_dtype), q_intra.dtype)
    return (out, lse) if return_lse else out


def vertical_slash_scores(
    q: Tensor,
    k: Tensor,
    *,
    last_q: int = 64,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Column scores and distance scores, each ``[num_heads, seqlen_k]``, before forcing and top-k."""
    rows = min(last_q, q.shape[0])
    p, j = _positions(rows, k.shape[0])
    k = k.to(compute_dtype)
    q = q[-rows:].to(compute_dtype)
    if q_succ is not None and q_inter is not None and chunk_len is not None:
        scores = _dual_chunk_scores(
            q, q_succ[-rows:].to(compute_dtype), q_inter[-rows:].to(compute_dtype), k, chunk_len
        )
    else:
        scores = _scores(q, k)
    scores = (scores * _scale(softmax_scale, k.shape[2])).masked_fill(j > p, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    slash = torch.zeros_like(weights[:, 0])
    for r in range(rows):
        seen = int(p[r]) + 1
        slash[:, :seen] += weights[:, r, :seen].flip(-1)
    return weights.sum(dim=1), slash


def _top_indexes(scores: Tensor, num_forced: int, sizes: Sequence[int]) -> Tensor:
    """Indexes of the ``sizes[h]`` highest scores of head h, ties to the lower index, sorted, padded with -1.

    A NaN score counts as the lowest.
    """
    scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    scores[:, :num_forced] = math.inf
    num_keys = scores.shape[1]
    result = torch.full((scores.shape[0], min(max(sizes, default=0), num_keys)), -1, dtype=torch.int32)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    for head, size in enumerate(sizes):
        count = min(size, num_keys)
        result[head, :count] = order[head, :count].sort().values.to(torch.int32)
    return result


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
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Top columns and distances by the attention weights of the last ``last_q`` rows."""

    def per_head(size: int | Sequence[int] | Tensor) -> list[int]:
        sizes = size.tolist() if isinstance(size, Tensor) else size
        return [sizes] * q.shape[1] if isinstance(sizes, int) else list(sizes)

    vertical, slash = vertical_slash_scores(
        q,
        k,
        last_q=last_q,
        softmax_scale=softmax_scale,
        q_succ=q_succ,
        q_inter=q_inter,
        chunk_len=chunk_len,
        compute_dtype=compute_dtype,
    )
    return (
        _top_indexes(vertical, NUM_FORCED_COLUMNS, per_head(vertical_size)),
        _top_indexes(slash, NUM_FORCED_DISTANCES, per_head(slash_size)),
    )


def _pooled(x: Tensor, first: int) -> Tensor:
    """Means over the rows of each 16 absolute positions, ``[groups, heads, head_dim]``, rounded to x's dtype.

    ``first``: position of the first row, whose group comes first.
    """
    group = (first + torch.arange(x.shape[0])) // GROUP_KEYS
    group -= group[:1].clone()
    sums = torch.zeros(int(group[-1]) + 1, *x.shape[1:], dtype=torch.float64).index_add(0, group, x.double())
    return (sums / group.bincount().view(-1, 1, 1)).to(x.dtype)


def block_group_shares(
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What share of a block's attention each group of 16 keys is estimated to hold, ``[num_heads, blocks, groups]``.

    Keys, and rows in each rotation, are averaged over 16 positions and rounded to their dtype. One softmax per pooled
    row over the pooled keys up to its own position's, and the mean of the pooled rows of a block (those of which the
    call has rows).
    """
    past = k.shape[0] - q.shape[0]
    pooled_k = _pooled(k, 0).to(compute_dtype)
    pooled = [_pooled(x, past).to(compute_dtype) for x in (q, q_succ, q_inter) if x is not None]
    p = (torch.arange(pooled[0].shape[0]) + past // GROUP_KEYS)[:, None]
    g = torch.arange(pooled_k.shape[0])[None]
    if chunk_len is not None:
        chunks_back = p * GROUP_KEYS // chunk_len - g * GROUP_KEYS // chunk_len
        intra, succ, inter = (_scores(x, pooled_k) for x in pooled)
        scores = torch.where(chunks_back <= 0, intra, torch.where(chunks_back == 1, succ, inter))
    else:
        scores = _scores(pooled[0], pooled_k)
    scores = scores * _scale(softmax_scale, k.shape[2])
    weights = scores.masked_fill(g > p, -math.inf).softmax(-1)
    block = p[:, 0] * GROUP_KEYS // BLOCK_M
    block -= block[:1].clone()
    sums = torch.zeros(q.shape[1], int(block[-1]) + 1, g.shape[1], dtype=weights.dtype).index_add(1, block, weights)
    return sums / block.bincount()[:, None]


def select_block_groups(
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    *,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """A block attends the groups that hold at least ``threshold`` per key, those of the prompt's first 32 keys, its own
    and those of the block before; and of every group only what is not after it."""
    if q.shape[0] == 0:
        return torch.zeros(*thresholds.shape, -(-k.shape[0] // 512), dtype=torch.int32), torch.zeros_like(thresholds)
    shares = block_group_shares(
        q,
        k,
        softmax_scale=softmax_scale,
        q_succ=q_succ,
        q_inter=q_inter,
        chunk_len=chunk_len,
        compute_dtype=compute_dtype,
    )
    num_blocks, num_groups = shares.shape[1:]
    first = (k.shape[0] - q.shape[0]) // BLOCK_M
    own = (torch.arange(num_blocks)[:, None] + first) * (BLOCK_M // GROUP_KEYS)
    g = torch.arange(num_groups)[None]
    attended = ~(shares < GROUP_KEYS * thresholds[:, :, None])  # what is not a number is attended
    attended |= (g < NUM_FORCED_GROUPS) | (g >= own - BLOCK_M // GROUP_KEYS)
    attended &= g < own + BLOCK_M // GROUP_KEYS
    kept = (shares * attended).sum(-1).float()
    bits = torch.nn.functional.pad(attended, (0, -num_groups % 32)).view(*attended.shape[:2], -1, 32).long()
    words = (bits << torch.arange(32)).sum(-1)
    return words.to(torch.int32), kept


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, attention_factor: float = 1.0) -> Tensor:
    """Half-split RoPE of ``x [n, heads, head_dim]`` at ``positions [n]``, in float64; channel c pairs with c + D/2."""
    angle = positions.double()[:, None] * inv_freq.double()
    cos, sin = angle.cos()[:, None] * attention_factor, angle.sin()[:, None] * attention_factor
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
    """RoPE, or with ``chunk_size`` and ``chunk_len`` all rotations of Dual Chunk Attention."""

    def at(x: Tensor, where: Tensor) -> Tensor:
        return rotate(x, where, inv_freq, attention_factor).to(x.dtype)

    if chunk_size is None or chunk_len is None:
        return at(q, positions), at(k, positions)
    in_chunk = positions % chunk_len
    inter = torch.full_like(positions, min(2 * chunk_len - 1, chunk_size))
    rows = min(critical_rows, q.shape[0])
    critical, critical_q = in_chunk[q.shape[0] - rows :], q[q.shape[0] - rows :]
    return DualChunkRotary(
        q_intra=at(q, in_chunk),
        q_succ=at(q, (in_chunk + chunk_len).clamp(max=chunk_size)),
        q_inter=at(q, inter),
        k=at(k, in_chunk),
        q_succ_critical=at(critical_q, critical + chunk_len),
        q_inter_critical=at(critical_q, critical + chunk_size),
    )


def _rotated_bias(
    shape: torch.Size,
    k_bias: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    attention_factor: float,
) -> Tensor:
    """R_j b_k for every token, ``[n, num_kv_heads, head_dim]`` float64; zero without a bias."""
    if k_bias is None or positions is None or inv_freq is None:
        return torch.zeros(shape, dtype=torch.float64)
    return rotate(k_bias.expand(shape), positions, inv_freq, attention_factor)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one float32 scale per token and head; values are divided by that float32 scale."""
    scale = (x.abs().amax(dim=-1) / 127).float()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).double().unsqueeze(-1)
    return torch.clamp(torch.round(x / divisor), -127, 127).to(torch.int8), scale


def quantize_kv(
    k: Tensor,
    v: Tensor,
    *,
    k_bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 K (minus its rotated bias) and V with their scales."""
    bias = _rotated_bias(k.shape, k_bias, positions, inv_freq, attention_factor)
    return (*_quantize(k.double() - bias), *_quantize(v.double()))


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
    """The inverse of :func:`quantize_kv`, up to rounding."""
    bias = _rotated_bias(k.shape, k_bias, positions, inv_freq, attention_factor)
    full_k = k.double() * k_scale.double().unsqueeze(-1) + bias
    return full_k.to(dtype), (v.double() * v_scale.double().unsqueeze(-1)).to(dtype)


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
    """Rows to slots of the pages, quantised where they are int8."""
    pages, rows = slot_mapping // k_cache.shape[1], slot_mapping % k_cache.shape[1]
    if k_scale is not None and v_scale is not None:
        k, k_scale[pages, rows], v, v_scale[pages, rows] = quantize_kv(
            k, v, k_bias=k_bias, positions=positions, inv_freq=inv_freq, attention_factor=attention_factor
        )
    k_cache[pages, rows] = k
    v_cache[pages, rows] = v


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
    """The pages' rows one after the other, dequantised where they are int8."""
    num_keys = k_out.shape[0]
    pages = block_table[: -(-num_keys // k_cache.shape[1])].long()
    k, v = (cache[pages].flatten(0, 1)[:num_keys] for cache in (k_cache, v_cache))
    if k_scale is not None and v_scale is not None:
        positions = torch.arange(num_keys) % (num_keys + 1 if chunk_len is None else chunk_len)
        k_scale, v_scale = (scale[pages].flatten(0, 1)[:num_keys] for scale in (k_scale, v_scale))
        k, v = dequantize_kv(
            k,
            k_scale,
            v,
            v_scale,
            dtype=k_out.dtype,
            k_bias=k_bias,
            positions=None if k_bias is None else positions,
            inv_freq=inv_freq,
            attention_factor=attention_factor,
        )
    k_out.copy_(k)
    v_out.copy_(v)


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
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few rows per sequence over the pages that ``block_table`` names."""
    outs, lses = [], []
    for b, num_keys in enumerate(seqlens_k.tolist()):
        pages = block_table[b, : -(-num_keys // k_cache.shape[1])].long()

        def read(cache: Tensor, pages: Tensor = pages, num_keys: int = num_keys) -> Tensor:
            return cache[pages].flatten(0, 1)[:num_keys]

        k, v = read(k_cache), read(v_cache)
        if k_scale is not None and v_scale is not None:
            position = torch.arange(num_keys)
            k, v = dequantize_kv(
                k,
                read(k_scale),
                v,
                read(v_scale),
                dtype=compute_dtype,
                k_bias=k_bias,
                positions=position if chunk_len is None else position % chunk_len,
                inv_freq=inv_freq,
                attention_factor=attention_factor,
            )
        p, j = _positions(q.shape[1], num_keys)
        k = k.to(compute_dtype)
        if chunk_len is not None and q_succ is not None and q_inter is not None:
            scores = _dual_chunk_scores(
                q[b].to(compute_dtype), q_succ[b].to(compute_dtype), q_inter[b].to(compute_dtype), k, chunk_len
            )
        else:
            scores = _scores(q[b].to(compute_dtype), k)
        attended = j <= p if window is None else (j <= p) & (j > p - window)
        scale = _scale(softmax_scale, q.shape[3])
        if scale_factors is not None:
            scale *= float(scale_factors[b])
        scores = (scores * scale).masked_fill(~attended, -math.inf)
        out, lse = _softmax_times_v(scores, v.to(compute_dtype), q.dtype)
        outs.append(out)
        lses.append(lse)
    return (torch.stack(outs), torch.stack(lses)) if return_lse else torch.stack(outs)
