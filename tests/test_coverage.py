"""Thresholds by coverage, and what block groups of a coverage keep of planted attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import DUAL_CHUNK, TINY, WriteCheckpoint, budgets
from qwen_sparse import load_model, ops, prefill, reference
from qwen_sparse.model.coverage import select_by_coverage, share_of_average, thresholds
from qwen_sparse.testing import random_qkv


def test_thresholds_follow_the_position_alone() -> None:
    """So that a prompt's groups depend neither on its cut nor on its length."""
    whole = thresholds(0.9, 1000, 1000)
    assert whole.dtype == torch.float32
    assert whole.shape == (ops.row_blocks(1000, 1000),)
    for rows, keys in ((1000, 1000), (360, 1000), (360, 680), (1, 700), (64, 64)):
        part = thresholds(0.9, rows, keys)
        first = (keys - rows) // 64
        assert torch.equal(part, whole[first : first + len(part)])
    torch.testing.assert_close(whole[3] * 256, torch.tensor(share_of_average(0.9)))


def test_more_coverage_is_a_lower_threshold() -> None:
    shares = [share_of_average(coverage) for coverage in (0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 0.9999)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 0
    assert share_of_average(0.95) == pytest.approx(0.25, abs=0.02)  # what it was fitted to


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, 1.5, float("nan"), "0.9", None])
def test_coverage_out_of_range(coverage: Any) -> None:
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\), got "):
        thresholds(coverage, 100, 100)


def recall(q: torch.Tensor, k: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    _, lse = reference.block_group_attention(q, k, k, groups, return_lse=True)
    _, full = reference.attention(q, k, k, return_lse=True)
    return (lse - full).exp()


def test_selection_keeps_the_groups_that_hold_the_attention(selection_kernels: str) -> None:
    """Every block looks for eight groups of its own; the rest of the keys holds little."""
    generator = torch.Generator().manual_seed(0)
    q, k, _ = random_qkv(1024, 1024, 2, 1, 64, torch.bfloat16)
    q, k = q * 0.5, k * 0.5
    directions = torch.nn.functional.normalize(torch.randn(16, 64, generator=generator), dim=-1)
    for block in range(4, 16):
        q[64 * block : 64 * block + 64] += 12 * directions[block]
        for group in torch.randperm(4 * block - 4, generator=generator)[:8].tolist():
            k[16 * group : 16 * group + 16] += 3 * directions[block]
    groups, kept = select_by_coverage(q, k, coverage=0.9)
    density = reference.block_group_mask(groups, 1024, 1024).sum() / (2 * 1024 * 1025 / 2)
    assert recall(q, k, groups)[320:].mean() > 0.85
    assert density < 0.5
    assert kept[:, 5:].mean() > 0.85


def test_dual_chunk_rotations_are_used(selection_kernels: str) -> None:
    q, k, _ = random_qkv(300, 700, 2, 1, 64, torch.bfloat16)
    q = 8 * q  # so that pooled rows and keys of random numbers differ in what they attend
    rotations = {"q_succ": q.roll(32, 0), "q_inter": q.roll(64, 0), "chunk_len": 192}
    groups, _ = select_by_coverage(q, k, coverage=0.87, **rotations)
    expected, _ = reference.select_block_groups(q, k, thresholds(0.87, 300, 700).expand(2, -1), **rotations)
    assert (groups != expected).sum() <= 1  # a share that is the threshold to rounding
    assert not torch.equal(groups, select_by_coverage(q, k, coverage=0.87)[0])


def test_models_with_a_coverage(write_checkpoint: WriteCheckpoint) -> None:
    """Budgets are given up, the checkpoint's threshold of length stays; more coverage attends more."""
    embedded = {**DUAL_CHUNK, "sparse_attention_config": budgets(TINY, 40, 110), "sparse_attention_threshold": 300}
    directory = write_checkpoint(dual_chunk_attention_config=embedded)
    ids = torch.randint(256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    previous = 0.0
    for coverage in (0.3, 0.85, 0.9):
        model = load_model(directory, coverage=coverage)
        assert model.config.sparse is not None
        assert model.config.sparse.vertical_sizes == ()
        assert not model.prefills_sparse(300)
        stats = prefill(model, ids, chunk_tokens=256).stats
        assert previous < stats.density < 1
        assert stats.kept is not None
        previous = stats.density


def test_chunks_do_not_matter(write_checkpoint: WriteCheckpoint) -> None:
    model = load_model(write_checkpoint(dual_chunk_attention_config=DUAL_CHUNK), attention="sparse", coverage=0.7)
    ids = torch.randint(256, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = prefill(model, ids)
    for chunk_tokens in (64, 200, 448):
        cut = prefill(model, ids, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(cut.logits, whole.logits, rtol=0, atol=5e-5)
        assert cut.stats.density == whole.stats.density
        assert cut.stats.kept == pytest.approx(whole.stats.kept, abs=1e-4)
