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
On a GPU where flashinfer is installed, its dense and its block-sparse prefill run too, the latter on all 64 x 64 blocks
in which the set attends any pair: "density" is what a kernel executes. Times are printed for outputs that were first
compared with the reference on their last rows (of the first kv head's query heads, where all would take long). "x SDPA"
is over the fastest of torch's own kernels that ran. The JSON names the kernels that did not run, and why.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashinfer_peer import block_sparse_prefill, dense_prefill
from indexes import (
    BLOCK_M,
    add_index_arguments,
    blocks_density,
    clustered_indexes,
    covered_offsets,
    describe_indexes,
    index_counts,
    occupied_blocks,
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
    save,
    skip,
    time_cells,
    working,
)

CHECKED_ROWS = 64
FLEX_BLOCK = 128
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DENSE_OF = {
    "vertical-slash": "dense",
    "selection + vertical-slash": "dense",
    "DCA vertical-slash": "DCA dense",
    "vertical-slash sm_80": "dense sm_80",
    "FlexAttention vertical-slash": "FlexAttention causal",
    "flashinfer 64x64 blocks": "flashinfer dense",
}
"""Every sparse kernel, with the dense one that its "x density" is about."""
GPU_BACKENDS = {"torch SDPA flash": SDPBackend.FLASH_ATTENTION, "torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
KERNELS = [
    *("torch SDPA", *GPU_BACKENDS, "FlexAttention causal", "flashinfer dense", "dense", "DCA dense", "dense sm_80"),
    *DENSE_OF,
]
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
        heads, draw = arguments.num_heads, {"seed": arguments.seed, "device": arguments.device}
        q, k, v = random_qkv(seqlen, seqlen, heads, arguments.num_kv_heads, head_dim, dtype, **draw)
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
        columns, slashes = (x.to(arguments.device) for x in (columns, slashes))
        return cls(q, k, v, q_succ, q_inter, columns, slashes, chunk_len)

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

    @functools.cached_property
    def occupied(self) -> Tensor:
        """The blocks of 64 x 64 pairs that the sets touch, bool ``[num_heads, blocks, blocks]``."""
        return occupied_blocks(self.columns, self.slashes, self.q.shape[0]).to(self.q.device)

    def kernels(self) -> dict[str, Callable[[], object]]:
        """Every kernel that is always there, by name."""
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))

        def sdpa() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        ours: dict[str, Callable[[], object]] = {
            "dense": lambda: ops.attention(self.q, self.k, self.v),
            "DCA dense": lambda: self.dual_chunk({}),
            "vertical-slash": lambda: ops.vertical_slash_attention(self.q, self.k, self.v, **self.sets),
            "selection + vertical-slash": self.select_and_attend,
            "DCA vertical-slash": lambda: self.dual_chunk(self.sets),
        }
        if self.q.is_cuda and torch.cuda.get_device_capability(self.q.device) == (9, 0):
            # what a kernel for Ampere, as FlashAttention 2, makes of the same work
            ours |= {f"{name} sm_80": on_ampere_kernels(ours[name]) for name in ("dense", "vertical-slash")}
        return {"torch SDPA": sdpa, **ours}

    def peers(self) -> dict[str, Callable[[], Callable[[], Tensor]]]:
        """By name, what makes a kernel that may not be there; results are ``[seqlen, num_heads, head_dim]``."""
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))

        def with_backend(backend: SDPBackend) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

            return run

        flex = functools.cache(lambda: flex_candidates(self))
        makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
            name: functools.partial(lambda name: flex()[name], name)
            for name in ("FlexAttention causal", "FlexAttention vertical-slash")
        }
        if not q.is_cuda:
            return makers
        return {
            **{name: functools.partial(with_backend, backend) for name, backend in GPU_BACKENDS.items()},
            **makers,
            "flashinfer dense": lambda: dense_prefill(self.q, self.k, self.v),
            "flashinfer 64x64 blocks": lambda: block_sparse_prefill(self.q, self.k, self.v, self.occupied),
        }


def on_ampere_kernels(run: Callable[[], object]) -> Callable[[], object]:
    """The same call on the kernels for sm_80."""

    def chosen() -> object:
        _C.set_cuda_arch("sm80")
        try:
            return run()
        finally:
            _C.set_cuda_arch("")

    return chosen


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, occupied: Tensor, compute_dtype: torch.dtype = torch.float64
) -> Tensor:
    """The reference for the last rows of a block-sparse kernel: causal attention over the occupied blocks of each."""
    rows, heads = q.shape[:2]
    seqlen, group = k.shape[0], heads // k.shape[1]
    out = torch.empty_like(q)
    for head in range(heads):
        for block in range((seqlen - rows) // BLOCK_M, -(-seqlen // BLOCK_M)):
            first, end = max(block * BLOCK_M, seqlen - rows), min((block + 1) * BLOCK_M, seqlen)
            attended = occupied[head, block].repeat_interleave(BLOCK_M)[:end].nonzero().flatten()
            chosen = [x[attended, head // group, None] for x in (k, v)]
            where = slice(first - seqlen + rows, end - seqlen + rows)
            out[where, head, None] = cast(
                Tensor, reference.attention(q[where, head, None], *chosen, compute_dtype=compute_dtype)
            )
    return out


Expected = dict[tuple[Callable[..., Any], bool], tuple[Tensor, Tensor]]
"""By definition and whether it is sparse: the exact last rows, and those of plain PyTorch in the kernels' dtype."""


def check(inputs: Inputs, name: str, peers: dict[str, Callable[[], Tensor]], expected: Expected) -> None:
    """Compares the last rows of a kernel that will be timed with the reference, which runs on the kernel's device.

    Args:
        inputs: of the kernel.
        name: of the kernel.
        peers: by name, the kernels that are not ours.
        expected: of these inputs; what is not there yet is added.

    Raises:
        AssertionError: an error is more than twice that of plain PyTorch in the same dtype.
    """
    if name == "torch SDPA":
        return  # what it computes is not ours to check
    seqlen, heads = inputs.q.shape[:2]
    if seqlen * heads > MOST_CHECKED:
        heads //= inputs.k.shape[1]
    sparse, function = name in DENSE_OF, reference.attention
    if name.startswith("DCA"):
        function = reference.dual_chunk_attention
    elif name == "flashinfer 64x64 blocks":
        function = block_attention
    elif sparse:
        function = reference.vertical_slash_attention
    if (function, sparse) not in expected:
        expected[function, sparse] = last_rows(inputs, function, sparse, heads)
    actual = cast(Tensor, peers[name]() if name in peers else inputs.kernels()[name]())
    assert_close_to_reference(actual[-CHECKED_ROWS:, :heads], *expected[function, sparse])


def last_rows(inputs: Inputs, function: Callable[..., Any], sparse: bool, heads: int) -> tuple[Tensor, Tensor]:
    """The definition's last rows for the first ``heads`` query heads: in float64, and in the inputs' dtype."""
    kv_heads = heads * inputs.k.shape[1] // inputs.q.shape[1]
    k, v = (x[:, :kv_heads] for x in (inputs.k, inputs.v))
    queries = [x[-CHECKED_ROWS:, :heads] for x in (inputs.q, inputs.q_succ, inputs.q_inter)]
    options: dict[str, Any] = {key: indexes[:heads] for key, indexes in inputs.sets.items()} if sparse else {}
    if function is reference.dual_chunk_attention:
        options["chunk_len"] = inputs.chunk_len
    else:
        queries = queries[:1]
    if function is block_attention:
        options = {"occupied": inputs.occupied[:heads]}
    with inputs.q.device:  # for what the reference makes from nothing
        exact = function(*(x.double() for x in (*queries, k, v)), **options)
        return exact, function(*queries, k, v, **options, compute_dtype=inputs.q.dtype)


def flex_candidates(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Compiled FlexAttention, with a causal mask and with the vertical-slash set as a mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch.compiler.reset()  # every shape is compiled anew; past a few, torch would give up compiling
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    seqlen, heads = inputs.q.shape[:2]
    blocks = -(-seqlen // FLEX_BLOCK)
    is_column, is_covered = torch.zeros(heads, seqlen, dtype=torch.bool), []
    for head in range(heads):
        is_column[head, inputs.columns[head][inputs.columns[head] >= 0].long().cpu()] = True
        slashes = np.zeros(seqlen, dtype=bool)
        slashes[inputs.slashes[head][inputs.slashes[head] >= 0].cpu().numpy()] = True
        is_covered.append(torch.from_numpy(covered_offsets(slashes)))
    offsets, is_column = torch.stack(is_covered).to(q.device), is_column.to(q.device)
    per_side = FLEX_BLOCK // BLOCK_M
    padding = blocks * per_side - inputs.occupied.shape[1]
    occupied = F.pad(inputs.occupied, (0, padding, 0, padding)).view(heads, blocks, per_side, blocks, per_side)
    occupied = occupied.any(dim=4).any(dim=2)

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
        return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)

    triangle = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device).tril().expand(heads, -1, -1)
    return {
        "FlexAttention causal": candidate(triangle, causal),
        "FlexAttention vertical-slash": candidate(occupied, sparse),
    }


def measure(
    arguments: argparse.Namespace, isa: str, seqlen: int, head_dim: int, dtype: str, skipped: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per kernel for one shape, with the CPU kernels of one instruction set."""
    choose_kernels(isa)
    inputs = Inputs.make(arguments, seqlen, head_dim, DTYPES[dtype])
    asked = {name: make for name, make in inputs.peers().items() if name in arguments.kernels}
    peers = working(asked, skipped, seqlen=seqlen, head_dim=head_dim, dtype=dtype)
    candidates: dict[str, Callable[[], object]] = {**inputs.kernels(), **peers}
    candidates = {name: candidates[name] for name in arguments.kernels if name in candidates}
    expected: Expected = {}
    for name in list(candidates) if arguments.check else ():
        try:
            check(inputs, name, peers, expected)
        except AssertionError as error:
            if name not in peers:
                raise
            del candidates[name]
            skip(name, error, skipped, seqlen=seqlen, head_dim=head_dim, dtype=dtype)
    densities = dict.fromkeys(DENSE_OF, inputs.density())
    if "flashinfer 64x64 blocks" in candidates:
        densities["flashinfer 64x64 blocks"] = blocks_density(inputs.occupied, seqlen)
    with torch.inference_mode():
        timings = interleaved(candidates, repeats=arguments.repeats, device=arguments.device)
    ours = [name for name in timings if not name.startswith("torch SDPA")]
    fastest = min((timing.median for name, timing in timings.items() if name not in ours), default=None)
    dense_flop = 2 * seqlen * (seqlen + 1) * head_dim * arguments.num_heads
    rows = []
    for name, timing in timings.items():
        share = densities.get(name, 1.0)
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
                "time_over_density_times_dense": None if dense is None else timing.median / (share * dense.median),
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
                "" if row["kernel"].startswith(("torch", "Flex", "flashinfer")) else row["isa"],
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
    skipped: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    shapes = itertools.product(arguments.head_dims, arguments.dtypes, arguments.seqlens, kernel_sets(arguments))
    for head_dim, dtype, seqlen, isa in shapes:
        rows += measure(arguments, isa, seqlen, head_dim, dtype, skipped)
        save("attention", arguments, rows, skipped)
    print_rows(rows)
    finish("attention", arguments, rows, skipped)


if __name__ == "__main__":
    main()
