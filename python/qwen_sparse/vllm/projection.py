"""The bias of the key projection, which int8 pages leave out; an attention layer of vLLM does not know its projection.

The layer's parent does, so the parent is noted when the layer becomes its attribute (``self.attn = Attention(...)``).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ["key_bias", "remember_parent"]


def remember_parent(layer: Any) -> None:
    """Set ``layer.impl.parent`` to a weak reference to the module that takes ``layer`` in; it must be the next one."""
    impl = layer.impl

    def on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is layer:
            handle.remove()
            impl.parent = weakref.ref(parent)

    handle = register_module_module_registration_hook(on_registration)


def key_bias(parent: nn.Module | None, num_heads: int, num_kv_heads: int, head_size: int) -> Tensor | None:
    """What the projection adds to every key before it is rotated, float32 ``[num_kv_heads, head_size]``.

    None if it adds nothing, or keys are normalised behind the projection (Qwen3), which bounds them without a bias.

    Raises:
        ValueError: the module has no ``qkv_proj`` to look at.
    """
    projection = getattr(parent, "qkv_proj", None)
    if projection is None:
        raise ValueError(
            "qwen_sparse: kv_cache_dtype 'int8_per_token_head' needs to know the bias of the key projection, and this "
            f"model's attention ({type(parent).__name__}) has no qkv_proj; use the default kv_cache_dtype"
        )
    bias = getattr(projection, "bias", None)
    if bias is None or hasattr(parent, "k_norm"):
        return None
    q_size, kv_size = num_heads * head_size, num_kv_heads * head_size
    if bias.numel() != q_size + 2 * kv_size:
        raise ValueError(
            "qwen_sparse: the bias of qkv_proj must have (num_heads + 2 num_kv_heads) * head_size = "
            f"{q_size + 2 * kv_size} elements, got {bias.numel()}"
        )
    k_bias: Tensor = bias.detach()[q_size : q_size + kv_size].float()
    return k_bias.view(num_kv_heads, head_size).clone()
