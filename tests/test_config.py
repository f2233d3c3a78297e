"""config.json and budgets: what is read, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DUAL_CHUNK, TINY, budgets
from qwen_sparse.model.config import DualChunkConfig, ModelConfig, RopeConfig, SparseConfig, SparseSwitches, parse_dtype

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

QWEN25_7B_1M = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 1010000,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def test_million_token_config() -> None:
    config = ModelConfig.from_dict(QWEN25_7B_1M)
    assert config == ModelConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_position_embeddings=1010000,
        rope=RopeConfig(rope_theta=1e7),
        rms_norm_eps=1e-5,
        dtype=torch.bfloat16,
        eos_token_ids=(151645,),
        dual_chunk=DualChunkConfig(262144, 8192, 262144),
    )
    assert config.dual_chunk is not None
    assert config.dual_chunk.chunk_len == 253952


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ],
    ids=["type", "rope_type", "rope_parameters"],
)
def test_yarn_spellings(spelling: dict[str, Any]) -> None:
    rope = ModelConfig.from_dict({**TINY, **spelling}).rope
    assert rope == RopeConfig(rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)


def test_plain_rope_spellings() -> None:
    old = ModelConfig.from_dict({**TINY, "rope_theta": 5e5, "rope_scaling": None})
    new = ModelConfig.from_dict(
        {**TINY, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    assert old.rope == new.rope == RopeConfig(rope_theta=5e5)


@pytest.mark.parametrize("keys", [{"torch_dtype": "bfloat16"}, {"torch_dtype": None, "dtype": "bfloat16"}])
def test_dtype_spellings(keys: dict[str, Any]) -> None:
    assert ModelConfig.from_dict({**TINY, **keys}).dtype == torch.bfloat16


def test_parse_dtype() -> None:
    assert parse_dtype("torch.float16") == parse_dtype(torch.float16) == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be one of bfloat16, float16, float32, got 'float64'"):
        parse_dtype("float64")
    with pytest.raises(ValueError, match=r"got torch.int8"):
        parse_dtype(torch.int8)


MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures must be .*got .'LlamaForCausalLM'"),
        ({"architectures": None, "model_type": "llama"}, "architectures must be .*got None and model_type 'llama'"),
        ({"architectures": ["Qwen2ForCausalLM", "Qwen3ForCausalLM"]}, "architectures must be one of Qwen2ForCausalLM,"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be an integer in .1, .*got 0"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types must be a list with one of full_attention, sliding_attention",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
            | {"dual_chunk_attention_config": DUAL_CHUNK},
            "dual_chunk_attention_config must be absent where layers have sliding windows",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method must be .*, got 'bitsandbytes'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type must be 'default' or 'yarn', got 'linear'"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8}}, "factor is missing"),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            r"mrope_section must be absent: multimodal rotary embedding \(mrope\) .*got .1.",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"partial_rotary_factor": True}, "config.json: partial_rotary_factor must be a finite number > 0, got True"),
        ({"rope_theta": -1.0}, "config.json: rope_theta must be a finite number > 1, got -1.0"),
        (
            {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 4}},
            "rope_theta must be a finite number > 1, got 1",
        ),
        (
            {"rope_scaling": {"rope_theta": float("inf")}},
            "rope_scaling: rope_theta must be a finite number > 1, got inf",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number > 1, got 10000"),
        (
            {"rope_scaling": {"factor": 4.0}},
            r"rope_scaling: rope_type is missing \('default' or 'yarn'\) beside factor",
        ),
        ({"rope_scaling": []}, r"rope_scaling must be an object or null, got \[\]"),
        ({"architectures": 5}, "architectures must be .*, got 5"),
        ({"layer_types": 5}, "layer_types must be a list .*, got 5"),
        ({"layer_types": [["full_attention"], "full_attention"]}, "layer_types must be a list"),
        (MOE | {"num_experts_per_tok": 9}, r"num_experts_per_tok must be an integer in \[1, 8\], got 9"),
        (MOE | {"num_experts": None}, "num_local_experts is missing"),
        (MOE | {"mlp_only_layers": 1}, "mlp_only_layers must be a list of layer numbers, got 1"),
        (MOE | {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"use_sliding_window": "no"}, "use_sliding_window must be true or false, got 'no'"),
        ({"quantization_config": "gptq"}, "quantization_config must be an object, got 'gptq'"),
        ({"quantization_config": []}, r"quantization_config must be an object, got \[\]"),
        ({"eos_token_id": 1.5}, r"eos_token_id must be an integer in \[0, 2147483647\], got 1.5"),
        ({"eos_token_id": "abc"}, "eos_token_id must be an integer .*, got 'abc'"),
        ({"eos_token_id": True}, "eos_token_id must be an integer .*, got True"),
        ({"eos_token_id": [3, -1]}, "eos_token_id must be an integer .*, got -1"),
        ({"head_dim": 64.0}, "head_dim must be an integer .*, got 64.0"),
        ({"torch_dtype": 0}, "torch_dtype. must be one of .*, got 0"),
        ({"dual_chunk_attention_config": []}, r"dual_chunk_attention_config must be an object, got \[\]"),
        (
            {"dual_chunk_attention_config": {**DUAL_CHUNK, "chunk_size": 2**70}},
            r"chunk_size must be an integer in \[1, 2147483647\], got 1180591620717411303424",
        ),
        ({"head_dim": 96}, "head_dim must be 64 or 128, got 96"),
        ({"head_dim": None, "hidden_size": 64}, "head_dim must be 64 or 128, got 32"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3, got 2"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, r"vocab_size must be an integer in \[1, 2147483647\], got 'many'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a finite number > 0, got -1.0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype. must be one of"),
        ({"dual_chunk_attention_config": {"chunk_size": 256}}, "local_size is missing"),
        ({"dual_chunk_attention_config": {**DUAL_CHUNK, "shape": 1}}, "unsupported keys shape"),
        (
            {"dual_chunk_attention_config": {**DUAL_CHUNK, "local_size": 64}},
            "must be a multiple of the KV page size 128, got 256 - 64 = 192",
        ),
        (
            {"dual_chunk_attention_config": {**DUAL_CHUNK, "local_size": 256}},
            "local_size must be below chunk_size = 256, got 256",
        ),
        (
            {"dual_chunk_attention_config": {**DUAL_CHUNK, "sparse_attention_threshold": "many"}},
            "sparse_attention_threshold must be an integer .*got 'many'",
        ),
        (
            {
                "dual_chunk_attention_config": {
                    **DUAL_CHUNK,
                    "sparse_attention_config": budgets(TINY, 100, 200),
                    "sparse_attention_last_q": 65,
                }
            },
            r"sparse_attention_last_q must be an integer in \[1, 64\], got 65",
        ),
    ],
)
def test_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**TINY, **overrides})


def test_budgets() -> None:
    raw = budgets(TINY, 1000, 6096)
    raw[1]["0"] = ["vertical_and_slash", 30, 800, 0.99]
    sparse = SparseConfig.from_budgets(raw, num_layers=2, num_heads=2)
    assert sparse.vertical_sizes == ((1000, 1000), (130, 1000))  # 30 means 130
    assert sparse.slash_sizes == ((6096, 6096), (800, 6096))
    assert (sparse.enabled, sparse.threshold, sparse.last_q) == (True, 32768, 64)
    own = sparse.of_layer(1, slice(0, 1))
    assert (own.vertical_sizes, own.slash_sizes, own.threshold) == (((130,),), ((800,),), 32768)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"0": {}}, 'must have keys "0" to "1", one per layer, got keys 0'),
        (budgets(TINY, 1, 1)[:1], r"one entry per layer \(2\), got 1 entries"),
        ([{"0": ["vertical_and_slash", 1, 1, 1.0]}] * 2, 'layer 0 must be an object with keys "0" to "1"'),
        ([[1, 2], [1, 2]], "layer 0 must be an object"),
        ([{"0": ["a_shape", 1, 1, 1], "1": ["a_shape", 1, 1, 1]}] * 2, "layer 0, head 0 must be .*got .'a_shape'"),
        ([{"0": ["vertical_and_slash", 1], "1": []}] * 2, "layer 0, head 0"),
        ([{"0": ["vertical_and_slash", 1, 2, 1.0], "1": ["vertical_and_slash", -1, 2, 1.0]}] * 2, "head 1"),
        ([{"0": ["vertical_and_slash", 2**70, 2, 1.0], "1": ["vertical_and_slash", 1, 2, 1.0]}] * 2, "head 0"),
        ([{"0": ["vertical_and_slash", 1.5, 2, 1.0], "1": ["vertical_and_slash", 1, 2, 1.0]}] * 2, "head 0"),
    ],
)
def test_bad_budgets(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig.from_budgets(raw, num_layers=2, num_heads=2)


def test_budgets_of_another_model() -> None:
    config = ModelConfig.from_dict(TINY)
    for sizes, got in ((((1, 1),), r"\[2\]"), (((1, 1), (1,)), r"\[2, 1\]")):
        with pytest.raises(ValueError, match=rf"sparse.slash_sizes must have shape .* = \[2, 2\], got {got} heads"):
            replace(config, sparse=SparseConfig(((1, 1), (1, 1)), sizes))


def test_budgets_inside_the_config_and_beside_it(tmp_path: Path) -> None:
    embedded = {
        **DUAL_CHUNK,
        "sparse_attention_config": budgets(TINY, 100, 200),
        "sparse_attention_threshold": 512,
        "sparse_attention_last_q": 32,
        "sparse_attention_enabled": False,
    }
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "dual_chunk_attention_config": embedded}))
    sparse = ModelConfig.from_directory(tmp_path).sparse
    assert sparse == SparseConfig(((100, 100),) * 2, ((200, 200),) * 2, enabled=False, threshold=512, last_q=32)
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(budgets(TINY, 300, 400)))
    beside = ModelConfig.from_directory(tmp_path).sparse
    assert beside == SparseConfig(((300, 300),) * 2, ((400, 400),) * 2, enabled=False, threshold=512, last_q=32)


def test_switches_without_budgets() -> None:
    raw = {**DUAL_CHUNK, "sparse_attention_enabled": True, "sparse_attention_threshold": 512}
    config = ModelConfig.from_dict({**TINY, "dual_chunk_attention_config": raw})
    assert config.sparse is None
    assert config.sparse_switches == SparseSwitches(enabled=True, threshold=512)
    by_coverage = config.with_coverage(0.9).sparse
    assert by_coverage is not None
    assert by_coverage.of_layer(1, slice(0, 1)) == by_coverage
    assert by_coverage.threshold == 512
    with pytest.raises(ValueError, match="sparse_attention_enabled is true but there are no budgets"):
        SparseConfig.from_dual_chunk(raw, num_layers=2, num_heads=2)


def test_directory_errors_and_eos(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "eos_token_id": 3}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1.5}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be an integer .*, got 1\.5"):
        ModelConfig.from_directory(tmp_path)
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text("[1]")
        with pytest.raises(ValueError, match=rf"{name} must hold an object, got a list"):
            ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**6)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_directory(tmp_path)


def test_null_is_the_default() -> None:
    nulls = dict.fromkeys(("num_key_value_heads", "use_sliding_window", "tie_word_embeddings", "partial_rotary_factor"))
    raw = {**TINY, "num_key_value_heads": TINY["num_attention_heads"]}
    assert ModelConfig.from_dict({**raw, **nulls}) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("name", "num_layers", "num_heads"),
    [("Qwen2.5_7B_Instruct_1M", 28, 28), ("Qwen2.5_14B_Instruct_1M", 48, 40)],
)
def test_published_budgets(name: str, num_layers: int, num_heads: int) -> None:
    file = DATA / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"published budgets not at {file}")
    raw = json.loads(file.read_text())
    sparse = SparseConfig.from_budgets(raw, num_layers=num_layers, num_heads=num_heads)
    for layer in range(num_layers):
        for head in range(num_heads):
            _, vertical, slash, _ = raw[layer][str(head)]
            assert sparse.vertical_sizes[layer][head] == (130 if vertical == 30 else vertical)
            assert sparse.slash_sizes[layer][head] == slash
    assert min(min(layer) for layer in sparse.vertical_sizes) == 100


def test_another_file_than_config_json(tmp_path: Path) -> None:
    """Qwen3-2507's config_1m.json: by its name or any path."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    long = {**TINY, "max_position_embeddings": 1010000, "dual_chunk_attention_config": DUAL_CHUNK}
    for file in (tmp_path / "config_1m.json", tmp_path / "elsewhere" / "long.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(long))
    assert ModelConfig.from_directory(tmp_path).dual_chunk is None
    for named in ("config_1m.json", tmp_path / "elsewhere" / "long.json"):
        assert ModelConfig.from_directory(tmp_path, config=named).max_position_embeddings == 1010000
    with pytest.raises(FileNotFoundError, match=r"config must be a file in .* or the path of one, got 'other.json'"):
        ModelConfig.from_directory(tmp_path, config="other.json")


def test_budgets_by_layer_as_an_object() -> None:
    listed = budgets(TINY, 100, 200)
    raw = {**TINY, "dual_chunk_attention_config": {**DUAL_CHUNK, "sparse_attention_config": listed}}
    by_layer = {str(layer): heads for layer, heads in enumerate(listed)}
    keyed = {**TINY, "dual_chunk_attention_config": {**DUAL_CHUNK, "sparse_attention_config": by_layer}}
    assert ModelConfig.from_dict(keyed).sparse == ModelConfig.from_dict(raw).sparse
    with pytest.raises(
        ValueError, match=r'sparse_attention_config must have keys "0" to "1", one per layer, got keys 1'
    ):
        SparseConfig.from_budgets({"1": by_layer["1"]}, num_layers=2, num_heads=2)


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"dual_chunk_attention_config": DUAL_CHUNK}, None),
    ],
)
def test_longest(overrides: dict[str, Any], longest: int | None) -> None:
    """Model cards ask for YaRN by a factor, and leave max_position_embeddings as it was."""
    config = ModelConfig.from_dict({**TINY, **overrides})
    assert config.longest == longest
    config.check_length("length", 4096)
    if longest is None:
        config.check_length("length", 10**6)
    else:
        with pytest.raises(ValueError, match=rf"length must be at most {longest}, .*got {longest + 1}"):
            config.check_length("length", longest + 1)
