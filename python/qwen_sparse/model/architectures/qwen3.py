"""Qwen3: norms of query and key heads instead of biases; heads need not have hidden / num_heads channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.values import boolean
from .parts import Architecture, windows_of_layers


def read(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    bias = boolean(raw, "attention_bias", "config.json", False)
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "windows": windows_of_layers(raw, num_layers),
    }


ARCHITECTURE = Architecture("Qwen3ForCausalLM", "qwen3", read)
