"""A model's prefill and decode step compared with the reference, before anything about them is timed.

The model is cut down to what a CPU computes in seconds: its first two layers, the first tokens of its vocabulary, a
short prompt, Dual Chunk Attention with chunks that this prompt crosses. It runs where it is, with its kernels; on the
CPU the same weights run with attention by the definitions (qwen_sparse.reference, in float32): all in float32, which is
the expected result, and in the model's dtype with its cache, which says what rounding and int8 may cost. Selection runs
on the model; the reference takes its indexes.

The rule is that of the tests, an error of at most twice that of the second run: of the largest difference, and of the
root mean square of the worst row, which a single outlier in that run does not make lenient. What rounding may cost has
to be small itself, or the comparison would say nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from find_budgets import uniform_budgets
from indexes import with_budgets
from qwen_sparse import ops, reference
from qwen_sparse.engine.prefill import chunk_ends
from qwen_sparse.model import linear
from qwen_sparse.model.config import DualChunkConfig
from qwen_sparse.model.decoder import Decoder, LayerWeights
from qwen_sparse.model.stats import ForwardStats
from qwen_sparse.testing import reference_error

LAYERS, VOCABULARY = 2, 2048
TOKENS, CHUNK_TOKENS = 640, 256
DUAL_CHUNK = DualChunkConfig(chunk_size=384, local_size=128, original_max_position_embeddings=256)
COLUMNS, DISTANCES = 40, 120
MOST_ALLOWED = 0.1
"""Of the deviation of all logits; 0.02 to 0.035 for the shapes of checkpoint.py."""

Sets = deque[tuple[Tensor, Tensor]]


def check_model(model: Decoder, seed: int) -> list[dict[str, Any]]:
    """Errors of the logits: dense and sparse prefill, and the decode step.

    Raises:
        AssertionError: an error is more than twice what rounding and the cache's dtype cost, or these cost too much.
    """
    model = _cut(model)
    exact, plain = (_on_cpu(model, dtype) for dtype in (torch.float32, model.dtype))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (TOKENS,), generator=generator)
    rows = []

    def compare(name: str, actual: Tensor, expected: Tensor, same_dtype: Tensor, where: slice = slice(None)) -> None:
        """Rows ``where``; what rounding costs is taken from all."""
        actual, wanted = actual.cpu(), expected[where]
        largest, rounding = reference_error(actual, wanted), reference_error(same_dtype, expected)
        error, allowed = _worst_row(actual - wanted), 2 * _worst_row(same_dtype - expected)
        row = {"figure": "check", "of": name, "error": error, "allowed": allowed, "spread": float(expected.std())}
        print("check: {of}: error of logits {error:.3g}, allowed {allowed:.3g}, spread {spread:.3g}".format(**row))
        assert largest <= 2 * rounding, f"{name}: largest error {largest:.3g} exceeds {2 * rounding:.3g}"
        assert allowed <= MOST_ALLOWED * row["spread"], f"{name}: {allowed:.3g} is too large an error to allow"
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"
        rows.append(row)

    with _reference_attention():
        expected, _ = _logits(exact, tokens, sparse=False)
    with _reference_attention(), _plain_products():
        same_dtype, _ = _logits(plain, tokens, sparse=False)
    prefilled, decoded = _prefill_and_decode(model, tokens)
    compare("dense prefill", prefilled, expected, same_dtype, slice(-1))
    compare("decode step", decoded, expected, same_dtype, slice(-1, None))

    sets: Sets = deque()
    with _recorded_selection(sets):
        actual, density = _logits(model, tokens, sparse=True)
    if density >= 1:
        raise AssertionError("the sparse prefill of the check attended everything")
    with _reference_attention(), _replayed_selection(sets):
        expected, _ = _logits(exact, tokens, sparse=True)
    with _reference_attention(), _plain_products(), _replayed_selection(sets):
        same_dtype, _ = _logits(plain, tokens, sparse=True)
    compare(f"vertical-slash prefill at a density of {density:.0%}", actual, expected, same_dtype)
    return rows


def _worst_row(difference: Tensor) -> float:
    return float(difference.square().mean(1).sqrt().max())


def _cut(model: Decoder) -> Decoder:
    vocabulary, layers = min(VOCABULARY, model.config.vocab_size), min(LAYERS, model.config.num_layers)
    weights = model.weights
    config = replace(
        model.config,
        num_layers=layers,
        vocab_size=vocabulary,
        dual_chunk=None if model.config.dual_chunk is None else DUAL_CHUNK,
    )
    # What the layers add is scaled by their number (random_weights); few must add more for errors to show.
    gain = (model.config.num_layers / layers) ** 0.5
    weights = replace(
        weights,
        embedding=weights.embedding[:vocabulary],
        layers=[
            replace(layer, o=gain * layer.o, mlp=replace(layer.mlp, down=gain * layer.mlp.down))
            for layer in weights.layers[:layers]
        ],
        lm_head=weights.lm_head[:vocabulary],
    )
    cut = replace(model, config=replace(config, sparse=None), weights=weights, attention="dense")
    return with_budgets(cut, uniform_budgets(layers, config.num_heads, COLUMNS, DISTANCES))


def _on_cpu(model: Decoder, dtype: torch.dtype) -> Decoder:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", dtype)

    def moved_layer(layer: LayerWeights) -> LayerWeights:
        tensors = {name: moved(x) for name, x in vars(layer).items() if isinstance(x, Tensor)}
        mlp = {name: moved(x) for name, x in vars(layer.mlp).items() if isinstance(x, Tensor)}
        return replace(layer, **tensors, mlp=replace(layer.mlp, **mlp))

    weights = model.weights
    weights = replace(
        weights,
        embedding=moved(weights.embedding),
        layers=[moved_layer(layer) for layer in weights.layers],
        norm=moved(weights.norm),
        lm_head=moved(weights.lm_head),
    )
    kv_cache_dtype = model.kv_cache_dtype if dtype == model.dtype else "auto"
    return replace(model, weights=weights, dtype=dtype, device=torch.device("cpu"), kv_cache_dtype=kv_cache_dtype)


def _logits(model: Decoder, tokens: Tensor, *, sparse: bool) -> tuple[Tensor, float]:
    """Logits of every row, and the density."""
    stats = ForwardStats(model.device)
    logits = _prefill(model, tokens, model.new_cache(len(tokens)), sparse=sparse, stats=stats)
    stats.finish()
    return logits, stats.attended_pairs / stats.causal_pairs


def _prefill(model: Decoder, tokens: Tensor, cache: Any, *, sparse: bool, stats: ForwardStats) -> Tensor:
    outputs, start = [], 0
    for end in chunk_ends(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start:end].to(model.device)
        output = model.forward(chunk, cache, prompt_len=TOKENS, sparse=sparse, output="all", stats=stats)
        assert output is not None
        outputs.append(output)
        start = end
    return torch.cat(outputs)


def _prefill_and_decode(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Dense logits of all rows but the last, and those of the last by a decode step."""
    cache, tokens = model.new_cache(len(tokens)), tokens.to(model.device)
    logits = _prefill(model, tokens[:-1], cache, sparse=False, stats=ForwardStats(model.device))
    seqlens = torch.full((1,), cache.seqlen, device=model.device)
    return logits, model.decode_step(tokens[-1:], seqlens, cache.pool, cache.block_table)


@contextlib.contextmanager
def _reference_attention() -> Iterator[None]:
    """Attention over a whole prefill chunk by its definition, in float32 on the CPU."""

    def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> Any:
        options: dict[str, Any] = {"causal": causal, "window": window, "compute_dtype": torch.float32}
        return reference.attention(q, k, v, softmax_scale=scale, return_lse=True, **options)

    def sparse(q: Tensor, k: Tensor, v: Tensor, vertical: Tensor, slash: Tensor, scale: float) -> Any:
        options: dict[str, Any] = {"softmax_scale": scale, "compute_dtype": torch.float32}
        out = reference.vertical_slash_attention(q, k, v, vertical, slash, **options)
        return out, None, torch.zeros(1, dtype=torch.int64)

    def dual_chunk(
        q: Tensor,
        q_succ: Tensor,
        q_inter: Tensor,
        k: Tensor,
        v: Tensor,
        chunk_len: int,
        vertical: Tensor | None,
        slash: Tensor | None,
        groups: Tensor | None,
        scale: float,
    ) -> Any:
        sets = {"vertical_indexes": vertical, "slash_indexes": slash, "block_groups": groups}
        options: dict[str, Any] = {
            "chunk_len": chunk_len,
            "softmax_scale": scale,
            **sets,
            "compute_dtype": torch.float32,
        }
        out = reference.dual_chunk_attention(q, q_succ, q_inter, k, v, **options)
        return out, None, torch.zeros(1, dtype=torch.int64)

    replacements: dict[str, Callable[..., Any]] = {
        "attention": dense,
        "vertical_slash_attention": sparse,
        "dual_chunk_attention": dual_chunk,
    }
    with contextlib.ExitStack() as stack:
        for name, function in replacements.items():
            stack.enter_context(mock.patch.object(torch.ops.qwen_sparse, name, function))
        yield


def _plain_products() -> Any:
    """No matrix products widened to float32 (models/linear.py), which round less than a GPU's."""
    return mock.patch.object(linear, "WIDEN_ROWS", sys.maxsize)


@contextlib.contextmanager
def _recorded_selection(sets: Sets) -> Iterator[None]:
    select = ops.select_vertical_slash

    def recorded(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        chosen = select(q, k, **options)
        sets.append(chosen)
        return chosen

    with mock.patch.object(ops, "select_vertical_slash", recorded):
        yield


@contextlib.contextmanager
def _replayed_selection(sets: Sets) -> Iterator[None]:
    left = deque((vertical.cpu(), slash.cpu()) for vertical, slash in sets)

    def replayed(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return left.popleft()

    with mock.patch.object(ops, "select_vertical_slash", replayed):
        yield
    assert not left, f"{len(left)} chosen index sets were not asked for"
