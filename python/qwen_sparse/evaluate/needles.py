"""Needles in a haystack: the passkey, one of several numbers (niah), and chains of variables.

The families are those of RULER (arXiv 2404.06654), the prompts our own: scores are not comparable with published ones.
"""

from __future__ import annotations

import itertools
import random
import string

from ..passkey import HEADER, LABELS, draw_key, question, statement
from .prompts import Draft, Haystack, Task, haystack, place

__all__ = ["NEEDLE_LABELS", "niah", "passkey", "variable_tracking"]

NEEDLE_LABELS = (
    *LABELS,
    "locker number", "flight number", "vault code", "gate code", "room number", "ticket number",
    "badge number", "invoice number", "serial number", "tracking number", "case number", "phone extension",
)  # fmt: skip
"""What a needle may be called; the model of this package was trained on the first four."""

_HOPS = 4


def passkey(hay: str = "grass") -> Task:
    """One number, called the pass key (Landmark Attention, arXiv 2305.16300).

    Args:
        hay: filler, see :func:`qwen_sparse.evaluate.prompts.haystack`.
    """
    filler = haystack(hay)

    def write(units: int, depth: float, rng: random.Random, sample: int) -> Draft:
        return _numbers(filler, units, depth, rng, [LABELS[0]])

    return Task("passkey", write, "number")


def niah(needles: int = 4, hay: str = "sentences") -> Task:
    """One of several numbers of different names; the one that is asked for lies at the depth, the others anywhere.

    Args:
        needles: how many, 1 to 16.
        hay: filler, see :func:`qwen_sparse.evaluate.prompts.haystack`.

    Raises:
        ValueError: another number of needles.
    """
    if not 1 <= needles <= len(NEEDLE_LABELS):
        raise ValueError(f"niah: needles must be between 1 and {len(NEEDLE_LABELS)}, got {needles}")
    filler = haystack(hay)

    def write(units: int, depth: float, rng: random.Random, sample: int) -> Draft:
        return _numbers(filler, units, depth, rng, rng.sample(NEEDLE_LABELS[:needles], needles))

    return Task(f"niah-{needles}", write, "number")


def _numbers(filler: Haystack, units: int, depth: float, rng: random.Random, labels: list[str]) -> Draft:
    """Ask for the number of the first label."""
    keys: list[str] = []
    while len(keys) < len(labels):
        key = draw_key(rng)
        keys += [key] * (key not in keys)
    depths = [depth, *(rng.random() for _ in labels[1:])]
    texts = [statement(key, label=label) for key, label in zip(keys, labels, strict=True)]
    body, placed = place(HEADER, filler(units, rng), zip(depths, texts, strict=True))
    ask, opening = question(label=labels[0]).split("? ")
    return Draft(f"{body}{ask}?", opening, (keys[0],), placed)


def variable_tracking(hay: str = "grass") -> Task:
    """A variable gets a number, four more get each other's value; all five are asked for.

    Args:
        hay: filler, see :func:`qwen_sparse.evaluate.prompts.haystack`.
    """
    filler = haystack(hay)

    def write(units: int, depth: float, rng: random.Random, sample: int) -> Draft:
        names: list[str] = []
        while len(names) < _HOPS + 1:
            name = "".join(rng.choices(string.ascii_uppercase, k=5))
            names += [name] * (name not in names)
        value = draw_key(rng)
        texts = [f"VAR {names[0]} = {value}.\n"]
        texts += [f"VAR {name} = VAR {before}.\n" for before, name in itertools.pairwise(names)]
        depths = sorted(rng.random() for _ in texts)
        header = "Memorize and track the chain of variable assignments hidden in the following text.\n\n"
        body, placed = place(header, filler(units, rng), zip(depths, texts, strict=True))
        return Draft(
            f"{body}\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            f"Answer: According to the chain of variable assignments in the text above, {len(names)} variables are "
            f"assigned the value {value}, they are:",
            tuple(names),
            placed,
        )

    return Task("variable-tracking", write, "all", has_depth=False)
