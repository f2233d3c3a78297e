"""Decode attention over a long paged cache on this machine's CPU or GPU, beside the bandwidth of copying memory.

    python bench/bench_decode.py --output bench/results/decode_cpu.json
    python bench/bench_decode.py --device cuda --keys 131072 1048576 --shapes 28/4/128 --footprint-mib 4096

One query row reads every key and value, so memory bandwidth is the bound. GB/s counts the bytes of the pages that must
be read, scales included. "copy" is torch's ``copy_`` between two large tensors, bytes read plus bytes written; torch
SDPA reads a contiguous bfloat16 cache of the same shape, and on a GPU where flashinfer is installed, it reads the same
bfloat16 pages. Each kernel goes round enough separate caches, as a model goes
round its layers, that ``--footprint-mib`` are touched before one is read again: more than the last-level cache holds.
All are timed in turns. No time is printed for an output that was not first compared with the reference.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flashinfer_peer import paged_decode
from qwen_sparse import _C, ops, reference
from qwen_sparse.testing import assert_close_to_reference, interleaved
from report import (
    add_device_argument,
    add_output_argument,
    choose_kernels,
    finish,
    kernel_sets,
    print_table,
    save,
    working,
)

PAGE_SIZE = 128
CHUNK_LEN = 32768 - 8192
VARIANTS = ("plain", "bias", "bias+dca")
KERNELS = {f"int8 {variant}": variant for variant in VARIANTS} | {"bf16 plain": "plain", "bf16 dca": "dca"}


@dataclass(frozen=True)
class Shape:
    """A model's heads; written num_heads/num_kv_heads/head_dim."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def parse(text: str) -> Shape:
        return Shape(*map(int, text.split("/")))

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}"


@dataclass(frozen=True)
class Input:
    """One layer's step: what decode_attention takes."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Any]

    def copy(self) -> Input:
        """The same values elsewhere in memory."""
        kwargs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in self.kwargs.items()}
        return Input(tuple(x.clone() for x in self.args), kwargs)

    def kv_head(self, head: int) -> Input:
        """Its keys and values, and the query heads that read them."""
        q, k_cache, v_cache, *rest = self.args
        one, group = slice(head, head + 1), q.shape[2] // k_cache.shape[2]
        kwargs = dict(self.kwargs)
        for name in {"k_scale", "v_scale"} & kwargs.keys():
            kwargs[name] = kwargs[name][:, :, one]
        if "k_bias" in kwargs:
            kwargs["k_bias"] = kwargs["k_bias"][one]
        rows = slice(head * group, (head + 1) * group)
        for name in {"q_succ", "q_inter"} & kwargs.keys():
            kwargs[name] = kwargs[name][:, :, rows]
        return Input((q[:, :, rows], k_cache[:, :, one], v_cache[:, :, one], *rest), kwargs)

    def run(self) -> Tensor:
        return cast(Tensor, ops.decode_attention(*self.args, **self.kwargs))


def page_bytes(shape: Shape, keys: int, dtype: str) -> int:
    return keys * shape.num_kv_heads * (2 * shape.head_dim + 8 if dtype == "int8" else 4 * shape.head_dim)


def decode_input(shape: Shape, keys: int, dtype: str, variant: str, generator: torch.Generator) -> Input:
    """Drawn on the generator's device."""
    device, num_pages = generator.device, -(-keys // PAGE_SIZE)
    pool = (num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
    table = torch.arange(num_pages, dtype=torch.int32, device=device)[None]
    queries = torch.randn(3, 1, 1, shape.num_heads, shape.head_dim, generator=generator, device=device).bfloat16()
    kwargs: dict[str, Any] = {}
    if dtype == "int8":
        draw = {"generator": generator, "dtype": torch.int8, "device": device}
        caches = [torch.randint(-127, 128, pool, **draw) for _ in range(2)]
        for name in ("k_scale", "v_scale"):
            kwargs[name] = torch.rand(pool[:3], generator=generator, device=device) / 60
    else:
        caches = [torch.empty(pool, dtype=torch.bfloat16, device=device).normal_(generator=generator) for _ in range(2)]
    if "bias" in variant:
        kwargs["k_bias"] = torch.randn(shape.num_kv_heads, shape.head_dim, generator=generator, device=device)
        kwargs["inv_freq"] = 1e6 ** (-torch.arange(0, shape.head_dim, 2, device=device).double() / shape.head_dim)
    if "dca" in variant:
        kwargs.update(q_succ=queries[1], q_inter=queries[2], chunk_len=CHUNK_LEN)
    return Input((queries[0], *caches, table, torch.tensor([keys], dtype=torch.int32, device=device)), kwargs)


def compare(step: Input, actual: Tensor) -> None:
    """A result of the step with the reference, which runs on its device, a kv head at a time.

    Raises:
        AssertionError: an error is more than twice that of plain PyTorch in the same dtype.
    """
    exact, plain = [], []
    with actual.device:  # for what the reference makes from nothing
        for head in range(step.args[1].shape[2]):
            part = step.kv_head(head)
            wide = [x.double() if x.is_floating_point() else x for x in part.args]
            queries = {name: part.kwargs[name].double() for name in {"q_succ", "q_inter"} & part.kwargs.keys()}
            exact.append(cast(Tensor, reference.decode_attention(*wide, **(part.kwargs | queries))))
            plain.append(
                cast(Tensor, reference.decode_attention(*part.args, compute_dtype=torch.bfloat16, **part.kwargs))
            )
    assert_close_to_reference(actual, torch.cat(exact, dim=2), torch.cat(plain, dim=2))


def in_turn(steps: list[Callable[[], object]]) -> Callable[[], object]:
    """Each call runs the next step."""
    turns = itertools.cycle(steps)
    return lambda: next(turns)()


def sdpa_steps(shape: Shape, keys: int, layers: int, generator: torch.Generator) -> list[Callable[[], object]]:
    device, size = generator.device, (2, 1, shape.num_kv_heads, keys, shape.head_dim)
    q = torch.randn(1, shape.num_heads, 1, shape.head_dim, generator=generator, device=device).bfloat16()
    kv = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(generator=generator)

    def step(kv: Tensor) -> Callable[[], object]:
        return lambda: F.scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=True)

    return [step(kv.clone()) for _ in range(layers)]


def flashinfer_steps(
    shape: Shape, keys: int, layers: int, generator: torch.Generator, *, checked: bool
) -> Callable[[], object]:
    """flashinfer on copies of a step's bfloat16 pages, in turns."""
    import_module("flashinfer")  # before anything is drawn for it
    step = decode_input(shape, keys, "bf16", "plain", generator)
    table = step.args[3]
    last_page_len = keys - (table.shape[1] - 1) * PAGE_SIZE
    decode = paged_decode(table, last_page_len, PAGE_SIZE, shape.num_heads, shape.num_kv_heads, shape.head_dim)

    def one() -> Callable[[], Tensor]:
        return functools.partial(decode, *step.copy().args[:3])

    if checked:
        compare(step, one()())
    return in_turn([one() for _ in range(layers)])


def measure(
    arguments: argparse.Namespace, isa: str, shape: Shape, keys: int, skipped: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per kernel for one shape, with the CPU kernels of one instruction set."""
    choose_kernels(isa)
    device = arguments.device
    generator = torch.Generator(device).manual_seed(arguments.seed)
    footprint = arguments.footprint_mib * 2**20
    source, target = torch.ones(2, footprint // 2, dtype=torch.uint8, device=device)
    sizes = {"copy": 2 * source.numel(), "torch SDPA": page_bytes(shape, keys, "bf16")}
    candidates: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "torch SDPA": in_turn(sdpa_steps(shape, keys, -(-footprint // sizes["torch SDPA"]), generator)),
    }
    for name in arguments.kernels:
        dtype = name.split()[0]
        sizes[name] = page_bytes(shape, keys, dtype)
        step = decode_input(shape, keys, dtype, KERNELS[name], generator)
        if arguments.check:
            compare(step, step.run())
        candidates[name] = in_turn([step.copy().run for _ in range(-(-footprint // sizes[name]))])
    if device.type == "cuda":
        size = page_bytes(shape, keys, "bf16")
        layers = -(-footprint // size)
        make = functools.partial(flashinfer_steps, shape, keys, layers, generator, checked=arguments.check)
        found = working({"flashinfer bf16": make}, skipped, shape=str(shape), keys=keys)
        candidates |= found
        sizes |= dict.fromkeys(found, size)
    timings = interleaved(candidates, repeats=arguments.repeats, warmup=2, device=device)
    rows = []
    for name, timing in timings.items():
        rate = sizes[name] / timing.median
        rows.append(
            {
                "kernel": name,
                "isa": isa,
                "shape": str(shape),
                "keys": keys,
                "bytes": sizes[name],
                "seconds": vars(timing),
                "gigabytes_per_second": rate / 1e9,
                "share_of_copy": rate / (sizes["copy"] / timings["copy"].median),
                "speedup_over_sdpa": timings["torch SDPA"].median / timing.median,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[16384, 131072])
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["14/2/64", "4/2/64", "28/4/128", "12/2/128", "4/2/128"],
        help="num_heads/num_kv_heads/head_dim",
    )
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    features = _C.cpu_features()
    parser.add_argument("--isas", nargs="+", default=[features["isa"]], choices=features["supported"])
    parser.add_argument("--footprint-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    shapes = [Shape.parse(shape) for shape in arguments.shapes]
    skipped: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for shape, keys, isa in itertools.product(shapes, arguments.keys, kernel_sets(arguments)):
        rows += measure(arguments, isa, shape, keys, skipped)
        save("decode", arguments, rows, skipped)
    is_ours = [row["kernel"] in KERNELS for row in rows]
    print_table(
        ["kernel", "isa", "heads", "keys", "median", "p10", "p90", "GB/s", "of copy", "x SDPA"],
        [
            [
                row["kernel"],
                row["isa"] if ours else "",
                row["shape"],
                f"{row['keys']:,}",
                *(f"{1e3 * row['seconds'][name]:.2f} ms" for name in ("median", "p10", "p90")),
                f"{row['gigabytes_per_second']:.1f}",
                f"{row['share_of_copy']:.0%}",
                "" if row["kernel"] == "copy" else f"{row['speedup_over_sdpa']:.2f}",
            ]
            for row, ours in zip(rows, is_ours, strict=True)
        ],
    )
    finish("decode", arguments, rows, skipped)


if __name__ == "__main__":
    main()
