"""Qwen3-30B-A3B and its kin: Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..values import boolean
from .parts import Architecture, read_experts, read_windows


def read(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    bias = boolean(raw, "attention_bias", "config.json", False)
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "experts": read_experts(raw, num_layers, shared=False),
        "windows": read_windows(raw, num_layers, lambda layer: True),
    }


ARCHITECTURE = Architecture("Qwen3MoeForCausalLM", "qwen3_moe", read)
