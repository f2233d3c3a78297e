"""Weights of matrix products in 8 bits: integers, and a scale per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["QUANTIZATIONS", "Int8Matrix", "Matrix", "product", "split_rows"]

QUANTIZATIONS = ("int8",)
"""What :func:`qwen_sparse.load_model` takes for ``quantization`` besides None."""

_FEW_ROWS = 8
"""Up to so many rows torch's product with 8-bit weights is faster than widening them: it reads the weights once and
multiplies row by row."""


@dataclass(frozen=True, eq=False, repr=False)
class Int8Matrix:
    """``data * scale``, symmetric: the largest element of a row is 127 or -127."""

    data: Tensor
    """int8 ``[..., out, in]``."""
    scale: Tensor
    """``[..., out]``, dtype of the activations."""

    @classmethod
    def empty(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> Int8Matrix:
        """Not initialised; ``dtype`` of the scales."""
        data = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(data, torch.empty(shape[:-1], dtype=dtype, device=device))

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.data.shape

    def __getitem__(self, rows: int | slice) -> Int8Matrix:
        return Int8Matrix(self.data[rows], self.scale[rows])

    def copy_(self, values: Tensor) -> Int8Matrix:
        """Quantise values of the same shape in place. A row of zeros has the scale 0."""
        for data, scale, rows in zip(
            self.data.view(-1, self.shape[-1]).split(4096),  # type: ignore[no-untyped-call]
            self.scale.view(-1).split(4096),  # type: ignore[no-untyped-call]
            values.view(-1, self.shape[-1]).split(4096),  # type: ignore[no-untyped-call]
            strict=True,
        ):
            wide = rows.float()
            scale.copy_(wide.abs().amax(-1) / 127)
            wide = wide / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            data.copy_(wide.round_().clamp_(-127, 127))
        return self

    def widened(self, dtype: torch.dtype) -> Tensor:
        """As numbers of a dtype, without the scale: exact."""
        return self.data.to(dtype)

    def multiply_few(self, x: Tensor) -> Tensor | None:
        """``x @ self.T`` for rows so few that the weights need not be widened; None for more."""
        if x.shape[0] > _FEW_ROWS:
            return None
        return torch._weight_int8pack_mm(x.contiguous(), self.data, self.scale)


Matrix = Tensor | Int8Matrix
"""A weight ``[out, in]`` of a matrix product."""


def split_rows(matrix: Matrix, sizes: Sequence[int]) -> list[Matrix]:
    """Views of successive rows."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [matrix[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def product(x: Tensor, weight: Matrix) -> Tensor:
    """``x @ weight.T``, weights widened to the dtype of ``x`` where they have fewer bits."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype))
    return F.linear(x, weight.widened(x.dtype)).mul_(weight.scale)
