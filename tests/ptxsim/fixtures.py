"""Fixtures of the simulator's own tests, and the skip of the marker ``ptxsim``."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from .build import BuildError, build_library, cache_directory, unavailable
from .testing import Sim, reset

KERNELS = Path(__file__).parent / "kernels"
OUT = cache_directory() / "lib"

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"sched": "random", "async_": "random", "seed": 1, "race": 1},
    {"sched": "random", "async_": "eager", "seed": 2},
    {"sched": "random", "preempt": 50, "seed": 3, "race": 1},
]
"""The ways every correct kernel is run: as is, and with adversarial schedules."""


def cutlass_include() -> Path | None:
    """CUTLASS headers: ``$QWEN_SPARSE_CUTLASS_DIR``, else those of the package nvidia-cutlass, if installed."""
    if "QWEN_SPARSE_CUTLASS_DIR" in os.environ:
        return Path(os.environ["QWEN_SPARSE_CUTLASS_DIR"])
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin).parent / "source/include" if spec and spec.origin else None


@functools.cache
def _build(name: str, arch: str, includes: tuple[Path, ...] = ()) -> Sim | BuildError:
    try:
        return Sim(build_library([KERNELS / f"{name}.cu"], arch, OUT, name=f"test_{name}", includes=includes))
    except BuildError as error:  # kept: a slow build that fails is not repeated for every test
        return error


def _kernels(name: str, arch: str, includes: tuple[Path, ...] = ()) -> Sim:
    sim = _build(name, arch, includes)
    if isinstance(sim, BuildError):
        pytest.fail(f"building {name}.cu failed: {sim}"[:3000], pytrace=False)
    reset()
    return sim


@pytest.fixture
def basic() -> Sim:
    return _kernels("basic", "80")


@pytest.fixture
def ampere() -> Sim:
    return _kernels("ampere", "80")


@pytest.fixture
def hopper() -> Sim:
    return _kernels("hopper", "90a")


@pytest.fixture
def cute() -> Sim:
    include = cutlass_include()
    if include is None:
        pytest.skip("no CUTLASS headers: neither QWEN_SPARSE_CUTLASS_DIR nor the package nvidia-cutlass")
    return _kernels("cute", "90a", (include,))


@pytest.fixture
def instructions() -> Sim:
    return _kernels("instructions", "80")


@pytest.fixture
def wrong() -> Sim:
    return _kernels("wrong", "80")


@pytest.fixture
def wrong_hopper() -> Sim:
    return _kernels("wrong_hopper", "90a")


def schedule_id(options: dict[str, Any]) -> str:
    return "-".join(f"{name.rstrip('_')}={value}" for name, value in options.items()) or "default"


@pytest.fixture(params=SCHEDULES, ids=schedule_id)
def schedule(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of one of the schedules."""
    return dict(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ptxsim") and (reason := unavailable()):
        pytest.skip(reason)
