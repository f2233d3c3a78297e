"""The decoder: parity with transformers, and Dual Chunk Attention against a forward built on the reference."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import DUAL_CHUNK, TINY, WriteCheckpoint, budgets, random_tensors, save_tensors
from qwen_sparse import generate, load_model, ops, prefill, reference
from qwen_sparse.base.resources import format_bytes
from qwen_sparse.model.coverage import thresholds
from qwen_sparse.model.decoder import Decoder

VOCAB = TINY["vocab_size"]


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def all_logits(model: Decoder, ids: list[int], **options: Any) -> Tensor:
    return prefill(model, ids, logits="all", **options).logits


# --- transformers ---


@dataclass(frozen=True)
class Case:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    bias: bool = True
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4})


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CASES = [
    Case("mha_64", 2, 2, 64),
    Case("gqa4_64_tied", 4, 1, 64, tied=True),
    Case("gqa4_128_no_bias", 4, 1, 128, bias=False),
    Case("gqa7_64_no_bias_tied", 7, 1, 64, tied=True, bias=False),
    Case("gqa7_128", 14, 2, 128),
    Case("yarn_gqa4_64", 4, 1, 64, rope=YARN),
    Case("yarn_mha_128", 2, 2, 128, rope=YARN),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model with random weights, and the directory it was saved to."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    case: Case = request.param
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=case.num_heads * case.head_dim if case.head_dim == 64 else 128,
        head_dim=case.head_dim,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads,
        max_position_embeddings=1024,
        rope_parameters=dict(case.rope),
        tie_word_embeddings=case.tied,
        eos_token_id=None,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(len(case.name))
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 1.0 if case.bias else 0.0)
            elif name.endswith("norm.weight"):
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    directory = tmp_path_factory.mktemp(case.name)
    model.save_pretrained(directory)
    if not case.bias:  # transformers' Qwen2 always has biases; zero ones are none
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**raw, "attention_bias": False}))
        skipped = {"lm_head.weight"} if case.tied else set()
        tensors = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if not name.endswith("bias") and name not in skipped
        }
        save_tensors(directory, tensors)
    return model, directory


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


# --- Dual Chunk Attention and sparse attention against the definitions ---


def brute_force(
    raw: dict[str, Any],
    seed: int,
    ids: list[int],
    *,
    sparse: tuple[int, int] | None = None,
    coverage: float | None = None,
) -> Tensor:
    """Logits ``[n, vocab]`` in float64 by the definitions, the whole prompt at once; its last block is dense."""
    tensors = {name: tensor.double() for name, tensor in random_tensors(raw, seed).items()}
    chunk = raw["dual_chunk_attention_config"]
    chunk_size, chunk_len = chunk["chunk_size"], chunk["chunk_size"] - chunk["local_size"]
    original, n, head_dim = chunk["original_max_position_embeddings"], len(ids), raw["head_dim"]
    temperature = max(1.0, 0.1 * math.log(n / original) + 1) if original else 1.0
    scale = head_dim**-0.5 * temperature**2
    inv_freq = raw["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + raw["rms_norm_eps"]).sqrt() * tensors[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    hidden = tensors["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = norm(hidden, f"{prefix}.input_layernorm")
        q, k, v = (linear(x, f"{prefix}.self_attn.{name}_proj").view(n, -1, head_dim) for name in "qkv")
        rotary = reference.rotary(q, k, torch.arange(n), inv_freq, chunk_size=chunk_size, chunk_len=chunk_len)
        assert isinstance(rotary, ops.DualChunkRotary)
        indexes: dict[str, Tensor] = {}
        if sparse is not None:
            vertical, slash = reference.select_vertical_slash(
                rotary.q_intra,
                rotary.k,
                vertical_size=sparse[0],
                slash_size=sparse[1],
                softmax_scale=scale,
                q_succ=rotary.q_succ_critical,
                q_inter=rotary.q_inter_critical,
                chunk_len=chunk_len,
            )
            indexes = {"vertical_indexes": vertical, "slash_indexes": slash}
        if coverage is not None:
            groups, _ = reference.select_block_groups(
                rotary.q_intra,
                rotary.k,
                thresholds(coverage, n, n).expand(q.shape[1], -1),
                softmax_scale=scale,
                q_succ=rotary.q_succ,
                q_inter=rotary.q_inter,
                chunk_len=chunk_len,
            )
            indexes = {"block_groups": groups}
        out = reference.dual_chunk_attention(*rotary[:4], v, chunk_len=chunk_len, softmax_scale=scale, **indexes)
        last = slice((n - 1) // 64 * 64, n)
        queries = (x[last] for x in rotary[:3])
        out[last] = reference.dual_chunk_attention(*queries, rotary.k, v, chunk_len=chunk_len, softmax_scale=scale)
        hidden = hidden + linear(out.flatten(1), f"{prefix}.self_attn.o_proj")
        x = norm(hidden, f"{prefix}.post_attention_layernorm")
        gate, up = linear(x, f"{prefix}.mlp.gate_proj"), linear(x, f"{prefix}.mlp.up_proj")
        hidden = hidden + linear(F.silu(gate) * up, f"{prefix}.mlp.down_proj")
    return linear(norm(hidden, "model.norm"), "lm_head")


# With 256/128 no position of a successive chunk exceeds chunk_size; with 192/64 half of them are clamped to it.
CHUNKS = pytest.mark.parametrize("sizes", [(256, 128), (192, 64)], ids=["unclamped", "clamped"])


def dual_chunk(sizes: tuple[int, int], original: int) -> dict[str, int]:
    return {"chunk_size": sizes[0], "local_size": sizes[1], "original_max_position_embeddings": original}


@CHUNKS
@pytest.mark.parametrize("original", [0, 256, 64], ids=["no_temperature", "beyond_256", "beyond_64"])
@pytest.mark.parametrize("length", [100, 129, 256, 700])
def test_dual_chunk_attention(
    write_checkpoint: WriteCheckpoint, length: int, original: int, sizes: tuple[int, int]
) -> None:
    chunk = dual_chunk(sizes, original)
    model = load_model(write_checkpoint(dual_chunk_attention_config=chunk))
    ids = random_ids(length)
    expected = brute_force({**TINY, "dual_chunk_attention_config": chunk}, 0, ids).float()
    for chunk_tokens in (4096, 96):
        actual = all_logits(model, ids, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


def test_the_temperature_matters(write_checkpoint: WriteCheckpoint) -> None:
    """So that the tests above would see it missing."""
    ids = random_ids(700)
    raw = {**TINY, "dual_chunk_attention_config": {**DUAL_CHUNK, "original_max_position_embeddings": 64}}
    cold = {**TINY, "dual_chunk_attention_config": {**DUAL_CHUNK, "original_max_position_embeddings": 0}}
    assert (brute_force(raw, 0, ids) - brute_force(cold, 0, ids)).abs().max() > 0.1


def test_equals_plain_rope_up_to_the_chunk_size(write_checkpoint: WriteCheckpoint) -> None:
    chunked = load_model(write_checkpoint(dual_chunk_attention_config=DUAL_CHUNK))
    plain = chunked.with_options(config=replace(chunked.config, dual_chunk=None))
    ids = random_ids(256)
    torch.testing.assert_close(all_logits(chunked, ids), all_logits(plain, ids), rtol=0, atol=5e-5)
    longer = random_ids(300)
    assert (all_logits(chunked, longer) - all_logits(plain, longer)).abs().max() > 0.1


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_decoding_over_chunk_borders_equals_prefill(write_checkpoint: WriteCheckpoint, kv_cache_dtype: str) -> None:
    """Without temperature, which follows the current length in decoding, steps of 1 to 16 rows equal one prefill."""
    chunk = dual_chunk((192, 64), original=0)
    model = load_model(write_checkpoint(dual_chunk_attention_config=chunk), kv_cache_dtype=kv_cache_dtype)
    ids = random_ids(420)
    expected = all_logits(model, ids)
    result = prefill(model, ids[:100])
    position = 100
    for step in [1] * 40 + [2, 7, 16] * 9:
        rows = model.forward(torch.tensor(ids[position : position + step]), result.cache, output="all")
        # int8: hidden states that differ in the last bit may round to another step
        tolerance = 5e-5 if kv_cache_dtype == "auto" else 3e-2
        torch.testing.assert_close(rows, expected[position : position + step], rtol=0, atol=tolerance)
        position += step
    assert position > 2 * 128 + 64


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "dual_chunk"])
def test_sparse_with_full_budgets_equals_dense(write_checkpoint: WriteCheckpoint, chunked: bool) -> None:
    options = {"dual_chunk_attention_config": DUAL_CHUNK} if chunked else {}
    model = load_model(write_checkpoint(sparse=(1000, 1000), **options))
    ids = random_ids(450)
    for chunk_tokens in (4096, 100):
        sparse = prefill(model.with_options(attention="sparse"), ids, logits="all", chunk_tokens=chunk_tokens)
        dense = prefill(model.with_options(attention="dense"), ids, logits="all", chunk_tokens=chunk_tokens)
        torch.testing.assert_close(sparse.logits, dense.logits, rtol=0, atol=5e-5)
        assert sparse.stats.density == 1.0


@CHUNKS
@pytest.mark.parametrize("original", [0, 64])
def test_sparse_against_the_definitions(
    write_checkpoint: WriteCheckpoint, original: int, sizes: tuple[int, int]
) -> None:
    chunk = dual_chunk(sizes, original)
    model = load_model(write_checkpoint(dual_chunk_attention_config=chunk, sparse=(40, 110)), attention="sparse")
    ids = random_ids(640)  # the rows that vote end a chunk: with 192/64 all of their successive positions are clamped
    raw = {**TINY, "dual_chunk_attention_config": chunk}
    result = prefill(model, ids, logits="all")
    expected = brute_force(raw, 0, ids, sparse=(40, 110)).float()
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=5e-5)
    assert (expected - brute_force(raw, 0, ids).float()).abs().max() > 0.1
    assert 0.3 < result.stats.density < 0.9


@CHUNKS
@pytest.mark.parametrize("chunk_tokens", [4096, 192, 100])
def test_block_groups_against_the_definitions(
    write_checkpoint: WriteCheckpoint, chunk_tokens: int, sizes: tuple[int, int]
) -> None:
    """Whatever the cut, also where it is not between blocks: chunks are then cut before it."""
    chunk = dual_chunk(sizes, 64)
    model = load_model(write_checkpoint(dual_chunk_attention_config=chunk), attention="sparse", coverage=0.8)
    ids = random_ids(700)
    raw = {**TINY, "dual_chunk_attention_config": chunk}
    result = prefill(model, ids, logits="all", chunk_tokens=chunk_tokens)
    expected = brute_force(raw, 0, ids, coverage=0.8).float()
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=5e-5)
    assert (expected - brute_force(raw, 0, ids).float()).abs().max() > 0.1
    assert 0.3 < result.stats.density < 0.9
    assert result.stats.kept is not None
    assert 0.6 < result.stats.kept < 0.95


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("length", [20, 449, 512])
def test_skipping_rows_of_the_last_layer_changes_nothing(
    write_checkpoint: WriteCheckpoint, length: int, attention: str
) -> None:
    model = load_model(write_checkpoint(dual_chunk_attention_config=DUAL_CHUNK, sparse=(40, 110)))
    model = model.with_options(attention=attention)
    ids = random_ids(length)
    for chunk_tokens in (4096, 128):
        last = prefill(model, ids, chunk_tokens=chunk_tokens)
        every = prefill(model, ids, chunk_tokens=chunk_tokens, logits="all")
        torch.testing.assert_close(last.logits, every.logits[-1], rtol=0, atol=5e-5)
        for layer in range(2):
            for one, other in zip(
                last.cache.workspace(layer, length), every.cache.workspace(layer, length), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=0, atol=5e-5)


# --- int8 and 16-bit ---


def test_int8_is_close(write_checkpoint: WriteCheckpoint) -> None:
    """Key biases of 2, keys of 1: logits of spread 2 stay within 0.06, RMSE within 0.01."""
    model = load_model(write_checkpoint(dual_chunk_attention_config=DUAL_CHUNK))
    ids = random_ids(700)
    exact = all_logits(model, ids)
    difference = all_logits(model.with_options(kv_cache_dtype="int8"), ids) - exact
    assert exact.std() > 1.5
    assert difference.abs().max() < 0.06
    assert difference.square().mean().sqrt() < 0.01


def test_int8_does_not_depend_on_the_cut(write_checkpoint: WriteCheckpoint) -> None:
    model = load_model(write_checkpoint(dual_chunk_attention_config=DUAL_CHUNK), kv_cache_dtype="int8")
    ids = random_ids(700)
    whole = all_logits(model, ids)
    for chunk_tokens in (64, 200):
        # Hidden states differ in the last bits, and single values then round to the next step.
        difference = (all_logits(model, ids, chunk_tokens=chunk_tokens) - whole).abs()
        assert difference.median() < 1e-5
        assert difference.max() < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(write_checkpoint: WriteCheckpoint, dtype: torch.dtype) -> None:
    """The error against float32 is at most twice that of transformers in the same dtype."""
    from transformers import Qwen2ForCausalLM

    directory, ids = write_checkpoint(), random_ids(200)
    exact = all_logits(load_model(directory), ids)
    ours = all_logits(load_model(directory, dtype=dtype), ids)
    with torch.no_grad():
        theirs = Qwen2ForCausalLM.from_pretrained(directory, dtype=dtype)(torch.tensor([ids])).logits[0].float()
    assert ours.dtype == torch.float32
    error, allowed = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert 0 < error <= 2 * allowed


# --- Options ---


def test_when_prefill_is_sparse(write_checkpoint: WriteCheckpoint) -> None:
    embedded = {**DUAL_CHUNK, "sparse_attention_config": budgets(TINY, 40, 110), "sparse_attention_threshold": 300}
    model = load_model(write_checkpoint(dual_chunk_attention_config=embedded))
    assert not model.prefills_sparse(300)
    assert model.prefills_sparse(301)
    assert not model.with_options(attention="dense").prefills_sparse(10**6)
    assert model.with_options(attention="sparse").prefills_sparse(1)
    assert model.config.sparse is not None
    off = replace(model.config, sparse=replace(model.config.sparse, enabled=False))
    assert not model.with_options(config=off).prefills_sparse(10**6)
    assert model.with_options(config=off, attention="sparse").prefills_sparse(1)


def test_enabled_sparse_attention_without_budgets(write_checkpoint: WriteCheckpoint) -> None:
    """Only what would run by budgets needs them."""
    directory = write_checkpoint(dual_chunk_attention_config={**DUAL_CHUNK, "sparse_attention_enabled": True})
    dense = load_model(directory, attention="dense")
    assert not dense.prefills_sparse(10**6)
    assert load_model(directory, coverage=0.9).prefills_sparse(10**6)
    assert dense.with_options(attention="sparse", coverage=0.9).prefills_sparse(1)
    with pytest.raises(
        ValueError, match=r"'auto' needs budgets where sparse_attention_enabled is true in config\.json"
    ):
        load_model(directory)
    with pytest.raises(ValueError, match=r"'sparse' needs budgets .* this model has none"):
        dense.with_options(attention="sparse")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 1),
        ("vocab_size", 259),
        ("intermediate_size", 96),
        ("hidden_size", 64),
        ("num_heads", 1),
        ("num_kv_heads", 2),
        ("head_dim", 128),
        ("attention_bias", False),
        ("tie_word_embeddings", True),
    ],
)
def test_other_sizes_need_other_weights(write_checkpoint: WriteCheckpoint, name: str, value: object) -> None:
    model = load_model(write_checkpoint())
    changed = replace(model.config, **{name: value})
    expected = f"config.{name} must be the weights', {getattr(model.config, name)}, got {value}"
    with pytest.raises(ValueError, match=expected):
        model.with_options(config=changed)


def test_models_can_be_compared_hashed_printed_and_copied(write_checkpoint: WriteCheckpoint) -> None:
    model, other = (load_model(write_checkpoint(name, tokenizer=True, sparse=(40, 110))) for name in ("one", "other"))
    result = prefill(model, [1, 2, 3])
    assert model == model
    assert model != other
    assert other in [model, other]
    assert len({model, other, model}) == 2
    assert result != prefill(model, [1, 2, 3])
    assert model.weights != other.weights
    assert model.weights.layers[0] not in other.weights.layers
    assert len(repr(result)) < 1000
    shown = repr(model)
    assert f"{model.path}', num_layers=2, float32 on cpu, weights {format_bytes(model.weights.nbytes)}, " in shown
    assert len(shown) - len(str(model.path)) < 200
    model.tokenizer.chat_template = "{{ messages }}"
    model.tokenizer.apply_chat_template([])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(prefill(again, [1, 2, 3]).logits, result.logits)


def test_options_are_checked(write_checkpoint: WriteCheckpoint) -> None:
    model = load_model(write_checkpoint())
    with pytest.raises(ValueError, match="needs budgets"):
        model.with_options(attention="sparse")
    with pytest.raises(ValueError, match="kv_cache_dtype must be"):
        model.with_options(kv_cache_dtype="int4")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        _ = model.tokenizer
    with pytest.raises(FileNotFoundError, match="not loaded from a directory"):
        _ = replace(model, path=None).tokenizer
