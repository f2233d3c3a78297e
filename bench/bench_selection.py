"""Selection of vertical and slash indexes on a CPU or GPU, beside plain torch and the dense attention it spares.

    python bench/bench_selection.py --output bench/results/selection_cpu.json
    python bench/bench_selection.py --device cuda --seqlens 131072 1048576 --layouts 28/4x128 --dense-keys 131072

Per shape: ``select_vertical_slash``; its top-k alone (``top_indexes`` on scores of that size, columns and distances);
the same in torch as MInference does it (softmax of the last 64 rows against all keys, column sums, diagonal sums by a
strided view, ``torch.topk``); and dense attention of one prefill chunk at the end of the same keys, which runs with
fewer rows and is scaled to the whole chunk (marked ~; a row's cost hardly depends on their number). "of dense" is the
time over that. No time is printed before both selections were compared with the reference.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_sparse import _C, ops, reference
from qwen_sparse.testing import interleaved, random_qkv
from report import add_device_argument, add_output_argument, finish, print_table, save

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAST_Q = 64
NUM_FORCED_COLUMNS, NUM_FORCED_DISTANCES = 30, 100


def torch_select(q: Tensor, k: Tensor, vertical_size: int, slash_size: int) -> tuple[Tensor, Tensor]:
    """The matrix of weights, its column sums, its diagonal sums by reading it with a row stride one longer, top-k."""
    group_size, num_keys = q.shape[1] // k.shape[1], k.shape[0]
    keys = k.repeat_interleave(group_size, dim=1) if group_size > 1 else k
    scores = torch.einsum("phd,jhd->hpj", q[-LAST_Q:], keys).float() / math.sqrt(q.shape[2])
    later = torch.ones(LAST_Q, LAST_Q, dtype=torch.bool, device=q.device).triu(1)
    scores[:, :, -LAST_Q:].masked_fill_(later, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    columns = weights.sum(dim=1)
    # Row r of the padded copy, read with the longer stride, starts r further right: diagonals become columns.
    padded = torch.zeros(q.shape[1], LAST_Q, num_keys + 2 * LAST_Q, device=q.device)
    padded[:, :, LAST_Q : LAST_Q + num_keys] = weights
    stride = padded.stride()
    diagonals = padded.as_strided(
        (q.shape[1], LAST_Q, num_keys), (stride[0], stride[1] + 1, 1), padded.storage_offset() + 1
    ).sum(dim=1)  # column u: distance num_keys - 1 - u from the last row
    distances = diagonals.flip(-1)
    columns[:, :NUM_FORCED_COLUMNS] = math.inf
    distances[:, :NUM_FORCED_DISTANCES] = math.inf
    return (
        columns.topk(min(vertical_size, num_keys), dim=-1).indices.sort().values,
        distances.topk(min(slash_size, num_keys), dim=-1).indices.sort().values,
    )


def check(q: Tensor, k: Tensor, selected: tuple[Tensor, Tensor], name: str, tolerance: float) -> None:
    """Every index chosen instead of one of the reference's has the same score up to ``tolerance``, relative."""
    for head in {0, q.shape[1] - 1}:
        group = head * k.shape[1] // q.shape[1]
        one = q[:, head : head + 1], k[:, group : group + 1]
        with q.device:  # for what the reference makes from nothing
            scores = reference.vertical_slash_scores(*one, last_q=LAST_Q)
        for kind, forced, ours, score in zip(
            ("columns", "distances"),
            (NUM_FORCED_COLUMNS, NUM_FORCED_DISTANCES),
            selected,
            scores,
            strict=True,
        ):
            score[0, :forced] = math.inf
            chosen = score[0, ours[head].long()].sort(descending=True).values
            best = score[0].topk(ours.shape[1]).values
            worst = float(((best - chosen) / best).nan_to_num(nan=0.0).max())
            if worst > tolerance:
                raise SystemExit(f"{name}: {kind} of head {head} score up to {worst:.2e} below the reference's")


def measure(arguments: argparse.Namespace, layout: str, seqlen_k: int) -> list[dict[str, Any]]:
    """One row per candidate for one shape."""
    heads, head_dim = layout.split("x")
    num_heads, num_kv_heads = map(int, heads.split("/"))
    q, k, v = random_qkv(
        arguments.dense_rows,
        seqlen_k,
        num_heads,
        num_kv_heads,
        int(head_dim),
        DTYPES[arguments.dtype],
        device=arguments.device,
    )
    sizes = arguments.vertical_size, arguments.slash_size
    scores = torch.rand(num_heads, seqlen_k, device=arguments.device)

    def select() -> tuple[Tensor, Tensor]:
        return ops.select_vertical_slash(q, k, vertical_size=sizes[0], slash_size=sizes[1], last_q=LAST_Q)

    def top_k() -> None:
        for size, forced in zip(sizes, (NUM_FORCED_COLUMNS, NUM_FORCED_DISTANCES), strict=True):
            torch.ops.qwen_sparse.top_indexes(scores, [size] * num_heads, forced)

    if arguments.check:
        check(q, k, select(), "select", 1e-4)
        check(q, k, torch_select(q, k, *sizes), "torch", 0.1)  # its scores are rounded to q's dtype
    candidates: dict[str, Callable[[], object]] = {
        "select": select,
        "its top-k": top_k,
        "torch": lambda: torch_select(q, k, *sizes),
    }
    if seqlen_k <= arguments.dense_keys:
        candidates["~dense chunk"] = lambda: ops.attention(q, k, v)
    timings = interleaved(candidates, repeats=arguments.repeats, device=arguments.device)
    dense_factor = arguments.chunk_rows / arguments.dense_rows
    dense = timings.get("~dense chunk")
    rows = []
    for name, timing in timings.items():
        factor = dense_factor if name == "~dense chunk" else 1.0
        seconds = {key: factor * value for key, value in vars(timing).items() if key != "repeats"}
        passes = {"select": 2, "torch": 1}.get(name, 0)
        flop = passes * 2 * LAST_Q * seqlen_k * int(head_dim) * num_heads
        rows.append(
            {
                "candidate": name,
                "layout": layout,
                "seqlen_k": seqlen_k,
                "seconds": {**seconds, "repeats": timing.repeats},
                "scaled_by": factor,
                "gflops": flop / timing.median / 1e9 if passes else None,
                "speedup_over_torch": timings["torch"].median / timing.median if name == "select" else None,
                "share_of_dense": seconds["median"] / (dense.median * dense_factor) if dense else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument("--layouts", nargs="+", default=["14/2x64", "28/4x128"], help="query heads/kv heads x head_dim")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--vertical-size", type=int, default=1000)
    parser.add_argument("--slash-size", type=int, default=6096)
    parser.add_argument("--chunk-rows", type=int, default=4096, help="rows of the prefill chunk")
    parser.add_argument("--dense-rows", type=int, default=256, help="rows that dense attention really runs with")
    parser.add_argument("--dense-keys", type=int, default=65536, help="most keys that dense attention is run with")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5)
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    where = f"CPU kernels: {_C.cpu_features()['isa']}, {torch.get_num_threads()} threads"
    print(f"{where if arguments.device.type == 'cpu' else arguments.device}, {arguments.dtype}")
    rows: list[dict[str, Any]] = []
    for layout, seqlen in itertools.product(arguments.layouts, arguments.seqlens):
        rows += measure(arguments, layout, seqlen)
        save("selection", arguments, rows)
    print_table(
        ["candidate", "heads", "keys", "median", "p10", "p90", "GFLOP/s", "x torch", "of dense"],
        [
            [
                row["candidate"],
                row["layout"],
                f"{row['seqlen_k']:,}",
                *(f"{1e3 * row['seconds'][name]:.1f} ms" for name in ("median", "p10", "p90")),
                "" if row["gflops"] is None else f"{row['gflops']:.0f}",
                "" if row["speedup_over_torch"] is None else f"{row['speedup_over_torch']:.1f}",
                "" if row["share_of_dense"] is None else f"{row['share_of_dense']:.2%}",
            ]
            for row in rows
        ],
    )
    finish("selection", arguments, rows)


if __name__ == "__main__":
    main()
