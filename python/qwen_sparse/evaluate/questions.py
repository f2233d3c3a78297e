"""Questions about documents of the user's: the one that holds the answer, and others around it up to the length."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.text import read_text
from .prompts import Draft, Task, place

__all__ = ["Question", "question_answering", "read_questions"]

_ANSWER_TOKENS = 32
_HEADER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n"
)


@dataclass(frozen=True)
class Question:
    """A line of the user's file."""

    context: str
    question: str
    answers: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """From JSON lines, each ``{"context": "…", "question": "…", "answers": ["…", …]}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the line, the rule and the value; a file without lines.
    """
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            questions.append(_question(line, f"{path}, line {number}"))
    if not questions:
        raise ValueError(f"{path} must have at least one line, got none")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, got {line[:60]}")
    for key in ("context", "question"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{where}: {key} must be a text, got {entry.get(key)!r}")
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"{where}: answers must be a list of texts, got {answers!r}")
    return Question(entry["context"], entry["question"], tuple(answers))


def question_answering(questions: Sequence[Question], *, answer_tokens: int = _ANSWER_TOKENS) -> Task:
    """Sample i asks question i (from the start again behind the last) about its document at the depth, among the other
    documents of the file, in random order, as many as fit: with few, a prompt stays shorter than its length.

    Args:
        questions: from :func:`read_questions`.
        answer_tokens: most tokens of an answer.
    """
    contexts = list(dict.fromkeys(question.context for question in questions))

    def write(units: int, depth: float, rng: random.Random, sample: int) -> Draft:
        asked = questions[sample % len(questions)]
        others = [context for context in contexts if context != asked.context]
        rng.shuffle(others)
        *documents, gold = [f"Document:\n{context.strip()}\n\n" for context in (*others[:units], asked.context)]
        body, placed = place(_HEADER, documents, [(depth, gold)])
        return Draft(f"{body}Question: {asked.question.strip()}", "Answer:", asked.answers, placed)

    return Task("qa", write, "any", most_units=len(contexts) - 1, answer_tokens=answer_tokens)
