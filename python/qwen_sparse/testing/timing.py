"""Timing for benchmarks: warm-up, interleaved repetitions, percentiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Timing", "interleaved"]


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
