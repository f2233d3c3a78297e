"""What forward passes cost, by phase, measured without making the host wait for a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..base.resources import resident_memory

__all__ = ["ForwardStats", "Phase"]

Phase = Literal["linear", "selection", "attention", "cache"]


@dataclass
class ForwardStats:
    """Counts and times that add up over layers, heads and prefill chunks; complete after :meth:`finish`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the passes run. On a GPU, times are those of its stream, taken by events."""
    seconds: dict[Phase, float] = field(
        default_factory=lambda: {"linear": 0.0, "selection": 0.0, "attention": 0.0, "cache": 0.0}
    )
    attended_pairs: int = 0
    """(row, key) pairs that attention computed."""
    causal_pairs: int = 0
    """All causal pairs of the same rows."""
    kept_sum: float = 0.0
    """Of the shares of attention that block groups are estimated to hold, by head and block of rows."""
    kept_count: int = 0
    """How many shares that is the sum of."""
    peak_memory: int = 0
    """Largest resident memory of the process seen at a layer's fullest points, bytes; CPU only."""
    measuring: bool = True
    """Whether to count and time at all; a CUDA graph cannot hold it."""
    sampling: bool = False
    """Whether to look at the resident memory at all."""
    _mark: float = field(default=0.0, repr=False)
    _events: list[tuple[Phase | None, torch.cuda.Event]] = field(default_factory=list, repr=False)
    _counts: list[Tensor] = field(default_factory=list, repr=False)
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    def start(self) -> None:
        """Start the clock."""
        if not self.measuring:
            return
        if self.device.type == "cuda":
            self._record(None)
        else:
            self._mark = time.perf_counter()

    def lap(self, phase: Phase) -> None:
        """Book the time since the last lap (or start) under ``phase``."""
        if not self.measuring:
            return
        if self.device.type == "cuda":
            self._record(phase)
            return
        now = time.perf_counter()
        self.seconds[phase] += now - self._mark
        self._mark = now

    def count(self, attended: int | Tensor, causal: int) -> None:
        """Add pairs; a tensor of counts on a GPU is read by :meth:`finish`."""
        if not self.measuring:
            return
        self.causal_pairs += causal
        if isinstance(attended, Tensor) and attended.is_cuda:
            self._counts.append(attended)
        else:
            self.attended_pairs += int(attended.sum()) if isinstance(attended, Tensor) else attended

    def estimate(self, kept: Tensor) -> None:
        """Add estimated shares of attention; read by :meth:`finish`."""
        if self.measuring:
            self.kept_count += kept.numel()
            self._kept.append(kept.sum(dtype=torch.float64))

    @property
    def kept(self) -> float | None:
        """Mean estimated share of attention kept; None where nothing was estimated."""
        return self.kept_sum / self.kept_count if self.kept_count else None

    def sample_memory(self) -> None:
        """Take the resident memory into ``peak_memory``."""
        if self.measuring and self.sampling and self.device.type == "cpu":
            self.peak_memory = max(self.peak_memory, resident_memory() or 0)

    def finish(self) -> None:
        """Wait for the GPU and add what it has counted, timed and estimated."""
        if self._counts:
            self.attended_pairs += int(torch.stack(self._counts).sum())
        if self._kept:
            self.kept_sum += float(torch.stack(self._kept).sum())
        if self._events:
            self._events[-1][1].synchronize()
        for (_, before), (phase, after) in zip(self._events, self._events[1:], strict=False):
            if phase is not None:
                self.seconds[phase] += before.elapsed_time(after) / 1000
        self._counts, self._kept, self._events = [], [], []

    def _record(self, phase: Phase | None) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self._events.append((phase, event))
