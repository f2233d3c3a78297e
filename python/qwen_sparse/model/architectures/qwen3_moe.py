"""Qwen3-30B-A3B and its kin: Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import qwen3
from .parts import Architecture, read_experts, read_windows


def read(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    return {
        **qwen3.read(raw, num_layers),
        "experts": read_experts(raw, num_layers, shared=False),
        "windows": read_windows(raw, num_layers, lambda layer: True),
    }


ARCHITECTURE = Architecture("Qwen3MoeForCausalLM", "qwen3_moe", read)
