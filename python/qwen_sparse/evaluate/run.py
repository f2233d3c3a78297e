"""Ask prompts of every length and depth in every mode."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..engine.generate import generate
from ..engine.memory import default_chunk_tokens
from ..engine.prefill import check_request, prefill
from ..model.decoder import Decoder
from .modes import Mode
from .prompts import Prompt, Task, make_prompt
from .scoring import exact_match, score

__all__ = ["WRONG_SHOWN", "Answer", "answer", "check_lengths", "evaluate_tasks"]

WRONG_SHOWN = 3
"""Most answers in the ``wrong`` of a row."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and what reading the prompt cost."""

    text: str
    ttft: float
    """Seconds from prompt to the first token."""
    density: float
    """Attended over causal (row, key) pairs of the prefill."""
    kv_bytes: int
    peak_memory: int
    """Bytes resident in the process (on a GPU: taken by tensors) at the prefill's peak."""


def answer(model: Decoder, tokens: Sequence[int], max_new_tokens: int, *, progress: bool = False) -> Answer:
    """The model's most likely continuation, to its end token or ``max_new_tokens`` (>= 1)."""
    begin = time.perf_counter()
    result = prefill(model, tokens, progress=progress)
    written = [int(result.logits.argmax())]
    ttft = time.perf_counter() - begin
    if max_new_tokens > 1 and written[0] not in model.config.eos_token_ids:
        written += generate(model, written, cache=result.cache, max_new_tokens=max_new_tokens - 1, temperature=0.0)
    return Answer(
        text=model.tokenizer.decode(written),
        ttft=ttft,
        density=result.stats.density,
        kv_bytes=result.cache.nbytes,
        peak_memory=result.stats.peak_memory,
    )


def check_lengths(runners: Sequence[Decoder], lengths: Sequence[int]) -> None:
    """Refuse what cannot work, before hours of work.

    Raises:
        ValueError: no or bad lengths, or one over ``max_seq_len``.
        MemoryError: the longest is estimated to need more memory than there is.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be at least one number >= 1, got {list(lengths)}")
    for runner in runners:
        check_request(runner, max(lengths), cache=None, chunk_tokens=default_chunk_tokens(runner.device))


def evaluate_tasks(
    model: Decoder,
    tasks: Sequence[Task],
    modes: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.5,),
    samples: int = 1,
    *,
    seed: int = 0,
    chat: bool = False,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Greedy answers to the same prompts in every mode.

    Args:
        model: the model; its own mode does not matter.
        tasks: what to ask.
        modes: names, see :class:`~qwen_sparse.evaluate.Mode`.
        lengths: tokens of prompt and answer together, ascending or not.
        depths: places of the needle, 0 to 1; tasks that have none are asked once.
        samples: prompts of each task, length and depth.
        seed: of the prompts.
        chat: use the model's chat template.
        progress: show a bar over all prompt tokens.

    Returns:
        An iterator of rows, from the shortest length on, one for each task, length, depth and mode: their names and
        values (``depth`` None where a task has none), ``prompts``, ``tokens`` (mean of the prompts), ``accuracy``
        (0 to 1, see :mod:`~qwen_sparse.evaluate.scoring`), ``density``, ``wrong`` (answers and output of the first
        prompts with less than full score); for questions also ``exact_match``.

    Raises:
        ValueError: a bad argument, a mode that the model cannot run, a length below what a task needs.
        MemoryError: the longest length does not fit.
    """
    runners = {name: Mode.parse(name).apply(model) for name in modes}
    check_lengths(list(runners.values()), lengths)
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be at least one number between 0 and 1, got {list(depths)}")
    for task in tasks:  # what is too short for a sample is said at once
        for sample in range(samples):
            make_prompt(task, model.tokenizer, min(lengths), depths[0], seed=seed, sample=sample, chat=chat)

    def run() -> Iterator[dict[str, Any]]:
        cells = [
            (task, length, depth)
            for length in sorted(set(lengths))
            for task in tasks
            for depth in (sorted(set(depths)) if task.has_depth else [None])
        ]
        total = sum(length for _, length, _ in cells) * samples * len(runners)
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
            for task, length, depth in cells:
                place = 0.5 if depth is None else depth
                prompts = [
                    make_prompt(task, model.tokenizer, length, place, seed=seed, sample=sample, chat=chat)
                    for sample in range(samples)
                ]
                for name, runner in runners.items():
                    bar.set_description(f"{task.name} {name}")
                    answers = []
                    for prompt in prompts:
                        answers.append(answer(runner, prompt.tokens, prompt.max_new_tokens))
                        bar.update(length)
                    yield {"task": task.name, "mode": name, "length": length, "depth": depth, **_row(prompts, answers)}

    return run()


def _row(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Any]:
    pairs = list(zip(prompts, answers, strict=True))
    scores = [score(prompt.scoring, prompt.answers, given.text) for prompt, given in pairs]
    exact = [exact_match(prompt.answers, given.text) for prompt, given in pairs if prompt.scoring == "any"]
    return {
        "prompts": len(prompts),
        "tokens": statistics.mean(len(prompt.tokens) for prompt in prompts),
        "accuracy": statistics.mean(scores),
        **({"exact_match": statistics.mean(exact)} if exact else {}),
        "density": statistics.mean(given.density for given in answers),
        "wrong": [
            [list(prompt.answers), given.text]
            for (prompt, given), value in zip(pairs, scores, strict=True)
            if value < 1
        ][:WRONG_SHOWN],
    }
