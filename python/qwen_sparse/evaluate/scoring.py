"""How an output is judged."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from .prompts import Scoring

__all__ = ["exact_match", "score"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(scoring: Scoring, answers: Sequence[str], output: str) -> float:
    """0 to 1.

    - "number": the first number of the output is the answer;
    - "all": the share of the answers that the output has, each as a whole word, upper or lower case;
    - "any": 1 where the output has one of the answers, both normalised as for :func:`exact_match`.
    """
    if scoring == "number":
        first = re.search(r"\d+", output)
        return float(first is not None and first[0] == answers[0])
    if scoring == "all":
        return sum(_has(output.lower(), answer.lower()) for answer in answers) / len(answers)
    return float(any(_has(_normalised(output), _normalised(answer)) for answer in answers))


def exact_match(answers: Sequence[str], output: str) -> bool:
    """Whether the output's first line is one of the answers, without case, punctuation, articles and extra spaces."""
    first = output.strip().partition("\n")[0]
    return _normalised(first) in {_normalised(answer) for answer in answers}


def _has(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
