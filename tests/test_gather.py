"""Paged keys and values to contiguous ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference

INV_FREQ = 1e6 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def int8_pages(page_size: int, num_pages: int = 9, num_kv_heads: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_pages, page_size, num_kv_heads)
    k, v = torch.randint(-127, 128, (2, *shape, 64), dtype=torch.int8, generator=generator)
    k_scale, v_scale = torch.rand((2, *shape), generator=generator) + 0.01
    return {"k_cache": k, "v_cache": v, "k_scale": k_scale, "v_scale": v_scale}


def gathered(module: Any, num_keys: int, dtype: torch.dtype, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What ``module.gather_kv`` writes; no element may be left unwritten, none beside them written."""
    heads, head_dim = arguments["k_cache"].shape[2:]
    k, v = torch.full((2, num_keys + 1, heads, head_dim), torch.nan, dtype=dtype)
    module.gather_kv(k_out=k[:-1], v_out=v[:-1], **arguments)
    for buffer in (k, v):
        assert not buffer[:-1].isnan().any()
        assert buffer[-1].isnan().all()
    return k[:-1], v[:-1]


@pytest.mark.parametrize("num_keys", [1, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_pages_are_copied(dtype: torch.dtype, num_keys: int, kernels: str) -> None:
    k, v = torch.randn(2, 7, 48, 2, 64).to(dtype)
    table = torch.tensor([3, 0, 6, 1, 2, 5, 4], dtype=torch.int32)
    ours = gathered(ops, num_keys, dtype, k_cache=k, v_cache=v, block_table=table)
    for result, cache in zip(ours, (k, v), strict=True):
        assert torch.equal(result, cache[table.long()].flatten(0, 1)[:num_keys])


@pytest.mark.parametrize("page_size", [16, 100, 128])
@pytest.mark.parametrize("chunk_len", [None, 64, 192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_gets_its_bias_back(dtype: torch.dtype, chunk_len: int | None, page_size: int, kernels: str) -> None:
    """Pages and chunks that do not divide each other: the rotation restarts at every border."""
    pages = int8_pages(page_size)
    arguments = {
        **pages,
        "block_table": torch.tensor([5, 1, 8, 0, 2, 4, 7, 3, 6], dtype=torch.int32),
        "k_bias": 100 * torch.randn(3, 64),
        "inv_freq": INV_FREQ,
        "attention_factor": 1.2,
        "chunk_len": chunk_len,
    }
    num_keys = 9 * page_size - 3
    ours = gathered(ops, num_keys, dtype, **arguments)
    exact = gathered(reference, num_keys, torch.float64, **arguments)
    rounded = gathered(reference, num_keys, dtype, **arguments)
    for a, wide, narrow in zip(ours, exact, rounded, strict=True):
        assert_close_to_reference(a, wide, narrow, floor=2e-4 if dtype == torch.float32 else 1e-6)


def test_far_positions_are_exact(kernels: str) -> None:
    """At a million keys a float32 angle would be wrong by a tenth of a radian."""
    page_size, num_pages = 2**14, 64
    pages = {name: cache[:1].expand(1, -1, -1, *cache.shape[3:]) for name, cache in int8_pages(page_size, 1, 1).items()}
    arguments = {
        **pages,
        "block_table": torch.zeros(num_pages, dtype=torch.int32),
        "k_bias": torch.randn(1, 64),
        "inv_freq": INV_FREQ,
    }
    num_keys = num_pages * page_size
    k, _ = gathered(ops, num_keys, torch.float32, **arguments)
    tail = slice(num_keys - 1000, num_keys)
    expected, _ = reference.dequantize_kv(
        pages["k_cache"][0][-1000:],
        pages["k_scale"][0][-1000:],
        pages["v_cache"][0][-1000:],
        pages["v_scale"][0][-1000:],
        dtype=torch.float64,
        k_bias=arguments["k_bias"],
        positions=torch.arange(num_keys)[tail],
        inv_freq=INV_FREQ,
    )
    torch.testing.assert_close(k[tail].double(), expected, atol=1e-5, rtol=1e-5)


def test_empty() -> None:
    pages = int8_pages(16)
    k, _ = gathered(ops, 0, torch.bfloat16, **pages, block_table=torch.zeros(0, dtype=torch.int32))
    assert k.shape == (0, 3, 64)


RULES = [
    ({"block_table": torch.tensor([0], dtype=torch.int32)}, r"block_table must have at least .* = 2 entries, got 1"),
    (
        {"block_table": torch.tensor([0, 9], dtype=torch.int32)},
        r"block_table must lie in \[0, num_pages = 9\), got 9 at",
    ),
    ({"block_table": torch.tensor([0, 1])}, "block_table must have dtype int32, got int64"),
    ({"k_scale": None}, "k_scale and v_scale must be given together"),
    ({"k_scale": None, "v_scale": None}, "k_scale and v_scale must be given for int8 caches and no others"),
    (
        {"k_cache": torch.zeros(9, 16, 3, 64)},
        r"k_cache must have dtype bfloat16 \(that of k_out\) or int8, got float32",
    ),
    ({"k_cache": torch.zeros(9, 16, 2, 64, dtype=torch.int8)}, r"v_cache must have shape"),
    ({"chunk_len": 100}, "chunk_len must be a positive multiple of 64, got 100"),
    ({"v_out": torch.zeros(20, 3, 128, dtype=torch.bfloat16)}, "v_out must have shape"),
    ({"k_out": torch.zeros(20, 3, 64, dtype=torch.int8)}, "k_out must have dtype"),
    ({"k_out": torch.zeros(20, 64, 3, dtype=torch.bfloat16).mT}, "k_out"),
    (
        {"k_out": torch.zeros(20, 6, 64, dtype=torch.bfloat16)[:, ::2]},
        "k_out must have contiguous rows, got a head stride",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), RULES, ids=[message[:40] for _, message in RULES])
def test_rules(wrong: dict[str, Any], message: str) -> None:
    arguments = {**int8_pages(16), "block_table": torch.tensor([0, 1], dtype=torch.int32)}
    arguments["k_out"], arguments["v_out"] = torch.zeros(2, 20, 3, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"gather_kv: {message}"):
        ops.gather_kv(**{**arguments, **wrong})
