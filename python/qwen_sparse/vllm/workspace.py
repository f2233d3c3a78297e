"""Contiguous keys and values of the request that is being prefilled, one pair of buffers for all layers."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Buffers that grow on demand; see :meth:`of`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, heads: tuple[int, int]) -> None:
        self._device, self._dtype, self._heads = device, dtype, heads
        self._k = self._v = self._empty(0)

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, heads: tuple[int, int]) -> Workspace:
        """The one for layers of ``heads = (num_kv_heads, head_size)``; it lives as long as one of its layers."""
        key = (device, dtype, heads)
        workspace = _shared.get(key)
        if workspace is None:
            _shared[key] = workspace = cls(device, dtype, heads)
        return workspace

    def reserve(self, num_tokens: int) -> None:
        """Make room for a request of ``num_tokens``. On a CPU, memory is taken as it is written."""
        if self._k.shape[0] < num_tokens:
            self._k = self._v = self._empty(0)  # free before the larger ones are made
            self._k, self._v = self._empty(num_tokens), self._empty(num_tokens)

    def buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """K and V, ``[num_tokens, num_kv_heads, head_size]``, contents undefined."""
        self.reserve(num_tokens)
        return self._k[:num_tokens], self._v[:num_tokens]

    def _empty(self, num_tokens: int) -> Tensor:
        return torch.empty(num_tokens, *self._heads, dtype=self._dtype, device=self._device)


_shared: weakref.WeakValueDictionary[tuple[object, ...], Workspace] = weakref.WeakValueDictionary()
