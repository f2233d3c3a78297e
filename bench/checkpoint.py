"""Random weights in the shapes of Qwen2.5: checkpoint files that every engine loads, and weights made on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.decoder import DecoderWeights
from qwen_sparse.model.loader import empty_weights
from qwen_sparse.model.mlp import Mlp

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

BIAS_DEVIATION = 2.0
"""Of the query and key biases of :func:`random_weights`; over 128 channels that is a norm of 23, the median of
Qwen2.5-7B's key biases."""


def model_config(shape: str, num_layers: int | None, **changes: object) -> ModelConfig:
    """The config of a key of :data:`SHAPES`, with so many layers (all when None) and other values of config.json."""
    layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return ModelConfig.from_dict({**_COMMON, **SHAPES[shape], "max_position_embeddings": 32768, **layers, **changes})


@torch.no_grad()
def random_weights(config: ModelConfig, device: torch.device, seed: int) -> DecoderWeights:
    """Weights made where they are used, one tensor at a time in the config's dtype.

    Every matrix keeps the deviation of what it multiplies (1 / sqrt(inputs)); those that add to the residual have
    1 / sqrt(2 layers) of that, so that it stays around 1 over all layers, as in GPT-2. Queries and keys get biases of
    :data:`BIAS_DEVIATION`, which RoPE turns into scores that depend on distance, as in trained heads.
    """
    weights = empty_weights(config, config.dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    residual = (2 * config.num_layers) ** -0.5

    def fill(matrix: Tensor, gain: float = 1.0) -> None:
        matrix.normal_(std=gain * matrix.shape[1] ** -0.5, generator=generator)

    weights.embedding.normal_(generator=generator)
    if not config.tie_word_embeddings:
        fill(weights.lm_head)
    weights.norm.fill_(1)
    for layer in weights.layers:
        layer.input_norm.fill_(1)
        layer.post_attention_norm.fill_(1)
        fill(layer.qkv)
        fill(layer.o, residual)
        assert isinstance(layer.mlp, Mlp)
        fill(layer.mlp.gate_up)
        fill(layer.mlp.down, residual)
        if layer.qkv_bias is not None:
            layer.qkv_bias.normal_(std=BIAS_DEVIATION, generator=generator)
            layer.qkv_bias[-config.num_kv_heads * config.head_dim :].zero_()  # v: would be common to all rows
    return weights


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
