"""Timing for benchmarks: warm-up, interleaved repetitions, percentiles; and the name of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _C

__all__ = ["Timing", "interleaved", "machine"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate."""

    median: float
    p10: float
    p90: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Median and deciles of the samples."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [samples[0]] * 9
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    min_seconds: float = 0.0,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turns, so that drift of the machine meets all of them alike.

    Args:
        candidates: name to callable.
        repeats: timed rounds.
        warmup: rounds before.
        min_seconds: keep adding rounds until every candidate has run this long in total.
        device: where they run; on a CUDA device, its stream is timed by events. The CPU when None.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = -warmup
    while rounds < repeats or any(sum(taken) < min_seconds for taken in samples.values()):
        for name, run in candidates.items():
            seconds = _seconds(run, device)
            if rounds >= 0:
                samples[name].append(seconds)
        rounds += 1
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _seconds(run: Callable[[], object], device: torch.device | None) -> float:
    if device is None or device.type == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    events[0].record(stream)
    run()
    events[1].record(stream)
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1000


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    try:
        reported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        reported = "unknown"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        query: reported,
    }


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What a result was measured on; with its GPU where ``device`` is one."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            fields = dict(line.split(":", 1) for line in cpuinfo if ":" in line)
        # Virtual machines may hide the marketing name; family and model still tell the core.
        described = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{described['model name']} (family {described['cpu family']}, model {described['model']})"
    except (OSError, KeyError):
        pass
    return {
        **({"gpu": _gpu(device)} if device is not None and device.type == "cuda" else {}),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_features()["isa"],
        "torch": torch.__version__,
        "build": _C.build_info(),
    }
