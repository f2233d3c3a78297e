"""Perplexity of the same tokens behind contexts of different length, and how far modes are from dense attention there.

Measured are either the last tokens of a prompt (its *tail*), or windows that run as prefill chunks of their own behind
their context. What changes from length to length is the context alone. Of a mode that others are compared with, the
hidden states of measured tokens are kept (tokens x hidden size, in the model's dtype), and logits of both are made from
them as often as they are needed, :data:`~qwen_sparse.engine.likelihood.LOGIT_ROWS` rows at a time (151,936 words: 156
MB per mode and as much again for the comparison): no logits of all measured tokens are ever in memory, and none are
rounded.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..base.arguments import check_integer
from ..engine.likelihood import LOGIT_ROWS, last_hidden, of_logits
from ..engine.memory import default_chunk_tokens
from ..engine.prefill import prefill, token_tensor
from ..model.decoder import Decoder
from ..model.stats import ForwardStats
from .modes import Mode
from .run import check_lengths

__all__ = [
    "Divergence",
    "Predictions",
    "divergence",
    "evaluate_perplexity",
    "predict_tail",
    "predict_window",
    "references_of",
    "window_ends",
]

_FEWEST_ROWS = 64  # a prefill chunk of fewer rows would leave the choice of sparse indexes to those


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts of n consecutive tokens, kept as hidden states."""

    model: Decoder
    first: Tensor
    """float32 ``[0 or 1, vocab]``: logits of the first token, where they were made apart."""
    hidden: Tensor
    """``[n or n - 1, hidden]``, behind the final norm: what the others' logits are made of."""
    targets: Tensor
    """int64 ``[n]``, the tokens."""
    density: float
    """Attended over causal pairs of the prompt."""

    def logits(self) -> Iterator[Tensor]:
        """float32 ``[m, vocab]``, m <= :data:`~qwen_sparse.engine.likelihood.LOGIT_ROWS`, n rows in all."""
        if len(self.first):
            yield self.first.clone()  # callers may change what they get
        for rows in torch.split(self.hidden, LOGIT_ROWS):
            yield self.model.logits(rows)

    @torch.inference_mode()
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, nats."""
        total, done = 0.0, 0
        for logits in self.logits():
            found = of_logits(logits, self.targets[done : done + len(logits)])
            total -= float(found.log_probability.double().sum())
            done += len(logits)
        return total / done


class Divergence(NamedTuple):
    """How far one model's predictions are from a reference's, means over tokens."""

    kl: float
    """KL(reference || model), nats."""
    same_top: float
    """Share of tokens with the same most likely token."""


@torch.inference_mode()
def divergence(reference: Predictions, other: Predictions) -> Divergence:
    """Of two models' predictions of the same tokens, made in the same way.

    Raises:
        ValueError: predictions of other tokens.
    """
    if not torch.equal(reference.targets, other.targets) or len(reference.first) != len(other.first):
        raise ValueError(
            f"divergence: both must predict the same tokens, got {len(reference.targets)} and {len(other.targets)}"
        )
    kl, same = 0.0, 0
    for expected, found in zip(reference.logits(), other.logits(), strict=True):
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        expected -= expected.logsumexp(1, keepdim=True)
        found -= found.logsumexp(1, keepdim=True)
        found.neg_().add_(expected)  # of log probabilities, reference - other
        kl += float(found.mul_(expected.exp_()).sum(1).double().sum())
    return Divergence(kl / len(reference.targets), same / len(reference.targets))


def predict_tail(model: Decoder, tokens: Sequence[int], tail: int) -> Predictions:
    """Of the last ``tail`` of these tokens (fewer than all), which are prefilled as one prompt."""
    prompt, stats = token_tensor(model, tokens), ForwardStats(model.device)
    hidden = last_hidden(
        model,
        prompt,
        tail + 1,  # the last row predicts nothing here
        model.new_cache(len(tokens)),
        sparse=model.prefills_sparse(len(tokens)),
        chunk_tokens=default_chunk_tokens(model.device),
        stats=stats,
    )
    rows = torch.cat(list(hidden))[:-1]
    none = torch.empty(0, model.config.vocab_size, device=model.device)
    return Predictions(model, none, rows, prompt[-tail:], stats.attended_pairs / stats.causal_pairs)


def predict_window(model: Decoder, tokens: Sequence[int], window: int) -> Predictions:
    """Of the last ``window`` of these tokens, which run as a prefill chunk of their own behind that of the others."""
    context, stats = len(tokens) - window, ForwardStats(model.device)
    before = prefill(model, tokens[:context])
    # The context's last position predicts the window's first token, the window's last token predicts nothing here.
    hidden = last_hidden(
        model,
        token_tensor(model, tokens[context:-1]),
        window - 1,
        before.cache,
        sparse=model.prefills_sparse(len(tokens) - 1),
        chunk_tokens=default_chunk_tokens(model.device),
        stats=stats,
    )
    rows = torch.cat(list(hidden))
    pairs = context * (context + 1) // 2, (window - 1) * context + window * (window - 1) // 2
    density = (before.stats.density * pairs[0] + stats.attended_pairs / stats.causal_pairs * pairs[1]) / sum(pairs)
    return Predictions(model, before.logits[None], rows, token_tensor(model, tokens[context:]), density)


def evaluate_perplexity(
    model: Decoder,
    text: str,
    modes: Sequence[str],
    lengths: Sequence[int],
    *,
    window: int = 256,
    tail: int | None = None,
    samples: int = 1,
    reference: str | None = None,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Perplexity per token of ``samples`` windows (or tails) at each context length, and distances between modes.

    Args:
        model: the model; its own mode does not matter.
        text: at least as many tokens as the longest length and ``samples - 1`` further windows.
        modes: names, see :class:`~qwen_sparse.evaluate.Mode`.
        lengths: tokens of context and window together.
        window: tokens that are predicted, >= 64; they run as a prefill chunk of their own, behind that of the context.
        tail: instead of windows: that many last tokens of prompts of each length, each prefilled as one.
        samples: windows, evenly spaced over the part of the text that has the longest context before it.
        reference: the mode that all are compared with, one of ``modes``; None: each with the dense mode of its own
            rotation and the KV cache in the model's dtype (``rope`` or ``dca``), where that is among ``modes``.
        progress: show a bar over all tokens.

    Returns:
        An iterator of rows, from the shortest length on, one for each length and mode (references first): their
        values, ``windows``, ``predicted`` (tokens), ``perplexity`` (per token), ``nll_by_window`` (mean negative
        log-likelihood of a token, nats) and ``density`` (of context and window). Rows that have a ``reference`` (its
        name) also have ``kl`` (mean over the predicted tokens of KL(reference || mode), nats) and ``same_top`` (share
        of tokens with the reference's most likely token).

    Raises:
        ValueError: a bad argument, a mode that the model cannot run, a text that is too short.
        MemoryError: the longest length does not fit.
    """
    runners = {name: Mode.parse(name).apply(model) for name in modes}
    check_lengths(list(runners.values()), lengths)
    if tail is None:
        window, kind = check_integer("window", window, least=_FEWEST_ROWS), "window"
    else:
        window, kind = check_integer("tail", tail, least=1), "tail"
    if min(lengths) <= window:
        raise ValueError(f"length must be above {kind} = {window} for perplexity, got {min(lengths)}")
    references = references_of(modes, reference)
    tokens = model.tokenizer.encode(text)
    ends = window_ends(len(tokens), max(lengths), window, samples)
    ordered = sorted(runners, key=lambda name: name not in references.values())
    predict = predict_window if tail is None else predict_tail

    def run() -> Iterator[dict[str, Any]]:
        total = sum(set(lengths)) * len(runners) * len(ends)
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
            for length in sorted(set(lengths)):
                kept: dict[str, list[Predictions]] = {}
                for name in ordered:
                    bar.set_description(f"perplexity {name}")
                    losses, densities, distances = [], [], []
                    for number, end in enumerate(ends):
                        found = predict(runners[name], tokens[end - length : end], window)
                        if name in references.values():
                            kept.setdefault(name, []).append(found)
                        if name in references:
                            other = kept[references[name]][number]
                            distances.append(Divergence(0.0, 1.0) if other is found else divergence(other, found))
                        losses.append(found.loss())
                        densities.append(found.density)
                        bar.update(length)
                    row = {
                        "task": "perplexity",
                        "mode": name,
                        "length": length,
                        "windows": len(ends),
                        "predicted": len(ends) * window,
                        "perplexity": math.exp(statistics.fmean(losses)),
                        "nll_by_window": losses,
                        "density": statistics.fmean(densities),
                    }
                    if name in references:
                        row["reference"] = references[name]
                        row["kl"] = statistics.fmean(distance.kl for distance in distances)
                        row["same_top"] = statistics.fmean(distance.same_top for distance in distances)
                    yield row

    return run()


def references_of(modes: Sequence[str], reference: str | None = None) -> dict[str, str]:
    """The reference of each mode that has one; see :func:`evaluate_perplexity`.

    Raises:
        ValueError: ``reference`` is not one of the modes.
    """
    if reference is not None and reference not in modes:
        raise ValueError(f"reference must be one of the modes {', '.join(modes)}, got {reference!r}")
    own = {name: reference or Mode(Mode.parse(name).dual_chunk).name for name in modes}
    return {name: other for name, other in own.items() if other in modes}


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
