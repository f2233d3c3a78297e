"""The attention registered with transformers: against sdpa, and against our own model on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import DUAL_CHUNK, WriteCheckpoint, budgets
from qwen_sparse import generate, load_model, prefill

transformers = pytest.importorskip("transformers")
plugin = pytest.importorskip("qwen_sparse.transformers")

CHUNK_LEN = DUAL_CHUNK["chunk_size"] - DUAL_CHUNK["local_size"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"chunk_size": DUAL_CHUNK["chunk_size"], "local_size": DUAL_CHUNK["local_size"]}
Load = Callable[..., Any]


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def load(write_checkpoint: WriteCheckpoint) -> Load:
    """``load(architecture="Qwen2", attn="qwen_sparse", dual_chunk=False, **config) -> (transformers' model, ours)``."""

    def make(architecture: str = "Qwen2", attn: str = plugin.NAME, **config: Any) -> tuple[Any, Any]:
        name = f"{architecture.lower()}-{len(config)}-{attn}"
        config = {**HEADS, "rms_norm_eps": 1e-6, **config}
        bias = {} if architecture == "Qwen2" else {"attention_bias": False}
        ours = write_checkpoint(name, dual_chunk_attention_config=DUAL_CHUNK, sparse=(40, 120), **bias, **config)
        theirs = ours.parent / f"{name}-transformers"
        theirs.mkdir()
        raw = json.loads((ours / "config.json").read_text())
        del raw["dual_chunk_attention_config"]
        raw |= {
            "model_type": architecture.lower(),
            "architectures": [f"{architecture}ForCausalLM"],
            "eos_token_id": None,
        }
        (theirs / "config.json").write_text(json.dumps(raw))
        (theirs / "model.safetensors").symlink_to(ours / "model.safetensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(theirs, attn_implementation=attn, dtype=torch.float32)
        return model.eval(), load_model(ours, attention="dense", max_seq_len=2**20)

    return make


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model(ids[None] if ids.ndim == 1 else ids, **options).logits


@torch.no_grad()
def generated(model: Any, ids: Tensor, count: int = 6, **options: Any) -> list[list[int]]:
    batch = ids[None] if ids.ndim == 1 else ids
    options.setdefault("attention_mask", torch.ones_like(batch))  # else token 0 counted as padding
    out = model.generate(batch, max_new_tokens=count, do_sample=False, pad_token_id=0, disable_compile=True, **options)
    return out[:, batch.shape[1] :].tolist()


# --- dense attention against sdpa ---


@pytest.mark.parametrize("architecture", ["Qwen2", "Llama", "Qwen3"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_dense_equals_sdpa(architecture: str, padding: str) -> None:
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=256, hidden_size=128, intermediate_size=160, num_hidden_layers=2, head_dim=64, **HEADS
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    ids = torch.stack([tokens(90, seed) for seed in range(3)])
    shown = torch.ones_like(ids)
    for row, hidden in enumerate((0, 7, 60)):
        if padding == "left":
            shown[row, :hidden] = 0
        elif padding == "right":
            shown[row, 90 - hidden :] = 0
    expected = logits(model, ids, attention_mask=shown)
    model.set_attn_implementation(plugin.NAME)
    actual = logits(model, ids, attention_mask=shown)
    torch.testing.assert_close(actual[shown.bool()], expected[shown.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 40])
def test_generate_equals_sdpa(cache: str, window: int | None) -> None:
    options = {} if window is None else {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=128, intermediate_size=160, num_hidden_layers=2, head_dim=64, **HEADS, **options
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.stack([tokens(70, seed) for seed in range(2)])
    shown = torch.ones_like(ids)
    shown[1, :25] = 0
    arguments = {"attention_mask": shown, "cache_implementation": cache, "count": 12}
    expected = generated(model, ids, **arguments)
    model.set_attn_implementation(plugin.NAME)
    assert generated(model, ids, **arguments) == expected


# --- Dual Chunk Attention and vertical-slash against our model ---


@pytest.mark.parametrize("architecture", ["Qwen2", "Llama"])
@pytest.mark.parametrize("count", [CHUNK_LEN - 1, CHUNK_LEN + 1, 2 * CHUNK_LEN, 3 * CHUNK_LEN + 5])
def test_dual_chunk_logits(architecture: str, count: int, load: Load) -> None:
    theirs, ours = load(architecture)
    plugin.enable_dual_chunk(theirs, **SIZES)
    ids = tokens(count)
    expected = prefill(ours, ids, logits="all").logits
    torch.testing.assert_close(logits(theirs, ids)[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("count", [CHUNK_LEN - 3, 2 * CHUNK_LEN - 3])
def test_dual_chunk_generates_over_a_border(cache: str, count: int, load: Load) -> None:
    theirs, ours = load()
    plugin.enable_dual_chunk(theirs, **SIZES)
    ids = tokens(count)
    expected = list(generate(ours, ids, max_new_tokens=8, stop_token_ids=()))
    assert generated(theirs, ids, 8, cache_implementation=cache) == [expected]


def test_dual_chunk_generates_for_a_padded_batch(load: Load) -> None:
    theirs, ours = load()
    plugin.enable_dual_chunk(theirs, **SIZES)
    prompts = [tokens(300, 1), tokens(170, 2)]
    ids, shown = torch.zeros(2, 300, dtype=torch.long), torch.zeros(2, 300, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 300 - len(prompt) :], shown[row, 300 - len(prompt) :] = prompt, 1
    expected = [list(generate(ours, prompt, max_new_tokens=5, stop_token_ids=())) for prompt in prompts]
    assert generated(theirs, ids, 5, attention_mask=shown) == expected
    with pytest.raises(NotImplementedError, match=r"count from a sequence's first token.*got 130 instead of 0 in seq"):
        logits(theirs, ids, attention_mask=shown)


def test_dual_chunk_refuses_other_positions(load: Load) -> None:
    """Attention by chunks depends on where chunks begin, so shifted positions are no relative ones."""
    theirs, _ = load()
    enabled = plugin.enable_dual_chunk(theirs, **SIZES)
    ids = tokens(300)
    with pytest.raises(NotImplementedError, match="got 100 instead of 0 in sequence 0"):
        logits(theirs, ids, position_ids=torch.arange(300)[None] + 100)
    gap = torch.arange(300)[None] + (torch.arange(300) >= 200)
    with pytest.raises(NotImplementedError, match="got 201 instead of 200 in sequence 0"):
        logits(theirs, ids, position_ids=gap, attention_mask=torch.ones(1, 300))
    expected = logits(theirs, ids)
    assert torch.equal(logits(theirs, ids, position_ids=torch.arange(300)[None]), expected)
    enabled.remove()
    shifted = logits(theirs, ids, position_ids=torch.arange(300)[None] + 100)  # plain RoPE is relative
    torch.testing.assert_close(shifted, logits(theirs, ids), rtol=0, atol=2e-4)


@pytest.fixture(params=["vertical-slash", "block groups"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def enable_sparse(
    theirs: nn.Module, ours: Any, kind: str, *, dual_chunk: bool, threshold: int = 100
) -> tuple[Any, Any]:
    """Both prefill sparsely; also what ``enable_`` returned for theirs. Ours is the model loaded anew."""
    config = json.loads((ours.path / "config.json").read_text())
    if kind == "vertical-slash":
        file = ours.path / "budgets.json"
        file.write_text(json.dumps(budgets(config, 40, 120)))
        enabled = plugin.enable_vertical_slash(theirs, file, threshold=threshold)
    else:
        enabled = plugin.enable_block_groups(theirs, coverage=0.8, threshold=threshold)
    if dual_chunk:
        plugin.enable_dual_chunk(theirs, **SIZES)
    else:
        del config["dual_chunk_attention_config"]
        (ours.path / "config.json").write_text(json.dumps(config))
    coverage = None if kind == "vertical-slash" else 0.8
    return load_model(ours.path, attention="sparse", coverage=coverage, max_seq_len=2**20), enabled


@pytest.mark.parametrize("dual_chunk", [False, True])
def test_sparse_prefill(kind: str, dual_chunk: bool, load: Load) -> None:
    """All rows as ours; the last block, which is dense, and a prompt up to the threshold too."""
    theirs, ours = load()
    ours, _ = enable_sparse(theirs, ours, kind, dual_chunk=dual_chunk)
    for count in (500, 512, 513):
        ids = tokens(count)
        sparse = prefill(ours, ids, chunk_tokens=1024, logits="all").logits
        torch.testing.assert_close(logits(theirs, ids)[0], sparse, rtol=0, atol=5e-4)
    dense = prefill(ours.with_options(attention="dense"), ids, logits="all").logits
    assert (sparse - dense).abs().max() > 0.02
    short = tokens(100)
    torch.testing.assert_close(
        logits(theirs, short)[0, -1], prefill(ours.with_options(attention="dense"), short).logits, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("dual_chunk", [False, True])
def test_continuations(kind: str, dual_chunk: bool, load: Load) -> None:
    """Up to 512 rows on top of cached keys are dense, more are not; generate goes on from there."""
    theirs, ours = load()
    ours, _ = enable_sparse(theirs, ours, kind, dual_chunk=dual_chunk)
    ids = tokens(1100)
    for count in (20, 512, 513):
        theirs_cache, first = transformers.DynamicCache(), prefill(ours, ids[:500], chunk_tokens=1024)
        logits(theirs, ids[:500], past_key_values=theirs_cache)
        actual = logits(theirs, ids[500 : 500 + count], past_key_values=theirs_cache)[0]
        second = prefill(ours, ids[500 : 500 + count], cache=first.cache, chunk_tokens=1024, logits="all")
        torch.testing.assert_close(actual, second.logits, rtol=0, atol=5e-4)
        assert (second.stats.density == 1) == (count <= 512)
    assert generated(theirs, ids[:500], 8) == [list(generate(ours, ids[:500], max_new_tokens=8, stop_token_ids=()))]


def test_sparse_prefill_of_a_padded_batch(kind: str, load: Load) -> None:
    theirs, ours = load()
    enable_sparse(theirs, ours, kind, dual_chunk=True)
    prompts = [tokens(400, 1), tokens(330, 2)]
    for padding in ("left", "right"):
        ids, shown = torch.zeros(2, 400, dtype=torch.long), torch.zeros(2, 400, dtype=torch.long)
        positions = torch.zeros(2, 400, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            place = slice(400 - len(prompt), 400) if padding == "left" else slice(0, len(prompt))
            ids[row, place], shown[row, place] = prompt, 1
            positions[row, place] = torch.arange(len(prompt))
        actual = logits(theirs, ids, attention_mask=shown, position_ids=positions)
        for row, prompt in enumerate(prompts):
            expected = logits(theirs, prompt)[0]
            torch.testing.assert_close(actual[row][shown[row].bool()], expected, rtol=0, atol=2e-4)


def test_remove_restores_the_model(load: Load) -> None:
    theirs, _ = load(attn="sdpa")
    ids = tokens(300)
    expected = logits(theirs, ids)
    enabled = plugin.enable_dual_chunk(theirs, **SIZES)
    assert (logits(theirs, ids) - expected).abs().max() > 0.01
    enabled.remove()
    enabled.remove()
    assert theirs.config._attn_implementation == "sdpa"
    assert torch.equal(logits(theirs, ids), expected)


def test_remove_in_any_order(kind: str, load: Load) -> None:
    """What one enabled goes, what another did stays; the last restores the model's own attention."""
    theirs, ours = load(attn="sdpa")
    ids = tokens(300)
    expected = logits(theirs, ids)
    dual_chunk = plugin.enable_dual_chunk(theirs, **SIZES)
    chunked = logits(theirs, ids)
    dual_chunk.remove()
    _, first = enable_sparse(theirs, ours, kind, dual_chunk=False)
    sparse = logits(theirs, ids)
    dual_chunk = plugin.enable_dual_chunk(theirs, **SIZES)
    both = logits(theirs, ids)
    assert min((a - b).abs().max() for a, b in ((both, chunked), (both, sparse), (sparse, expected))) > 0.01
    first.remove()
    assert torch.equal(logits(theirs, ids), chunked)
    second = plugin.enable_block_groups(theirs, coverage=0.5, threshold=100)
    dual_chunk.remove()
    assert theirs.config._attn_implementation == plugin.NAME
    assert (logits(theirs, ids) - expected).abs().max() > 0.01
    second.remove()
    assert theirs.config._attn_implementation == "sdpa"
    assert torch.equal(logits(theirs, ids), expected)


# --- refusals ---


def test_what_it_does_not_do_is_named(load: Load) -> None:
    theirs, _ = load()
    ids = tokens(30)
    mask = torch.zeros(1, 1, 30, 30)
    with pytest.raises(NotImplementedError, match=r"two-dimensional.*got shape \[1, 1, 30, 30\]"):
        logits(theirs, ids, attention_mask=mask)
    holes = torch.ones(1, 30, dtype=torch.long)
    holes[0, 10:12] = 0
    with pytest.raises(NotImplementedError, match="sequence 0 shows 28 of the keys 0 to 29"):
        logits(theirs, ids, attention_mask=holes)
    packed = torch.cat((torch.arange(10), torch.arange(20)))[None]
    with pytest.raises(NotImplementedError, match="packed sequences"):
        logits(theirs, ids, position_ids=packed, use_cache=False)
    theirs.train()
    theirs.config.attention_dropout = 0.5
    for layer in theirs.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(NotImplementedError, match=r"no dropout, got 0\.5"):
        theirs(ids[None])


def test_gradients_are_refused(load: Load) -> None:
    theirs, _ = load()
    ids = tokens(30)[None]
    with pytest.raises(NotImplementedError, match=r"no gradients.*torch\.no_grad\(\).*'sdpa'"):
        theirs(ids, labels=ids)
    theirs.requires_grad_(False)
    theirs.lm_head.requires_grad_(True)  # above attention, gradients are right
    theirs(ids, labels=ids).loss.backward()
    assert theirs.lm_head.weight.grad.abs().max() > 0
    embeddings = torch.zeros(1, 30, theirs.config.hidden_size, requires_grad=True)
    with pytest.raises(NotImplementedError, match="queries, keys or values require them"):
        theirs(inputs_embeds=embeddings)


def test_enabling_checks_the_model(load: Load) -> None:
    theirs, _ = load()
    enabled = plugin.enable_dual_chunk(theirs, **SIZES)
    with pytest.raises(ValueError, match="has Dual Chunk Attention already"):
        plugin.enable_dual_chunk(theirs, **SIZES)
    enabled.remove()
    with pytest.raises(ValueError, match="local_size must be below chunk_size = 64, got 64"):
        plugin.enable_dual_chunk(theirs, chunk_size=64, local_size=64)
    with pytest.raises(ValueError, match=r"one entry per layer \(2\), got 1 entries"):
        plugin.enable_vertical_slash(theirs, [{}])
    with pytest.raises(ValueError, match=r"original_max_position_embeddings must be an integer in \[0, .*got -5"):
        plugin.enable_dual_chunk(theirs, **SIZES, original_max_position_embeddings=-5)
    fitting = budgets({**HEADS, "num_hidden_layers": 2}, 40, 120)
    for name, value in (("threshold", "x"), ("threshold", -1), ("last_q", 0), ("last_q", 65)):
        with pytest.raises(ValueError, match=f"{name} must be an integer in .*got '?{value}"):
            plugin.enable_vertical_slash(theirs, fitting, **{name: value})
    for value in (0.0, 1.0, "0.9"):
        with pytest.raises(ValueError, match=rf"coverage must lie in \(0, 1\), got '?{value}"):
            plugin.enable_block_groups(theirs, coverage=value)
    with pytest.raises(ValueError, match=r"threshold must be an integer in .*got -1"):
        plugin.enable_block_groups(theirs, threshold=-1)
    enabled = plugin.enable_block_groups(theirs)
    with pytest.raises(ValueError, match=r"enable_vertical_slash: .* has block groups already; remove\(\)"):
        plugin.enable_vertical_slash(theirs, fitting)
    enabled.remove()
    enabled = plugin.enable_vertical_slash(theirs, fitting)
    with pytest.raises(ValueError, match=r"enable_block_groups: .* has vertical-slash attention already; remove\(\)"):
        plugin.enable_block_groups(theirs)
    enabled.remove()
    with pytest.raises(ValueError, match="one rotary_emb, got 0"):
        plugin.enable_dual_chunk(nn.Linear(2, 2), **SIZES)
    windowed = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **HEADS,
            vocab_size=16,
            hidden_size=256,
            intermediate_size=16,
            num_hidden_layers=1,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=0,
        )
    )
    with pytest.raises(ValueError, match="must have full attention, got sliding_window = 8 in layer 0"):
        plugin.enable_dual_chunk(windowed, **SIZES)
