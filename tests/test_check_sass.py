"""The check of the kernels' machine code finds what it looks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

from check_sass import ARCHITECTURES, REQUIRED, Kernel, faults, kernels_of, serialised  # noqa: E402

DUMP = """
Fatbin elf code:
arch = sm_80
	code for sm_80
		Function : _Z3one
        /*0000*/                   MOV R1, c[0x0][0x28] ;     /* 0x00000a00ff017624 */
        /*0010*/              @!P0 LDL.64 R2, [R1] ;           /* 0x00000a00ff017624 */
        /*0020*/                   LDG.E.128 R2, [R4.64] ;     /* 0x0000000502007986 */
	code for sm_90a
		Function : _Z3two
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*1000*/              @UP0 UTMALDG.3D [UR8], [UR4] ;
"""
LOG = """
  [1/9] Building CUDA object CMakeFiles/sm90.dir/a.cu.o
  ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
  [2/9] Building CUDA object CMakeFiles/sm90.dir/b.cu.o
  [1/1] Building CUDA object CMakeFiles/sm90.dir/a.cu.o
  [3/9] Building CXX object CMakeFiles/_C.dir/c.cpp.o
"""
GOOD = [
    Kernel(f"void qwen_sparse::{family}::kernel<64>()", architecture)
    for family in REQUIRED
    for architecture in ARCHITECTURES
]
HOPPER = "void qwen_sparse::sm90::prefill::kernel()"


def test_instructions_are_counted() -> None:
    one, two = kernels_of(DUMP.splitlines())
    assert (one.name, one.architecture, dict(one.instructions)) == ("_Z3one", "sm_80", {"MOV": 1, "LDL": 1, "LDG": 1})
    assert (two.name, two.architecture, dict(two.instructions)) == ("_Z3two", "sm_90a", {"HGMMA": 1, "UTMALDG": 1})


def test_the_last_compilation_counts() -> None:
    a, b = "CMakeFiles/sm90.dir/a.cu.o", "CMakeFiles/sm90.dir/b.cu.o"
    assert serialised(LOG.splitlines()[:4]) == {a: {"C7510"}, b: set()}
    assert serialised(LOG.splitlines()) == {a: set(), b: set()}


def test_rules() -> None:
    compiled: dict[str, set[str]] = {"sm90.dir/a.cu.o": set()}
    both = {"HGMMA": 3, "UTMALDG": 2}

    def found(*kernels: Kernel, warnings: dict[str, set[str]] = compiled) -> list[str]:
        return list(faults([*GOOD, *kernels], warnings))

    def kernel(name: str, architecture: str, **instructions: int) -> Kernel:
        made = Kernel(name, architecture)
        made.instructions.update(instructions)
        return made

    assert found() == found(warnings={}) == []
    assert list(faults(GOOD[2:], {})) == ["sm80::prefill: the module has no such kernel"]
    assert list(faults(GOOD[:-1], {})) == ["sm80::decode: not for sm_90"]
    required = [*REQUIRED, "sm90::prefill"]
    assert list(faults(GOOD, {}, required)) == ["sm90::prefill: the module has no such kernel"]
    assert found(kernel("qwen_sparse::smxx::other()", "sm_80", LDL=3)) == []
    spilling = kernel("void qwen_sparse::sm80::select::kernel()", "sm_80", STL=3)
    assert found(spilling) == ["void qwen_sparse::sm80::select::kernel() (sm_80): 3 STL (local memory)"]
    assert found(kernel(HOPPER, "sm_90a", **both)) == []
    assert found(kernel(HOPPER, "sm_90a", UTMALDG=1)) == [f"{HOPPER} (sm_90a): no HGMMA"]
    assert found(kernel(HOPPER, "sm_90", UTMALDG=1)) == [f"{HOPPER} (sm_90): no HGMMA"]  # as some cuobjdump say
    assert found(kernel(HOPPER, "sm_90a", HGMMA=1)) == [f"{HOPPER} (sm_90a): no UTMALDG"]
    assert found(kernel(HOPPER, "sm_90a", LDL=1, **both)) == [f"{HOPPER} (sm_90a): 1 LDL (local memory)"]
    (absent,) = found(kernel(HOPPER, "sm_90a", **both), warnings={"sm80.dir/a.cu.o": set()})
    assert "the build log does not compile" in absent
    (warned,) = found(warnings={"sm90.dir/a.cu.o": {"C7508"}})
    assert warned == "sm90.dir/a.cu.o: ptxas warned of serialised wgmma (C7508)"


SOURCE = """
namespace qwen_sparse::sm80 {
namespace prefill {
template <int kSize> __global__ void attend(float* x, int n) {
  float copy[kSize];
  for (int i = 0; i < kSize; ++i) copy[i] = x[i];
  STATEMENT
  for (int i = 0; i < kSize; ++i) x[i] = copy[i];
}
template __global__ void attend<64>(float*, int);
}
namespace select {
namespace {
__global__ void score(float* x) { x[0] = 1; }
}
void run(float* x) { score<<<1, 1>>>(x); }
}
namespace select_groups { __global__ void share_kernel(float* x) { x[0] = 1; } }
namespace decode { __global__ void decode_kernel(float* x) { x[0] = 1; } }
}
"""


@pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("cuobjdump") is None, reason="needs nvcc and cuobjdump on the PATH"
)
def test_compiled_kernels(tmp_path: Path) -> None:
    def check(statement: str, *defines: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "kernels.cu").write_text(SOURCE.replace("STATEMENT", statement))
        codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in (80, 90)]
        flags = ["-std=c++17", *codes, "-c", "-o", tmp_path / "kernels.o"]
        subprocess.run(["nvcc", *flags, *defines, tmp_path / "kernels.cu"], check=True)
        (tmp_path / "log").touch()
        command = [sys.executable, BENCH / "check_sass.py", tmp_path / "kernels.o", "--build-log", tmp_path / "log"]
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))

    good = check("copy[5] = 1;")
    assert (good.returncode, good.stderr) == (0, "")
    assert [line.split() for line in good.stdout.splitlines()] == [
        [architecture, family, "1", "kernels"] for architecture in ARCHITECTURES for family in sorted(REQUIRED)
    ]
    spilling = check("for (int i = 0; i < n; ++i) copy[i % kSize] += x[i];")  # an array with an address
    assert spilling.returncode == 1
    assert "attend<64>" in spilling.stderr
    assert "LDL (local memory)" in spilling.stderr
    missing = check("", "-Dselect=choose")
    assert (missing.returncode, missing.stderr) == (1, "sm80::select: the module has no such kernel\n")
