"""A request inside the engine: its tokens, pages, text and times."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..engine.generate import StopStrings
from ..model.decoder import Decoder
from ..model.kv_cache import PagedKVCache
from ..model.stats import ForwardStats
from ..model.tokenizer import StreamDecoder
from .pages import page_digests
from .requests import Event, Failed, Finished, FinishReason, GenerationRequest, NewToken, RequestStats, TokenLogprobs

__all__ = ["Sequence"]


class Sequence:
    """One request, from its arrival to its last event.

    Args:
        request: what was asked.
        max_new_tokens: most tokens to generate.
        listener: hears the events.
        model: the model.
    """

    def __init__(
        self,
        request: GenerationRequest,
        max_new_tokens: int,
        listener: Callable[[Event], None],
        model: Decoder,
    ) -> None:
        self.request = request
        self.max_new_tokens = max_new_tokens
        self.tokens = array("q", request.prompt)
        """Prompt and output."""
        self.prompt_len = len(self.tokens)
        self.cancelled = False
        self.cache: PagedKVCache | None = None
        self.pages: list[int] = []
        self.chunk_ends: list[int] = []
        """Where the prefill chunks end that are still to be computed."""
        self.sparse = False
        """Whether those of the prompt are sparse."""
        self.salt = b""
        """What keys and values depend on besides the tokens: they differ between sparse and dense prefill."""
        self.registered = 0
        """Pages that the prefix cache knows."""
        self.scheduled: float | None = None
        self.reported = -1
        """Prompt tokens of which the listener has heard that they are done."""
        self.cached_tokens = 0
        self.preemptions = 0
        self.forward = ForwardStats(model.device)
        self._listener = listener
        self._model = model
        self._ends = frozenset(model.config.eos_token_ids if request.stop_token_ids is None else request.stop_token_ids)
        self._decoder = StreamDecoder(model.tokenizer)
        self._stopper = StopStrings(request.stop)
        self._draws: Tensor | None = None
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None
        self._digests: list[bytes] = []
        self._arrived = time.monotonic()
        self._first_token: float | None = None

    @property
    def num_new(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    def use_salt(self, salt: bytes) -> None:
        """Set :attr:`salt`; digests made with another one are void."""
        if salt != self.salt:
            self.salt, self._digests = salt, []

    def digests(self) -> list[bytes]:
        """Of every page that is full of known tokens."""
        self._digests = page_digests(self.tokens, self.salt, self._digests)
        return self._digests

    def ids(self, start: int, end: int) -> Tensor:
        """Tokens, int64 ``[end - start]`` on the model's device."""
        return torch.from_numpy(np.array(self.tokens[start:end])).to(self._model.device)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next token, on the device, and the log-probabilities it was chosen from if they are wanted.

        Args:
            logits: float32 ``[vocab]``.

        Returns:
            int64 ``[1]`` (-1: the logits are not finite) and float32 ``[vocab]``.
        """
        sampler, device = self.request.sampler, logits.device
        if self._draws is None:
            self._draws = sampler.draws(self.max_new_tokens)
        if self._seen is None and sampler.repetition_penalty != 1:
            self._seen = torch.zeros(1, logits.shape[-1], dtype=torch.bool, device=device)
            self._seen[0, self.ids(0, len(self.tokens))] = True
        seen = torch.empty(1, 0, dtype=torch.bool, device=device) if self._seen is None else self._seen
        draws = self._draws[self.num_new : self.num_new + 1].to(device)
        token = sampler(self._ruled(logits)[None], seen, draws)
        if self._seen is not None:
            self._seen.scatter_(1, token.clamp(min=0)[:, None], True)
        if self._counts is not None:
            self._counts.index_add_(0, token.clamp(min=0), torch.ones(1, device=device))
        return token, None if self.request.logprobs is None else torch.log_softmax(logits, dim=-1)

    def _ruled(self, logits: Tensor) -> Tensor:
        """Logits by the request's rules, ``[vocab]``; nothing waits for the device."""
        rules = self.request.rules
        if rules.count:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            logits = logits - rules.frequency_penalty * self._counts - rules.presence_penalty * (self._counts > 0)
        if rules.bias:
            if self._bias is None:
                self._bias = torch.zeros(logits.shape)
                self._bias[list(rules.bias)] = torch.tensor(list(rules.bias.values()))
                self._bias = self._bias.to(logits.device)
            logits = logits + self._bias
        if self.num_new < rules.min_tokens and self._ends:
            logits = logits.index_fill(0, torch.tensor(sorted(self._ends), device=logits.device), -math.inf)
        return logits

    def take(self, token: int, log_probs: Tensor | None) -> FinishReason | None:
        """Add a chosen token to the output.

        Returns:
            Why the output ends with it; None while it does not.
        """
        if self._first_token is None:
            self._first_token = time.monotonic()
        if token in self._ends:
            return "stop"
        self.tokens.append(token)
        text = self._stopper.push(self._decoder.push(token))
        self.tell(NewToken(token, text, None if log_probs is None else self._logprobs(token, log_probs)))
        if self._stopper.found is not None:
            return "stop"
        if self.num_new == self.max_new_tokens:
            return "length"
        return None

    def _logprobs(self, token: int, log_probs: Tensor) -> TokenLogprobs:
        values, ids = log_probs.topk(min(self.request.logprobs or 0, log_probs.shape[0]))
        return TokenLogprobs(float(log_probs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def tell(self, event: Event) -> None:
        """Let the listener hear something. One that raises gives its request up."""
        try:
            self._listener(event)
        except Exception:  # whatever it is, the engine must go on
            self.cancelled = True

    def finish(self, reason: FinishReason) -> None:
        """Send the last event."""
        text = self._stopper.push(self._decoder.flush()) + self._stopper.flush()
        if self._stopper.found is not None and reason != "abort":
            reason = "stop"
        self.tell(Finished(reason, text, self.stats()))

    def fail(self, message: str, *, retry: bool) -> None:
        """Send the last event of a request that cannot be answered."""
        self.tell(Failed(message, self.stats(), retry))

    def stats(self) -> RequestStats:
        """As of now."""
        causal = self.forward.causal_pairs
        return RequestStats(
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_new,
            arrived=self._arrived,
            scheduled=self.scheduled,
            first_token=self._first_token,
            finished=time.monotonic(),
            density=self.forward.attended_pairs / causal if causal else None,
            preemptions=self.preemptions,
        )
