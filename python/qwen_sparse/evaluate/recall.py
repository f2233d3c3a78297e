"""What sparse prefill keeps of the attention of a prompt, head by head, at each length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..calibrate import measure_budgets, synthetic_tokens
from ..model.decoder import Decoder
from .modes import Mode, default_modes
from .run import check_lengths

__all__ = ["evaluate_recall", "sparse_modes"]


def sparse_modes(model: Decoder) -> list[str]:
    """Of the default modes, those that recall is measured of.

    Raises:
        ValueError: none.
    """
    names = [name for name in default_modes(model) if Mode.parse(name).sparse]
    if not names:
        raise ValueError("modes must be given: this model has no budgets that recall could be measured of")
    return names


def evaluate_recall(
    model: Decoder,
    text: str | None,
    modes: Sequence[str],
    lengths: Sequence[int],
    *,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Recall and density of every head on the first tokens of a text; see :mod:`qwen_sparse.calibrate`.

    Queries and keys are exact: those of dense attention in all layers before.

    Args:
        model: the model; its own mode does not matter.
        text: at least as many tokens as the longest length; None: a generated passkey prompt of each length.
        modes: sparse ones, without int8 (keys are read as the model computes them).
        lengths: tokens.
        seed: of generated prompts.
        progress: show a bar over layers for each row.

    Returns:
        An iterator of rows, from the shortest length on, one for each length and mode: their values, ``recall`` (mean
        over heads), ``lowest_recall``, ``density``, and ``recall_by_head`` and ``density_by_head`` (lists by layer).

    Raises:
        ValueError: a bad argument, a mode that is not sparse or that the model cannot run, a text that is too short.
        MemoryError: the longest length does not fit.
    """
    runners = {name: Mode.parse(name).apply(model) for name in modes}
    budgets = {}
    for name, runner in runners.items():
        if runner.config.sparse is None or runner.attention != "sparse" or Mode.parse(name).int8:
            raise ValueError(f"modes must be sparse ones without int8 for recall, got {name!r}")
        budgets[name] = runner.config.sparse
    check_lengths(list(runners.values()), lengths)
    tokens = None if text is None else model.tokenizer.encode(text)
    if tokens is not None and len(tokens) < max(lengths):
        raise ValueError(f"the text must have at least {max(lengths)} tokens, got {len(tokens)}")
    prompts = {n: synthetic_tokens(model, n, seed) if tokens is None else tokens[:n] for n in sorted(set(lengths))}

    def run() -> Iterator[dict[str, Any]]:
        for length, prompt in prompts.items():
            for name, runner in runners.items():
                found = measure_budgets(runner, prompt, budgets[name], progress=progress)
                by_head = [
                    [(head.recall, head.attended / found.causal_pairs) for head in layer] for layer in found.layers
                ]
                recalls, densities = ([[head[part] for head in layer] for layer in by_head] for part in (0, 1))
                yield {
                    "task": "recall",
                    "mode": name,
                    "length": length,
                    "recall": found.recall,
                    "lowest_recall": min(map(min, recalls)),
                    "density": found.density,
                    "recall_by_head": recalls,
                    "density_by_head": densities,
                }

    return run()
