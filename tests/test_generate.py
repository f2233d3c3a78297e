"""Generation: end tokens, stop strings, streaming, and prompt truncation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, TINY, WriteCheckpoint, byte_tokenizer
from qwen_sparse import PagedKVCache, Tokenizer, generate, generate_text, load_model, prefill, truncate_prompt
from qwen_sparse.engine.decoding import decode
from qwen_sparse.engine.generate import StopStrings
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.tokenizer import StreamDecoder

VOCAB = TINY["vocab_size"]
NONE_SEEN = torch.zeros(1, VOCAB, dtype=torch.bool)


@pytest.fixture
def model(write_checkpoint: WriteCheckpoint) -> Decoder:
    return load_model(write_checkpoint(tokenizer=True, dual_chunk_attention_config=DUAL_CHUNK))


PROMPT = list(b"The grass is green. The sky is blue.")


# --- Options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0 and finite, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"stop": ["a", ""]}, "stop must be non-empty strings"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 1, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer >= 1, got True"),
        ({"chunk_tokens": 1.5}, "chunk_tokens must be an integer >= 1, got 1.5"),
        ({"top_k": 1.5}, "top_k must be an integer >= 0, got 1.5"),
        ({"top_p": "1"}, "top_p must be a number, got '1'"),
        ({"seed": 2**64}, rf"seed must be in \[-{2**63}, {2**64 - 1}\], got {2**64}"),
        ({"seed": -(2**63) - 1}, r"seed must be in \["),
        ({"seed": "a"}, r"seed must be an integer in \[.*\], got 'a'"),
        ({"temperature": 1e-310}, "temperature must be 0 or >= 1e-250, got 1e-310"),
        ({"temperature": float("nan")}, "temperature must be >= 0 and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be >= 0 and finite, got inf"),
        ({"cached_ids": [1.5]}, "cached_ids must be integers, got torch.float32"),
        ({"cached_ids": torch.tensor(3)}, r"cached_ids must have shape \[n\] with n >= 0, got \[\]"),
        ({"cached_ids": [260]}, r"cached_ids must be in \[0, vocab_size = 260\), got 260"),
        ({"stop_token_ids": "ab"}, "stop_token_ids must be token ids .* got a string"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be a flat sequence of integers"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be integers, got torch.float32"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids must be in \[0, vocab_size = 260\), got -1"),
        ({"stop_token_ids": 5}, r"stop_token_ids must have shape \[n\]"),
    ],
)
def test_bad_options_are_refused_at_the_call(model: Decoder, options: dict[str, Any], message: str) -> None:
    for call in (generate, generate_text):
        with pytest.raises(ValueError, match=message):
            call(model, PROMPT, **options)  # not even iterated


def test_an_empty_prompt_is_named(model: Decoder) -> None:
    with pytest.raises(ValueError, match="prompt must have at least one token, got ''"):
        generate_text(model, "")


# --- Tokens ---


def greedy(model: Decoder, ids: list[int], n: int) -> list[int]:
    """By a whole prefill per token."""
    tokens: list[int] = []
    for _ in range(n):
        tokens.append(int(prefill(model, ids + tokens).logits.argmax()))
    return tokens


def test_greedy_tokens(model: Decoder) -> None:
    assert list(generate(model, PROMPT, max_new_tokens=12)) == greedy(model, PROMPT, 12)


def test_end_tokens(model: Decoder) -> None:
    expected = greedy(model, PROMPT, 10)
    end = expected[5]
    before = expected[: expected.index(end)]
    ending = model.with_options(config=replace(model.config, eos_token_ids=(end,)))
    assert list(generate(ending, PROMPT, max_new_tokens=10)) == before
    assert list(generate(ending, PROMPT, max_new_tokens=10, stop_token_ids=())) == expected
    for stop in (
        [end],
        {end},
        np.array([end], np.uint16),
        torch.tensor([end]),
        torch.tensor([end], dtype=torch.uint16),
    ):
        assert list(generate(model, PROMPT, max_new_tokens=10, stop_token_ids=stop)) == before


def test_sampling_is_repeatable(model: Decoder) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}
    first = list(generate(model, PROMPT, seed=3, **options))
    assert first == list(generate(model, PROMPT, seed=3, **options))
    assert first != list(generate(model, PROMPT, seed=4, **options))


def test_repetition_penalty_sees_prompt_and_output(model: Decoder) -> None:
    tokens = list(generate(model, PROMPT, max_new_tokens=30, repetition_penalty=1e9))
    assert len(set(tokens) | set(PROMPT)) == 30 + len(set(PROMPT))  # nothing is said twice


def test_continuing_a_conversation(model: Decoder) -> None:
    cache = model.new_cache()
    answer = list(generate(model, PROMPT, max_new_tokens=6, cache=cache))
    assert cache.seqlen == len(PROMPT) + 5  # all but the last token
    turn = [answer[-1], *b" And?"]
    continued = list(generate(model, turn, max_new_tokens=6, cache=cache))
    assert continued == greedy(model, [*PROMPT, *answer, *b" And?"], 6)


@pytest.mark.parametrize("ahead", [0, 1])
def test_cache_between_tokens_and_behind_them(model: Decoder, ahead: int) -> None:
    """All tokens but the last, however the output ends; also where a step runs ahead of the reader."""
    expected = greedy(model, PROMPT, 8)
    end = next(token for token in expected[3:] if token not in expected[:3])

    def run(count: int, ends: tuple[int, ...] = ()) -> tuple[Iterator[int], PagedKVCache]:
        cache = model.new_cache(len(PROMPT) + count)
        logits = prefill(model, PROMPT, cache=cache).logits
        options = {"sampler": Sampler(), "max_new_tokens": count, "ends": ends, "ahead": ahead}
        return decode(model, cache, logits[None], NONE_SEEN.clone(), **options), cache

    tokens, cache = run(8)
    for number, token in enumerate(tokens):
        assert token == expected[number]
        assert cache.seqlen == len(PROMPT) + number
    assert number == 7
    tokens, cache = run(8, (end,))
    before = list(tokens)
    assert before == expected[: expected.index(end)]
    assert cache.seqlen == len(PROMPT) + len(before) - 1
    tokens, cache = run(8)
    first = [next(tokens), next(tokens), next(tokens)]
    del tokens  # left early: the cache goes on from there
    assert cache.seqlen == len(PROMPT) + 2
    assert first == expected[:3]
    assert list(generate(model, first[-1:], cache=cache, max_new_tokens=5)) == expected[3:]


@pytest.mark.parametrize("change", ["truncate", "reserve", "prefill"])
def test_cache_must_not_change_between_tokens(model: Decoder, change: str) -> None:
    cache = model.new_cache()
    tokens = generate(model, PROMPT, cache=cache, stop_token_ids=())
    next(tokens)
    if change == "truncate":
        cache.truncate(3)
    elif change == "reserve":
        cache.reserve(10_000)
    else:
        prefill(model, PROMPT, cache=cache)
    with pytest.raises(RuntimeError, match=rf"must not be changed .* had {len(PROMPT)} tokens in 3 pages, and now has"):
        next(tokens)


def test_cache_is_freed_at_once(model: Decoder) -> None:
    """Not when the garbage collector finds a cycle: on a GPU, gigabytes would wait for it."""
    cache = model.new_cache()
    freed = weakref.ref(cache)
    tokens = generate(model, PROMPT, cache=cache, stop_token_ids=())
    next(tokens), next(tokens)
    gc.disable()
    try:
        del tokens, cache
        assert freed() is None
    finally:
        gc.enable()


def test_logits_of_a_broken_model(model: Decoder) -> None:
    broken = replace(model, weights=replace(model.weights, norm=model.weights.norm * torch.nan))
    with pytest.raises(RuntimeError, match="the logits of new token 0 are not finite"):
        next(generate(broken, PROMPT, temperature=1.0))


def test_the_longest_sequence_ends_the_output(model: Decoder) -> None:
    limited = replace(model, max_seq_len=len(PROMPT) + 5)
    expected = list(generate(model, PROMPT, max_new_tokens=9))
    assert list(generate(limited, PROMPT, max_new_tokens=5)) == expected[:5]
    assert list(generate(limited, PROMPT, max_new_tokens=6)) == expected[:5]
    cache = limited.new_cache()
    list(generate(limited, PROMPT, max_new_tokens=3, cache=cache))
    assert list(generate(limited, expected[2:3], max_new_tokens=1000, cache=cache)) == expected[3:5]
    full = replace(model, max_seq_len=len(PROMPT))
    with pytest.raises(ValueError, match=rf"got 0 cached \+ {len(PROMPT)} prompt \+ 1 new"):
        generate(full, PROMPT)


# --- Text ---


REAL_FORWARD = Decoder.forward


class Scripted:
    """Stands in for the forward passes: the model says ``text``, one byte per token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        self.script = text.encode()
        self.produced = 0

        def forward(model: Decoder, input_ids: Tensor, cache: Any, **options: Any) -> Tensor:
            REAL_FORWARD(model, input_ids, cache, **options)
            return self.logits()

        monkeypatch.setattr(Decoder, "forward", forward)
        monkeypatch.setattr(Decoder, "decode_step", lambda *arguments: self.logits()[None])

    def logits(self) -> Tensor:
        logits = torch.zeros(VOCAB)
        logits[self.script[self.produced]] = 1.0
        self.produced += 1
        return logits


def test_text_streams_whole_characters(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Grüße, 世界 🙂"
    Scripted(monkeypatch, text)
    pieces = list(generate_text(model, "Hi", max_new_tokens=len(text.encode())))
    assert pieces == list(text)


def test_cut_inside_a_character(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, "aé")
    assert list(generate_text(model, "Hi", max_new_tokens=2)) == ["a", "\ufffd"]


def test_stop_string(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, "one END two ENDE three")
    pieces = list(generate_text(model, "Hi", max_new_tokens=22, stop="ENDE"))
    assert "".join(pieces) == "one END two "
    assert "END " in pieces  # held back until the space showed that it is not the stop string
    assert script.produced == len("one END two ENDE")  # nothing is computed behind it
    Scripted(monkeypatch, "one END two ENDE three")
    tokens = list(generate(model, list(b"Hi"), max_new_tokens=22, stop=["ENDE", "nothing"]))
    assert bytes(tokens) == b"one END two ENDE"


def test_tokens_are_decoded_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[int] = []
    push = StreamDecoder.push
    monkeypatch.setattr(StreamDecoder, "push", lambda self, token: pushed.append(token) or push(self, token))
    Scripted(monkeypatch, "one END two")
    assert "".join(generate_text(model, "Hi", max_new_tokens=11, stop=["END"])) == "one "
    assert bytes(pushed) == b"one END"


def test_nothing_follows_a_stop_string() -> None:
    stopper = StopStrings(["b"])
    assert stopper.push("abc") == "a"
    assert stopper.push("more") == ""
    assert stopper.flush() == ""


def test_unfinished_stop_string_is_text(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, "fine EN")
    assert "".join(generate_text(model, "Hi", max_new_tokens=7, stop=["END"])) == "fine EN"


def test_tokenizer_can_be_given(write_checkpoint: WriteCheckpoint) -> None:
    bare = load_model(write_checkpoint(), max_seq_len=100)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        generate_text(bare, "Hi")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        generate(bare, [1], stop="x", max_new_tokens=4)
    tokenizer = Tokenizer(byte_tokenizer())
    text = "".join(generate_text(bare, "Hi", max_new_tokens=4, tokenizer=tokenizer))
    assert text == tokenizer.decode(list(generate(bare, list(b"Hi"), max_new_tokens=4)))


@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("abcabd", ["abd"], "abc", "abd"),
        ("aaab", ["aab"], "a", "aab"),
        ("xyz", ["yz", "xy"], "", "xy"),
        ("xyz", ["x", "xy"], "", "x"),
        ("abcd", ["bcd", "c"], "ab", "c"),  # the first to be complete
        ("abcd", ["cd", "bcd"], "a", "bcd"),
        ("abab", ["abc"], "abab", None),
        ("text", [], "text", None),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_stop_strings(text: str, stop: list[str], expected: str, found: str | None, size: int) -> None:
    stopper = StopStrings(stop)
    shown = [stopper.push(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(shown) + stopper.flush() == expected
    assert stopper.found == found


# --- truncate_prompt ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_tokens": 4, "keep": "head"}, [0, 1, 2, 3]),
        ({"max_tokens": 4, "keep": "tail"}, [6, 7, 8, 9]),
        ({"max_tokens": 4}, [0, 1, 8, 9]),
        ({"max_tokens": 5}, [0, 1, 2, 8, 9]),
        ({"max_tokens": 5, "head_tokens": 1}, [0, 6, 7, 8, 9]),
        ({"max_tokens": 5, "head_tokens": 0}, [5, 6, 7, 8, 9]),
        ({"max_tokens": 5, "head_tokens": 5}, [0, 1, 2, 3, 4]),
        ({"max_tokens": 1, "keep": "tail"}, [9]),
        ({"max_tokens": 10, "keep": "tail"}, list(range(10))),
    ],
)
def test_truncate_prompt(options: dict[str, Any], expected: list[int]) -> None:
    ids = list(range(10))
    assert truncate_prompt(ids, **options) == expected
    assert truncate_prompt(torch.tensor(ids), **options).tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"max_tokens": 3, "keep": "middle"}, "keep must be 'head', 'tail' or 'both', got 'middle'"),
        ({"max_tokens": 3, "keep": "tail", "head_tokens": 1}, "head_tokens goes with keep='both' only"),
        ({"max_tokens": 3, "head_tokens": 4}, r"head_tokens must be in \[0, max_tokens = 3\], got 4"),
    ],
)
def test_truncate_prompt_rules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate_prompt([1, 2, 3, 4], **options)
