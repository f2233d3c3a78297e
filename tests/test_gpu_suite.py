"""The script for machines with a GPU, with programs that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0")|arch=$QWEN_SPARSE_CUDA_ARCH|$(printf '%s|' "$@")" >> "$CALLS"
case "$(basename "$0") $*" in
  compute-sanitizer*) while [[ $1 != "$PYTHON" ]]; do shift; done; "$@" ;;
  *get_device_capability*) exit "$NOT_HOPPER" ;;
  *build_info*) echo "$ARCHS" ;;
  *pytest*) echo "$PYTEST_SAYS"; exit "${PYTEST_STATUS:-0}" ;;
  *bench_selection*) exec sleep 60 ;;
esac
"""


class Suite:
    """The script in a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.calls = path, path / "calls"
        (path / "bench").mkdir()
        shutil.copy(ROOT / "bench" / "gpu_suite.sh", path / "bench")
        for name in ("python3", "compute-sanitizer"):
            (path / name).write_text(PROGRAM)
            (path / name).chmod(0o755)

    def run(self, *steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
        programs = {"PATH": f"{self.path}:{os.environ['PATH']}", "PYTHON": f"{self.path}/python3"}
        said = {
            "CALLS": str(self.calls),
            "NOT_HOPPER": "0",
            "ARCHS": "['sm80', 'sm90']",
            "PYTEST_SAYS": "3 passed in 1s",
        }
        return subprocess.run(
            ["bash", str(self.path / "bench" / "gpu_suite.sh"), *steps],
            env={**os.environ, **programs, **said, **variables},
            capture_output=True,
            text=True,
        )

    def called(self, word: str) -> list[list[str]]:
        """Calls with this word: the program, what QWEN_SPARSE_CUDA_ARCH was, the arguments."""
        return [line.split("|")[:-1] for line in self.calls.read_text().splitlines() if word in line]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_a_build_without_kernels_for_the_gpu_fails(suite: Suite) -> None:
    assert suite.run("build").returncode == 0
    without = suite.run("build", ARCHS="['sm80']")
    assert without.returncode == 1
    assert "no kernels for this Hopper GPU" in without.stdout
    assert suite.run("build", ARCHS="['sm80']", NOT_HOPPER="1").returncode == 0


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake on the PATH")
@pytest.mark.parametrize(
    ("include", "message"),
    [
        ("cutlass/include", "must be an absolute path, got 'cutlass/include'"),
        ("/nowhere", "no cutlass/version.h under"),
    ],
)
def test_a_wrong_cutlass_directory_is_refused(include: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nproject(some NONE)\ninclude({ROOT}/cmake/cutlass.cmake)\n"
    )
    done = subprocess.run(
        ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")],
        env={**os.environ, "QWEN_SPARSE_CUTLASS_DIR": include},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())


def test_hopper_runs_both_prefill_kernels(suite: Suite) -> None:
    assert suite.run("run_tests", NOT_HOPPER="1").returncode == 0
    (everything,) = suite.called("pytest")
    assert {"arch=", "tests", "--continue-on-collection-errors"} <= set(everything)
    assert suite.run("run_tests").returncode == 0
    *_, ampere = suite.called("pytest")
    assert len(suite.called("pytest")) == 3
    assert {"arch=sm80", "tests/test_attention.py"} <= set(ampere)
    assert suite.run("run_tests", PYTEST_STATUS="1").returncode == 1


@pytest.mark.parametrize(
    ("said", "passes"),
    [("9 passed in 3s", True), ("9 skipped in 3s", False), ("7 passed, 2 skipped in 3s", False), ("nothing", False)],
)
def test_memory_is_not_checked_by_skipped_cases(suite: Suite, said: str, passes: bool) -> None:
    assert (suite.run("check_memory", PYTEST_SAYS=said).returncode == 0) == passes
    assert len(suite.called("compute-sanitizer")) == (3 if passes else 1)
    assert suite.run("check_memory", PYTEST_SAYS=said, PYTEST_STATUS="9").returncode == 1


def test_memory_is_checked_in_every_family_of_kernels(suite: Suite) -> None:
    suite.run("check_memory")
    arguments = suite.called("python3")[-1][2:]
    command = [sys.executable, *arguments, "--collect-only"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    cases = [line for line in done.stdout.splitlines() if "::" in line]
    families = ("attention.py::test_dense", "attention.py::test_vertical_slash", "attention.py::test_dual_chunk")
    families += ("block_groups", "decode", "gather", "rotary", "select", "store")
    for family in families:
        assert any(case.startswith(f"tests/test_{family}") for case in cases), family
    # Prefill has no kernels of float32 on a GPU: such cases are skipped.
    assert not any("float32" in case or "torch.float16" in case for case in cases)
    assert len(cases) < 40


def test_time_in_all_is_kept(suite: Suite) -> None:
    done = suite.run("bench_selection", "run_tests", SECONDS_IN_ALL="2")
    assert done.returncode == 1
    assert "failed: bench_selection run_tests" in done.stdout
    assert done.stdout.count("not begun") == 1
    assert suite.called("pytest") == []


def test_every_step_is_run(suite: Suite) -> None:
    done = suite.run(SECONDS_PER_STEP="1")
    assert done.stdout.splitlines()[-1] == "failed: bench_selection"  # it was stopped
    scripts = {Path(call[2]).name for call in suite.called("bench/")}
    assert {"check_sass.py", "bench_million.py", "bench_serve.py"} <= scripts
    assert all((ROOT / "bench" / name).is_file() for name in scripts)
