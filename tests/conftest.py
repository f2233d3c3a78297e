"""Shared fixtures: random checkpoints, written to disk as Hugging Face does, and a byte-level tokenizer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from qwen_sparse import _C, load_model, ops
from qwen_sparse.model.decoder import Decoder

pytest_plugins = ["ptxsim.fixtures"]

torch.set_num_threads(min(2, os.cpu_count() or 1))

TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 260,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""config.json of the smallest model the package takes; 256 byte tokens, then EOS and three more special tokens."""

DUAL_CHUNK = {"chunk_size": 256, "local_size": 128, "original_max_position_embeddings": 256}


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights scaled so that every layer, bias and position shows in the logits; key biases are large, as Qwen2's."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    def vector(size: int, mean: float, spread: float) -> Tensor:
        return mean + spread * torch.randn(size, generator=generator)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5),
        "model.norm.weight": vector(hidden, 1, 0.1),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 2.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = vector(hidden, 1, 0.1)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = vector(hidden, 1, 0.1)
        for name, size, bias in (("q", q_size, 0.5), ("k", kv_size, 2.0), ("v", kv_size, 0.5)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(size, hidden)
            if config.get("attention_bias", True):
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = vector(size, 0, bias)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, q_size)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, intermediate)
    return tensors


def budgets(config: dict[str, Any], vertical: int, slash: int) -> list[dict[str, list[Any]]]:
    """The same (V, S) for every head, in the published format."""
    heads = {str(head): ["vertical_and_slash", vertical, slash, 0.9] for head in range(config["num_attention_heads"])}
    return [dict(heads) for _ in range(config["num_hidden_layers"])]


WriteCheckpoint = Callable[..., Path]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """``write_checkpoint(name="model", seed=0, shards=1, sparse=None, tokenizer=False, **config) ->
    directory``.

    ``sparse=(V, S)`` also writes sparse_attention_config.json.
    """

    def write(
        name: str = "model",
        *,
        seed: int = 0,
        shards: int = 1,
        sparse: tuple[int, int] | None = None,
        tokenizer: bool = False,
        **overrides: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        config = {**TINY, **overrides}
        (directory / "config.json").write_text(json.dumps(config))
        save_tensors(directory, random_tensors(config, seed), shards)
        if sparse is not None:
            (directory / "sparse_attention_config.json").write_text(json.dumps(budgets(config, *sparse)))
        if tokenizer:
            byte_tokenizer().save(str(directory / "tokenizer.json"))
        return directory

    return write


def save_tensors(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or ``shards`` files with their index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % shards == shard}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte (id = byte), as byte-level BPE without merges; 256 to 258 are special tokens."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's byte alphabet
    hidden = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte): byte for byte in visible}
    vocab |= {chr(256 + number): byte for number, byte in enumerate(hidden)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def released_directory(variable: str, directory: str, target: str) -> Path:
    """What the environment names, else what make wrote; without it the test is skipped.

    A directory that the environment names and that is no checkpoint is an error.
    """
    named = os.environ.get(variable)
    path = Path(named) if named else Path(__file__).parents[1] / "build" / "released" / directory
    if not (path / "config.json").is_file():
        if named:
            pytest.fail(f"{variable} must name a checkpoint directory, got {named}")
        pytest.skip(f"no trained model: make {target}, or {variable}=its directory")
    return path


@pytest.fixture(scope="session")
def released_path() -> Path:
    """The directory of Qwen2.5-Coder-0.5B-Instruct."""
    return released_directory("QWEN_SPARSE_RELEASED", "qwen2.5-coder-0.5b", "released")


@pytest.fixture(scope="session")
def released_model(released_path: Path) -> Decoder:
    """All 24 layers, in bfloat16 on the CPU."""
    return load_model(released_path, device="cpu")


@pytest.fixture(scope="session")
def released_cut_path() -> Path:
    """The directory of that model's first four layers. What they write means nothing; heads and weights are trained."""
    return released_directory("QWEN_SPARSE_RELEASED_CUT", "qwen2.5-coder-0.5b-4layers", "released-cut")


@pytest.fixture(scope="session")
def released_cut(released_cut_path: Path) -> Decoder:
    """Those four layers, in bfloat16 on the CPU."""
    return load_model(released_cut_path, device="cpu")


@pytest.fixture(params=_C.cpu_features()["supported"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each instruction set that this CPU has."""
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("")


GPU_KERNELS = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("ptxsim", marks=pytest.mark.ptxsim)]
SETS = _C.cpu_features()["supported"]
KERNELS = [*(name for name in SETS if not name.startswith("amx")), *GPU_KERNELS]
TILES = [name for name in SETS if name.startswith("amx")]
"""Sets that add kernels for prefill attention and block groups to those of another set."""
HOPPER = pytest.param("ptxsim_sm90", marks=pytest.mark.ptxsim)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once with the kernels of each instruction set that this CPU has (those of AMX apart: most of their
    kernels are another set's), on a GPU if there is one, and with the CUDA kernels for Ampere in the simulator. Tests
    hand CPU tensors to ``qwen_sparse.ops`` and get CPU tensors whichever runs.
    """
    yield from use_kernels(request.param, monkeypatch)


@pytest.fixture(params=[*KERNELS, *TILES])
def selection_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As ``kernels``, for what tiles have kernels of their own for."""
    yield from use_kernels(request.param, monkeypatch)


@pytest.fixture(params=[*KERNELS, *TILES, HOPPER])
def prefill_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As ``kernels``, for ops that have kernels of their own for Hopper."""
    yield from use_kernels(request.param, monkeypatch)


def use_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes ``qwen_sparse.ops`` run the kernels of that name."""
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        monkeypatch.setattr(ops, "_ops", MovedOps(torch.ops.qwen_sparse, torch.device("cuda")))
        yield name
    elif name.startswith("ptxsim"):
        import simulated

        if reason := simulated.unavailable():
            pytest.skip(reason)
        arch = 90 if name == "ptxsim_sm90" else 80
        if arch not in simulated.archs():
            pytest.skip("no CUTLASS headers: neither QWEN_SPARSE_CUTLASS_DIR nor the package nvidia-cutlass")
        monkeypatch.setattr(ops, "_ops", MovedOps(simulated.load(), torch.device("cpu")))
        simulated.options(arch=arch)
        yield name
        simulated.reset()
    else:
        _C.set_cpu_isa(name)
        yield name
        _C.set_cpu_isa("")


class MovedOps:
    """Stands for ``torch.ops.qwen_sparse``: arguments are moved to a device with their strides, results back."""

    def __init__(self, namespace: Any, device: torch.device) -> None:
        self.namespace, self.device = namespace, device

    def __getattr__(self, name: str) -> Any:
        op = getattr(self.namespace, name)
        schema = getattr(torch.ops.qwen_sparse, name).default._schema

        def call(*arguments: Any) -> Any:
            if any(word in name for word in ("attention", "select", "scores")) and arguments[0].dtype == torch.float32:
                pytest.skip("attention of float32 is for CPUs")
            moved = [self.move(argument) for argument in arguments]
            result = op(*moved)
            for declared, before, after in zip(schema.arguments, arguments, moved, strict=False):
                if declared.is_write and before is not after:
                    before.copy_(after)
            if isinstance(result, Tensor):
                return result.cpu()
            return None if result is None else type(result)(part.cpu() for part in result)

        call.__name__ = name
        return call

    def move(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.device == self.device:
            return argument
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=self.device).copy_(
            argument
        )
