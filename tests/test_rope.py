"""Rotary frequencies against transformers, and the temperature of Dual Chunk Attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import TINY
from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.rope import (
    attention_factor,
    dual_chunk_scale_factors,
    dual_chunk_temperature,
    inverse_frequencies,
)

ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e4},
    "plain_1m": {"rope_type": "default", "rope_theta": 1e7},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn_betas": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn_factor": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.25,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_as_in_transformers(name: str, head_dim: int) -> None:
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    theirs = Qwen2RotaryEmbedding(
        Qwen2Config(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=131072,
            rope_parameters=dict(ROPES[name]),
        )
    )
    config = ModelConfig.from_dict({**TINY, "head_dim": head_dim, "rope_parameters": ROPES[name]})
    ours = inverse_frequencies(config)
    assert ours.dtype == torch.float64
    assert ours.shape == (head_dim // 2,)
    torch.testing.assert_close(ours, theirs.inv_freq.double(), rtol=2e-6, atol=0)
    assert attention_factor(config) == pytest.approx(theirs.attention_scaling, rel=1e-6)


def test_temperature() -> None:
    assert dual_chunk_temperature(1_010_000, 262144) ** 2 == pytest.approx(1.288, abs=5e-4)
    assert dual_chunk_temperature(262144, 262144) == 1.0
    assert dual_chunk_temperature(262145, 262144) > 1.0
    assert dual_chunk_temperature(1, 262144) == 1.0
    assert dual_chunk_temperature(10**9, 0) == 1.0


@pytest.mark.parametrize("original", [64, 32768, 262144])
def test_scale_factors_are_the_squared_temperature(original: int) -> None:
    """Of every length around the trained one, and of lengths up to 4 M tokens: within one unit in the last place."""
    seqlens = torch.cat((torch.arange(1, 4 * 64), original + torch.arange(-40, 400), torch.arange(1, 2**22, 4099)))
    ours = dual_chunk_scale_factors(seqlens, original)
    assert ours.dtype == torch.float32
    expected = torch.tensor([dual_chunk_temperature(n, original) ** 2 for n in seqlens.tolist()]).float()
    assert (ours.view(torch.int32) - expected.view(torch.int32)).abs().max() <= 1
    assert torch.equal(ours == 1, expected == 1)
    assert ours.max() > 1.2
