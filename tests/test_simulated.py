"""CUDA kernels in the simulator beyond the op tests: adversarial schedules, and index values nobody has checked.

The op tests run them in the simulator's default mode (fixture ``kernels``). Here every op gives the same bits whatever
the order of threads and the moment at which asynchronous copies land, without a race; and lists, tables, lengths and
slots full of nonsense, which are not checked on a GPU since that would stop the host, never lead outside of a tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import simulated
from ptxsim import testing
from ptxsim.fixtures import SCHEDULES
from qwen_sparse.testing import random_indexes, random_qkv

pytestmark = pytest.mark.ptxsim

CHUNK_LEN = 192
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def nonsense(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Small numbers, -1, and the largest and smallest of the type, in no order."""
    information = torch.iinfo(dtype)
    extremes = torch.tensor([-1, 0, information.min, information.max, information.max - 63, 10**9], dtype=dtype)
    small = torch.randint(-200, 400, shape, generator=GENERATOR, dtype=dtype)
    chosen = extremes[torch.randint(len(extremes), shape, generator=GENERATOR)]
    return torch.where(torch.rand(shape, generator=GENERATOR) < 0.5, small, chosen)


def inv_freq(head_dim: int) -> Tensor:
    return 1e6 ** (-torch.arange(0, head_dim, 2).double() / head_dim)


q, k, v = random_qkv(150, 450, 4, 2, 64, torch.bfloat16)
q_succ, q_inter = torch.roll(q, 1, 0), torch.roll(q, 2, 0)
INT8_PAGES = [torch.randint(-127, 128, (5, 48, 2, 64), generator=GENERATOR, dtype=torch.int8) for _ in range(2)]
SCALES = [torch.rand(5, 48, 2, generator=GENERATOR) for _ in range(2)]
BIAS = 100 * normal(2, 64)
DECODE_Q = [normal(2, 2, 4, 64).bfloat16() for _ in range(3)]


def attention(columns: Tensor, slashes: Tensor) -> Callable[[Any], Any]:
    return lambda ops: ops.dual_chunk_attention(q, q_succ, q_inter, k, v, CHUNK_LEN, columns, slashes, None, 0.125)


def group_attention(block_groups: Tensor) -> Callable[[Any], Any]:
    return lambda ops: ops.dual_chunk_attention(q, q_succ, q_inter, k, v, CHUNK_LEN, None, None, block_groups, 0.125)


def decode(table: Tensor, lengths: Tensor) -> Callable[[Any], Any]:
    return lambda ops: ops.decode_attention(
        DECODE_Q[0],
        *INT8_PAGES,
        table,
        lengths,
        *SCALES,
        BIAS,
        inv_freq(64),
        1.0,
        *DECODE_Q[1:],
        CHUNK_LEN,
        0.125,
        torch.tensor([1.25, -0.5]),
        None,
    )


def gather(table: Tensor) -> Callable[[Any], Any]:
    def run(ops: Any) -> tuple[Tensor, Tensor]:
        out = torch.zeros(200, 2, 64).bfloat16(), torch.zeros(200, 2, 64).bfloat16()
        ops.gather_kv(*INT8_PAGES, table, *SCALES, BIAS, inv_freq(64), 1.0, CHUNK_LEN, *out)
        return out

    return run


def store(slots: Tensor) -> Callable[[Any], Any]:
    def run(ops: Any) -> tuple[Tensor, ...]:
        caches = [x.clone() for x in (*INT8_PAGES, *SCALES)]
        positions = torch.arange(150) % CHUNK_LEN
        ops.store_kv(k[:150], v[:150], *caches[:2], slots, *caches[2:], BIAS, positions, inv_freq(64), 1.0)
        return tuple(caches)

    return run


def rotary(ops: Any) -> Any:
    return ops.rotary_dual_chunk(q, k[:150], torch.arange(300, 450), inv_freq(64), 1.0, 256, CHUNK_LEN, 64)


def select(ops: Any) -> Any:
    return ops.select_vertical_slash(q, k, [60, 0, 450, 31], [130, 100, 0, 450], 64, 0.125, q_succ, q_inter, CHUNK_LEN)


def select_groups(ops: Any) -> Any:
    thresholds = torch.tensor([[0.0, 1e-3, 2e-3, 3e-3]]).repeat(4, 1)
    return ops.select_block_groups(q, k, thresholds, 0.125, q_succ, q_inter, CHUNK_LEN)


WIDE = random_qkv(70, 150, 4, 2, 128, torch.bfloat16)
WIDE_PAGES = [normal(5, 48, 2, 128).bfloat16() for _ in range(2)]
WIDE_INT8_PAGES = [torch.randint(-127, 128, (5, 48, 2, 128), generator=GENERATOR, dtype=torch.int8) for _ in range(2)]
LENGTH = torch.tensor([200], dtype=torch.int32)
TABLE = torch.tensor([[3, 1, 0, 4, 2], [2, 4, 1, 3, 0]], dtype=torch.int32)
CALLS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda ops: ops.attention(q, k, v, 0.125, True, 100),
    "dense dual-chunk": lambda ops: ops.dual_chunk_attention(
        q, q_succ, q_inter, k, v, CHUNK_LEN, None, None, None, 0.125
    ),
    # with more shared memory than a kernel has unasked
    "dense, 128 channels": lambda ops: ops.attention(*WIDE, 0.1, True, None),
    "decode, 128 channels": lambda ops: ops.decode_attention(
        *(WIDE[0][None, :2], *WIDE_PAGES, TABLE[:1], LENGTH),
        *(None, None, None, None, 1.0, None, None, None, 0.1, None, None),
    ),
    "decode, int8, 128 channels": lambda ops: ops.decode_attention(
        *(WIDE[0][None, :2], *WIDE_INT8_PAGES, TABLE[:1], LENGTH),
        *(*SCALES, 100 * WIDE[1][0].float(), inv_freq(128), 1.0, None, None, None, 0.1, None, 150),
    ),
    "sparse dual-chunk": attention(random_indexes(4, 450, [70, 0, 9, 200]), random_indexes(4, 450, [20, 4, 0, 90])),
    # Slashes that cover the columns for every other block: of two blocks that share tiles, only one attends most.
    "sparse by turns": attention(
        torch.tensor([j for j in range(450) if j % 128 < 64], dtype=torch.int32).expand(4, -1).contiguous(),
        torch.arange(0, 450, 128, dtype=torch.int32).expand(4, -1).contiguous(),
    ),
    "block groups": group_attention(torch.randint(2**29, (4, 4, 1), generator=GENERATOR, dtype=torch.int32)),
    "block groups, 128 channels": lambda ops: ops.block_group_attention(
        *WIDE, torch.randint(2**10, (4, 2, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32), 0.1
    ),
    "select": select,
    "select groups": select_groups,
    "rotary": rotary,
    "store": store(torch.randperm(240, generator=GENERATOR)[:150]),
    "gather": gather(TABLE[0]),
    "decode": decode(TABLE, torch.tensor([233, 70], dtype=torch.int32)),
}
UNCHECKED: dict[str, Callable[[Any], Any]] = {
    "attention": attention(nonsense(4, 90), nonsense(4, 90)),
    "block groups": group_attention(nonsense(4, 4, 1)),
    "attention with unsorted lists": attention(
        torch.randint(450, (4, 90), generator=GENERATOR, dtype=torch.int32),
        torch.randint(450, (4, 90), generator=GENERATOR, dtype=torch.int32),
    ),
    "decode": decode(nonsense(2, 5), torch.tensor([233, 70], dtype=torch.int32)),
    "decode with wrong lengths": decode(TABLE, torch.tensor([2**31 - 1, -5], dtype=torch.int32)),
    "gather": gather(nonsense(5)),
    "store": store(nonsense(150, dtype=torch.int64)),
}


@pytest.fixture(scope="module")
def simulated_ops() -> Any:
    return simulated.load()


@pytest.fixture(autouse=True, params=simulated.archs(), ids="sm{}".format)
def arch(request: pytest.FixtureRequest, simulated_ops: Any) -> Iterator[int]:
    simulated.reset()
    simulated.options(arch=request.param, sms=3)  # so few that persistent CTAs take several work items
    yield request.param
    simulated.reset()


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", CALLS)
def test_schedules_change_nothing(name: str, simulated_ops: Any) -> None:
    expected = flat(CALLS[name](simulated_ops))
    for schedule in SCHEDULES[1:]:
        simulated.options(**schedule)
        for ours, theirs in zip(flat(CALLS[name](simulated_ops)), expected, strict=True):
            assert torch.equal(ours, theirs), schedule


@pytest.mark.parametrize("name", CALLS)
def test_another_device_than_the_current_one(name: str, simulated_ops: Any) -> None:
    """Kernels go to the tensors' device, whose attributes no earlier call has set; the current one stays."""
    expected = flat(CALLS[name](simulated_ops))
    simulated.options(devices=2)
    before = [testing.launches(device) for device in range(2)]
    simulated.pose(1)
    try:
        results = flat(CALLS[name](simulated_ops))
    finally:
        simulated.pose(0)
    launched = [testing.launches(device) - count for device, count in enumerate(before)]
    assert launched[0] == 0 < launched[1]
    current = ctypes.c_int(-1)
    testing.runtime().cudaGetDevice(ctypes.byref(current))
    assert current.value == 0
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", UNCHECKED)
def test_unchecked_values_stay_inside(name: str, simulated_ops: Any) -> None:
    """The simulator faults on any access outside of the tensors."""
    UNCHECKED[name](simulated_ops)
