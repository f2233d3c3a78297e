"""Keys and values into the slots of a paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_sparse import ops, reference
from qwen_sparse.testing import random_qkv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_PAGES, PAGE_SIZE, NUM_ROWS = 5, 24, 70


def inputs(dtype: torch.dtype, head_dim: int = 64, num_kv_heads: int = 3) -> dict[str, Any]:
    """Rows for slots in no order, over a page's border and from the first slot to the last."""
    _, k, v = random_qkv(1, NUM_ROWS, 1, num_kv_heads, head_dim, dtype)
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(1))[:NUM_ROWS]
    slots[:2] = torch.tensor([NUM_PAGES * PAGE_SIZE - 1, 0])
    slots[2:] = 1 + slots[2:].argsort()  # distinct
    return {"k": k, "v": v, "slot_mapping": slots}


def bias_of(head_dim: int = 64, num_kv_heads: int = 3) -> dict[str, Any]:
    return {
        "k_bias": 100 * torch.randn(num_kv_heads, head_dim, generator=torch.Generator().manual_seed(2)),
        "positions": torch.arange(500_000, 500_000 + NUM_ROWS),
        "inv_freq": 1e6 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
        "attention_factor": 1.2,
    }


def empty_caches(dtype: torch.dtype, head_dim: int = 64, num_kv_heads: int = 3) -> dict[str, Tensor]:
    """Pages, and scales beside int8 ones, in which every element shows whether it was written."""
    shape = (NUM_PAGES, PAGE_SIZE, num_kv_heads)
    if dtype != torch.int8:
        return {name: torch.full((*shape, head_dim), torch.nan, dtype=dtype) for name in ("k_cache", "v_cache")}
    caches = {name: torch.full((*shape, head_dim), -128, dtype=dtype) for name in ("k_cache", "v_cache")}
    return caches | {name: torch.full(shape, torch.nan) for name in ("k_scale", "v_scale")}


def stored(module: Any, cache_dtype: torch.dtype, **arguments: Any) -> dict[str, Tensor]:
    num_kv_heads, head_dim = arguments["k"].shape[1:]
    caches = empty_caches(cache_dtype, head_dim, num_kv_heads)
    module.store_kv(**arguments, **caches)
    return caches


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, cache in ours.items():
        torch.testing.assert_close(cache, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_pages(dtype: torch.dtype, head_dim: int, kernels: str) -> None:
    arguments = inputs(dtype, head_dim)
    assert_same(stored(ops, dtype, **arguments), stored(reference, dtype, **arguments))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_pages(dtype: torch.dtype, head_dim: int, biased: bool, kernels: str) -> None:
    arguments = inputs(dtype, head_dim) | (bias_of(head_dim) if biased else {})
    assert_same(stored(ops, torch.int8, **arguments), stored(reference, torch.int8, **arguments))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_strided(cache_dtype: torch.dtype, kernels: str) -> None:
    """Rows out of a fused projection, pages that are every second one of a pool; nothing beside them is written."""
    arguments = inputs(torch.bfloat16)
    expected = stored(ops, cache_dtype, **arguments)
    fused = torch.cat((arguments["k"], arguments["v"]), dim=1)
    pools = {name: torch.stack((cache, cache), dim=1) for name, cache in empty_caches(cache_dtype).items()}
    arguments |= {"k": fused[:, :3], "v": fused[:, 3:]}
    ops.store_kv(**arguments, **{name: pool[:, 1] for name, pool in pools.items()})
    assert_same({name: pool[:, 1] for name, pool in pools.items()}, expected)
    assert_same({name: pool[:, 0] for name, pool in pools.items()}, empty_caches(cache_dtype))


def test_no_rows() -> None:
    arguments = {name: value[:0] for name, value in inputs(torch.float32).items()}
    assert_same(stored(ops, torch.float32, **arguments), empty_caches(torch.float32))


def test_same_bytes_as_quantize_kv(kernels: str) -> None:
    arguments = inputs(torch.bfloat16) | bias_of()
    caches = stored(ops, torch.int8, **arguments)
    slots = arguments.pop("slot_mapping")
    quantized = ops.quantize_kv(**arguments)
    for name, expected in zip(("k_cache", "k_scale", "v_cache", "v_scale"), quantized, strict=True):
        assert torch.equal(caches[name].flatten(0, 1)[slots], expected)


RULES = [
    ({"slot_mapping": torch.arange(NUM_ROWS - 1)}, r"slot_mapping must have shape \[n\] = \[70\], got \[69\]"),
    ({"slot_mapping": torch.arange(NUM_ROWS).int()}, "slot_mapping must have dtype int64, got int32"),
    (
        {"slot_mapping": torch.arange(51, 51 + NUM_ROWS)},
        r"slot_mapping must lie in \[0, num_pages \* page_size = 120\), got 120 at \[69\]",
    ),
    ({"slot_mapping": torch.arange(NUM_ROWS) - 1}, r"slot_mapping must lie in .* got -1 at \[0\]"),
    ({"k_scale": None}, "k_scale and v_scale must be given together"),
    ({"k_scale": None, "v_scale": None}, "k_scale and v_scale must be given for int8 caches and no others"),
    ({"v_scale": torch.zeros(NUM_PAGES, PAGE_SIZE, 2)}, "v_scale must have shape"),
    (
        {"k_cache": torch.zeros(NUM_PAGES, PAGE_SIZE, 3, 64)},
        r"k_cache must have dtype bfloat16 \(that of k\) or int8, got float32",
    ),
    (
        {name: torch.zeros(NUM_PAGES, PAGE_SIZE, 2, 64, dtype=torch.int8) for name in ("k_cache", "v_cache")},
        r"k_cache must have num_kv_heads = 3 \(that of k\), got 2",
    ),
    (
        {"k_cache": torch.zeros(1, PAGE_SIZE, 3, 64, dtype=torch.int8).expand(NUM_PAGES, -1, -1, -1)},
        "k_cache is written to and must not be expanded, got stride 0 in dimension 0",
    ),
    ({"v": torch.zeros(NUM_ROWS, 3, 128, dtype=torch.bfloat16)}, "v must have shape"),
    ({"positions": None}, "positions must be given with k_bias, got None"),
    (
        empty_caches(torch.bfloat16) | {"k_scale": None, "v_scale": None},
        "k_bias must be given for int8 caches only",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), RULES, ids=[message[:40] for _, message in RULES])
def test_rules(wrong: dict[str, Any], message: str) -> None:
    arguments = inputs(torch.bfloat16) | bias_of() | empty_caches(torch.int8)
    with pytest.raises(ValueError, match=f"store_kv: {message}"):
        ops.store_kv(**{**arguments, **wrong})
