"""Other ways to choose what sparse prefill attends, beside block groups, on a released model: KL to dense by density.

    make released
    python bench/bench_variants.py --output bench/results/released_variants_cpu.json

Every variant keeps the rows of the last block dense, as prefill does, and all others sparse in all layers.

- ``base``: block groups as docs/block-groups.md defines them, one coverage for all; and the share of attended groups
  that lies in blocks of which more than 80 % are attended (``in_dense_blocks``), where dense attention may be faster.
- ``layers``, ``heads``: a factor on the thresholds of each layer, or head, so that all of them keep the same recall of
  the calibration text (prose), found among the factors of ``FACTORS``.
- ``groups-8``: groups of 8 keys, estimated from means of 8 keys.
- ``by-head``: each head attends its block groups, or as many pairs of columns and distances where these keep more of
  its attention. Columns and distances are the best of the very text that is measured, over all rows: the most that a
  choice by head can give.

The first three run the kernels; the others apply masks in plain torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import texts
from bench_released import ROOT, by_method, predict
from qwen_sparse import load_model, ops
from qwen_sparse.calibrate import measure_budgets
from qwen_sparse.evaluate.perplexity import divergence
from qwen_sparse.model import attention
from qwen_sparse.model import coverage as coverages
from qwen_sparse.model.attention import Indexes, Queries
from qwen_sparse.model.decoder import Decoder
from report import add_output_argument, finish, print_table, save

VARIANTS = ["base", "layers", "heads", "groups-8", "by-head"]
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
BLOCK, ROWS = 64, 1024  # rows of a block; rows that are masked at a time
SHARES_OF_COLUMNS = (0.0, 0.5, 1.0)  # of the pairs that a head spends on columns; the others go to distances
DENSE = 0.8
KEPT_PREFIX = 32  # keys that every block attends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build/released/qwen2.5-coder-0.5b", help="directory")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.8, 0.87, 0.92])
    parser.add_argument("--length", type=int, default=8192, help="tokens of code, measured")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens of prose, calibrated on")
    parser.add_argument("--tail", type=int, default=2048, help="tokens that perplexity and KL are of")
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_model(arguments.model, device="cpu", dtype="bfloat16")
    tokens = model.tokenizer.encode(texts.code())[: arguments.length]
    prose = model.tokenizer.encode(texts.prose())[: arguments.calibration]
    rows: list[dict[str, Any]] = []
    dense, _ = predict(by_method(model, "dense"), tokens, arguments.tail)
    recalls: dict[float, Tensor] = {}
    for variant in arguments.variants:
        for coverage in arguments.coverages:
            runner = by_method(model, f"groups:{coverage}")
            if variant in ("layers", "heads"):
                factors = equal_recall(model, prose, coverage, recalls, by_layer=variant == "layers")
                chosen: contextlib.AbstractContextManager[dict[str, Any] | None] = with_factors(factors)
            else:
                chosen = counting_dense_blocks() if variant == "base" else with_masks(variant, coverage)
            with chosen as extra:
                found, _ = predict(runner, tokens, arguments.tail)
            far = divergence(dense, found)
            row = {
                "variant": variant,
                "coverage": coverage,
                "density": found.density,
                "perplexity": float(torch.tensor(found.loss()).exp()),
                "kl": far.kl,
                "same_top": far.same_top,
                **(extra or {}),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            save("variants", arguments, rows)
    columns = ["variant", "coverage", "density", "perplexity", "kl", "same_top"]
    print_table(columns, [[format(row[c], ".4g") if c != "variant" else row[c] for c in columns] for row in rows])
    finish("variants", arguments, rows)


def equal_recall(
    model: Decoder, tokens: list[int], coverage: float, recalls: dict[float, Tensor], *, by_layer: bool
) -> Tensor:
    """Factors on thresholds, ``[layers, heads]``, with which all keep ``coverage`` of the text's attention.

    Recall is taken to be linear in the logarithm of the factor between two that were measured.
    """
    share = coverages.share_of_average(coverage)
    for factor in FACTORS:
        if factor not in recalls:  # of an average group's share, whatever the coverage
            runner = model.with_options(attention="sparse", coverage=0.9)
            assert runner.config.sparse is not None
            with mock.patch.object(coverages, "share_of_average", lambda _, factor=factor: factor):
                found = measure_budgets(runner, tokens, runner.config.sparse)
            recalls[factor] = torch.tensor([[head.recall for head in layer] for layer in found.layers])
    kept = torch.stack([recalls[factor] for factor in FACTORS])  # falls with the factor
    if by_layer:
        kept = kept.mean(2, keepdim=True).expand_as(kept)
    result = torch.empty(kept.shape[1:], dtype=torch.float64)
    logs = [math.log(factor) for factor in FACTORS]
    for place in torch.cartesian_prod(*(torch.arange(size) for size in result.shape)).tolist():
        curve = kept[:, place[0], place[1]].tolist()
        low = max((i for i in range(len(curve)) if curve[i] >= coverage), default=0)
        high = min(low + 1, len(curve) - 1)
        step = 0.0 if curve[low] <= curve[high] else (curve[low] - coverage) / (curve[low] - curve[high])
        result[place[0], place[1]] = math.exp(logs[low] + min(max(step, 0.0), 1.0) * (logs[high] - logs[low]))
    return (result / share).float()


@contextlib.contextmanager
def counting_dense_blocks() -> Iterator[dict[str, Any]]:
    """Yields what is to be reported of the block groups that are chosen meanwhile."""
    report: dict[str, Any] = {}
    attended = dense = 0
    choose = coverages.select_by_coverage

    def select(q: Tensor, k: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        nonlocal attended, dense
        groups, kept = choose(q, k, **rest)
        counts = sum(((groups >> bit) & 1).sum(2) for bit in range(32))
        assert isinstance(counts, Tensor)
        last = k.shape[0] // BLOCK - groups.shape[1]  # blocks before the first
        causal = (last + 1 + torch.arange(groups.shape[1])) * (BLOCK // 16)
        attended += int(counts.sum())
        dense += int(counts[counts > DENSE * causal].sum())
        report["in_dense_blocks"] = dense / attended
        return groups, kept

    with mock.patch.object(attention, "select_by_coverage", select):
        yield report


@contextlib.contextmanager
def with_factors(factors: Tensor) -> Iterator[None]:
    """Block groups whose thresholds have a factor by layer and head, ``[layers, heads]``."""
    layers = iter(factors)

    def select(q: Tensor, k: Tensor, *, coverage: float, **rest: Any) -> tuple[Tensor, Tensor]:
        by_block = coverages.thresholds(coverage, q.shape[0], k.shape[0])
        return ops.select_block_groups(q, k, next(layers)[:, None] * by_block[None], **rest)

    with mock.patch.object(attention, "select_by_coverage", select):
        yield


@contextlib.contextmanager
def with_masks(variant: str, coverage: float) -> Iterator[dict[str, Any]]:
    """Attention by masks in plain torch; yields what is to be reported of it."""
    report: dict[str, Any] = {}

    def select(queries: Queries, k: Tensor, scale: float, coverage: float) -> Indexes:
        size = 8 if variant == "groups-8" else 16
        bits = estimated_groups(queries.q, k, scale, coverage, size)
        return Indexes(groups=bits, kept=torch.ones(1))

    def attend(queries: Queries, k: Tensor, v: Tensor, scale: float, indexes: Indexes) -> tuple[Tensor, Tensor, Tensor]:
        q, bits = queries.q, indexes.groups
        assert bits is not None
        out, attended = torch.empty_like(q), torch.zeros(q.shape[1], dtype=torch.int64)
        first, by_columns = k.shape[0] - q.shape[0], 0
        for head in range(q.shape[1]):
            keys, values = (x[:, head * k.shape[1] // q.shape[1]].float() for x in (k, v))
            mask = group_rows(bits[head], q.shape[0], k.shape[0])
            if variant == "by-head":
                scores = masked(q[:, head].float() @ keys.T * scale, first)
                weights = scores.softmax(1)
                other = columns_and_distances(weights, int(mask.sum()), first)
                if float((weights * other).sum()) > float((weights * mask).sum()):
                    mask, by_columns = other, by_columns + 1
            for a in range(0, q.shape[0], ROWS):
                part = slice(a, min(a + ROWS, q.shape[0]))
                scores = masked(q[part, head].float() @ keys.T * scale, first + a)
                out[part, head] = (scores.masked_fill(~mask[part], -math.inf).softmax(1) @ values).to(q.dtype)
            attended[head] = int(mask.sum())
        if variant == "by-head":
            report.setdefault("heads_by_columns", []).append(by_columns)
        return out, torch.empty(0), attended

    with mock.patch.object(Queries, "select_by_coverage", select), mock.patch.object(Queries, "attend_sparse", attend):
        yield report


def masked(scores: Tensor, first: int) -> Tensor:
    """Minus infinity where a key comes after its row; the first row stands at ``first``."""
    rows = torch.arange(first, first + scores.shape[0])
    return scores.masked_fill(torch.arange(scores.shape[1]) > rows[:, None], -math.inf)


def group_rows(bits: Tensor, rows: int, num_keys: int) -> Tensor:
    """Attended pairs ``[rows, num_keys]`` of a head's ``bits`` ``[blocks, groups]``."""
    keys = bits.repeat_interleave(-(-num_keys // bits.shape[1]), 1)[:, :num_keys]
    first = num_keys - rows
    attended = keys.repeat_interleave(BLOCK, 0)[first % BLOCK :][:rows]
    positions = torch.arange(first, num_keys)
    return attended & (torch.arange(num_keys) <= positions[:, None])


def estimated_groups(q: Tensor, k: Tensor, scale: float, coverage: float, size: int) -> Tensor:
    """Bits ``[heads, blocks, groups]`` as of ``select_block_groups``, for groups of ``size`` keys and whole blocks."""
    rows, num_heads = q.shape[:2]
    num_keys, group = k.shape[0], num_heads // k.shape[1]
    blocks, groups = -(-rows // BLOCK), -(-num_keys // size)
    quarters = pooled(q, 16)
    keys = pooled(k, size).repeat_interleave(group, 1)
    first = (num_keys - rows) // BLOCK
    own = torch.arange(quarters.shape[0]) * 16 + num_keys - rows + 15  # last row of each quarter
    scores = torch.einsum("qhd,khd->hqk", quarters.float(), keys.float()) * scale
    shares = scores.masked_fill(torch.arange(groups) * size > own[:, None], -math.inf).softmax(2)
    shares = torch.stack([shares[:, 4 * b : 4 * b + 4].mean(1) for b in range(blocks)], 1)
    limit = coverages.thresholds(coverage, rows, num_keys)
    bits = shares / size >= limit[None, :, None]
    ends = (first + torch.arange(blocks))[:, None] * BLOCK
    places = torch.arange(groups)[None] * size
    forced = (places < KEPT_PREFIX) | ((places >= ends - BLOCK) & (places < ends + BLOCK))
    return (bits | forced) & (places < ends + BLOCK)


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of every ``size`` rows, the last one of those that are left."""
    return torch.stack([part.float().mean(0) for part in x.split(size)]).to(x.dtype)


def columns_and_distances(weights: Tensor, pairs: int, first: int) -> Tensor:
    """The mask of about ``pairs`` pairs, a share of it columns and the rest distances, that holds most ``weights``."""
    rows, num_keys = weights.shape
    positions = torch.arange(first, first + rows)
    distances = positions[:, None] - torch.arange(num_keys)[None]
    causal = distances >= 0
    by_distance = torch.zeros(num_keys).index_add_(0, distances.clamp(min=0).flatten(), weights.flatten())
    lengths_columns = causal.sum(0).double()
    lengths_distances = torch.bincount(distances[causal], minlength=num_keys).double()
    best, best_kept = causal, -1.0
    for share in SHARES_OF_COLUMNS:
        columns = most(weights.sum(0), lengths_columns, share * pairs)
        slashes = most(by_distance, lengths_distances, (1 - share) * pairs)
        mask = (columns[None] | slashes[distances.clamp(min=0)]) & causal
        kept = float((weights * mask).sum())
        if kept > best_kept:
            best, best_kept = mask, kept
    return best


def most(gain: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Which of some to take, by gain per cost, for a budget of cost."""
    order = (gain.double() / cost.clamp(min=1)).argsort(descending=True)
    taken = torch.zeros(gain.shape[0], dtype=torch.bool)
    taken[order[cost[order].cumsum(0) <= budget]] = True
    return taken


if __name__ == "__main__":
    main()
