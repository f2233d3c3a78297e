"""``qwen-sparse chat``: questions about documents in the terminal, with one KV cache from the first to the last.

Documents stand in front of a question of the user, where every chat template takes them, and the conversation only ever
grows at its end. What a new prompt has in common with the tokens in the cache is kept, so that a question costs its own
tokens and not the documents'.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .documents import Document, read_document
from .engine.generate import StopStrings, generate, stream_text
from .engine.sampling import Sampler
from .model.decoder import Decoder

__all__ = ["ChatSession", "Turn", "run"]

_BAR_TOKENS = 512  # a prefill of fewer is over before a bar says anything

_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

HELP = """\
/file PATH  put a document (text or PDF) in front of the next question
/reset      forget the questions and answers, keep the documents
/help       this list
/exit       leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends in a backslash goes on in the next one. A question that begins with a slash
needs a space in front."""


@dataclass
class Turn:
    """A question, what was answered, and what that cost."""

    content: str
    """The user's message: the documents that came with it, and the question."""
    documents: int
    """How many came with it."""
    cached_tokens: int
    """Tokens of the prompt that were in the cache."""
    new_tokens: int
    """The others."""
    answer: str = ""
    tokens: list[int] = field(default_factory=list)
    """Of the answer, those of a stop string included; none that end it."""
    seconds_to_first: float = 0.0
    """From the question to the first token, the encoding of the prompt included."""
    seconds: float = 0.0
    """From the question to the last token."""
    finished: bool = False
    """False when the answer was stopped or failed."""
    cut: bool = False
    """Whether the answer was as long as allowed and may lack its end."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens behind the first one; None without any."""
        if len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / (self.seconds - self.seconds_to_first)

    def __str__(self) -> str:
        parts = [f"{self.cached_tokens:,} tokens cached, {self.new_tokens:,} new"]
        if self.tokens:
            parts.append(f"first token after {self.seconds_to_first:.2f} s")
        if (rate := self.tokens_per_second) is not None:
            parts.append(f"{len(self.tokens):,} tokens at {rate:.1f}/s")
        if self.cut:
            parts.append("cut at --max-new-tokens")
        return " · ".join(parts)


class ChatSession:
    """A conversation over documents, and the cache that holds its tokens.

    A turn keeps the longest common prefix of its prompt and the cached tokens, and prefills the rest. Kept keys are
    those of the turn that computed them. Up to 512 tokens behind kept ones are prefilled densely. Whether more are
    prefilled with sparse attention follows from the length of the whole prompt, as without a cache; it does not change
    kept keys.

    An exception out of :meth:`ask`, KeyboardInterrupt included, leaves a session that goes on: its conversation has the
    question and the answer so far, or neither where there is no answer yet.

    Args:
        model: the model; its tokenizer must have a chat template.
        system: system message.
        max_new_tokens: most tokens of an answer.
        stop: strings that end an answer.
        chunk_tokens: rows per prefill chunk.
        progress: show a bar while 512 or more tokens are prefilled.
        sampling: fields of :class:`qwen_sparse.engine.sampling.Sampler`; the repetition penalty counts all the prompt.

    Raises:
        FileNotFoundError: the model has no tokenizer.
        ValueError: a bad argument, or a chat template that is missing or refuses the messages.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        system: str | None = None,
        max_new_tokens: int = 1024,
        stop: str | Sequence[str] = (),
        chunk_tokens: int | None = None,
        progress: bool = False,
        **sampling: Any,
    ) -> None:
        self._model, self._tokenizer = model, model.tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._sampler = Sampler(**sampling)
        self._max_new_tokens, self._stop, self._progress = max_new_tokens, stop, progress
        self._options = {**sampling, "max_new_tokens": max_new_tokens, "chunk_tokens": chunk_tokens}
        self._documents: list[Document] = []
        self._turns: list[Turn] = []
        self._cache = model.new_cache()
        self._encoded: dict[str, list[int]] = {}
        self._sequence: list[int] = []  # its first cache.seqlen tokens are those in the cache, whatever was interrupted
        StopStrings(stop)  # only its checks
        self._generate(self._encode("?"))  # likewise

    @property
    def turns(self) -> Sequence[Turn]:
        """The conversation."""
        return tuple(self._turns)

    @property
    def documents(self) -> Sequence[Document]:
        """All documents, those for the next question included."""
        return tuple(self._documents)

    def add_documents(self, *documents: Document) -> int:
        """Put documents in front of the next question.

        Returns:
            The tokens of the conversation with them.

        Raises:
            ValueError, MemoryError: they leave no room for a question and its answer, or memory is short; none was
                added.
        """
        before = self._documents
        self._documents = [*before, *documents]
        try:
            prompt = self._encode("?")
            self._generate(prompt)  # only its checks
        except BaseException:
            self._documents = before
            raise
        return len(prompt)

    def reset(self) -> None:
        """Forget all questions and answers. All documents stand in front of the next question then.

        Those that stood in front of the first one are still cached.
        """
        self._turns = []

    def ask(self, question: str, show: Callable[[str], None]) -> Turn:
        """Answer a question.

        Args:
            question: the user's message.
            show: gets the answer piece by piece.

        Returns:
            The turn, also the last one of :attr:`turns`.

        Raises:
            ValueError: the conversation would be too long.
            MemoryError: the estimate exceeds the memory that is left.
            RuntimeError: see :func:`qwen_sparse.generate`.
        """
        began = time.perf_counter()
        prompt = self._encode(question)
        tokens = self._generate(prompt)
        cached = self._cache.seqlen
        turn = Turn(self._content(question), len(self._pending), cached, len(prompt) - cached)
        text = stream_text(self._record(tokens, turn, began), self._tokenizer, StopStrings(self._stop))
        try:
            for piece in text:
                turn.answer += piece
                show(piece)
            turn.finished = True
        finally:
            if turn.finished or turn.answer:
                self._turns = [*self._turns, turn]
        return turn

    @property
    def _pending(self) -> list[Document]:
        """Documents that no question has brought yet."""
        return self._documents[sum(turn.documents for turn in self._turns) :]

    def _content(self, question: str) -> str:
        return "".join([*(f"# {document.name}\n\n{document.text}\n\n" for document in self._pending), question])

    def _encode(self, question: str) -> list[int]:
        """Tokens of the conversation with a next question."""
        messages = list(self._system)
        for turn in self._turns:
            messages += [{"role": "user", "content": turn.content}, {"role": "assistant", "content": turn.answer}]
        messages.append({"role": "user", "content": self._content(question)})
        parts = self._tokenizer.parts(self._tokenizer.apply_chat_template(messages))
        # A million tokens take seconds to encode; what the last prompt had as well is not encoded again.
        self._encoded = {part: self._encoded.get(part) or self._tokenizer.encode(part) for part in parts}
        return [token for part in parts for token in self._encoded[part]]

    def _generate(self, prompt: list[int]) -> Iterator[int]:
        """Check a prompt and start its answer, which is computed when tokens are asked for."""
        kept = _common_prefix(self._sequence[: self._cache.seqlen], prompt[:-1])  # one has to go through the model
        self._cache.truncate(kept)
        self._sequence = prompt
        return generate(
            self._model,
            prompt[kept:],
            cache=self._cache,
            cached_ids=() if self._sampler.repetition_penalty == 1 else prompt[:kept],
            progress=self._progress and len(prompt) - kept >= _BAR_TOKENS,
            **self._options,
        )

    def _record(self, tokens: Iterator[int], turn: Turn, began: float) -> Iterator[int]:
        for token in tokens:
            self._sequence.append(token)
            turn.tokens.append(token)
            turn.seconds = time.perf_counter() - began
            if len(turn.tokens) == 1:
                turn.seconds_to_first = turn.seconds
            turn.cut = len(turn.tokens) == self._max_new_tokens or len(self._sequence) == self._model.max_seq_len
            yield token


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens the two have in common at their start."""
    for number, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return number
    return min(len(first), len(second))


def run(model: Decoder, documents: Sequence[Document] = (), **options: Any) -> int:
    """Chat over standard input and output until the input ends, with prompts and commands for people on a terminal.

    Args:
        model: see :class:`ChatSession`.
        documents: stand in front of the first question.
        options: see :class:`ChatSession`.

    Returns:
        0; 2 when the input is not a terminal and one of its lines was refused.

    Raises:
        KeyboardInterrupt: Ctrl-C where standard input or output is not a terminal.
        ValueError, MemoryError: see :class:`ChatSession` and :meth:`ChatSession.add_documents`.
    """
    terminal = _Terminal(ChatSession(model, **options))
    if documents:
        terminal.add(*documents)
    return terminal.run()


class _Terminal:
    """Reads questions and commands, and shows answers on standard output and all else on standard error."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._refused = False

    def run(self) -> int:
        if self._interactive:
            with suppress(ImportError):  # a Python without it has no line editing
                import readline  # noqa: F401  (input() uses it; pasted lines stay together)
            _note("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if line is None or line.strip() == "/exit":
                    break
                self._take(line)
            except UnicodeDecodeError as error:  # of what was typed
                if not self._interactive:
                    raise
                _note(str(error))
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print(flush=True)
                _note("Ctrl-D or /exit leaves")
        return 2 if self._refused and not self._interactive else 0

    def add(self, *documents: Document) -> None:
        """Put documents in front of the next question and say how long the conversation is."""
        tokens = self._session.add_documents(*documents)
        names = ", ".join(document.name for document in documents)
        _note(f"{names}: the conversation has {tokens:,} tokens")

    def _read(self) -> str | None:
        """The next question or command; None at the end of the input."""
        lines: list[str] = []
        while True:
            prompt = "... " if lines else ">>> "
            try:
                line = input(prompt if self._interactive else "")
            except EOFError:
                if self._interactive:
                    print(flush=True)
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _take(self, line: str) -> None:
        try:
            if line.startswith("/"):
                self._command(*line.strip().partition(" ")[::2])
            elif line.strip():
                self._ask(line)
        except (ValueError, MemoryError, RuntimeError) as error:  # of memory, torch raises RuntimeError
            self._refused = True
            _note(" ".join(str(error).split()) or type(error).__name__)

    def _command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        if name == "/file" and argument:
            try:
                document = read_document(argument)
            except OSError as error:
                raise ValueError(str(error)) from error
            if warning := document.warning():
                _note(warning)
            self.add(document)
        elif name == "/reset" and not argument:
            self._session.reset()
            _note(f"a new conversation; documents: {len(self._session.documents)}")
        elif name == "/help" and not argument:
            _note(HELP)
        else:
            raise ValueError(f"no command {' '.join((name, argument)).strip()!r}; /help lists the commands")

    def _ask(self, question: str) -> None:
        turns = len(self._session.turns)
        try:
            turn = self._session.ask(question, _show)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print(flush=True)
            if len(self._session.turns) == turns:
                _note("stopped; the question is taken back")
                return
            turn = self._session.turns[-1]
            _note("stopped; the answer so far stays")
        else:
            print(flush=True)
        _note(str(turn))


def _show(piece: str) -> None:
    if sys.stdout.isatty():  # whose escape sequences a document must not get at
        piece = piece.translate(_CONTROLS)
    print(piece, end="", flush=True)


def _note(text: str) -> None:
    """Print something that is not an answer."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
