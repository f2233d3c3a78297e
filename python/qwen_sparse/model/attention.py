"""Attention of one layer's rows over the keys of one sequence: dense, or sparse but for the rows that are read.

What our own model does, and the plugins for transformers and vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops
from .config import SparseConfig
from .coverage import select_by_coverage
from .stats import ForwardStats

__all__ = [
    "CONTINUATION_ROWS",
    "Indexes",
    "Queries",
    "attend",
    "causal_pairs",
    "dense_rows",
    "rows_of_last_block",
    "window_pairs",
]

CONTINUATION_ROWS = 512
"""Up to this many rows behind a cache are dense: questions about what was cached, whose rows are read."""

_BLOCK_M = 64  # rows of a block of sparse attention
_ops = torch.ops.qwen_sparse


class Indexes(NamedTuple):
    """What sparse attention attends: columns and distances, or block groups."""

    vertical: Tensor | None = None
    """int32 ``[num_heads, V]``; see :func:`qwen_sparse.ops.vertical_slash_attention`."""
    slash: Tensor | None = None
    """int32 ``[num_heads, S]``."""
    groups: Tensor | None = None
    """int32 ``[num_heads, num_blocks, words]``; see :func:`qwen_sparse.ops.block_group_attention`."""
    kept: Tensor | None = None
    """float32 ``[num_heads, num_blocks]``: share of attention that the groups are estimated to hold."""

    def last(self, rows: int, num_keys: int) -> Indexes:
        """Of the last rows alone."""
        if self.groups is None:
            return self
        return self._replace(groups=self.groups[:, -ops.row_blocks(rows, num_keys) :].contiguous())

    def before(self, position: int) -> Indexes:
        """Of the rows before a position: without the columns from there on and the distances that no row has."""
        vertical, slash = (None if x is None else torch.where(x < position, x, -1) for x in (self.vertical, self.slash))
        return self._replace(vertical=vertical, slash=slash)


@dataclass(frozen=True, eq=False, repr=False)
class Queries:
    """Rotated queries of one layer ``[n, num_heads, head_dim]``; only ``q`` while plain RoPE does."""

    q: Tensor
    """Plain, or the intra-chunk rotation."""
    q_succ: Tensor | None = None
    q_inter: Tensor | None = None
    chunk_len: int | None = None
    q_succ_critical: Tensor | None = None
    q_inter_critical: Tensor | None = None

    def last(self, rows: int) -> Queries:
        """The last rows, for attention (no critical rotations)."""
        q_succ, q_inter = (None if q is None else q[-rows:] for q in (self.q_succ, self.q_inter))
        return Queries(self.q[-rows:], q_succ, q_inter, self.chunk_len)

    def before(self, rows: int) -> Queries:
        """Without the last rows, for attention."""
        q_succ, q_inter = (None if q is None else q[: q.shape[0] - rows] for q in (self.q_succ, self.q_inter))
        return Queries(self.q[: self.q.shape[0] - rows], q_succ, q_inter, self.chunk_len)

    def select(
        self, k: Tensor, scale: float, *, vertical_size: Sequence[int], slash_size: Sequence[int], last_q: int
    ) -> Indexes:
        """Columns and distances by the last rows' votes; see :func:`qwen_sparse.ops.select_vertical_slash`."""
        vertical, slash = ops.select_vertical_slash(
            self.q,
            k,
            vertical_size=vertical_size,
            slash_size=slash_size,
            last_q=last_q,
            softmax_scale=scale,
            q_succ=self.q_succ_critical,
            q_inter=self.q_inter_critical,
            chunk_len=self.chunk_len,
        )
        return Indexes(vertical, slash)

    def select_by_coverage(self, k: Tensor, scale: float, coverage: float) -> Indexes:
        """Block groups that keep a share of attention; see :func:`qwen_sparse.model.coverage.select_by_coverage`."""
        groups, kept = select_by_coverage(
            self.q,
            k,
            coverage=coverage,
            softmax_scale=scale,
            q_succ=self.q_succ,
            q_inter=self.q_inter,
            chunk_len=self.chunk_len,
        )
        return Indexes(groups=groups, kept=kept)

    def attend_dense(self, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Output like ``q`` and log-sum-exp, float32 ``[n, num_heads]``, over all keys, or the last ``window`` of each
        row (not under Dual Chunk Attention)."""
        if self.chunk_len is None:
            out, lse = _ops.attention(self.q, k, v, scale, True, window)
        else:
            out, lse, _ = _ops.dual_chunk_attention(
                self.q, self.q_succ, self.q_inter, k, v, self.chunk_len, None, None, None, scale
            )
        return out, lse

    def attend_sparse(self, k: Tensor, v: Tensor, scale: float, indexes: Indexes) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp and the number of pairs that each head attended, int64 ``[num_heads]``."""
        vertical, slash, groups, _ = indexes
        # The torch ops, not their wrappers: they also count what was attended.
        if self.chunk_len is not None:
            out, lse, attended = _ops.dual_chunk_attention(
                self.q, self.q_succ, self.q_inter, k, v, self.chunk_len, vertical, slash, groups, scale
            )
        elif groups is not None:
            out, lse, attended = _ops.block_group_attention(self.q, k, v, groups, scale)
        else:
            out, lse, attended = _ops.vertical_slash_attention(self.q, k, v, vertical, slash, scale)
        return out, lse, attended


def rows_of_last_block(rows: int, seqlen: int, prompt_len: int) -> int:
    """How many of the last ``rows`` of a sequence are those of its prompt's last block (from a multiple of 64 on), or
    behind the prompt: their output is read, and they attend all keys also where prefill is sparse.

    Args:
        rows: of the call.
        seqlen: keys of the sequence, the rows' own included.
        prompt_len: of the whole prompt.
    """
    return min(rows, max(0, seqlen - (prompt_len - 1) // _BLOCK_M * _BLOCK_M))


def dense_rows(rows: int, seqlen: int, prompt_len: int) -> int:
    """As :func:`rows_of_last_block`, and all rows where up to 512 end a prompt that has other keys before them.

    For engines that do not say where a request's cached prefix ends.
    """
    if rows <= CONTINUATION_ROWS and rows < seqlen and seqlen >= prompt_len:
        return rows
    return rows_of_last_block(rows, seqlen, prompt_len)


def attend(
    q: Queries,
    k: Tensor,
    v: Tensor,
    scale: float,
    sparse: SparseConfig | None,
    dense: int = 0,
    *,
    rows: int | None = None,
    stats: ForwardStats | None = None,
) -> Tensor:
    """Causal attention of the last rows of a sequence.

    Args:
        q: their rotated queries, with critical rotations if ``sparse`` has budgets.
        k, v: ``[seqlen, num_kv_heads, head_dim]``.
        scale: factor on the scores.
        sparse: what the rows attend, of this layer and these heads alone (:meth:`SparseConfig.of_layer`); None: all.
        dense: so many of the last rows attend all keys nonetheless.
        rows: how many of the last rows attention is wanted of; None: all. The others take part in choosing keys only.
        stats: counters and times to add to.

    Returns:
        ``[rows, num_heads, head_dim]``.
    """
    stats = ForwardStats(measuring=False) if stats is None else stats
    rows, num_heads = q.q.shape[0] if rows is None else rows, q.q.shape[1]
    dense = min(dense, rows) if sparse is not None else rows
    parts = []
    if sparse is not None and rows > dense:
        before, position = q.before(dense), k.shape[0] - dense
        if sparse.coverage is None:
            sizes = {"vertical_size": sparse.vertical_sizes[0], "slash_size": sparse.slash_sizes[0]}
            indexes = q.select(k, scale, **sizes, last_q=sparse.last_q).before(position)
        else:
            indexes = before.select_by_coverage(k[:position], scale, sparse.coverage)
            assert indexes.kept is not None
            stats.estimate(indexes.kept)
        stats.lap("selection")
        others = rows - dense
        out, _, attended = before.last(others).attend_sparse(
            k[:position], v[:position], scale, indexes.last(others, position)
        )
        stats.count(attended, causal_pairs(others, position) * num_heads)
        parts.append(out)
    if dense:
        parts.append(q.last(dense).attend_dense(k, v, scale)[0])
        pairs = causal_pairs(dense, k.shape[0]) * num_heads
        stats.count(pairs, pairs)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def causal_pairs(rows: int, num_keys: int) -> int:
    """(row, key) pairs of the last rows of a sequence and the keys up to each."""
    return rows * (2 * num_keys - rows + 1) // 2


def window_pairs(rows: int, num_keys: int, window: int) -> int:
    """The same where a row meets its last ``window`` keys, its own included."""
    growing = min(rows, max(0, window - (num_keys - rows)))  # rows with fewer keys before them than the window holds
    return causal_pairs(growing, num_keys - rows + growing) + (rows - growing) * window
