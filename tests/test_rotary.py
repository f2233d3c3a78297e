"""Rotary embedding and the rotations of Dual Chunk Attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference, random_qkv


def inverse_frequencies(head_dim: int, theta: float = 1e7) -> torch.Tensor:
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotary(dtype: torch.dtype, head_dim: int, kernels: str) -> None:
    q, k, _ = random_qkv(37, 37, 4, 2, head_dim, dtype)
    positions = torch.randint(0, 2_000_000, (37,))
    inv_freq = inverse_frequencies(head_dim)
    rotated = ops.rotary(q, k, positions, inv_freq, attention_factor=1.2)
    exact = reference.rotary(q.double(), k.double(), positions, inv_freq, attention_factor=1.2)
    rounded = reference.rotary(q, k, positions, inv_freq, attention_factor=1.2)
    for ours, wide, narrow in zip(rotated, exact, rounded, strict=True):
        assert ours.dtype == dtype
        assert_close_to_reference(ours, wide, narrow)


def test_precision_at_large_positions(kernels: str) -> None:
    """At position 10^7 an angle computed in float32 would be off by about a radian."""
    q, k, _ = random_qkv(64, 64, 1, 1, 128, torch.float32)
    positions = torch.arange(10_000_000, 10_000_064)
    inv_freq = inverse_frequencies(128, theta=1e4)
    rotated = ops.rotary(q, k, positions, inv_freq)
    exact = reference.rotary(q.double(), k.double(), positions, inv_freq)
    for ours, wide in zip(rotated, exact, strict=True):
        assert_close_to_reference(ours, wide)


def test_scores_depend_on_relative_position_only() -> None:
    q, k, _ = random_qkv(1, 1, 1, 1, 64, torch.float32)
    inv_freq = inverse_frequencies(64)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        rotated_q, _ = ops.rotary(q, k, torch.tensor([query_position]), inv_freq)
        _, rotated_k = ops.rotary(q, k, torch.tensor([key_position]), inv_freq)
        return (rotated_q * rotated_k).sum()

    torch.testing.assert_close(score(1_000_100, 1_000_000), score(100, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "critical_rows"), [(200, 64), (10, 64), (70, 0), (1, 1)])
def test_dual_chunk_rotations(rows: int, critical_rows: int, kernels: str) -> None:
    q, k, _ = random_qkv(rows, rows, 4, 2, 64, torch.float32)
    positions = torch.arange(300, 300 + rows)
    inv_freq = inverse_frequencies(64)
    kwargs: dict[str, Any] = {"chunk_size": 256, "chunk_len": 192, "critical_rows": critical_rows}
    rotated = ops.rotary(q, k, positions, inv_freq, **kwargs)
    exact = reference.rotary(q.double(), k.double(), positions, inv_freq, **kwargs)
    assert isinstance(rotated, ops.DualChunkRotary)
    for name, ours, wide in zip(rotated._fields, rotated, exact, strict=True):
        assert ours.shape == wide.shape, name
        assert_close_to_reference(ours, wide)


def test_dual_chunk_relative_positions() -> None:
    """The remapped distances of docs/dual-chunk.md, read off the rotations: chunk_size 256, local 64, chunk_len 192."""
    inv_freq = torch.zeros(32, dtype=torch.float64)
    inv_freq[0] = 1e-3  # one slow channel pair: its angle is the position / 1000
    x = torch.zeros(1, 1, 64)
    x[..., 0] = 1.0

    def angles(position: int) -> list[int]:
        rotated = ops.rotary(x, x, torch.tensor([position]), inv_freq, chunk_size=256, chunk_len=192, critical_rows=1)
        return [round(1000 * float(torch.atan2(t[0, 0, 32], t[0, 0, 0]))) for t in rotated]

    # q_intra, q_succ, q_inter, k, q_succ_critical, q_inter_critical
    assert angles(10) == [10, 202, 256, 10, 202, 266]
    assert angles(192 + 63) == [63, 255, 256, 63, 255, 319]
    assert angles(192 + 64) == [64, 256, 256, 64, 256, 320]
    assert angles(2 * 192 + 190) == [190, 256, 256, 190, 382, 446]


def test_strided_inputs() -> None:
    fused = torch.randn(50, 6, 64)
    q, k = fused[:, :4], fused[:, 4:]
    positions, inv_freq = torch.arange(50), inverse_frequencies(64)
    expected = ops.rotary(q.contiguous(), k.contiguous(), positions, inv_freq)
    for ours, theirs in zip(ops.rotary(q, k, positions, inv_freq), expected, strict=True):
        assert torch.equal(ours, theirs)


q64, k64, _v64 = random_qkv(5, 5, 2, 1, 64, torch.float32)
POSITIONS, INV_FREQ = torch.arange(5), inverse_frequencies(64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.rotary(q64, k64, POSITIONS[:3], INV_FREQ),
            r"positions must have shape \[n\] = \[5\], got \[3\]",
        ),
        (
            lambda: ops.rotary(q64, k64, POSITIONS.int(), INV_FREQ),
            "positions must have dtype int64, got int32",
        ),
        (
            lambda: ops.rotary(q64, k64, POSITIONS, INV_FREQ[:7]),
            r"inv_freq must have shape .* = \[32\], got \[7\]",
        ),
        (
            lambda: ops.rotary(q64, k64, POSITIONS, INV_FREQ.float()),
            "inv_freq must have dtype float64, got float32",
        ),
        (lambda: ops.rotary(q64, k64[:2], POSITIONS, INV_FREQ), r"k must have shape .*got \[2, 1, 64\]"),
        (
            lambda: ops.rotary(q64, k64, POSITIONS, INV_FREQ, chunk_len=64),
            "chunk_size and chunk_len must be given",
        ),
        (
            lambda: ops.rotary(q64, k64, POSITIONS, INV_FREQ, chunk_size=64, chunk_len=128),
            "chunk_size must be at least chunk_len = 128, got 64",
        ),
        (
            lambda: ops.rotary(q64, k64, POSITIONS, INV_FREQ, chunk_size=64, chunk_len=64, critical_rows=-1),
            "critical_rows must not be negative, got -1",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
