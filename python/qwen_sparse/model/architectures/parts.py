"""What decoders have or have not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...base.values import boolean, integer, value

__all__ = ["Architecture", "Experts", "read_experts", "read_windows", "windows_of_layers"]

_WHERE = "config.json"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of decoder, by its names in config.json."""

    name: str
    """In ``architectures``."""
    model_type: str
    read: Callable[[Mapping[str, Any], int], dict[str, Any]]
    """``read(config.json, num_layers)``: fields of :class:`qwen_sparse.model.config.ModelConfig` that it decides."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Layers whose MLP is a choice of several for each token."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """Of one expert."""
    normalise: bool
    """Whether the shares of a token's experts are scaled to a sum of 1 (``norm_topk_prob``)."""
    shared_size: int | None = None
    """Intermediate size of an expert that all tokens have besides, behind a gate."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have one MLP of the model's own intermediate size instead."""

    def of_layer(self, layer: int) -> bool:
        """Whether the layer has them."""
        return layer not in self.dense_layers


def read_experts(raw: Mapping[str, Any], num_layers: int, *, shared: bool) -> Experts | None:
    """From config.json's MoE keys; None where no layer has any."""
    key = "num_experts" if raw.get("num_experts") is not None else "num_local_experts"  # as transformers 5 writes it
    num_experts = integer(raw, key, _WHERE, minimum=0)
    step = integer(raw, "decoder_sparse_step", _WHERE, default=1)
    mlp_only = value(raw, "mlp_only_layers", _WHERE, [])
    if not isinstance(mlp_only, list) or not all(type(layer) is int for layer in mlp_only):
        raise ValueError(f"{_WHERE}: mlp_only_layers must be a list of layer numbers, got {mlp_only!r}")
    dense = tuple(layer for layer in range(num_layers) if layer in mlp_only or (layer + 1) % step)
    if num_experts == 0 or len(dense) == num_layers:
        return None
    return Experts(
        num_experts=num_experts,
        experts_per_token=integer(raw, "num_experts_per_tok", _WHERE, maximum=num_experts),
        intermediate_size=integer(raw, "moe_intermediate_size", _WHERE),
        normalise=boolean(raw, "norm_topk_prob", _WHERE, False),
        shared_size=integer(raw, "shared_expert_intermediate_size", _WHERE) if shared else None,
        dense_layers=dense,
    )


def read_windows(raw: Mapping[str, Any], num_layers: int, windowed: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Most keys that a row of each layer attends, its own included; None: all. Empty where no layer has a window.

    Args:
        raw: config.json, with ``use_sliding_window``, ``sliding_window`` and ``layer_types``.
        num_layers: of the model.
        windowed: which layers have one where there are no ``layer_types``.
    """
    kinds = raw.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
            raise ValueError(
                f"{_WHERE}: layer_types must be a list with one of {', '.join(known)} for each of the {num_layers} "
                f"layers, got {kinds!r}"
            )
    if not boolean(raw, "use_sliding_window", _WHERE, False) or raw.get("sliding_window") is None:
        return ()
    window = integer(raw, "sliding_window", _WHERE)
    has = [windowed(i) if kinds is None else kinds[i] == "sliding_attention" for i in range(num_layers)]
    return tuple(window if one else None for one in has) if any(has) else ()


def windows_of_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """As :func:`read_windows`, of the layers from ``max_window_layers`` on."""
    first = integer(raw, "max_window_layers", _WHERE, minimum=0, default=28)
    return read_windows(raw, num_layers, lambda layer: layer >= first)
