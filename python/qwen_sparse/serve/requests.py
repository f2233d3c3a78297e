"""What a caller asks of the engine, and what it hears back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..engine.sampling import Sampler

__all__ = [
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "LogitRules",
    "NewToken",
    "Progress",
    "QueueFullError",
    "RequestStats",
    "ShuttingDownError",
    "TokenLogprobs",
    "TooLongError",
]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class LogitRules:
    """What changes logits by the output so far, before :class:`~qwen_sparse.engine.sampling.Sampler` chooses."""

    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Taken off for each time that the output has them."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added, by token id."""
    min_tokens: int = 0
    """As long as the output has fewer, tokens that would end it cannot come."""

    @property
    def count(self) -> bool:
        """Whether they ask how often the output has a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued."""

    prompt: Sequence[int]
    """Token ids."""
    max_new_tokens: int | None = None
    """Most tokens to generate; None: as many as the model's length leaves."""
    sampler: Sampler = field(default_factory=Sampler)
    rules: LogitRules = field(default_factory=lambda: LogitRules())
    stop: tuple[str, ...] = ()
    """Strings that end the text and are cut off."""
    stop_token_ids: frozenset[int] | None = None
    """Tokens that end the text; None: the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """How many of the most likely tokens to report for each position, besides the chosen one; None: no logprobs."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's probabilities, before penalties and temperature."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """Token ids and logprobs, most likely first."""


@dataclass(frozen=True)
class Progress:
    """Prefill has come this far; the first one is sent when the request leaves the queue."""

    total: int
    """Prompt tokens."""
    cached: int
    """Of these, taken from the prefix cache."""
    processed: int
    """Of these, done, cached ones included."""
    seconds: float
    """Since the request left the queue."""


@dataclass(frozen=True)
class NewToken:
    """A token was chosen."""

    token_id: int
    text: str
    """Text that may be shown now; empty while a character or a stop string could still be completed."""
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class RequestStats:
    """What a request was and took; times by ``time.monotonic()``, in seconds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    arrived: float
    scheduled: float | None
    """When it left the queue; None: it never did."""
    first_token: float | None
    finished: float
    density: float | None
    """Attended over causal pairs of the prefill; 1 when dense, None if there was none."""
    preemptions: int
    """How often its pages were taken away and computed again."""


@dataclass(frozen=True)
class Finished:
    """The last event of a request that was answered, or that the client gave up ("abort")."""

    reason: FinishReason
    text: str
    """The rest of the text."""
    stats: RequestStats


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered."""

    message: str
    stats: RequestStats
    retry: bool
    """Whether the same request may succeed later (memory was short, the engine is shutting down)."""


Event = Progress | NewToken | Finished | Failed


class TooLongError(ValueError):
    """Prompt and new tokens exceed the longest sequence that is served."""


class QueueFullError(RuntimeError):
    """As many requests wait as may."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a place may be free: an estimate."""


class ShuttingDownError(RuntimeError):
    """The engine takes no more requests."""
