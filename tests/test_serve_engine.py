"""The engine by itself: what it answers beside what ``generate`` does, whoever else is served, stopped or failing."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_sparse import prefill
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.kv_cache import PagedKVCache, kv_cache_bytes
from qwen_sparse.passkey import make_prompt
from qwen_sparse.serve.engine import Engine, EngineOptions
from qwen_sparse.serve.requests import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    NewToken,
    Progress,
    ShuttingDownError,
)
from serving.asking import DENSE, MODEL, ask, expected, is_token, prompt, serving

# --- Answers ---


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_several_at_a_time(attention: Any, kv_cache_dtype: str) -> None:
    """Each is answered as if it were alone."""
    model = MODEL.with_options(attention=attention, kv_cache_dtype=kv_cache_dtype)
    prompts = [prompt(length, seed=length) for length in (3000, 130, 700, 1500, 64)]
    with serving(model, max_num_seqs=3) as engine:
        listeners = [ask(engine, tokens)[0] for tokens in prompts]
        for tokens, listener in zip(prompts, listeners, strict=True):
            finished = listener.end()
            assert listener.tokens == expected(tokens, model)
            assert finished.reason == "length"
            assert finished.stats.prompt_tokens == len(tokens)
            assert finished.stats.completion_tokens == 20
            density = finished.stats.density
            assert density is not None
            assert density == 1 if attention == "dense" else density <= 1
        assert listeners[0].end().stats.density == pytest.approx(
            prefill(model, prompts[0], chunk_tokens=512).stats.density
        )
        snapshot = engine.snapshot()
        assert (snapshot.running, snapshot.waiting, snapshot.kv_cache_usage) == (0, 0, 0)


def test_progress() -> None:
    tokens = prompt(2000)
    with serving() as engine:
        listener = ask(engine, tokens)[0]
        finished = listener.end()
        assert [event.processed for event in listener.progress] == [0, 512, 1024, 1536, len(tokens)]
        assert {event.total for event in listener.progress} == {len(tokens)}
        assert {event.cached for event in listener.progress} == {0}
        seconds = [event.seconds for event in listener.progress]
        assert seconds == sorted(seconds)
        stats = finished.stats
        assert stats.scheduled is not None
        assert stats.first_token is not None
        assert stats.arrived <= stats.scheduled <= stats.first_token <= stats.finished


def test_stops() -> None:
    text = make_prompt(300, depth=0.5, seed=1)
    tokens = MODEL.tokenizer.encode(text.text)
    with serving() as engine:
        whole = ask(engine, tokens)[0]
        assert whole.end().reason == "length"
        assert whole.text.startswith(text.key)
        by_text = ask(engine, tokens, stop=(text.key[2:4],))[0]
        assert by_text.end().reason == "stop"
        assert by_text.text == text.key[:2]
        by_token = ask(engine, tokens, stop_token_ids=frozenset([ord(text.key[3])]))[0]
        assert by_token.end().reason == "stop"
        assert by_token.text == text.key[: text.key.index(text.key[3])]
        open_end = ask(engine, tokens, max_new_tokens=2, stop=(text.key[1:3],))[0]
        assert open_end.end().reason == "length"
        assert open_end.text == text.key[:2]  # what was held back for the stop string comes with the end


def test_the_length_is_the_default() -> None:
    with serving(max_model_len=256) as engine:
        listener = ask(engine, prompt(200), max_new_tokens=None)[0]
        finished = listener.end()
        assert finished.stats.prompt_tokens + finished.stats.completion_tokens == 256
        assert finished.reason == "length"


def test_logprobs() -> None:
    tokens = prompt(200)
    with serving() as engine:
        listener = ask(engine, tokens, max_new_tokens=3, logprobs=4, sampler=Sampler(repetition_penalty=5.0))[0]
        listener.end()
        cache = DENSE.new_cache()
        logits = prefill(DENSE, tokens, cache=cache).logits
        for event in listener.events:
            if isinstance(event, NewToken):
                assert event.logprobs is not None
                log_probs = torch.log_softmax(logits, dim=-1)
                assert event.logprobs.chosen == pytest.approx(float(log_probs[event.token_id]), abs=1e-4)
                values, ids = log_probs.topk(4)
                assert [token for token, _ in event.logprobs.top] == ids.tolist()
                assert [value for _, value in event.logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)
                logits = prefill(DENSE, [event.token_id], cache=cache).logits
        plain = ask(engine, tokens, max_new_tokens=1)[0]
        plain.end()
        assert [event.logprobs for event in plain.events if isinstance(event, NewToken)] == [None]


# --- Turns ---


def test_answers_go_on_while_a_long_prompt_is_read() -> None:
    with serving(chunk_tokens=256) as engine:
        short = ask(engine, prompt(100), max_new_tokens=200)[0]
        short.wait_for(is_token)
        long = ask(engine, prompt(4000), max_new_tokens=1)[0]
        long.end()
        chunks = [when for event, when in zip(long.events, long.times, strict=True) if isinstance(event, Progress)]
        assert len(chunks) == 17  # the first one is sent before any work
        tokens = [when for event, when in zip(short.events, short.times, strict=True) if is_token(event)]
        for start, end in itertools.pairwise(chunks[1:]):
            assert sum(start < when < end for when in tokens) == 1  # one step after each chunk
        short.end()
        assert short.tokens == expected(prompt(100), max_new_tokens=200)


def test_first_in_first_out() -> None:
    with serving(max_num_seqs=1) as engine:
        listeners = [ask(engine, prompt(150, seed=seed))[0] for seed in range(4)]
        ends = [listener.end().stats for listener in listeners]
        for before, after in itertools.pairwise(ends):
            assert after.scheduled is not None
            assert before.finished <= after.scheduled


# --- Prefix reuse ---


def test_the_second_question_costs_only_the_question() -> None:
    document = prompt(4000)
    questions = [MODEL.tokenizer.encode(text) for text in ("\nWhat is it?", "\nAnd what is this? The pass key is ")]
    with serving() as engine:
        first = ask(engine, document + questions[0])[0]
        assert first.end().stats.cached_tokens == 0
        second = ask(engine, document + questions[1])[0]
        cached = second.end().stats.cached_tokens
        assert cached == len(document) // 128 * 128
        assert [event.processed for event in second.progress] == [cached, len(document) + len(questions[1])]
        assert second.progress[0].cached == cached
        assert (engine.snapshot().prefix_queries, engine.snapshot().prefix_hits) == (
            2 * len(document) + len(questions[0]) + len(questions[1]),
            cached,
        )
        again = ask(engine, document + questions[1])[0]
        assert again.end().stats.cached_tokens >= cached
    for question, listener in zip((*questions, questions[1]), (first, second, again), strict=True):
        assert listener.tokens == expected(document + question)


def test_the_next_turn_finds_the_answer_too() -> None:
    """Within the trained length: beyond it, an answer is computed with the temperature of the length it had then."""
    tokens = prompt(300)
    with serving() as engine:
        first = ask(engine, tokens, max_new_tokens=130)[0]
        first.end()
        turn = tokens + first.tokens + MODEL.tokenizer.encode("\nAnd then?")
        second = ask(engine, turn)[0]
        assert second.end().stats.cached_tokens == (len(tokens) + 129) // 128 * 128 == 384
        assert second.tokens == expected(turn)


def test_a_prompt_that_is_known_whole() -> None:
    tokens = prompt(1024)[:1024]
    with serving() as engine:
        first, second = ask(engine, tokens)[0], ask(engine, tokens)[0]
        first.end()
        assert second.end().stats.cached_tokens == 1024 - 128  # one token has to be computed
        assert first.tokens == second.tokens


def test_a_prefix_in_use_is_shared() -> None:
    tokens = prompt(2000)
    with serving() as engine:
        first = ask(engine, tokens, max_new_tokens=500)[0]
        first.wait_for(is_token)
        second = ask(engine, tokens)[0]
        second.wait_for(is_token)
        shared = second.progress[0].cached // 128
        assert shared == 15
        assert engine.snapshot().kv_cache_usage * engine._pages.num_pages < 2 * 16 + 5 - shared + 1
        second.end()
        first.end()


def test_without_prefix_caching() -> None:
    tokens = prompt(500)
    with serving(prefix_caching=False) as engine:
        for _ in range(2):
            assert ask(engine, tokens)[0].end().stats.cached_tokens == 0


def test_dense_and_sparse_prefill_share_nothing() -> None:
    """Above the model's threshold, 2048 tokens, keys and values come from sparse attention."""
    long = prompt(3000)
    with serving(MODEL) as engine:
        assert ask(engine, long)[0].end().stats.cached_tokens == 0
        short = ask(engine, long[:1500])[0]
        assert short.end().stats.cached_tokens == 0
        assert short.tokens == expected(long[:1500])
        assert ask(engine, long)[0].end().stats.cached_tokens == len(long) // 128 * 128


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("coverage", [None, 0.8])
def test_a_question_behind_a_sparse_prefix(coverage: float | None, kv_cache_dtype: str) -> None:
    """As ``generate`` on a cache of the prefix: up to 512 tokens are dense, more are sparse as the prefix was."""
    model = MODEL.with_options(attention="sparse", coverage=coverage, kv_cache_dtype=kv_cache_dtype)
    document = prompt(3072)
    with serving(model) as engine:
        first = ask(engine, document)[0]
        assert first.end().stats.density == pytest.approx(prefill(model, document, chunk_tokens=512).stats.density)
        assert first.tokens == expected(document, model)
        for question in ([65, *prompt(299)], [66, *prompt(512)]):
            second = ask(engine, [*document, *question])[0]
            stats = second.end().stats
            assert stats.cached_tokens == len(document)
            cache = prefill(model, document, chunk_tokens=512).cache
            density = prefill(model, question, cache=cache, chunk_tokens=512).stats.density
            assert stats.density == pytest.approx(density)
            assert (density == 1) == (len(question) <= 512)
            cache.truncate(len(document))
            assert second.tokens == expected(question, model, cache=cache)


def test_pages_are_used_again_when_there_are_no_others() -> None:
    memory = 16 * kv_cache_bytes(MODEL.config, 128, torch.float32)
    with serving(max_model_len=2048, kv_cache_memory=memory) as engine:
        prompts = [[65 + number] * 128 + prompt(700) for number in range(4)]
        for tokens in prompts:
            listener = ask(engine, tokens)[0]
            listener.end()
            assert listener.tokens == expected(tokens)
        assert ask(engine, prompts[0])[0].end().stats.cached_tokens == 0
        assert ask(engine, prompts[0])[0].end().stats.cached_tokens == 6 * 128


# --- Clients that go, and things that fail ---


STEPS = [(Decoder, "forward"), (Decoder, "decode_step"), (PagedKVCache, "__init__"), (PagedKVCache, "extend")]
"""Where a request may fail; ``extend`` is called when 300 tokens have become 384."""


def test_cancel() -> None:
    """In the queue, in prefill, and in the answer; the others do not notice."""
    with serving(max_num_seqs=2, chunk_tokens=128) as engine:
        stays = ask(engine, prompt(400), max_new_tokens=300)[0]
        stays.wait_for(is_token)
        prefilling, first = ask(engine, prompt(4000, seed=1), max_new_tokens=1)
        waiting, second = ask(engine, prompt(100))
        prefilling.wait_for(lambda event: isinstance(event, Progress) and event.processed > 0)
        second.cancel()
        assert waiting.end().reason == "abort"
        assert waiting.end().stats.scheduled is None
        first.cancel()
        assert prefilling.end().reason == "abort"
        assert prefilling.progress[-1].processed < 4000
        answering, third = ask(engine, prompt(100), max_new_tokens=5000)
        answering.wait_for(is_token)
        third.cancel()
        third.cancel()
        ended = answering.end()
        assert ended.reason == "abort"
        assert ended.stats.completion_tokens == len(answering.tokens) < 5000
        stays.end()
        assert stays.tokens == expected(prompt(400), max_new_tokens=300)
        assert engine._pages.used == 0


def test_a_listener_that_raises() -> None:
    def raises(event: Event) -> None:
        raise OSError("gone")

    with serving() as engine:
        engine.submit(GenerationRequest(prompt(300), max_new_tokens=1000), raises)
        listener = ask(engine, prompt(300))[0]
        assert listener.end().reason == "length"
        assert engine._pages.used == 0


@pytest.mark.parametrize(
    ("error", "message", "retry"),
    [(RuntimeError("by chance"), "RuntimeError: by chance", False), (MemoryError(), "memory ran out", True)],
)
@pytest.mark.parametrize(("owner", "name"), STEPS)
def test_a_step_that_fails(
    owner: type, name: str, error: Exception, message: str, retry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model, or where the cache takes memory of the device: one request fails, and the next one is answered."""
    real = getattr(owner, name)
    failures = [error]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    with serving() as engine:
        monkeypatch.setattr(owner, name, failing)
        listener = ask(engine, prompt(300), max_new_tokens=100)[0]
        failed = listener.wait_for(lambda event: isinstance(event, (Finished, Failed)))
        assert isinstance(failed, Failed)
        assert (failed.message, failed.retry) == (message, retry)
        assert failed is listener.events[-1]
        listener = ask(engine, prompt(300), max_new_tokens=100)[0]
        listener.end()
        assert listener.tokens == expected(prompt(300), max_new_tokens=100)
        assert engine.healthy


def test_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Decoder.decode_step

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        logits = real(*args, **kwargs)
        logits[-1] = float("nan")
        return logits

    with serving() as engine:
        good = ask(engine, prompt(100), max_new_tokens=100)[0]
        good.wait_for(is_token)
        monkeypatch.setattr(Decoder, "decode_step", failing)
        bad = ask(engine, prompt(100, seed=1))[0].wait_for(lambda event: isinstance(event, Failed))
        assert isinstance(bad, Failed)
        assert "logits are not finite" in bad.message
        monkeypatch.undo()


@pytest.mark.parametrize(("owner", "name"), STEPS)
def test_a_broken_device_ends_the_engine(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was being served or waited hears of it, once."""

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        while engine.snapshot().waiting < 1:
            time.sleep(0.001)
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with serving(max_num_seqs=1) as engine:
        monkeypatch.setattr(owner, name, failing)
        listeners = [ask(engine, prompt(300), max_new_tokens=100)[0] for _ in range(2)]
        for listener in listeners:
            assert isinstance(listener.wait_for(lambda event: isinstance(event, Failed)), Failed)
        engine._thread.join(timeout=60)
        assert [sum(isinstance(event, Failed) for event in listener.events) for listener in listeners] == [1, 1]
        assert not engine.healthy
        with pytest.raises(ShuttingDownError, match="it is broken"):
            ask(engine, prompt(100))


# --- The end ---


def test_draining_answers_what_is_there() -> None:
    with serving(max_num_seqs=1) as engine:
        assert engine.healthy
        listeners = [ask(engine, prompt(100, seed=seed))[0] for seed in range(3)]
        engine.shutdown(drain=True)
        assert [listener.end().reason for listener in listeners] == ["length"] * 3
        assert not engine.healthy
        with pytest.raises(ShuttingDownError, match="it is stopped"):
            ask(engine, prompt(100))


def test_a_second_call_stops_at_once() -> None:
    with serving(max_num_seqs=1) as engine:
        running, waiting = (ask(engine, prompt(100), max_new_tokens=5000)[0] for _ in range(2))
        running.wait_for(is_token)
        draining = threading.Thread(target=lambda: engine.shutdown(drain=True))
        draining.start()
        engine.shutdown(drain=False)
        draining.join(timeout=60)
        assert running.end().reason == waiting.end().reason == "abort"
        assert len(running.tokens) < 5000


def test_an_engine_that_never_ran() -> None:
    engine = Engine(DENSE, EngineOptions(max_model_len=256))
    with pytest.raises(ShuttingDownError, match="it is new"):
        ask(engine, prompt(100))
    engine.shutdown(drain=True)


# --- On a GPU ---


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_on_a_gpu(kv_cache_dtype: str) -> None:
    """More prompts than may run together, through captured steps; the second time from the prefix cache."""
    model = load_passkey_model("bfloat16", "cuda").with_options(kv_cache_dtype=kv_cache_dtype)
    prompts = [make_prompt(length, depth=0.5, seed=length) for length in (400, 900, 1500, 3000, 5000)]
    with serving(model, max_num_seqs=3) as engine:
        for _ in range(2):
            listeners = [ask(engine, model.tokenizer.encode(text.text), max_new_tokens=40)[0] for text in prompts]
            for text, listener in zip(prompts, listeners, strict=True):
                listener.end()
                assert listener.text.startswith(text.key)
        assert engine.snapshot().prefix_hits > 0
