"""Integer, float and warp instructions, barriers, and the reports of kernels that are wrong."""

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
    assert (h == np.bincount(x % 64, minlength=64)).all() and f[0] == 3000 and m[0] == int(x.max()) << 20 and tot[0] == 3000


def test_lock(basic, schedule):
    basic.options(**schedule)
    l, v = np.zeros(1, np.int32), np.zeros(1, np.int32)
    basic.lock(l, v)
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


def test_int_ops(basic):
    n = 999
    a, b, c = (R.integers(0, 2**32, n, dtype=np.uint64).astype(U) for _ in range(3))
    a[:4], b[:4], c[:4] = [0, 1, 0xffffffff, 0x80000000], [0, 0xffffffff, 1, 0x7fffffff], [0, 31, 0x80000000, 5]
    o = np.zeros((40, n), U)
    basic.int_ops(a, b, c, o, n)
    x, y, z = (v.astype(object) for v in (a, b, c))
    M = 0xffffffff
    s = np.frompyfunc(lambda v: v - (1 << 32) if v >> 31 else v, 1, 1)
    F = lambda f: np.frompyfunc(f, len(f.__code__.co_varnames), 1)
    trunc_mod = F(lambda p, q: p - q * int(abs(p) // abs(q)) * (1 if (p < 0) == (q < 0) else -1))

    def prmt(p, q, r):
        v = p | q << 32
        by = [(v >> 8 * (r >> 4 * i & 7)) & 255 for i in range(4)]
        by = [(255 if b_ & 128 else 0) if r >> 4 * i & 8 else b_ for i, b_ in enumerate(by)]
        return sum(b_ << 8 * i for i, b_ in enumerate(by))

    def bfe(p, pos, ln, signed):
        pos, ln = pos & 31, ln & 31
        if not ln:
            return 0
        v = p >> pos & (1 << ln) - 1
        bit = p >> min(pos + ln - 1, 31) & 1
        if signed and bit:
            v |= M << min(ln, 32 - pos) & M
        return v

    def dp4a(p, q, r):
        sb = lambda v, i: (v >> 8 * i & 255) - (256 if v >> 8 * i & 128 else 0)
        return r + sum(sb(p, i) * sb(q, i) for i in range(4))
    shift = np.minimum(y, 32)
    exp = [x + y, x * y, x * y >> 32, s(x) * s(y) >> 32, x // (y | 1), trunc_mod(s(x), s(y | 1)), F(lambda v: bin(v).count('1'))(x),
           F(lambda v: 32 - v.bit_length())(x), F(lambda v: int(f'{v:032b}'[::-1], 2))(x), F(lambda v: (v & -v).bit_length())(x),
           F(lambda p, q, r: prmt(p, q, r & 0x7777))(x, y, z), F(lambda p, q, r: (q << 32 | p) << (r & 31) >> 32)(x, y, z), F(lambda p, q, r: (q << 32 | p) >> min(r, 32))(x, y, z),
           x << shift, x >> shift, s(x) >> shift, x * y + z, (s(x) * s(y) >> 32) + z,
           F(lambda p, q, r: bfe(p, q, r, True))(x, y, z), F(lambda p, q, r: bfe(p, q, r, False))(x, y, z),
           F(lambda p, q, r: (q & ~(0xff << (r & 31))) | ((p & 0xff) << (r & 31)))(x, y, z),
           F(lambda p, q, r: (p & ~r) | (q & r) if False else sum(((0xd8 >> ((p >> i & 1) * 4 + (q >> i & 1) * 2 + (r >> i & 1))) & 1) << i for i in range(32)))(x, y, z),
           z + F(lambda p, q: p + q >> 32)(x, y), z + abs(x - y), F(dp4a)(x, y, z), F(min)(s(x), s(y)) if False else np.minimum(s(x), s(y)), np.maximum(x, y),
           F(lambda v: max(-128, min(127, v)))(s(x)), F(lambda p, q, r: (1 if p > q and r >> 31 else 0) + (2 if p <= q and r >> 31 else 0))(x, y, z),
           F(lambda p, q, r: q if r >> 31 else p)(x, y, z), x * y + z >> 32, F(lambda w: (w * w & (1 << 64) - 1) >> 40)(x * y + z), (x * y + z) // (z | 1)]
    for k, e in enumerate(exp):
        e = np.array([int(v) & M for v in e], U)
        bad = np.flatnonzero(e != o[k])
        assert not len(bad), f'op {k}: {len(bad)} differ, first a={a[bad[0]]:#x} b={b[bad[0]]:#x} c={c[bad[0]]:#x} got {o[k][bad[0]]:#x} want {e[bad[0]]:#x}'


def test_float_ops(basic):
    import torch
    n = 999
    a, b, c = f32(n) * 3, f32(n) * 3, f32(n)
    o = np.zeros((50, n), np.float32)
    basic.float_ops(a, b, c, o, n)
    T = torch.from_numpy
    bf = lambda v: T(v).bfloat16().float().numpy()
    bits = lambda t: t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    pack = lambda hi, lo: (hi << 16 | lo).view(np.float32)
    x64, y64 = a.astype(np.float64), b.astype(np.float64)

    def toward(v, up):  # directed rounding of an exact double
        r = v.astype(np.float32)
        if up:
            return np.where(r < v, np.nextafter(r, np.float32(np.inf)), r)
        return np.where(np.abs(r) > np.abs(v), np.nextafter(r, np.float32(0)), r)
    fp8 = lambda v, t: T(v).to(t).view(torch.uint8).numpy().astype(np.uint32)
    A, B, C = bf(a), bf(b), bf(c)
    exp = [a + b, a * b, (x64 * y64 + c).astype(np.float32), a / b, np.minimum(a, b), np.maximum(a, b), np.sqrt(abs(a)), np.exp2(a), np.exp(a), np.log2(abs(a) + 1), 1 / np.sqrt(abs(b) + 1), np.tanh(a),
           toward(x64 + y64, False), toward(x64 * y64, True), np.trunc(a * 10), np.rint(a * 10), np.floor(a * 10), np.rint(a * np.float32(1e3)), np.trunc(abs(a) * np.float32(1e3)), np.clip(a, 0, 1),
           bf(a), a.astype(np.float16).astype(np.float32), pack(bits(T(a).bfloat16()), bits(T(b).bfloat16())), pack(bits(T(a).half()), bits(T(b).half())),
           (a.view(U) >> 16).astype(np.float32), ((a.view(U) + 0x1000) & 0xffffe000).view(np.float32),
           (fp8(a, torch.float8_e4m3fn) << 8 | fp8(b, torch.float8_e4m3fn)).astype(np.float32), (fp8(a, torch.float8_e5m2) << 8 | fp8(b, torch.float8_e5m2)).astype(np.float32),
           bf(A * C + A), bf(B * A + B), bf(A + C), np.maximum(B, A), (a.astype(np.float16) ** 2).astype(np.float32), (b.astype(np.float16) ** 2).astype(np.float32),
           np.exp2(a), np.log2(abs(a) + np.float32(.5)), np.tanh(a), (x64 * y64 + 1).astype(np.float32)]
    approx = {7, 8, 9, 10, 11, 34, 35, 36}
    for k, e in enumerate(exp):
        e = np.asarray(e, np.float32)
        if k in approx:
            np.testing.assert_allclose(o[k], e, rtol=3e-6, atol=1e-6, err_msg=f'op {k}')
        else:
            bad = np.flatnonzero(e.view(U) != o[k].view(U))
            assert not len(bad), f'op {k}: {len(bad)} differ, first a={a[bad[0]]} b={b[bad[0]]} c={c[bad[0]]} got {o[k][bad[0]]!r} want {e[bad[0]]!r}'


def test_warp_ops(basic, schedule):
    basic.options(**schedule)
    x, o, l = R.integers(0, 2**31, 32).astype(U), np.zeros((20, 32), U), np.arange(32)
    basic.warp_ops(x, o)
    mask = lambda c: int((c.astype(object) << l.astype(object)).sum())
    down = np.where(l % 16 + 7 < 16, l + 7, l)
    exp = [x[5], x[np.where(l >= 3, l - 3, l)], x[down], x[l ^ 9], mask(x & 1), 0, 1, [mask(x % 4 == v) for v in x % 4], 0xffffffff + 1 & 0xffffffff, int(x.astype(object).sum()) & 0xffffffff,
           x.min(), x.max(), np.bitwise_xor.reduce(x), np.where(l & 1, x[3], x[4]), 11, 1, 0xffffffff, l == 0]
    for k, e in enumerate(exp):
        assert (o[k] == np.array(e).astype(np.uint64).astype(U)).all(), f'op {k}: {o[k]} {e}'


def test_misc(basic):
    o, n = np.zeros(64, np.float32), 5
    basic.misc(o, n, 0)
    ref = []
    for t in range(64):
        loc = [np.float32(i * .5) for i in range(32)]
        for i in range(t % 7):
            v = loc[(t + i) % 32]
            loc[i * t % 32] += np.float32(sum(np.sin(np.float32(v * j)) for j in range(n)))
        r = loc[t % 32]
        ref.append([r + 1, r * 2, r - 3, -r, r * r][t % 5])
    np.testing.assert_allclose(o, ref, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- wrong kernels must be caught
def test_oob_store(basic):
    a, b, c = f32(1000), f32(1000), np.zeros(1000, np.float32)
    with pytest.raises(Fault, match=r'out-of-bounds global store of 4 bytes.*past the end of an allocation of 4000 bytes[\s\S]*st\.global'):
        basic.vecadd_oob(a, b, c, 1000)


def test_missing_syncthreads(basic):
    a, b = f32(96, 96), np.zeros((96, 96), np.float32)
    with pytest.raises(Fault, match='shared memory never written'):
        basic.transpose(a, b, 96, 0)


def test_missing_syncthreads_race(basic):
    a, b = f32(96, 96), np.zeros((96, 96), np.float32)
    basic.options(race=1, uninit=0)
    with pytest.raises(Fault, match='race: '):
        basic.transpose(a, b, 96, 0)


def test_missing_second_barrier(basic):
    x, o = R.integers(0, 99, (4, 256)).astype(np.int32), np.zeros(256, np.int32)
    basic.options(race=1)
    with pytest.raises(Fault, match='race: '):
        basic.reuse(x, o, 0)


def test_missing_second_barrier_schedules(basic):
    """Without the race detector, random schedules show it as a wrong result."""
    x, o = R.integers(0, 99, (4, 256)).astype(np.int32), np.zeros(256, np.int32)
    ref = np.zeros(256, np.int32)
    for r in range(4):
        ref = ref * 3 + x[r, ::-1]
    wrong = 0
    for seed in range(4):
        basic.options(sched='random', seed=seed)
        basic.reuse(x, o, 0)
        wrong += not (o == ref).all()
    assert wrong


def test_deadlock(basic):
    with pytest.raises(Fault, match=r'deadlock[\s\S]*warp 0 lanes ffffffff: waiting at barrier 1[\s\S]*warp 1 lanes ffffffff: waiting at barrier 2[\s\S]*32 of 64 threads arrived'):
        basic.deadlock(np.zeros(64, np.int32))
