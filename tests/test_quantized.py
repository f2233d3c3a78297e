"""Weights in 8 bits: what is kept, what they compute, and everything that counts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import WriteCheckpoint
from qwen_sparse import generate, load_model, prefill
from qwen_sparse.cli import main
from qwen_sparse.engine.memory import estimate_memory, weight_bytes
from qwen_sparse.model import linear as products
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.linear import gated_mlp, linear
from qwen_sparse.model.loader import load_config
from qwen_sparse.model.mlp import Mlp
from qwen_sparse.model.quantized import Int8Matrix, split_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantised(values: Tensor, dtype: torch.dtype) -> Int8Matrix:
    return Int8Matrix.empty(*values.shape, dtype=dtype, device=torch.device("cpu")).copy_(values)


def dequantised(matrix: Int8Matrix) -> Tensor:
    return matrix.data.double() * matrix.scale.double()[..., None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantisation(dtype: torch.dtype) -> None:
    """Half a step at most, and the step is what the dtype of the scale makes of a row's largest / 127."""
    values = torch.randn(5000, 96).to(dtype) * torch.logspace(-3, 2, 5000)[:, None].to(dtype)
    values[7] = 0
    matrix = quantised(values, dtype)
    assert matrix.data.abs().max() == 127
    assert matrix.scale[7] == 0
    assert not matrix.data[7].any()
    step = matrix.scale.double()[:, None]
    assert ((dequantised(matrix) - values.double()).abs() <= 0.5 * step * (1 + 4 * torch.finfo(dtype).eps) * 1.3).all()
    assert matrix.shape == values.shape


@pytest.mark.parametrize("whole", [0, 2**26])
@pytest.mark.parametrize("widen", [False, True], ids=["own_dtype", "widened"])
@pytest.mark.parametrize("rows", [1, 8, 9, 300, 2500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype: torch.dtype, rows: int, widen: bool, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, more than torch's kernel is for, and the blocks and pieces of a prefill chunk."""
    monkeypatch.setattr(products, "_FAST", frozenset() if widen else frozenset(DTYPES))
    monkeypatch.setattr(products, "_PIECE_BYTES", 2**16)
    monkeypatch.setattr(products, "_WHOLE_BYTES", whole)
    x, bias = torch.randn(rows, 96).to(dtype), torch.randn(200).to(dtype)
    weight = quantised(torch.randn(200, 96), dtype)
    exact = x.double() @ dequantised(weight).T
    tolerance = 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert (linear(x, weight).double() - exact).abs().max() < tolerance
    assert (linear(x, weight, bias).double() - (exact + bias.double())).abs().max() < tolerance
    gate_up, down = quantised(torch.randn(128, 96) / 10, dtype), quantised(torch.randn(96, 64) / 8, dtype)
    gate, up = (x.double() @ dequantised(part).T for part in split_rows(gate_up, [64, 64]))  # type: ignore[arg-type]
    exact = (torch.nn.functional.silu(gate) * up) @ dequantised(down).T
    assert (gated_mlp(x, gate_up, down).double() - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


def logits(model: Decoder, ids: list[int]) -> Tensor:
    return prefill(model, ids, logits="all").logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_8_bits(tied: bool, write_checkpoint: WriteCheckpoint) -> None:
    """What it computes is what the same model does with the quantised weights in float32."""
    directory = write_checkpoint(tie_word_embeddings=tied)
    model = load_model(directory, quantization="int8")
    plain = load_model(directory)
    for layer, own in zip(plain.weights.layers, model.weights.layers, strict=True):
        assert isinstance(layer.mlp, Mlp)
        assert isinstance(own.mlp, Mlp)
        for target, source in (
            (layer.qkv, own.qkv),
            (layer.o, own.o),
            (layer.mlp.gate_up, own.mlp.gate_up),
            (layer.mlp.down, own.mlp.down),
        ):
            assert isinstance(source, Int8Matrix)
            assert isinstance(target, Tensor)
            target.copy_(dequantised(source))
        assert torch.equal(layer.input_norm, own.input_norm)
    assert isinstance(model.weights.lm_head, Int8Matrix)
    assert isinstance(model.weights.embedding, Tensor)
    widened = replace(plain, weights=replace(plain.weights, lm_head=dequantised(model.weights.lm_head).float()))
    ids = list(range(0, 250, 3))
    torch.testing.assert_close(logits(model, ids), logits(widened, ids), rtol=0, atol=1e-4)
    assert list(generate(model, ids, max_new_tokens=8)) == list(generate(widened, ids, max_new_tokens=8))
    assert "quantization='int8'" in repr(model)


@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_counted(tied: bool, write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint(tie_word_embeddings=tied)
    model = load_model(directory, quantization="int8")
    assert weight_bytes(model.config, torch.float32, "int8") == model.weights.nbytes
    assert estimate_memory(model.config, 100, quantization="int8").weights == model.weights.nbytes
    assert estimate_memory(model.config, 100).weights == load_model(directory).weights.nbytes
    with pytest.raises(ValueError, match="quantization must be None or one of int8, got 'int3'"):
        estimate_memory(model.config, 100, quantization="int3")


def test_experts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2MoeConfig(
        vocab_size=260, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=64, mlp_only_layers=[0],
    )  # fmt: skip
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    model, plain = load_model(tmp_path, dtype="float32", quantization="int8"), load_model(tmp_path, dtype="float32")
    assert weight_bytes(model.config, torch.float32, "int8") == model.weights.nbytes
    exact = logits(plain, list(range(80)))
    assert (logits(model, list(range(80))) - exact).std(-1).median() < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int3"}, "quantization must be None or one of int8, got 'int3'"),
        ({"quantization": "int8", "device": "cuda"}, "quantization must be None on a GPU, got 'int8' on cuda|no CUDA"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str, write_checkpoint: WriteCheckpoint) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(write_checkpoint(torch_dtype="bfloat16"), **arguments)


def test_command_line(write_checkpoint: WriteCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tokenizer=True)
    options = ["--model", str(path), "--prompt", "x", "--max-new-tokens", "1", "--no-progress"]
    assert main(["generate", *options, "--quantization", "int8"]) == 0
    capsys.readouterr()
    memory = ["memory", "--model", str(path), "--context", "100", "--quantization", "int8"]
    assert main(memory) == 0
    assert "weights in int8, activations in float32" in capsys.readouterr().out
    config = load_config(path)
    assert main([*memory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["weights"] == weight_bytes(config, torch.float32, "int8")
