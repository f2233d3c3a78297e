"""Many needles in one text: it is prefilled once, and each needle's question is answered from the cache.

Forty answers of a million tokens cost one prefill and not forty. A question is what a user would write next: it runs as
new prompt tokens behind the cached text, in the mode's attention, and the answer is generated; then the cache is cut
back to the text. The prompts of :func:`~qwen_sparse.evaluate.niah` hold the question instead, where it may draw sparse
attention to the needle: these do not, since the text is read before anything is asked.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..base.arguments import check_integer
from ..engine.generate import generate
from ..engine.prefill import prefill
from ..model.decoder import Decoder
from ..model.tokenizer import Tokenizer
from ..passkey import HEADER, draw_key, question, statement
from .modes import Mode
from .needles import NEEDLE_LABELS
from .prompts import Haystack, Needle, answer_tokens, chat_turn, haystack, longest, place
from .run import WRONG_SHOWN, check_lengths
from .scoring import score

__all__ = ["MOST_PROBES", "Probe", "ProbedText", "evaluate_probes", "make_probed_text"]

_OWNERS = (
    "Lisbon", "Osaka", "Nairobi", "Bogota", "Helsinki", "Quebec", "Jakarta", "Tbilisi",
    "Accra", "Lima", "Prague", "Hanoi", "Oslo", "Cairo", "Dublin", "Perth",
)  # fmt: skip
MOST_PROBES = len(NEEDLE_LABELS) * len(_OWNERS)
"""Names that there are for needles."""


@dataclass(frozen=True)
class Probe:
    """A question about a :class:`ProbedText`, and the opening of its answer."""

    depth: float
    """Of its needle, 0 (start of the filler) to 1 (its end)."""
    text: str
    tokens: list[int]
    answer: str
    max_new_tokens: int
    """Tokens kept for the answer."""


@dataclass(frozen=True)
class ProbedText:
    """A text with a needle for each probe. Text and probes are tokenised apart, as a cache takes them."""

    text: str
    tokens: list[int]
    probes: tuple[Probe, ...]
    """From the first needle of the text to the last."""
    needles: tuple[Needle, ...]
    """Those of the probes, with their places in ``text``."""
    units: int
    """Units of filler."""

    @property
    def size(self) -> int:
        """Tokens of the text, its longest question and the answer."""
        return len(self.tokens) + max(len(probe.tokens) + probe.max_new_tokens for probe in self.probes)


def make_probed_text(
    tokenizer: Tokenizer,
    length: int,
    probes: int,
    *,
    hay: str = "sentences",
    seed: int = 0,
    sample: int = 0,
    chat: bool = False,
) -> ProbedText:
    """The longest text with ``probes`` needles that leaves room for a question and its answer in ``length`` tokens.

    Needles lie in the middles of as many equal stretches of the filler. Up to 16 have the names of
    :func:`~qwen_sparse.evaluate.niah`'s needles; more are told apart by a city too ("the vault code of Lisbon").

    Args:
        tokenizer: of the model.
        length: most tokens of text, question and answer together.
        probes: needles and questions, 1 to :data:`MOST_PROBES`.
        hay: filler, see :func:`qwen_sparse.evaluate.prompts.haystack`.
        seed: of everything random.
        sample: number of the text among those of the same length.
        chat: put text and question into the user's turn of the chat template, the question at its end; the opening of
            the answer follows in the assistant's turn.

    Raises:
        ValueError: naming the argument, its rule and its value; a length below what the needles need; no chat
            template, or one that changes the message.
        FileNotFoundError: ``hay`` is neither a name nor a file.
    """
    count = check_integer("probes", probes, least=1, most=MOST_PROBES)
    filler, name = haystack(hay), _task_name(count)

    def attempt(units: int) -> ProbedText:
        rng = random.Random(f"{seed} {name} {length} {sample}")
        return _render(name, count, filler, units, rng, tokenizer, chat)

    return longest(attempt, length, name)


def _task_name(count: int) -> str:
    return f"niah-{count}-probes"


def _render(
    name: str, count: int, filler: Haystack, units: int, rng: random.Random, tokenizer: Tokenizer, chat: bool
) -> ProbedText:
    names = [f"{label} of {owner}" for label in NEEDLE_LABELS for owner in _OWNERS]
    labels = rng.sample(NEEDLE_LABELS[:count] if count <= len(NEEDLE_LABELS) else names, count)
    keys: list[str] = []
    while len(keys) < count:
        key = draw_key(rng)
        keys += [key] * (key not in keys)
    depths = [(number + 0.5) / count for number in range(count)]
    needles = [statement(key, label=label) for key, label in zip(keys, labels, strict=True)]
    body, placed = place(HEADER, filler(units, rng), zip(depths, needles, strict=True))
    framed = [_frame(body, label, name, tokenizer if chat else None) for label in labels]
    if len({head for head, _ in framed}) > 1:
        raise ValueError(f"{name}: the chat template must put the same before every message, and it does not")
    head = framed[0][0]
    shift = head.find(body)
    return ProbedText(
        text=head,
        tokens=tokenizer.encode(head),
        probes=tuple(
            Probe(
                depth=depth,
                text=asked,
                tokens=tokenizer.encode(asked),
                answer=key,
                max_new_tokens=answer_tokens(tokenizer, [key]),
            )
            for depth, key, (_, asked) in zip(depths, keys, framed, strict=True)
        ),
        needles=tuple(Needle(needle.text, needle.start + shift) for needle in placed),
        units=units,
    )


def _frame(body: str, label: str, name: str, template: Tokenizer | None) -> tuple[str, str]:
    """The text up to the question, and what is behind it: the question and the opening of its answer."""
    ask, opening = question(label=label).split("? ")
    if template is None:
        return body, f"{ask}? {opening}"
    start, turn = chat_turn(template, f"{body}{ask}?", name)
    end = start + len(body)
    return turn[:end], turn[end:] + opening


@dataclass(frozen=True)
class _Read:
    """What reading a text cost, and what was written to its questions."""

    outputs: list[str]
    density: float
    seconds: float
    answer_seconds: float


def _read(model: Decoder, text: ProbedText) -> _Read:
    cache = model.new_cache(text.size)
    stats = prefill(model, text.tokens, cache=cache).stats
    end, outputs, began = cache.seqlen, [], time.perf_counter()
    for probe in text.probes:
        written = generate(model, probe.tokens, cache=cache, max_new_tokens=probe.max_new_tokens, temperature=0.0)
        outputs.append(model.tokenizer.decode(list(written)))
        cache.truncate(end)
    answering = (time.perf_counter() - began) / len(outputs)
    return _Read(outputs, stats.density, stats.total_seconds, answering)


def evaluate_probes(
    model: Decoder,
    probes: int,
    modes: Sequence[str],
    lengths: Sequence[int],
    samples: int = 1,
    *,
    hay: str = "sentences",
    seed: int = 0,
    chat: bool = False,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Greedy answers to ``probes`` questions about one text, prefilled once per mode and length.

    Args:
        model: the model; its own mode does not matter.
        probes: needles and questions of a text, 1 to :data:`MOST_PROBES`; see :func:`make_probed_text`.
        modes: names, see :class:`~qwen_sparse.evaluate.Mode`. They hold for text and questions.
        lengths: tokens of text, question and answer together, ascending or not.
        samples: texts of each length.
        hay: filler, see :func:`qwen_sparse.evaluate.prompts.haystack`.
        seed: of the texts.
        chat: use the model's chat template.
        progress: show a bar over the tokens of all texts.

    Returns:
        An iterator of rows, from the shortest length on, one for each length, mode and depth: their names and values,
        ``prompts`` (texts, as many as questions at that depth), ``tokens`` (mean of the texts), ``found`` (questions
        answered right) and ``accuracy`` (their share), ``wrong`` (answers and output of the first others); and the
        same for all depths of a mode and length: ``density`` and ``seconds`` (means of the texts' prefills),
        ``answer_seconds`` (mean of a question with its answer).

    Raises:
        ValueError: a bad argument, a mode that the model cannot run, a length below what the needles need.
        FileNotFoundError: ``hay`` is neither a name nor a file.
        MemoryError: the longest length does not fit.
    """
    runners = {name: Mode.parse(name).apply(model) for name in modes}
    check_lengths(list(runners.values()), lengths)
    samples = check_integer("samples", samples, least=1)

    def texts_of(length: int) -> list[ProbedText]:
        return [
            make_probed_text(model.tokenizer, length, probes, hay=hay, seed=seed, sample=sample, chat=chat)
            for sample in range(samples)
        ]

    shortest = texts_of(min(lengths))  # what is too short, or wrong, is said at once

    def run() -> Iterator[dict[str, Any]]:
        total = sum(set(lengths)) * samples * len(runners)
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
            for length in sorted(set(lengths)):
                texts = shortest if length == min(lengths) else texts_of(length)
                for name, runner in runners.items():
                    bar.set_description(f"{_task_name(probes)} {name}")
                    reads = []
                    for text in texts:
                        reads.append(_read(runner, text))
                        bar.update(length)
                    values = {"task": _task_name(probes), "mode": name, "length": length}
                    yield from ({**values, **row} for row in _rows(texts, reads))

    return run()


def _rows(texts: Sequence[ProbedText], reads: Sequence[_Read]) -> Iterator[dict[str, Any]]:
    """One for each depth."""
    for number, asked in enumerate(texts[0].probes):
        pairs = [(text.probes[number].answer, read.outputs[number]) for text, read in zip(texts, reads, strict=True)]
        wrong = [[[answer], output] for answer, output in pairs if not score("number", [answer], output)]
        yield {
            "depth": asked.depth,
            "prompts": len(texts),
            "tokens": statistics.mean(len(text.tokens) for text in texts),
            "found": len(texts) - len(wrong),
            "accuracy": 1 - len(wrong) / len(texts),
            "density": statistics.mean(read.density for read in reads),
            "seconds": statistics.mean(read.seconds for read in reads),
            "answer_seconds": statistics.mean(read.answer_seconds for read in reads),
            "wrong": wrong[:WRONG_SHOWN],
        }
