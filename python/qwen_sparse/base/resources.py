"""Memory of the machine and of this process, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["available_memory", "format_bytes", "peak_resident_memory", "resident_memory"]

_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),  # version 2
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
)


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes this process can still take on a device; the CPU when None.

    CPU: ``MemAvailable``, or what its control group leaves if that is less; None where the system does not say (no
    /proc), and callers then skip the check. CUDA: what the driver has left and what torch holds unused.
    """
    if device is not None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    available = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    for directory, limit, usage in _CONTROL_GROUPS:
        try:
            left = int((directory / limit).read_text()) - int((directory / usage).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not this kind of control group, or "max": no limit
            continue
        # File pages (a mapped checkpoint, for one) count as used there but are given back on demand.
        available.append(left + sum(int(stat.get(key, 0)) for key in ("active_file", "inactive_file")))
    return max(0, min(available)) if available else None


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not say (no /proc)."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()


def peak_resident_memory() -> int:
    """Largest resident memory of this process since it started, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_bytes(count: int) -> str:
    """Decimal units, three significant digits: 822400 -> '822 KB', 57_000_000_000 -> '57.0 GB'."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "KB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f} {unit}"
