"""Block groups by coverage: the share of attention that sparse prefill keeps, one number for all heads and lengths.

Each head and block of 64 rows attends the groups of 16 keys that pooled rows and keys estimate to matter
(:func:`qwen_sparse.ops.select_block_groups`). A coverage says from which share on; docs/block-groups.md has the
measurements on released models that the rule comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from .config import check_coverage

__all__ = ["select_by_coverage", "thresholds"]

_BLOCK_M = 64
# A threshold of c times the average leaves out 0.131 c^(1 / 1.42) of the attention: fitted to what c of 0.25 to 2 left
# out of 16,384 tokens of code and prose (Qwen2.5-Coder-0.5B-Instruct, all layers and rows), alike at every position.
_MISSING, _EXPONENT = 0.131, 1.42


def thresholds(coverage: float, seqlen_q: int, seqlen_k: int, device: torch.device | None = None) -> Tensor:
    """Least share of attention per key of a group that a block attends, float32 ``[num_blocks]``.

    It depends on the block's position alone, so that a prompt's groups do not depend on where it is cut, nor on what
    comes after them.

    Args:
        coverage: share of attention to keep, in (0, 1).
        seqlen_q, seqlen_k: rows and keys of the call, as of :func:`qwen_sparse.ops.row_blocks`.
        device: of the result; the CPU when None.

    Raises:
        ValueError: ``coverage`` out of range.
    """
    check_coverage(coverage)
    first = (seqlen_k - seqlen_q) // _BLOCK_M
    blocks = torch.arange(1, ops.row_blocks(seqlen_q, seqlen_k) + 1, dtype=torch.float64, device=device)
    return (share_of_average(coverage) / (_BLOCK_M * (first + blocks))).float()


def share_of_average(coverage: float) -> float:
    """How much a group must be estimated to hold, as a multiple of what an average causal group holds."""
    return float(((1 - coverage) / _MISSING) ** _EXPONENT)


def select_by_coverage(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The block groups that keep a share of attention.

    Args:
        q, k, softmax_scale, q_succ, q_inter, chunk_len: as of :func:`qwen_sparse.ops.select_block_groups`.
        coverage: share of attention, in (0, 1).

    Returns:
        ``(block_groups, kept)`` as :func:`qwen_sparse.ops.select_block_groups`.

    Raises:
        ValueError: ``coverage`` out of range, or a rule of the selection is broken.
    """
    by_block = thresholds(coverage, q.shape[0], k.shape[0], q.device)
    return ops.select_block_groups(
        q,
        k,
        by_block.expand(q.shape[1], -1).contiguous(),
        softmax_scale=softmax_scale,
        q_succ=q_succ,
        q_inter=q_inter,
        chunk_len=chunk_len,
    )
