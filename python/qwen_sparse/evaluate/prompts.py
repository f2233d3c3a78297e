"""Prompts of a given length: a task writes a text from n units of filler, and the largest n that fits is taken.

Lengths are in tokens of the model's tokenizer, and hold the prompt *and* the answer. Everything random comes from the
seed, the task, the length, the depth and the number of the sample, so that equal arguments make equal prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from ..base.text import read_text
from ..model.tokenizer import Tokenizer
from ..passkey import GRASS, SENTENCES

__all__ = [
    "Draft",
    "Haystack",
    "Needle",
    "Prompt",
    "Scoring",
    "Sized",
    "Task",
    "answer_tokens",
    "chat_turn",
    "haystack",
    "longest",
    "make_prompt",
    "place",
]

Scoring = Literal["number", "all", "any"]
"""How an output is judged; see :func:`qwen_sparse.evaluate.scoring.score`."""

Haystack = Callable[[int, random.Random], list[str]]
"""``haystack(n, rng)``: n sentences or lines, each with the white space behind it."""


@dataclass(frozen=True)
class Needle:
    """A piece of text that a task hides."""

    text: str
    start: int
    """Character of the prompt's text at which it begins."""


@dataclass(frozen=True)
class Draft:
    """What a task writes: a user's message, and the opening of the answer."""

    text: str
    opening: str
    """Words that the answer starts with; the model continues them."""
    answers: tuple[str, ...]
    needles: tuple[Needle, ...] = ()
    """With their places in ``text``."""


@dataclass(frozen=True)
class Task:
    """A family of prompts."""

    name: str
    write: Callable[[int, float, random.Random, int], Draft]
    """``write(units, depth, rng, sample)``: more units make a longer text; the depth is 0 to 1; a task with samples of
    its own takes the number of the one it is to ask, others leave that to ``rng``."""
    scoring: Scoring
    has_depth: bool = True
    """Whether the text depends on the depth; if not, it is asked at none."""
    most_units: int | None = None
    """The units there are; None: no end."""
    answer_tokens: int | None = None
    """Tokens kept for the answer; None: twice those of the right one and eight."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the model gets it."""

    tokens: list[int]
    text: str
    answers: tuple[str, ...]
    scoring: Scoring
    max_new_tokens: int
    """Tokens kept for the answer; with those of the prompt, at most the length that was asked for."""
    needles: tuple[Needle, ...]
    units: int
    """Units of filler."""

    @property
    def size(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.tokens) + self.max_new_tokens


def make_prompt(
    task: Task,
    tokenizer: Tokenizer,
    length: int,
    depth: float = 0.5,
    *,
    seed: int = 0,
    sample: int = 0,
    chat: bool = False,
) -> Prompt:
    """The longest prompt of a task that leaves room for its answer in ``length`` tokens.

    Args:
        task: what to ask.
        tokenizer: of the model.
        length: most tokens of prompt and answer together.
        depth: place of the needle, 0 (start of the filler) to 1 (its end); ignored by tasks that have none.
        seed: of everything random.
        sample: number of the prompt among those of the same cell.
        chat: put the message through the chat template; the opening of the answer follows in the assistant's turn.

    Raises:
        ValueError: naming the argument, its rule and its value; a length below what the task needs.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, got {depth}")

    def attempt(units: int) -> Prompt:
        rng = random.Random(f"{seed} {task.name} {length} {depth if task.has_depth else None} {sample}")
        return _render(task, task.write(units, depth, rng, sample), units, tokenizer, chat)

    return longest(attempt, length, task.name, task.most_units)


class Sized(Protocol):
    """What :func:`longest` looks for."""

    @property
    def units(self) -> int:
        """Units of filler."""

    @property
    def size(self) -> int:
        """Tokens, with those kept for an answer."""


T = TypeVar("T", bound=Sized)


def longest(attempt: Callable[[int], T], length: int, name: str, most_units: int | None = None) -> T:
    """Of ``attempt(0)``, ``attempt(1)``, … up to ``attempt(most_units)``, the largest of at most ``length`` tokens.

    Raises:
        ValueError: ``attempt(0)`` is larger; ``name`` says of what.
    """
    best = attempt(0)
    if best.size > length:
        raise ValueError(f"length must be at least {best.size} tokens for {name} (prompt and answer), got {length}")
    end = None if most_units is None else most_units + 1
    # The size of a unit is known roughly, from those so far: a guess by it, and every third time the middle.
    unit_size, tries = 0.0, 0
    while end is None or best.units + 1 < end:
        tries += 1
        units = best.units + (max(1, int((length - best.size) / unit_size)) if unit_size else 32)
        if end is not None:
            units = (best.units + end) // 2 if tries % 3 == 0 else min(units, end - 1)
        tried = attempt(units)
        unit_size = max((tried.size - best.size) / (units - best.units), 0.01)
        if tried.size <= length:
            best = tried
        else:
            end = units
    return best


def answer_tokens(tokenizer: Tokenizer, answers: Sequence[str]) -> int:
    """Tokens kept for an answer: twice those of the right one, for numbering and the like, and eight."""
    return 2 * len(tokenizer.encode(", ".join(answers))) + 8


def _render(task: Task, draft: Draft, units: int, tokenizer: Tokenizer, chat: bool) -> Prompt:
    text, shift = f"{draft.text} {draft.opening}", 0
    if chat:
        shift, turn = chat_turn(tokenizer, draft.text, task.name)
        text = turn + draft.opening
    return Prompt(
        tokens=tokenizer.encode(text),
        text=text,
        answers=draft.answers,
        scoring=task.scoring,
        max_new_tokens=task.answer_tokens or answer_tokens(tokenizer, draft.answers),
        needles=tuple(Needle(needle.text, needle.start + shift) for needle in draft.needles),
        units=units,
    )


def chat_turn(tokenizer: Tokenizer, message: str, name: str) -> tuple[int, str]:
    """The message in the user's turn of the chat template, to the opening of the assistant's.

    Returns:
        The character at which the message begins, and the text.

    Raises:
        ValueError: there is no template, or one that changes the message; ``name`` says whose.
    """
    turn = tokenizer.apply_chat_template([{"role": "user", "content": message}])
    start = turn.find(message)
    if start < 0:
        raise ValueError(f"{name}: the chat template must not change the message, and it does")
    return start, turn


def place(header: str, filler: Sequence[str], needles: Iterable[tuple[float, str]]) -> tuple[str, tuple[Needle, ...]]:
    """The header, then the filler with needles between its units.

    A needle of depth d comes behind round(d × units) units; of two at one place, the first given comes first.

    Returns:
        The text, and the needles in the order of their places.
    """
    by_unit: dict[int, list[str]] = {}
    for depth, text in needles:
        by_unit.setdefault(round(depth * len(filler)), []).append(text)
    pieces, placed, position = [header], [], len(header)
    for number in range(len(filler) + 1):
        for text in by_unit.get(number, ()):
            placed.append(Needle(text, position))
            pieces.append(text)
            position += len(text)
        if number < len(filler):
            pieces.append(filler[number])
            position += len(filler[number])
    return "".join(pieces), tuple(placed)


def haystack(kind: str) -> Haystack:
    """Filler by name: "grass" (the five sentences of the passkey prompt), "sentences" (drawn from a pool), or the path
    of a text file, whose sentences and lines are taken in order from a random one on, and again from the start.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: the file has no text.
    """
    if kind == "grass":
        grass = re.findall(r"[^.]+\. ", GRASS)
        return lambda units, _: [grass[number % len(grass)] for number in range(units)]
    if kind == "sentences":
        return lambda units, rng: [f"{sentence} " for sentence in rng.choices(SENTENCES["eval"], k=units)]
    if not Path(kind).is_file():
        raise FileNotFoundError(f"haystack must be 'grass', 'sentences' or a text file, got {kind!r}")
    pieces = re.findall(r"\S.*?(?:[.!?]\s+|\n\s*|\Z)", read_text(kind))
    if not pieces:
        raise ValueError(f"haystack must have text, got {kind!r} without any")
    pieces[-1] = pieces[-1].rstrip() + "\n"

    def from_file(units: int, rng: random.Random) -> list[str]:
        start = rng.randrange(len(pieces))
        return [pieces[(start + number) % len(pieces)] for number in range(units)]

    return from_file
