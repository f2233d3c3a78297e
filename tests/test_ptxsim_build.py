"""Libraries of several sources, the cache, and memory that is known to the simulator."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ptxsim import build, testing
from ptxsim.fixtures import KERNELS
from ptxsim.testing import Fault, Sim

pytestmark = pytest.mark.ptxsim

MODULES = [KERNELS / "module_a.cu", KERNELS / "module_b.cu"]
CALLER = """
extern "C" int module_a(int*, int);
extern "C" int module_b(int*, int);
extern "C" int both(int* out) {
  int error = module_a(out, 100);
  return error ? error : module_b(out + 8, 200);
}
"""


@pytest.fixture
def modules(tmp_path: Path) -> Sim:
    """The two modules, and an object file that calls them."""
    (tmp_path / "caller.cpp").write_text(CALLER)
    build.run([build.CXX, "-fPIC", "-c", tmp_path / "caller.cpp", "-o", tmp_path / "caller.o"])
    library = build.build_library(MODULES, "80", tmp_path, name="modules", objects=[tmp_path / "caller.o"])
    testing.reset()
    return Sim(library)


def test_same_names_in_two_sources(modules: Sim) -> None:
    out = np.zeros(16, np.int32)
    modules.both(out)
    first, second = out[:8], out[8:]
    assert sorted(first[:4] - 3 * np.array([1, 11, 111, 1111])) == [300, 303, 306, 309]
    assert sorted(second[:4] - 3 * np.array([2, 22, 222, 2222])) == [600, 606, 612, 618]
    assert first[4] == 104
    assert second[4] == 208


def test_unchanged_sources_are_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "copy.cu"
    header = tmp_path / "module.cuh"
    shutil.copy(KERNELS / "module_a.cu", source)
    shutil.copy(KERNELS / "module.cuh", header)
    commands: list[str] = []
    real_run = build.run

    def counting_run(command: list[str | Path], cwd: Path | None = None) -> str:
        commands.append(Path(str(command[0])).name)
        return real_run(command, cwd)

    runtime = build.runtime_library()
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "runtime_library", lambda: runtime)
    monkeypatch.setattr(build, "run", counting_run)

    def compile_and_count() -> int:
        commands.clear()
        build.build_library([source], "80", tmp_path / "out", name="copy")
        return commands.count("nvcc")

    assert compile_and_count() == 1
    assert compile_and_count() == 0
    assert commands == []
    header.write_text(header.read_text() + "// changed\n")
    assert compile_and_count() == 1
    shutil.copy(KERNELS / "module.cuh", header)
    assert compile_and_count() <= 1


def test_errors_of_the_compiler_are_reported(tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text("__global__ void k() { undeclared = 1; }")
    with pytest.raises(build.BuildError, match="undeclared"):
        build.build_library([tmp_path / "wrong.cu"], "80", tmp_path, name="wrong")


def test_memory_of_a_freed_tensor_is_used_again(basic: Sim) -> None:
    """Ranges that overlap older ones replace them, whatever their sizes."""
    library = ctypes.CDLL(basic._library._name)
    memory = np.zeros(3000, np.float32)

    def add(a: int, b: int, c: int, n: int) -> int:
        pointers = [ctypes.c_void_p(memory.ctypes.data + 4 * start) for start in (a, b, c)]
        for pointer in pointers:
            testing.register(pointer.value, 4 * n)
        testing.clear()
        return library.vecadd(*pointers, n)

    assert add(0, 1000, 2000, 1000) == 0
    assert add(500, 700, 900, 200) == 0
    assert add(0, 1000, 2000, 1000) == 0
    for start in (0, 1000, 2000):
        testing.unregister(memory.ctypes.data + 4 * start)
    assert library.vecadd(*[ctypes.c_void_p(memory.ctypes.data)] * 3, 10) == 719
    assert "out-of-bounds global load" in testing.last_error()


def test_register_tensor_covers_the_storage(basic: Sim) -> None:
    library = ctypes.CDLL(basic._library._name)
    tensors = [torch.ones(4000)[1000:2000] for _ in range(3)]
    for tensor in tensors:
        testing.register_tensor(tensor)
    testing.clear()
    assert library.vecadd(*[ctypes.c_void_p(tensor.data_ptr() - 4000) for tensor in tensors], 4000) == 0
    assert (tensors[2] == 2).all()
    for tensor in tensors:
        testing.unregister(tensor.untyped_storage().data_ptr())


def test_views_of_one_array_as_arguments(basic: Sim) -> None:
    values = np.arange(1000, dtype=np.float32)
    basic.vecadd(values, values[500:], values, 500)
    assert (values[:500] == np.arange(500) * 2 + 500).all()


def test_unknown_option() -> None:
    with pytest.raises(ValueError, match="no option colour='blue'"):
        testing.options(colour="blue")


def test_cuda_errors_without_a_report(basic: Sim) -> None:
    with pytest.raises(Fault, match="bad grid"):
        basic.vecadd(np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32), -200)
