"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.values import boolean
from .parts import Architecture, windows_of_layers


def read(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    return {
        "attention_bias": boolean(raw, "attention_bias", "config.json", True),
        "windows": windows_of_layers(raw, num_layers),
    }


ARCHITECTURE = Architecture("Qwen2ForCausalLM", "qwen2", read)
