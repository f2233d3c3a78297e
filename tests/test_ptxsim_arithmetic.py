"""Integer, float and warp instructions against numpy and torch."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.ptxsim

R = np.random.default_rng(0)
U = np.uint32


def f32(*s):
    return R.standard_normal(s).astype(np.float32)


def elementwise(function):
    """A function of Python integers, on arrays of objects."""
    return np.frompyfunc(function, function.__code__.co_argcount, 1)


def test_int_ops(basic):
    n = 999
    a, b, c = (R.integers(0, 2**32, n, dtype=np.uint64).astype(U) for _ in range(3))
    a[:4], b[:4], c[:4] = [0, 1, 0xFFFFFFFF, 0x80000000], [0, 0xFFFFFFFF, 1, 0x7FFFFFFF], [0, 31, 0x80000000, 5]
    o = np.zeros((40, n), U)
    basic.int_ops(a, b, c, o, n)
    x, y, z = (v.astype(object) for v in (a, b, c))
    M = 0xFFFFFFFF
    s = np.frompyfunc(lambda v: v - (1 << 32) if v >> 31 else v, 1, 1)
    trunc_mod = elementwise(lambda p, q: p - q * int(abs(p) // abs(q)) * (1 if (p < 0) == (q < 0) else -1))

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

    def signed_byte(v, i):
        return (v >> 8 * i & 255) - (256 if v >> 8 * i & 128 else 0)

    def dp4a(p, q, r):
        return r + sum(signed_byte(p, i) * signed_byte(q, i) for i in range(4))

    def lop3(p, q, r, table):
        return sum((table >> ((p >> i & 1) * 4 + (q >> i & 1) * 2 + (r >> i & 1)) & 1) << i for i in range(32))

    shift = np.minimum(y, 32)
    exp = [
        x + y,
        x * y,
        x * y >> 32,
        s(x) * s(y) >> 32,
        x // (y | 1),
        trunc_mod(s(x), s(y | 1)),
        elementwise(lambda v: bin(v).count("1"))(x),
        elementwise(lambda v: 32 - v.bit_length())(x),
        elementwise(lambda v: int(f"{v:032b}"[::-1], 2))(x),
        elementwise(lambda v: (v & -v).bit_length())(x),
        elementwise(lambda p, q, r: prmt(p, q, r & 0x7777))(x, y, z),
        elementwise(lambda p, q, r: (q << 32 | p) << (r & 31) >> 32)(x, y, z),
        elementwise(lambda p, q, r: (q << 32 | p) >> min(r, 32))(x, y, z),
        x << shift,
        x >> shift,
        s(x) >> shift,
        x * y + z,
        (s(x) * s(y) >> 32) + z,
        elementwise(lambda p, q, r: bfe(p, q, r, True))(x, y, z),
        elementwise(lambda p, q, r: bfe(p, q, r, False))(x, y, z),
        elementwise(lambda p, q, r: (q & ~(0xFF << (r & 31))) | ((p & 0xFF) << (r & 31)))(x, y, z),
        elementwise(lambda p, q, r: lop3(p, q, r, 0xD8))(x, y, z),
        z + elementwise(lambda p, q: p + q >> 32)(x, y),
        z + abs(x - y),
        elementwise(dp4a)(x, y, z),
        np.minimum(s(x), s(y)),
        np.maximum(x, y),
        elementwise(lambda v: max(-128, min(127, v)))(s(x)),
        elementwise(lambda p, q, r: (1 if p > q and r >> 31 else 0) + (2 if p <= q and r >> 31 else 0))(x, y, z),
        elementwise(lambda p, q, r: q if r >> 31 else p)(x, y, z),
        x * y + z >> 32,
        elementwise(lambda w: (w * w & (1 << 64) - 1) >> 40)(x * y + z),
        (x * y + z) // (z | 1),
    ]
    for k, e in enumerate(exp):
        e = np.array([int(v) & M for v in e], U)
        bad = np.flatnonzero(e != o[k])
        assert not len(bad), (
            f"op {k}: {len(bad)} differ, first a={a[bad[0]]:#x} b={b[bad[0]]:#x} c={c[bad[0]]:#x} "
            f"got {o[k][bad[0]]:#x} want {e[bad[0]]:#x}"
        )


def test_float_ops(basic):
    n = 999
    a, b, c = f32(n) * 3, f32(n) * 3, f32(n)
    o = np.zeros((50, n), np.float32)
    basic.float_ops(a, b, c, o, n)
    T = torch.from_numpy

    def bf(v):
        return T(v).bfloat16().float().numpy()

    def bits(t):
        return t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    def pack(high, low):
        return (high << 16 | low).view(np.float32)

    x64, y64 = a.astype(np.float64), b.astype(np.float64)

    def toward(v, up):  # directed rounding of an exact double
        r = v.astype(np.float32)
        if up:
            return np.where(r < v, np.nextafter(r, np.float32(np.inf)), r)
        return np.where(np.abs(r) > np.abs(v), np.nextafter(r, np.float32(0)), r)

    def fp8(v, t):
        return T(v).to(t).view(torch.uint8).numpy().astype(np.uint32)

    A, B, C = bf(a), bf(b), bf(c)
    exp = [
        a + b,
        a * b,
        (x64 * y64 + c).astype(np.float32),
        a / b,
        np.minimum(a, b),
        np.maximum(a, b),
        np.sqrt(abs(a)),
        np.exp2(a),
        np.exp(a),
        np.log2(abs(a) + 1),
        1 / np.sqrt(abs(b) + 1),
        np.tanh(a),
        toward(x64 + y64, False),
        toward(x64 * y64, True),
        np.trunc(a * 10),
        np.rint(a * 10),
        np.floor(a * 10),
        np.rint(a * np.float32(1e3)),
        np.trunc(abs(a) * np.float32(1e3)),
        np.clip(a, 0, 1),
        bf(a),
        a.astype(np.float16).astype(np.float32),
        pack(bits(T(a).bfloat16()), bits(T(b).bfloat16())),
        pack(bits(T(a).half()), bits(T(b).half())),
        (a.view(U) >> 16).astype(np.float32),
        ((a.view(U) + 0x1000) & 0xFFFFE000).view(np.float32),
        (fp8(a, torch.float8_e4m3fn) << 8 | fp8(b, torch.float8_e4m3fn)).astype(np.float32),
        (fp8(a, torch.float8_e5m2) << 8 | fp8(b, torch.float8_e5m2)).astype(np.float32),
        bf(A * C + A),
        bf(B * A + B),
        bf(A + C),
        np.maximum(B, A),
        (a.astype(np.float16) ** 2).astype(np.float32),
        (b.astype(np.float16) ** 2).astype(np.float32),
        np.exp2(a),
        np.log2(abs(a) + np.float32(0.5)),
        np.tanh(a),
        (x64 * y64 + 1).astype(np.float32),
    ]
    approx = {7, 8, 9, 10, 11, 34, 35, 36}
    for k, e in enumerate(exp):
        e = np.asarray(e, np.float32)
        if k in approx:
            np.testing.assert_allclose(o[k], e, rtol=3e-6, atol=1e-6, err_msg=f"op {k}")
        else:
            bad = np.flatnonzero(e.view(U) != o[k].view(U))
            assert not len(bad), (
                f"op {k}: {len(bad)} differ, first a={a[bad[0]]} b={b[bad[0]]} c={c[bad[0]]} "
                f"got {o[k][bad[0]]!r} want {e[bad[0]]!r}"
            )


def test_warp_ops(basic, schedule):
    basic.options(**schedule)
    x, o, lane = R.integers(0, 2**31, 32).astype(U), np.zeros((20, 32), U), np.arange(32)
    basic.warp_ops(x, o)

    def mask(c):
        return int((c.astype(object) << lane.astype(object)).sum())

    down = np.where(lane % 16 + 7 < 16, lane + 7, lane)
    exp = [
        x[5],
        x[np.where(lane >= 3, lane - 3, lane)],
        x[down],
        x[lane ^ 9],
        mask(x & 1),
        0,
        1,
        [mask(x % 4 == v) for v in x % 4],
        0xFFFFFFFF + 1 & 0xFFFFFFFF,
        int(x.astype(object).sum()) & 0xFFFFFFFF,
        x.min(),
        x.max(),
        np.bitwise_xor.reduce(x),
        np.where(lane & 1, x[3], x[4]),
        11,
        1,
        0xFFFFFFFF,
        lane == 0,
    ]
    for k, e in enumerate(exp):
        assert (o[k] == np.array(e).astype(np.uint64).astype(U)).all(), f"op {k}: {o[k]} {e}"
