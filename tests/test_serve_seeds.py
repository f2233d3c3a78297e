"""Seeded answers alone and in a batch, whose logits differ by a rounding (docs/serving.md)."""

from __future__ import annotations

import threading

import pytest

from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.serve.engine import Engine
from qwen_sparse.serve.plan import EngineOptions
from qwen_sparse.serve.requests import Event, Failed, Finished, GenerationRequest, NewToken

REQUESTS, TOKENS = 8, 32


class Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, NewToken):
            self.tokens.append(event.token_id)
        if isinstance(event, (Finished, Failed)):
            self.ended.set()


def answers(engine: Engine, *, batched: bool) -> list[list[int]]:
    heard = []
    for number in range(REQUESTS):
        prompt = engine.model.tokenizer.encode(f"Once upon a time, number {number}, there was")
        sampler, listener = Sampler(1.0, seed=number), Heard()
        request = GenerationRequest(prompt=prompt, max_new_tokens=TOKENS, sampler=sampler, stop_token_ids=frozenset())
        engine.submit(request, listener)
        heard.append(listener)
        if not batched:
            assert listener.ended.wait(60)
    assert all(listener.ended.wait(60) for listener in heard)
    return [listener.tokens for listener in heard]


@pytest.mark.released
def test_most_seeded_tokens_are_those_of_the_request_alone(released_cut: Decoder) -> None:
    """Drawn by where a number falls among all tokens, no answer of eight was the same: rounding moves every token."""
    engine = Engine(released_cut, EngineOptions(max_model_len=256, chunk_tokens=128, prefix_caching=False))
    engine.start()
    try:
        alone, again, batch = (answers(engine, batched=batched) for batched in (False, False, True))
    finally:
        engine.shutdown(drain=False)
    assert again == alone
    common = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), TOKENS)
        for one, other in zip(alone, batch, strict=True)
    ]
    assert common.count(TOKENS) >= 2, common
    assert sum(common) >= REQUESTS * TOKENS // 2, common
