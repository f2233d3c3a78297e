"""Matrix products of the decoder: torch's (oneDNN's), in float32 where the CPU multiplies 16-bit matrices slowly.

Intel CPUs without AMX multiply bfloat16 matrices at about half the float32 rate (``bench/bench_machine.py``):
vdpbf16ps issues every other cycle, and CPUs without AVX512_BF16 have no such instruction at all. For the many rows of
a prefill chunk it pays to widen activations and weights on the way; sums are float32 either way and results are
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .quantized import Int8Matrix, Matrix, product, split_rows

__all__ = ["WIDEN_ROWS", "gated_mlp", "linear", "widened_bytes", "widens"]

WIDEN_ROWS = 256
"""From so many rows on, widening a weight costs less than it saves: by count from about 100, measured at 256."""

_ROW_BLOCK = 2048  # rows widened at a time; weights are widened again for each, which is 2 % of their product
_PIECE_BYTES = 2**24  # widened weights and results at a time: small enough for malloc to recycle, so no page faults
_WHOLE_BYTES = 2**26  # weights of 8 bits that are widened at once; larger ones in pieces, whose results are copied

_FAST = frozenset(getattr(torch, name) for name in _C.cpu_features()["fast_matmul"])


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of many rows in this dtype are computed in float32."""
    return device.type == "cpu" and dtype != torch.float32 and dtype not in _FAST


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: ``[n, in]``.
        weight: ``[out, in]``, dtype of ``x``, or in 8 bits.
        bias: ``[out]``, dtype of ``x``, or None.

    Returns:
        ``[n, out]``, dtype of ``x``, from float32 sums.
    """
    few = x.shape[0] < WIDEN_ROWS or not widens(x.dtype, x.device)
    if few and isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if isinstance(weight, Int8Matrix):
        found = weight.multiply_few(x)
        if found is None and few and weight.shape.numel() * x.element_size() <= _WHOLE_BYTES:
            found = product(x, weight)
        if found is not None:
            return found if bias is None else found.add_(bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for rows, target in zip(_blocks(x, few), _blocks(out, few), strict=True):
        wide = rows if few else rows.float()
        for piece in _pieces(wide, weight.shape[0]):
            found = product(wide, weight[piece])
            target[:, piece] = found if bias is None else found.add_(bias[piece])
    return out


def gated_mlp(x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T``, the SwiGLU MLP; where it widens, in float32 all the way.

    Args:
        x: ``[n, hidden]``.
        gate_up: ``[2 intermediate, hidden]``: rows of gate, then up.
        down: ``[hidden, intermediate]``.

    Returns:
        ``[n, hidden]``, dtype of ``x``.
    """
    if x.shape[0] < WIDEN_ROWS or not widens(x.dtype, x.device):
        gate, up = linear(x, gate_up).chunk(2, dim=-1)
        return linear(F.silu(gate, inplace=True).mul_(up), down)
    out = torch.empty_like(x)
    gate_weight, up_weight = split_rows(gate_up, [down.shape[1]] * 2)
    buffer = x.new_empty(min(x.shape[0], _ROW_BLOCK), down.shape[1], dtype=torch.float32)
    for rows, target in zip(torch.split(x, _ROW_BLOCK), torch.split(out, _ROW_BLOCK), strict=True):
        wide = rows.float()
        activations = buffer[: wide.shape[0]]
        for piece in _pieces(wide, down.shape[1]):
            gate = F.silu(product(wide, gate_weight[piece]), inplace=True)
            torch.mul(gate, product(wide, up_weight[piece]), out=activations[:, piece])
        for piece in _pieces(activations, x.shape[1]):
            target[:, piece] = product(activations, down[piece])
    return out


def _blocks(x: Tensor, whole: bool) -> Sequence[Tensor]:
    """Rows that are widened at a time; all, where they are not."""
    return (x,) if whole else torch.split(x, _ROW_BLOCK)


def widened_bytes(num_rows: int, hidden_size: int, intermediate_size: int) -> int:
    """Bytes that :func:`gated_mlp`, which takes more than the other products, needs where it widens."""
    rows = min(num_rows, _ROW_BLOCK)
    pieces = min(3 * _PIECE_BYTES, 4 * intermediate_size * (2 * rows + hidden_size))
    return 4 * rows * (hidden_size + intermediate_size) + pieces


def _pieces(wide: Tensor, columns: int) -> Iterator[slice]:
    """Cuts the output columns so that neither widened weights nor results of a piece exceed ``_PIECE_BYTES``."""
    step = max(1, _PIECE_BYTES // 4 // max(wide.shape))
    for begin in range(0, columns, step):
        yield slice(begin, min(begin + step, columns))
