"""The choice of the next token, on the device that holds the logits.

Tokens are drawn by the Gumbel-max rule: each gets exponential noise of its own, e, and the largest p / e wins, which
takes a token as often as its probability p says. The noise is a hash of the step's random number and the token's id.
So logits that differ by a rounding, as they do between a sequence alone and in a batch, choose another token only where
the two best are as close as that; a draw on the tokens laid end to end would move with every one before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.arguments import check_integer, check_number

__all__ = ["Sampler"]

LEAST_TEMPERATURE = 1e-250
"""But for 0. Over it, no float32 overflows the float64 that top-p's probabilities are computed in."""
SEEDS = (-(2**63), 2**64 - 1)
"""The least and the most that torch's generators take."""

_WHOLE = 2.0**52  # what probabilities, as integers, sum up to
_COLDEST = 1e-30  # a lower temperature chooses the same: any two float32 logits are then further apart than any noise


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token: repetition penalty, temperature, top-k, top-p, min-p, in this order.

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
    """Equal seeds give equal tokens for equal logits; None draws a new one. In [-2**63, 2**64)."""
    min_p: float = 0.0
    """Least probability of a token, as a share of the most likely one's; 0 for all."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty", "min_p"):
            check_number(name, getattr(self, name))
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0 and finite"),
            ("temperature", not 0 < self.temperature < LEAST_TEMPERATURE, f"0 or >= {LEAST_TEMPERATURE}"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0 and finite"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        check_integer("top_k", self.top_k, least=0)
        if self.seed is not None:
            check_integer("seed", self.seed, least=SEEDS[0], most=SEEDS[1])

    def draws(self, count: int) -> Tensor:
        """The random numbers of ``count`` tokens: int32 ``[count]``, on the CPU."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(self.seed))
        numbers = torch.randint(-(2**31), 2**31, (count,), generator=generator)
        return numbers.int()

    def __call__(self, logits: Tensor, seen: Tensor, draws: Tensor) -> Tensor:
        """The next token of each sequence of a batch. Nothing here waits for the device.

        Args:
            logits: float32 ``[batch, vocab]``.
            seen: bool ``[batch, vocab]``, tokens of the prompt and of the output so far.
            draws: int32 ``[batch]``, from :meth:`draws`.

        Returns:
            int64 ``[batch]``; -1 where the largest logit is not finite.
        """
        if self.repetition_penalty != 1:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        chosen = logits.argmax(-1) if self.temperature == 0 else self._draw(logits, draws)
        return chosen.masked_fill(~logits.amax(-1).isfinite(), -1)  # NaN is larger than any number

    def _draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The tokens that win with the noise of ``draws``."""
        token_ids, vocab = None, logits.shape[-1]
        if 0 < self.top_k < vocab:
            logits, token_ids = _largest(logits, self.top_k)
        elif self.top_p < 1:  # nothing else sorts the vocabulary, which takes longer than all the rest
            logits, token_ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        scores = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, _COLDEST)
        if self.top_p < 1:
            # In integers: a GPU adds in no fixed order, and sums of floats would differ from run to run.
            weights = (torch.softmax(logits.double() / self.temperature, dim=-1) * _WHOLE).long()
            ends = weights.cumsum(-1)
            scores = scores.masked_fill(ends - weights >= self.top_p * ends[:, -1:].double(), -math.inf)
        if self.min_p > 0:
            scores = scores.masked_fill(scores < math.log(self.min_p), -math.inf)
        ids = torch.arange(vocab, dtype=torch.int32, device=logits.device) if token_ids is None else token_ids.int()
        index = scores.sub_(_exponential(draws, ids).log_()).argmax(-1)
        return index if token_ids is None else token_ids.gather(-1, index[:, None])[:, 0]


def _exponential(draws: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of the exponential distribution, a hash of both, float32 ``[batch, n]``.

    Args:
        draws: int32 ``[batch]``.
        token_ids: int32 ``[n]`` or ``[batch, n]``.
    """
    bits = _mixed_(_mixed_(token_ids + 1) ^ draws[:, None])
    # The smallest numbers decide, and float32 tells all of these apart.
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def _mixed_(bits: Tensor) -> Tensor:
    """Each int32 becomes another one, in place, whose bits all depend on all of its own: xorshifts and products."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        if factor != 1:
            bits *= factor
    return bits


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
