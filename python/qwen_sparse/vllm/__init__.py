"""vLLM plugin: checkpoints with ``dual_chunk_attention_config`` (Qwen2.5-1M and its kin) run on this package's kernels.

vLLM calls :func:`register` in each of its processes (entry point group ``vllm.general_plugins``). Models whose config
has no ``dual_chunk_attention_config`` are left alone. ``QWEN_SPARSE_VLLM=0`` in the environment turns the plugin off;
``--additional-config '{"qwen_sparse": {"coverage": 0.95}}'`` prefills with block groups.
``docs/vllm.md`` says what is supported.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from .support import check_unused, version_problem

__all__ = ["register"]

_logger = logging.getLogger(__name__)


def register() -> None:
    """Hook the plugin into the vLLM of this process; calling it again changes nothing.

    Raises:
        ValueError: ``QWEN_SPARSE_VLLM`` is neither 0 nor 1.
    """
    switch = os.environ.get("QWEN_SPARSE_VLLM", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"QWEN_SPARSE_VLLM must be 0 or 1, got {switch!r}")
    if switch == "0":
        return
    # Every vLLM process gets here, whatever its model: nothing below may fail because of a version of vLLM. A model
    # that needs the plugin is refused when its rotary embedding is made, which is the first thing the plugin replaces.
    try:
        from .rotary import replace_rotary_embedding

        replace_rotary_embedding()
        if version_problem() is None:
            _give_layers_their_backend()
    except (ImportError, AttributeError) as error:
        _logger.warning("qwen_sparse: models with dual_chunk_attention_config will not run in this vLLM: %s", error)


def _give_layers_their_backend() -> None:
    """Have ``Attention`` layers that carry a Dual Chunk Attention config use this package's backend."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    original = Attention.__init__
    if getattr(original, "qwen_sparse", False):
        return
    register_backend(AttentionBackendEnum.CUSTOM, "qwen_sparse.vllm.backend.DualChunkBackend")

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("dual_chunk_attention_config"):
            from .backend import DualChunkBackend
            from .projection import remember_parent

            if kwargs.get("attn_backend") is not None:
                raise ValueError(
                    "qwen_sparse: dual_chunk_attention_config needs an attention layer without a backend of its own, "
                    f"got {kwargs['attn_backend'].__name__}"
                )
            kwargs["attn_backend"] = DualChunkBackend
            original(self, *args, **kwargs)
            remember_parent(self)
        else:
            check_unused(get_current_vllm_config())
            original(self, *args, **kwargs)

    init.qwen_sparse = True  # type: ignore[attr-defined]
    Attention.__init__ = init
