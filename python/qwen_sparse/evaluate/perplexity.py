"""Perplexity of the same tokens behind contexts of different length.

Windows of a text are predicted, each behind the tokens that stand before it: what changes from length to length is
the context alone. Logits are made of a window, never of the context.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..models.qwen2 import Qwen2Model
from ..prefill import prefill
from .modes import Mode
from .run import check_lengths

__all__ = ["evaluate_perplexity", "window_ends"]

_FEWEST_ROWS = 64  # a prefill chunk of fewer rows would leave the choice of sparse indexes to those


def evaluate_perplexity(
    model: Qwen2Model,
    text: str,
    modes: Sequence[str],
    lengths: Sequence[int],
    *,
    window: int = 256,
    samples: int = 1,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Perplexity per token of ``samples`` windows at each context length.

    Args:
        model: the model; its own mode does not matter.
        text: at least as many tokens as the longest length and ``samples - 1`` further windows.
        modes: names, see :class:`~qwen_sparse.evaluate.Mode`.
        lengths: tokens of context and window together.
        window: tokens that are predicted, >= 64; they run as a prefill chunk of their own, behind that of the context.
        samples: windows, evenly spaced over the part of the text that has the longest context before it.
        progress: show a bar over all tokens.

    Returns:
        An iterator of rows, from the shortest length on, one for each length and mode: their values, ``windows``,
        ``predicted`` (tokens), ``perplexity`` (per token), ``nll_by_window`` (mean negative log-likelihood of a
        token, nats) and ``density`` (of context and window).

    Raises:
        ValueError: a bad argument, a mode that the model cannot run, a text that is too short.
        MemoryError: the longest length does not fit.
    """
    runners = {name: Mode.parse(name).apply(model) for name in modes}
    check_lengths(list(runners.values()), lengths)
    if window < _FEWEST_ROWS:
        raise ValueError(f"window must be >= {_FEWEST_ROWS}, got {window}")
    if min(lengths) <= window:
        raise ValueError(f"length must be above window = {window} for perplexity, got {min(lengths)}")
    tokens = model.tokenizer.encode(text)
    ends = window_ends(len(tokens), max(lengths), window, samples)

    def run() -> Iterator[dict[str, Any]]:
        total = sum(set(lengths)) * len(runners) * len(ends)
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
            for length in sorted(set(lengths)):
                for name, runner in runners.items():
                    bar.set_description(f"perplexity {name}")
                    losses, density = [], 0.0
                    for end in ends:
                        loss, attended = window_loss(runner, tokens[end - length : end], window)
                        losses.append(loss)
                        density += attended / len(ends)
                        bar.update(length)
                    yield {
                        "task": "perplexity",
                        "mode": name,
                        "length": length,
                        "windows": len(ends),
                        "predicted": len(ends) * window,
                        "perplexity": math.exp(sum(losses) / len(losses)),
                        "nll_by_window": losses,
                        "density": density,
                    }

    return run()


def window_ends(num_tokens: int, longest: int, window: int, samples: int) -> list[int]:
    """Where windows end: evenly from the first end that has ``longest`` tokens before it to the text's end.

    Raises:
        ValueError: no sample, or a text too short for that many windows that do not overlap.
    """
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    needed = longest + (samples - 1) * window
    if num_tokens < needed:
        raise ValueError(
            f"the text must have at least {needed} tokens ({longest} and {samples - 1} more windows of {window}), "
            f"got {num_tokens}"
        )
    step = (num_tokens - longest) // max(1, samples - 1)
    return [longest + number * step for number in range(samples)]


def window_loss(model: Qwen2Model, tokens: Sequence[int], window: int) -> tuple[float, float]:
    """Mean negative log-likelihood (nats) of the last ``window`` of these tokens, and the density of both prefills."""
    context = len(tokens) - window
    before = prefill(model, tokens[:context])
    # The context's last position predicts the window's first token, the window's last token predicts nothing here.
    inside = prefill(model, tokens[context:-1], cache=before.cache, logits="all")
    logits = torch.cat((before.logits[None], inside.logits))
    loss = F.cross_entropy(logits, torch.tensor(tokens[context:], device=logits.device))
    pairs = context * (context + 1) // 2, (window - 1) * context + window * (window - 1) // 2
    density = (before.stats.density * pairs[0] + inside.stats.density * pairs[1]) / sum(pairs)
    return float(loss), density
