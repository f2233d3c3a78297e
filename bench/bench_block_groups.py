"""Attention over block groups, on bitmaps that differ in what the two blocks of a row tile share, and their selection.

    python bench/bench_block_groups.py --device cuda --seqlens 131072 1048576

A prefill chunk of ``--rows`` rows at the end of the keys. The bitmaps have ``--density`` of the groups:

* shared: at random, the same for both 64-row blocks of a row tile of 128
* half shared: half of each block's groups are also the other one's
* by turns: no group is attended by both blocks
* runs: as shared, in runs of 64 keys
* all: every group (only up to ``--most-dense-keys`` keys, as is "dense", the kernel for all keys)

"selection" chooses groups by the threshold ``1.5 / keys``. TFLOP/s are of attended pairs. On Hopper the kernels for
Ampere run too. Times are printed for outputs whose last rows were first compared with the reference.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench_attention import on_ampere_kernels
from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference, interleaved, random_qkv
from report import (
    add_check_argument,
    add_device_argument,
    add_output_argument,
    finish,
    print_table,
    save,
    time_cells,
)

GROUP, BLOCK, CHECKED_ROWS = 16, 64, 64
PATTERNS = ["shared", "half shared", "by turns", "runs", "all"]


def bitmap(pattern: str, rows: int, seqlen: int, heads: int, density: float, generator: torch.Generator) -> Tensor:
    """``[heads, blocks, words]``, a head at a time: a bool takes eight times a bit."""
    blocks, groups = ops.row_blocks(rows, seqlen), -(-seqlen // GROUP)
    device = generator.device
    tile = (torch.arange(blocks, device=device) + (seqlen - rows) // BLOCK) // 2
    tile -= tile[0].clone()
    parity = torch.arange(blocks, device=device)[:, None] % 2 == torch.arange(groups, device=device) % 2

    def chosen(count: int, width: int, share: float) -> Tensor:
        return torch.rand(count, width, generator=generator, device=device) < share

    def attended() -> Tensor:
        tiles = int(tile[-1]) + 1
        if pattern == "all":
            return torch.ones(blocks, groups, dtype=torch.bool, device=device)
        if pattern == "by turns":
            return chosen(blocks, groups, 2 * density) & parity
        if pattern == "half shared":
            return chosen(tiles, groups, density / 2)[tile] | chosen(blocks, groups, 2 * density / 2) & parity
        if pattern == "runs":
            return chosen(tiles, -(-groups // 4), density).repeat_interleave(4, dim=1)[tile, :groups]
        return chosen(tiles, groups, density)[tile]

    shifts = torch.arange(32, device=device)
    words = []
    for _ in range(heads):
        bits = torch.nn.functional.pad(attended(), (0, -groups % 32)).unflatten(-1, (-1, 32))
        words.append((bits.long() << shifts).sum(-1).to(torch.int32))
    return torch.stack(words)


def check(q: Tensor, k: Tensor, v: Tensor, block_groups: Tensor, out: Tensor) -> None:
    """The last rows of the first kv head's query heads."""
    rows, heads = min(CHECKED_ROWS, q.shape[0]), q.shape[1] // k.shape[1]
    last = q[-rows:, :heads], k[:, :1], v[:, :1]
    sets = block_groups[:heads, -ops.row_blocks(rows, k.shape[0]) :]
    with q.device:  # for what the reference makes from nothing
        exact = reference.block_group_attention(*(x.double() for x in last), sets)
        rounded = reference.block_group_attention(*last, sets, compute_dtype=q.dtype)
    assert isinstance(exact, Tensor)
    assert isinstance(rounded, Tensor)
    assert_close_to_reference(out[-rows:, :heads], exact, rounded)


def measure(arguments: argparse.Namespace, seqlen: int, head_dim: int) -> list[dict[str, Any]]:
    """One row per bitmap and kernel, and one for the selection, for one shape."""
    rows, heads, device = min(arguments.rows, seqlen), arguments.num_heads, arguments.device
    q, k, v = random_qkv(rows, seqlen, heads, arguments.num_kv_heads, head_dim, torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    thresholds = torch.full((heads, ops.row_blocks(rows, seqlen)), 1.5 / seqlen, device=device)
    found = [measured("selection", None, lambda: ops.select_block_groups(q, k, thresholds), arguments)]
    if seqlen <= arguments.most_dense_keys:
        pairs = heads * (rows * (seqlen - rows) + rows * (rows + 1) / 2)
        found.append(measured("dense", 4 * head_dim * pairs, lambda: ops.attention(q, k, v), arguments))
    for pattern in PATTERNS:
        if pattern == "all" and seqlen > arguments.most_dense_keys:
            continue
        block_groups = bitmap(pattern, rows, seqlen, heads, arguments.density, generator)
        attended = torch.ops.qwen_sparse.block_group_attention(q, k, v, block_groups, 1.0)[2].sum().item()

        def attend(block_groups: Tensor = block_groups) -> Tensor:
            out = ops.block_group_attention(q, k, v, block_groups)
            assert isinstance(out, Tensor)
            return out

        kernels: dict[str, Callable[[], Any]] = {pattern: attend}
        if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
            kernels[f"{pattern} sm_80"] = on_ampere_kernels(attend)
        for name, run in kernels.items():
            if arguments.check:
                check(q, k, v, block_groups, run())
            found.append(measured(name, 4 * head_dim * attended, run, arguments))
            found[-1]["density"] = attended / (heads * (rows * (seqlen - rows) + rows * (rows + 1) / 2))
    return [{**row, "seqlen": seqlen, "rows": rows, "head_dim": head_dim} for row in found]


def measured(name: str, flop: float | None, run: Callable[[], object], arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    timing = interleaved({name: run}, repeats=arguments.repeats, device=arguments.device)[name]
    tflops = None if flop is None else flop / timing.median / 1e12
    return {"kernel": name, "seconds": vars(timing), "tflops": tflops, "density": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[16384])
    parser.add_argument("--rows", type=int, default=32768, help="rows of the prefill chunk (at most all)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--num-heads", type=int, default=28)
    parser.add_argument("--num-kv-heads", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.08)
    parser.add_argument("--most-dense-keys", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=5)
    add_device_argument(parser)
    add_check_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seqlen, head_dim in itertools.product(arguments.seqlens, arguments.head_dims):
        rows += measure(arguments, seqlen, head_dim)
        save("block_groups", arguments, rows)
    print_table(
        ["kernel", "keys", "head_dim", "median", "p10", "p90", "TFLOP/s", "density"],
        [
            [
                row["kernel"],
                f"{row['seqlen']:,}",
                str(row["head_dim"]),
                *time_cells(row["seconds"]),
                "" if row["tflops"] is None else f"{row['tflops']:.1f}",
                "" if row["density"] is None else f"{row['density']:.1%}",
            ]
            for row in rows
        ],
    )
    finish("block_groups", arguments, rows)


if __name__ == "__main__":
    main()
