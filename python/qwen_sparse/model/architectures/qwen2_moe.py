"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2 with experts, one of which all tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.values import boolean, integer
from .parts import Architecture, read_experts, read_windows


def read(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    last = integer(raw, "max_window_layers", "config.json", minimum=0, default=28)
    return {
        "attention_bias": boolean(raw, "qkv_bias", "config.json", True),
        "experts": read_experts(raw, num_layers, shared=True),
        "windows": read_windows(raw, num_layers, lambda layer: layer % 2 == 0 and layer < last),  # as transformers
    }


ARCHITECTURE = Architecture("Qwen2MoeForCausalLM", "qwen2_moe", read)
