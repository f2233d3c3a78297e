"""Log-likelihoods of given tokens, without a vocabulary's logits of a whole text in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import PagedKVCache
from ..model.stats import ForwardStats
from .memory import default_chunk_tokens
from .prefill import check_request, chunk_ends, token_tensor

__all__ = ["LOGIT_ROWS", "Likelihoods", "last_hidden", "likelihoods", "of_logits"]

LOGIT_ROWS = 256
"""Rows whose logits are made at a time: of 152,064 words in float32, 156 MB."""


class Likelihoods(NamedTuple):
    """Of each target token."""

    log_probability: Tensor
    """float32 ``[n]``, natural logarithm."""
    greedy: Tensor
    """bool ``[n]``: whether it is the most likely token."""


def of_logits(logits: Tensor, targets: Tensor) -> Likelihoods:
    """From logits ``[n, vocab]`` and int64 ``[n]``."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return Likelihoods(chosen - logits.logsumexp(1), logits.argmax(1) == targets)


@torch.inference_mode()
def likelihoods(
    model: Decoder,
    input_ids: Sequence[int] | Tensor,
    targets: Sequence[int] | Tensor,
    *,
    cache: PagedKVCache | None = None,
    chunk_tokens: int | None = None,
) -> Likelihoods:
    """How likely the last ``len(targets)`` positions of ``input_ids`` make the tokens that follow them.

    Without a cache this is a prompt: prefilled as :func:`qwen_sparse.prefill` does, sparsely where that would. Behind a
    cache it is an output: dense, as tokens that were generated one by one.

    Args:
        model: the model.
        input_ids: tokens ``[n]``.
        targets: ``[m]``, 1 <= m <= n; the last is predicted by the last of ``input_ids``.
        cache: what ``input_ids`` continue; they are added to it.
        chunk_tokens: rows per prefill chunk; None: the device's default.

    Raises:
        ValueError: bad tokens, more targets than tokens, a foreign cache, or a sequence over ``model.max_seq_len``.
        MemoryError: the estimate exceeds the memory that is left.
    """
    tokens, wanted = token_tensor(model, input_ids), token_tensor(model, targets, "targets")
    if len(wanted) > len(tokens):
        raise ValueError(f"targets must be at most as many as input_ids, {len(tokens)}, got {len(wanted)}")
    chunk_tokens = default_chunk_tokens(model.device) if chunk_tokens is None else chunk_tokens
    check_request(model, len(tokens), cache=cache, chunk_tokens=chunk_tokens)
    sparse = cache is None and model.prefills_sparse(len(tokens))
    cache = model.new_cache() if cache is None else cache
    found, done = [], 0
    for hidden in last_hidden(model, tokens, len(wanted), cache, sparse=sparse, chunk_tokens=chunk_tokens):
        for rows in torch.split(hidden, LOGIT_ROWS):
            found.append(of_logits(model.logits(rows), wanted[done : done + len(rows)]))
            done += len(rows)
    return Likelihoods(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.inference_mode()
def last_hidden(
    model: Decoder,
    tokens: Tensor,
    rows: int,
    cache: PagedKVCache,
    *,
    sparse: bool,
    chunk_tokens: int,
    stats: ForwardStats | None = None,
) -> Iterator[Tensor]:
    """What :meth:`Decoder.logits` makes logits of, for the last ``rows`` of new tokens, prefill chunk by chunk.

    Args:
        model: the model.
        tokens: int64 ``[n]``, n >= rows, on the model's device.
        rows: how many; what precedes them runs without logits.
        cache: what the tokens continue; they are added to it.
        sparse: whether prefill chunks attend sparsely.
        chunk_tokens: rows per prefill chunk.
        stats: counters to add to; finished at the end.

    Returns:
        An iterator of ``[m, hidden]`` in the model's dtype, ``rows`` in all.
    """
    start = cache.seqlen
    total = start + len(tokens)
    cache.reserve(total)
    first = total - rows
    try:
        for begin, end in pairwise([start, *chunk_ends(start, total, chunk_tokens)]):
            hidden = model.forward(
                tokens[begin - start : end - start],
                cache,
                prompt_len=total,
                sparse=sparse,
                output="hidden" if end > first else "none",
                stats=stats,
            )
            if hidden is not None:
                yield hidden[max(first - begin, 0) :]
    finally:
        cache.pool.release_workspace()
        if stats is not None:
            stats.finish()
