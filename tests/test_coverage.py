"""Index sets by coverage: the rule on planted scores, and what it reaches on real weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, WriteCheckpoint
from qwen_sparse import load_model, ops, prefill, reference
from qwen_sparse.coverage import choose, select_by_coverage
from qwen_sparse.testing import assert_close_to_reference, random_qkv

KEYS, ROWS = 2000, 64


def spread(heads: int, keys: int) -> Tensor:
    """Scores that sum up to ROWS, equal everywhere."""
    return torch.full((heads, keys), ROWS / keys)


def planted(entries: dict[int, float], keys: int = KEYS) -> Tensor:
    """Shares of some entries of one head; the rest is spread over the others."""
    scores = torch.full((1, keys), ROWS * (1 - sum(entries.values())) / (keys - len(entries)))
    for entry, share in entries.items():
        scores[0, entry] = ROWS * share
    return scores


def lengths(indexes: Tensor) -> list[int]:
    return (indexes >= 0).sum(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores(dtype: torch.dtype, kernels: str) -> None:
    """The kernel's sums against the definition; each adds up to the voting rows."""
    q, k, _ = random_qkv(100, 700, 4, 2, 64, dtype)
    for ours, exact, rounded in zip(
        ops.vertical_slash_scores(q, k),
        reference.vertical_slash_scores(q.double(), k.double()),
        reference.vertical_slash_scores(q, k, compute_dtype=dtype),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        assert_close_to_reference(ours, exact, rounded, floor=1e-5)
        torch.testing.assert_close(ours.sum(1), torch.full((4,), 64.0), rtol=1e-3, atol=0)


def test_a_head_of_columns_takes_columns() -> None:
    chosen = choose(planted({500: 0.5, 900: 0.3, 1200: 0.15}), spread(1, KEYS), ROWS, 0.9, 1000, 1000)
    columns = chosen.vertical_indexes[0]
    assert {500, 900, 1200} <= set(columns.tolist())
    assert lengths(chosen.vertical_indexes)[0] <= 40  # the forced 30 and few more
    assert lengths(chosen.slash_indexes) == [100]  # the forced ones
    assert chosen.expected[0] >= 0.9


def test_a_head_of_distances_takes_distances() -> None:
    chosen = choose(spread(1, KEYS), planted({300: 0.6, 1500: 0.35}), ROWS, 0.9, 1000, 1000)
    assert {300, 1500} <= set(chosen.slash_indexes[0].tolist())
    assert lengths(chosen.slash_indexes)[0] <= 110
    assert lengths(chosen.vertical_indexes) == [30]


def test_heads_are_independent_and_lists_ascend() -> None:
    vertical = torch.cat((planted({500: 0.95}), spread(1, KEYS)))
    slash = torch.cat((spread(1, KEYS), planted({700: 0.95})))
    both = choose(vertical, slash, ROWS, 0.9, 600, 600)
    for head in range(2):
        alone = choose(vertical[head, None], slash[head, None], ROWS, 0.9, 600, 600)
        for together, single in zip(both, alone, strict=True):
            assert torch.equal(together[head], single[0])
    for indexes in (both.vertical_indexes, both.slash_indexes):
        assert indexes.shape == (2, 600)
        for row in indexes:
            kept = row[row >= 0]
            assert (kept.diff() > 0).all()
            assert (row[len(kept) :] == -1).all()


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95, 0.99])
def test_more_coverage_is_a_larger_set_and_is_met(coverage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(8, KEYS, generator=generator).pow(20) for _ in range(2)]
    vertical, slash = (ROWS * x / x.sum(1, keepdim=True) for x in scores)
    chosen = choose(vertical, slash, ROWS, coverage, KEYS, KEYS)
    assert (chosen.expected >= coverage - 1e-9).all()
    less = choose(vertical, slash, ROWS, coverage - 0.2, KEYS, KEYS)
    cost = [sum(lengths(x.vertical_indexes)) + sum(lengths(x.slash_indexes)) for x in (less, chosen)]
    assert cost[0] < cost[1]


def test_a_ceiling_ends_it() -> None:
    chosen = choose(spread(2, KEYS), spread(2, KEYS), ROWS, 0.9, 50, 120)
    assert lengths(chosen.vertical_indexes) == [50, 50]
    assert lengths(chosen.slash_indexes) == [120, 120]
    rest = 1 - 100 / KEYS  # outside the forced distances
    expected = 1 - rest * (1 - 50 / KEYS / rest) * (1 - 20 / KEYS / rest)
    assert chosen.expected.tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("near", [0.3, 0.8])
def test_near_keys_count_once(near: float) -> None:
    """Weights of 64 rows on near keys and on some columns: both scores have the near part, the set has it once."""
    columns = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:40] + 100
    weights = torch.zeros(ROWS, KEYS)
    for row in range(ROWS):
        position = KEYS - ROWS + row
        weights[row, position - 49 : position + 1] = near / 50
        weights[row, columns] = (1 - near) / 40
    distance = torch.arange(KEYS - ROWS, KEYS)[:, None] - torch.arange(KEYS)
    slash = torch.zeros(KEYS).index_add_(0, distance.clamp(min=0).flatten(), weights.flatten())
    chosen = choose(weights.sum(0)[None], slash[None], ROWS, 0.9, KEYS, KEYS)
    attended = torch.isin(distance, chosen.slash_indexes[0]) | torch.isin(
        torch.arange(KEYS), chosen.vertical_indexes[0]
    )
    held = float((weights * attended).sum() / ROWS)
    assert held == pytest.approx(float(chosen.expected[0]), rel=1e-4)
    assert 0.9 <= held < 0.93  # columns of 0.5 or 1.75 % each


@pytest.mark.parametrize("chunk_len", [None, 256])
def test_recall_of_the_voting_rows(chunk_len: int | None) -> None:
    """On peaked attention the set holds what was asked for, measured by the log-sum-exps of the kernels."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 4, 64, generator=generator) for n in (64, 1000, 1000))
    q, k = q * 0.3, k * 0.3
    k[torch.randint(0, 900, (12,), generator=generator)] += 2 * q.mean(0)  # columns for all rows
    rotations: dict[str, Any] = {}
    if chunk_len is not None:
        rotations = {"q_succ": q.roll(1, -1), "q_inter": q.roll(2, -1), "chunk_len": chunk_len}
    chosen = select_by_coverage(q, k, coverage=0.9, max_vertical=1000, max_slash=1000, **rotations)
    sets = {"vertical_indexes": chosen.vertical_indexes, "slash_indexes": chosen.slash_indexes}
    if chunk_len is None:
        sparse, full = (
            ops.vertical_slash_attention(q, k, v, **sets, return_lse=True),
            ops.attention(q, k, v, return_lse=True),
        )
    else:
        queries = (q, rotations["q_succ"], rotations["q_inter"])
        sparse, full = (
            ops.dual_chunk_attention(*queries, k, v, chunk_len=chunk_len, return_lse=True, **options)
            for options in (sets, {})
        )
    recall = (sparse[1] - full[1]).exp().mean(0)
    assert (recall >= 0.85).all()
    assert (recall <= 1 + 1e-5).all()


@pytest.mark.parametrize("dual_chunk", [False, True])
def test_prefill_by_coverage(write_checkpoint: WriteCheckpoint, dual_chunk: bool) -> None:
    options = {"dual_chunk_attention_config": DUAL_CHUNK} if dual_chunk else {}
    path = write_checkpoint(**options)  # no budgets: coverage needs none
    tokens = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0))
    dense = prefill(load_model(path, attention="dense"), tokens)
    errors, densities = [], []
    for coverage in (0.3, 0.7, 0.98):
        model = load_model(path, attention="sparse", coverage=coverage)
        assert model.with_options(coverage=0.5).config.sparse.coverage == 0.5
        result = prefill(model, tokens, chunk_tokens=256)
        errors.append(float((result.logits - dense.logits).norm() / dense.logits.norm()))
        densities.append(result.stats.density)
    assert densities == sorted(densities)
    assert densities[0] < densities[-1] <= 1
    assert errors[-1] < 0.1 < errors[0] or errors[-1] < errors[0]


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1.0, math.nan])
def test_coverage_is_checked(coverage: float, write_checkpoint: WriteCheckpoint) -> None:
    q, k, _ = random_qkv(4, 10, 1, 1, 64, torch.float32)
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\), got"):
        select_by_coverage(q, k, coverage=coverage, max_vertical=1, max_slash=1)
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\), got"):
        load_model(write_checkpoint(), coverage=coverage)


def test_dense_attention_has_no_coverage(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint()
    with pytest.raises(ValueError, match="coverage must be None with attention='dense', which is never sparse, got"):
        load_model(directory, attention="dense", coverage=0.9)
    with pytest.raises(ValueError, match="coverage must be None with attention='dense'"):
        load_model(directory, attention="dense").with_options(coverage=0.9)


def test_ceilings_are_checked() -> None:
    q, k, _ = random_qkv(4, 10, 1, 1, 64, torch.float32)
    with pytest.raises(ValueError, match="max_slash must be >= 1, got 0"):
        select_by_coverage(q, k, coverage=0.5, max_vertical=1, max_slash=0)
