"""Sampling, stop strings, streaming, end tokens, and prompt truncation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, TINY, WriteCheckpoint, byte_tokenizer
from qwen_sparse import Tokenizer, generate, generate_text, load_model, prefill, truncate_prompt
from qwen_sparse.generate import Sampler, StopStrings
from qwen_sparse.models.qwen2 import Qwen2Model

VOCAB = TINY["vocab_size"]
NONE_SEEN = torch.zeros(VOCAB, dtype=torch.bool)


@pytest.fixture
def model(write_checkpoint: WriteCheckpoint) -> Qwen2Model:
    return load_model(write_checkpoint(tokenizer=True, dual_chunk_attention_config=DUAL_CHUNK))


def random_logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


PROMPT = list(b"The grass is green. The sky is blue.")


# --- Sampler ---


def test_greedy() -> None:
    logits = random_logits()
    assert Sampler()(logits, NONE_SEEN) == int(logits.argmax())
    assert Sampler(temperature=1.0, top_k=1)(logits, NONE_SEEN) == int(logits.argmax())
    assert Sampler(temperature=1.0, top_p=1e-6)(logits, NONE_SEEN) == int(logits.argmax())


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.7, 0), (1.0, 1.0, 5), (0.8, 0.6, 12)]
)
def test_distribution_of_transformers(temperature: float, top_p: float, top_k: int) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits()
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped[0].softmax(-1)
    sampler, draws = Sampler(temperature, top_p, top_k, seed=0), 4000
    counts = torch.zeros(VOCAB)
    for _ in range(draws):
        counts[sampler(logits, NONE_SEEN)] += 1
    assert not counts[expected == 0].any()
    # Each count is binomial: 5 standard deviations.
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * deviation + 1).all()


def test_repetition_penalty_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    for seed in range(20):
        logits, seen = random_logits(seed), NONE_SEEN.clone()
        prompt = logits.topk(30).indices
        seen[prompt] = True
        expected = RepetitionPenaltyLogitsProcessor(1.7)(prompt[None], logits[None].clone())[0].argmax()
        assert Sampler(repetition_penalty=1.7)(logits, seen) == int(expected)


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler(random_logits(), NONE_SEEN) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"stop": ["a", ""]}, "stop must be non-empty strings"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
    ],
)
def test_bad_options_are_refused_at_the_call(model: Qwen2Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **options)  # not even iterated


# --- Tokens ---


def greedy(model: Qwen2Model, ids: list[int], n: int) -> list[int]:
    """By a whole prefill per token."""
    tokens: list[int] = []
    for _ in range(n):
        tokens.append(int(prefill(model, ids + tokens).logits.argmax()))
    return tokens


def test_greedy_tokens(model: Qwen2Model) -> None:
    assert list(generate(model, PROMPT, max_new_tokens=12)) == greedy(model, PROMPT, 12)


def test_end_tokens(model: Qwen2Model) -> None:
    expected = greedy(model, PROMPT, 10)
    end = expected[5]
    before = expected[: expected.index(end)]
    ending = model.with_options(config=replace(model.config, eos_token_ids=(end,)))
    assert list(generate(ending, PROMPT, max_new_tokens=10)) == before
    assert list(generate(ending, PROMPT, max_new_tokens=10, stop_token_ids=())) == expected
    assert list(generate(model, PROMPT, max_new_tokens=10, stop_token_ids=[end])) == before


def test_sampling_is_repeatable(model: Qwen2Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}
    first = list(generate(model, PROMPT, seed=3, **options))
    assert first == list(generate(model, PROMPT, seed=3, **options))
    assert first != list(generate(model, PROMPT, seed=4, **options))


def test_repetition_penalty_sees_prompt_and_output(model: Qwen2Model) -> None:
    tokens = list(generate(model, PROMPT, max_new_tokens=30, repetition_penalty=1e9))
    assert len(set(tokens) | set(PROMPT)) == 30 + len(set(PROMPT))  # nothing is said twice


def test_continuing_a_conversation(model: Qwen2Model) -> None:
    cache = model.new_cache()
    answer = list(generate(model, PROMPT, max_new_tokens=6, cache=cache))
    assert cache.seqlen == len(PROMPT) + 5  # all but the last token
    turn = [answer[-1], *b" And?"]
    continued = list(generate(model, turn, max_new_tokens=6, cache=cache))
    assert continued == greedy(model, [*PROMPT, *answer, *b" And?"], 6)


def test_length_is_checked_with_the_output(model: Qwen2Model) -> None:
    limited = replace(model, max_seq_len=len(PROMPT) + 5)
    assert len(list(generate(limited, PROMPT, max_new_tokens=5))) == 5
    with pytest.raises(ValueError, match=rf"got 0 cached \+ {len(PROMPT)} prompt \+ 6 new"):
        generate(limited, PROMPT, max_new_tokens=6)


# --- Text ---


REAL_FORWARD = Qwen2Model.forward


class Scripted:
    """Stands in for the forward pass: the model says ``text``, one byte per token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        self.script = text.encode()
        self.produced = 0

        def forward(model: Qwen2Model, input_ids: Tensor, cache: Any, **options: Any) -> Tensor:
            REAL_FORWARD(model, input_ids, cache, **options)
            logits = torch.zeros(VOCAB)
            logits[self.script[self.produced]] = 1.0
            self.produced += 1
            return logits

        monkeypatch.setattr(Qwen2Model, "forward", forward)


def test_text_streams_whole_characters(model: Qwen2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Grüße, 世界 🙂"
    Scripted(monkeypatch, text)
    pieces = list(generate_text(model, "Hi", max_new_tokens=len(text.encode())))
    assert pieces == list(text)


def test_cut_inside_a_character(model: Qwen2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, "aé")
    assert list(generate_text(model, "Hi", max_new_tokens=2)) == ["a", "\ufffd"]


def test_stop_string(model: Qwen2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, "one END two ENDE three")
    pieces = list(generate_text(model, "Hi", max_new_tokens=22, stop="ENDE"))
    assert "".join(pieces) == "one END two "
    assert "END " in pieces  # held back until the space showed that it is not the stop string
    assert script.produced == len("one END two ENDE")  # nothing is computed behind it
    Scripted(monkeypatch, "one END two ENDE three")
    tokens = list(generate(model, list(b"Hi"), max_new_tokens=22, stop=["ENDE", "nothing"]))
    assert bytes(tokens) == b"one END two ENDE"


def test_nothing_follows_a_stop_string() -> None:
    stopper = StopStrings(["b"])
    assert stopper.push("abc") == "a"
    assert stopper.push("more") == ""
    assert stopper.flush() == ""


def test_unfinished_stop_string_is_text(model: Qwen2Model, monkeypatch: pytest.MonkeyPatch) -> None:
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
