"""Index sets of no fixed size: per head and prefill chunk, as few columns and distances as hold a share of the weight.

Fixed budgets spend the same on every prompt. Here a head takes what its last rows' weights ask for, as FlexPrefill
(arXiv 2502.20766) does for rows of blocks. The scores of :func:`qwen_sparse.ops.vertical_slash_scores` say how much
weight the best V columns hold, and how much the best S distances, of each head. The forced distances, the nearest keys,
often hold most of it, share N. Of the rest, the best columns hold A(V) (without the last ones, which all voting rows
reach through the forced distances: their weight is in N) and the best distances B(S). What both hold together is not
known without the weights themselves; as if they were independent it is ``1 - (1 - A)(1 - B)`` of the rest. Of several
ways to split what may be missing between the two factors, a head takes the one that attends fewest keys.

Everything runs on the scores' device without the host waiting, and is deterministic: shares are sums of integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import check_coverage
from .reference import NUM_FORCED_COLUMNS, NUM_FORCED_DISTANCES

__all__ = ["Chosen", "choose", "select_by_coverage"]

SPLITS = tuple(step / 8 for step in range(9))
"""Of the logarithm of the missing weight, the part that columns take."""
_UNIT = 2.0**40  # of a weight, as an integer
_BLOCK = 64


class Chosen(NamedTuple):
    """Index sets and what is expected of them."""

    vertical_indexes: Tensor
    """int32 ``[num_heads, max_vertical]``, ascending, padded with -1."""
    slash_indexes: Tensor
    """int32 ``[num_heads, max_slash]``, likewise."""
    expected: Tensor
    """float64 ``[num_heads]``: ``1 - (1 - N)(1 - A)(1 - B)``; below the coverage where a ceiling was met."""


def select_by_coverage(
    q: Tensor,
    k: Tensor,
    *,
    coverage: float,
    max_vertical: int,
    max_slash: int,
    last_q: int = 64,
    softmax_scale: float | None = None,
    q_succ: Tensor | None = None,
    q_inter: Tensor | None = None,
    chunk_len: int | None = None,
) -> Chosen:
    """The index sets of every head that are expected to hold ``coverage`` of its last rows' attention.

    Args:
        q, k, last_q, softmax_scale, q_succ, q_inter, chunk_len: as of :func:`qwen_sparse.ops.select_vertical_slash`.
        coverage: share of the attention weights, in (0, 1).
        max_vertical, max_slash: most columns and distances of a head; clipped to the number of keys. The forced ones
            (columns 0..29, distances 0..99) always belong to a set, if these ceilings let them.

    Raises:
        ValueError: ``coverage`` out of range, a ceiling below 1, or a rule of the scores is broken.
    """
    check_coverage(coverage)
    for name, ceiling in (("max_vertical", max_vertical), ("max_slash", max_slash)):
        if ceiling < 1:
            raise ValueError(f"select_by_coverage: {name} must be >= 1, got {ceiling}")
    vertical, slash = ops.vertical_slash_scores(
        q, k, last_q=last_q, softmax_scale=softmax_scale, q_succ=q_succ, q_inter=q_inter, chunk_len=chunk_len
    )
    return choose(vertical, slash, min(last_q, q.shape[0]), coverage, max_vertical, max_slash)


def choose(
    vertical_scores: Tensor, slash_scores: Tensor, rows: int, coverage: float, max_vertical: int, max_slash: int
) -> Chosen:
    """The rule on scores float32 ``[num_heads, num_keys]`` that ``rows`` rows have summed up to."""
    num_keys = slash_scores.shape[1]
    near = min(NUM_FORCED_DISTANCES, max_slash, num_keys)
    total = float(rows) * _UNIT
    rest = (total - _integers(slash_scores[:, :near]).sum(1).double()).clamp(min=1)
    place = torch.arange(num_keys, device=slash_scores.device)
    columns = _Ranked(vertical_scores * (place < num_keys - near), NUM_FORCED_COLUMNS, max_vertical, rest)
    distances = _Ranked(slash_scores * (place >= near), NUM_FORCED_DISTANCES, max_slash, rest)
    missing = ((1 - coverage) * total / rest).clamp(max=1)
    best_cost = best_vertical = best_slash = best_held = None
    for split in SPLITS:
        vertical, held_by_columns = columns.fewest(1 - missing**split)
        slash, held_by_distances = distances.fewest(1 - missing ** (1 - split))
        held = 1 - rest / total * (1 - held_by_columns) * (1 - held_by_distances)
        # Where a ceiling leaves the coverage out of reach, the set that holds most; else the one that attends fewest.
        cost = torch.where(held >= coverage - 1e-9, (vertical + distances.width_of(slash)).double(), 1e12 * (2 - held))
        if best_cost is None or best_vertical is None or best_slash is None or best_held is None:
            best_cost, best_vertical, best_slash, best_held = cost, vertical, slash, held
            continue
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_vertical = torch.where(better, vertical, best_vertical)
        best_slash = torch.where(better, slash, best_slash)
        best_held = torch.where(better, held, best_held)
    assert best_vertical is not None
    assert best_slash is not None
    assert best_held is not None
    return Chosen(columns.first(best_vertical), distances.first(best_slash), best_held)


def _integers(scores: Tensor) -> Tensor:
    return (scores.double() * _UNIT).round().long()


class _Ranked:
    """The best entries of each head, best first, and the weight ``rest`` (float64 ``[num_heads]``) that they share."""

    def __init__(self, scores: Tensor, num_forced: int, most: int, rest: Tensor) -> None:
        heads, num_keys = scores.shape
        self._forced = min(num_forced, most, num_keys)
        chosen = torch.ops.qwen_sparse.top_indexes(scores, [most] * heads, num_forced).long()
        weights = _integers(scores.gather(1, chosen))
        ranks = torch.where(chosen < num_forced, torch.iinfo(torch.int64).max, weights)
        order = ranks.argsort(dim=1, descending=True, stable=True)  # equal ones: the lower index
        self.indexes = chosen.gather(1, order)
        self._held = weights.gather(1, order).cumsum(1)
        self._rest = rest

    def fewest(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """How many entries hold ``share`` of the weight (all, if that is too little), and what they hold; by head."""
        target = (share * self._rest).ceil().long()
        count = (self._held < target[:, None]).sum(1) + 1
        count = count.clamp(min=self._forced, max=self._held.shape[1])
        held = self._held.gather(1, count[:, None] - 1)[:, 0].double() / self._rest
        return count, held.clamp(max=1)  # of the columns next to the last hundred some weight is in N too

    def width_of(self, count: Tensor) -> Tensor:
        """Keys that a block attends for its first ``count`` distances: bands of 64 that may overlap."""
        distances, _ = self._only(count).sort(dim=1)
        far = torch.iinfo(torch.int64).max // 2
        gaps = torch.diff(distances, dim=1, append=torch.full_like(distances[:, :1], far)).clamp(max=_BLOCK)
        return (gaps * (distances < far)).sum(1)

    def first(self, count: Tensor) -> Tensor:
        """The first ``count`` entries as an index list."""
        ascending, _ = self._only(count).sort(dim=1)
        return torch.where(ascending < torch.iinfo(torch.int64).max // 2, ascending, -1).int()

    def _only(self, count: Tensor) -> Tensor:
        place = torch.arange(self.indexes.shape[1], device=self.indexes.device)
        return torch.where(place < count[:, None], self.indexes, torch.iinfo(torch.int64).max // 2)
