"""An unmodified CUTLASS 3 GEMM in several schedules."""

import os
import re
import subprocess

import pytest

from ptxsim.build import build_program
from ptxsim.fixtures import KERNELS, OUT, cutlass_include

pytestmark = pytest.mark.ptxsim

ENVIRONMENTS = [
    {},
    {"SCHED": "random", "ASYNC": "random", "SEED": "1", "RACE": "1"},
    {"SCHED": "random", "ASYNC": "eager", "SEED": "2"},
    {"SCHED": "random", "PREEMPT": "20", "RACE": "1", "SEED": "5"},
]


@pytest.mark.skipif("PTXSIM_SLOW" not in os.environ, reason="a minute of nvcc: set PTXSIM_SLOW=1")
@pytest.mark.skipif(cutlass_include() is None, reason="no CUTLASS headers")
def test_cutlass_gemm():
    program = build_program(KERNELS / "cutlass_gemm.cu", "90a", OUT, includes=[cutlass_include()])
    for variables in ENVIRONMENTS:
        env = {**os.environ, **{f"PTXSIM_{name}": value for name, value in variables.items()}}
        result = subprocess.run([program], capture_output=True, text=True, env=env, timeout=120)
        errors = re.findall(r"rc 0 max rel err (\S+)", result.stdout)
        assert len(errors) == 2, (variables, result.stdout, result.stderr)
        assert all(float(error) < 5e-3 for error in errors), (variables, result.stdout)
