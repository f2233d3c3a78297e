"""The plugin in vLLM's engine on a CPU: log-probabilities beside those of our own model on the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DUAL_CHUNK, budgets
from engine import (
    CONFIG,
    PREFILL_ROWS,
    EngineError,
    Reference,
    Step,
    run_engine,
    tokens,
    uneven_budgets,
    worst,
    write_model,
)

CHUNK_LEN = DUAL_CHUNK["chunk_size"] - DUAL_CHUNK["local_size"]
EXACT = 1e-4
"""Log-probabilities of float32 runs; logits are of the order of 10, and the order of sums differs."""


def check(results: list[dict[str, Any]], prompts: list[list[int]], reference: Reference, limit: float = EXACT) -> None:
    for request, prompt in zip(results, prompts, strict=True):
        error = worst(request, reference.logprobs(prompt, request["tokens"]))
        assert error <= limit, f"prompt of {len(prompt)} tokens: log-probabilities differ by {error}"


def test_lengths_around_borders_in_mixed_batches(tmp_path: Path) -> None:
    """All together, so that pieces of prompts and decode steps share batches; outputs cross borders too."""
    model = write_model(tmp_path / "model")
    around = [n * CHUNK_LEN + d for n in (1, 2, 3, 4, 5) for d in (-2, -1, 0, 1)]
    prompts = [tokens(length) for length in (1, 2, 17, 63, 64, 65, *around, 700)]
    run = run_engine(model, [Step(prompts, max_tokens=5)])
    check(run["steps"][0], prompts, Reference(model))
    assert set(run["backends"]) == {"CUSTOM"}
    batches = run["batches"][run["batches"].index("step") + 1 :]
    assert any(decodes and prefills for decodes, prefills in batches)
    assert any(decodes > 5 for decodes, _ in batches)
    assert any(seqlen < prompt_len for _, prefills in batches for _, seqlen, prompt_len in prefills)


def test_dual_chunk_attention_is_what_is_tested(tmp_path: Path) -> None:
    """The same weights without it are far away, so the tolerance above means something."""
    model = write_model(tmp_path / "model")
    prompt = tokens(700)
    reference = Reference(model)
    expected = reference.logprobs(prompt, tokens(2))
    for key in ("chunk_size", "original_max_position_embeddings"):
        other = write_model(tmp_path / key, dual_chunk_attention_config={**DUAL_CHUNK, key: 10 * DUAL_CHUNK[key]})
        assert float((Reference(other).logprobs(prompt, tokens(2)) - expected).abs().max()) > 1000 * EXACT


def test_prefix_caching(tmp_path: Path) -> None:
    """Keys of the cache hold for prompts of another length: the temperature is not in them. Past L and within."""
    model = write_model(tmp_path / "model")
    # Keys and values behind the first layer depend on the temperature, so prompts that share them must share it.
    long, short = tokens(600), tokens(150)
    prompts = [long, long, long[:500] + tokens(100, seed=1), short, short[:140] + tokens(10, seed=2)]
    run = run_engine(model, [Step([prompt]) for prompt in prompts], enable_prefix_caching=True)
    cached = [step[0]["num_cached_tokens"] for step in run["steps"]]
    assert cached == [0, 576, 480, 0, 128]
    check([step[0] for step in run["steps"]], prompts, Reference(model))


def test_preemption_and_resumption(tmp_path: Path) -> None:
    """Too few pages for all requests: some are thrown out and prefilled again, with what they had generated."""
    model = write_model(tmp_path / "model", dual_chunk_attention_config={**DUAL_CHUNK, "original_max_position_embeddings": 0})
    prompts = [tokens(250, seed=i) for i in range(4)]
    run = run_engine(model, [Step(prompts, max_tokens=60)], num_gpu_blocks_override=36)
    check(run["steps"][0], prompts, Reference(model))
    batches = run["batches"][run["batches"].index("step") + 1 :]
    assert any(seqlen > prompt_len for _, prefills in batches for _, seqlen, prompt_len in prefills)


def test_int8_pages(tmp_path: Path) -> None:
    """As our model with int8 pages, which subtracts the rotated key bias; near the one without int8."""
    model = write_model(tmp_path / "model")
    prompts = [tokens(length) for length in (100, 129, 513, 700)]
    run = run_engine(model, [Step(prompts)], kv_cache_dtype="int8_per_token_head")
    check(run["steps"][0], prompts, Reference(model, kv_cache_dtype="int8"), limit=0.02)
    check(run["steps"][0], prompts, Reference(model), limit=0.3)


@pytest.mark.parametrize("pages", ["auto", "int8_per_token_head"])
def test_sparse_prefill(tmp_path: Path, pages: str) -> None:
    """Above the threshold vertical-slash, with budgets by layer and head; up to it dense; decode dense."""
    chunk = {**DUAL_CHUNK, "sparse_attention_threshold": 400}
    model = write_model(tmp_path / "model", dual_chunk_attention_config=chunk, sparse=uneven_budgets(40, 120))
    prompts = [tokens(length) for length in (130, 400, 401, 700)]
    run = run_engine(model, [Step([prompt]) for prompt in prompts], kv_cache_dtype=pages)
    ours = "int8" if pages != "auto" else "auto"
    limit = EXACT if pages == "auto" else 0.02
    results = [step[0] for step in run["steps"]]
    check(results, prompts, Reference(model, kv_cache_dtype=ours), limit)
    dense = Reference(model, kv_cache_dtype=ours, attention="dense")
    far = [worst(result, dense.logprobs(prompt, result["tokens"])) > 10 * limit for result, prompt in zip(results, prompts, strict=True)]
    assert far == [False, False, True, True]


@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_workers(tmp_path: Path, parallel: str) -> None:
    """Dense and sparse prompts; heads, budgets and biases are shared out, layers are."""
    chunk = {**DUAL_CHUNK, "sparse_attention_threshold": 400}
    model = write_model(tmp_path / "model", dual_chunk_attention_config=chunk, sparse=uneven_budgets(40, 120))
    prompts = [tokens(300), tokens(513)]
    steps = [Step([prompt]) for prompt in prompts]
    run = run_engine(model, steps, in_process=False, kv_cache_dtype="int8_per_token_head", **{parallel: 2})
    check([step[0] for step in run["steps"]], prompts, Reference(model, kv_cache_dtype="int8"), limit=0.02)


def test_a_million_tokens_allowed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", max_position_embeddings=1010000)
    prompts = [tokens(300)]
    run = run_engine(model, [Step(prompts)], max_model_len=1010000, block_size=128)
    check(run["steps"][0], prompts, Reference(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled(tmp_path: Path, dtype: str) -> None:
    """torch.compile (inductor) of everything around attention; bfloat16 has larger heads and vLLM's block size."""
    sizes: dict[str, Any] = {} if dtype == "float32" else {"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": 2}
    head_dim = {} if dtype == "float32" else {"head_dim": 128}
    model = write_model(tmp_path / "model", **{**sizes, **head_dim})
    prompts = [tokens(length) for length in (129, 513)]
    run = run_engine(model, [Step(prompts)], enforce_eager=False, dtype=dtype, block_size=128)
    reference = Reference(model, dtype=getattr(torch, dtype))
    check(run["steps"][0], prompts, reference, limit=EXACT if dtype == "float32" else 0.3)


def test_injected_into_a_plain_config(tmp_path: Path) -> None:
    """--hf-overrides gives a model Dual Chunk Attention that its config.json does not ask for."""
    plain = write_model(tmp_path / "plain", dual_chunk_attention_config=None)
    prompts = [tokens(513)]
    run = run_engine(plain, [Step(prompts)], hf_overrides={"dual_chunk_attention_config": DUAL_CHUNK})
    check(run["steps"][0], prompts, Reference(write_model(tmp_path / "model")))


def test_plain_model_is_left_alone(tmp_path: Path) -> None:
    """Bit for bit what vLLM computes with the plugin turned off, by vLLM's own backend."""
    model = write_model(tmp_path / "model", dual_chunk_attention_config=None)
    steps = [Step([tokens(300), tokens(20)])]
    on = run_engine(model, steps)
    off = run_engine(model, steps, env={"QWEN_SPARSE_VLLM": "0"})
    for ours, theirs in zip(on["steps"][0], off["steps"][0], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert torch.equal(ours["logprobs"], theirs["logprobs"])
        assert torch.equal(ours["prompt_logprobs"], theirs["prompt_logprobs"])
    assert set(on["backends"]) == set(off["backends"]) == {"CPU_ATTN"}
    assert on["batches"] == ["step"]


def test_turned_off(tmp_path: Path) -> None:
    """Without the plugin this vLLM cannot load the checkpoint: the tests above do use the plugin."""
    model = write_model(tmp_path / "model")
    with pytest.raises(EngineError):
        run_engine(model, [Step([tokens(20)])], env={"QWEN_SPARSE_VLLM": "0"})


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(tmp_path: Path, name: str) -> None:
    """Within the first chunk Dual Chunk Attention is plain attention: vLLM's own, on the same (dummy) weights."""
    chunk = {"chunk_size": 1024, "local_size": 256}
    options = {"load_format": "dummy", "seed": 3}
    steps = [Step([tokens(300), tokens(20)])]
    ours = run_engine(
        write_model(tmp_path / "model", dual_chunk_attention_config=chunk, **ARCHITECTURES[name]), steps, **options
    )
    plain = run_engine(
        write_model(tmp_path / "plain", dual_chunk_attention_config=None, **ARCHITECTURES[name]), steps, **options
    )
    assert set(ours["backends"]) == {"CUSTOM"}
    for one, other in zip(ours["steps"][0], plain["steps"][0], strict=True):
        assert float((one["prompt_logprobs"] - other["prompt_logprobs"]).abs().max()) <= EXACT
        assert float((one["logprobs"][0] - other["logprobs"][0]).abs().max()) <= EXACT


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto' or 'int8_per_token_head' or 'float32', got 'fp8'"),
        ({"head_dim": 32}, {}, "head_size must be 64 or 128, got 32"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
            {},
            "rope_parameters must be rope_type 'default' over whole heads",
        ),
        (
            {"dual_chunk_attention_config": {**DUAL_CHUNK, "sparse_attention_config": budgets(CONFIG, 40, 100)[:1]}},
            {},
            "sparse_attention_config must be a list with one entry per layer (2), got 1 entries",
        ),
    ],
    ids=["fp8 pages", "head size", "yarn", "budgets"],
)
def test_refused_at_load(tmp_path: Path, config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = write_model(tmp_path / "model", **config)
    with pytest.raises(EngineError) as error:
        run_engine(model, [Step([tokens(20)])], **options)
    assert message in str(error.value)


def test_prefill_rows() -> None:
    """Cuts of prompts are those of the reference, which sparse selection depends on."""
    assert PREFILL_ROWS % 64 == 0
