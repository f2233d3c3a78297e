"""The passkey task: hide a number in a long prompt, ask for it at the end.

The wording is that of the well-known passkey prompt (Landmark Attention, arXiv 2305.16300): "The pass key is
28884. Remember it. 28884 is the pass key." among "The grass is green. The sky is blue. …". Lengths are in
bytes, because the model of this package (``assets/passkey``) reads one byte as one token; all text made here
is ASCII.

What a model is evaluated on is disjoint from what it is trained on (``split="train"`` and ``split="eval"``):

- **keys**: a number belongs to evaluation iff it is 9 modulo 11 (28884 is). Training draws only the others,
  for needles and distractors alike.
- **sentences** (``filler="sentences"``): two pools without a common sentence.
- **source text** (``filler="source"``, and perplexity): files of the Python standard library; a file belongs
  to evaluation iff the CRC-32 of its path below the library is 0 modulo 20, whatever the Python version.

The grass filler is the one text that both share: it is part of the well-known prompt.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar, get_args

__all__ = [
    "FILLERS",
    "HEADER",
    "LABELS",
    "WORDINGS",
    "Filler",
    "PasskeyPrompt",
    "Split",
    "Wording",
    "draw_key",
    "filler_text",
    "held_out_source",
    "is_evaluation_key",
    "make_prompt",
    "question",
    "source_text",
    "statement",
]

Filler = Literal["grass", "sentences", "source"]
Split = Literal["train", "eval"]
Wording = Literal["remember", "short"]

FILLERS: tuple[Filler, ...] = get_args(Filler)
WORDINGS: tuple[Wording, ...] = get_args(Wording)
SPLITS: tuple[Split, ...] = get_args(Split)

LABELS = ("pass key", "special magic number", "door code", "account number")
"""What a needle may be called; the first is the task's own."""

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

SENTENCES: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "The river is wide.", "The night is long.", "Rain falls on the roof.", "A dog barks at the gate.",
        "The road is dusty.", "We walked home.", "The bread is warm.", "Nobody knows why.",
        "The train is late.", "Snow covers the hill.", "The cat is asleep.", "Birds sing at dawn.",
        "He closed the window.", "The lamp is on.", "She reads a book.", "The tea is cold.",
        "They were here before.", "It is noon.", "The wind is strong.", "Leaves turn red in autumn.",
        "The clock is slow.", "Time goes by.", "The market is busy.", "The boat is small.",
        "Fish swim in the lake.", "The moon is bright.", "Stars are far away.", "I am not sure.",
        "The soup is hot.", "Children play outside.", "Go on.", "The wall is white.", "Paint dries slowly.",
        "The old key is under the mat.", "The box is empty.", "The answer is unknown.",
        "The number is large.", "The door is open.", "Turn left and go on.", "Come back again.",
        "The code is hard to read.", "The bridge was closed on Monday.",
    ),
    "eval": (
        "The garden is quiet.", "Smoke rises from the chimney.", "The horse is tired.",
        "Water drips from the tap.", "A letter came today.", "The fence is broken.", "They sold the farm.",
        "The valley is deep.", "Music plays in the hall.", "The coat is too heavy.",
        "We waited for an hour.", "The lock is rusty.", "My brother is a baker.", "The stairs are steep.",
        "Clouds hide the sun.", "The apples are ripe.", "She wrote a number on the wall.",
        "The ferry leaves at six.", "Nothing else happened.", "The paper is torn.",
        "Bees live in the tree.", "The shop sells shoes.", "The fire is out.", "He forgot the code.",
        "The island is far.", "Dust covers the table.", "The path ends here.", "Someone rang the bell.",
    ),
}  # fmt: skip

_EVALUATION_KEY = (11, 9)  # modulus, remainder
_EVALUATION_FILE = (20, 0)
_SKIPPED_SOURCES = ("site-packages", "dist-packages", "test", "encodings/", "pydoc_data/")
_MAX_DIGITS = 12

T = TypeVar("T")


@dataclass(frozen=True)
class PasskeyPrompt:
    """One prompt and its answer.

    Attributes:
        text: the prompt; ASCII, ends with "The pass key is " so that the key's first digit comes next.
        key: the digits that a correct answer starts with.
        depth: where the needle was asked to be, 0 (start of the filler) to 1 (end).
    """

    text: str
    key: str
    depth: float


def _check_choice(function: str, argument: str, value: T, allowed: Sequence[T]) -> None:
    if value not in allowed:
        names = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{function}: {argument} must be one of {names}, got {value!r}")


def is_evaluation_key(key: str) -> bool:
    """Whether a key belongs to evaluation (its value is 9 modulo 11); training never draws such a key."""
    modulus, remainder = _EVALUATION_KEY
    return int(key) % modulus == remainder


def draw_key(rng: random.Random, *, digits: int = 5, split: Split = "eval") -> str:
    """A random key of ``digits`` digits (2 to 12) without a leading zero, from one side of the split.

    Raises:
        ValueError: on a digit count or split outside these choices.
    """
    if not 2 <= digits <= _MAX_DIGITS:
        raise ValueError(f"draw_key: digits must be between 2 and {_MAX_DIGITS}, got {digits}")
    _check_choice("draw_key", "split", split, SPLITS)
    while True:
        key = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if is_evaluation_key(key) == (split == "eval"):
            return key


def statement(key: str, *, label: str = LABELS[0], wording: Wording = "remember") -> str:
    """The needle: the sentences that state the key, ending with a newline.

    ``"remember"`` is the well-known wording with two mentions of the key; ``"short"`` is its first sentence.

    Raises:
        ValueError: on an unknown wording.
    """
    _check_choice("statement", "wording", wording, WORDINGS)
    if wording == "short":
        return f"The {label} is {key}.\n"
    return f"The {label} is {key}. Remember it. {key} is the {label}.\n"


def question(*, label: str = LABELS[0]) -> str:
    """The end of the prompt, which the answer completes."""
    return f"\nWhat is the {label}? The {label} is "


@cache
def source_text(split: Split) -> str:
    """Source text that every Python installation carries: one side of the standard library's files.

    Files that are not pure ASCII, tests and codec tables are left out. Deterministic for one Python version.

    Raises:
        FileNotFoundError: when the installation has no library sources (a zipped or stripped one).
    """
    _check_choice("source_text", "split", split, SPLITS)
    library = Path(sysconfig.get_paths()["stdlib"])
    modulus, remainder = _EVALUATION_FILE
    texts = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if any(part in name for part in _SKIPPED_SOURCES):
            continue
        held_out = zlib.crc32(name.encode()) % modulus == remainder
        data = path.read_bytes()
        if held_out == (split == "eval") and data.isascii():
            texts.append(data.decode("ascii").replace("\r\n", "\n"))
    if not texts:
        raise FileNotFoundError(f"source_text: no Python library sources below {library}")
    return "\n".join(texts)


def held_out_source() -> str:
    """Text for perplexity: the library files that no training text comes from (about 5 % of the library).

    One byte per character. It is the concatenation of whole files in path order.
    """
    return source_text("eval")


def filler_text(kind: Filler, length: int, rng: random.Random, *, split: Split = "eval") -> str:
    """Exactly ``length`` bytes of filler.

    Args:
        kind: "grass" repeats the five sentences of the well-known prompt from its start; "sentences" draws
            from the split's pool; "source" is a random stretch of :func:`source_text`, repeated if too short.
        length: bytes, 0 or more.
        rng: the source of randomness; unused for "grass".
        split: which side of the split the text comes from.

    Raises:
        ValueError: on a negative length or an unknown kind or split.
    """
    _check_choice("filler_text", "kind", kind, FILLERS)
    _check_choice("filler_text", "split", split, SPLITS)
    if length < 0:
        raise ValueError(f"filler_text: length must be at least 0, got {length}")
    if kind == "grass":
        return (GRASS * (length // len(GRASS) + 1))[:length]
    if kind == "source":
        text = source_text(split)
        start = rng.randrange(len(text))
        return (text[start:] + text * (length // len(text) + 1))[:length]
    parts: list[str] = []
    size = 0
    while size < length:
        parts.append(rng.choice(SENTENCES[split]) + " ")
        size += len(parts[-1])
    return "".join(parts)[:length]


def _cut_near(text: str, depth: float, kind: Filler) -> int:
    """The boundary (sentence or line) at or before ``depth`` of the text; 0 and 1 are exact."""
    if depth >= 1:
        return len(text)
    boundary = "\n" if kind == "source" else ". "
    found = text.rfind(boundary, 0, int(depth * len(text)) + len(boundary))
    return 0 if found < 0 or depth <= 0 else found + len(boundary)


def make_prompt(
    length_bytes: int,
    depth: float,
    *,
    seed: int,
    filler: Filler = "grass",
    label: str = LABELS[0],
    wording: Wording = "remember",
    digits: int = 5,
    second_label: str | None = None,
    second_depth: float | None = None,
    split: Split = "eval",
) -> PasskeyPrompt:
    """One passkey prompt of exactly ``length_bytes`` bytes; equal arguments make equal prompts.

    Args:
        length_bytes: length of the prompt, which is its number of tokens for a byte-level model. At least the
            sum of header, needles and question (246 for the default wording).
        depth: place of the needle in the filler, 0 to 1, moved back to the sentence (or line) before it.
        seed: of the key, the filler and the place of a second needle.
        filler: "grass" (the well-known one), "sentences" or "source" (see :func:`filler_text`).
        label: what the asked number is called, one of ``LABELS``.
        wording: "remember" (three sentences, the key twice) or "short" (one sentence).
        digits: of the key.
        second_label: a second needle with another label and number, which is not asked for; None for none.
        second_depth: its place; random when None.
        split: "eval", or "train" for keys and text that training uses.

    Returns:
        The prompt with its key.

    Raises:
        ValueError: naming the argument, its rule and its value.
    """
    _check_choice("make_prompt", "filler", filler, FILLERS)
    _check_choice("make_prompt", "label", label, LABELS)
    for name, value in (("depth", depth), ("second_depth", second_depth)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"make_prompt: {name} must be between 0 and 1, got {value}")
    rng = random.Random(f"{seed} {length_bytes} {depth}")
    key = draw_key(rng, digits=digits, split=split)
    needles = [(depth, statement(key, label=label, wording=wording))]
    if second_label is not None:
        _check_choice("make_prompt", "second_label", second_label, [name for name in LABELS if name != label])
        other = key
        while other == key:
            other = draw_key(rng, digits=digits, split=split)
        place = rng.random() if second_depth is None else second_depth
        needles.append((place, statement(other, label=second_label, wording=wording)))
    fixed = len(HEADER) + sum(len(text) for _, text in needles) + len(question(label=label))
    if length_bytes < fixed:
        raise ValueError(
            f"make_prompt: length_bytes must be at least {fixed} (header, needles and question), got {length_bytes}"
        )
    text = filler_text(filler, length_bytes - fixed, rng, split=split)
    pieces, end = [], len(text)
    for place, needle in sorted(needles, reverse=True):  # from the back, so that earlier cuts stay valid
        start = min(_cut_near(text, place, filler), end)
        pieces += [text[start:end], needle]
        end = start
    body = text[:end] + "".join(reversed(pieces))
    return PasskeyPrompt(text=HEADER + body + question(label=label), key=key, depth=depth)
