"""Wrong kernels: each is reported in the default mode, with the source line of the mistake."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptxsim.fixtures import KERNELS
from ptxsim.testing import Fault, Sim

pytestmark = pytest.mark.ptxsim


def marked_lines(file: str, name: str) -> set[int]:
    lines = enumerate((KERNELS / file).read_text().splitlines(), 1)
    return {number for number, line in lines if line.endswith(f"// FAULT {name}")}


def reported_lines(file: str, fault: Fault) -> set[int]:
    return {int(number) for number in re.findall(rf"{re.escape(file)}:(\d+)", str(fault))}


def check(sim: Sim, file: str, name: str, message: str) -> None:
    with pytest.raises(Fault, match=message) as fault:
        getattr(sim, f"run_{name}")(np.arange(64, dtype=np.int32), np.zeros(64, np.int32))
    assert reported_lines(file, fault.value) & marked_lines(file, name), str(fault.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("store_out_of_bounds", r"out-of-bounds global store of 4 bytes.*0 bytes past the end of an allocation of 256"),
        ("load_misaligned", r"misaligned load of 4 bytes"),
        ("shared_out_of_bounds", r"out-of-bounds shared store of 4 bytes"),
        ("shared_unwritten", r"read of shared memory never written"),
        ("missing_barrier", r"read of shared memory never written"),
        ("missing_copy_wait", r"read of shared memory that an asynchronous copy still writes"),
        ("missing_second_wait", r"read of shared memory that an asynchronous copy still writes"),
        ("store_under_copy", r"write of shared memory that an asynchronous copy still writes"),
        ("deadlock", r"deadlock[\s\S]*32 of 64 threads arrived"),
        ("lane_outside_mask", r"shfl.sync: executing lane 0 is not in the member mask 0x0000ff00"),
        ("diverged_ldmatrix", r"deadlock|ldmatrix with inactive lanes"),
    ],
)
def test_ampere(wrong: Sim, name: str, message: str) -> None:
    check(wrong, "wrong.cu", name, message)


@pytest.mark.parametrize("name", ["load_out_of_bounds", "copy_out_of_bounds"])
def test_loads_beyond_an_array(wrong: Sim, name: str) -> None:
    with pytest.raises(Fault, match=r"out-of-bounds (global load|cp\.async source)") as fault:
        getattr(wrong, f"run_{name}")(np.zeros(32, np.int32), np.zeros(64, np.int32))
    assert reported_lines("wrong.cu", fault.value) & marked_lines("wrong.cu", name), str(fault.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_expect_tx", r"read of shared memory that an asynchronous copy still writes"),
        ("missing_arrive", r"deadlock[\s\S]*waiting on mbarrier[\s\S]*1 of 2 arrivals pending"),
        ("missing_wgmma_wait", r"read of a wgmma result that has not been waited for"),
    ],
)
def test_hopper(wrong_hopper: Sim, name: str, message: str) -> None:
    check(wrong_hopper, "wrong_hopper.cu", name, message)


def test_buffer_refilled_while_others_read(wrong_hopper: Sim) -> None:
    """Seen when the thread that refills is ahead of another; random schedules do that."""
    faults = []
    for seed in range(4):
        wrong_hopper.options(sched="random", seed=seed)
        try:
            wrong_hopper.run_refill_under_read(np.arange(64, dtype=np.int32), np.zeros(64, np.int32))
        except Fault as fault:
            faults.append(fault)
    assert faults
    assert all("that an asynchronous copy still writes" in str(fault) for fault in faults)
    marked = marked_lines("wrong_hopper.cu", "refill_under_read")
    assert all(reported_lines("wrong_hopper.cu", fault) & marked for fault in faults)


def test_a_barrier_that_is_missing_is_a_race_in_any_order(wrong: Sim) -> None:
    wrong.options(race=1, uninit=0)
    with pytest.raises(Fault, match=r"race: (read|write) of shared offset"):
        wrong.run_missing_barrier(np.zeros(64, np.int32), np.zeros(64, np.int32))


def test_results_after_a_fault(wrong: Sim) -> None:
    """A fault ends its launch only."""
    for _ in range(2):
        check(wrong, "wrong.cu", "shared_unwritten", "never written")
