"""Index sets for benchmarks: drawn with the structure of a trained model's heads, or by published budgets.

Random weights and random data have no attention structure, so what selection finds on them says nothing about a
trained model. Benchmarks take ``--density`` (sets drawn here) or ``--budgets`` (real selection) and say which.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_sparse.model.checkpoint import parse_json
from qwen_sparse.model.config import SparseConfig
from qwen_sparse.model.decoder import Decoder

BLOCK_M = 64
SINKS, BAND = 30, 100
"""Columns and distances that selection forces, and so every drawn set has."""
SLASH_SHARE = 0.6
"""Of the keys beyond sinks and band, how many belong to clustered slashes; the others are scattered columns."""

BoolArray = npt.NDArray[np.bool_]


def covered_offsets(slashes: BoolArray) -> BoolArray:
    """Which keys the slashes give a block, by offset ``block start - key`` from -63 to ``seqlen - 1``."""
    seqlen = len(slashes)
    before = np.concatenate([[0], np.cumsum(slashes)])
    offsets = np.arange(1 - BLOCK_M, seqlen)
    covered: BoolArray = before[np.minimum(offsets + BLOCK_M, seqlen)] > before[np.maximum(offsets, 0)]
    return covered


def _draw(seqlen: int, rows: int, density: float, generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """One head's columns and slashes: clusters while they fit their share, then columns up to the density."""
    distances = np.arange(seqlen)
    weights = np.minimum(seqlen - distances, rows)  # rows that have a key at each distance
    target = density * float(weights.sum())
    slashes, covered = np.zeros(seqlen, dtype=bool), np.zeros(seqlen, dtype=bool)

    def added(first: int, width: int) -> tuple[slice, float]:
        """Distances that a run of slashes covers, as the row in the middle of a block sees it, and its new pairs."""
        reach = slice(max(first - BLOCK_M // 2 + 1, 0), first + width + BLOCK_M // 2)
        return reach, float(weights[reach][~covered[reach]].sum())

    first, width, pairs = 0, BAND, 0.0
    reach, more = added(first, width)
    allowed = (1 - SLASH_SHARE) * (more + SINKS * rows) + SLASH_SHARE * target
    while pairs == 0 or (pairs + more <= allowed and not covered.all()):
        slashes[first : first + width] = covered[reach] = True
        pairs += more
        first, width = int(generator.integers(seqlen)), int(generator.integers(16, 256))
        reach, more = added(first, width)
    # Distinct columns share no key, so what each adds to the slashes adds up.
    left = np.concatenate([[0], np.cumsum(~covered)])
    by_column = left[seqlen - distances] - left[np.maximum(seqlen - rows - distances, 0)]
    scattered = generator.permutation(distances[SINKS:])
    room = target - pairs - by_column[:SINKS].sum()
    scattered = scattered[: int(np.searchsorted(np.cumsum(by_column[scattered]), room, side="right"))]
    columns = np.sort(np.concatenate([distances[:SINKS], scattered]))
    return columns.tolist(), np.flatnonzero(slashes).tolist()


def clustered_indexes(
    num_heads: int, seqlen: int, density: float, seed: int, *, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sinks, a local band, clusters of slashes and scattered columns that cover ``density`` of the causal pairs.

    Args:
        num_heads: each head is drawn on its own.
        seqlen: number of keys.
        density: attended pairs over causal pairs of the rows; sinks and band alone may already exceed it.
        seed: the same seed and sizes give the same sets.
        rows: the last rows that density counts, a prefill chunk's; all when None.

    Returns:
        ``(vertical_indexes, slash_indexes)``, int32 ``[num_heads, largest]``, ascending, padded with -1.
    """
    generator = np.random.default_rng([seed, seqlen])
    heads = [_draw(seqlen, rows or seqlen, density, generator) for _ in range(num_heads)]

    def padded(lists: list[list[int]]) -> Tensor:
        width = max(map(len, lists))
        return torch.tensor([row + [-1] * (width - len(row)) for row in lists], dtype=torch.int32)

    return padded([columns for columns, _ in heads]), padded([slashes for _, slashes in heads])


def occupied_blocks(columns: Tensor, slashes: Tensor, seqlen: int) -> Tensor:
    """Blocks of 64 rows x 64 keys, bool ``[num_heads, blocks, blocks]``, in which index sets attend any pair.

    What a kernel that knows whole blocks alone has to attend. ``seqlen`` keys, and as many rows.
    """
    blocks = -(-seqlen // BLOCK_M)
    rows, keys = torch.arange(blocks)[:, None], torch.arange(blocks)
    occupied = []
    for head_columns, head_slashes in zip(columns.cpu().long(), slashes.cpu().long(), strict=True):
        has_column, has_slash = (torch.zeros(blocks + 1, dtype=torch.bool) for _ in range(2))
        has_column[head_columns[head_columns >= 0] // BLOCK_M] = True
        distances = head_slashes[head_slashes >= 0]
        # 64 keys that start anywhere lie in two blocks.
        has_slash[distances // BLOCK_M] = True
        has_slash[-(-distances // BLOCK_M)] = True
        occupied.append((has_column[keys] | has_slash[(rows - keys).clamp(min=0)]) & (keys <= rows))
    return torch.stack(occupied)


def blocks_density(occupied: Tensor, seqlen: int) -> float:
    """Causal pairs in the occupied blocks over all causal pairs."""
    starts = torch.arange(0, seqlen, BLOCK_M)
    sizes = (seqlen - starts).clamp(max=BLOCK_M).double()
    pairs = sizes[:, None] * sizes
    pairs.diagonal().copy_(sizes * (sizes + 1) / 2)
    return float((occupied.cpu() * pairs).sum()) / (len(occupied) * seqlen * (seqlen + 1) / 2)


def index_counts(indexes: Tensor) -> list[int]:
    """How many indexes every head has: the sizes to ask selection for, so that it does the same amount of work."""
    return [int(count) for count in (indexes >= 0).sum(dim=1)]


def attended_keys(columns: Tensor, slashes: Tensor, seqlen: int) -> Tensor:
    """How many of ``seqlen`` keys the last row attends with index sets: int64 ``[num_heads]``, on their device."""
    start = (seqlen - 1) // BLOCK_M * BLOCK_M
    begins = start - slashes.long()
    steps = torch.zeros(len(slashes), seqlen + 1, dtype=torch.int32, device=slashes.device)
    exists = (slashes >= 0).int()
    steps.scatter_add_(1, begins.clamp(0, seqlen), exists)
    steps.scatter_add_(1, (begins + BLOCK_M).clamp(0, seqlen), -exists)
    attended = steps.cumsum(1, dtype=torch.int32) > 0
    attended.scatter_(1, torch.where(columns >= 0, columns, seqlen).long(), True)  # the place behind: for absent ones
    return attended[:, :seqlen].sum(1)


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """Numbers below ``available``, evenly spaced, each in the middle of its share."""
    return [(2 * i + 1) * available // (2 * wanted) for i in range(wanted)]


def read_budgets(path: Path, num_layers: int, num_heads: int) -> SparseConfig:
    """Budgets of evenly spaced layers and heads of a published file, for a model with fewer of them."""
    layers = parse_json(path)
    chosen = [
        {str(head): layer[str(source)] for head, source in enumerate(evenly_spaced(len(layer), num_heads))}
        for layer in (layers[i] for i in evenly_spaced(len(layers), num_layers))
    ]
    return SparseConfig.from_budgets(chosen, num_layers=num_layers, num_heads=num_heads, threshold=0)


def with_budgets(model: Decoder, sparse: SparseConfig) -> Decoder:
    """The model with sparse attention by these budgets, for prompts of any length."""
    return model.with_options(config=replace(model.config, sparse=sparse)).with_options(attention="sparse")


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--density",
        type=float,
        default=0.1,
        help="of the index sets drawn with the structure of trained heads (default: 0.1); the realised one is printed",
    )
    source.add_argument(
        "--budgets", type=Path, help="select for real, with the per-head budgets of this file (published format)"
    )


def describe_indexes(arguments: argparse.Namespace) -> str:
    """Where the index sets come from, for the output."""
    if arguments.budgets is not None:
        return f"indexes: real selection with budgets of {arguments.budgets.name}, evenly spaced layers and heads"
    return (
        f"indexes: drawn (sinks, band, clustered slashes, scattered columns) for a density of {arguments.density:.1%}"
    )
