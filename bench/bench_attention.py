"""Prefill attention on a CPU or GPU: dense, vertical-slash and Dual Chunk Attention beside torch's kernels.

    python bench/bench_attention.py --isas avx512 avx512_bf16 --output bench/results/attention_cpu.json
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python bench/bench_attention.py --isas avx2
    python bench/bench_attention.py --device cuda --num-heads 16 --num-kv-heads 4 --seqlens 16384 131072

The second limits torch and its libraries to AVX2 as well: they read the variables when torch is imported. Those are
printed and recorded.

All keys are rows (a one-shot causal prefill). With --density the index set has the shape of a trained head's; with
--budgets it is really selected, on random data. "selection + vertical-slash" is the whole of a sparse prefill:
selection (with budgets as large as the set), the index structure and attention. "x density" is time over density x
dense time: 1 for a sparse kernel that wastes nothing. FlexAttention runs with a causal and with the same sparse mask.
Times are printed for outputs that were first compared with the reference on their last rows (of the first kv head's
query heads, where all would take long). "x SDPA" is over the fastest of torch's own kernels that ran.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from indexes import (
    BLOCK_M,
    add_index_arguments,
    clustered_indexes,
    covered_offsets,
    describe_indexes,
    index_counts,
    read_budgets,
)
from qwen_sparse import _C, ops, reference
from qwen_sparse.testing import assert_close_to_reference, interleaved, random_qkv
from report import (
    add_check_argument,
    add_device_argument,
    add_output_argument,
    choose_kernels,
    finish,
    kernel_sets,
    print_environment,
    print_table,
    time_cells,
)

CHECKED_ROWS = 64
FLEX_BLOCK = 128
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DENSE_OF = {
    "vertical-slash": "dense",
    "selection + vertical-slash": "dense",
    "DCA vertical-slash": "DCA dense",
    "FlexAttention vertical-slash": "FlexAttention causal",
}
"""Every sparse kernel, with the dense one that its "x density" is about."""
GPU_BACKENDS = {"torch SDPA flash": SDPBackend.FLASH_ATTENTION, "torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
KERNELS = ["torch SDPA", *GPU_BACKENDS, "FlexAttention causal", "dense", "DCA dense", *DENSE_OF]
MOST_CHECKED = 2**20
"""Heads x keys up to which every head is compared with the reference."""


@dataclass(frozen=True)
class Inputs:
    """One shape's tensors and index sets."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_succ: Tensor
    q_inter: Tensor
    columns: Tensor
    slashes: Tensor
    chunk_len: int

    @classmethod
    def make(cls, arguments: argparse.Namespace, seqlen: int, head_dim: int, dtype: torch.dtype) -> Inputs:
        """Normal q, k and v, and the index sets that the arguments ask for."""
        heads = arguments.num_heads
        q, k, v = random_qkv(seqlen, seqlen, heads, arguments.num_kv_heads, head_dim, dtype, seed=arguments.seed)
        if arguments.budgets is None:
            columns, slashes = clustered_indexes(heads, seqlen, arguments.density, arguments.seed)
        else:
            sparse = read_budgets(arguments.budgets, 1, heads)
            columns, slashes = ops.select_vertical_slash(
                q, k, vertical_size=sparse.vertical_sizes[0], slash_size=sparse.slash_sizes[0]
            )
        # Other rotations of q are other numbers of the same size; attention does not care which.
        q_succ, q_inter = q.roll(1, dims=-1), q.roll(2, dims=-1)
        chunk_len = arguments.chunk_len or max(BLOCK_M, seqlen // 4 // BLOCK_M * BLOCK_M)
        tensors = (x.to(arguments.device) for x in (q, k, v, q_succ, q_inter, columns, slashes))
        return cls(*tensors, chunk_len)

    @property
    def sets(self) -> dict[str, Any]:
        return {"vertical_indexes": self.columns, "slash_indexes": self.slashes}

    def density(self) -> float:
        """Pairs that the sparse kernel attends over causal pairs."""
        _, _, attended = torch.ops.qwen_sparse.vertical_slash_attention(
            self.q, self.k, self.v, self.columns, self.slashes, 1.0
        )
        seqlen, heads = self.q.shape[:2]
        return float(attended.sum()) / (heads * seqlen * (seqlen + 1) / 2)

    def select_and_attend(self) -> object:
        """Selection as costly as one of these sets, and attention over them."""
        ops.select_vertical_slash(
            self.q, self.k, vertical_size=index_counts(self.columns), slash_size=index_counts(self.slashes)
        )
        return ops.vertical_slash_attention(self.q, self.k, self.v, **self.sets)

    def dual_chunk(self, sets: dict[str, Any]) -> Tensor:
        queries = (self.q, self.q_succ, self.q_inter)
        return cast(Tensor, ops.dual_chunk_attention(*queries, self.k, self.v, chunk_len=self.chunk_len, **sets))

    def kernels(self) -> dict[str, Callable[[], object]]:
        """Every kernel but FlexAttention, by name."""
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))

        def sdpa() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def with_backend(backend: SDPBackend) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with sdpa_kernel(backend):
                    return sdpa()

            return run

        backends = GPU_BACKENDS.items() if q.is_cuda else ()
        return {
            "torch SDPA": sdpa,
            **{name: with_backend(backend) for name, backend in backends},
            "dense": lambda: ops.attention(self.q, self.k, self.v),
            "DCA dense": lambda: self.dual_chunk({}),
            "vertical-slash": lambda: ops.vertical_slash_attention(self.q, self.k, self.v, **self.sets),
            "selection + vertical-slash": self.select_and_attend,
            "DCA vertical-slash": lambda: self.dual_chunk(self.sets),
        }


def check(inputs: Inputs, names: list[str], flex: dict[str, Callable[[], Tensor]]) -> None:
    """Compares the last rows of every kernel that will be timed with the reference.

    Raises:
        AssertionError: an error is more than twice that of plain PyTorch in the same dtype.
    """
    dtype, (seqlen, heads) = inputs.q.dtype, inputs.q.shape[:2]
    kv_heads = inputs.k.shape[1]
    if seqlen * heads > MOST_CHECKED:
        heads, kv_heads = heads // kv_heads, 1
    k, v = (x[:, :kv_heads].cpu() for x in (inputs.k, inputs.v))
    q, q_succ, q_inter = (x[-CHECKED_ROWS:, :heads].cpu() for x in (inputs.q, inputs.q_succ, inputs.q_inter))
    checked_sets = {name: indexes[:heads].cpu() for name, indexes in inputs.sets.items()}

    def compare(actual: object, function: Callable[..., Any], queries: list[Tensor], **options: Any) -> None:
        tensors = [*queries, k, v]
        exact = function(*(x.double() for x in tensors), **options)
        plain = function(*tensors, **options, compute_dtype=dtype)
        assert_close_to_reference(cast(Tensor, actual)[-CHECKED_ROWS:, :heads].cpu(), exact, plain)

    for name in names:
        sets = inputs.sets if name in DENSE_OF else {}
        if name.startswith("DCA"):
            queries, options = [q, q_succ, q_inter], {"chunk_len": inputs.chunk_len, **(checked_sets if sets else {})}
            compare(inputs.dual_chunk(sets), reference.dual_chunk_attention, queries, **options)
        elif name.startswith("torch SDPA"):
            continue  # what it computes is not ours to check
        else:
            out = flex[name]()[0].transpose(0, 1) if name in flex else inputs.kernels()[name]()
            function = reference.vertical_slash_attention if sets else reference.attention
            compare(out, function, [q], **(checked_sets if sets else {}))


def flex_candidates(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Compiled FlexAttention, with a causal mask and with the vertical-slash set as a mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch.compiler.reset()  # every shape is compiled anew; past a few, torch would give up compiling
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    seqlen, heads = inputs.q.shape[:2]
    blocks = -(-seqlen // FLEX_BLOCK)
    is_column, is_covered = torch.zeros(heads, seqlen, dtype=torch.bool), []
    occupied = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    starts, keys = torch.arange(0, seqlen, BLOCK_M)[:, None], torch.arange(seqlen)
    for head in range(heads):
        is_column[head, inputs.columns[head][inputs.columns[head] >= 0].long().cpu()] = True
        slashes = np.zeros(seqlen, dtype=bool)
        slashes[inputs.slashes[head][inputs.slashes[head] >= 0].cpu().numpy()] = True
        covered = torch.from_numpy(covered_offsets(slashes))
        is_covered.append(covered)
        attended = is_column[head] | covered[(starts - keys + BLOCK_M - 1).clamp(min=0)]
        rows, columns = torch.nonzero(attended & (keys < starts + BLOCK_M), as_tuple=True)
        occupied[head, rows * BLOCK_M // FLEX_BLOCK, columns // FLEX_BLOCK] = True
    offsets, is_column, occupied = (x.to(q.device) for x in (torch.stack(is_covered), is_column, occupied))

    def causal(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row

    def sparse(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        offset = (row // BLOCK_M * BLOCK_M - key + BLOCK_M - 1).clamp(min=0)
        return (key <= row) & (is_column[h, key] | offsets[h, offset])

    def candidate(occupied: Tensor, mask: Callable[..., Tensor]) -> Callable[[], Tensor]:
        counts = occupied.sum(-1, dtype=torch.int32)[None]
        order = occupied.int().argsort(dim=-1, descending=True, stable=True).int()[None]
        block_mask = BlockMask.from_kv_blocks(
            counts, order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=(seqlen, seqlen)
        )
        return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

    triangle = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device).tril().expand(heads, -1, -1)
    return {
        "FlexAttention causal": candidate(triangle, causal),
        "FlexAttention vertical-slash": candidate(occupied, sparse),
    }


def runs(name: str, candidate: Callable[[], object]) -> bool:
    """Whether torch has this kernel for these inputs; a line says why not."""
    try:
        with torch.inference_mode():
            candidate()
        return True
    except RuntimeError as error:
        print(f"{name}: not measured: {str(error).strip().splitlines()[0]}")
        return False


def working_flex(inputs: Inputs, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """Those of the asked FlexAttention kernels that compile and run here; a line says why others do not."""
    asked = [name for name in names if name.startswith("FlexAttention")]
    working = {}
    for name, run in (flex_candidates(inputs) if asked else {}).items():
        if name in asked:
            try:
                with torch.inference_mode():
                    run()
                working[name] = run
            except Exception as error:  # inductor and the C++ compiler fail in many ways
                print(f"{name}: not measured: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return working


def measure(arguments: argparse.Namespace, isa: str, seqlen: int, head_dim: int, dtype: str) -> list[dict[str, Any]]:
    """One row per kernel for one shape, with the CPU kernels of one instruction set."""
    choose_kernels(isa)
    inputs = Inputs.make(arguments, seqlen, head_dim, DTYPES[dtype])
    flex = working_flex(inputs, arguments.kernels)
    candidates: dict[str, Callable[[], object]] = {**inputs.kernels(), **flex}
    for name in GPU_BACKENDS:
        if name in candidates and not runs(name, candidates[name]):
            del candidates[name]
    candidates = {name: candidates[name] for name in arguments.kernels if name in candidates}
    if arguments.check:
        check(inputs, list(candidates), flex)
    density = inputs.density()
    with torch.inference_mode():
        timings = interleaved(candidates, repeats=arguments.repeats, device=arguments.device)
    ours = [name for name in timings if not name.startswith("torch SDPA")]
    fastest = min((timing.median for name, timing in timings.items() if name not in ours), default=None)
    dense_flop = 2 * seqlen * (seqlen + 1) * head_dim * arguments.num_heads
    rows = []
    for name, timing in timings.items():
        share = density if name in DENSE_OF else 1.0
        dense = timings.get(DENSE_OF.get(name, ""))
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
                "speedup_over_sdpa": None if fastest is None else fastest / timing.median,
                "time_over_density_times_dense": None if dense is None else timing.median / (density * dense.median),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    print_table(
        [
            *("kernel", "isa", "keys", "head_dim", "dtype", "density", "median", "p10", "p90"),
            *("GFLOP/s", "x SDPA", "x density"),
        ],
        [
            [
                row["kernel"],
                "" if row["kernel"].startswith(("torch", "Flex")) else row["isa"],
                f"{row['seqlen']:,}",
                str(row["head_dim"]),
                row["dtype"],
                f"{row['density']:.1%}",
                *time_cells(row["seconds"]),
                f"{row['executed_gflops']:.0f}",
                ratio(row["speedup_over_sdpa"]),
                ratio(row["time_over_density_times_dense"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 16384], help="keys, and as many rows")
    parser.add_argument("--num-heads", type=int, default=4, help="query heads")
    parser.add_argument("--num-kv-heads", type=int, default=2, help="key and value heads")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], choices=[64, 128], help="one or both")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES), help="of q, k and v"
    )
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS, help="all when absent")
    parser.add_argument(
        "--flex",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="FlexAttention too (default): it compiles for every shape and is the slowest",
    )
    features = _C.cpu_features()
    parser.add_argument(
        "--isas",
        nargs="+",
        default=[features["isa"]],
        choices=features["supported"],
        help="instruction sets of our kernels, each beside torch's kernels",
    )
    add_index_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--chunk-len", type=int, help="of the DCA rows; a quarter of the keys when absent")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and index sets")
    add_check_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()
    if not arguments.flex:
        arguments.kernels = [name for name in arguments.kernels if not name.startswith("FlexAttention")]

    print_environment()
    print(describe_indexes(arguments))
    rows = [
        row
        for head_dim in arguments.head_dims
        for dtype in arguments.dtypes
        for seqlen in arguments.seqlens
        for isa in kernel_sets(arguments)
        for row in measure(arguments, isa, seqlen, head_dim, dtype)
    ]
    print_rows(rows)
    finish("attention", arguments, rows)


if __name__ == "__main__":
    main()
