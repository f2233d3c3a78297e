"""Running simulated code from Python, with numpy arrays or torch CPU tensors as device memory.

``Sim`` calls the ``extern "C"`` functions of a library. The module-level functions act on the simulator of this process
whoever loaded the library: ``torch.ops.load_library(build_library(...))`` needs only ``register_tensor`` for what the
kernels touch, and ``last_error`` for the report of a launch that failed.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from .build import runtime_library


class Fault(RuntimeError):
    """A kernel fault, a checker report or a CUDA error."""


DEFAULTS: dict[str, int | str] = {
    "seed": 0,
    "sched": "fifo",
    "async_": "lazy",
    "preempt": 0,
    "uninit": 1,
    "race": 0,
    "proxy": 1,
    "global": 1,
    "threads": 0,
    "cta_order": "index",
    "arch": 0,
    "sms": 0,
    "devices": 1,
    "verbose": 0,
}
"""Options after reset(); README.md says what they do."""


@functools.cache
def runtime() -> ctypes.CDLL:
    """The simulator, loaded for the whole process; libraries made by build_library find this copy."""
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.ptxsim_error.restype = ctypes.c_char_p
    library.ptxsim_register.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.ptxsim_unregister.argtypes = [ctypes.c_void_p]
    library.ptxsim_launches.restype = ctypes.c_uint64
    library.ptxsim_set.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return library


def register(pointer: int, nbytes: int) -> None:
    """Makes host memory valid in kernels; it replaces every range that it overlaps (memory that was freed since)."""
    if nbytes:
        runtime().ptxsim_register(pointer, nbytes)


def unregister(pointer: int) -> None:
    """Ends what register(pointer, ...) began; nothing if another range took its place."""
    runtime().ptxsim_unregister(pointer)


def register_tensor(tensor: torch.Tensor) -> None:
    """Makes the whole storage of a CPU tensor valid in kernels."""
    storage = tensor.untyped_storage()
    register(storage.data_ptr(), storage.nbytes())


def options(**values: int | str) -> None:
    """Sets options by name, such as ``sched="random", async_="eager", seed=3, race=1`` (README.md lists them)."""
    for name, value in values.items():
        text = str(int(value) if isinstance(value, bool) else value)
        if runtime().ptxsim_set(name.rstrip("_").upper().encode(), text.encode()):
            raise ValueError(f"ptxsim has no option {name}={value!r}")


def launches(device: int) -> int:
    """How many kernels a device was given since the process began; with option ``devices`` there may be several."""
    return int(runtime().ptxsim_launches(device))


def reset() -> None:
    """All options to their defaults, without reports on stderr; forgets the last error."""
    options(**DEFAULTS)
    clear()


def last_error() -> str:
    """The report of the first launch that failed since clear(), or an empty string."""
    return str(runtime().ptxsim_error().decode(errors="replace"))


def clear() -> None:
    """Forgets the last error, of the CUDA runtime too."""
    runtime().ptxsim_clear()


def _memory(value: Any) -> tuple[int, int] | None:
    """(pointer, bytes) of an array or tensor."""
    if hasattr(value, "ctypes"):
        return value.ctypes.data, value.nbytes
    if hasattr(value, "data_ptr"):
        return value.data_ptr(), value.nbytes
    return None


class Sim:
    """A library of build_library: ``sim.name(*args)`` calls an ``extern "C"`` function that returns a cudaError_t.

    Arrays and tensors become device pointers, valid for the duration of the call; a Python float is passed as a float
    and an int as an int. Raises Fault with the report when the result is not zero.
    """

    def __init__(self, library: Path) -> None:
        runtime()
        self._library = ctypes.CDLL(str(library))

    options = staticmethod(options)
    reset = staticmethod(reset)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*args: Any) -> None:
            converted: list[Any] = []
            ranges: list[tuple[int, int]] = []
            for value in args:
                memory = _memory(value)
                if memory is None:
                    converted.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value))
                else:
                    converted.append(ctypes.c_void_p(memory[0]))
                    ranges.append(memory)
            pointers: list[int] = []
            end = 0
            for pointer, nbytes in sorted(ranges, key=lambda r: (r[0], -r[1])):  # views of one array are one range
                if pointer + nbytes <= end:
                    continue
                if pointer < end:
                    pointer, nbytes = pointers[-1], pointer + nbytes - pointers[-1]
                else:
                    pointers.append(pointer)
                register(pointer, nbytes)
                end = pointer + nbytes
            clear()
            try:
                code = function(*converted)
            finally:
                for pointer in pointers:
                    unregister(pointer)
            if code:
                raise Fault(last_error() or f"CUDA error {code}")

        return call
