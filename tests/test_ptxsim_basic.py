"""Small kernels: memory, atomics, barriers, device functions, and the reports of kernels that are wrong."""

import numpy as np
import pytest

from ptxsim.testing import Fault

pytestmark = pytest.mark.ptxsim

R = np.random.default_rng(0)
U = np.uint32


def f32(*s):
    return R.standard_normal(s).astype(np.float32)


def test_vecadd(basic, schedule):
    basic.options(**schedule)
    a, b, c = f32(1000), f32(1000), np.zeros(1000, np.float32)
    basic.vecadd(a, b, c, 1000)
    assert (c == a + b).all()


def test_reduce(basic, schedule):
    basic.options(**schedule)
    x, o = f32(5, 1000), np.zeros(5, np.float32)
    basic.reduce(x, o, 5, 1000)
    np.testing.assert_allclose(o, x.sum(1), atol=1e-3)


def test_transpose(basic, schedule):
    basic.options(**schedule)
    a, b = f32(96, 96), np.zeros((96, 96), np.float32)
    basic.transpose(a, b, 96, 1)
    assert (b == a.T).all()


def test_hist(basic, schedule):
    basic.options(**schedule)
    x = R.integers(0, 2**31, 3000).astype(U)
    h, f, m, tot = np.zeros(64, U), np.zeros(1, np.float32), np.zeros(1, np.uint64), np.zeros(1, U)
    basic.hist(x, h, f, m, 3000, tot)
    assert (h == np.bincount(x % 64, minlength=64)).all()
    assert f[0] == tot[0] == 3000
    assert m[0] == int(x.max()) << 20


def test_lock(basic, schedule):
    basic.options(**schedule)
    locked, v = np.zeros(1, np.int32), np.zeros(1, np.int32)
    basic.lock(locked, v)
    assert v[0] == 128


def test_named_barriers(basic, schedule):
    basic.options(**schedule)
    o = np.zeros((5, 32), np.int32)
    basic.named(o)
    assert (o == np.arange(5)[:, None] * 100 + np.arange(31, -1, -1)).all()


def test_reuse(basic, schedule):
    basic.options(**schedule)
    x, o = R.integers(0, 99, (4, 256)).astype(np.int32), np.zeros(256, np.int32)
    basic.reuse(x, o, 1)
    ref = np.zeros(256, np.int32)
    for r in range(4):
        ref = ref * 3 + x[r, ::-1]
    assert (o == ref).all()


def test_misc(basic):
    o, n = np.zeros(64, np.float32), 5
    basic.misc(o, n, 0)
    ref = []
    for t in range(64):
        loc = [np.float32(i * 0.5) for i in range(32)]
        for i in range(t % 7):
            v = loc[(t + i) % 32]
            loc[i * t % 32] += np.float32(sum(np.sin(np.float32(v * j)) for j in range(n)))
        r = loc[t % 32]
        ref.append([r + 1, r * 2, r - 3, -r, r * r][t % 5])
    np.testing.assert_allclose(o, ref, rtol=1e-4, atol=1e-4)


# ---- wrong kernels
def test_oob_store(basic):
    a, b, c = f32(1000), f32(1000), np.zeros(1000, np.float32)
    with pytest.raises(
        Fault,
        match=r"out-of-bounds global store of 4 bytes.*past the end of an allocation of 4000 bytes[\s\S]*st\.global",
    ):
        basic.vecadd_oob(a, b, c, 1000)


def test_missing_syncthreads(basic):
    a, b = f32(96, 96), np.zeros((96, 96), np.float32)
    with pytest.raises(Fault, match="shared memory never written"):
        basic.transpose(a, b, 96, 0)


def test_missing_syncthreads_race(basic):
    a, b = f32(96, 96), np.zeros((96, 96), np.float32)
    basic.options(race=1, uninit=0)
    with pytest.raises(Fault, match="race: "):
        basic.transpose(a, b, 96, 0)


def test_missing_second_barrier(basic):
    x, o = R.integers(0, 99, (4, 256)).astype(np.int32), np.zeros(256, np.int32)
    basic.options(race=1)
    with pytest.raises(Fault, match="race: "):
        basic.reuse(x, o, 0)


def test_missing_second_barrier_schedules(basic):
    """Without the race detector, random schedules show it as a wrong result."""
    x, o = R.integers(0, 99, (4, 256)).astype(np.int32), np.zeros(256, np.int32)
    ref = np.zeros(256, np.int32)
    for r in range(4):
        ref = ref * 3 + x[r, ::-1]
    wrong = 0
    for seed in range(4):
        basic.options(sched="random", seed=seed)
        basic.reuse(x, o, 0)
        wrong += not (o == ref).all()
    assert wrong


def test_deadlock(basic):
    with pytest.raises(
        Fault,
        match=r"deadlock[\s\S]*warp 0 lanes ffffffff: waiting at barrier 1[\s\S]*"
        r"warp 1 lanes ffffffff: waiting at barrier 2[\s\S]*32 of 64 threads arrived",
    ):
        basic.deadlock(np.zeros(64, np.int32))
