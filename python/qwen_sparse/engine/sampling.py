"""The choice of the next token, on the device that holds the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.arguments import check_integer, check_number

__all__ = ["Sampler"]

LEAST_TEMPERATURE = 1e-250
"""But for 0. Over it, no float32 overflows the float64 that probabilities are computed in."""
SEEDS = (-(2**63), 2**64 - 1)
"""The least and the most that torch's generators take."""

_WHOLE = 2.0**52  # what probabilities, as integers, sum up to


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token: repetition penalty, temperature, top-k, top-p, in this order.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    """0 takes the most likely token; others are at least 1e-250."""
    top_p: float = 1.0
    """Smallest set of most likely tokens whose probabilities sum to this; 1 for all."""
    top_k: int = 0
    """This many most likely tokens; 0 for all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen before, multiplies negative ones; 1 for none."""
    seed: int | None = None
    """Equal seeds give equal tokens on the same device; None draws a new one. In [-2**63, 2**64)."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            check_number(name, getattr(self, name))
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0 and finite"),
            ("temperature", not 0 < self.temperature < LEAST_TEMPERATURE, f"0 or >= {LEAST_TEMPERATURE}"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0 and finite"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        check_integer("top_k", self.top_k, least=0)
        if self.seed is not None:
            check_integer("seed", self.seed, least=SEEDS[0], most=SEEDS[1])

    def draws(self, count: int) -> Tensor:
        """The random numbers of ``count`` tokens: float64 ``[count]`` in [0, 1), on the CPU."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(self.seed))
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def __call__(self, logits: Tensor, seen: Tensor, draws: Tensor) -> Tensor:
        """The next token of each sequence of a batch. Nothing here waits for the device.

        Args:
            logits: float32 ``[batch, vocab]``.
            seen: bool ``[batch, vocab]``, tokens of the prompt and of the output so far.
            draws: float64 ``[batch]`` in [0, 1), from :meth:`draws`.

        Returns:
            int64 ``[batch]``; -1 where the largest logit is not finite.
        """
        if self.repetition_penalty != 1:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        chosen = logits.argmax(-1) if self.temperature == 0 else self._draw(logits, draws)
        return chosen.masked_fill(~logits.amax(-1).isfinite(), -1)  # NaN is larger than any number

    def _draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Where ``draws`` fall when the tokens left lie on [0, 1) by their probabilities.

        They lie there in the order of their ids, or from the most likely to the least where top-k or top-p choose.
        """
        token_ids, vocab = None, logits.shape[-1]
        if 0 < self.top_k < vocab:
            logits, token_ids = _largest(logits, self.top_k)
        elif self.top_p < 1:  # nothing else sorts the vocabulary, which takes longer than all the rest
            logits, token_ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        # In integers: a GPU adds in no fixed order, and sums of floats would differ from run to run.
        weights = (torch.softmax(logits.double() / self.temperature, dim=-1) * _WHOLE).long()
        ends = weights.cumsum(-1)
        total = ends[:, -1:]
        if self.top_p < 1:
            kept = ends - weights < self.top_p * total.double()
            total = (weights * kept).sum(-1, keepdim=True)
        target = torch.minimum((draws[:, None] * total).long(), total - 1)
        index = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[-1] - 1)  # clamped: of NaN
        return (index if token_ids is None else token_ids.gather(-1, index))[:, 0]


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits, in order, and their tokens; of equal ones the lowest tokens, as a stable sort has them.

    ``topk`` takes any of equal ones. It is given integers, no two of them equal: in the upper half the bits of the
    float, which order like integers once those behind a minus sign are flipped, in the lower half the token, from the
    last to the first.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = logits.shape[-1] - 1
    keys = (order.long() << 32) + torch.arange(last, -1, -1, device=logits.device)
    token_ids = last - (keys.topk(count).values & 0xFFFFFFFF)
    return logits.gather(-1, token_ids), token_ids
