"""What this machine can do at most: multiply-add rates, memory bandwidth, matrix products by dtype.

    python bench/bench_machine.py --output bench/results/machine_cpu.json

The floors in docs/cpu-kernels.md are computed from these. Multiply-adds are measured by bench/peak.cpp, built here
with the system's compiler (x86 only); bandwidth by torch's copy; products by torch and by the package's ``linear``,
which widens 16-bit operands where that is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qwen_sparse.model.linear import linear, widens
from qwen_sparse.testing import interleaved
from report import add_output_argument, finish, print_table

CHUNK_ROWS = 4096
SHAPES = {"0.5B gate and up": (896, 9728), "0.5B down": (4864, 896), "7B gate": (3584, 18944)}
"""Products of Qwen2.5 layers: input and output features."""


def multiply_adds(compiler: str) -> list[dict[str, Any]]:
    """Rates of the vector instructions; nothing on CPUs other than x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run([compiler, "-O3", "-std=c++17", "-pthread", source, "-o", program], check=True)
        threads = torch.get_num_threads()
        output = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
    return [
        {"figure": f"{name}, {count} thread{'s' * (count > 1)}", "value": rates[key], "unit": "GFLOP/s"}
        for name, rates in json.loads(output).items()
        for key, count in (("one", 1), ("all", threads))
    ]


def bandwidth(gigabytes: float, repeats: int) -> list[dict[str, Any]]:
    """Bytes read plus bytes written by a copy too large for any cache."""
    source = torch.ones(int(gigabytes * 1e9), dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, repeats=repeats)["copy"]
    return [
        {"figure": "copy", "value": 2 * source.nbytes / timing.median / 1e9, "unit": "GB/s", "seconds": vars(timing)}
    ]


def products(repeats: int) -> list[dict[str, Any]]:
    """Rates of one prefill chunk's products."""
    rows = []
    for name, (size, columns) in SHAPES.items():
        x, weight = torch.randn(CHUNK_ROWS, size), torch.randn(columns, size)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = x.to(dtype), weight.to(dtype)
            candidates = {"torch": lambda a=a, b=b: F.linear(a, b)}
            if widens(dtype, a.device):
                candidates["widened"] = lambda a=a, b=b: linear(a, b)
            with torch.inference_mode():
                timings = interleaved(candidates, repeats=repeats)
            rows += [
                {
                    "figure": f"{name}, {str(dtype).removeprefix('torch.')}, {kind}",
                    "value": 2 * CHUNK_ROWS * size * columns / timing.median / 1e9,
                    "unit": "GFLOP/s",
                    "seconds": vars(timing),
                }
                for kind, timing in timings.items()
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of what is copied")
    parser.add_argument("--repeats", type=int, default=5)
    add_output_argument(parser)
    arguments = parser.parse_args()
    rows = multiply_adds(arguments.compiler)
    rows += bandwidth(arguments.gigabytes, arguments.repeats)
    rows += products(arguments.repeats)
    print_table(["figure", "value", "unit"], [[row["figure"], f"{row['value']:.1f}", str(row["unit"])] for row in rows])
    finish("machine", arguments, rows)


if __name__ == "__main__":
    main()
