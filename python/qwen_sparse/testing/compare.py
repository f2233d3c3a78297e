"""Comparison of a kernel's result with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_close_to_reference", "reference_error"]


def reference_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, after NaN and infinities have been found in the same places.

    Raises:
        AssertionError: shapes differ, or a NaN or infinity stands in one tensor only (or with another sign).
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    for name, mask_of in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        ours, theirs = mask_of(actual), mask_of(expected)
        assert torch.equal(ours, theirs), f"{name} in {int(ours.sum())} places, expected {int(theirs.sum())}"
    finite = torch.isfinite(expected)
    return float((actual[finite] - expected[finite]).abs().max()) if finite.any() else 0.0


def assert_close_to_reference(
    actual: Tensor, exact: Tensor, same_dtype: Tensor | None = None, *, floor: float = 2e-6, factor: float = 2.0
) -> None:
    """The kernel's error is at most twice that of plain PyTorch in the same dtype, both against the exact result.

    Args:
        actual: the kernel's result.
        exact: the reference computed in float64 and not rounded to the kernel's dtype.
        same_dtype: the reference computed in the kernel's dtype; None to allow ``floor`` only.
        floor: error that is always allowed, for results that the same-dtype run happens to hit exactly.
        factor: another bound than twice, for kernels that keep more precision.
    """
    error = reference_error(actual, exact)
    allowed = floor + (0.0 if same_dtype is None else factor * reference_error(same_dtype, exact))
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"
