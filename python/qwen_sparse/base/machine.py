"""What a result was measured on, as written into result files."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

import torch

from .. import _C

__all__ = ["machine"]


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
