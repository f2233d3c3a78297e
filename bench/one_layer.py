"""Attention of one layer and one prefill chunk of a long prompt: vertical-slash as it ran, our dense kernel, SDPA.

Vertical-slash is taken from the phases of the chunk as it was prefilled, selection and index structures included, mean
over layers. Dense and SDPA are timed in turns, on the cache's keys and values and random queries; on a GPU SDPA has its
cuDNN backend, or flash attention where that refuses: the name says which. torch aligns a causal mask with the first
key, so SDPA runs twice: the chunk's rows over all keys before them, unmasked, and causally over their own. Together
these are exactly the causal pairs; merging the two results would come on top.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_sparse import ops
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.kv_cache import PagedKVCache
from qwen_sparse.testing import interleaved
from report import working

Row = dict[str, Any]
GPU_BACKENDS = {"torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "torch SDPA flash": SDPBackend.FLASH_ATTENTION}
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Chunk:
    """One prefill chunk as it was measured."""

    rows: int
    end: int
    """Tokens in the cache behind it."""
    seconds: float
    """Wall time, with the wait for the device."""
    phases: dict[str, float]
    attended_pairs: int
    causal_pairs: int
    """Of the layers and rows that attend; all heads."""


@torch.inference_mode()
def measure_layer(
    arguments: argparse.Namespace,
    model: Decoder,
    cache: PagedKVCache,
    chunk: Chunk,
    skipped: list[Row],
) -> list[Row]:
    """Attention of one layer and prefill chunk: vertical-slash as it ran, dense and torch SDPA in turns."""
    config, device, end = model.config, model.device, chunk.end
    heads, dual_chunk, scale = config.num_heads, config.dual_chunk, model.softmax_scale(arguments.tokens)
    k, v = cache.workspace(config.num_layers // 2, end)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    q = torch.empty(chunk.rows, heads, config.head_dim, dtype=model.dtype, device=device).normal_(generator=generator)
    # Other rotations of q are other numbers of the same size; attention does not care which.
    q_succ, q_inter = q.roll(1, dims=-1), q.roll(2, dims=-1)

    def dense() -> object:
        if dual_chunk is None or end <= dual_chunk.chunk_len:
            return ops.attention(q, k, v, softmax_scale=scale)
        return ops.dual_chunk_attention(q, q_succ, q_inter, k, v, chunk_len=dual_chunk.chunk_len, softmax_scale=scale)

    candidates: dict[str, Callable[[], object]] = {} if arguments.skip_dense else {"dense": dense}
    if not arguments.skip_sdpa:
        backends = GPU_BACKENDS if q.is_cuda else {"torch SDPA": None}
        candidates |= first_working(functools.partial(sdpa_chunk, q, k, v, scale), backends, skipped)
    timings = interleaved(candidates, repeats=arguments.repeats, device=device)
    cache.pool.release_workspace()

    # In all layers but the last, whose one row at the prompt's end adds next to nothing.
    layers = config.num_layers - 1
    own = {phase: chunk.phases[phase] / layers for phase in ("selection", "attention")}
    pairs = chunk.rows * (2 * end - chunk.rows + 1) // 2 * heads
    seconds = {"vertical-slash, selection included": {"median": sum(own.values())}}
    seconds |= {name: vars(timing) for name, timing in timings.items()}
    sdpa_seconds = next((taken["median"] for name, taken in seconds.items() if name.startswith("torch")), None)
    rows: list[Row] = []
    for name, taken in seconds.items():
        is_sparse = name.startswith("vertical-slash")
        density = chunk.attended_pairs / chunk.causal_pairs if is_sparse else 1.0
        computing = own["attention"] if is_sparse else taken["median"]
        row = {"figure": "one layer", "kernel": name, "rows": chunk.rows, "keys": end, "density": density}
        row |= {"seconds": taken, "executed_gflops": 4 * config.head_dim * density * pairs / computing / 1e9}
        row["speedup_over_sdpa"] = None if sdpa_seconds is None else sdpa_seconds / taken["median"]
        rows.append(row | ({"parts": own} if is_sparse else {"causal_pairs": pairs}))
    return rows


def first_working(
    run: Callable[[SDPBackend | None], object], backends: Mapping[str, SDPBackend | None], skipped: list[Row]
) -> dict[str, Callable[[], object]]:
    """The first of torch's backends that takes the work, by name; a row is added to ``skipped`` for those before it."""
    for name, backend in backends.items():
        attend = functools.partial(run, backend)
        if found := working({name: lambda attend=attend: attend}, skipped, figure="one layer"):  # type: ignore[misc]
            return found
    return {}


def sdpa_chunk(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: SDPBackend | None
) -> tuple[Tensor | None, Tensor]:
    """The last rows over the keys before them, and causally over their own keys; layout NHD."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    past = k.shape[2] - q.shape[2]

    def attend(keys: slice, *, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k[:, :, keys], v[:, :, keys], is_causal=causal, scale=scale, enable_gqa=True
        )

    if backend is None:
        return attend(slice(past), causal=False) if past else None, attend(slice(past, None), causal=True)
    with sdpa_kernel(backend):
        return attend(slice(past), causal=False) if past else None, attend(slice(past, None), causal=True)


def extrapolated(row: Row, layer: Row) -> Row:
    """The prefill's time with dense attention instead, by what one layer took in the last prefill chunk."""
    per_pair = layer["seconds"]["median"] / layer["causal_pairs"]
    other = row["seconds"] - row["phases"]["attention"] - row["phases"]["selection"]
    attention = per_pair * sum(chunk["causal_pairs"] for chunk in row["chunks"])
    sparse = row["phases"]["attention"] + row["phases"]["selection"]
    return {
        "figure": "dense prefill",
        "attention": layer["kernel"],
        "reached": row["reached"],
        "extrapolated": True,
        "rule": "time per causal pair of one layer in the last prefill chunk, times the causal pairs of all layers and "
        "chunks, plus all that is neither attention nor selection in the measured sparse prefill",
        "seconds": other + attention,
        "attention_seconds": attention,
        "speedup_of_sparse": (other + attention) / row["seconds"],
        "attention_speedup_of_sparse": attention / sparse,
    }
