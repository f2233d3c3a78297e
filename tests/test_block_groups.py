"""Block groups against the reference: selection by pooled rows and keys, attention over the bitmap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference, random_qkv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    name: str
    seqlen_q: int
    seqlen_k: int
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    chunk_len: int | None = None

    def qkv(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return random_qkv(self.seqlen_q, self.seqlen_k, self.num_heads, self.num_kv_heads, self.head_dim, dtype)

    def rotations(self, q: Tensor) -> dict[str, Any]:
        """Stand-ins for the other rotations: other rows of the same kind."""
        if self.chunk_len is None:
            return {}
        return {"q_succ": q.roll(1, 0), "q_inter": q.roll(2, 0), "chunk_len": self.chunk_len}

    def bitmap(self, density: float = 0.3) -> Tensor:
        """Random bits, those past the last key and behind the rows included."""
        generator = torch.Generator().manual_seed(1)
        shape = self.num_heads, ops.row_blocks(self.seqlen_q, self.seqlen_k), -(-self.seqlen_k // 512), 32
        bits = torch.rand(shape, generator=generator) < density
        return (bits.long() << torch.arange(32)).sum(-1).to(torch.int32)

    def thresholds(self) -> Tensor:
        """Around the share of an average key, and dense for one block."""
        generator = torch.Generator().manual_seed(2)
        shape = self.num_heads, ops.row_blocks(self.seqlen_q, self.seqlen_k)
        thresholds = torch.rand(shape, generator=generator) * 2 / self.seqlen_k
        thresholds[0, 0] = 0
        return thresholds

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("regular", 512, 512, head_dim=128),
    Case("ragged_tail", 200, 333, num_heads=4, num_kv_heads=2),
    Case("past_not_on_a_block_border", 130, 707),
    Case("past_not_on_a_group_border", 90, 1001),
    Case("gqa_7", 129, 600, num_heads=7, head_dim=128),
    Case("one_row", 1, 300),
    Case("one_key", 1, 1),
    Case("many_words", 70, 2100),
    Case("dual_chunk", 300, 700, chunk_len=192),
    Case("dual_chunk_borders_in_a_task", 700, 900, chunk_len=64),
    Case("dual_chunk_gqa", 200, 1000, num_heads=4, num_kv_heads=2, head_dim=128, chunk_len=320),
]
AFTER_ALL = [Case("rows_before_first_key", 90, 40), Case("no_rows", 0, 100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, AFTER_ALL[0]], ids=str)
def test_attention(case: Case, dtype: torch.dtype, prefill_kernels: str) -> None:
    q, k, v = case.qkv(dtype)
    check_attention(case, q, k, v, case.bitmap())


def check_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, block_groups: Tensor) -> Tensor:
    name = "block_group_attention" if case.chunk_len is None else "dual_chunk_attention"
    rotations = case.rotations(q)
    queries = [q] if case.chunk_len is None else [q, rotations["q_succ"], rotations["q_inter"]]
    chunk = {} if case.chunk_len is None else {"chunk_len": case.chunk_len}
    options = {"block_groups": block_groups, "return_lse": True, **chunk}
    out, lse = getattr(ops, name)(*queries, k, v, **options)
    definition = getattr(reference, name)
    exact, exact_lse = definition(*(x.double() for x in (*queries, k, v)), **options)
    rounded, rounded_lse = definition(*queries, k, v, compute_dtype=q.dtype, **options)
    assert out.dtype == q.dtype
    assert_close_to_reference(out, exact, rounded)
    assert_close_to_reference(lse, exact_lse, rounded_lse, floor=2e-5)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attended_pairs_are_counted(case: Case, prefill_kernels: str) -> None:
    q, k, v = case.qkv(torch.bfloat16)
    bitmap = case.bitmap()
    if case.chunk_len is None:
        attended = ops._ops.block_group_attention(q, k, v, bitmap, 0.125)[2]
    else:
        attended = ops._ops.dual_chunk_attention(q, q, q, k, v, case.chunk_len, None, None, bitmap, 0.125)[2]
    mask = reference.block_group_mask(bitmap, case.seqlen_q, case.seqlen_k)
    assert attended.tolist() == mask.sum(dim=(1, 2)).tolist()


def test_all_bits_are_dense_attention(prefill_kernels: str) -> None:
    q, k, v = random_qkv(200, 700, 2, 1, 64, torch.bfloat16)
    everything = torch.full((2, ops.row_blocks(200, 700), 2), -1, dtype=torch.int32)
    out, lse = ops.block_group_attention(q, k, v, everything, return_lse=True)
    dense, dense_lse = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, dense_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out, dense, atol=2e-2, rtol=2e-2)


def test_no_bits_are_no_keys(prefill_kernels: str) -> None:
    q, k, v = random_qkv(100, 300, 2, 1, 64, torch.bfloat16)
    nothing = torch.zeros(2, ops.row_blocks(100, 300), 1, dtype=torch.int32)
    out, lse = ops.block_group_attention(q, k, v, nothing, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_mask_of_an_example() -> None:
    bitmap = torch.zeros(1, 4, 1, dtype=torch.int32)
    bitmap[0, 2, 0] = 1 << 3 | 1 << 8 | 1 << 9  # of rows 128 to 191: keys 48 to 63 and 128 to 159
    mask = reference.block_group_mask(bitmap, 200, 200)
    assert set(mask[0, 140].nonzero().flatten().tolist()) == {*range(48, 64), *range(128, 141)}
    assert not mask[0, 127].any()
    assert not mask[0, 192].any()


def test_nan_outside_of_the_groups_does_not_show() -> None:
    """A key and a value that no row attends may be anything."""
    case = Case("", 128, 512)
    q, k, v = case.qkv(torch.float32)
    bitmap = case.bitmap()
    unused = int((~(reference.block_group_mask(bitmap, 128, 512).any(dim=(0, 1)))).nonzero()[0])
    k[unused] = v[unused] = math.nan
    assert not ops.block_group_attention(q, k, v, bitmap).isnan().any()  # type: ignore[union-attr]


def test_strided(prefill_kernels: str) -> None:
    case = Case("", 130, 400, num_heads=4, num_kv_heads=2)
    q, k, v = (torch.cat([x, x], dim=1)[:, : x.shape[1]] for x in case.qkv(torch.bfloat16))
    assert not k.is_contiguous()
    check_attention(case, q, k, v, case.bitmap())


def check_selection(q: Tensor, k: Tensor, thresholds: Tensor, **rotations: Any) -> tuple[Tensor, Tensor]:
    """The selection equals the reference's, or differs only where a share is the threshold to rounding."""
    block_groups, kept = ops.select_block_groups(q, k, thresholds, **rotations)
    expected, expected_kept = reference.select_block_groups(q, k, thresholds, **rotations)
    assert block_groups.dtype == torch.int32
    assert block_groups.shape == expected.shape
    torch.testing.assert_close(kept, expected_kept, atol=2e-3, rtol=0)
    differing = (((block_groups ^ expected)[..., None] >> torch.arange(32)) & 1).flatten(2).nonzero()
    if len(differing):
        assert len(differing) <= 2
        shares = reference.block_group_shares(q, k, **rotations)
        head, block, group = differing.T
        torch.testing.assert_close(shares[head, block, group], 16 * thresholds[head, block].double(), rtol=1e-3, atol=0)
    return block_groups, kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection(case: Case, dtype: torch.dtype, selection_kernels: str) -> None:
    q, k, _ = case.qkv(dtype)
    check_selection(q, k, case.thresholds(), **case.rotations(q))


def test_forced_groups(selection_kernels: str) -> None:
    """Two groups at the start, the own block and the one before, whatever the threshold; nothing after the block."""
    q, k, _ = random_qkv(256, 600, 1, 1, 64, torch.bfloat16)  # rows 344 to 599: blocks 5 to 9
    block_groups, kept = ops.select_block_groups(q, k, torch.full((1, 5), math.inf))
    for number, words in enumerate(block_groups[0]):
        bits = ((words[:, None] >> torch.arange(32)) & 1).flatten().nonzero().flatten().tolist()
        own = 4 * (5 + number)
        assert bits == [0, 1, *range(own - 4, min(own + 4, 38))]
    assert (kept < 1).all()


def test_threshold_zero_is_dense(selection_kernels: str) -> None:
    q, k, _ = random_qkv(100, 600, 2, 1, 64, torch.bfloat16)
    block_groups, kept = ops.select_block_groups(q, k, torch.zeros(2, ops.row_blocks(100, 600)))
    mask = reference.block_group_mask(block_groups, 100, 600)
    assert torch.equal(mask.sum(dim=(1, 2)), torch.full((2,), sum(range(501, 601))))
    torch.testing.assert_close(kept, torch.ones_like(kept), atol=1e-3, rtol=0)


def test_a_planted_group_is_found(selection_kernels: str) -> None:
    """Sixteen keys that the rows of one block match, and no other block."""
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    q, k, _ = random_qkv(1024, 1024, 1, 1, 64, torch.bfloat16)
    q, k = q * 0.1, k * 0.1
    q[640:704, 0] += 8 * direction
    k[320:336, 0] += 6 * direction
    block_groups, _ = ops.select_block_groups(q, k, torch.full((1, 16), 20 / 1024))
    found = (block_groups[0, :, 0] >> 20) & 1
    near = [5, 6]  # its own block and the next attend it anyway
    assert [block for block in range(16) if found[block] and block not in near] == [10]


def test_nan_is_attended(selection_kernels: str) -> None:
    """Shares that are not numbers: the block is dense, so that NaN goes where dense attention puts it."""
    q, k, _ = random_qkv(256, 256, 1, 1, 64, torch.bfloat16)
    q[130] = math.nan
    block_groups, kept = ops.select_block_groups(q, k, torch.full((1, 4), math.inf))
    assert (block_groups[0, 2, 0] & 0xFFF) == 0xFFF
    assert kept.isnan().tolist() == [[False, False, True, False]]
    assert (block_groups[0, 3, 0] >> 2) & 0x3F == 0  # of the next block only what is forced


def test_rows_do_not_depend_on_where_a_prompt_is_cut(selection_kernels: str) -> None:
    """Calls that begin at a block's first row choose what one call for all rows chooses."""
    q, k, _ = random_qkv(576, 576, 2, 1, 64, torch.bfloat16)
    thresholds = torch.full((2, 9), 1 / 576)
    whole, kept = ops.select_block_groups(q, k, thresholds)
    for begin, end in ((0, 192), (192, 448), (448, 576)):
        part, part_kept = ops.select_block_groups(
            q[begin:end], k[:end], thresholds[:, begin // 64 : end // 64].contiguous()
        )
        assert torch.equal(part, whole[:, begin // 64 : end // 64, : part.shape[2]])
        torch.testing.assert_close(part_kept, kept[:, begin // 64 : end // 64], atol=1e-5, rtol=0)


def test_selection_does_not_depend_on_threads() -> None:
    q, k, _ = random_qkv(1500, 4000, 2, 1, 64, torch.bfloat16)
    thresholds = torch.full((2, ops.row_blocks(1500, 4000)), 1 / 4000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.select_block_groups(q, k, thresholds)
        torch.set_num_threads(3)
        many = ops.select_block_groups(q, k, thresholds)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


def test_no_rows(selection_kernels: str) -> None:
    q, k, v = random_qkv(0, 100, 2, 1, 64, torch.bfloat16)
    block_groups, kept = ops.select_block_groups(q, k, torch.empty(2, 0))
    assert block_groups.shape == (2, 0, 1)
    assert kept.shape == (2, 0)
    assert ops.block_group_attention(q, k, v, block_groups).shape == (0, 2, 64)  # type: ignore[union-attr]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "thresholds' shape": (
        {"thresholds": torch.zeros(2, 4)},
        r"thresholds must have shape \[num_heads, num_blocks\] = \[2, 3\], got \[2, 4\]",
    ),
    "thresholds' dtype": (
        {"thresholds": torch.zeros(2, 3).double()},
        "thresholds must have dtype float32, got float64",
    ),
    "thresholds' strides": ({"thresholds": torch.zeros(3, 2).T}, "thresholds must be contiguous"),
    "fewer keys than rows": (
        {"k": torch.zeros(100, 1, 64)},
        r"k must have at least as many rows as q \(130\), got 100",
    ),
    "one rotation": ({"q_succ": torch.zeros(130, 2, 64)}, "q_succ and chunk_len must be given together"),
    "rotations' rows": (
        {"q_succ": torch.zeros(64, 2, 64), "q_inter": torch.zeros(130, 2, 64), "chunk_len": 64},
        r"q_succ must have shape .* = \[130, 2, 64\], got \[64, 2, 64\]",
    ),
    "chunk_len": (
        {"q_succ": torch.zeros(130, 2, 64), "q_inter": torch.zeros(130, 2, 64), "chunk_len": 100},
        "chunk_len must be a positive multiple of 64, got 100",
    ),
    "scale": ({"softmax_scale": math.inf}, "softmax_scale must be finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_selection(name: str) -> None:
    changed, message = WRONG[name]
    q, k, _ = random_qkv(130, 150, 2, 1, 64, torch.float32)
    arguments = {"q": q, "k": k, "thresholds": torch.zeros(2, 3), **changed}
    with pytest.raises(ValueError, match="select_block_groups: " + message):
        ops.select_block_groups(**arguments)


def test_wrong_bitmaps() -> None:
    q, k, v = random_qkv(130, 150, 2, 1, 64, torch.float32)
    shape = r"block_groups must have shape \[num_heads, num_blocks, ceil\(seqlen_k / 512\)\] = \[2, 3, 1\], got "
    with pytest.raises(ValueError, match="block_group_attention: " + shape + r"\[2, 2, 1\]"):
        ops.block_group_attention(q, k, v, torch.zeros(2, 2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="block_groups must have dtype int32, got int64"):
        ops.block_group_attention(q, k, v, torch.zeros(2, 3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="block_groups must be contiguous"):
        ops.block_group_attention(q, k, v, torch.zeros(3, 2, 1, dtype=torch.int32).transpose(0, 1))
    with pytest.raises(ValueError, match="dual_chunk_attention: " + shape):
        ops.dual_chunk_attention(q, q, q, k, v, chunk_len=64, block_groups=torch.zeros(2, 2, 1, dtype=torch.int32))
    index = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="block_groups must not be given together with vertical_indexes"):
        ops.dual_chunk_attention(
            q,
            q,
            q,
            k,
            v,
            chunk_len=64,
            vertical_indexes=index,
            slash_indexes=index,
            block_groups=torch.zeros(2, 3, 1, dtype=torch.int32),
        )
