"""Checkpoints whose matrices are stored in fewer bits: packed here by the formats' definitions, read by the loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import TINY, WriteCheckpoint, random_tensors
from qwen_sparse import estimate_memory, load_model, prefill
from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.formats import WeightFormat

GROUP = 32
Packed = tuple[dict[str, Tensor], Tensor]
"""What is stored by kind, and the matrix that it stands for, float32."""


def words(values: Tensor, bits: int) -> Tensor:
    """The last dimension in int32, the first number in the lowest bits."""
    per_word = 32 // bits
    result = torch.zeros(*values.shape[:-1], -(-values.shape[-1] // per_word), dtype=torch.int64)
    for position in range(values.shape[-1]):
        result[..., position // per_word] |= values[..., position].long() << (bits * (position % per_word))
    return torch.where(result >= 2**31, result - 2**32, result).int()


def quantised(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unsigned numbers ``[out, in]``, zero points and scales ``[out, in / GROUP]``, and the matrix they stand for."""
    grouped = matrix.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    numbers = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    exact = ((numbers - zero[..., None]) * scale[..., None]).flatten(1)
    return numbers.flatten(1).int(), zero.int(), scale, exact


def awq(matrix: Tensor) -> Packed:
    numbers, zero, scale, exact = quantised(matrix, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def columns(values: Tensor) -> Tensor:
        return words(values.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    stored = {"qweight": columns(numbers.T), "qzeros": columns(zero.T), "scales": scale.T.half().contiguous()}
    return stored, exact


def gptq(matrix: Tensor, *, bits: int = 4, offset: int = 1, shuffled: bool = False) -> Packed:
    order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(1)) if shuffled else None
    numbers, zero, scale, exact = quantised(matrix if order is None else matrix[:, order], bits)
    group = torch.arange(matrix.shape[1]) // GROUP
    if order is not None:  # inputs sorted by importance share groups, and are stored in their own order
        back = order.argsort()
        numbers, exact, group = numbers[:, back], exact[:, back], group[back]
    stored = {
        "qweight": words(numbers, bits).T.contiguous(),
        "qzeros": words((zero.T - offset) & (2**bits - 1), bits),
        "scales": scale.T.half().contiguous(),
        "g_idx": group.int(),
    }
    return stored, exact


def fp8(matrix: Tensor, *, size: int = 48) -> Packed:
    """With blocks that do not divide the matrix."""
    rows, columns = (-(-length // size) for length in matrix.shape)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.5
    spread = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[: matrix.shape[0], : matrix.shape[1]]
    data = (matrix / spread).to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale_inv": scale}, data.float() * spread


def fp8_by_row(matrix: Tensor) -> Packed:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    data = (matrix / scale).to(torch.float8_e4m3fn)
    return {"weight": data, "weight_scale": scale, "input_scale": torch.ones(1)}, data.float() * scale


def int8_by_row(matrix: Tensor) -> Packed:
    scale = matrix.abs().amax(1, keepdim=True) / 127
    data = (matrix / scale).round().to(torch.int8)
    return {"weight": data, "weight_scale": scale}, data.float() * scale


def pack_quantized(matrix: Tensor, *, symmetric: bool = True) -> Packed:
    numbers, zero, scale, exact = quantised(matrix, 4)
    stored = {
        "weight_packed": words(numbers, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.shape),
    }
    if symmetric:
        return stored, ((numbers.unflatten(1, (-1, GROUP)) - 8) * scale[..., None]).flatten(1)
    return {**stored, "weight_zero_point": words(zero.T, 4).T.contiguous()}, exact


def compressed(format: str, bits: int, strategy: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": GROUP, "symmetric": True}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False}
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
    "gptq": ({**GPTQ, "bits": 4}, gptq),
    "gptq-by-importance": ({**GPTQ, "bits": 4, "desc_act": True}, lambda matrix: gptq(matrix, shuffled=True)),
    "gptq-8": ({**GPTQ, "bits": 8}, lambda matrix: gptq(matrix, bits=8)),
    "gptq-v2": ({**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"}, lambda matrix: gptq(matrix, offset=0)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}, fp8),
    "compressed-fp8": (compressed("float-quantized", 8, "channel"), fp8_by_row),
    "compressed-int8": (compressed("int-quantized", 8, "channel"), int8_by_row),
    "compressed-int4": (compressed("pack-quantized", 4, "group"), pack_quantized),
    "compressed-int4-zeros": (
        compressed("pack-quantized", 4, "group"),
        lambda matrix: pack_quantized(matrix, symmetric=False),
    ),
}


def is_quantised(name: str) -> bool:
    return "proj.weight" in name


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_what_it_stands_for(case: str, write_checkpoint: WriteCheckpoint) -> None:
    settings, pack = CASES[case]
    plain, directory = write_checkpoint("plain"), write_checkpoint("packed", quantization_config=settings)
    stored, exact = {}, {}
    for name, tensor in random_tensors(TINY, 0).items():
        if not is_quantised(name):
            stored[name] = exact[name] = tensor
            continue
        parts, exact[name] = pack(tensor)
        assert 0 < float((exact[name] - tensor).abs().mean() / tensor.abs().mean()) < 0.5
        stored |= {f"{name.removesuffix('weight')}{kind}": part for kind, part in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in exact.items()}, plain / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")

    model, expected = load_model(directory), load_model(plain)
    assert model.config.weight_format is not None
    for mine, theirs in zip(model.weights.layers, expected.weights.layers, strict=True):
        for name in ("qkv", "o"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine.mlp.gate_up, theirs.mlp.gate_up, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine.mlp.down, theirs.mlp.down, rtol=1e-6, atol=1e-7)
    tokens = list(range(40))
    torch.testing.assert_close(prefill(model, tokens).logits, prefill(expected, tokens).logits, rtol=1e-3, atol=1e-3)
    assert estimate_memory(model.config, 1000) == estimate_memory(expected.config, 1000)


def test_quantised_again(write_checkpoint: WriteCheckpoint) -> None:
    settings, pack = CASES["awq"]
    directory = write_checkpoint(quantization_config=settings)
    stored = {}
    for name, tensor in random_tensors(TINY, 0).items():
        parts = pack(tensor)[0] if is_quantised(name) else {"weight": tensor}
        stem = name.removesuffix("weight")
        stored |= {name: tensor} if len(parts) == 1 else {f"{stem}{kind}": part for kind, part in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    logits = [prefill(load_model(directory, quantization=q), [1, 2, 3]).logits for q in (None, "int8")]
    assert 0 < float((logits[0] - logits[1]).abs().max()) < 0.2 * float(logits[0].abs().max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "one of awq, compressed-tensors, fp8, gptq, got 'bitsandbytes'",
        ),
        ({"quant_method": "gptq", "bits": 3}, "bits must be one of 2, 4, 8, got 3"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format must be one of gptq",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version must be one of gemm, GEMM, got 'gemv'"),
        ({"quant_method": "awq"}, "quantization_config: bits is missing"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"two positive integers, got \[128\]"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "format must be one of pack-quantized, i",
        ),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "config_groups must be one group"),
        (compressed("pack-quantized", 3, "group"), "num_bits must be one of 4, 8, got 3"),
        (
            compressed("pack-quantized", 4, "token"),
            "one of tensor, channel, group, block, got 'token'",
        ),
    ],
)
def test_what_is_not_read_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**TINY, "quantization_config": settings})


def test_parts_that_do_not_fit(write_checkpoint: WriteCheckpoint) -> None:
    settings, pack = CASES["gptq"]
    directory = write_checkpoint(quantization_config=settings)

    def save(change: Callable[[dict[str, Tensor]], None]) -> Path:
        stored = {}
        for name, tensor in random_tensors(TINY, 0).items():
            if not is_quantised(name):
                stored[name] = tensor
                continue
            parts = pack(tensor)[0]
            if "layers.1.mlp.down_proj" in name:
                change(parts)
            stored |= {f"{name.removesuffix('weight')}{kind}": part.contiguous() for kind, part in parts.items()}
        save_file(stored, directory / "model.safetensors")
        return directory

    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight without scales"):
        load_model(save(lambda parts: parts.pop("scales")))
    with pytest.raises(ValueError, match=r"mis-shaped 1: model.layers.1.mlp.down_proj.weight \[128, 184\], not"):
        load_model(save(lambda parts: parts.update(qweight=parts["qweight"][:-1])))
    with pytest.raises(ValueError, match=r"do not fit each other: .*down_proj.scales \[2, 128\]"):
        load_model(save(lambda parts: parts.update(scales=parts["scales"][:2])))


def test_one_matrix_at_a_time(write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the stored parts of one matrix are read before the next one's."""
    settings, pack = CASES["awq"]
    directory = write_checkpoint(quantization_config=settings)
    stored = {}
    for name, tensor in random_tensors(TINY, 0).items():
        parts = pack(tensor)[0] if is_quantised(name) else None
        stem = name.removesuffix("weight")
        stored |= {name: tensor} if parts is None else {f"{stem}{kind}": part for kind, part in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    order: list[str] = []
    from qwen_sparse.model import loader

    read = loader._Files.read
    monkeypatch.setattr(loader._Files, "read", lambda self, name: (order.append(name), read(self, name))[1])
    load_model(directory)
    stems = [name.rpartition(".")[0] for name in order if not name.endswith(".bias")]
    runs = [stem for before, stem in zip(["", *stems], stems, strict=False) if stem != before]
    assert len(runs) == len(set(runs))
    assert sorted(order) == sorted(stored)


def test_formats_are_equal_by_what_they_say() -> None:
    first = WeightFormat.from_dict({"quant_method": "gptq", "bits": 4})
    assert first == WeightFormat("gptq", 4, None, 1)
    assert WeightFormat.from_dict({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}).zero_offset == 0
