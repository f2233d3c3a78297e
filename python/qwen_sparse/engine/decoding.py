"""The decode loop: one step per token, all of whose inputs stay on the model's device.

A step feeds the last token through the model, samples the next one and advances the length. On a GPU it is captured in
a CUDA graph, which runs its kernels without the host; the host reads a token while the step behind it is running. On
a CPU, where nothing runs beside the host, a step is computed when its token is asked for.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import PagedKVCache
from .sampling import Sampler

__all__ = ["StepGraph", "decode"]

_SIDE_STREAM_IN_USE = threading.Lock()  # a stream records what any thread does on it while it is captured


def decode(
    model: Decoder,
    cache: PagedKVCache,
    logits: Tensor,
    seen: Tensor,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    ends: Collection[int] = (),
    cuda_graph: bool = True,
    ahead: int | None = None,
) -> Iterator[int]:
    """Tokens behind a prompt, one by one.

    Args:
        model: the model.
        cache: holds the prompt, and has room for ``max_new_tokens`` more. When a token is yielded, it holds all
            tokens yielded before.
        logits: float32 ``[1, vocab]``, of the prompt's last token.
        seen: bool ``[1, vocab]``, tokens of the prompt; changed.
        sampler: chooses tokens.
        max_new_tokens: most tokens to yield.
        ends: tokens that end the output and are not yielded.
        cuda_graph: on a GPU, replay a CUDA graph.
        ahead: steps that are started before a token is read; 1 on a GPU and 0 on a CPU when None.

    Raises:
        RuntimeError: logits are not finite, the cache was changed between two tokens, or the step cannot be captured.
    """
    if ahead is None:
        ahead = 1 if model.device.type == "cuda" else 0
    prompt_len, block_table = cache.seqlen, cache.block_table
    steps = _Steps(model, cache, logits, seen, sampler, max_new_tokens, cuda_graph)
    try:
        for number in range(max_new_tokens):
            expected = prompt_len + max(number - 1, 0)
            if cache.seqlen != expected or cache.block_table is not block_table:  # the step knows their addresses
                raise RuntimeError(
                    "generate: the cache must not be changed before the last token is out; it had "
                    f"{expected} tokens in {block_table.shape[1]} pages, and now has {cache.seqlen} in "
                    f"{cache.block_table.shape[1]}"
                )
            while steps.started < min(number + 1 + ahead, max_new_tokens):
                steps.start()
            token = steps.read(number)
            if token in ends:
                return
            if number:
                cache.commit(1)  # the token before: this one needed it
            yield token
    finally:
        steps.wait()


class _Steps:
    """Starts steps and reads their tokens; the first "step" samples from the prompt's logits."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        cache: PagedKVCache,
        logits: Tensor,
        seen: Tensor,
        sampler: Sampler,
        max_new_tokens: int,
        cuda_graph: bool,
    ) -> None:
        self._model, self._cache, self._sampler = model, cache, sampler
        on_gpu = model.device.type == "cuda"
        # All steps take this stream, whatever is current when a later token is asked for. None: on a CPU.
        self._stream = torch.cuda.current_stream(model.device) if on_gpu else None
        self._logits, self._seen = logits, seen
        self._block_table = cache.block_table
        self._seqlens = torch.full((1,), cache.seqlen, device=model.device)
        self._tokens = torch.empty(1, dtype=torch.int64, device=model.device)
        self._draws = sampler.draws(max_new_tokens).to(model.device)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._host = torch.empty(max_new_tokens, dtype=torch.int64, pin_memory=on_gpu)
        self._events: deque[torch.cuda.Event] = deque()  # of tokens that were not read
        self._graph = StepGraph(model.device) if on_gpu and cuda_graph else None
        self.started = 0

    @torch.inference_mode()
    def start(self) -> None:
        """Start the next step, and the copy of its token to the host."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self.started == 0:
                self._sample(self._logits)
            elif self._graph is None:
                self._step()
            else:
                self._graph.run(self._step)
            self._host[self.started : self.started + 1].copy_(self._tokens, non_blocking=True)
            if self._stream is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
                self._events.append(event)
        self.started += 1

    def read(self, number: int) -> int:
        """Token ``number`` of the output, once its step is done; in order."""
        if self._stream is not None:
            self._events.popleft().synchronize()
        token = int(self._host[number])
        if token < 0:
            raise RuntimeError(f"generate: the logits of new token {number} are not finite")
        return token

    def wait(self) -> None:
        """Wait for the steps whose tokens nobody has read."""
        if self._events:
            self._events[-1].synchronize()

    def _step(self) -> None:
        tokens = self._tokens.clamp(min=0)  # one that could not be chosen is reported when it is read
        logits = self._model.decode_step(tokens, self._seqlens, self._cache.pool, self._block_table)
        self._seqlens += 1
        self._sample(logits)

    def _sample(self, logits: Tensor) -> None:
        tokens = self._sampler(logits, self._seen, self._draws.index_select(0, self._drawn))
        self._drawn += 1
        self._seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        self._tokens.copy_(tokens)


class StepGraph:
    """Runs a function, always the same, as it is the first time, captures it the second, and replays it from there on.

    It runs on the current stream, which must be one of its device. The first run is the warm-up that capturing needs:
    kernels are loaded and libraries initialised outside of the graph. Memory that the function takes comes from the
    graph's own pool, so its addresses stay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def run(self, function: Callable[[], None]) -> None:
        """Run it, or replay what it has launched.

        Raises:
            RuntimeError: it cannot be captured.
        """
        # The function is not kept: it belongs to the owner of this graph, and a cycle would keep a cache's memory.
        if not self._warm:
            with _SIDE_STREAM_IN_USE:
                self._warm_up(function)
            return
        if self._graph is None:
            with _SIDE_STREAM_IN_USE:
                self._graph = self._capture(function)
        self._graph.replay()

    def _warm_up(self, function: Callable[[], None]) -> None:
        stream, current = _side_stream(self._device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)
        self._warm = True

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(self._device)
        try:
            # thread_local: what other threads do with the GPU meanwhile is no part of the step. The outer context
            # brings the current stream back also where torch.cuda.graph does not, when a capture fails.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                function()
        except Exception as error:
            raise RuntimeError(
                f"generate: the decode step cannot be captured in a CUDA graph (cuda_graph=False does without): {error}"
            ) from error
        return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, since cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
