"""Loading: placement, sharding, dtypes, and errors that name every tensor."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qwen_sparse.model.loader
from conftest import DUAL_CHUNK, TINY, WriteCheckpoint, random_tensors, save_tensors
from qwen_sparse import load_model
from qwen_sparse.model.loader import load_config


def test_every_tensor_lands_in_its_place(write_checkpoint: WriteCheckpoint) -> None:
    weights = load_model(write_checkpoint(seed=3)).weights
    stored = random_tensors(TINY, seed=3)
    assert torch.equal(weights.embedding, stored["model.embed_tokens.weight"])
    assert torch.equal(weights.norm, stored["model.norm.weight"])
    assert torch.equal(weights.lm_head, stored["lm_head.weight"])
    for index, layer in enumerate(weights.layers):
        part = {name.split(f"layers.{index}.")[1]: t for name, t in stored.items() if f"layers.{index}." in name}
        assert torch.equal(layer.qkv, torch.cat([part[f"self_attn.{n}_proj.weight"] for n in "qkv"]))
        assert layer.qkv_bias is not None
        assert torch.equal(layer.qkv_bias, torch.cat([part[f"self_attn.{n}_proj.bias"] for n in "qkv"]))
        assert torch.equal(layer.mlp.gate_up, torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]]))
        assert torch.equal(layer.o, part["self_attn.o_proj.weight"])
        assert torch.equal(layer.mlp.down, part["mlp.down_proj.weight"])
        assert torch.equal(layer.input_norm, part["input_layernorm.weight"])
        assert torch.equal(layer.post_attention_norm, part["post_attention_layernorm.weight"])
    assert weights.nbytes == sum(tensor.nbytes for tensor in stored.values())


def test_sharded_equals_single(write_checkpoint: WriteCheckpoint) -> None:
    single = load_model(write_checkpoint("single", seed=1)).weights
    sharded = load_model(write_checkpoint("sharded", seed=1, shards=3)).weights
    for one, other in zip(single.tensors(), sharded.tensors(), strict=True):
        assert torch.equal(one, other)


def test_tied_embeddings(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint(tie_word_embeddings=True)
    model = load_model(directory)
    assert model.weights.lm_head is model.weights.embedding
    assert model.weights.nbytes == sum(
        t.nbytes for t in random_tensors({**TINY, "tie_word_embeddings": True}, 0).values()
    )
    repeated = random_tensors({**TINY, "tie_word_embeddings": True}, 0)
    repeated["lm_head.weight"] = repeated["model.embed_tokens.weight"].clone()
    save_tensors(directory, repeated)  # some checkpoints store it all the same
    again = load_model(directory).weights
    assert again.lm_head is again.embedding


def test_dtype(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint(torch_dtype="bfloat16")  # stored in float32 all the same
    auto, wide = load_model(directory), load_model(directory, dtype="float32")
    assert auto.dtype == auto.weights.embedding.dtype == torch.bfloat16
    assert wide.dtype == wide.weights.layers[0].qkv.dtype == torch.float32
    assert torch.equal(auto.weights.embedding, wide.weights.embedding.bfloat16())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_the_weights_where_the_config_has_none(
    write_checkpoint: WriteCheckpoint, dtype: torch.dtype, shards: int
) -> None:
    directory = write_checkpoint(torch_dtype=None)
    norms = {name for name in random_tensors(TINY, 0) if "norm" in name}  # some checkpoints keep them wide
    (directory / "model.safetensors").unlink()
    save_tensors(
        directory,
        {name: tensor if name in norms else tensor.to(dtype) for name, tensor in random_tensors(TINY, 0).items()},
        shards,
    )
    assert load_model(directory).dtype == load_config(directory).dtype == dtype
    for file in directory.glob("*.safetensors"):
        file.unlink()
    assert load_config(directory).dtype == torch.float32


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_weights_that_are_no_floats(write_checkpoint: WriteCheckpoint, dtype: torch.dtype) -> None:
    """What a quantised checkpoint without quantization_config holds; a cast would make garbage of it."""
    directory = write_checkpoint()
    tensors = random_tensors(TINY, 0)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        tensors[name] = tensors[name].to(dtype)
    save_tensors(directory, tensors)
    expected = r"none of BF16, F16, F32, F64 .* 2: model.layers.0.mlp.up_proj.weight \w+, model.layers.1.self_attn.q"
    with pytest.raises(ValueError, match=expected):
        load_model(directory)


def test_wide_weights(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint()
    save_tensors(directory, {name: tensor.double() for name, tensor in random_tensors(TINY, 0).items()})
    assert torch.equal(load_model(directory).weights.embedding, random_tensors(TINY, 0)["model.embed_tokens.weight"])


def test_no_attention_bias(write_checkpoint: WriteCheckpoint) -> None:
    model = load_model(write_checkpoint(attention_bias=False))
    assert all(layer.qkv_bias is None for layer in model.weights.layers)


def test_one_tensor_at_a_time(write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            nonlocal most
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            return tensor

    real = qwen_sparse.model.loader.safe_open
    monkeypatch.setattr(qwen_sparse.model.loader, "safe_open", Counting)
    load_model(write_checkpoint(shards=2))
    assert len(alive) == len(random_tensors(TINY, 0))
    assert most == 1


def test_all_wrong_tensors_are_named_at_once(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint()
    tensors = random_tensors(TINY, 0)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(128)
    save_tensors(directory, tensors)
    with pytest.raises(ValueError, match="do not fit its config") as caught:
        load_model(directory)
    message = str(caught.value)
    assert "missing 2: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "unexpected 1: model.layers.2.mlp.up_proj.weight" in message
    assert "mis-shaped 1: model.layers.0.self_attn.k_proj.bias [128], not [64]" in message


def test_long_lists_of_names_are_cut(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint(num_hidden_layers=4)
    save_tensors(directory, random_tensors(TINY, 0))  # two layers of four
    with pytest.raises(ValueError, match=r"missing 24: .*, and 4 more"):
        load_model(directory)


def test_missing_files(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model directory at"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="not a hub id"):
        load_model("a/b/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    directory = write_checkpoint(shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shards.*model-00002-of-00002.safetensors"):
        load_model(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_model(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="must have a weight_map"):
        load_model(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 1}}))
    with pytest.raises(ValueError, match=r"weight_map of tensor names to names of files, got .'model.norm.weight': 1"):
        load_model(directory)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json must hold an object, got a list"):
        load_model(directory)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 988097824\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_lfs_pointers(name: str, write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint()
    (directory / name).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer, .*: run 'git lfs pull' in {directory}"):
        load_model(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pytorch_model-00001-of-00002.bin",
            "-00001-of-00002.bin holds pickled weights, .*save_pretrained",
        ),
        ("model-q4_k_m.gguf", "there is model-q4_k_m.gguf: give its own path to read it"),
        ("model.safetensors.incomplete", "model.safetensors.incomplete: the download did not finish"),
    ],
)
def test_other_weights(name: str, message: str, write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint()
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(FileNotFoundError, match=f"neither model.safetensors nor .*{message}"):
        load_model(directory)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "qwen2.5.safetensors"
    file.write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"or a .gguf file, and .*qwen2.5.safetensors is another file"):
        load_model(file)


def test_another_config(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint()
    long = {**TINY, "dual_chunk_attention_config": DUAL_CHUNK}
    (directory / "config_1m.json").write_text(json.dumps(long))
    model = load_model(directory, config="config_1m.json")
    assert model.config.dual_chunk is not None
    assert model.max_seq_len is None
    assert load_config(directory, config="config_1m.json") == model.config


def test_cut_off_file(write_checkpoint: WriteCheckpoint) -> None:
    file = write_checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(file.parent)


def test_shard_without_its_tensor(write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint(shards=2)
    tensors = random_tensors(TINY, 0)
    kept = dict(sorted(tensors.items())[::2])
    dropped = sorted(kept)[0]
    del kept[dropped]
    save_file(kept, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"missing 1: {dropped}"):
        load_model(directory)


def test_hub_id_without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="install huggingface_hub"):
        load_model("Qwen/Qwen2.5-7B-Instruct-1M")


def test_hub_id_with_hub(write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    directory, asked = write_checkpoint(), []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert load_model("owner/name").path == directory
    assert asked == [("owner/name", ["*.json", "*.safetensors", "*.jinja"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:99"}, "no CUDA kernels, got 'cuda:99'|no CUDA device, got 'cuda:99'|devices, got 'cuda:99'"),
        ({"device": "mps"}, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'mps'"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto', 'bfloat16' or 'int8', got 'fp8'"),
        ({"kv_cache_dtype": "bfloat16"}, "needs a model in bfloat16.*got dtype float32"),
        ({"attention": "sparse"}, "attention 'sparse' needs budgets"),
        ({"attention": "flash"}, "attention must be 'auto', 'dense' or 'sparse', got 'flash'"),
        ({"max_seq_len": 0}, "max_seq_len must be >= 1 or None, got 0"),
    ],
)
def test_bad_arguments(write_checkpoint: WriteCheckpoint, arguments: dict[str, Any], message: str) -> None:
    directory = write_checkpoint()
    (directory / "model.safetensors").unlink()  # arguments are refused before weights are looked for
    with pytest.raises(ValueError, match=message):
        load_model(directory, **arguments)


def test_max_seq_len(write_checkpoint: WriteCheckpoint) -> None:
    plain = write_checkpoint("plain", max_position_embeddings=1000)
    chunked = write_checkpoint("chunked", max_position_embeddings=1000, dual_chunk_attention_config=DUAL_CHUNK)
    assert load_model(plain).max_seq_len == 1000
    assert load_model(plain, max_seq_len=2000).max_seq_len == 2000
    assert load_model(chunked).max_seq_len is None
    assert load_model(chunked, max_seq_len=10).max_seq_len == 10
