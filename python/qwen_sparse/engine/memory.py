"""Memory of weights, KV cache and prefill, in bytes, by formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .. import _C
from ..base.arguments import check_integer
from ..base.resources import format_bytes
from ..model.config import ModelConfig, parse_dtype
from ..model.kv_cache import kv_cache_bytes, resolve_kv_cache_dtype
from ..model.linear import WIDEN_ROWS, widened_bytes, widens
from ..model.quantized import QUANTIZATIONS

__all__ = [
    "MemoryEstimate",
    "default_chunk_tokens",
    "estimate_calibration_memory",
    "estimate_memory",
    "index_bytes",
    "weight_bytes",
    "weight_elements",
]


def default_chunk_tokens(device: torch.device | str | None = None) -> int:
    """Tokens per prefill chunk unless the caller says otherwise: 16384 on CPUs (None), 32768 on GPUs."""
    return 32768 if device is not None and torch.device(device).type == "cuda" else 16384


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes; see :func:`estimate_memory`."""

    weights: int
    kv_cache: int
    activations: int
    indexes: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of the five."""
        return self.weights + self.kv_cache + self.activations + self.indexes + self.workspace

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {format_bytes(getattr(self, field))}"
            for name, field in (
                ("weights", "weights"),
                ("KV cache", "kv_cache"),
                ("activations", "activations"),
                ("indexes", "indexes"),
                ("workspace", "workspace"),
            )
        )
        return f"{format_bytes(self.total)} ({parts})"


def weight_elements(config: ModelConfig) -> int:
    """Number of weights of the model; tied embeddings count once."""
    matrices = sum(rows * columns for rows, columns in _matrices(config))
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return matrices + head + _other_elements(config)


def weight_bytes(config: ModelConfig, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of all weights, as :func:`qwen_sparse.load_model` keeps them.

    Args:
        config: the model.
        dtype: of weights, and of the scales of quantised ones.
        quantization: None, or "int8": a byte per weight of layers' matrices and of the output's (then apart from the
            embedding, also where they are tied), and a scale per row.
    """
    if quantization is None:
        return weight_elements(config) * dtype.itemsize
    matrices = [*_matrices(config), (config.vocab_size, config.hidden_size)]
    return (
        sum(rows * (columns + dtype.itemsize) for rows, columns in matrices) + _other_elements(config) * dtype.itemsize
    )


def _matrices(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """Rows and columns of every matrix of the layers."""
    hidden, q_size, kv_size = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    for layer in range(config.num_layers):
        yield q_size + 2 * kv_size, hidden
        yield hidden, q_size
        experts = config.experts
        sizes = [config.intermediate_size]
        if experts is not None and experts.of_layer(layer):
            sizes = [experts.intermediate_size] * experts.num_experts
            sizes += [] if experts.shared_size is None else [experts.shared_size]
        for size in sizes:
            yield 2 * size, hidden
            yield hidden, size


def _other_elements(config: ModelConfig) -> int:
    """Of embedding, norms, biases and routers."""
    q_size, kv_size, hidden = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.hidden_size,
    )
    layer = (q_size + 2 * kv_size) * config.attention_bias + 2 * config.head_dim * config.qk_norm
    layer += hidden * (2 + config.output_bias)
    routers = 0
    if config.experts is not None:
        one = hidden * (config.experts.num_experts + (config.experts.shared_size is not None))
        routers = one * sum(map(config.experts.of_layer, range(config.num_layers)))
    return config.num_layers * layer + routers + config.vocab_size * hidden + hidden


def estimate_memory(
    config: ModelConfig,
    seqlen: int,
    *,
    batch: int = 1,
    kv_cache_dtype: str = "auto",
    dtype: str | torch.dtype | None = None,
    chunk_tokens: int | None = None,
    device: torch.device | str | None = None,
    quantization: str | None = None,
) -> MemoryEstimate:
    """Memory that serving ``batch`` sequences of ``seqlen`` tokens takes, prefilled one after the other.

    With b bytes per element, T = min(chunk_tokens, seqlen) rows in flight, hidden size E, MLP size I, H query
    and Hkv kv heads of D, n = seqlen:

    - **weights**: b x all weights; tied embeddings once. Quantised: :func:`weight_bytes`.
    - **kv_cache**: batch x layers x Hkv x (2 D x element size, + 8 for the two int8 scales) x n rounded up to
      pages of 128.
    - **activations**: T x (2 E b + max(attention, MLP)): the residual and the normalised rows, and the larger
      of (H + 2 Hkv) D b for q, k, v with their rotations (3 H + Hkv) D b, or (H + Hkv) D b without DCA, the
      output H D b and LSE 4 H; and H D b + (2 I + E) b for the fused gate and up projections and the MLP's
      output. The logits of one row, 4 x vocabulary, come on top. Kernel scratch (a tile per thread) is left
      out.
    - **indexes**: models with sparse budgets, for V columns and S distances per head in the layer that takes
      most: the lists, 4 H (V + S), and the larger of what chooses them and what attention makes of them.
      Choosing: the scores, 8 H n; partial sums of splits of the keys, on a CPU 768 H (n / 4096 + 1), on a GPU
      256 H (2 n / 2048 + 1); or, once these are gone, for the top-k, on a CPU 8 n per thread, on a GPU
      (24600 + 8 n / 16384) H. Attention:
      the columns' keys and values, 2 H V D b, a bit per key and head, and the slash runs, 16 H S at most (8 H S
      on a GPU, which also takes a bit per column, head and 64 rows of a chunk). With a coverage, block groups: a bit
      per 16 keys, head and 64 rows of a chunk, H (T / 64 + 1) n / 128 (115 MB at 1M tokens for 28 heads and chunks of
      32768), thresholds and shares, 8 H (T / 64 + 1), and what chooses them: the pooled keys, Hkv (n / 16) D b; on a
      CPU scores, 16 n per thread; on a GPU the pooled rows in every rotation, H (T / 16) D b, and partial sums.
    - **workspace**: int8: dequantised keys and values of one layer, 2 n Hkv D b; CPUs that multiply 16-bit
      matrices in float32: the MLP's activations of up to 2048 rows, 4 (E + I) each, and pieces of weights and
      results, at most 48 MB; I is then not in the activations; on CPUs with AMX, in bfloat16, the keys and values
      of one layer once more, packed in tiles, 2 n Hkv D b with n rounded up to 256, and those of columns, 2 H V D b.
      Otherwise 0.

    Args:
        config: the model.
        seqlen: tokens per sequence.
        batch: sequences in the cache.
        kv_cache_dtype: "auto", "bfloat16" or "int8".
        dtype: of weights and activations, by name or as torch's; the checkpoint's when None.
        chunk_tokens: rows per prefill chunk; the device's default when None.
        device: where the model runs; the CPU when None.
        quantization: of the weights, as :func:`qwen_sparse.load_model`.

    Raises:
        ValueError: a size that is no integer >= 1, or an unknown ``dtype``, ``kv_cache_dtype`` or ``quantization``.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be None or one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    chunk_tokens = default_chunk_tokens(device) if chunk_tokens is None else chunk_tokens
    for name, value in (("seqlen", seqlen), ("batch", batch), ("chunk_tokens", chunk_tokens)):
        check_integer(f"estimate_memory: {name}", value, least=1)
    dtype = config.dtype if dtype is None else parse_dtype(dtype)
    storage_dtype = resolve_kv_cache_dtype(kv_cache_dtype, dtype)
    heads, kv_heads, head_dim, item = config.num_heads, config.num_kv_heads, config.head_dim, dtype.itemsize
    rotations = 3 * heads + kv_heads if config.dual_chunk else heads + kv_heads
    attention = (heads + 2 * kv_heads + rotations + heads) * head_dim * item + 4 * heads
    rows = min(chunk_tokens, seqlen)
    wide = rows >= WIDEN_ROWS and widens(dtype, torch.device("cpu" if device is None else device))
    mlp = (heads * head_dim + config.hidden_size + (0 if wide else 2 * config.intermediate_size)) * item
    row = 2 * config.hidden_size * item + max(attention, mlp)
    workspace = 0
    if storage_dtype == torch.int8:
        workspace += 2 * seqlen * kv_heads * head_dim * item
    if wide:
        workspace += widened_bytes(rows, config.hidden_size, config.intermediate_size)
    on_gpu = device is not None and torch.device(device).type == "cuda"
    if dtype == torch.bfloat16 and not on_gpu and _C.cpu_features()["isa"].startswith("amx"):
        workspace += tile_bytes(config, seqlen)
    return MemoryEstimate(
        weights=weight_bytes(config, dtype, quantization),
        kv_cache=batch * kv_cache_bytes(config, seqlen, storage_dtype),
        activations=rows * row + 4 * config.vocab_size,
        indexes=_most_index_bytes(config, rows, seqlen, item, on_gpu=on_gpu),
        workspace=workspace,
    )


def estimate_calibration_memory(
    config: ModelConfig,
    seqlen: int,
    *,
    dtype: str | torch.dtype | None = None,
    chunk_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> MemoryEstimate:
    """Memory that :func:`qwen_sparse.calibrate.calibrate` takes on a prompt of ``seqlen`` tokens.

    As :func:`estimate_memory`, with its letters, but for what goes through the model layer by layer:

    - **kv_cache**: keys and values of one layer.
    - **activations**: those of a prefill chunk without logits, and for all n tokens the hidden states before and behind
      a layer, 2 n E b, and the log-sum-exps, 4 n H.
    - **indexes**: of heads that have grown to V = S = n, the most that refinement can come to.

    Raises:
        ValueError: a size that is no integer >= 1, or an unknown ``dtype``.
    """
    one_layer = replace(config, num_layers=1, sparse=None)
    prefill = estimate_memory(one_layer, seqlen, dtype=dtype, chunk_tokens=chunk_tokens, device=device)
    item = (config.dtype if dtype is None else parse_dtype(dtype)).itemsize
    rows = min(default_chunk_tokens(device) if chunk_tokens is None else chunk_tokens, seqlen)
    on_gpu = device is not None and torch.device(device).type == "cuda"
    whole = seqlen * (2 * config.hidden_size * item + 4 * config.num_heads)
    return replace(
        prefill,
        weights=weight_elements(config) * item,
        activations=prefill.activations - 4 * config.vocab_size + whole,
        indexes=index_bytes(config.num_heads, config.head_dim, rows, seqlen, seqlen, seqlen, item, on_gpu=on_gpu),
    )


def tile_bytes(config: ModelConfig, seqlen: int) -> int:
    """Memory in which attention on AMX tiles packs one layer's keys and values: ``tile_workspace`` in csrc/cpu/amx."""

    def packed(keys: int) -> int:
        return 2 * -(-keys // 256) * 256 * config.head_dim * 2 + 4096

    columns = 0
    if config.sparse is not None and config.sparse.coverage is None:
        columns = min(seqlen, max(map(max, config.sparse.vertical_sizes)))
    return config.num_kv_heads * packed(seqlen) + (config.num_heads * packed(columns) if columns else 0)


def _most_index_bytes(config: ModelConfig, rows: int, seqlen: int, item: int, *, on_gpu: bool) -> int:
    if config.sparse is None:
        return 0
    if config.sparse.coverage is not None:
        return group_bytes(config, rows, seqlen, item, on_gpu=on_gpu)
    budgets = zip(config.sparse.vertical_sizes, config.sparse.slash_sizes, strict=True)
    return max(
        index_bytes(config.num_heads, config.head_dim, rows, seqlen, max(vertical), max(slash), item, on_gpu=on_gpu)
        for vertical, slash in budgets
    )


def group_bytes(config: ModelConfig, rows: int, seqlen: int, item: int, *, on_gpu: bool) -> int:
    """Memory that choosing and using one layer's block groups takes at once, queries and results aside.

    What the kernels ask for: ``select_groups_workspace`` of the backends in csrc, and on a CPU the scratch of its
    threads.

    Args:
        config: the model.
        rows: queries, of one prefill chunk.
        seqlen: keys.
        item: bytes per element of keys and queries.
        on_gpu: whether the CUDA kernels run.
    """
    heads, head_dim = config.num_heads, config.head_dim
    groups, blocks = -(-seqlen // 16), -(-seqlen // 64) - (seqlen - rows) // 64
    bitmap = 4 * heads * blocks * -(-groups // 32)
    pooled_keys = config.num_kv_heads * groups * head_dim * item
    if on_gpu:
        tiles, splits, rotations = heads * -(-blocks // 16), -(-groups // 1024), 3 if config.dual_chunk else 1
        choosing = rotations * heads * blocks * 4 * head_dim * item + 4 * tiles * (splits * (64 + 16) + 64)
    else:
        choosing = 4 * 64 * groups * min(torch.get_num_threads(), heads * -(-blocks // 16))
    return bitmap + 8 * heads * blocks + pooled_keys + choosing


def index_bytes(
    heads: int, head_dim: int, rows: int, seqlen: int, vertical: int, slash: int, item: int, *, on_gpu: bool
) -> int:
    """Most memory that choosing and using one layer's index sets takes at once, queries and results aside.

    What the kernels ask for: ``select_workspace``, ``top_indexes_workspace`` and ``attention_workspace`` of the
    backends in csrc, and on a CPU what ``HeadIndexes`` and ``top_indexes`` allocate themselves.

    Args:
        heads: query heads.
        head_dim: channels per head.
        rows: queries, of one prefill chunk.
        seqlen: keys.
        vertical: columns of the head that has most.
        slash: distances of the head that has most.
        item: bytes per element of keys and values.
        on_gpu: whether the CUDA kernels run.
    """
    vertical, slash = min(vertical, seqlen), min(slash, seqlen)
    scores, last_q = 8 * heads * seqlen, 64
    columns = 2 * vertical * head_dim * item
    if on_gpu:
        partials = 4 * heads * last_q * (2 * -(-seqlen // 2048) + 1)
        top_k = min(heads, 256) * (3 * 2048 * 4 + 3 * 8 + 8 * -(-seqlen // 16384))
        blocks = -(-seqlen // 64) - (seqlen - rows) // 64 + 2
        head = columns + 8 * slash + 8 + 4 * -(-(seqlen + 64) // 32) + 8 * blocks * -(-vertical // 64)
    else:
        partials = 4 * heads * 3 * last_q * (-(-seqlen // 4096) + 1)
        top_k = 8 * seqlen * min(heads, torch.get_num_threads())
        head = columns + 16 * slash + 8 * -(-(seqlen + 64) // 64)
    return 4 * heads * (vertical + slash) + max(scores + max(partials, top_k), heads * head)
