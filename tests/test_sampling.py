"""The choice of the next token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TINY
from qwen_sparse.engine.sampling import LEAST_TEMPERATURE, SEEDS, Sampler, _exponential

VOCAB = TINY["vocab_size"]
NONE_SEEN = torch.zeros(1, VOCAB, dtype=torch.bool)


def random_logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def sample(sampler: Sampler, logits: Tensor, draw: int = 0, seen: Tensor = NONE_SEEN) -> list[int]:
    return sampler(logits[None], seen, torch.tensor([draw], dtype=torch.int32)).tolist()


def drawn(sampler: Sampler, logits: Tensor, count: int) -> Tensor:
    """How often each token is drawn, ``[vocab]``."""
    seeded = replace(sampler, seed=0)
    return seeded(logits.expand(count, -1), NONE_SEEN, seeded.draws(count)).bincount(minlength=logits.shape[0])


def test_greedy() -> None:
    logits = random_logits()
    expected = [int(logits.argmax())]
    assert sample(Sampler(), logits) == expected
    for draw in range(100):
        assert sample(Sampler(temperature=1.0, top_k=1), logits, draw) == expected
        assert sample(Sampler(temperature=1.0, top_p=1e-6), logits, draw) == expected
        assert sample(Sampler(temperature=1.0, min_p=1.0), logits, draw) == expected


def test_draws_never_take_a_token_that_cannot_come() -> None:
    logits = torch.zeros(VOCAB)
    logits[[0, 100, VOCAB - 1]] = -math.inf
    counts = drawn(Sampler(temperature=1.0), logits, 20 * VOCAB)
    assert (counts == 0).nonzero().flatten().tolist() == [0, 100, VOCAB - 1]


def test_noise_is_exponential_and_independent() -> None:
    """Of a real vocabulary: mean and variance 1, no correlation between tokens or steps, and no two alike."""
    draws, ids = Sampler(seed=3).draws(64), torch.arange(150_000, dtype=torch.int32)
    noise = _exponential(draws, ids).double()
    assert float(noise.min()) > 0
    assert float(noise.mean()) == pytest.approx(1, abs=0.002)
    assert float(noise.var()) == pytest.approx(1, abs=0.01)
    assert float(noise[:, : 10**5].quantile(torch.tensor([0.001], dtype=torch.float64))) == pytest.approx(
        0.001, rel=0.1
    )
    for lag_draws, lag_ids in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        shifted = noise[lag_draws:, lag_ids:]
        first = noise[: noise.shape[0] - lag_draws, : noise.shape[1] - lag_ids]
        assert abs(float(((first - 1) * (shifted - 1)).mean())) < 0.002
    least = noise.argmin(1)
    assert len(set(least.tolist())) == 64
    successive = torch.arange(64, dtype=torch.int32)  # draws that differ in a few bits are as good
    assert len(set(_exponential(successive, ids).argmin(1).tolist())) == 64


def probabilities(logits: Tensor, sampler: Sampler) -> list[float]:
    """What the fields of a sampler say, in plain Python."""
    ranked = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    ranked = ranked[: sampler.top_k or None]
    weights = {token: math.exp(float(logits[token] - logits.max()) / sampler.temperature) for token in ranked}
    if sampler.top_p < 1:
        count, wanted = 1, sampler.top_p * math.fsum(weights.values())
        while math.fsum(weights[token] for token in ranked[:count]) < wanted:
            count += 1
        weights = {token: weights[token] for token in ranked[:count]}
    weights = {token: weight for token, weight in weights.items() if weight >= sampler.min_p}
    total = math.fsum(weights.values())
    return [weights.get(token, 0.0) / total for token in range(len(logits))]


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.3, 1.0, 0, 0.0),
        (2.0, 1.0, 0, 0.0),
        (1.0, 0.9, 0, 0.0),
        (1.0, 0.33, 0, 0.0),
        (1.0, 1.0, 7, 0.0),
        (1.0, 1.0, VOCAB - 1, 0.0),
        (1.0, 1.0, 10**9, 0.0),
        (2.0, 0.9, 40, 0.0),
        (1.0, 1.0, 0, 0.1),
        (2.0, 0.9, 0, 0.3),
        (1.0, 0.9, 40, 0.05),
    ],
)
def test_distribution(temperature: float, top_p: float, top_k: int, min_p: float, ties: bool) -> None:
    """Each token is drawn as often as its probability says: each count is binomial, within 5 standard deviations."""
    sampler, count = Sampler(temperature, top_p, top_k, min_p=min_p), 5000
    logits = random_logits().round() if ties else random_logits()
    expected = torch.tensor(probabilities(logits, sampler), dtype=torch.float64)
    counts = drawn(sampler, logits, count)
    assert not counts[expected == 0].any()
    deviation = (count * expected * (1 - expected)).sqrt()
    assert ((counts - count * expected).abs() <= 5 * deviation + 1).all()
    likely = expected > 0
    chi = float(((counts - count * expected) ** 2 / (count * expected))[likely].sum())
    degrees = int(likely.sum()) - 1
    assert chi <= degrees + 6 * math.sqrt(2 * max(degrees, 1))


def test_top_k_of_equal_logits_takes_the_lowest_tokens() -> None:
    """In a vocabulary of which ``topk`` would take any."""

    def left(logits: Tensor, top_k: int) -> list[int]:
        """Those that are drawn, from the most likely on and by their ids."""
        ids = drawn(Sampler(temperature=4.0, top_k=top_k), logits, 100).nonzero().flatten().tolist()
        return sorted(ids, key=lambda token: (-float(logits[token]), token))

    zeros = torch.zeros(150_000)
    zeros[::2] = -0.0
    assert left(zeros, 4) == [0, 1, 2, 3]
    zeros[140_000] = 0.5
    assert left(zeros, 4) == [140_000, 0, 1, 2]
    negative = torch.full((150_000,), -2.0)
    negative[[70_000, 7]] = -1.0
    negative[9] = -1.5
    assert left(negative, 5) == [7, 70_000, 9, 0, 1]
    signs = torch.full((150_000,), -math.inf)
    signs[[10, 20, 30, 40]] = torch.tensor([-1e-40, 1e-40, -1.0, 0.0])
    assert left(signs, 3) == [20, 40, 10]
    assert left(signs, 6) == [20, 40, 10, 30]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(5e-324, 1), (0.25, 1), (0.5, 2), (math.nextafter(0.5, 1), 3), (math.nextafter(1, 0), 4)]
)
@pytest.mark.parametrize("top_k", [0, 4])
def test_top_p_keeps_the_token_that_reaches_it(top_p: float, kept: int, top_k: int) -> None:
    """Of four whose probabilities are exactly a quarter."""
    logits = torch.full((VOCAB,), -math.inf)
    logits[[3, 50, 51, 200]] = 1.0
    counts = drawn(Sampler(1.0, top_p, top_k), logits, 100)
    assert counts.nonzero().flatten().tolist() == [3, 50, 51, 200][:kept]


class Operations(TorchDispatchMode):
    """Counts torch's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "ranking"),
    [
        ({}, []),
        ({"top_k": VOCAB}, []),
        ({"top_k": 20}, ["topk"]),
        ({"top_k": 20, "top_p": 0.8}, ["topk"]),
        ({"top_p": 0.8}, ["sort"]),
    ],
    ids=str,
)
def test_sorts_no_more_than_it_must(options: dict[str, Any], ranking: list[str]) -> None:
    """A sort of the whole vocabulary takes longer than the rest of a small model's step."""
    with Operations() as operations:
        sample(Sampler(temperature=0.7, **options), random_logits())
    assert "argmax" in operations.names
    assert [name for name in operations.names if name in ("sort", "argsort", "topk")] == ranking


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 50}], ids=str)
def test_batch(limits: dict[str, Any]) -> None:
    """Each sequence by its own logits, history and draw."""
    sampler = Sampler(temperature=0.8, repetition_penalty=1.3, seed=0, **limits)
    logits, seen = torch.stack([random_logits(seed) for seed in range(20)]), torch.rand(20, VOCAB) < 0.3
    draws = sampler.draws(20)
    rows = [sampler(logits[i : i + 1], seen[i : i + 1], draws[i : i + 1]) for i in range(20)]
    assert torch.equal(sampler(logits, seen, draws), torch.cat(rows))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    logits = torch.stack((random_logits(), random_logits()))
    logits[0, 7] = value
    logits[1, 7] = -float("inf")  # a token that cannot come
    sampler = Sampler(temperature=temperature, top_p=0.9)
    assert (sampler(logits, NONE_SEEN, torch.tensor([5, 5], dtype=torch.int32)) < 0).tolist() == [True, False]


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
    counts = sampler(logits.expand(draws, -1), NONE_SEEN, sampler.draws(draws)).bincount(minlength=VOCAB)
    assert not counts[expected == 0].any()
    # Each count is binomial: 5 standard deviations.
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * deviation + 1).all()


def test_repetition_penalty_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    for seed in range(20):
        logits, seen = random_logits(seed), NONE_SEEN.clone()
        prompt = logits.topk(30).indices
        seen[0, prompt] = True
        expected = RepetitionPenaltyLogitsProcessor(1.7)(prompt[None], logits[None].clone())[0].argmax()
        assert sample(Sampler(repetition_penalty=1.7), logits, seen=seen) == [int(expected)]


def test_the_lowest_temperature_takes_the_most_likely_token() -> None:
    logits = torch.full((VOCAB,), -torch.finfo(torch.float32).max)
    logits[[3, 7]] = torch.tensor([1e38, torch.finfo(torch.float32).max])
    assert {sample(Sampler(temperature=LEAST_TEMPERATURE), logits, draw)[0] for draw in range(100)} == {7}


def test_a_rounding_does_not_change_what_is_drawn() -> None:
    """Logits of bfloat16 products differ by about 0.01 between a sequence alone and in a batch."""
    sampler, changed = Sampler(temperature=1.0, seed=1), 0
    generator = torch.Generator().manual_seed(1)
    for step, draw in enumerate(sampler.draws(300)):
        logits = random_logits(step)
        rounded = logits + 0.01 * torch.randn(VOCAB, generator=generator)
        changed += sample(sampler, logits, int(draw)) != sample(sampler, rounded, int(draw))
    assert changed <= 8


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_at_the_bounds(seed: int) -> None:
    assert Sampler(seed=seed).draws(1).tolist() == Sampler(seed=np.array(seed)[()]).draws(1).tolist()


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        tokens: list[int] = sampler(random_logits().expand(20, -1), NONE_SEEN, sampler.draws(20)).tolist()
        return tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
