"""Dense, vertical-slash and dual-chunk attention against the reference, on every instruction set of this CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference, random_indexes, random_qkv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    name: str
    seqlen_q: int
    seqlen_k: int
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def qkv(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return random_qkv(self.seqlen_q, self.seqlen_k, self.num_heads, self.num_kv_heads, self.head_dim, dtype)

    def __str__(self) -> str:
        return self.name


def check(name: str, tensors: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Runs op and reference ``name`` on floating-point ``tensors`` and compares output and LSE."""
    op, definition = getattr(ops, name), getattr(reference, name)
    dtype = tensors[0].dtype
    out, lse = op(*tensors, return_lse=True, **kwargs)
    exact, exact_lse = definition(
        *(t.double() if t.is_floating_point() else t for t in tensors), return_lse=True, **kwargs
    )
    rounded, rounded_lse = definition(*tensors, return_lse=True, compute_dtype=dtype, **kwargs)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close_to_reference(out, exact, rounded)
    assert_close_to_reference(lse, exact_lse, rounded_lse, floor=2e-5)
    assert torch.equal(op(*tensors, **kwargs), out)


DENSE = [
    Case("regular", 128, 128, head_dim=128),
    Case("ragged_tail", 130, 197),
    Case("rows_after_long_past", 70, 1000),
    Case("gqa_4", 100, 300, num_heads=8, num_kv_heads=2),
    Case("gqa_7", 65, 129, num_heads=7, num_kv_heads=1, head_dim=128),
    Case("gqa_16_heads_over_task_limit", 64, 200, num_heads=16, num_kv_heads=1),
    Case("mha", 96, 96, num_heads=3, num_kv_heads=3),
    Case("one_row", 1, 513),
    Case("one_key", 1, 1),
    Case("rows_before_first_key", 90, 40),
    Case("many_tiles", 64, 2000, head_dim=128),
    Case("full", 100, 333, options={"causal": False}),
    Case("full_more_rows_than_keys", 100, 33, options={"causal": False}),
    Case("window", 150, 400, options={"window": 100}),
    Case("window_1", 150, 400, options={"window": 1}),
    Case("window_larger_than_keys", 150, 400, options={"window": 10**12}),
    Case("window_full", 150, 400, options={"window": 70, "causal": False}),
    Case("scale", 64, 256, options={"softmax_scale": 1.3}),
    Case("scale_zero", 64, 256, options={"softmax_scale": 0.0}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(case: Case, dtype: torch.dtype, prefill_kernels: str) -> None:
    check("attention", case.qkv(dtype), **case.options)


@dataclass(frozen=True)
class SparseCase(Case):
    verticals: tuple[int, ...] = (20,)
    slashes: tuple[int, ...] = (5,)

    def indexes(self) -> tuple[Tensor, Tensor]:
        return (
            random_indexes(self.num_heads, self.seqlen_k, list(self.verticals), seed=1),
            random_indexes(self.num_heads, self.seqlen_k, list(self.slashes), seed=2),
        )


SPARSE = [
    SparseCase("regular", 512, 512, head_dim=128),
    SparseCase("ragged_tail", 200, 333),
    SparseCase("past_not_on_block_border", 130, 707, verticals=(60,), slashes=(9,)),
    SparseCase("per_head_sizes", 100, 600, num_heads=4, num_kv_heads=2, verticals=(0, 30, 7), slashes=(40, 0, 3)),
    SparseCase("no_columns", 200, 400, verticals=(0,)),
    SparseCase("no_slashes", 200, 400, slashes=(0,)),
    SparseCase("nothing", 100, 200, verticals=(0,), slashes=(0,)),
    SparseCase("all_columns", 150, 300, verticals=(300,), slashes=(0,)),
    SparseCase("all_slashes", 150, 300, verticals=(0,), slashes=(300,)),
    SparseCase("touching_runs", 300, 900, slashes=(120,)),
    SparseCase("one_row", 1, 300),
    SparseCase("one_key", 1, 1, verticals=(1,), slashes=(0,)),
    SparseCase("rows_before_first_key", 90, 40, verticals=(5,), slashes=(5,)),
    SparseCase("gqa_7", 129, 500, num_heads=7, num_kv_heads=1, head_dim=128),
    SparseCase("many_columns", 64, 3000, verticals=(1000,), slashes=(10,)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_vertical_slash(case: SparseCase, dtype: torch.dtype, prefill_kernels: str) -> None:
    check("vertical_slash_attention", (*case.qkv(dtype), *case.indexes()))


def test_columns_that_one_block_of_two_attends(prefill_kernels: str) -> None:
    """Slashes 128 apart cover, for every other row block, all columns given; the blocks between attend all of these."""
    q, k, v = random_qkv(200, 1600, 2, 1, 64, torch.bfloat16)
    slashes = torch.arange(0, 1600, 128, dtype=torch.int32).expand(2, -1).contiguous()
    positions = torch.arange(1600, dtype=torch.int32)
    columns = positions[positions % 128 < 64].expand(2, -1).contiguous()
    check("vertical_slash_attention", (q, k, v, columns, slashes))


ATTENDED = {
    "dense": (None, None, {}),
    "window": (None, None, {"window": 100}),
    "sparse": ((40, 0), (9, 3), {}),
    "dual_chunk": (None, None, {"chunk_len": 192}),
    "sparse_dual_chunk": ((40, 300), (9, 0), {"chunk_len": 192}),
}


@pytest.mark.parametrize("name", ATTENDED)
def test_attended_set_is_exact(name: str, prefill_kernels: str) -> None:
    """Equal scores weigh every attended key alike; one-hot values then show which these are, 64 keys at a time."""
    verticals, slashes, options = ATTENDED[name]
    rows, keys = 150, 640
    q, k, _ = random_qkv(rows, keys, 2, 1, 64, torch.bfloat16)
    q = torch.zeros_like(q)
    indexes: tuple[Tensor, ...] = ()
    if verticals is not None and slashes is not None:
        indexes = random_indexes(2, keys, list(verticals), seed=1), random_indexes(2, keys, list(slashes), seed=2)
        expected = reference.vertical_slash_mask(*indexes, rows, keys)
    else:
        row, key = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)
        expected = ((key <= row) & (key > row - options.get("window", keys))).expand(2, -1, -1)
    for first in range(0, keys, 64):
        v = torch.zeros(keys, 1, 64, dtype=torch.bfloat16)
        v[first : first + 64, 0] = torch.eye(64)
        if "chunk_len" in options:
            sets = dict(zip(("vertical_indexes", "slash_indexes"), indexes, strict=False))
            out = ops.dual_chunk_attention(q, q, q, k, v, **sets, **options)
        elif indexes:
            out = ops.vertical_slash_attention(q, k, v, *indexes)
        else:
            out = ops.attention(q, k, v, **options)
        assert isinstance(out, Tensor)
        assert torch.equal(out.transpose(0, 1) > 0, expected[:, :, first : first + 64])


@pytest.mark.parametrize("distance_gap", [62, 63, 64, 65, 66, 128])
def test_slash_runs_at_the_border_of_touching(distance_gap: int) -> None:
    """Two slashes whose bands overlap, touch or just miss each other."""
    q, k, v = random_qkv(150, 700, 1, 1, 64, torch.float32)
    slashes = torch.tensor([[37, 37 + distance_gap]], dtype=torch.int32)
    columns = torch.arange(0, 700, 3, dtype=torch.int32)[None]
    check("vertical_slash_attention", (q, k, v, columns, slashes))


def test_vertical_slash_mask_by_hand() -> None:
    """The attended set of one row, written out from the definition."""
    columns = torch.tensor([[3, 150]], dtype=torch.int32)
    slashes = torch.tensor([[0, 100]], dtype=torch.int32)
    mask = reference.vertical_slash_mask(columns, slashes, 200, 200)
    # p = 140: a = 128; slash 0 covers [128, 192), slash 100 covers [28, 92); columns 3 and 150; all with j <= 140
    expected = {3, *range(28, 92), *range(128, 141)}
    assert set(mask[0, 140].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("name", ["vertical_slash_attention", "dual_chunk_attention"])
def test_attended_pairs_are_counted(name: str, prefill_kernels: str) -> None:
    q, k, v = random_qkv(150, 700, 3, 3, 64, torch.bfloat16)
    columns, slashes = random_indexes(3, 700, [40, 0, 9]), random_indexes(3, 700, [10, 3, 0])
    if name == "vertical_slash_attention":
        attended = ops._ops.vertical_slash_attention(q, k, v, columns, slashes, 0.125)[2]
    else:
        attended = ops._ops.dual_chunk_attention(q, q, q, k, v, 192, columns, slashes, None, 0.125)[2]
    mask = reference.vertical_slash_mask(columns, slashes, 150, 700)
    assert attended.tolist() == mask.sum(dim=(1, 2)).tolist()


DUAL_CHUNK = [
    SparseCase("intra_only", 100, 150, options={"chunk_len": 192}),
    SparseCase("succ", 200, 300, options={"chunk_len": 192}),
    SparseCase("inter", 200, 1000, head_dim=128, options={"chunk_len": 192}),
    SparseCase("several_borders", 500, 700, options={"chunk_len": 64}),
    SparseCase("gqa_7", 100, 500, num_heads=7, num_kv_heads=1, options={"chunk_len": 128}),
    SparseCase("one_row_first_of_chunk", 1, 385, options={"chunk_len": 128}),
    SparseCase("ends_on_border", 128, 384, options={"chunk_len": 128}),
    SparseCase("empty_stages", 300, 900, verticals=(2,), slashes=(1,), options={"chunk_len": 128}),
    SparseCase("nothing", 70, 500, verticals=(0,), slashes=(0,), options={"chunk_len": 128}),
]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DUAL_CHUNK, ids=str)
def test_dual_chunk(case: SparseCase, dtype: torch.dtype, sparse: bool, prefill_kernels: str) -> None:
    q_intra, k, v = case.qkv(dtype)
    q_succ, q_inter = (torch.randn_like(q_intra) for _ in range(2))
    indexes = dict(zip(("vertical_indexes", "slash_indexes"), case.indexes(), strict=True)) if sparse else {}
    check("dual_chunk_attention", (q_intra, q_succ, q_inter, k, v), **case.options, **indexes)


def test_dual_chunk_equals_plain_within_one_chunk() -> None:
    q, k, v = random_qkv(100, 190, 2, 1, 64, torch.float32)
    unused = torch.full_like(q, math.nan)
    out = ops.dual_chunk_attention(q, unused, unused, k, v, chunk_len=192)
    assert torch.equal(out, ops.attention(q, k, v))


def test_rows_without_keys_are_zero(prefill_kernels: str) -> None:
    q, k, v = random_qkv(64, 256, 1, 1, 64, torch.bfloat16)
    nothing = torch.full((1, 4), -1, dtype=torch.int32)
    out, lse = ops.vertical_slash_attention(q, k, v, nothing, nothing, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_no_rows_and_no_keys() -> None:
    q, k, v = random_qkv(0, 10, 2, 1, 64, torch.float32)
    assert ops.attention(q, k, v).shape == (0, 2, 64)
    q, k, v = random_qkv(5, 0, 2, 1, 64, torch.float32)
    out, lse = ops.attention(q, k, v, return_lse=True)
    assert out.abs().max() == 0
    assert (lse == -math.inf).all()


def test_strided_inputs(prefill_kernels: str) -> None:
    """Views of a fused projection and transposed (HND) storage give the same result as contiguous copies."""
    fused = torch.randn(100, 6, 64, dtype=torch.bfloat16)
    q, k, v = fused[:, :4], fused[:, 4:5], fused[:, 5:6]
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(ops.attention(q, k, v), expected)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(ops.attention(*transposed), expected)


def test_offsets_beyond_32_bits(prefill_kernels: str) -> None:
    """Rows a billion elements apart; the memory between them is reserved and never touched."""
    q, k, v = random_qkv(4, 4, 2, 1, 64, torch.bfloat16)
    storage = torch.empty(3 * 2**30 + 64, dtype=torch.bfloat16)
    far_k = storage.as_strided((4, 1, 64), (2**30, 64, 1)).copy_(k)
    expected = ops.attention(q, k, v)
    assert torch.equal(ops.attention(q, far_k, v), expected)
    diagonals = torch.arange(4, dtype=torch.int32).expand(2, 4).contiguous()
    assert torch.equal(ops.vertical_slash_attention(q, far_k, v, diagonals, diagonals), expected)


def test_large_scores_do_not_overflow(prefill_kernels: str) -> None:
    q, k, v = random_qkv(70, 300, 2, 1, 64, torch.bfloat16)
    check("attention", (q * 100, k * 100, v))


def test_results_do_not_depend_on_threads() -> None:
    q, k, v = random_qkv(300, 900, 4, 2, 64, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.attention(q, k, v)
        torch.set_num_threads(3)
        assert torch.equal(ops.attention(q, k, v), one)
    finally:
        torch.set_num_threads(threads)


def test_values_do_not_leak_through_masked_keys(prefill_kernels: str) -> None:
    """A NaN or infinity in keys and values that a row does not attend must not reach it."""
    q, k, v = random_qkv(100, 100, 1, 1, 64, torch.bfloat16)
    expected = ops.attention(q[:50], k[:50], v[:50])
    k[50:], v[50:] = math.nan, math.inf
    columns = torch.arange(50, dtype=torch.int32)[None]
    no_slash = torch.full((1, 1), -1, dtype=torch.int32)
    out = ops.vertical_slash_attention(q, k, v, columns, no_slash)
    torch.testing.assert_close(out[:50], expected, rtol=2e-2, atol=1e-2)
    assert torch.isfinite(out).all()


q64, k64, v64 = random_qkv(70, 100, 4, 2, 64, torch.float32)
INDEXES = torch.zeros(4, 3, dtype=torch.int32).copy_(torch.tensor([1, 5, -1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.attention(q64, k64, v64[:7]),
            r"v must have shape .* = \[100, 2, 64\], got \[7, 2, 64\]",
        ),
        (lambda: ops.attention(q64, k64[..., :32], v64), r"k must have shape .*, got \[100, 2, 32\]"),
        (lambda: ops.attention(q64[0], k64, v64), r"q must have shape .*, got \[4, 64\]"),
        (lambda: ops.attention(q64[..., :32], k64[..., :32], v64), "head_dim must be 64 or 128, got 32"),
        (lambda: ops.attention(q64[:, :3], k64, v64), "multiple of num_kv_heads of k, got 3 and 2"),
        (lambda: ops.attention(q64.double(), k64, v64), "q must have dtype .*, got float64"),
        (lambda: ops.attention(q64, k64.half(), v64), "k must have dtype float32, got float16"),
        (lambda: ops.attention(q64, k64, v64, window=0), "window must be positive or None, got 0"),
        (lambda: ops.attention(q64, k64, v64, softmax_scale=math.nan), "softmax_scale must be finite in float32, got"),
        (lambda: ops.attention(q64, k64, v64, softmax_scale=1e300), r"must be finite in float32, got 1e\+300"),
        (lambda: ops.attention(q64, k64, None), "attention: v must be a tensor, got None"),
        (
            lambda: ops.attention(q64, k64.to("meta"), v64),
            r"attention: k must be on the device of q \(cpu\), got meta",
        ),
        (
            lambda: ops.attention(q64, k64, v64.clone().requires_grad_()),
            "attention: v must not require grad, since ops run forward only",
        ),
        (
            lambda: ops.attention(q64, torch.empty(100, 2, 128)[..., ::2], v64),
            "k must be contiguous in its last dimension, got stride 2",
        ),
        (
            lambda: ops.vertical_slash_attention(q64, k64, v64, INDEXES[:2], INDEXES),
            r"vertical_indexes must have shape \[num_heads, size\] = \[4, \*\], got \[2, 3\]",
        ),
        (
            lambda: ops.vertical_slash_attention(q64, k64, v64, INDEXES.long(), INDEXES),
            "vertical_indexes must have dtype int32, got int64",
        ),
        (
            lambda: ops.vertical_slash_attention(q64, k64, v64, INDEXES, INDEXES + 98),
            r"slash_indexes must lie in \[0, seqlen_k = 100\).*got 103 at \[0, 1\]",
        ),
        (
            lambda: ops.vertical_slash_attention(q64, k64, v64, INDEXES - 1, INDEXES),
            r"vertical_indexes must lie in .*got -2 at \[0, 2\]",
        ),
        (
            lambda: ops.vertical_slash_attention(q64, k64, v64, INDEXES.flip(1), INDEXES),
            "vertical_indexes must be strictly increasing, padding last, got 5 after -1",
        ),
        (
            lambda: ops.vertical_slash_attention(q64, k64, v64, INDEXES, INDEXES * 0),
            "slash_indexes must be strictly increasing, padding last, got 0 after 0",
        ),
        (
            lambda: ops.dual_chunk_attention(q64, q64, q64, k64, v64, chunk_len=100),
            "chunk_len must be a positive multiple of 64, got 100",
        ),
        (
            lambda: ops.dual_chunk_attention(q64, q64[:5], q64, k64, v64, chunk_len=64),
            r"q_succ must have shape .*got \[5, 4, 64\]",
        ),
        (
            lambda: ops.dual_chunk_attention(q64, q64, q64, k64, v64, chunk_len=64, slash_indexes=INDEXES),
            "vertical_indexes and slash_indexes must be given together, got only slash_indexes",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
