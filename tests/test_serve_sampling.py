"""How the engine chooses tokens: as ``generate`` does, by rules of a request, and seeded, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen_sparse import prefill
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.serve.engine import Engine
from qwen_sparse.serve.requests import LogitRules
from serving.asking import MODEL, ask, expected, prompt, serving


def test_sampling_is_that_of_generate() -> None:
    tokens = prompt(300)
    sampler = Sampler(temperature=1.3, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=5)
    with serving() as engine:
        listeners = [ask(engine, tokens, sampler=sampler)[0] for _ in range(2)]
        other = ask(engine, tokens, sampler=replace(sampler, seed=6))[0]
        other.end()
        for listener in listeners:
            listener.end()
            assert listener.tokens == expected(
                tokens, temperature=1.3, top_p=0.9, top_k=50, repetition_penalty=1.2, seed=5
            )
        assert other.tokens != listeners[0].tokens


def test_rules_of_logits() -> None:
    """Each against what the logits of a greedy answer say; a batch of them at once."""
    tokens = prompt(300)
    rules = {
        "presence": LogitRules(presence_penalty=2.0),
        "frequency": LogitRules(frequency_penalty=2.0),
        "bias": LogitRules(bias={ord("x"): 100.0}),
        "never": LogitRules(bias=dict.fromkeys(range(48, 58), -100.0)),
    }
    with serving() as engine:
        listeners = {name: ask(engine, tokens, rules=rule, max_new_tokens=12)[0] for name, rule in rules.items()}
        plain = ask(engine, tokens, max_new_tokens=12)[0]
        for listener in (plain, *listeners.values()):
            listener.end()
    assert listeners["bias"].tokens == [ord("x")] * 12
    assert not {*listeners["never"].tokens} & {*range(48, 58)}
    for name, power in (("presence", 0), ("frequency", 1)):
        written: list[int] = []
        for token in listeners[name].tokens:
            logits = prefill(MODEL, [*tokens, *written]).logits
            counts = torch.bincount(torch.tensor(written, dtype=torch.int64), minlength=logits.shape[0])
            assert token == int((logits - 2.0 * (counts > 0) * counts.clamp(min=1) ** power).argmax()), name
            written.append(token)


def test_least_number_of_tokens() -> None:
    tokens = prompt(300)
    with serving() as engine:
        first = ask(engine, tokens, max_new_tokens=1)[0]
        first.end()
        ends = frozenset(first.tokens)
        ended = ask(engine, tokens, max_new_tokens=8, stop_token_ids=ends)[0]
        assert ended.end().reason == "stop"
        assert ended.tokens == []
        longer = ask(engine, tokens, max_new_tokens=8, stop_token_ids=ends, rules=LogitRules(min_tokens=8))[0]
        assert longer.end().reason == "length"
        assert len(longer.tokens) == 8
        assert not ends & {*longer.tokens}


REQUESTS, TOKENS = 8, 32


def seeded_answers(engine: Engine, *, batched: bool) -> list[list[int]]:
    listeners = []
    for number in range(REQUESTS):
        tokens = engine.model.tokenizer.encode(f"Once upon a time, number {number}, there was")
        listeners.append(ask(engine, tokens, max_new_tokens=TOKENS, sampler=Sampler(1.0, seed=number))[0])
        if not batched:
            listeners[-1].end()
    for listener in listeners:
        listener.end()
    return [listener.tokens for listener in listeners]


@pytest.mark.released
def test_most_seeded_tokens_are_those_of_the_request_alone(released_cut: Decoder) -> None:
    """Logits of a batch differ by a rounding (docs/serving.md)."""
    with serving(released_cut, max_model_len=256, chunk_tokens=128, prefix_caching=False) as engine:
        alone, again, batch = (seeded_answers(engine, batched=batched) for batched in (False, False, True))
    assert again == alone
    common = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), TOKENS)
        for one, other in zip(alone, batch, strict=True)
    ]
    assert common.count(TOKENS) >= 2, common
    assert sum(common) >= REQUESTS * TOKENS // 2, common
