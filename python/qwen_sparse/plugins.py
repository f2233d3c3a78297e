"""What the plugins for transformers and vLLM share: sparse attention of a sequence's rows, but for those that are read.

The rules are those of our own model (:mod:`qwen_sparse.models.qwen2`), which also counts and times what it attends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SparseConfig
from .models.qwen2 import CONTINUATION_ROWS, Queries

__all__ = ["attend", "dense_rows"]

_BLOCK_M = 64  # rows of a block of sparse attention


def dense_rows(rows: int, seqlen: int, prompt_len: int) -> int:
    """How many of the last ``rows`` of a prompt, where they are prefilled sparsely, attend all keys all the same.

    They are those whose output is read: the prompt's last block (from a multiple of 64 on) and whatever is behind the
    prompt; all rows where up to 512 end a prompt that has other keys before them.

    Args:
        rows: of the call.
        seqlen: keys of the sequence, the rows' own included.
        prompt_len: of the whole prompt.
    """
    if rows <= CONTINUATION_ROWS and rows < seqlen and seqlen >= prompt_len:
        return rows
    return min(rows, max(0, seqlen - (prompt_len - 1) // _BLOCK_M * _BLOCK_M))


def attend(q: Queries, k: Tensor, v: Tensor, scale: float, sparse: SparseConfig | None, dense: int) -> Tensor:
    """Causal attention of the last rows of a sequence.

    Args:
        q: their rotated queries, with critical rotations if ``sparse`` has budgets.
        k, v: ``[seqlen, num_kv_heads, head_dim]``.
        scale: factor on the scores.
        sparse: what the rows attend, of this layer and these heads alone (:meth:`SparseConfig.of_layer`); None: all.
        dense: so many of the last rows attend all keys nonetheless.

    Returns:
        ``[n, num_heads, head_dim]``.
    """
    rows = q.q.shape[0]
    if sparse is None or dense >= rows:
        return q.attend_dense(k, v, scale)[0]
    before, position = q.before(dense), k.shape[0] - dense
    if sparse.coverage is None:
        sizes = {"vertical_size": sparse.vertical_sizes[0], "slash_size": sparse.slash_sizes[0]}
        indexes = q.select(k, scale, **sizes, last_q=sparse.last_q).before(position)
    else:
        indexes = before.select_by_coverage(k[:position], scale, sparse.coverage)
    out = before.attend_sparse(k[:position], v[:position], scale, indexes)[0]
    return out if dense == 0 else torch.cat((out, q.last(dense).attend_dense(k, v, scale)[0]))
