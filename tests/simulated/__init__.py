"""The package's ops run by its CUDA kernels in the PTX simulator: ``torch.ops.qwen_sparse_simulated``, on CPU tensors.

csrc/bindings.cpp, csrc/api and csrc/cuda are compiled as they are, except that csrc/api/device.cpp, which finds the
device of a call, is replaced by device.cpp of this directory.
"""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import ptxsim.build as simulator
from ptxsim import testing
from ptxsim.fixtures import cutlass_include

__all__ = ["SimulatedOps", "archs", "load", "options", "pose", "ptx_files", "reset", "unavailable"]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NAMESPACE = "qwen_sparse_simulated"
TORCH = Path(torch.__file__).parent
CXXFLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-DQWEN_SPARSE_OP_NAMESPACE={NAMESPACE}", f"-I{CSRC}", f"-I{simulator.cuda_include()}", f"-I{TORCH / 'include'}",
    f"-I{sysconfig.get_paths()['include']}",
]  # fmt: skip

unavailable = simulator.unavailable
options, reset = testing.options, testing.reset


def _host_object(source: Path, headers: str, defines: list[str]) -> Path:
    """The object file of a C++ source, from the cache unless it, a header or the flags have changed."""
    key = simulator.digest(source.read_bytes(), headers, torch.__version__, *CXXFLAGS, *defines)
    target = simulator.cache_directory() / "host" / f"{source.parent.name}-{source.stem}-{key}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        simulator.run([simulator.CXX, *CXXFLAGS, *defines, "-c", source, "-o", temporary])
        temporary.rename(target)
    return target


def _cuda_sources(*parts: str) -> list[Path]:
    return [path for part in parts for path in sorted((CSRC / "cuda" / part).rglob("*.cu"))]


def _cuda_objects() -> dict[str, list[Path]]:
    """The translated objects of every CUDA source, by architecture; those of 90a only where CUTLASS is found."""
    objects = {"80": simulator.compile_sources(_cuda_sources("smxx", "sm80"), "80", includes=[CSRC])}
    if (cutlass := cutlass_include()) is not None:
        includes = [CSRC, cutlass]
        objects["90a"] = simulator.compile_sources(_cuda_sources("sm90"), "90a", includes=includes)
    return objects


def archs() -> list[int]:
    """Compute capabilities, times ten, that have kernels."""
    return [80] if cutlass_include() is None else [80, 90]


def ptx_files() -> dict[str, list[Path]]:
    """The PTX of every CUDA source, by architecture."""
    return {
        arch: sorted({path for built in objects for path in built.parent.glob("*.ptx")})
        for arch, objects in _cuda_objects().items()
    }


@functools.cache
def build() -> Path:
    """The shared library with the simulated ops."""
    headers = simulator.digest(*(path.read_bytes() for path in sorted(CSRC.rglob("*.h"))))
    objects = _cuda_objects()
    defines = ["-DQWEN_SPARSE_SM90"] if "90a" in objects else []
    host = [CSRC / "bindings.cpp", *sorted((CSRC / "cuda").glob("*.cpp")), Path(__file__).with_name("device.cpp")]
    host.remove(CSRC / "cuda" / "unavailable.cpp")
    host += [path for path in sorted((CSRC / "api").glob("*.cpp")) if path.name != "device.cpp"]
    with ThreadPoolExecutor(simulator.MAX_COMPILES) as pool:
        host_objects = list(pool.map(lambda source: _host_object(source, headers, defines), host))
    return simulator.build_library(
        [],
        "80",
        simulator.cache_directory() / "extension",
        name=NAMESPACE,
        objects=[*host_objects, *(built for group in objects.values() for built in group)],
        link_flags=[f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"],
    )


@functools.cache
def load() -> SimulatedOps:
    """Builds and loads the library, once per process."""
    testing.runtime()
    torch.ops.load_library(str(build()))
    return SimulatedOps()


def pose(device: int) -> None:
    """Tensors count as those of this device from now on (option ``devices``)."""
    ctypes.CDLL(str(build())).qwen_sparse_simulated_pose(device)


class SimulatedOps:
    """Stands for ``torch.ops.qwen_sparse``. A fault that the simulator reports is raised as ``testing.Fault``."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(getattr(torch.ops, NAMESPACE), name)

        def call(*arguments: Any, **options: Any) -> Any:
            testing.clear()
            try:
                return op(*arguments, **options)
            except RuntimeError as error:
                report = testing.last_error()
                if report:
                    raise testing.Fault(report) from error
                raise

        return call
