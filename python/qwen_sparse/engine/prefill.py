"""Chunked prefill: a prompt into the KV cache, one prefill chunk at a time (arXiv 2501.15383).

Activations live for one prefill chunk, so their memory does not grow with the prompt. Every whole chunk is
committed to the cache: an interrupt or an error loses at most the chunk that was running.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..base.arguments import check_integer
from ..base.resources import available_memory, format_bytes, peak_resident_memory
from ..model.config import ModelConfig, SparseSwitches
from ..model.decoder import Decoder
from ..model.kv_cache import PagedKVCache, kv_cache_bytes, resolve_kv_cache_dtype
from ..model.stats import ForwardStats, Phase
from .memory import default_chunk_tokens, estimate_memory

__all__ = ["PrefillResult", "PrefillStats", "check_request", "prefill", "token_tensor"]

_BLOCK_M = 64  # rows of a block of sparse attention; also the rows that vote in selection by default


@dataclass(frozen=True)
class PrefillStats:
    """What a prefill cost."""

    tokens: int
    """New tokens (those already cached are not counted)."""
    seconds: dict[Phase, float]
    """By phase: linear (embedding, norms, projections, rotary, MLP, logits), selection, attention, cache."""
    total_seconds: float
    """Wall time of the call."""
    density: float
    """Attended pairs over causal pairs of the same rows, mean over layers and heads; 1 when dense."""
    kept: float | None
    """With a coverage: the share of attention that its block groups are estimated to hold, mean over layers, heads and
    blocks of rows; what they really hold is `qwen-sparse eval recall`'s. None when dense or by budgets."""
    peak_memory: int
    """Largest resident memory of the process during the call, bytes: exact when the call set a new record for
    the process, else the largest value seen at the fullest points of every layer. On a GPU, the largest memory
    that tensors took there."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens over wall time."""
        return self.tokens / self.total_seconds


@dataclass(frozen=True, eq=False)
class PrefillResult:
    """What :func:`prefill` returns."""

    logits: Tensor = field(repr=False)
    """float32 ``[vocab]`` of the last position, or ``[n, vocab]`` of every new position."""
    cache: PagedKVCache
    stats: PrefillStats


def prefill(
    model: Decoder,
    input_ids: Sequence[int] | Tensor,
    *,
    chunk_tokens: int | None = None,
    cache: PagedKVCache | None = None,
    progress: bool = False,
    logits: Literal["last", "all"] = "last",
) -> PrefillResult:
    """Run a prompt through the model and keep its keys and values.

    Args:
        model: the model.
        input_ids: the new tokens, a sequence of ints or a tensor ``[n]`` of any integer dtype.
        chunk_tokens: rows per prefill chunk; when None, 16384 on a CPU and 32768 on a GPU. Dense results do not
            depend on it up to rounding, nor do block groups (a coverage); the columns and distances of budgets are
            chosen once per chunk.
        cache: continue this cache (``model.new_cache()`` or an earlier result's); a new one when None. When
            anything is raised on the way, it holds the whole chunks that were finished, and can be used.
        progress: show a bar with tokens per second and the time left.
        logits: of the "last" position, or of "all" new positions (n x vocabulary x 4 bytes).

    Returns:
        Logits, cache and statistics. Rows that are read are dense also where prefill is sparse: the prompt's last block
        (of 64 positions), and up to 512 new tokens on top of a cache.

    Raises:
        ValueError: empty or out-of-range tokens, a foreign cache, or a sequence over ``model.max_seq_len``.
        MemoryError: the estimate of what this call adds exceeds the memory that is left (before any work).

    Example:
        >>> first = prefill(model, tokens, progress=True)
        >>> second = prefill(model, more_tokens, cache=first.cache)
    """
    if logits not in ("last", "all"):
        raise ValueError(f"prefill: logits must be 'last' or 'all', got {logits!r}")
    chunk_tokens = default_chunk_tokens(model.device) if chunk_tokens is None else chunk_tokens
    tokens = token_tensor(model, input_ids)
    cached = 0 if cache is None else cache.seqlen
    total = cached + tokens.shape[0]
    check_request(model, tokens.shape[0], cache=cache, chunk_tokens=chunk_tokens, all_logits=logits == "all")

    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    began, record = time.perf_counter(), peak_resident_memory()
    cache = model.new_cache() if cache is None else cache
    cache.reserve(total)
    sparse = model.prefills_sparse(total, cached)
    stats = ForwardStats(model.device, sampling=True)
    outputs = []
    ends = chunk_ends(cached, total, chunk_tokens)
    try:
        with tqdm(total=tokens.shape[0], desc="prefill", unit="tok", unit_scale=True, disable=not progress) as bar:
            for start, end in zip([cached, *ends], ends, strict=False):
                output = model.forward(
                    tokens[start - cached : end - cached],
                    cache,
                    prompt_len=total,
                    sparse=sparse,
                    output="all" if logits == "all" else "last" if end == total else "none",
                    stats=stats,
                )
                if output is not None:
                    outputs.append(output)
                bar.update(end - start)
    finally:
        cache.pool.release_workspace()

    stats.finish()
    peak = peak_resident_memory()
    if on_gpu:
        peak, record = torch.cuda.max_memory_allocated(model.device), 0
    return PrefillResult(
        # A copy made outside inference mode: callers may change it in place.
        logits=torch.cat(outputs) if logits == "all" else outputs[-1].clone(),
        cache=cache,
        stats=PrefillStats(
            tokens=tokens.shape[0],
            seconds=stats.seconds,
            total_seconds=time.perf_counter() - began,
            density=stats.attended_pairs / stats.causal_pairs,
            kept=stats.kept,
            peak_memory=peak if peak > record else stats.peak_memory,
        ),
    )


def chunk_ends(start: int, total: int, chunk_tokens: int) -> list[int]:
    """Positions where prefill chunks end: each at most ``chunk_tokens`` long, cut between blocks of 64 rows.

    A last chunk of fewer than 64 rows would leave the choice of sparse indexes to those few; it gets a block
    from the chunk before where that has one to give.
    """
    ends: list[int] = []
    while start < total:
        end = min(start + chunk_tokens, total)
        if end < total and end // _BLOCK_M * _BLOCK_M > start:
            end = end // _BLOCK_M * _BLOCK_M
            if total - end < _BLOCK_M and end - _BLOCK_M > start and total - end + _BLOCK_M <= chunk_tokens:
                end -= _BLOCK_M
        ends.append(end)
        start = end
    return ends


def token_tensor(
    model: Decoder,
    token_ids: Collection[int] | Tensor,
    name: str = "input_ids",
    *,
    allow_empty: bool = False,
) -> Tensor:
    """Token ids as int64 ``[n]`` on the model's device.

    Args:
        model: the model.
        token_ids: a list, set or array of integers, or a tensor ``[n]`` of any integer dtype.
        name: the argument that they come from, for errors.
        allow_empty: whether n may be 0.

    Raises:
        ValueError: not one-dimensional, empty, not integers, or an id outside the vocabulary.
    """
    if isinstance(token_ids, str):
        raise ValueError(f"{name} must be token ids (see model.tokenizer.encode), got a string")
    if isinstance(token_ids, Set):
        token_ids = tuple(token_ids)
    try:
        tokens = token_ids if isinstance(token_ids, Tensor) else torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a flat sequence of integers: {error}") from error
    if tokens.ndim != 1 or (tokens.shape[0] == 0 and not allow_empty):
        least = 0 if allow_empty else 1
        raise ValueError(f"{name} must have shape [n] with n >= {least}, got {list(tokens.shape)}")
    if tokens.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=model.device)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {tokens.dtype}")
    unsigned, tokens = tokens.dtype == torch.uint64, tokens.to(torch.int64)  # torch finds no minimum of unsigned ones
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        wrong = high if low >= 0 else low % 2**64 if unsigned else low
        raise ValueError(f"{name} must be in [0, vocab_size = {model.config.vocab_size}), got {wrong}")
    return tokens.to(model.device)


def check_request(
    model: Decoder,
    num_tokens: int,
    *,
    cache: PagedKVCache | None,
    chunk_tokens: int,
    max_new_tokens: int = 0,
    all_logits: bool = False,
) -> None:
    """Refuse a prompt that cannot work, before work starts.

    Args:
        model: the model.
        num_tokens: new prompt tokens.
        cache: what they continue.
        chunk_tokens: rows per prefill chunk.
        max_new_tokens: tokens to generate after the prompt.
        all_logits: whether the logits of every row are kept.

    Raises:
        ValueError: a bad chunk size, a cache of another model, or a sequence longer than ``max_seq_len``.
        MemoryError: weights aside, the estimate exceeds what is available; the message has both.
    """
    check_integer("chunk_tokens", chunk_tokens, least=1)
    if cache is not None:
        _check_cache(model, cache)
    cached = 0 if cache is None else cache.seqlen
    total = cached + num_tokens + max_new_tokens
    if model.max_seq_len is not None and total > model.max_seq_len:
        parts = f"{cached} cached + {num_tokens} prompt + {max_new_tokens} new = {total}"
        raise ValueError(f"the sequence must have at most max_seq_len = {model.max_seq_len} tokens, got {parts}")
    available = available_memory(model.device)
    if available is None:
        return
    storage = resolve_kv_cache_dtype(model.kv_cache_dtype, model.dtype) if cache is None else cache.pool.storage_dtype
    estimate = estimate_memory(
        model.config,
        total,
        kv_cache_dtype="int8" if storage == torch.int8 else "auto",
        dtype=model.dtype,
        chunk_tokens=min(chunk_tokens, num_tokens),
        device=model.device,
    )
    reserved = 0 if cache is None else kv_cache_bytes(model.config, cache.capacity, storage)
    needed = estimate.total - estimate.weights - min(reserved, estimate.kv_cache)
    needed += 4 * num_tokens * model.config.vocab_size * all_logits
    if needed > available:
        raise MemoryError(
            f"a sequence of {total} tokens is estimated to need {format_bytes(needed)} more memory, and "
            f"{format_bytes(available)} are available; estimate for all: {estimate}. "
            "A smaller chunk_tokens lowers activations, kv_cache_dtype='int8' the KV cache"
        )


def _check_cache(model: Decoder, cache: PagedKVCache) -> None:
    """Keys and values depend on the weights and on how keys are rotated, not on which of them attention reads."""
    pool = cache.pool
    same = _what_keys_depend_on(pool.config) == _what_keys_depend_on(model.config)
    if not same or pool.dtype != model.dtype or pool.device != model.device:
        raise ValueError(
            "cache must come from this model (same sizes, rotary embedding, chunk length of Dual Chunk Attention, "
            f"dtype and device): use model.new_cache(), got {cache!r} of another one"
        )


def _what_keys_depend_on(config: ModelConfig) -> tuple[ModelConfig, int | None]:
    """The config without attention's options, and the chunk length that keys are rotated within."""
    rest = replace(config, dual_chunk=None, sparse=None, sparse_switches=SparseSwitches(), eos_token_ids=())
    return rest, None if config.dual_chunk is None else config.dual_chunk.chunk_len
