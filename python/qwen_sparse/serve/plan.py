"""How much memory serving takes: what is planned before the weights are loaded, and what is checked for each prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.resources import format_bytes
from ..engine.memory import default_chunk_tokens, estimate_memory
from ..model.config import PAGE_SIZE, ModelConfig
from ..model.kv_cache import kv_cache_bytes, resolve_kv_cache_dtype

__all__ = ["EngineOptions", "plan_pages", "prefill_bytes"]


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs.

    Raises:
        ValueError: a value out of range.
    """

    max_model_len: int | None = None
    """Longest sequence, prompt and output together; None: the model's."""
    chunk_tokens: int | None = None
    """Rows per prefill chunk; None: the device's default."""
    max_num_seqs: int = 16
    """Sequences that are computed at the same time."""
    max_queue: int = 64
    """Requests that may wait."""
    kv_cache_memory: int | None = None
    """Bytes of the KV cache's pages; None: what ``memory_utilization`` leaves for them, but no more than
    ``max_num_seqs`` sequences of full length need."""
    memory_utilization: float = 0.9
    """Share of the memory available at the start that may be taken."""
    prefix_caching: bool = True
    """Whether pages of finished requests are kept for prompts that begin alike."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "chunk_tokens", "max_num_seqs", "max_queue", "kv_cache_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization must be in (0, 1], got {self.memory_utilization}")

    def length_for(self, config: ModelConfig, max_seq_len: int | None = None) -> int:
        """The longest sequence that is served of this model.

        Args:
            config: the model's.
            max_seq_len: the limit that it was loaded with; None: without one, or not yet.

        Raises:
            ValueError: it is longer than the model's.
        """
        if max_seq_len is None:
            if self.max_model_len is not None:
                config.check_length("max_model_len", self.max_model_len)
            longest = config.longest or config.max_position_embeddings
        else:
            longest = max_seq_len
            if self.max_model_len is not None and self.max_model_len > longest:
                raise ValueError(
                    f"max_model_len must be at most {longest}, the model's max_seq_len, got {self.max_model_len}"
                )
        if self.max_model_len is None:
            return longest
        return self.max_model_len


def prefill_bytes(
    config: ModelConfig,
    seqlen: int,
    *,
    rows: int,
    kv_cache_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Bytes that the prefill of a sequence takes beside weights and pages.

    As :func:`qwen_sparse.estimate_memory`, and a workspace also for 16-bit pages, which may lie anywhere in the pool.

    Args:
        config: the model.
        seqlen: tokens of the whole sequence.
        rows: of one prefill chunk.
        kv_cache_dtype: "auto", "bfloat16" or "int8".
        dtype: of weights and activations.
        device: where the model runs.
    """
    estimate = estimate_memory(
        config, seqlen, kv_cache_dtype=kv_cache_dtype, dtype=dtype, chunk_tokens=min(rows, seqlen), device=device
    )
    gathered = 2 * seqlen * config.num_kv_heads * config.head_dim * dtype.itemsize
    if resolve_kv_cache_dtype(kv_cache_dtype, dtype) == torch.int8:
        gathered = 0  # in the estimate
    return estimate.activations + estimate.indexes + estimate.workspace + gathered


def plan_pages(
    config: ModelConfig,
    options: EngineOptions,
    *,
    longest: int,
    available: int | None,
    kv_cache_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
    weights: int,
) -> int:
    """Pages of the KV cache: enough for one sequence of full length at least.

    Args:
        config: the model.
        options: the engine's.
        longest: the length of :meth:`EngineOptions.length_for`, in tokens.
        available: bytes that can still be taken on the device; None: unknown.
        kv_cache_dtype, dtype, device: see :func:`prefill_bytes`.
        weights: bytes of weights that ``available`` is still to hold; 0 when they are loaded.

    Raises:
        ValueError: ``kv_cache_memory`` does not hold one sequence of full length.
        MemoryError: the memory does not; the message says what length would fit.
    """
    storage = resolve_kv_cache_dtype(kv_cache_dtype, dtype)
    page_bytes = kv_cache_bytes(config, PAGE_SIZE, storage)
    least = -(-longest // PAGE_SIZE)
    rows = default_chunk_tokens(device) if options.chunk_tokens is None else options.chunk_tokens

    def beside(seqlen: int) -> int:
        return weights + prefill_bytes(
            config, seqlen, rows=rows, kv_cache_dtype=kv_cache_dtype, dtype=dtype, device=device
        )

    def fits(seqlen: int, budget: float) -> bool:
        return beside(seqlen) + -(-seqlen // PAGE_SIZE) * page_bytes <= budget

    if options.kv_cache_memory is not None:
        pages = options.kv_cache_memory // page_bytes
        if pages < least:
            raise ValueError(
                f"kv_cache_memory must hold one sequence of max_model_len = {longest} tokens, "
                f"{format_bytes(least * page_bytes)}, got {format_bytes(options.kv_cache_memory)}"
            )
        if available is not None and beside(longest) + pages * page_bytes > available:
            raise MemoryError(
                f"serving needs {format_bytes(beside(longest) + pages * page_bytes)}, of it "
                f"{format_bytes(pages * page_bytes)} for the KV cache, and {format_bytes(available)} are available; "
                "lower kv_cache_memory or max_model_len"
            )
        return pages
    most = least * options.max_num_seqs
    if available is None:
        return most
    budget = available * options.memory_utilization
    if not fits(longest, budget):
        advice = "int8 pages, a smaller prefill chunk" if storage != torch.int8 else "a smaller prefill chunk"
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, budget) else (low, middle)
        alternative = f"max_model_len = {low} would fit, or try {advice}" if low else "not even one token fits"
        raise MemoryError(
            f"a sequence of max_model_len = {longest} tokens needs {format_bytes(least * page_bytes)} for the KV cache "
            f"and {format_bytes(beside(longest))} beside it, and {format_bytes(int(budget))} may be taken "
            f"({options.memory_utilization:.0%} of what is available); {alternative}"
        )
    return min(most, int((budget - beside(longest)) // page_bytes))
