"""Counting words: the ten common ones of a numbered list, the three most frequent of a coded text.

The families are those of RULER (arXiv 2404.06654) with its counts; the words are made of syllables, so that there are
enough for a million tokens, and the prompts are our own: scores are not comparable with published ones.
"""

from __future__ import annotations

import random

from .prompts import Draft, Task

__all__ = ["common_words", "frequent_words"]

_COMMON, _COMMON_REPEATS, _OTHER_REPEATS = 10, 30, 3
_ZETA_2 = 1.6449340668482264
_FEWEST_CODED = 100  # so that the second to fifth most frequent words differ in their counts
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]


def common_words() -> Task:
    """Which ten words of a shuffled list come up 30 times; all others do three times."""

    def write(units: int, depth: float, rng: random.Random, sample: int) -> Draft:
        words = _words(_COMMON + units, rng)
        listed = words[:_COMMON] * _COMMON_REPEATS + words[_COMMON:] * _OTHER_REPEATS
        rng.shuffle(listed)
        body = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return Draft(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{body}\nQuestion: What are the {_COMMON} most common words in the above list?",
            f"Answer: The top {_COMMON} words that appear most often in the list are:",
            tuple(words[:_COMMON]),
        )

    return Task("common-words", write, "all", has_depth=False)


def frequent_words() -> Task:
    """Which three words of a text are most frequent; counts fall with the square of the rank (a Zeta distribution).

    The most frequent "word" is a row of dots, as noise.
    """

    def write(units: int, depth: float, rng: random.Random, sample: int) -> Draft:
        counts: list[int] = []
        while count := int((_FEWEST_CODED + units) / _ZETA_2 / (len(counts) + 1) ** 2):
            counts.append(count)
        words = ["...", *_words(len(counts) - 1, rng)]
        coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(coded)
        return Draft(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words.\n{' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the "
            "dots '...'. What are the three most frequently appeared words in the above coded text?",
            "Answer: According to the coded text above, the three most frequently appeared words are:",
            tuple(words[1:4]),
        )

    return Task("frequent-words", write, "all", has_depth=False)


def _words(count: int, rng: random.Random) -> list[str]:
    """Different words of six letters."""
    numbers = rng.sample(range(len(_SYLLABLES) ** 3), count)
    size = len(_SYLLABLES)
    return [_SYLLABLES[n // size**2] + _SYLLABLES[n // size % size] + _SYLLABLES[n % size] for n in numbers]
