"""Matrix products of the decoder: torch's (oneDNN's), in float32 where the CPU multiplies 16-bit matrices slowly.

CPUs without AMX multiply bfloat16 matrices at half the float32 rate or less: vdpbf16ps issues every other cycle on
Intel's server cores, and without AVX512_BF16 the product is emulated (``bench/bench_linear.py`` measures it). For
the many rows of a prefill chunk it pays to widen activations and weights on the way; sums are float32 either way and
the result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C

__all__ = ["WIDEN_ROWS", "linear", "widened_bytes", "widens"]

WIDEN_ROWS = 256
"""From so many rows on, widening a weight costs less than it saves (measured: even at about 100)."""

_ROW_BLOCK = 2048  # rows widened at a time; weights are widened again for each, which is 2 % of their product
_PIECE_BYTES = 2**24  # widened weights and results at a time: small enough for malloc to recycle, so no page faults

_FAST = frozenset(getattr(torch, name) for name in _C.cpu_features()["fast_matmul"])


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of many rows in this dtype are computed in float32."""
    return device.type == "cpu" and dtype != torch.float32 and dtype not in _FAST


def _piece_columns(num_rows: int, size: int) -> int:
    return max(1, _PIECE_BYTES // 4 // max(size, min(num_rows, _ROW_BLOCK)))


def widened_bytes(num_rows: int, size: int, columns: int) -> int:
    """Bytes that :func:`linear` needs besides its arguments and result where it widens."""
    if num_rows < WIDEN_ROWS:
        return 0
    rows, columns = min(num_rows, _ROW_BLOCK), min(columns, _piece_columns(num_rows, size))
    return 4 * (rows * size + columns * (size + rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: ``[n, in]``.
        weight: ``[out, in]``, dtype of ``x``.
        bias: ``[out]``, dtype of ``x``, or None.

    Returns:
        ``[n, out]``, dtype of ``x``, rounded once from float32 sums.
    """
    num_rows, size = x.shape
    if num_rows < WIDEN_ROWS or not widens(x.dtype, x.device):
        return F.linear(x, weight, bias)
    out = x.new_empty(num_rows, weight.shape[0])
    columns = _piece_columns(num_rows, size)
    for rows, target in zip(x.split(_ROW_BLOCK), out.split(_ROW_BLOCK), strict=True):
        wide = rows.float()
        for begin in range(0, weight.shape[0], columns):
            piece = slice(begin, begin + columns)
            wide_bias = None if bias is None else bias[piece].float()
            target[:, piece] = F.linear(wide, weight[piece].float(), wide_bias)
    return out
