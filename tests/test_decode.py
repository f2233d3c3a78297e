"""Decode attention over paged caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from conftest import GPU_KERNELS
from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference


@dataclass(frozen=True)
class Case:
    name: str
    seqlens_k: tuple[int, ...]
    seqlen_q: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 128
    window: int | None = None
    dual_chunk: bool = False
    chunk_len: int = 192
    scale_factors: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, cache: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Positional and keyword arguments: shuffled pages, garbage in the pages that no sequence owns."""
        generator = torch.Generator().manual_seed(3)
        batch = len(self.seqlens_k)
        pages_each = -(-max(self.seqlens_k) // self.page_size)
        num_pages = batch * pages_each + 2
        order = torch.randperm(num_pages, generator=generator)[: batch * pages_each]
        block_table = order.view(batch, pages_each).int()
        shape = (num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        kwargs: dict[str, Any] = {"window": self.window}
        if cache == "int8":
            caches = [torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for _ in range(2)]
            for name in ("k_scale", "v_scale"):
                kwargs[name] = torch.rand(shape[:3], generator=generator) / 60
            kwargs["k_bias"] = torch.randn(self.num_kv_heads, self.head_dim, generator=generator) * 2
            kwargs["inv_freq"] = 1e4 ** (-torch.arange(0, self.head_dim, 2).double() / self.head_dim)
            kwargs["attention_factor"] = 1.1
        else:
            caches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        q_shape = (batch, self.seqlen_q, self.num_heads, self.head_dim)
        queries = [torch.randn(q_shape, generator=generator).to(dtype) for _ in range(3)]
        if self.dual_chunk:
            kwargs.update(q_succ=queries[1], q_inter=queries[2], chunk_len=self.chunk_len)
        if self.scale_factors is not None:
            kwargs["scale_factors"] = torch.tensor(self.scale_factors)
        seqlens = torch.tensor(self.seqlens_k, dtype=torch.int32)
        return [queries[0], *caches, block_table, seqlens], kwargs


CASES = [
    Case("one_sequence", (300,)),
    Case("batch", (300, 17, 128), head_dim=128),
    Case("several_splits", (5000,)),
    Case("small_pages", (333,), page_size=16),
    Case("odd_pages", (333, 50), page_size=48),
    Case("rows", (400, 200), seqlen_q=5),
    Case("more_rows_than_a_task", (300,), seqlen_q=30, num_heads=8, num_kv_heads=1),
    Case("gqa_7", (500,), num_heads=7, num_kv_heads=1, head_dim=128),
    Case("one_key", (1,)),
    Case("one_key_each", (1,) * 8, head_dim=128),
    Case("all_rows_are_all_keys", (6,), seqlen_q=6),
    Case("window", (700, 90), seqlen_q=3, window=100),
    Case("dual_chunk", (1000, 385, 192), dual_chunk=True),
    Case("dual_chunk_rows_across_border", (387, 195), seqlen_q=6, dual_chunk=True),
    Case("dual_chunk_not_multiple_of_page", (1500,), dual_chunk=True, chunk_len=320),
    Case("dual_chunk_long", (4500,), seqlen_q=2, head_dim=128, dual_chunk=True, chunk_len=640),
    Case("scale_factors", (300, 17, 1200, 1), scale_factors=(1.288, 0.0, -0.7, 3.0)),
    Case("scale_factors_dual_chunk", (387, 195), seqlen_q=6, dual_chunk=True, scale_factors=(0.5, 1.1)),
]


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(case: Case, dtype: torch.dtype, cache: str, kernels: str) -> None:
    args, kwargs = case.inputs(dtype, cache)
    out, lse = ops.decode_attention(*args, return_lse=True, **kwargs)
    rounded, rounded_lse = reference.decode_attention(*args, return_lse=True, compute_dtype=dtype, **kwargs)
    wide_args = [x.double() if x.is_floating_point() else x for x in args]
    wide_kwargs = {
        key: x.double() if key in ("q_succ", "q_inter") and x is not None else x for key, x in kwargs.items()
    }
    exact, exact_lse = reference.decode_attention(*wide_args, return_lse=True, **wide_kwargs)
    assert out.dtype == dtype
    # Of an int8 cache, 16-bit kernels round the result alone.
    factor = 1.02 if cache == "int8" and dtype != torch.float32 else 2.0
    assert_close_to_reference(out, exact, rounded, floor=5e-6, factor=factor)
    assert_close_to_reference(lse, exact_lse, rounded_lse, floor=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_rows_of_any_size(dtype: torch.dtype, kernels: str) -> None:
    """A row's unit is its own: it loses nothing beside larger rows, zeros or one large channel."""
    args, kwargs = Case("", (300,), num_heads=7, num_kv_heads=1, head_dim=128).inputs(dtype, "int8")
    args[0] *= torch.tensor([1.0, 1e-3, 0.0, 3.0, 1e-5, 0.5, 1.0])[:, None].to(dtype)
    args[0][:, :, 6, 77] = 60.0
    rounded = reference.decode_attention(*args, compute_dtype=dtype, **kwargs)
    exact = reference.decode_attention(args[0].double(), *args[1:], **kwargs)
    out = ops.decode_attention(*args, **kwargs)
    for head in range(7):
        assert_close_to_reference(out[:, :, head], exact[:, :, head], rounded[:, :, head], floor=5e-6)


def test_equals_prefill_attention() -> None:
    """The last rows of a causal prefill, read from pages."""
    k, v = (torch.randn(300, 2, 64) for _ in range(2))
    q = torch.randn(3, 4, 64)
    pages = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 84)).view(3, 128, 2, 64) for x in (k, v)]
    table, seqlens = torch.arange(3, dtype=torch.int32)[None], torch.tensor([300], dtype=torch.int32)
    out = ops.decode_attention(q[None], *pages, table, seqlens)
    torch.testing.assert_close(out[0], ops.attention(q, k, v))


def test_int8_cache_equals_dequantized_cache(kernels: str) -> None:
    """What quantize_kv stored, decode reads as dequantize_kv does, bias included."""
    positions = torch.arange(256) % 192
    inv_freq = 1e6 ** (-torch.arange(0, 64, 2).double() / 64)
    bias = torch.randn(2, 64) * 50
    k = reference.rotate(torch.randn(256, 2, 64) + bias, positions, inv_freq).float()
    v = torch.randn(256, 2, 64)
    bias_args = {"k_bias": bias, "inv_freq": inv_freq}
    k8, k_scale, v8, v_scale = ops.quantize_kv(k, v, positions=positions, **bias_args)
    full = ops.dequantize_kv(k8, k_scale, v8, v_scale, dtype=torch.float32, positions=positions, **bias_args)

    def paged(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 128, *x.shape[1:])

    q = torch.randn(3, 1, 1, 4, 64) * 0.05
    table, seqlens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([256], dtype=torch.int32)
    dual_chunk = {"q_succ": q[1], "q_inter": q[2], "chunk_len": 192}
    scales = {"k_scale": paged(k_scale), "v_scale": paged(v_scale)}
    ours = ops.decode_attention(q[0], paged(k8), paged(v8), table, seqlens, **scales, **bias_args, **dual_chunk)
    expected = ops.decode_attention(q[0], *(paged(x) for x in full), table, seqlens, **dual_chunk)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("kernels", GPU_KERNELS, indirect=True)
def test_lengths_and_pages_out_of_range(cache: str, kernels: str) -> None:
    """A GPU does not check them: lengths are clamped, and keys on pages that do not exist are not attended."""
    (q, k, v, table, seqlens), kwargs = Case("", (200, 130), page_size=16).inputs(torch.bfloat16, cache)

    def run(table: torch.Tensor, seqlens: list[int], window: int | None = None) -> list[torch.Tensor]:
        lengths = torch.tensor(seqlens, dtype=torch.int32)
        return ops.decode_attention(q, k, v, table, lengths, return_lse=True, **{**kwargs, "window": window})

    capacity = table.shape[1] * 16
    for wrong, meant in (([0, -(2**31)], [1, 1]), ([capacity + 1, 2**31 - 1], [capacity] * 2)):
        for ours, expected in zip(run(table, wrong), run(table, meant), strict=True):
            assert torch.equal(ours, expected)
    absent = table.clone()
    absent[0, :5] = torch.tensor([-1, len(k), 2**31 - 1, -(2**31), 10**6])
    absent[1] = -1
    out, lse = run(absent, seqlens.tolist())
    expected, expected_lse = run(table, seqlens.tolist(), window=200 - 5 * 16)
    torch.testing.assert_close(out[0], expected[0], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(lse[0], expected_lse[0], rtol=0, atol=1e-4)
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("kernels", GPU_KERNELS, indirect=True)
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_scale_factor_not_finite(factor: float, cache: str, kernels: str) -> None:
    """A GPU does not check them: the sequence is NaN, the others are as ever."""
    args, kwargs = Case("", (600, 130), scale_factors=(1.5, 1.2)).inputs(torch.bfloat16, cache)
    expected, expected_lse = ops.decode_attention(*args, return_lse=True, **kwargs)
    kwargs["scale_factors"] = torch.tensor([factor, 1.2])
    out, lse = ops.decode_attention(*args, return_lse=True, **kwargs)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert torch.equal(out[1], expected[1])
    assert torch.equal(lse[1], expected_lse[1])


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("kernels", GPU_KERNELS, indirect=True)
def test_capacity_far_above_lengths(cache: str, kernels: str) -> None:
    """The division of the work follows the block table's width; a captured call is replayed with other lengths."""
    (q, k, v, table, _), kwargs = Case("", (300, 300), page_size=48).inputs(torch.bfloat16, cache)
    wide = torch.full((2, 2000), -1, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    for seqlens in ([1, 64], [65, 300]):
        lengths = torch.tensor(seqlens, dtype=torch.int32)
        ours = ops.decode_attention(q, k, v, wide, lengths, return_lse=True, **kwargs)
        expected = ops.decode_attention(q, k, v, table, lengths, return_lse=True, **kwargs)
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", ["same", "int8"])
def test_nan_in_a_query_stays_in_its_row(cache: str, kernels: str) -> None:
    """Also where the last tile is short, so that masked keys stand beside NaN scores."""
    args, kwargs = Case("short_tile", (300, 13)).inputs(torch.bfloat16, cache)
    args[0][:, :, 1, 3] = float("nan")
    out, lse = ops.decode_attention(*args, return_lse=True, **kwargs)
    assert out.isnan().all(-1)[:, 0].tolist() == [[False, True, False, False]] * 2
    assert lse.isnan()[:, 0].tolist() == [[False, True, False, False]] * 2


ARGS, _ = Case("small", (50, 20), page_size=16).inputs(torch.float32, "same")
ARGS8, KWARGS8 = Case("small", (50, 20), page_size=16).inputs(torch.float32, "int8")


def with_arg(index: int, value: torch.Tensor) -> list[torch.Tensor]:
    return [*ARGS[:index], value, *ARGS[index + 1 :]]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (with_arg(0, ARGS[0][0]), {}, r"q must have shape .*got \[1, 4, 64\]"),
        (
            with_arg(1, ARGS[1].half()),
            {},
            r"k_cache must have dtype float32 \(that of q\) or int8, got float16",
        ),
        (with_arg(2, ARGS[2][:3]), {}, r"v_cache must have shape .*got \[3, 16, 2, 64\]"),
        (with_arg(3, ARGS[3].long()), {}, "block_table must have dtype int32, got int64"),
        (with_arg(3, ARGS[3] + 9), {}, r"block_table must lie in \[0, num_pages = 10\), got"),
        (with_arg(4, ARGS[4] * 0), {}, r"seqlens_k must lie in \[seqlen_q = 1, .* = 64\], got 0 at \[0\]"),
        (with_arg(4, ARGS[4] + 15), {}, r"seqlens_k must lie in .*, got 65 at \[0\]"),
        (ARGS8, {}, "k_scale and v_scale must be given for int8 caches and no others"),
        (ARGS, {"k_scale": KWARGS8["k_scale"]}, "k_scale and v_scale must be given together"),
        (ARGS, {"k_bias": torch.zeros(2, 64)}, "k_bias must be given for int8 caches only"),
        (ARGS8, {**KWARGS8, "inv_freq": None}, "inv_freq must be given with k_bias, got None"),
        (ARGS, {"chunk_len": 64}, "q_succ and chunk_len must be given together"),
        (ARGS, {"window": -1}, "window must be positive or None, got -1"),
        (ARGS, {"scale_factors": torch.ones(3)}, r"scale_factors must have shape \[batch\] = \[2\], got \[3\]"),
        (ARGS, {"scale_factors": torch.ones(2).double()}, "scale_factors must have dtype float32, got float64"),
        (ARGS, {"scale_factors": torch.tensor([1, torch.nan])}, r"scale_factors must be finite, got nan at \[1\]"),
        (ARGS, {"scale_factors": torch.tensor([-torch.inf, 1])}, r"scale_factors must be finite, got -inf at \[0\]"),
    ],
)
def test_bad_arguments_are_named(args: list[torch.Tensor], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(*args, **kwargs)


def test_no_rows_of_several_sequences() -> None:
    """Slices without rows have strides of their own."""
    q, *others = with_arg(0, torch.randn(2, 4, 4, 64)[:, :0])
    out, lse = ops.decode_attention(q, *others, return_lse=True)
    assert out.shape == (2, 0, 4, 64)
    assert lse.shape == (2, 0, 4)
