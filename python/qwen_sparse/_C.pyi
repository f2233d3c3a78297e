"""The compiled extension: importing it registers ``torch.ops.qwen_sparse``."""

from typing import Any

def build_info() -> dict[str, Any]:
    """Version, compiler, build type, torch, CPU instruction sets, CUDA and CUTLASS versions of this build."""

def cpu_features() -> dict[str, Any]:
    """``isa``: the instruction set whose kernels run; ``supported``: those this CPU could run, slowest first."""

def set_cpu_isa(isa: str) -> None:
    """Choose the kernels for one instruction set; the empty string restores what
    QWEN_SPARSE_CPU_ISA says, or the fastest. For tests.

    Raises:
        ValueError: unknown, not in this build, or not supported by this CPU.
    """

def set_cuda_arch(arch: str) -> None:
    """Choose the CUDA kernels, ``"sm80"`` or ``"sm90"`` (Hopper only); the empty string restores what
    QWEN_SPARSE_CUDA_ARCH says, or the newest that each device runs. For comparisons.

    Raises:
        ValueError: unknown, or not in this build. That a device cannot run them is raised by the call.
    """
