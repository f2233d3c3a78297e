"""Matrix products in float32 where 16-bit ones are slow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen_sparse.model import linear as module
from qwen_sparse.model.linear import gated_mlp, linear, widens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "size", "columns"), [(256, 64, 50), (2049, 1000, 1500), (300, 6000, 800)])
def test_wide_products_are_rounded_once(
    dtype: torch.dtype, bias: bool, rows: int, size: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several row blocks, several pieces of the weight, both ragged."""
    monkeypatch.setattr(module, "_FAST", frozenset())
    monkeypatch.setattr(module, "_PIECE_BYTES", 2**21)
    assert widens(dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, size, generator=generator).to(dtype) for n in (rows, columns))
    offset = torch.randn(columns, generator=generator).to(dtype) if bias else None
    out = linear(x, weight, offset)
    assert out.dtype == dtype
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    half_step = torch.finfo(dtype).eps / 2
    assert ((out.double() - exact).abs() <= 1.02 * half_step * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("rows", [10, 300, 2100])
def test_gated_mlp(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition in float64; few rows are torch's, in bfloat16 throughout, and less exact."""
    monkeypatch.setattr(module, "_FAST", frozenset())
    monkeypatch.setattr(module, "_PIECE_BYTES", 2**20)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 96, generator=generator).bfloat16()
    gate_up, down = (
        (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).bfloat16() for shape in ((700, 96), (96, 350))
    )
    gate, up = F.linear(x.double(), gate_up.double()).chunk(2, dim=-1)
    exact = F.linear(F.silu(gate) * up, down.double())
    error = (gated_mlp(x, gate_up, down).double() - exact).abs()
    assert (error <= (1.02 if rows >= 256 else 4) * 2**-8 * exact.abs() + (1e-5 if rows >= 256 else 1e-2)).all()


def test_few_rows_float32_and_fast_dtypes_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], F.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append((x.dtype, x.shape[0]))
        return original(x, weight, bias)

    monkeypatch.setattr(module, "_FAST", frozenset({torch.float16}))
    monkeypatch.setattr(F, "linear", spy)
    for dtype, rows in ((torch.bfloat16, 255), (torch.float32, 500), (torch.float16, 500)):
        linear(torch.randn(rows, 8).to(dtype), torch.randn(4, 8).to(dtype))
    assert calls == [(torch.bfloat16, 255), (torch.float32, 500), (torch.float16, 500)]
    linear(torch.randn(256, 8).bfloat16(), torch.randn(4, 8).bfloat16())
    assert calls[3:] == [(torch.float32, 256)]


def test_other_devices_keep_their_dtype() -> None:
    assert not widens(torch.bfloat16, torch.device("cuda"))
    assert not widens(torch.float32, torch.device("cpu"))
