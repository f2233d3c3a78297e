"""Random-weight checkpoints in the shapes of Qwen2.5, as files that every engine loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "initializer_range": 0.02,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
"""Sizes by name, as in the config.json of Qwen2.5-0.5B, -1.5B and -7B; "tiny" is for trying a benchmark out."""

STANDARD_DEVIATION = 0.02
"""Of every matrix and bias, as Qwen2 is initialised; norm weights are 1. Activations stay around 1."""


def write_checkpoint(workdir: Path, shape: str, num_layers: int | None, max_seqlen: int, seed: int) -> Path:
    """Write config.json and model.safetensors in bf16, unless a checkpoint with the same config is there already.

    Args:
        workdir: a directory for checkpoints; each gets its own inside.
        shape: a key of :data:`SHAPES`.
        num_layers: keep this many layers; all when None.
        max_seqlen: longest prompt; ``max_position_embeddings`` is at least the models' 32768.
        seed: of the weights.

    Returns:
        The checkpoint's directory.
    """
    config = {**_COMMON, **SHAPES[shape], "max_position_embeddings": max(32768, max_seqlen + 64)}
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    path = workdir / f"qwen2.5-{shape}-{config['num_hidden_layers']}layers-seed{seed}"
    text = json.dumps(config, indent=1) + "\n"
    weights, config_file = path / "model.safetensors", path / "config.json"
    if not (weights.is_file() and config_file.is_file() and config_file.read_text() == text):
        path.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(config, seed), weights, metadata={"format": "pt"})
        config_file.write_text(text)
    return path


def _tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(STANDARD_DEVIATION).bfloat16()

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden), "model.norm.weight": ones()}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, size in (("q", hidden), ("k", kv_size), ("v", kv_size)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = normal(size, hidden)
            tensors[f"{prefix}.self_attn.{name}_proj.bias"] = normal(size)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, hidden)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = normal(intermediate, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(intermediate, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(hidden, intermediate)
        tensors[f"{prefix}.input_layernorm.weight"] = ones()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ones()
    return tensors
