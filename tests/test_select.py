"""Selection of vertical and slash indexes against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_sparse import ops, reference
from qwen_sparse.testing import random_qkv


def check(q: Tensor, k: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The selection equals the reference's, or differs only where scores agree to rounding."""
    score_kwargs = {key: value for key, value in kwargs.items() if not key.endswith("_size")}
    scores = reference.vertical_slash_scores(q, k, **score_kwargs)
    selected = ops.select_vertical_slash(q, k, **kwargs)
    expected = reference.select_vertical_slash(q, k, **kwargs)
    for ours, theirs, score, forced in zip(selected, expected, scores, (30, 100), strict=True):
        assert ours.dtype == torch.int32
        assert ours.shape == theirs.shape
        for head in range(ours.shape[0]):
            mine, other = set(ours[head].tolist()), set(theirs[head].tolist())
            assert len(mine) == len(other)
            valid = ours[head][ours[head] >= 0]
            assert torch.equal(valid, valid.unique(sorted=True))
            assert torch.equal(ours[head][: len(valid)], valid)  # padding last
            for extra, missing in zip(sorted(mine - other), sorted(other - mine), strict=True):
                assert missing >= forced
                torch.testing.assert_close(score[head, extra], score[head, missing], rtol=1e-4, atol=1e-6)
    return selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "head_dim"),
    [(64, 300, 2, 1, 64), (200, 777, 4, 2, 128), (5, 900, 7, 1, 64), (1, 1, 1, 1, 64), (100, 100, 2, 2, 128)],
)
def test_select(
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kernels: str,
) -> None:
    q, k, _ = random_qkv(seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, dtype)
    check(q, k, vertical_size=50, slash_size=150)


@pytest.mark.parametrize("seqlen_k", [500, 577, 4097, 9000])
def test_select_dual_chunk(seqlen_k: int, kernels: str) -> None:
    """Voting rows on both sides of a chunk border, several splits of the keys."""
    q, k, _ = random_qkv(64, seqlen_k, 2, 1, 64, torch.bfloat16)
    q_succ, q_inter = torch.randn_like(q), torch.randn_like(q)
    check(q, k, vertical_size=64, slash_size=140, q_succ=q_succ, q_inter=q_inter, chunk_len=192)


def test_sizes_per_head_and_clipping(kernels: str) -> None:
    q, k, _ = random_qkv(64, 200, 4, 2, 64, torch.bfloat16)
    sizes = torch.tensor([0, 35, 200, 10_000], dtype=torch.int32)
    vertical, slash = check(q, k, vertical_size=sizes, slash_size=[120, 0, 3, 200])
    assert (vertical >= 0).sum(dim=1).tolist() == [0, 35, 200, 200]
    assert (slash >= 0).sum(dim=1).tolist() == [120, 0, 3, 200]
    assert slash[2].tolist() == [0, 1, 2, *[-1] * 197]  # forced, the lower index first


def test_fewer_voting_rows(kernels: str) -> None:
    q, k, _ = random_qkv(64, 400, 2, 1, 64, torch.bfloat16)
    check(q, k, vertical_size=60, slash_size=130, last_q=7)


def test_a_planted_column_is_found() -> None:
    """A key that every late row matches."""
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q = torch.randn(64, 1, 64) * 0.1 + 8 * direction
    k = torch.randn(1024, 1, 64) * 0.1
    k[421, 0] += 6 * direction
    vertical, _ = ops.select_vertical_slash(q, k, vertical_size=40, slash_size=110)
    assert 421 in vertical[0].tolist()


def test_a_planted_diagonal_is_found() -> None:
    """Every row matches the key 300 before it."""
    directions = torch.nn.functional.normalize(torch.randn(1024, 64), dim=-1)
    k = torch.zeros(1024, 1, 64)
    k[:-300, 0] = 6 * directions[300:]
    _, slash = ops.select_vertical_slash(8 * directions[:, None], k, vertical_size=40, slash_size=110)
    assert 300 in slash[0].tolist()


def test_ties_go_to_the_lower_index(kernels: str) -> None:
    q, k = torch.zeros(1, 1, 64).bfloat16(), torch.randn(256, 1, 64).bfloat16()  # uniform weights: every score is equal
    vertical, slash = ops.select_vertical_slash(q, k, vertical_size=50, slash_size=120)
    assert vertical[0].tolist() == list(range(50))
    assert slash[0].tolist() == list(range(120))


def test_selection_does_not_depend_on_threads() -> None:
    q, k, _ = random_qkv(64, 9000, 2, 1, 64, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.select_vertical_slash(q, k, vertical_size=500, slash_size=500)
        torch.set_num_threads(3)
        many = ops.select_vertical_slash(q, k, vertical_size=500, slash_size=500)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


SCORES = {
    "normal": torch.randn(999),
    "few values": torch.randint(-3, 3, (999,)).float(),
    "one bin": 1 + torch.rand(999) * 1e-4,
    "all equal": torch.full((999,), 0.25),
    "infinities": torch.where(torch.rand(999) < 0.3, torch.inf, torch.where(torch.rand(999) < 0.5, -torch.inf, 1.0)),
    "NaN": torch.where(torch.rand(999) < 0.5, torch.nan, torch.randn(999)),
    "NaN and -infinity": torch.where(torch.rand(999) < 0.5, torch.nan, -torch.inf),
    "signed zeros": torch.where(torch.rand(999) < 0.5, -0.0, 0.0),
    "subnormal": torch.randint(-9, 9, (999,), dtype=torch.int32).abs().view(torch.float32),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_top_indexes(scores: Tensor, kernels: str) -> None:
    """Against a stable sort, exactly; sizes from none to more than there are."""
    sizes = [0, 1, 5, 100, 500, 998, 999, 2000]
    order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
    selected = ops._ops.top_indexes(scores.expand(len(sizes), -1).contiguous(), sizes, 0)
    assert selected.shape == (len(sizes), 999)
    for row, size in zip(selected, sizes, strict=True):
        count = min(size, 999)
        assert torch.equal(row[:count].long(), order[:count].sort().values)
        assert (row[count:] == -1).all()


def test_top_indexes_of_many_keys_and_heads(kernels: str) -> None:
    """More keys than a tile of the GPU's kernels holds, and more heads than one of their launches."""
    for scores, sizes in (
        (torch.randint(0, 50, (3, 40_001)).float(), [3, 20_000, 40_000]),
        (torch.randn(300, 20), [head % 21 for head in range(300)]),
    ):
        order = scores.argsort(dim=1, descending=True, stable=True)
        for row, ranks, size in zip(ops._ops.top_indexes(scores, sizes, 0), order, sizes, strict=True):
            assert torch.equal(row[:size].long(), ranks[:size].sort().values)
            assert (row[size:] == -1).all()


def test_top_indexes_forces_the_first(kernels: str) -> None:
    scores = torch.full((3, 64), 5.0)
    scores[:, 40:] = torch.inf
    scores[:, 3] = torch.nan
    selected = ops._ops.top_indexes(scores, [2, 12, 40], 10)
    assert selected[0].tolist() == [0, 1, *[-1] * 38]
    assert selected[1].tolist() == [*range(10), 40, 41, *[-1] * 28]
    assert selected[2].tolist() == [*range(16), *range(40, 64)]


@pytest.mark.parametrize(("num_heads", "head_dim"), [(9, 64), (7, 128)])
def test_select_all_heads_of_a_group(num_heads: int, head_dim: int, kernels: str) -> None:
    """Seven heads share a CTA of the GPU's kernel, nine are divided."""
    q, k, _ = random_qkv(64, 300, num_heads, 1, head_dim, torch.float16)
    check(q, k, vertical_size=60, slash_size=130)


def test_select_of_strided_inputs(kernels: str) -> None:
    """Views of a fused projection and transposed (HND) storage give the same result as contiguous copies."""
    fused = torch.randn(200, 6, 64, dtype=torch.bfloat16)
    q, k = fused[:, :4], fused[:, 4:]
    expected = ops.select_vertical_slash(q.contiguous(), k.contiguous(), vertical_size=60, slash_size=130)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    for inputs in ((q, k), transposed):
        selected = ops.select_vertical_slash(*inputs, vertical_size=60, slash_size=130)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(selected, expected, strict=True))


@pytest.mark.parametrize("last_q", [1, 63, 64])
def test_select_across_splits_of_the_keys(last_q: int, kernels: str) -> None:
    """Diagonals that cross from one task's keys to the next; ragged last tile; all heads of a group."""
    q, k, _ = random_qkv(64, 2 * 4096 + 205, 3, 1, 64, torch.bfloat16)
    check(q, k, vertical_size=700, slash_size=4500, last_q=last_q)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.3])
def test_any_softmax_scale(softmax_scale: float, kernels: str) -> None:
    q, k, _ = random_qkv(64, 300, 2, 1, 64, torch.bfloat16)
    check(q, k, vertical_size=60, slash_size=130, softmax_scale=softmax_scale)


q64, k64, _v64 = random_qkv(64, 100, 2, 1, 64, torch.float32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vertical_size": -1}, "vertical_size must not be negative, got -1"),
        ({"slash_size": [1, 2, 3]}, "slash_size must be an int or hold num_heads = 2 sizes, got 3"),
        ({"slash_size": [50.7] * 4}, r"slash_size must be an int or hold ints, got \[50.7, "),
        ({"slash_size": "1234"}, "slash_size must be an int or hold ints, got '1234'"),
        ({"last_q": 0}, r"last_q must lie in \[1, 64\], got 0"),
        ({"last_q": 65}, r"last_q must lie in \[1, 64\], got 65"),
        ({"q_succ": q64}, "q_succ and chunk_len must be given together"),
        ({"chunk_len": 64}, "q_succ and chunk_len must be given together"),
        (
            {"q_succ": q64, "q_inter": q64[:3], "chunk_len": 64},
            r"q_inter must have at least as many rows .*got 3",
        ),
        (
            {"q_succ": q64, "q_inter": q64, "chunk_len": 70},
            "chunk_len must be a positive multiple of 64, got 70",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.select_vertical_slash(q64, k64, **{"vertical_size": 10, "slash_size": 10, **kwargs})


def test_sizes_of_any_kind_of_int() -> None:
    expected = ops.select_vertical_slash(q64, k64, vertical_size=5, slash_size=[7] * 2)
    for sizes in (np.int64(7), torch.tensor(7), torch.full((2,), 7), np.full(2, 7)):
        found = ops.select_vertical_slash(q64, k64, vertical_size=5, slash_size=sizes)  # type: ignore[arg-type]
        assert all(map(torch.equal, found, expected))


def test_fewer_keys_than_voting_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k must have at least as many rows as vote \(64\), got 10"):
        ops.select_vertical_slash(q64, k64[:10], vertical_size=5, slash_size=5)


def test_nan_scores_come_last(kernels: str) -> None:
    q, k, _ = random_qkv(64, 300, 1, 1, 64, torch.bfloat16)
    q[:] = float("nan")
    vertical, slash = ops.select_vertical_slash(q, k, vertical_size=50, slash_size=120)
    assert vertical[0].tolist() == list(range(50))
    assert slash[0].tolist() == list(range(120))
