"""Prefill attention on this machine's CPU: dense and vertical-slash beside torch's scaled_dot_product_attention.

    python bench/bench_attention.py --isas avx512 avx512_bf16 --output bench/results/attention_cpu.json

All keys are rows (a one-shot causal prefill). The index set has the shape of a trained head's: sink columns, a local
band, clustered slashes and scattered columns, drawn to the asked density. No time is printed for an output that was not
first compared with the reference on its last rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_sparse import _C, ops, reference
from qwen_sparse.testing import assert_close_to_reference, interleaved, random_qkv
from report import add_output_argument, finish, print_table

CHECKED_ROWS = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def clustered_indexes(num_heads: int, seqlen: int, density: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sinks, a local band, clusters of slashes and scattered columns that cover about ``density`` of the keys."""
    generator = torch.Generator().manual_seed(seed)
    budget = int(density * seqlen)
    columns, slashes = [], []
    for _ in range(num_heads):
        column = set(range(30)) | set(torch.randint(seqlen, (budget // 4,), generator=generator).tolist())
        slash = set(range(100))
        while len(slash) < budget * 5 // 8:  # a run of w slashes covers w + 63 keys
            start = int(torch.randint(seqlen, (1,), generator=generator))
            width = int(torch.randint(16, 256, (1,), generator=generator))
            slash |= set(range(start, min(start + width, seqlen)))
        columns.append(sorted(column))
        slashes.append(sorted(slash))

    def padded(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)

    return padded(columns), padded(slashes)


def check(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, slashes: Tensor) -> float:
    """Compares the last rows of dense and sparse attention with the reference; returns the sparse density."""
    last = q[-CHECKED_ROWS:]
    exact = [t.double() for t in (last, k, v)]
    dense = cast(Tensor, ops.attention(q, k, v))[-CHECKED_ROWS:]
    assert_close_to_reference(
        dense,
        cast(Tensor, reference.attention(*exact)),
        cast(Tensor, reference.attention(last, k, v, compute_dtype=q.dtype)),
    )
    scale = q.shape[2] ** -0.5
    sparse, _, attended = torch.ops.qwen_sparse.vertical_slash_attention(q, k, v, columns, slashes, scale)
    assert_close_to_reference(
        sparse[-CHECKED_ROWS:],
        cast(Tensor, reference.vertical_slash_attention(*exact, columns, slashes)),
        cast(Tensor, reference.vertical_slash_attention(last, k, v, columns, slashes, compute_dtype=q.dtype)),
    )
    pairs = q.shape[1] * q.shape[0] * (q.shape[0] + 1) / 2
    return float(attended.sum()) / pairs


def measure(arguments: argparse.Namespace, isa: str, seqlen: int, head_dim: int, dtype: str) -> list[dict[str, Any]]:
    """One row per kernel for one shape, with the CPU kernels of one instruction set."""
    _C.set_cpu_isa(isa)
    q, k, v = random_qkv(seqlen, seqlen, arguments.num_heads, arguments.num_kv_heads, head_dim, DTYPES[dtype])
    columns, slashes = clustered_indexes(arguments.num_heads, seqlen, arguments.density, arguments.seed)
    density = check(q, k, v, columns, slashes)
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
    candidates: dict[str, Callable[[], object]] = {
        "torch SDPA": lambda: F.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True),
        "dense": lambda: ops.attention(q, k, v),
        "vertical-slash": lambda: ops.vertical_slash_attention(q, k, v, columns, slashes),
    }
    timings = interleaved(candidates, repeats=arguments.repeats)
    dense_flop = 2 * seqlen * (seqlen + 1) * head_dim * arguments.num_heads
    rows = []
    for name, timing in timings.items():
        share = density if name == "vertical-slash" else 1.0
        rows.append(
            {
                "kernel": name,
                "isa": isa,
                "seqlen": seqlen,
                "head_dim": head_dim,
                "dtype": dtype,
                "density": share,
                "seconds": vars(timing),
                "executed_gflops": share * dense_flop / timing.median / 1e9,
                "dense_equivalent_gflops": dense_flop / timing.median / 1e9,
                "speedup_over_sdpa": timings["torch SDPA"].median / timing.median,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    features = _C.cpu_features()
    parser.add_argument("--isas", nargs="+", default=[features["isa"]], choices=features["supported"])
    parser.add_argument("--density", type=float, default=0.1, help="asked of the index set; the real one is printed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_output_argument(parser)
    arguments = parser.parse_args()

    rows = [
        row
        for head_dim in arguments.head_dims
        for dtype in arguments.dtypes
        for seqlen in arguments.seqlens
        for isa in arguments.isas
        for row in measure(arguments, isa, seqlen, head_dim, dtype)
    ]
    print_table(
        ["kernel", "isa", "keys", "head_dim", "dtype", "density", "median", "p10", "p90", "GFLOP/s", "x SDPA"],
        [
            [
                row["kernel"],
                "" if row["kernel"] == "torch SDPA" else row["isa"],
                f"{row['seqlen']:,}",
                str(row["head_dim"]),
                row["dtype"],
                f"{row['density']:.1%}",
                *(f"{1e3 * row['seconds'][name]:.1f} ms" for name in ("median", "p10", "p90")),
                f"{row['executed_gflops']:.0f}",
                f"{row['speedup_over_sdpa']:.2f}",
            ]
            for row in rows
        ],
    )
    finish("attention", arguments, rows)


if __name__ == "__main__":
    main()
