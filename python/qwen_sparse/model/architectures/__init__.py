"""The decoders that the package runs: what the config.json of each says beyond what all have in common.

All are one decoder (:mod:`qwen_sparse.model.decoder`) with parts that a config has or has not: biases, norms of query
and key heads, experts, windows. A file here reads them as its architecture means them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import qwen2, qwen2_moe, qwen3, qwen3_moe
from .parts import Architecture, Experts

__all__ = ["ARCHITECTURES", "Architecture", "Experts", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {
    known.name: known
    for known in (qwen2.ARCHITECTURE, qwen2_moe.ARCHITECTURE, qwen3.ARCHITECTURE, qwen3_moe.ARCHITECTURE)
}
"""By the name that config.json has in ``architectures``."""


def architecture_of(raw: Mapping[str, Any]) -> Architecture:
    """That of a config.json: the one of ``architectures``, or where there is none, of ``model_type``.

    Raises:
        ValueError: it is none of these.
    """
    names = raw.get("architectures")
    if names in (None, []):
        names = [known.name for known in ARCHITECTURES.values() if known.model_type == raw.get("model_type")]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ValueError(
            f"architectures must be one of {', '.join(ARCHITECTURES)}, got {raw.get('architectures')!r}"
            + ("" if raw.get("architectures") else f" and model_type {raw.get('model_type')!r}")
        )
    return ARCHITECTURES[names[0]]
