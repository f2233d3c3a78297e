"""Rotary frequencies (plain and YaRN) and the temperature of Dual Chunk Attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig, RopeConfig

__all__ = [
    "attention_factor",
    "dual_chunk_scale_factors",
    "dual_chunk_temperature",
    "inverse_frequencies",
    "plain_frequencies",
]


def plain_frequencies(rope_theta: float, head_dim: int) -> Tensor:
    """``rope_theta ** (-2c / head_dim)`` for every channel pair c: radians per position, float64 ``[head_dim / 2]``."""
    return rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of every channel pair, float64 ``[head_dim / 2]``.

    Plain: :func:`plain_frequencies`. YaRN (arXiv 2309.00071, as transformers computes it): slow
    channels are divided by ``factor``, fast ones kept, with a linear ramp between the channels that turn
    ``beta_slow`` and ``beta_fast`` times within the original length.
    """
    rope, head_dim = config.rope, config.head_dim
    inv_freq = plain_frequencies(rope.rope_theta, head_dim)
    if rope.factor is None:
        return inv_freq
    low, high = _yarn_ramp(rope, head_dim)
    slow = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low), 0, 1)
    return inv_freq / rope.factor * slow + inv_freq * (1 - slow)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Channel pairs where the ramp starts and ends."""
    original = rope.original_max_position_embeddings
    if original is None:
        raise ValueError("rope_scaling: original_max_position_embeddings must be given for yarn, got None")

    def channel(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, (high + 0.001 if low == high else high)


def attention_factor(config: ModelConfig) -> float:
    """Factor on cos and sin: 1 for plain RoPE; ``0.1 ln(factor) + 1`` for YaRN unless configured."""
    rope = config.rope
    if rope.factor is None:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor and rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude()


def dual_chunk_temperature(seqlen: int, original_max_position_embeddings: int) -> float:
    """m = max(1, 0.1 ln(seqlen / original) + 1); 1 when the original length is 0 (arXiv 2501.15383).

    m applies to queries and keys, so the softmax scale is multiplied by **m squared** (1.288 at 1.01 M tokens
    for an original length of 262144). ``seqlen`` is the larger of the prompt length and the current length,
    in tokens.
    """
    if original_max_position_embeddings <= 0 or seqlen <= original_max_position_embeddings:
        return 1.0
    return 0.1 * math.log(seqlen / original_max_position_embeddings) + 1.0


def dual_chunk_scale_factors(seqlens: Tensor, original_max_position_embeddings: int) -> Tensor:
    """The square of :func:`dual_chunk_temperature` for lengths that only their device knows.

    Args:
        seqlens: integers ``[batch]``, current lengths in tokens.
        original_max_position_embeddings: the trained length, > 0.

    Returns:
        float32 ``[batch]`` on the device of ``seqlens``: computed in float64 and rounded once.
    """
    m = 0.1 * torch.log(seqlens.double() / original_max_position_embeddings) + 1.0
    return m.clamp(min=1.0).square().float()
