"""The passkey task, and the shipped model end to end: far beyond its trained length, every way it can run."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen_sparse import demo, passkey, prefill
from qwen_sparse.evaluate import Mode
from qwen_sparse.model.decoder import Decoder


@pytest.mark.parametrize("filler", passkey.FILLERS)
@pytest.mark.parametrize("wording", passkey.WORDINGS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompts_have_their_length_and_hold_their_key(
    filler: passkey.Filler, wording: passkey.Wording, depth: float
) -> None:
    prompt = passkey.make_prompt(4000, depth, seed=3, filler=filler, wording=wording)
    assert len(prompt.text.encode()) == 4000
    assert prompt.text.isascii()
    assert prompt.text.startswith(passkey.HEADER)
    assert prompt.text.endswith("What is the pass key? The pass key is ")
    needle = passkey.statement(prompt.key, wording=wording)
    assert prompt.text.count(needle) == 1
    place = (prompt.text.index(needle) - len(passkey.HEADER)) / (4000 - len(passkey.HEADER))
    assert abs(place - depth) < 0.1


def test_prompts_are_reproducible_and_differ_by_seed() -> None:
    first, again, other = (passkey.make_prompt(1000, 0.5, seed=seed, filler="sentences") for seed in (1, 1, 2))
    assert first == again
    assert first.key != other.key


def test_second_needle_holds_another_number() -> None:
    prompt = passkey.make_prompt(1000, 0.2, seed=1, second_label="door code", second_depth=0.9)
    second = prompt.text[prompt.text.index("The door code is ") + len("The door code is ") :][:5]
    assert second.isdigit()
    assert second != prompt.key
    assert prompt.text.index(second) > prompt.text.index(prompt.key)


def test_evaluation_is_disjoint_from_training() -> None:
    rng = random.Random(0)
    assert all(passkey.is_evaluation_key(passkey.draw_key(rng, split="eval")) for _ in range(100))
    assert not any(passkey.is_evaluation_key(passkey.draw_key(rng, split="train")) for _ in range(100))
    assert not set(passkey.SENTENCES["train"]) & set(passkey.SENTENCES["eval"])
    training, held_out = passkey.source_text("train"), passkey.held_out_source()
    assert len(held_out) > 100_000
    piece = 2000  # more than a licence's text, which files share
    assert not any(held_out[start : start + piece] in training for start in range(0, len(held_out) - piece, 50_000))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length_bytes": 100}, r"length_bytes must be at least \d+ .*, got 100"),
        ({"depth": 1.5}, r"depth must be between 0 and 1, got 1\.5"),
        ({"filler": "novel"}, "filler must be one of .*, got 'novel'"),
        ({"label": "name"}, "label must be one of .*, got 'name'"),
        ({"digits": 1}, "digits must be between 2 and 12, got 1"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        passkey.make_prompt(**{"length_bytes": 1000, "depth": 0.5, "seed": 0, **kwargs})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return demo.load_passkey_model()


def found(model: Decoder, mode: str, length: int, **kwargs: Any) -> list[bool]:
    """Retrieval at depths 0, 0.5 and 1 of prompts of ``length`` trained lengths."""
    prompts = [passkey.make_prompt(length * demo.TRAINED_LENGTH, depth, seed=17, **kwargs) for depth in (0.0, 0.5, 1.0)]
    return [demo.retrieve(model, mode, prompt).correct for prompt in prompts]


@pytest.mark.parametrize("mode", demo.MODES)
def test_trained_length(model: Decoder, mode: str) -> None:
    assert found(model, mode, 1) == [True] * 3


def test_plain_rope_fails_beyond_the_trained_length(model: Decoder) -> None:
    assert found(model, "rope", 16) == [False] * 3


@pytest.mark.parametrize("filler", passkey.FILLERS)
@pytest.mark.parametrize("mode", ["dca", "dca+sparse", "dca+coverage0.8"])
def test_sixteen_times_the_trained_length(model: Decoder, mode: str, filler: passkey.Filler) -> None:
    assert found(model, mode, 16, filler=filler) == [True] * 3


@pytest.mark.parametrize("mode", ["dca", "dca+sparse"])
def test_int8_cache(model: Decoder, mode: str) -> None:
    assert found(model.with_options(kv_cache_dtype="int8"), mode, 16) == [True] * 3


def test_bfloat16() -> None:
    assert found(demo.load_passkey_model("bfloat16"), "dca+sparse", 16) == [True] * 3


@pytest.mark.parametrize("mode", ["dca+sparse", "dca+coverage0.8"])
def test_sixty_four_times_the_trained_length(model: Decoder, mode: str) -> None:
    assert found(model, mode, 64) == [True] * 3


def test_dense_dual_chunk_at_sixty_four_times(model: Decoder) -> None:
    prompt = passkey.make_prompt(64 * demo.TRAINED_LENGTH, 0.5, seed=17)
    assert demo.retrieve(model, "dca", prompt).correct


def answer_log_probability(model: Decoder, prompt: passkey.PasskeyPrompt) -> float:
    """log p(key | prompt), sparse Dual Chunk Attention."""
    runner = Mode.parse("dca+sparse").apply(model)
    first = prefill(runner, runner.tokenizer.encode(prompt.text))
    key = runner.tokenizer.encode(prompt.key)
    rest = prefill(runner, key[:-1], cache=first.cache, logits="all")
    log_probabilities = torch.log_softmax(torch.cat((first.logits[None], rest.logits)), dim=-1)
    return float(log_probabilities[torch.arange(len(key)), key].sum())


def test_the_temperature_of_dual_chunk_attention_is_needed(model: Decoder) -> None:
    """At 64 times the trained length the softmax dilutes: without m squared, keys next to the question are lost."""
    dual_chunk = model.config.dual_chunk
    assert dual_chunk is not None
    untempered = model.with_options(
        config=replace(model.config, dual_chunk=replace(dual_chunk, original_max_position_embeddings=0))
    )
    prompts = [passkey.make_prompt(64 * demo.TRAINED_LENGTH, 1.0, seed=seed) for seed in range(4)]
    tempered = [answer_log_probability(model, prompt) for prompt in prompts]
    plain = [answer_log_probability(untempered, prompt) for prompt in prompts]
    assert min(tempered) > -0.5
    assert sum(plain) / len(plain) < -2
