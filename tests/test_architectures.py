"""Qwen3, mixtures of experts and sliding windows: parity with transformers, and all that runs on any decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_sparse import generate, load_model, prefill
from qwen_sparse.calibrate import calibrate
from qwen_sparse.engine.memory import estimate_memory, weight_elements
from qwen_sparse.model.architectures import ARCHITECTURES
from qwen_sparse.model.attention import causal_pairs, window_pairs
from qwen_sparse.model.config import DualChunkConfig
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.mlp import ExpertWeights, Mlp

transformers = pytest.importorskip("transformers")

VOCAB = 260
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
WINDOW = {"use_sliding_window": True, "sliding_window": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "qwen3_biased_tied": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_window": ("Qwen3", {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 128}),
    "qwen3_moe_not_normalised": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False, "num_experts_per_tok": 5}),
    "qwen3_moe_some_layers": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 80, "mlp_only_layers": [0]}),
    "qwen2_moe_window": ("Qwen2Moe", {**EXPERTS, **WINDOW, "max_window_layers": 2}),
    "qwen2_window": ("Qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen2_window_of_no_layer": ("Qwen2", {**WINDOW, "max_window_layers": 28}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model with random weights, and the directory it was saved to."""
    architecture, options = CASES[request.param]
    config = getattr(transformers, f"{architecture}Config")(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "head_dim": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "eos_token_id": None,
            "bos_token_id": None,
            "dtype": "float32",
            **options,
        }
    )
    torch.manual_seed(len(request.param))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif name.endswith("norm.weight"):
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def all_logits(model: Decoder, ids: list[int], **options: Any) -> Tensor:
    return prefill(model, ids, logits="all", **options).logits


def test_logits_of_transformers(pair: tuple[Any, Path]) -> None:
    theirs, directory = pair
    ids = random_ids(300)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    model = load_model(directory)
    torch.testing.assert_close(all_logits(model, ids), expected, rtol=0, atol=1e-4)
    for chunk_tokens in (64, 100):
        torch.testing.assert_close(all_logits(model, ids, chunk_tokens=chunk_tokens), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.3  # the comparison means something


def test_greedy_tokens_of_transformers(pair: tuple[Any, Path]) -> None:
    theirs, directory = pair
    ids = random_ids(150, seed=1)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, 150:].tolist()
    assert list(generate(load_model(directory), ids, max_new_tokens=24)) == expected


def test_int8_cache(pair: tuple[Any, Path]) -> None:
    """What int8 keys and values change is small beside the logits, but in rows of which it changes the experts."""
    model, ids = load_model(pair[1]), random_ids(200)
    exact = all_logits(model, ids)
    error = (all_logits(model.with_options(kv_cache_dtype="int8"), ids, chunk_tokens=64) - exact).std(-1).median()
    assert 0 < error < 0.05 * exact.std()


def test_batched_decode_step(pair: tuple[Any, Path]) -> None:
    """Two sequences in one step of a batch, as the server runs it, are what each is alone."""
    model, prompts = load_model(pair[1]), [random_ids(70, seed=1), random_ids(130, seed=2)]
    pool = model.new_pool(4)
    expected, seqlens, tables = [], [], []
    for number, ids in enumerate(prompts):
        result = prefill(model, ids)
        expected.append(all_logits(model, [*ids, 7])[-1])
        pages = [2 * number, 2 * number + 1]
        for layer in range(model.config.num_layers):
            k, v = result.cache.workspace(layer, len(ids))
            slots = pool.slots(torch.arange(len(ids))[None], torch.tensor([pages], dtype=torch.int32))
            pool.append(layer, k, v, slots)
        seqlens.append(len(ids))
        tables.append(pages)
    step = model.decode_step(torch.tensor([7, 7]), torch.tensor(seqlens), pool, torch.tensor(tables, dtype=torch.int32))
    torch.testing.assert_close(step, torch.stack(expected), rtol=0, atol=1e-4)


def test_a_cut_prompt_is_continued(pair: tuple[Any, Path]) -> None:
    model, ids = load_model(pair[1]), random_ids(220)
    first = prefill(model, ids[:150])
    rest = prefill(model, ids[150:], cache=first.cache, logits="all")
    torch.testing.assert_close(rest.logits, all_logits(model, ids)[150:], rtol=0, atol=1e-4)


def test_memory_counts_every_weight(pair: tuple[Any, Path]) -> None:
    model = load_model(pair[1])
    assert weight_elements(model.config) * 4 == model.weights.nbytes
    assert estimate_memory(model.config, 100).weights == model.weights.nbytes


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen2_moe"])
def test_long_prompts(name: str, tmp_path: Path) -> None:
    """Dual Chunk Attention equals plain attention within a chunk and differs beyond; a coverage near 1 is nearly dense;
    budgets are found by calibration."""
    torch.manual_seed(0)
    architecture, options = CASES[name]
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **{"head_dim": 64, **options},
    )
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(tmp_path)
    model, ids = load_model(tmp_path, dtype="float32"), random_ids(900)
    plain = all_logits(model, ids)
    chunks = model.with_options(config=replace(model.config, dual_chunk=DualChunkConfig(512, 128, 0)))
    dual = all_logits(chunks, ids)
    torch.testing.assert_close(dual[:384], plain[:384], rtol=0, atol=1e-4)
    assert (dual[600:] - plain[600:]).abs().max() > 1e-3
    for long in (model, chunks):
        dense, near = all_logits(long, ids), all_logits(long.with_options(attention="sparse", coverage=0.999), ids)
        assert (near - dense).std() < 0.02 * dense.std()
    found = calibrate(model, ids, tmp_path / "budgets.json", pairs=[(40, 60)], recall=0.5)
    assert found.recall > 0.5


def test_names_of_every_architecture() -> None:
    for name, architecture in ARCHITECTURES.items():
        assert getattr(transformers, name).config_class.model_type == architecture.model_type


def test_grouped_products_are_those_of_each_expert() -> None:
    """What runs on GPUs, on a CPU: tokens grouped by expert, empty groups among them."""
    torch.manual_seed(0)
    weights = ExpertWeights(
        router=torch.randn(8, 64),
        gate_up=torch.randn(8, 96, 64) / 8,
        down=torch.randn(8, 64, 48) / 7,
        top_k=3,
        normalise=True,
        shared=Mlp(torch.randn(32, 64) / 8, torch.randn(64, 16) / 4),
        shared_gate=torch.randn(1, 64),
    )
    x = torch.randn(5, 64)
    x[1:] = x[0] + 0.01 * torch.randn(4, 64)  # most experts get no token
    shares, chosen = torch.topk(F.linear(x, weights.router).softmax(-1), 3)
    shares = shares / shares.sum(-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=8)
    assert (counts == 0).sum() >= 4
    grouped = (weights._grouped(x, order, counts) * shares[:, :, None]).sum(1)
    torch.testing.assert_close(weights._by_expert(x, order, counts, shares.flatten()), grouped)
    gate = F.linear(x, weights.shared_gate).sigmoid()  # type: ignore[arg-type]
    assert weights.shared is not None
    torch.testing.assert_close(weights(x), grouped + gate * weights.shared(x))


@pytest.mark.parametrize(("rows", "keys", "window"), [(5, 5, 3), (4, 100, 30), (50, 60, 20), (9, 9, 40), (1, 1, 1)])
def test_pairs_of_a_window(rows: int, keys: int, window: int) -> None:
    positions = range(keys - rows, keys)
    assert window_pairs(rows, keys, window) == sum(min(window, p + 1) for p in positions)
    assert causal_pairs(rows, keys) == sum(p + 1 for p in positions)


def test_windows_are_counted_and_never_sparse(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=100,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    model, ids = load_model(tmp_path, dtype="float32"), random_ids(600)
    dense, pairs = prefill(model, ids).stats, causal_pairs(600, 600)
    # Of the last layer one row is wanted.
    assert dense.density == pytest.approx((window_pairs(600, 600, 100) + pairs + 600) / (2 * pairs + 600))
    sparse = prefill(model.with_options(attention="sparse", coverage=0.5), ids).stats
    assert sparse.density < dense.density
    with pytest.raises(ValueError, match="sliding windows"):
        calibrate(model, ids, tmp_path / "budgets.json")
