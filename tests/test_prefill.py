"""Chunked prefill: statistics, continuation, interrupts, refusals."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import DUAL_CHUNK, TINY, WriteCheckpoint, budgets
from qwen_sparse import PagedKVCache, load_model, prefill
from qwen_sparse.engine.prefill import chunk_ends
from qwen_sparse.kernels.reference import vertical_slash_mask
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.kv_cache import KVPool, kv_cache_bytes

MODULE = importlib.import_module("qwen_sparse.engine.prefill")  # as an attribute, the name is the function


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(TINY["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def model(write_checkpoint: WriteCheckpoint) -> Decoder:
    embedded = {**DUAL_CHUNK, "original_max_position_embeddings": 0}
    embedded |= {"sparse_attention_config": budgets(TINY, 40, 110), "sparse_attention_threshold": 400}
    return load_model(write_checkpoint(dual_chunk_attention_config=embedded))


def test_result(model: Decoder) -> None:
    result = prefill(model, random_ids(300), chunk_tokens=128)
    assert result.logits.shape == (TINY["vocab_size"],)
    assert result.logits.dtype == torch.float32
    result.logits.add_(1)  # callers may write to it
    assert isinstance(result.cache, PagedKVCache)
    assert result.cache.seqlen == 300
    assert result.cache.capacity == 384  # reserved once, in pages
    stats = result.stats
    assert stats.tokens == 300
    assert stats.density == 1.0
    assert set(stats.seconds) == {"linear", "selection", "attention", "cache"}
    assert stats.seconds["selection"] == 0
    assert all(stats.seconds[phase] > 0 for phase in ("linear", "attention", "cache"))
    assert 0.5 * stats.total_seconds < sum(stats.seconds.values()) <= stats.total_seconds
    assert stats.tokens_per_second == pytest.approx(300 / stats.total_seconds)
    assert stats.peak_memory > model.weights.nbytes


def test_sparse_statistics(model: Decoder) -> None:
    assert prefill(model, random_ids(400)).stats.density == 1.0  # at the threshold
    stats = prefill(model, random_ids(401)).stats
    assert stats.density < 1.0
    assert stats.seconds["selection"] > 0


def test_density_counts_pairs(model: Decoder) -> None:
    """The density of a prefill equals that of the sets its selection chose."""
    chosen = []
    real = torch.ops.qwen_sparse.dual_chunk_attention

    def spy(*args: Any) -> Any:
        chosen.append(args)
        return real(*args)

    ids = random_ids(600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_sparse.model.attention._ops.dual_chunk_attention", spy)
        stats = prefill(model, ids, logits="all").stats
    sparse = [args for args in chosen if args[6] is not None]
    attended = sum(int(vertical_slash_mask(args[6], args[7], 576, 576).sum()) for args in sparse)
    attended += 2 * 2 * sum(range(577, 601))  # the last block is dense: rows 576 to 599 of two heads and layers
    assert len(sparse) == 2
    assert stats.density == pytest.approx(attended / (2 * 2 * 600 * 601 // 2))


@pytest.mark.parametrize("as_type", [list, tuple, np.asarray, torch.tensor, lambda ids: torch.tensor(ids).int()])
def test_kinds_of_input(model: Decoder, as_type: Any) -> None:
    ids = random_ids(20)
    assert torch.equal(prefill(model, as_type(ids)).logits, prefill(model, ids).logits)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("first", [1, 63, 128, 290])
def test_continuing_a_cache_equals_one_shot(model: Decoder, first: int, kv_cache_dtype: str) -> None:
    model = model.with_options(kv_cache_dtype=kv_cache_dtype)
    ids = random_ids(300)
    whole = prefill(model, ids)
    start = prefill(model, ids[:first])
    rest = prefill(model, ids[first:], cache=start.cache, chunk_tokens=100)
    assert rest.cache is start.cache
    assert rest.cache.seqlen == 300
    assert rest.stats.tokens == 300 - first
    torch.testing.assert_close(rest.logits, whole.logits, rtol=0, atol=5e-5 if kv_cache_dtype == "auto" else 3e-2)


def test_going_back_in_a_cache(model: Decoder) -> None:
    ids, other = random_ids(200), random_ids(50, seed=5)
    result = prefill(model, ids)
    prefill(model, other, cache=result.cache)
    result.cache.truncate(200)
    again = prefill(model, other[:20], cache=result.cache)
    torch.testing.assert_close(again.logits, prefill(model, ids + other[:20]).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("coverage", [None, 0.5])
def test_short_continuations_are_dense(model: Decoder, coverage: float | None) -> None:
    model = model.with_options(attention="sparse", coverage=coverage)
    result = prefill(model, random_ids(500))
    assert result.stats.density < 1.0
    assert (result.stats.kept is None) == (coverage is None)
    for rows in (1, 17, 512):
        continued = prefill(model, random_ids(rows), cache=result.cache).stats
        assert continued.density == 1.0
        assert continued.kept is None
    assert prefill(model, random_ids(513), cache=result.cache).stats.density < 1.0


@pytest.mark.parametrize("coverage", [None, 0.5])
@pytest.mark.parametrize(("length", "last"), [(600, 24), (640, 64), (641, 1)])
def test_the_last_block_of_a_prompt_is_dense(
    write_checkpoint: WriteCheckpoint, coverage: float | None, length: int, last: int
) -> None:
    """With one layer, its rows alone have the logits of dense attention."""
    directory = write_checkpoint(num_hidden_layers=1, dual_chunk_attention_config=DUAL_CHUNK, sparse=(30, 110))
    model, ids = load_model(directory, attention="sparse", coverage=coverage), random_ids(length)
    expected = prefill(model.with_options(attention="dense"), ids, logits="all").logits
    for chunk_tokens in (4096, 192):
        result = prefill(model, ids, logits="all", chunk_tokens=chunk_tokens)
        difference = (result.logits - expected).abs().amax(1)
        assert difference[-last:].max() < 5e-5
        assert difference[-last - 64 : -last].max() > 1e-3
        assert result.stats.density < 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_stopping_in_the_middle_leaves_whole_chunks(
    model: Decoder, error: type[BaseException], kv_cache_dtype: str
) -> None:
    model = model.with_options(kv_cache_dtype=kv_cache_dtype)
    ids, cache = random_ids(384), model.new_cache()
    real, appends = KVPool.append, 0

    def failing(self: KVPool, *args: Any) -> None:
        nonlocal appends
        appends += 1
        if appends == 6:  # the second layer of the third prefill chunk, with its keys half written
            real(self, *args)
            raise error("stop")
        real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVPool, "append", failing)
        with pytest.raises(error, match="stop"):
            prefill(model, ids, cache=cache, chunk_tokens=128)
    assert cache.seqlen == 256
    assert cache.pool.workspace_nbytes == 0
    resumed = prefill(model, ids[256:], cache=cache, chunk_tokens=128)
    assert torch.equal(resumed.logits, prefill(model, ids, chunk_tokens=128).logits)


def test_too_long_for_the_model(model: Decoder) -> None:
    limited = replace(model, max_seq_len=100)
    with pytest.raises(ValueError, match=r"max_seq_len = 100 tokens, got 0 cached \+ 101 prompt \+ 0 new = 101"):
        prefill(limited, random_ids(101))
    cache = prefill(limited, random_ids(60)).cache
    with pytest.raises(ValueError, match="got 60 cached"):
        prefill(limited, random_ids(41), cache=cache)
    assert prefill(limited, random_ids(40), cache=cache).cache.seqlen == 100


def test_too_long_for_the_memory(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Decoder, "forward", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(MODULE, "available_memory", lambda _: 10**6)
    with pytest.raises(
        MemoryError, match=r"300 tokens is estimated to need .* 1\.00 MB are available; estimate for all"
    ):
        prefill(model, random_ids(300))
    assert not calls
    needed = kv_cache_bytes(model.config, 300, torch.float32)
    monkeypatch.setattr(MODULE, "available_memory", lambda _: 2 * needed)
    with pytest.raises(MemoryError):  # the logits of every row do not fit beside the cache
        prefill(model, random_ids(300), logits="all")


def test_reserved_pages_are_not_counted_again(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.new_cache(capacity=50_000)
    monkeypatch.setattr(MODULE, "available_memory", lambda _: cache.nbytes // 2)
    ids = random_ids(50_000)
    MODULE.check_request(model, 50_000, cache=cache, chunk_tokens=128)
    with pytest.raises(MemoryError):
        prefill(model, ids, chunk_tokens=128)


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ([], r"must have shape \[n\] with n >= 1, got \[0\]"),
        ([[1, 2]], r"got \[1, 2\]"),
        ([1.5], "must be integers, got torch.float32"),
        ([-1], r"must be in \[0, vocab_size = 260\), got -1"),
        ([1, 260], r"must be in \[0, vocab_size = 260\), got 260"),
        ("text", "must be token ids"),
        ([None], "must be a flat sequence of integers"),
        ([True, False], "must be integers, got torch.bool"),
        (
            torch.tensor([2**64 - 1], dtype=torch.uint64),
            r"must be in \[0, vocab_size = 260\), got 18446744073709551615",
        ),
        (torch.tensor([40_000], dtype=torch.uint16), r"must be in \[0, vocab_size = 260\), got 40000"),
    ],
)
def test_bad_tokens(model: Decoder, input_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefill(model, input_ids)


INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_dtype(model: Decoder, dtype: str) -> None:
    ids = [3, 255, 128]
    expected = prefill(model, ids).logits
    for given in (torch.tensor(ids, dtype=getattr(torch, dtype)), np.array(ids, dtype)):
        torch.testing.assert_close(prefill(model, given).logits, expected, rtol=0, atol=0)


def test_bad_arguments(model: Decoder, write_checkpoint: WriteCheckpoint) -> None:
    with pytest.raises(ValueError, match="chunk_tokens must be >= 1, got 0"):
        prefill(model, [1], chunk_tokens=0)
    with pytest.raises(ValueError, match="logits must be 'last' or 'all', got 'none'"):
        prefill(model, [1], logits="none")  # type: ignore[arg-type]
    other = load_model(write_checkpoint("other", rope_theta=1e6))
    with pytest.raises(ValueError, match="cache must come from this model"):
        prefill(model, [1], cache=other.new_cache())


def test_a_cache_continues_with_other_attention(model: Decoder) -> None:
    assert model.config.dual_chunk is not None
    ids = random_ids(600)
    by_coverage = model.with_options(attention="sparse", coverage=0.9)
    ending = model.with_options(config=replace(model.config, eos_token_ids=(3,)), attention="dense")
    for other in (by_coverage, ending):
        cache = prefill(model, ids[:500]).cache
        assert prefill(other, ids[500:], cache=cache).stats.tokens == 100
        assert cache.seqlen == 600
    chunk = replace(model.config.dual_chunk, local_size=64, chunk_size=320)
    rotations = replace(model.config, dual_chunk=chunk), replace(model.config, dual_chunk=None)
    for config in rotations:  # keys are rotated within another length
        with pytest.raises(ValueError, match="same sizes, rotary embedding, chunk length"):
            prefill(model.with_options(config=config), [1], cache=prefill(model, ids[:200]).cache)


def test_autocast_changes_nothing(model: Decoder) -> None:
    expected = prefill(model, random_ids(300))
    step = torch.tensor([5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = prefill(model, random_ids(300))
        logits = model.forward(step, result.cache)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(logits, model.forward(step, expected.cache))


def test_capacity(model: Decoder) -> None:
    for capacity in (-1, 1.5, "many"):
        with pytest.raises(ValueError, match=rf"capacity must be (an integer )?>= 0, got .*{capacity}"):
            model.new_cache(capacity)
    with pytest.raises(MemoryError, match=r"capacity of 1099511627776 tokens takes 1126 TB, and .* available"):
        model.new_cache(2**40)


def test_progress_bar(model: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    prefill(model, random_ids(300), chunk_tokens=100, progress=True)
    shown = capsys.readouterr().err
    assert "prefill: 100%" in shown
    assert "tok/s" in shown
    prefill(model, random_ids(300))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("start", "total", "chunk_tokens", "expected"),
    [
        (0, 300, 4096, [300]),
        (0, 300, 128, [128, 192, 300]),  # 44 rows would be left: a block moves to the last chunk
        (0, 320, 128, [128, 256, 320]),
        (70, 400, 128, [192, 320, 400]),  # cut between blocks of 64 rows
        (0, 130, 50, [50, 64, 114, 130]),
        (10, 13, 1, [11, 12, 13]),
        (0, 65, 64, [64, 65]),
    ],
)
def test_chunk_ends(start: int, total: int, chunk_tokens: int, expected: list[int]) -> None:
    assert chunk_ends(start, total, chunk_tokens) == expected


def test_chunks_cover_the_prompt() -> None:
    for total in range(1, 400, 7):
        for start in range(0, total, 13):
            for chunk_tokens in (1, 63, 64, 65, 100, 128, 300):
                ends = chunk_ends(start, total, chunk_tokens)
                sizes = np.diff([start, *ends])
                assert ends[-1] == total
                assert 0 < sizes.min() <= sizes.max() <= chunk_tokens


def test_package_exports_the_function() -> None:
    assert MODULE.prefill is prefill
