"""What all benchmarks share: their common options, a table for people, then one JSON line for machines and its file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwen_sparse import _C
from qwen_sparse.base.machine import machine

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = [
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "QWEN_SPARSE_CPU_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
]
"""Variables that choose instruction sets or threads; the first two limit torch and its oneDNN to older ones."""


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="also write the JSON here (committed ones are in bench/results)")


def add_check_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare results with the reference before anything is timed (default)",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")


def kernel_sets(arguments: argparse.Namespace) -> list[str]:
    """What a benchmark goes through with its shapes: the instruction sets asked for, or the GPU."""
    return ["cuda"] if arguments.device.type == "cuda" else list(arguments.isas)


def choose_kernels(kernel_set: str) -> None:
    """Makes an instruction set current; on a GPU there is nothing to choose."""
    if kernel_set != "cuda":
        _C.set_cpu_isa(kernel_set)


def environment() -> dict[str, str | None]:
    """The variables of :data:`ENVIRONMENT`, and what torch made of the first."""
    chosen: dict[str, str | None] = {name: os.environ.get(name) for name in ENVIRONMENT}
    return {**chosen, "torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}


def revision() -> str | None:
    """The commit that ran, with "-dirty" if files were changed: ``QWEN_SPARSE_REVISION`` (for a copy of the files on
    another machine), else what git says; None where neither is there."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = None
    return os.environ.get("QWEN_SPARSE_REVISION") or said


def print_environment() -> None:
    print(", ".join(f"{name} {'unset' if value is None else value}" for name, value in environment().items()))


def time_cells(seconds: Mapping[str, float]) -> list[str]:
    """Median, p10 and p90 with one unit."""
    scale, unit = (1, "s") if seconds["median"] >= 10 else (1e3, "ms")
    return [f"{scale * seconds[name]:,.1f} {unit}" for name in ("median", "p10", "p90")]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


Runnable = TypeVar("Runnable", bound=Callable[[], object])


def working(
    makers: Mapping[str, Callable[[], Runnable]], skipped: list[dict[str, Any]], **shape: object
) -> dict[str, Runnable]:
    """Those of a benchmark's peers that are there and run here.

    Args:
        makers: by kernel, what gives the callable that will be timed; it is called once.
        skipped: a row is added for each of the others, with the reason. A line says so too.
        shape: columns of the added rows.
    """
    found = {}
    for name, make in makers.items():
        try:
            run = make()
            with torch.inference_mode():
                run()
            found[name] = run
        except Exception as error:  # packages are absent, compilers fail, memory ends, in as many ways
            skip(name, error, skipped, **shape)
    return found


def skip(name: str, error: Exception, skipped: list[dict[str, Any]], **shape: object) -> None:
    """Says that a peer is not measured, and adds a row about it."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    print(f"{name}: not measured: {reason}")
    skipped.append({"kernel": name, **shape, "reason": reason})


def save(
    benchmark: str,
    arguments: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    not_measured: Sequence[dict[str, Any]] = (),
    *,
    complete: bool = False,
) -> dict[str, Any]:
    """Write the JSON to ``--output`` after a part of the rows, so that a run which is stopped loses only the others.

    Args:
        benchmark: its name.
        arguments: its options.
        rows: all that were measured until now.
        not_measured: what :func:`working` left out.
        complete: whether these are all rows; the JSON says so.

    Returns:
        The JSON.
    """
    options = {key: _plain(value) for key, value in vars(arguments).items() if key != "output"}
    record = {
        "benchmark": benchmark,
        "revision": revision(),
        "machine": machine(getattr(arguments, "device", None)),
        "environment": environment(),
        "options": options,
        "complete": complete,
        "rows": list(rows),
        "not_measured": list(not_measured),
    }
    if arguments.output is not None:
        partial = arguments.output.with_name(f"{arguments.output.name}.part")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(arguments.output)
    return record


def finish(
    benchmark: str,
    arguments: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    not_measured: Sequence[dict[str, Any]] = (),
) -> None:
    """As :func:`save`, of all rows, and print the JSON line."""
    print(json.dumps(save(benchmark, arguments, rows, not_measured, complete=True)))


def _plain(value: object) -> object:
    """Paths by name only: a result says which file, not where it lay."""
    return value.name if isinstance(value, Path) else str(value) if isinstance(value, torch.device) else value
