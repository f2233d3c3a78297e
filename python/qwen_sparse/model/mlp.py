"""The part of a layer behind attention: one gated MLP, or the experts that a router chooses for each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import gated_mlp, linear
from .quantized import Matrix

__all__ = ["ExpertWeights", "Mlp"]


@dataclass(frozen=True, eq=False, repr=False)
class Mlp:
    """SwiGLU."""

    gate_up: Matrix
    """``[2 intermediate, hidden]``: rows of gate, then up."""
    down: Matrix
    """``[hidden, intermediate]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, hidden]`` of rows ``[n, hidden]``."""
        return gated_mlp(x, self.gate_up, self.down)


@dataclass(frozen=True, eq=False, repr=False)
class ExpertWeights:
    """Experts, the router that chooses ``top_k`` of them by softmax, and one that all tokens share, if there is any."""

    router: Tensor
    """``[num_experts, hidden]``."""
    gate_up: Matrix
    """``[num_experts, 2 intermediate, hidden]``: of each, rows of gate, then up."""
    down: Matrix
    """``[num_experts, hidden, intermediate]``."""
    top_k: int
    normalise: bool
    """Whether the shares of the chosen experts are scaled to a sum of 1."""
    shared: Mlp | None = None
    shared_gate: Tensor | None = None
    """``[1, hidden]``: its sigmoid is the share of the shared expert."""

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, hidden]`` of rows ``[n, hidden]``. Tokens are grouped by expert; sums over experts are in float32."""
        shares, chosen = torch.topk(linear(x, self.router).softmax(-1, dtype=torch.float32), self.top_k)
        if self.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # of (token, choice) pairs, by expert
        counts = torch.bincount(chosen.flatten(), minlength=self.router.shape[0])
        shares = shares.to(x.dtype).float()  # as transformers rounds them
        if x.is_cuda:  # nothing of this is known to the host: a CUDA graph can hold it
            out = self._grouped(x, order, counts).mul_(shares[:, :, None]).sum(1)
        else:
            out = self._by_expert(x, order, counts, shares.flatten())
        if self.shared is not None and self.shared_gate is not None:
            out += self.shared(x).float() * F.linear(x, self.shared_gate).float().sigmoid()
        return out.to(x.dtype)

    def _by_expert(self, x: Tensor, order: Tensor, counts: Tensor, shares: Tensor) -> Tensor:
        """One product after the other; float32 ``[n, hidden]``."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert, pairs in enumerate(torch.split(order, counts.tolist())):
            if len(pairs):
                rows = pairs // self.top_k
                found = gated_mlp(x[rows], self.gate_up[expert], self.down[expert])
                out.index_add_(0, rows, found.float().mul_(shares[pairs, None]))
        return out

    def _grouped(self, x: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """Grouped products of all experts; float32 ``[n, top_k, hidden]``, not yet weighted."""
        assert isinstance(self.gate_up, Tensor)
        assert isinstance(self.down, Tensor)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[order // self.top_k], self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        found = F.grouped_mm(F.silu(gate).mul_(up), self.down.transpose(1, 2), offs=ends)
        out = torch.empty(order.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
        out[order] = found.float()
        return out.view(x.shape[0], self.top_k, -1)
