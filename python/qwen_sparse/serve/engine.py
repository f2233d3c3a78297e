"""The engine: one thread that owns the model, and computes prefill chunks and decode steps in turns.

A step is one prefill chunk of the oldest request that is not through with its prompt, then one token of every request
that is. So answers go on while a long prompt is read, and the prompt waits for a token per chunk only. Requests are
taken up first in, first out, as soon as the pages for their whole prompt are free; pages for the output are taken one
by one. If there is none left, the request that was taken up last gives its pages back and waits at the head of the
queue; what the prefix cache still has of it then, it need not compute again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..base.resources import available_memory, format_bytes
from ..engine.memory import default_chunk_tokens
from ..engine.prefill import chunk_ends, token_tensor
from ..model.config import PAGE_SIZE
from ..model.decoder import Decoder
from ..model.kv_cache import PagedKVCache
from .batch import DecodeBatch
from .pages import PageAllocator
from .plan import EngineOptions, plan_pages, prefill_bytes
from .requests import Event, GenerationRequest, Progress, QueueFullError, ShuttingDownError, TooLongError
from .sequence import Sequence

_State = Literal["new", "running", "draining", "stopping", "stopped", "broken"]

__all__ = ["Engine", "EngineOptions", "RequestHandle", "Snapshot"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What the engine is doing now, and totals since it was made."""

    running: int
    """Requests that are prefilled or decoded."""
    waiting: int
    """Requests in the queue."""
    kv_cache_usage: float
    """Share of the pages that these requests use, in [0, 1]."""
    prefix_queries: int
    """Prompt tokens that were looked up in the prefix cache, in total."""
    prefix_hits: int
    """Of these, tokens that were found."""
    preemptions: int
    """How often a request had to give its pages back, in total."""


class RequestHandle:
    """A submitted request."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence

    def cancel(self) -> None:
        """Give the request up, from any thread; its pages are free within one step."""
        self._sequence.cancelled = True
        self._engine._wake()


class Engine:
    """Serves requests of one model.

    Args:
        model: the model, with its tokenizer.
        options: sizes and limits.

    Raises:
        ValueError: an option that does not fit the model.
        MemoryError: the memory does not hold one sequence of full length.
        FileNotFoundError: the model has no tokenizer.
    """

    def __init__(self, model: Decoder, options: EngineOptions) -> None:
        self.model = model
        self.options = options
        self.max_model_len = options.length_for(model.config, model.max_seq_len)
        self.chunk_tokens = default_chunk_tokens(model.device) if options.chunk_tokens is None else options.chunk_tokens
        _ = model.tokenizer  # loaded now, if at all
        num_pages = plan_pages(
            model.config,
            options,
            longest=self.max_model_len,
            available=available_memory(model.device),
            kv_cache_dtype=model.kv_cache_dtype,
            dtype=model.dtype,
            device=model.device,
            weights=0,
        )
        on_gpu = model.device.type == "cuda"
        # CUDA graphs are padded with rows that write somewhere: one page more.
        self._pool = model.new_pool(num_pages + on_gpu)
        self._page_bytes = self._pool.nbytes // (num_pages + on_gpu)
        self._pages = PageAllocator(num_pages, caching=options.prefix_caching)
        max_pages = -(-self.max_model_len // PAGE_SIZE)
        self._batch = DecodeBatch(model, self._pool, max_pages, num_pages if on_gpu else None)

        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._prefilling: Sequence | None = None
        self._decoding: list[Sequence] = []  # in the order they were taken up
        self._state: _State = "new"
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="qwen_sparse engine", daemon=True)
        self._prefix_queries = self._prefix_hits = self._preemptions = 0
        self._seconds_per_request = 1.0  # a running mean, for Retry-After

    def start(self) -> None:
        """Begin to serve."""
        with self._changed:
            self._state = "running"
        self._thread.start()

    def submit(self, request: GenerationRequest, listener: Callable[[Event], None]) -> RequestHandle:
        """Put a request into the queue, from any thread.

        Args:
            request: what to continue.
            listener: called in the engine's thread with every event, the last one a ``Finished`` or ``Failed``; it must
                not block.

        Raises:
            ValueError: an empty prompt, tokens outside of the vocabulary, ``max_new_tokens`` or ``logprobs`` out of
                range.
            TooLongError: the prompt leaves no token of ``max_model_len`` for an answer.
            QueueFullError: ``max_queue`` requests wait.
            ShuttingDownError: the engine is not running.
        """
        new = self._check(request)
        with self._changed:
            self._check_running()
            if len(self._waiting) >= self.options.max_queue:
                seconds = self._seconds_per_request * len(self._waiting) / self.options.max_num_seqs
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, and max_queue is {self.options.max_queue}",
                    retry_after=min(max(round(seconds), 1), 600),
                )
        # Text and tokens are copied outside of the lock: prompts can be long. A few requests too many may get in.
        sequence = Sequence(request, new, listener, self.model)
        with self._changed:
            self._check_running()
            self._waiting.append(sequence)
            self._changed.notify_all()
        return RequestHandle(self, sequence)

    def _check_running(self) -> None:
        if self._state != "running":
            raise ShuttingDownError(f"the engine takes no requests: it is {self._state}")

    def _check(self, request: GenerationRequest) -> int:
        """The most tokens to generate."""
        length, limit = len(request.prompt), self.max_model_len
        if length >= limit:
            raise TooLongError(
                f"the prompt must have at most {limit - 1} tokens, one less than max_model_len, got {length}"
            )
        left = limit - length
        new = left if request.max_new_tokens is None else min(request.max_new_tokens, left)
        if new < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {new}")
        if request.logprobs is not None and not 0 <= request.logprobs <= self.model.config.vocab_size:
            raise ValueError(
                f"logprobs must be in [0, vocab_size = {self.model.config.vocab_size}], got {request.logprobs}"
            )
        token_tensor(self.model, request.prompt)
        return new

    def snapshot(self) -> Snapshot:
        """What is going on; from any thread."""
        return Snapshot(
            running=len(self._decoding) + (self._prefilling is not None),
            waiting=len(self._waiting),
            kv_cache_usage=self._pages.used / self._pages.num_pages,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
        )

    def shutdown(self, *, drain: bool) -> None:
        """Take no more requests, and return when the thread has ended.

        Args:
            drain: whether to answer the requests that are there; otherwise they are given up within one step. A second
                call, from another thread, may stop the first one's draining.
        """
        with self._changed:
            if self._state == "new":
                self._state = "stopped"
            elif self._state == "running" or (self._state == "draining" and not drain):
                self._state = "draining" if drain else "stopping"
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether requests are taken or, after :meth:`shutdown`, still answered."""
        return self._state in ("running", "draining")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- The engine's thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # of this thread; the model may have been given fewer than there are
        try:
            while self._wait_for_work():
                self._step()
        except Exception as error:  # a GPU that answers no more, or a mistake in here: nothing can be computed
            _log.exception("the engine stops")
            for sequence in self._clear("broken"):
                sequence.fail(f"the engine stopped: {type(error).__name__}: {error}", retry=False)
        else:
            for sequence in self._clear("stopped"):
                sequence.finish("abort")

    def _wait_for_work(self) -> bool:
        """False when the thread has to end."""
        with self._changed:
            while self._state == "running" and not self._busy:
                self._changed.wait()
            return self._state != "stopping" and self._busy

    def _clear(self, state: _State) -> list[Sequence]:
        """Take nothing more, and forget the requests that are there."""
        with self._changed:
            self._state = state
            left = [*self._decoding, *([self._prefilling] if self._prefilling else []), *self._waiting]
            self._decoding, self._prefilling = [], None
            self._waiting.clear()
        for sequence in left:
            self._end(sequence)
        return left

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def _step(self) -> None:
        self._drop_cancelled()
        self._take_up()
        if self._prefilling is not None:
            self._prefill_chunk(self._prefilling)
        if self._decoding:
            self._decode()

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [sequence for sequence in self._waiting if sequence.cancelled]
            for sequence in dropped:
                self._waiting.remove(sequence)
        if self._prefilling is not None and self._prefilling.cancelled:
            dropped.append(self._prefilling)
            self._prefilling = None
        dropped += [sequence for sequence in self._decoding if sequence.cancelled]
        self._decoding = [sequence for sequence in self._decoding if not sequence.cancelled]
        for sequence in dropped:
            self._end(sequence)
            sequence.finish("abort")

    def _take_up(self) -> None:
        """Move the first request of the queue to prefill, if there is room and memory for its prompt."""
        if self._prefilling is not None or len(self._decoding) >= self.options.max_num_seqs or not self._waiting:
            return
        sequence = self._waiting[0]
        prompt, total = sequence.prompt_len, len(sequence.tokens)  # more than the prompt after a preemption
        sparse = self.model.prefills_sparse(prompt)
        sequence.use_salt(b"sparse" if sparse else b"dense")
        # One token at least is left to compute logits from.
        prefix = self._pages.take_prefix(sequence.digests()[: (total - 1) // PAGE_SIZE])
        cached = len(prefix) * PAGE_SIZE
        missing = -(-total // PAGE_SIZE) - len(prefix)
        untouched, shortage = self._untouched_pages(total, total - cached)
        pages = None if shortage else self._pages.take(missing, untouched=untouched)
        if pages is None:
            self._pages.give_back(prefix)
            if self._decoding:
                return  # they will give theirs back
            self._waiting.popleft()
            shortage = shortage or f"{missing} pages of {PAGE_SIZE} tokens are not free"
            sequence.fail(f"there is no memory for a prompt of {total} tokens now: {shortage}", retry=True)
            return
        self._waiting.popleft()
        self._prefilling = sequence
        sequence.pages = [*prefix, *pages]
        try:
            sequence.cache = PagedKVCache(self._pool, sequence.pages, seqlen=cached)
        except Exception as error:
            self._prefilling = None
            self._failed([sequence], error)
            return
        # The output so far in chunks of its own: the prompt's are then those they were the first time.
        sequence.chunk_ends = chunk_ends(cached, prompt, self.chunk_tokens)
        sequence.chunk_ends += chunk_ends(max(cached, prompt), total, self.chunk_tokens)
        if sequence.scheduled is None:  # what it was taken up as holds after a preemption too
            sequence.sparse = self.model.prefills_sparse(prompt, cached)
            sequence.scheduled, sequence.cached_tokens = time.monotonic(), cached
            self._prefix_queries += prompt
            self._prefix_hits += sequence.cached_tokens
        self._report(sequence)

    def _untouched_pages(self, total: int, new: int) -> tuple[int | None, str]:
        """How many pages may be used for the first time (None: any number); why the prompt must wait, if it must."""
        available = available_memory(self.model.device)
        if available is None:
            return None, ""
        needed = prefill_bytes(
            self.model.config,
            total,
            rows=min(self.chunk_tokens, new),
            kv_cache_dtype=self.model.kv_cache_dtype,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        if needed > available:
            return 0, f"its prefill needs {format_bytes(needed)}, and {format_bytes(available)} are available"
        # On a GPU, all pages have their memory since the start; elsewhere the system gives it when they are written.
        on_gpu = self.model.device.type == "cuda"
        return None if on_gpu else (available - needed) // self._page_bytes, ""

    def _prefill_chunk(self, sequence: Sequence) -> None:
        cache, total = sequence.cache, len(sequence.tokens)
        assert cache is not None
        start, end = cache.seqlen, sequence.chunk_ends[0]
        try:
            logits = self.model.forward(
                sequence.ids(start, end),
                cache,
                prompt_len=sequence.prompt_len,
                sparse=sequence.sparse and start < sequence.prompt_len,
                output="last" if end == total else "none",
                stats=sequence.forward,
            )
            if logits is not None:
                sequence.forward.finish()
        except Exception as error:
            self._prefilling = None
            self._failed([sequence], error)
            return
        del sequence.chunk_ends[0]
        self._register(sequence)
        self._report(sequence)
        if logits is not None:
            self._prefilling = None
            self._pool.release_workspace()
            self._decoding.append(sequence)
            self._choose([sequence], logits[None])

    def _decode(self) -> None:
        for sequence in list(self._decoding):
            if sequence in self._decoding:  # it was not preempted for the one before
                self._make_room(sequence)
        batch = list(self._decoding)
        if not batch:
            return
        try:
            caches = [sequence.cache for sequence in batch if sequence.cache is not None]
            logits = self._batch.step([sequence.tokens[-1] for sequence in batch], caches)
        except Exception as error:
            self._decoding = []
            self._failed(batch, error)
            return
        for sequence in batch:
            self._register(sequence)
        self._choose(batch, logits)

    @torch.inference_mode()
    def _choose(self, batch: list[Sequence], logits: Tensor) -> None:
        """The next token of each sequence; those that end with it are through."""
        try:
            chosen = [sequence.choose(row) for sequence, row in zip(batch, logits, strict=True)]
            tokens = torch.cat([token for token, _ in chosen]).tolist()
        except Exception as error:
            self._decoding = [sequence for sequence in self._decoding if sequence not in batch]
            self._failed(batch, error)
            return
        for sequence, token, (_, log_probs) in zip(batch, tokens, chosen, strict=True):
            if token < 0:
                self._decoding.remove(sequence)
                self._failed([sequence], RuntimeError("the model's logits are not finite"))
                continue
            ended = sequence.take(token, log_probs)
            if ended is not None:
                self._decoding.remove(sequence)
                self._end(sequence)
                sequence.finish(ended)
                taken = sequence.stats()
                self._seconds_per_request += (taken.finished - (taken.scheduled or 0) - self._seconds_per_request) / 8

    def _make_room(self, sequence: Sequence) -> None:
        """A page for the next token, if it begins one."""
        cache = sequence.cache
        assert cache is not None
        while cache.seqlen == cache.capacity:
            page = self._pages.take(1)
            if page is not None:
                sequence.pages += page
                try:
                    cache.extend(page)
                except Exception as error:
                    self._decoding.remove(sequence)
                    self._failed([sequence], error)
                return
            last = self._prefilling or self._decoding[-1]
            self._preempt(last)
            if last is sequence:
                return

    def _preempt(self, sequence: Sequence) -> None:
        if sequence is self._prefilling:
            self._prefilling = None
        else:
            self._decoding.remove(sequence)
        self._end(sequence)
        sequence.preemptions += 1
        self._preemptions += 1
        with self._changed:
            self._waiting.appendleft(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Tell the prefix cache which pages are full."""
        assert sequence.cache is not None
        digests = sequence.digests()
        full = sequence.cache.seqlen // PAGE_SIZE
        for page in range(sequence.registered, full):
            self._pages.register(sequence.pages[page], digests[page])
        sequence.registered = full

    def _report(self, sequence: Sequence) -> None:
        """Progress; after a preemption only from where it was before."""
        cache = sequence.cache
        if sequence.num_new == 0 and cache is not None and cache.seqlen > sequence.reported:
            seconds = time.monotonic() - (sequence.scheduled or 0)
            sequence.reported = cache.seqlen
            sequence.tell(Progress(sequence.prompt_len, sequence.cached_tokens, cache.seqlen, seconds))

    def _end(self, sequence: Sequence) -> None:
        """Take the pages back."""
        self._pages.give_back(sequence.pages)
        sequence.pages, sequence.cache, sequence.registered = [], None, 0
        if self._prefilling is None:
            self._pool.release_workspace()

    def _failed(self, sequences: list[Sequence], error: Exception) -> None:
        _log.error("engine: %s: %s", type(error).__name__, error)
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        for sequence in sequences:
            self._end(sequence)
            sequence.fail("memory ran out" if short else f"{type(error).__name__}: {error}", retry=short)
        if isinstance(error, torch.AcceleratorError):  # every later call would fail too
            raise error
