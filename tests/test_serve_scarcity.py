"""The engine with too little of something: pages, memory, room in the queue, length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.kv_cache import PagedKVCache, kv_cache_bytes
from qwen_sparse.serve import engine as engine_module
from qwen_sparse.serve.engine import Engine, EngineOptions
from qwen_sparse.serve.requests import (
    Event,
    Failed,
    GenerationRequest,
    QueueFullError,
    TooLongError,
)
from serving.asking import DENSE, MODEL, Listener, ask, expected, is_token, prompt, serving


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "repetition_penalty": 1.2, "seed": 5}])
def test_preemption(sampling: dict[str, Any]) -> None:
    """Three grow beyond the pages there are: those that came last wait, and go on where they were."""
    memory = 6 * kv_cache_bytes(MODEL.config, 128, torch.float32)
    prompts = [prompt(200, seed=seed) for seed in range(3)]
    with serving(max_model_len=512, kv_cache_memory=memory, chunk_tokens=128) as engine:
        listeners = [ask(engine, tokens, max_new_tokens=100, sampler=Sampler(**sampling))[0] for tokens in prompts]
        ends = [listener.end() for listener in listeners]
        assert engine.snapshot().preemptions > 0
        assert sum(end.stats.preemptions for end in ends) == engine.snapshot().preemptions
        assert ends[0].stats.preemptions == 0
    for tokens, listener, end in zip(prompts, listeners, ends, strict=True):
        assert listener.tokens == expected(tokens, max_new_tokens=100, **sampling)
        assert end.stats.prompt_tokens == len(tokens)
        assert end.stats.completion_tokens == 100
        assert max(event.processed for event in listener.progress) == len(tokens)


def ask_two(
    engine: Engine, first: GenerationRequest, second: GenerationRequest, *, after: int
) -> tuple[Listener, Listener]:
    """The second is asked for in the engine's thread when the first has so many tokens: it goes the same every time."""
    listeners = Listener(), Listener()

    def listen(event: Event) -> None:
        listeners[0](event)
        if is_token(event) and len(listeners[0].tokens) == after:
            engine.submit(second, listeners[1])

    engine.submit(first, listen)
    return listeners


@pytest.mark.parametrize("attention", ["auto", "sparse"])
def test_what_was_preempted_is_computed_as_the_first_time(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is below the threshold, 2048 tokens; prompt and output are above it. An output is always dense."""
    real, calls = Decoder.forward, []

    def spy(self: Decoder, ids: Tensor, cache: PagedKVCache, **options: Any) -> Tensor | None:
        if cache.capacity >= 2048:
            calls.append((cache.seqlen, cache.seqlen + ids.shape[0], options["sparse"]))
        return real(self, ids, cache, **options)

    model = MODEL.with_options(attention=attention)
    short, long = prompt(20), prompt(2200)[-2040:]
    memory = 19 * kv_cache_bytes(MODEL.config, 128, torch.float32)  # two and 17 pages are in use when an 18th is wanted
    with serving(model, max_model_len=2304, kv_cache_memory=memory, prefix_caching=False) as engine:
        monkeypatch.setattr(Decoder, "forward", spy)
        first, second = ask_two(
            engine,
            GenerationRequest(short, 200, stop_token_ids=frozenset()),
            GenerationRequest(long, 150, stop_token_ids=frozenset()),
            after=1,
        )
        assert first.end().stats.preemptions == 0
        stats = second.end().stats
        monkeypatch.undo()
    sparse = attention == "sparse"
    of_prompt = [(0, 512, sparse), (512, 1024, sparse), (1024, 1536, sparse), (1536, 2040, sparse)]
    assert calls == [*of_prompt, *of_prompt, (2040, 2177, False)]
    assert (stats.preemptions, stats.completion_tokens) == (1, 150)
    assert first.tokens == expected(short, model, max_new_tokens=200)
    assert second.tokens == expected(long, model, max_new_tokens=150)


@pytest.mark.parametrize(("prefix_caching", "again"), [(True, 384), (False, 0)])
def test_preemption_in_the_middle_of_a_prompt(
    prefix_caching: bool, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress goes on from where it was, whether pages of the prompt are still known or have to be computed again."""
    real, starts = Decoder.forward, []

    def spy(self: Decoder, ids: Tensor, cache: PagedKVCache, **options: Any) -> Tensor | None:
        if options["prompt_len"] == 1000:
            starts.append(cache.seqlen)
        return real(self, ids, cache, **options)

    short, long = prompt(100), prompt(1200, seed=1)[-1000:]
    options = {"max_model_len": 1024, "chunk_tokens": 128, "prefix_caching": prefix_caching}
    memory = 9 * kv_cache_bytes(MODEL.config, 128, torch.float32)  # all are in use when the first needs its second
    with serving(kv_cache_memory=memory, **options) as engine:
        monkeypatch.setattr(Decoder, "forward", spy)
        first, second = ask_two(
            engine,
            GenerationRequest(short, 60, stop_token_ids=frozenset()),
            GenerationRequest(long, 20, stop_token_ids=frozenset()),
            after=27,
        )
        assert first.end().stats.preemptions == 0
        stats = second.end().stats
        monkeypatch.undo()
    whole = list(range(0, 1000, 128))
    assert starts == [0, 128, 256, *whole[again // 128 :]]
    assert (stats.preemptions, stats.cached_tokens) == (1, 0)
    assert [event.processed for event in second.progress] == [*whole, 1000]
    assert first.tokens == expected(short, max_new_tokens=60)
    assert second.tokens == expected(long)


def test_queue_is_bounded() -> None:
    with serving(max_num_seqs=1, max_queue=2) as engine:
        running = ask(engine, prompt(100), max_new_tokens=2000)
        running[0].wait_for(is_token)
        waiting = [ask(engine, prompt(100)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already, and max_queue is 2") as error:
            ask(engine, prompt(100))
        assert 1 <= error.value.retry_after <= 600
        assert engine.snapshot().waiting == 2
        running[1].cancel()
        for listener, _ in waiting:
            listener.end()


def test_refused_before_any_work() -> None:
    with serving(max_model_len=256) as engine:
        for most in (None, 7):
            with pytest.raises(TooLongError, match=r"at most 255 tokens, one less than max_model_len, got 256$"):
                ask(engine, [1] * 256, max_new_tokens=most)
        with pytest.raises(ValueError, match=r"shape \[n\] with n >= 1"):
            ask(engine, [])
        with pytest.raises(ValueError, match=r"vocab_size = 264\), got 264"):
            ask(engine, [3, 264])
        with pytest.raises(ValueError, match=r"integers|must be in"):
            ask(engine, [2**70])
        with pytest.raises(ValueError, match="max_new_tokens must be >= 1, got 0"):
            ask(engine, [3], max_new_tokens=0)
        with pytest.raises(ValueError, match=r"logprobs must be in \[0, vocab_size = 264\], got 265"):
            ask(engine, [3], logprobs=265)
        assert engine.snapshot().waiting == 0


def test_the_model_s_limit() -> None:
    """Pages are planned for the length that is taken, which the model's ``max_seq_len`` may make longer or shorter."""
    longer, shorter = replace(DENSE, max_seq_len=2000), replace(DENSE, max_seq_len=300)
    with serving(longer, max_model_len=None, max_num_seqs=1) as engine:
        assert (engine.max_model_len, engine._pages.num_pages) == (2000, 16)
        listener = ask(engine, prompt(1990)[:1980])[0]
        listener.end()
        assert listener.tokens == expected(prompt(1990)[:1980])
    with serving(shorter, max_model_len=None, max_num_seqs=1) as engine:
        assert (engine.max_model_len, engine._pages.num_pages) == (300, 3)
    with pytest.raises(ValueError, match="max_model_len must be at most 300, the model's max_seq_len, got 2048"):
        Engine(shorter, EngineOptions(max_model_len=2048))


def test_short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 10**6
    with serving(max_model_len=4096) as engine:
        running, handle = ask(engine, prompt(100), max_new_tokens=3000)
        running.wait_for(is_token)
        monkeypatch.setattr(engine_module, "available_memory", lambda device: left)
        waits = ask(engine, prompt(3000))[0]
        running.wait_for(lambda event: is_token(event) and len(running.tokens) > 50)
        assert waits.events == []  # the one that runs may give its memory back
        handle.cancel()
        failed = waits.wait_for(lambda event: isinstance(event, Failed))
        assert isinstance(failed, Failed)
        assert failed.retry
        assert "there is no memory for a prompt of 3000 tokens now: its prefill needs" in failed.message.replace(
            f"{len(prompt(3000))}", "3000"
        )
        left = 10**10
        again = ask(engine, prompt(3000))[0]
        assert again.end().reason == "length"


def test_pages_without_memory_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is memory for the work, but not for new pages, those of old prefixes are taken."""
    with serving(max_model_len=4096) as engine:
        ask(engine, prompt(2000))[0].end()
        touched = engine._pages.num_pages - engine._pages.untouched
        needed = 10**8  # more than the prefill; but no page on top
        monkeypatch.setattr(engine_module, "available_memory", lambda device: needed)
        monkeypatch.setattr(engine_module, "prefill_bytes", lambda *args, **kwargs: needed)
        listener = ask(engine, prompt(1000, seed=3), max_new_tokens=1)[0]
        listener.end()
        assert listener.tokens == expected(prompt(1000, seed=3), max_new_tokens=1)
        assert engine._pages.num_pages - engine._pages.untouched == touched
        failed = ask(engine, prompt(3900, seed=4), max_new_tokens=1)[0].wait_for(
            lambda event: isinstance(event, Failed)
        )
        assert isinstance(failed, Failed)
        assert "pages of 128 tokens are not free" in failed.message
