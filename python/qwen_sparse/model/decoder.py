"""The decoder of every architecture: weights as plain tensors, and a forward pass for a prefill chunk or decode step.

What architectures differ in are parts that a config has or has not (:mod:`qwen_sparse.architectures`).
``Decoder.forward`` takes the next tokens of the one sequence in a cache; ``Decoder.decode_step`` takes one token of
each sequence of a batch and depends on tensors of the device only, so that a CUDA graph can hold it. Both run the
same layers: normalise, project (q, k, v fused), normalise heads, rotate, write K and V to the cache, read all keys
back, attend, project, and the MLP (gate and up fused) or experts.

Which attention runs:

- rotations: plain RoPE in ``forward`` while the sequence fits the chunk length (Dual Chunk Attention equals it
  there), else the three rotations of Dual Chunk Attention (arXiv 2402.17463);
- keys: for a sparse prefill, by the config, block groups (by head and 64 rows, :mod:`qwen_sparse.model.coverage`)
  or vertical-slash attention (chosen per head and prefill chunk, MInference, arXiv 2407.02490), but for the prompt's
  last block, whose rows are read; else all, or the window of a layer that has one. Up to 16 dense rows read the
  cache's pages directly, more read its workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.arguments import check_integer
from ..base.resources import available_memory, format_bytes
from ..kernels import ops
from . import rope
from .attention import CONTINUATION_ROWS, Queries, attend, causal_pairs, rows_of_last_block, window_pairs
from .config import ModelConfig
from .kv_cache import KVPool, KVRotation, PagedKVCache, Slots, kv_cache_bytes, resolve_kv_cache_dtype
from .linear import linear
from .mlp import ExpertWeights, Mlp
from .quantized import Int8Matrix, Matrix
from .stats import ForwardStats
from .tokenizer import Tokenizer

__all__ = [
    "AttentionMode",
    "Decoder",
    "DecoderWeights",
    "LayerWeights",
    "Output",
    "check_coverage",
]

DECODE_ROWS = 16
"""Dense steps of up to this many rows read pages through decode_attention; longer ones read the workspace."""

_NORM_ROWS = {"cpu": 256, "cuda": 4096}  # rows normalised at a time: float32 temporaries stay in the L2 cache

_SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "output_bias",
    "qk_norm",
    "experts",
)
"""Fields of a config that the shapes of weights follow from."""

AttentionMode = Literal["auto", "dense", "sparse"]
Output = Literal["all", "last", "none", "hidden"]


@dataclass(frozen=True, eq=False, repr=False)
class LayerWeights:
    """One decoder layer. Matrices are ``[out, in]``; biases are None where the config has none."""

    input_norm: Tensor
    """``[hidden]``."""
    qkv: Matrix
    """``[(num_heads + 2 num_kv_heads) head_dim, hidden]``: rows of q, then k, then v."""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    """``[head_dim]``, of every query head; None where heads are not normalised."""
    k_norm: Tensor | None
    o: Matrix
    """``[hidden, num_heads head_dim]``."""
    o_bias: Tensor | None
    post_attention_norm: Tensor
    mlp: Mlp | ExpertWeights


@dataclass(frozen=True, eq=False, repr=False)
class DecoderWeights:
    """All weights; ``lm_head`` is the embedding itself when they are tied and it is not quantised."""

    embedding: Tensor
    """``[vocab, hidden]``."""
    layers: Sequence[LayerWeights]
    norm: Tensor
    lm_head: Matrix
    """``[vocab, hidden]``."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; tied embeddings count once."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Each tensor once, layers in their order."""
        seen = set()
        for tensor in _tensors((self.embedding, *self.layers, self.norm, self.lm_head)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _tensors(parts: Iterable[object]) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, LayerWeights | Mlp | ExpertWeights | Int8Matrix):
            yield from _tensors(vars(part).values())


@dataclass(frozen=True, eq=False, repr=False)
class _Step:
    """What every layer of one forward pass shares. Rows are those of one sequence after the other's."""

    pool: KVPool
    slots: Slots
    block_table: Tensor
    """int32 ``[batch, max_pages]``."""
    seqlens_k: Tensor
    """int32 ``[batch]``, this step's tokens included."""
    dual_chunk: bool
    """Whether queries take the three rotations of Dual Chunk Attention."""
    scale: float
    stats: ForwardStats
    scale_factors: Tensor | None = None
    """float32 ``[batch]``, factors on ``scale``; only where pages are read."""
    cache: PagedKVCache | None = None
    """The one sequence, whose keys can be read at once; None: pages are read."""
    num_keys: int = 0
    """``seqlens_k`` of that sequence."""
    sparse: bool = False
    dense_rows: int = 0
    """Of a sparse step, rows at its end that attend all keys nonetheless: those of the prompt's last block."""
    lse: Tensor | None = None
    """float32 ``[rows, num_heads]``, where dense attention of all rows leaves its log-sum-exp."""


P = ParamSpec("P")
T = TypeVar("T")


def _inference(method: Callable[Concatenate[Decoder, P], T]) -> Callable[Concatenate[Decoder, P], T]:
    """No gradients, and the model's own dtype where the caller has autocast on: caches and kernels take that alone."""

    @wraps(method)
    def run(self: Decoder, /, *args: P.args, **kwargs: P.kwargs) -> T:
        kind = self.device.type
        autocast = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with torch.inference_mode(), autocast:
            return method(self, *args, **kwargs)

    return run


def check_coverage(attention: AttentionMode, coverage: float | None) -> None:
    """Raise ValueError for a coverage given with attention that is never sparse."""
    if coverage is not None and attention == "dense":
        raise ValueError(f"coverage must be None with attention='dense', which is never sparse, got {coverage}")


@dataclass(frozen=True, eq=False)
class Decoder:
    """A loaded model; :func:`qwen_sparse.load_model` makes one. It equals itself only."""

    config: ModelConfig
    weights: DecoderWeights
    dtype: torch.dtype
    """Of weights and activations."""
    device: torch.device
    kv_cache_dtype: str = "auto"
    max_seq_len: int | None = None
    """Most tokens of a sequence; None: limited by memory only."""
    attention: AttentionMode = "auto"
    path: Path | None = None
    """Directory that the model was loaded from."""
    quantization: str | None = None
    """Of the matrices: None (``dtype``) or "int8"."""

    def __post_init__(self) -> None:
        if self.attention not in ("auto", "dense", "sparse"):
            raise ValueError(f"attention must be 'auto', 'dense' or 'sparse', got {self.attention!r}")
        asked = self.config.sparse_switches.enabled if self.attention == "auto" else self.attention == "sparse"
        if asked and self.config.sparse is None:
            why = " where sparse_attention_enabled is true in config.json" if self.attention == "auto" else ""
            raise ValueError(
                f"attention {self.attention!r} needs budgets{why} (sparse_attention_config.json beside the model, or "
                "sparse_attention_config inside dual_chunk_attention_config) or a coverage; this model has none. "
                "attention='dense' needs neither"
            )
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise ValueError(f"max_seq_len must be >= 1 or None, got {self.max_seq_len}")
        resolve_kv_cache_dtype(self.kv_cache_dtype, self.dtype)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Decoder({str(self.path) if self.path else None!r}, num_layers={self.config.num_layers}, {dtype} on "
            f"{self.device}, weights {format_bytes(self.weights.nbytes)}, kv_cache_dtype={self.kv_cache_dtype!r}, "
            f"max_seq_len={self.max_seq_len}, attention={self.attention!r}"
            + (f", quantization={self.quantization!r})" if self.quantization else ")")
        )

    def with_options(
        self,
        *,
        attention: AttentionMode | None = None,
        kv_cache_dtype: str | None = None,
        config: ModelConfig | None = None,
        coverage: float | None = None,
    ) -> Decoder:
        """The same weights with another attention, cache dtype, config or coverage.

        ``config`` may differ in what does not shape the weights: rotary embedding, Dual Chunk Attention, budgets.

        Example:
            >>> plain = model.with_options(config=dataclasses.replace(model.config, dual_chunk=None))

        Raises:
            ValueError: an unknown value, a config of other sizes, sparse attention without budgets and without
                coverage, or dense attention with one.
        """
        config = self.config if config is None else config
        for name in _SHAPES:
            if getattr(config, name) != getattr(self.config, name):
                raise ValueError(
                    f"with_options: config.{name} must be the weights', {getattr(self.config, name)}, "
                    f"got {getattr(config, name)}"
                )
        attention = self.attention if attention is None else attention
        check_coverage(attention, coverage)
        return replace(
            self,
            attention=attention,
            kv_cache_dtype=self.kv_cache_dtype if kv_cache_dtype is None else kv_cache_dtype,
            config=config if coverage is None else config.with_coverage(coverage),
        )

    @cached_property
    def inv_freq(self) -> Tensor:
        """float64 ``[head_dim / 2]``, radians per position."""
        return rope.inverse_frequencies(self.config).to(self.device)

    @cached_property
    def attention_factor(self) -> float:
        """YaRN's factor on cos and sin."""
        return rope.attention_factor(self.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the model.

        Raises:
            FileNotFoundError: the model has no directory or no tokenizer.json.
        """
        if self.path is None:
            raise FileNotFoundError("this model was not loaded from a directory; give a tokenizer explicitly")
        return Tokenizer.from_directory(self.path)

    @cached_property
    def _kv_rotation(self) -> KVRotation:
        config = self.config
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        biases = [layer.qkv_bias for layer in self.weights.layers]
        k_bias = [
            bias[q_size : q_size + kv_size].float().view(config.num_kv_heads, config.head_dim)
            for bias in biases
            if bias is not None
        ]
        return KVRotation(
            self.inv_freq,
            self.attention_factor,
            chunk_len=config.dual_chunk.chunk_len if config.dual_chunk else None,
            k_bias=k_bias or None,
        )

    def new_pool(self, num_pages: int) -> KVPool:
        """Pages of 128 tokens for sequences that share them (:class:`qwen_sparse.PagedKVCache`)."""
        return KVPool(
            self.config,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            num_pages=num_pages,
            rotation=self._kv_rotation,
            device=self.device,
        )

    def new_cache(self, capacity: int = 0) -> PagedKVCache:
        """An empty KV cache for this model with room for ``capacity`` tokens; it grows on demand.

        Raises:
            ValueError: ``capacity`` is no integer >= 0.
            MemoryError: it takes more than the device has left.
        """
        capacity = check_integer("new_cache: capacity", capacity, least=0)
        storage = resolve_kv_cache_dtype(self.kv_cache_dtype, self.dtype)
        needed, available = kv_cache_bytes(self.config, capacity, storage), available_memory(self.device)
        if capacity and available is not None and needed > available:
            raise MemoryError(
                f"new_cache: a capacity of {capacity} tokens takes {format_bytes(needed)}, and "
                f"{format_bytes(available)} are available"
            )
        return PagedKVCache.owning(self.new_pool(0), capacity)

    def prefills_sparse(self, prompt_len: int, cached: int = 0) -> bool:
        """Whether a prompt of this many tokens is prefilled with sparse attention where ``cached`` of them are cached.

        Up to 512 tokens behind cached ones are not, whatever the model's attention: their rows are read.
        """
        sparse = self.config.sparse
        if cached and prompt_len - cached <= CONTINUATION_ROWS:
            return False
        if self.attention != "auto" or sparse is None:
            return self.attention == "sparse"
        return sparse.enabled and prompt_len > sparse.threshold

    def softmax_scale(self, seqlen: int) -> float:
        """head_dim^-1/2, times m squared of Dual Chunk Attention for a sequence beyond the trained length."""
        scale: float = self.config.head_dim**-0.5
        if self.config.dual_chunk is not None:
            original = self.config.dual_chunk.original_max_position_embeddings
            scale *= rope.dual_chunk_temperature(seqlen, original) ** 2
        return scale

    @_inference
    def forward(
        self,
        input_ids: Tensor,
        cache: PagedKVCache,
        *,
        prompt_len: int = 0,
        sparse: bool = False,
        output: Output = "last",
        stats: ForwardStats | None = None,
    ) -> Tensor | None:
        """Run the next tokens of the cached sequence and commit them to the cache.

        Args:
            input_ids: int64 ``[n]``, on the model's device.
            cache: tokens so far; grows by n, or stays as it was if anything is raised.
            prompt_len: length of the whole prompt when this is one of its prefill chunks; the temperature of
                Dual Chunk Attention follows the larger of it and the current length.
            sparse: block groups or vertical-slash attention, by the config; the prompt's last 64 rows (from a multiple
                of 64 on) are dense all the same.
            output: "all" rows' logits, those of the "last" row, "none", or all rows as :meth:`logits` takes them
                ("hidden").
            stats: counters to add to.

        Returns:
            float32 logits ``[n, vocab]`` for "all", ``[vocab]`` for "last", None for "none"; ``[n, hidden]`` in the
            model's dtype for "hidden".
        """
        stats = ForwardStats(self.device, measuring=False) if stats is None else stats
        num_rows = input_ids.shape[0]
        step = self._prefill_step(num_rows, cache, prompt_len, sparse, stats)
        # Behind the last layer's keys and values, only rows that logits are wanted of go on.
        rows = {"all": num_rows, "hidden": num_rows, "last": 1, "none": 0}[output]
        hidden = self._run(input_ids, rows, step)
        result = hidden if output == "hidden" else self.logits(hidden)
        stats.lap("linear")
        cache.commit(num_rows)
        if output == "none":
            return None
        return result[0] if output == "last" else result

    @_inference
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[n, vocab]`` of rows ``[n, hidden]`` behind the final norm."""
        return linear(hidden, self.weights.lm_head).float()

    @_inference
    def forward_layer(
        self, layer: int, hidden: Tensor, cache: PagedKVCache, *, prompt_len: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer, densely, for the next tokens of the cached sequence; commits nothing.

        Args:
            layer: its number.
            hidden: ``[n, hidden]``, what the layer before returned (the first: embeddings).
            cache: tokens so far. Keys and values of the new ones are written behind them.
            prompt_len: as in :meth:`forward`.

        Returns:
            Hidden states ``[n, hidden]`` and attention's log-sum-exp, float32 ``[n, num_heads]``.
        """
        num_rows = hidden.shape[0]
        lse = torch.empty(num_rows, self.config.num_heads, dtype=torch.float32, device=self.device)
        stats = ForwardStats(self.device, measuring=False)
        step = replace(self._prefill_step(num_rows, cache, prompt_len, False, stats), lse=lse)
        return self._layer(layer, hidden, num_rows, step), lse

    @_inference
    def queries(self, layer: int, hidden: Tensor, start: int, *, critical_rows: int = 0) -> Queries:
        """The queries of rows from position ``start`` on, in every rotation that attention needs.

        Args:
            layer: its number.
            hidden: ``[n, hidden]``, what the layer before returned.
            start: position of the first row.
            critical_rows: how many of the last rows also get the rotations that selection needs under Dual Chunk
                Attention.
        """
        end = start + hidden.shape[0]
        q, k, _ = self._qkv(layer, hidden)
        positions = torch.arange(start, end, device=self.device)
        return self._rotate(q, k, positions, self._beyond_chunk(end), critical_rows)[0]

    @_inference
    def decode_step(self, input_ids: Tensor, seqlens: Tensor, pool: KVPool, block_table: Tensor) -> Tensor:
        """One more token of each sequence of a batch, without the host reading anything from the device.

        All that changes from step to step is in tensors, and shapes are those of the arguments: captured in a CUDA
        graph, the step can be replayed for as long as the pages last, over chunk borders and beyond the trained
        length. Keys and values are written to the pages; committing them is left to the caller.

        Args:
            input_ids: int64 ``[batch]``, on the model's device.
            seqlens: int64 ``[batch]``, tokens that each sequence has cached, and so the new token's position.
            pool: the pages.
            block_table: int32 ``[batch, max_pages]``, the pages of each sequence in order, with room for the new
                token; ``cache.block_table`` for the one sequence of a cache.

        Returns:
            float32 logits ``[batch, vocab]``.
        """
        dual_chunk = self.config.dual_chunk
        original = 0 if dual_chunk is None else dual_chunk.original_max_position_embeddings
        step = _Step(
            pool=pool,
            slots=pool.slots(seqlens[:, None], block_table),
            block_table=block_table,
            seqlens_k=(seqlens + 1).int(),
            dual_chunk=dual_chunk is not None,
            scale=self.config.head_dim**-0.5,
            stats=ForwardStats(self.device, measuring=False),
            scale_factors=rope.dual_chunk_scale_factors(seqlens + 1, original) if original > 0 else None,
        )
        return self.logits(self._run(input_ids, input_ids.shape[0], step))

    def _beyond_chunk(self, end: int) -> bool:
        """Whether a prefill chunk that ends there takes the three rotations of Dual Chunk Attention."""
        return self.config.dual_chunk is not None and end > self.config.dual_chunk.chunk_len

    def _prefill_step(
        self, num_rows: int, cache: PagedKVCache, prompt_len: int, sparse: bool, stats: ForwardStats
    ) -> _Step:
        end = cache.seqlen + num_rows
        length = max(prompt_len, end)
        slots = cache.next_slots(num_rows)  # may grow the block table
        return _Step(
            pool=cache.pool,
            slots=slots,
            block_table=cache.block_table,
            seqlens_k=torch.full((1,), end, dtype=torch.int32, device=self.device),
            dual_chunk=self._beyond_chunk(end),
            scale=self.softmax_scale(length),
            stats=stats,
            cache=cache,
            num_keys=end,
            sparse=sparse,
            dense_rows=rows_of_last_block(num_rows, end, length),
        )

    def _run(self, input_ids: Tensor, output_rows: int, step: _Step) -> Tensor:
        """All layers and the final norm; ``[output_rows, hidden]`` of the last rows."""
        num_rows, last_layer = input_ids.shape[0], self.config.num_layers - 1
        step.stats.start()
        hidden = F.embedding(input_ids, self.weights.embedding)
        for layer in range(last_layer + 1):
            hidden = self._layer(layer, hidden, output_rows if layer == last_layer else num_rows, step)
        return _rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps)

    def _layer(self, layer: int, hidden: Tensor, rows: int, step: _Step) -> Tensor:
        """One decoder layer: all K and V are cached, the last ``rows`` rows are returned."""
        weights, sparse, stats = self.weights.layers[layer], self.config.sparse, step.stats
        q, k, v = self._qkv(layer, hidden)
        critical_rows = sparse.last_q if step.sparse and sparse is not None else 0
        rotated, k = self._rotate(q, k, step.slots.positions, step.dual_chunk, critical_rows)
        stats.lap("linear")
        step.pool.append(layer, k, v, step.slots)
        stats.lap("cache")
        if rows == 0:
            return hidden[:0]
        attended = self._attend(layer, rotated, rows, step)
        stats.sample_memory()
        del q, k, v, rotated  # the MLP's activations take their place
        hidden = hidden[-rows:] + linear(attended.flatten(1), weights.o, weights.o_bias)
        normed = _rms_norm(hidden, weights.post_attention_norm, self.config.rms_norm_eps)
        hidden += weights.mlp(normed)
        stats.sample_memory()
        stats.lap("linear")
        return hidden

    def _qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[n, heads, head_dim]``, not yet rotated."""
        config, weights = self.config, self.weights.layers[layer]
        normed = _rms_norm(hidden, weights.input_norm, config.rms_norm_eps)
        qkv = linear(normed, weights.qkv, weights.qkv_bias).view(hidden.shape[0], -1, config.head_dim)
        q, k, v = torch.split(qkv, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = _rms_norm(q, weights.q_norm, config.rms_norm_eps)
            k = _rms_norm(k, weights.k_norm, config.rms_norm_eps)
        return q, k, v

    def _rotate(
        self, q: Tensor, k: Tensor, positions: Tensor, beyond_chunk: bool, critical_rows: int
    ) -> tuple[Queries, Tensor]:
        """Queries in every rotation that attention needs, and keys."""
        dual_chunk = self.config.dual_chunk
        if dual_chunk is None or not beyond_chunk:
            rotated = ops.rotary(q, k, positions, self.inv_freq, attention_factor=self.attention_factor)
            return Queries(rotated[0]), rotated[1]
        rotated = ops.rotary(
            q,
            k,
            positions,
            self.inv_freq,
            attention_factor=self.attention_factor,
            chunk_size=dual_chunk.chunk_size,
            chunk_len=dual_chunk.chunk_len,
            critical_rows=critical_rows,
        )
        q_intra, q_succ, q_inter, k, q_succ_critical, q_inter_critical = cast(ops.DualChunkRotary, rotated)
        return Queries(q_intra, q_succ, q_inter, dual_chunk.chunk_len, q_succ_critical, q_inter_critical), k

    def _attend(self, layer: int, q: Queries, rows: int, step: _Step) -> Tensor:
        """Attention output ``[rows, num_heads, head_dim]`` of the last rows over everything cached."""
        stats, cache, num_keys, window = step.stats, step.cache, step.num_keys, self.config.window(layer)
        if cache is None:
            return self._attend_pages(layer, q, step)
        pairs = causal_pairs(rows, num_keys) * self.config.num_heads
        attended = pairs if window is None else window_pairs(rows, num_keys, window) * self.config.num_heads
        if step.sparse and rows > step.dense_rows and window is None:
            sparse = self.config.sparse
            if sparse is None:
                raise ValueError("forward: sparse needs budgets or a coverage, and this model has neither")
            k, v = cache.workspace(layer, num_keys)
            stats.lap("cache")
            out = attend(q, k, v, step.scale, sparse.of_layer(layer), step.dense_rows, rows=rows, stats=stats)
        elif rows <= DECODE_ROWS and step.lse is None:
            out = self._attend_pages(layer, q.last(rows), step)
            stats.count(attended, pairs)
        else:
            k, v = cache.workspace(layer, num_keys)
            stats.lap("cache")
            out, lse = q.last(rows).attend_dense(k, v, step.scale, window)
            if step.lse is not None:
                step.lse.copy_(lse)
            stats.count(attended, pairs)
        stats.lap("attention")
        return out

    def _attend_pages(self, layer: int, q: Queries, step: _Step) -> Tensor:
        """Dense attention of a few rows per sequence, read from the pages."""
        pages = step.pool.pages(layer)
        batch = step.block_table.shape[0]

        def by_sequence(rows: Tensor) -> Tensor:
            return rows.view(batch, -1, *rows.shape[1:])

        out = ops.decode_attention(
            by_sequence(q.q),
            pages.k,
            pages.v,
            step.block_table,
            step.seqlens_k,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            q_succ=None if q.q_succ is None else by_sequence(q.q_succ),
            q_inter=None if q.q_inter is None else by_sequence(q.q_inter),
            chunk_len=q.chunk_len,
            window=self.config.window(layer),
            softmax_scale=step.scale,
            scale_factors=step.scale_factors,
            **step.pool.bias_arguments(layer),
        )
        return cast(Tensor, out).flatten(0, 1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in float32, rounded to x's dtype before the weight (as transformers does)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    at_once = _NORM_ROWS[x.device.type]
    for rows, target in zip(torch.split(x, at_once), torch.split(out, at_once), strict=True):
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        torch.mul(wide.to(x.dtype), weight, out=target)
    return out
