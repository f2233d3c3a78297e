"""Generation: tokens, stop strings, streaming text, and cutting prompts to length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from ..base.arguments import check_integer
from ..model.decoder import Decoder
from ..model.kv_cache import PagedKVCache
from ..model.tokenizer import StreamDecoder, Tokenizer
from .decoding import decode
from .memory import default_chunk_tokens
from .prefill import check_request, prefill, token_tensor
from .sampling import Sampler

__all__ = ["StopStrings", "generate", "generate_text", "stream_text", "truncate_prompt"]

T = TypeVar("T")


class StopStrings:
    """Holds text back while it could still become a stop string, and cuts it where one begins.

    Raises:
        ValueError: ``stop`` holds something other than non-empty strings.
    """

    def __init__(self, stop: str | Sequence[str]) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in self._stop):
            raise ValueError(f"stop must be non-empty strings, got {stop!r}")
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The part of everything so far that may be shown; nothing more once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        matches = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if matches:  # the first to be complete, as if the text had come letter by letter; then the longest
            cut, self.found = min(matches, key=lambda match: (match[0] + len(match[1]), match[0]))
        else:
            cut = len(self._held) - self._longest_prefix_at_end()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What is still held back, at the end of the text; nothing when a stop string was found."""
        shown, self._held = "" if self.found is not None else self._held, ""
        return shown

    def _longest_prefix_at_end(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def generate(
    model: Decoder,
    input_ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Collection[int] | Tensor | None = None,
    seed: int | None = None,
    cache: PagedKVCache | None = None,
    cached_ids: Sequence[int] | Tensor = (),
    chunk_tokens: int | None = None,
    progress: bool = False,
    tokenizer: Tokenizer | None = None,
    cuda_graph: bool = True,
) -> Iterator[int]:
    """Generate tokens one by one.

    Args:
        model: the model.
        input_ids: the prompt, or what follows the tokens in ``cache``.
        max_new_tokens: most tokens to yield; fewer where ``model.max_seq_len`` has no room for them.
        temperature, top_p, top_k, min_p, repetition_penalty, seed: see :class:`Sampler`; greedy by default. The
            penalty counts the tokens of this call and ``cached_ids``.
        stop: strings that end the output. Tokens are yielded up to the one that completes the string; for
            text cut exactly before it, use :func:`generate_text`.
        stop_token_ids: tokens that end the output and are not yielded; None for the model's EOS tokens, ()
            for none.
        cache: continue this cache. Afterwards it holds the prompt and all yielded tokens but the last, which
            no later token needed: start the next turn's ``input_ids`` with it. So it does between two tokens and
            when the iterator is left early; it must not be changed before.
        cached_ids: tokens of ``cache`` that the repetition penalty counts.
        chunk_tokens, progress: see :func:`qwen_sparse.prefill`.
        tokenizer: to match ``stop``; ``model.tokenizer`` when None.
        cuda_graph: on a GPU, capture the decode step in a CUDA graph and replay it for every token (see
            docs/cuda-kernels.md); False launches its kernels one by one.

    Returns:
        An iterator of token ids. Arguments are checked at once; the prefill runs with the first token.

    Raises:
        ValueError: a bad argument, or a prompt that leaves no room for a token in ``model.max_seq_len``.
        MemoryError: the estimate exceeds the memory that is left.
        RuntimeError (from the iterator): logits are not finite, the cache was changed between two tokens, or the
            decode step cannot be captured.

    Example:
        >>> list(generate(model, model.tokenizer.encode("1, 2, 3,"), max_new_tokens=8))
    """
    sampler = Sampler(temperature, top_p, top_k, repetition_penalty, seed, min_p)
    stopper = StopStrings(stop)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, least=1)
    tokens = token_tensor(model, input_ids)
    if model.max_seq_len is not None:
        left = model.max_seq_len - tokens.shape[0] - (0 if cache is None else cache.seqlen)
        max_new_tokens = min(max_new_tokens, max(left, 1))
    check_request(
        model,
        tokens.shape[0],
        cache=cache,
        chunk_tokens=default_chunk_tokens(model.device) if chunk_tokens is None else chunk_tokens,
        max_new_tokens=max_new_tokens,
    )
    penalised = torch.cat((token_tensor(model, cached_ids, "cached_ids", allow_empty=True), tokens))
    if stop_token_ids is None:
        ends = frozenset(model.config.eos_token_ids)
    else:
        ends = frozenset(token_tensor(model, stop_token_ids, "stop_token_ids", allow_empty=True).tolist())
    decoder = StreamDecoder(model.tokenizer if tokenizer is None else tokenizer) if stop else None
    cache = model.new_cache() if cache is None else cache

    def run() -> Iterator[int]:
        cache.reserve(cache.seqlen + tokens.shape[0] + max_new_tokens)
        logits = prefill(model, tokens, chunk_tokens=chunk_tokens, cache=cache, progress=progress).logits
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=model.device)
        seen[0, penalised] = True
        for token in decode(
            model,
            cache,
            logits[None],
            seen,
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            ends=ends,
            cuda_graph=cuda_graph,
        ):
            yield token
            if decoder is not None:
                stopper.push(decoder.push(token))
                if stopper.found is not None:
                    return

    return run()


def generate_text(
    model: Decoder,
    prompt: str | Sequence[int] | Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Collection[int] | Tensor | None = None,
    seed: int | None = None,
    cache: PagedKVCache | None = None,
    cached_ids: Sequence[int] | Tensor = (),
    chunk_tokens: int | None = None,
    progress: bool = False,
    tokenizer: Tokenizer | None = None,
    cuda_graph: bool = True,
) -> Iterator[str]:
    """Generate text piece by piece: :func:`generate` for people.

    A piece never splits a UTF-8 character. Text that could become a stop string is held back until it cannot;
    the stop string itself is not part of the output.

    Args:
        prompt: text, or tokens.
        model, max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, stop, stop_token_ids, seed: see
            :func:`generate`.
        cache, cached_ids, chunk_tokens, progress, tokenizer, cuda_graph: see :func:`generate`.

    Raises:
        FileNotFoundError: no tokenizer was given and the model has none.
        ValueError, MemoryError: see :func:`generate`.
    """
    tokenizer, stopper = model.tokenizer if tokenizer is None else tokenizer, StopStrings(stop)
    input_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if isinstance(prompt, str) and not input_ids:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    tokens = generate(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_token_ids=stop_token_ids,
        seed=seed,
        cache=cache,
        cached_ids=cached_ids,
        chunk_tokens=chunk_tokens,
        progress=progress,
        cuda_graph=cuda_graph,
    )
    return stream_text(tokens, tokenizer, stopper)


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer, stopper: StopStrings) -> Iterator[str]:
    """The text of :func:`generate`'s tokens, piece by piece; no token is taken behind a stop string."""
    decoder = StreamDecoder(tokenizer)
    for token in tokens:
        if piece := stopper.push(decoder.push(token)):
            yield piece
        if stopper.found is not None:
            return
    if piece := stopper.push(decoder.flush()) + stopper.flush():
        yield piece


@overload
def truncate_prompt(
    input_ids: Tensor,
    max_tokens: int,
    *,
    keep: Literal["head", "tail", "both"] = "both",
    head_tokens: int | None = None,
) -> Tensor: ...
@overload
def truncate_prompt(
    input_ids: Sequence[T],
    max_tokens: int,
    *,
    keep: Literal["head", "tail", "both"] = "both",
    head_tokens: int | None = None,
) -> Sequence[T]: ...
def truncate_prompt(
    input_ids: Sequence[T] | Tensor,
    max_tokens: int,
    *,
    keep: Literal["head", "tail", "both"] = "both",
    head_tokens: int | None = None,
) -> Sequence[T] | Tensor:
    """Cut a prompt to at most ``max_tokens`` tokens.

    Args:
        input_ids: tokens, as a list, tuple or tensor ``[n]``; one that fits is returned as it is.
        max_tokens: most tokens to keep, >= 1.
        keep: the "head", the "tail", or "both" ends without the middle, since instructions tend to stand at
            the ends.
        head_tokens: with "both", tokens kept at the head, the rest coming from the tail; half (rounded up)
            when None.

    Raises:
        ValueError: an unknown ``keep``, or a number out of range.
    """
    if keep not in ("head", "tail", "both"):
        raise ValueError(f"keep must be 'head', 'tail' or 'both', got {keep!r}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
    if head_tokens is not None and keep != "both":
        raise ValueError(f"head_tokens goes with keep='both' only, got keep={keep!r}")
    if head_tokens is not None and not 0 <= head_tokens <= max_tokens:
        raise ValueError(f"head_tokens must be in [0, max_tokens = {max_tokens}], got {head_tokens}")
    num_tokens = len(input_ids)
    if num_tokens <= max_tokens:
        return input_ids
    head = {
        "head": max_tokens,
        "tail": 0,
        "both": (max_tokens + 1) // 2 if head_tokens is None else head_tokens,
    }[keep]
    tail = num_tokens - (max_tokens - head)
    if isinstance(input_ids, Tensor):
        return torch.cat((input_ids[:head], input_ids[tail:]))
    return [*input_ids[:head], *input_ids[tail:]]
