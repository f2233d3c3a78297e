"""The plugin in vLLM's engine on a CPU: log-probabilities beside those of our own model on the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine import (
    CONFIG,
    PREFILL_ROWS,
    Reference,
    Step,
    engine,
    run_engine,
    run_engines,
    tokens,
    uneven_budgets,
    worst,
    write_model,
)

import qwen_sparse
from conftest import DUAL_CHUNK, budgets

CHUNK_LEN = DUAL_CHUNK["chunk_size"] - DUAL_CHUNK["local_size"]
INT8 = "int8_per_token_head"
EXACT = 1e-4
"""Log-probabilities of float32 runs; logits are of the order of 10, and the order of sums differs."""


def check(
    results: list[dict[str, Any]],
    prompts: list[list[int]],
    reference: Reference,
    limit: float = EXACT,
    rows: int = PREFILL_ROWS,
) -> None:
    for request, prompt in zip(results, prompts, strict=True):
        error = worst(request, reference.logprobs(prompt, request["tokens"], rows))
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
    """Cold, warm, and the prefix of another prompt; past the first chunk and within it."""
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
    chunk = {**DUAL_CHUNK, "original_max_position_embeddings": 0}  # or rows prefilled again had another temperature
    model = write_model(tmp_path / "model", dual_chunk_attention_config=chunk)
    prompts = [tokens(250, seed=i) for i in range(4)]
    run = run_engine(model, [Step(prompts, max_tokens=60)], num_gpu_blocks_override=36, max_model_len=1024)
    check(run["steps"][0], prompts, Reference(model))
    batches = run["batches"][run["batches"].index("step") + 1 :]
    assert any(seqlen > prompt_len for _, prefills in batches for _, seqlen, prompt_len in prefills)


def test_int8_pages(tmp_path: Path) -> None:
    """As our model with int8 pages, which subtracts the rotated key bias; near the one without int8."""
    model = write_model(tmp_path / "model")
    prompts = [tokens(length) for length in (100, 129, 513, 700)]
    run = run_engine(model, [Step(prompts)], kv_cache_dtype=INT8)
    check(run["steps"][0], prompts, Reference(model, kv_cache_dtype="int8"), limit=0.02)
    check(run["steps"][0], prompts, Reference(model), limit=0.3)


SPARSE = {**DUAL_CHUNK, "sparse_attention_threshold": 400}


def test_sparse_prefill(tmp_path: Path) -> None:
    """Above the threshold vertical-slash, with budgets by layer and head; up to it dense; decode dense.

    In pieces of 256, those of 401 tokens are dense: 256 are attended by 120 distances, 145 end a prompt.
    """
    model = write_model(tmp_path / "model", dual_chunk_attention_config=SPARSE, sparse=uneven_budgets(40, 120))
    prompts = [tokens(length) for length in (130, 400, 401, 700)]
    steps = [Step([prompt]) for prompt in prompts]
    kinds = [("auto", PREFILL_ROWS), ("auto", 1024), (INT8, 1024)]
    engines = [engine(model, steps, kv_cache_dtype=pages, max_num_batched_tokens=rows) for pages, rows in kinds]
    for run, (pages, rows) in zip(run_engines(engines), kinds, strict=True):
        results = [step[0] for step in run["steps"]]
        options = {"kv_cache_dtype": "auto" if pages == "auto" else "int8"}
        limit = EXACT if pages == "auto" else 0.05
        check(results, prompts, Reference(model, **options), limit, rows)
        dense = Reference(model, attention="dense", **options)
        errors = [
            worst(got, dense.logprobs(prompt, got["tokens"])) for got, prompt in zip(results, prompts, strict=True)
        ]
        assert [error > 5 * limit for error in errors] == [False, False, rows == 1024, True]


COVERAGE = 0.8
BY_COVERAGE = {"additional_config": {"qwen_sparse": {"coverage": COVERAGE}}}


def test_block_groups(tmp_path: Path) -> None:
    """By coverage, in pieces of 256 and in one: as our model, with budgets beside the model or without."""
    model = write_model(tmp_path / "model", dual_chunk_attention_config=SPARSE, sparse=uneven_budgets(40, 120))
    without = write_model(tmp_path / "without", dual_chunk_attention_config=SPARSE)
    prompts = [tokens(length) for length in (400, 401, 640, 700)]
    steps = [Step([prompt]) for prompt in prompts]
    whole = {"max_num_batched_tokens": 1024}
    engines = [
        engine(model, steps, **BY_COVERAGE),
        engine(without, steps, **BY_COVERAGE, **whole),
        engine(without, steps, **BY_COVERAGE, **whole, kv_cache_dtype=INT8),
    ]
    pieces, one, int8 = ([step[0] for step in run["steps"]] for run in run_engines(engines))
    reference = Reference(without, coverage=COVERAGE)
    check(pieces, prompts, reference)
    quantised = Reference(without, coverage=COVERAGE, kv_cache_dtype="int8")
    for results, ours, limit in ((one, reference, EXACT), (int8, quantised, 0.05)):
        check(results, prompts, ours, limit, rows=1024)
    dense = Reference(without, attention="dense")
    errors = [worst(got, dense.logprobs(prompt, got["tokens"])) for got, prompt in zip(one, prompts, strict=True)]
    assert [error > 100 * EXACT for error in errors] == [False, True, True, True]
    # Where a prompt is cut does not matter to rows before its last piece, which is dense.
    for cut, uncut in zip(pieces[2:], one[2:], strict=True):
        assert float((cut["prompt_logprobs"] - uncut["prompt_logprobs"])[:512].abs().max()) <= EXACT


def test_a_question_behind_a_cached_prefix_is_dense(tmp_path: Path) -> None:
    """By coverage: the prefix from the cache, then up to 512 rows densely; a longer rest is sparse."""
    chunk = {**SPARSE, "original_max_position_embeddings": 0}  # or the prefix had the temperature of another prompt
    model = write_model(tmp_path / "model", dual_chunk_attention_config=chunk)
    text = tokens(704)
    prompts = [text, text + tokens(90, seed=1), text[:640] + tokens(560, seed=2)]
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 2048, **BY_COVERAGE}
    run = run_engine(model, [Step([prompt]) for prompt in prompts], **options)
    results = [step[0] for step in run["steps"]]
    assert [result["num_cached_tokens"] for result in results] == [0, 704, 640]
    ours = qwen_sparse.load_model(model, attention="sparse", coverage=COVERAGE)
    for prompt, result, known in zip(prompts, results, (0, 704, 640), strict=True):
        cache = qwen_sparse.prefill(ours, text).cache if known else ours.new_cache()
        cache.truncate(known)
        first = qwen_sparse.prefill(ours, prompt[known:], cache=cache)
        assert (first.stats.density == 1) == (known == 704)
        logits = [first.logits]
        for token in result["tokens"][:-1]:
            logits.append(qwen_sparse.prefill(ours, [token], cache=cache).logits)
        assert float((result["logprobs"] - torch.stack(logits).log_softmax(-1)).abs().max()) <= EXACT


def test_tensor_parallel(tmp_path: Path) -> None:
    """Heads are shared out, and with them budgets and key biases; a coverage is every worker's."""
    model = write_model(tmp_path / "model", dual_chunk_attention_config=SPARSE, sparse=uneven_budgets(40, 120))
    prompts = [tokens(300), tokens(513)]
    kinds: list[tuple[list[list[int]], dict[str, Any]]] = [
        (prompts, {}),
        (prompts[:1], {"kv_cache_dtype": INT8}),
        (prompts[1:], BY_COVERAGE),
    ]
    engines = [
        engine(model, [Step([prompt]) for prompt in some], tensor_parallel_size=2, **options) for some, options in kinds
    ]
    exact, int8, groups = ([step[0] for step in run["steps"]] for run in run_engines(engines, workers=2))
    check(exact, prompts, Reference(model))
    check(int8, prompts[:1], Reference(model, kv_cache_dtype="int8"), limit=0.02)
    check(groups, prompts[1:], Reference(model, coverage=COVERAGE))


def test_pipeline_parallel(tmp_path: Path) -> None:
    """Layers are shared out. Compiled: vLLM 0.32 on a CPU makes room for what workers exchange only then."""
    model = write_model(tmp_path / "model", dual_chunk_attention_config=SPARSE, sparse=uneven_budgets(40, 120))
    prompts = [tokens(300), tokens(513)]
    steps = [Step([prompt]) for prompt in prompts]
    run = run_engine(model, steps, workers=2, pipeline_parallel_size=2, enforce_eager=False)
    check([step[0] for step in run["steps"]], prompts, Reference(model))


def test_a_million_tokens_allowed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", max_position_embeddings=1010000)
    prompts = [tokens(300)]
    engines = [engine(model, [Step(prompts)], max_model_len=1010000, block_size=128)]
    [run] = run_engines(engines, VLLM_CPU_KVCACHE_SPACE="2")
    check(run["steps"][0], prompts, Reference(model))


def test_compiled(tmp_path: Path) -> None:
    """torch.compile (inductor) of everything around attention; 16-bit models have heads of 128 and no groups."""
    prompts = [tokens(length) for length in (129, 513)]
    heads = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    models = [write_model(tmp_path / str(i), **sizes) for i, sizes in enumerate(({}, heads, heads))]
    dtypes = ("float32", "bfloat16", "float16")
    engines = [
        engine(model, [Step(prompts)], enforce_eager=False, dtype=dtype, block_size=128)
        for model, dtype in zip(models, dtypes, strict=True)
    ]
    runs = run_engines(engines)
    for run, model, dtype, limit in zip(runs, models, dtypes, (EXACT, 0.3, 0.04), strict=True):
        check(run["steps"][0], prompts, Reference(model, dtype=getattr(torch, dtype)), limit)


def test_injected_into_a_plain_config(tmp_path: Path) -> None:
    """--hf-overrides gives a model Dual Chunk Attention that its config.json does not ask for."""
    plain = write_model(tmp_path / "plain", dual_chunk_attention_config=None)
    prompts = [tokens(513)]
    run = run_engine(plain, [Step(prompts)], hf_overrides={"dual_chunk_attention_config": DUAL_CHUNK})
    check(run["steps"][0], prompts, Reference(write_model(tmp_path / "model")))


def test_plain_model_is_left_alone(tmp_path: Path) -> None:
    """Bit for bit what vLLM computes with the plugin turned off, by vLLM's own backend, also beside another model."""
    model = write_model(tmp_path / "model", dual_chunk_attention_config=None)
    plain = engine(model, [Step([tokens(300), tokens(20)])])
    [off] = run_engines([plain], QWEN_SPARSE_VLLM="0")
    before, beside, after = run_engines([plain, engine(write_model(tmp_path / "1m"), [Step([tokens(300)])]), plain])
    for on in (before, after):
        for ours, theirs in zip(on["steps"][0], off["steps"][0], strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert torch.equal(ours["logprobs"], theirs["logprobs"])
            assert torch.equal(ours["prompt_logprobs"], theirs["prompt_logprobs"])
        assert set(on["backends"]) == set(off["backends"]) == {"CPU_ATTN"}
        assert on["batches"] == ["step"]
    assert set(beside["backends"]) == {"CUSTOM"}


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


def test_other_architectures(tmp_path: Path) -> None:
    """Within the first chunk Dual Chunk Attention is plain attention: vLLM's own, on the same (dummy) weights."""
    chunk = {"chunk_size": 1024, "local_size": 256}
    steps = [Step([tokens(300), tokens(20)])]
    engines = [
        engine(
            write_model(tmp_path / f"{name}-{number}", dual_chunk_attention_config=config, **architecture),
            steps,
            load_format="dummy",
            seed=3,
        )
        for name, architecture in ARCHITECTURES.items()
        for number, config in enumerate((chunk, None))
    ]
    runs = run_engines(engines)
    for ours, plain in zip(runs[::2], runs[1::2], strict=True):
        assert set(ours["backends"]) == {"CUSTOM"}
        assert set(plain["backends"]) == {"CPU_ATTN"}
        for one, other in zip(ours["steps"][0], plain["steps"][0], strict=True):
            assert float((one["prompt_logprobs"] - other["prompt_logprobs"]).abs().max()) <= EXACT
            assert float((one["logprobs"][0] - other["logprobs"][0]).abs().max()) <= EXACT


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
FEW_BUDGETS = {**DUAL_CHUNK, "sparse_attention_config": budgets(CONFIG, 40, 100)[:1]}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "kv_cache_dtype must be 'auto' or 'int8_per_token_head' or 'float32', got 'fp8'",
        {},
        {"kv_cache_dtype": "fp8"},
    ),
    ("head_size must be 64 or 128, got 32", {"head_dim": 32, "hidden_size": 128}, {}),
    ("rope_parameters must be rope_type 'default' over whole heads", {"rope_scaling": YARN}, {}),
    (
        "sparse_attention_config must be a list with one entry per layer (2), got 1 entries",
        {"dual_chunk_attention_config": FEW_BUDGETS},
        {},
    ),
    (
        "qwen_sparse: additional_config['qwen_sparse']: coverage must lie in (0, 1), got 1.5",
        {},
        {"additional_config": {"qwen_sparse": {"coverage": 1.5}}},
    ),
    (
        "additional_config['qwen_sparse'] is for models with a dual_chunk_attention_config",
        {"dual_chunk_attention_config": None},
        BY_COVERAGE,
    ),
]


def test_refused_at_load(tmp_path: Path) -> None:
    engines = [
        engine(write_model(tmp_path / str(i), **config), [], may_fail=True, **options)
        for i, (_, config, options) in enumerate(REFUSED)
    ]
    errors = [run["error"] for run in run_engines(engines)]
    for error, (message, _, _) in zip(errors, REFUSED, strict=True):
        assert message in error


def test_turned_off(tmp_path: Path) -> None:
    """Without the plugin this vLLM cannot load the checkpoint: the tests above do use the plugin."""
    job = engine(write_model(tmp_path / "model"), [], may_fail=True)
    assert "error" in run_engines([job], QWEN_SPARSE_VLLM="0")[0]
