"""Instructions by family against definitions of their own: copies, atomics, 64 bits, conversions, matrix fragments."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ptxsim import testing
from ptxsim.testing import Fault, Sim

pytestmark = pytest.mark.ptxsim

MASK64 = (1 << 64) - 1


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- copies
@pytest.mark.parametrize("valid", [0, 4, 8, 12, 16])
def test_cp_async_sizes_and_zero_fill(instructions: Sim, schedule: dict[str, Any], valid: int) -> None:
    instructions.options(**schedule)
    data = rng().integers(1, 256, 512).astype(np.uint8)
    out = np.zeros((4, 512), np.uint8)
    instructions.cp_async_sizes(data, out, valid)
    for row, size in enumerate((4, 8, 16)):
        copied = data[: 32 * size].reshape(32, size).copy()
        copied[:, min(valid, size) :] = 0
        assert (out[row, : 32 * size] == copied.reshape(-1)).all(), f"{size} bytes"
    ignored = data.reshape(32, 16).copy()
    ignored[1::2] = 0
    assert (out[3] == ignored.reshape(-1)).all()


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_cp_async_groups(instructions: Sim, schedule: dict[str, Any], pending: int) -> None:
    instructions.options(**schedule)
    data = rng().integers(0, 99, (4, 32, 4)).astype(np.int32)
    out = np.zeros_like(data)
    instructions.cp_async_groups(data, out, pending, 0)
    assert (out[: 4 - pending] == data[: 4 - pending, ::-1]).all()


@pytest.mark.parametrize("pending", [1, 2])
def test_cp_async_group_that_is_not_waited_for(instructions: Sim, pending: int) -> None:
    data = np.ones((4, 32, 4), np.int32)
    with pytest.raises(Fault, match="that an asynchronous copy still writes"):
        instructions.cp_async_groups(data, np.zeros_like(data), pending, 1)


def test_cache_hints(instructions: Sim, schedule: dict[str, Any]) -> None:
    instructions.options(**schedule)
    data = rng().standard_normal((3, 32, 4)).astype(np.float32)
    out = np.zeros((2, 32, 4), np.float32)
    instructions.cache_hints(data, out)
    assert (out[0] == data[0] + data[1]).all()
    assert (out[1] == data[2]).all()


# ---- atomics
def test_atomics(instructions: Sim, schedule: dict[str, Any]) -> None:
    instructions.options(**schedule)
    values = rng().integers(0, 1 << 63, 128).astype(np.uint64)
    start = [5, 1 << 62, 7, MASK64, 9, 11, 13, 15, 3, 2]
    words = np.array([value & 0xFFFFFFFF for value in [*start, *start]], np.uint32)
    longs = np.array(start[:8] * 2, np.uint64)
    single, double, pair = np.zeros(2, np.float32), np.zeros(1), np.zeros(2, np.uint16)
    instructions.atomics(values, words, longs, single, double, pair)

    def expected(bits: int) -> list[int]:
        mask = (1 << bits) - 1
        v = [int(value) & mask for value in values]
        s = [value & mask for value in start]
        conjunction, disjunction, parity = s[3], s[4], s[5]
        for value in v:
            conjunction, disjunction, parity = conjunction & value, disjunction | value, parity ^ value
        sums = [(s[0] + sum(v)) & mask, min(s[1], *v), max(s[2], *v), conjunction, disjunction, parity]
        return [*sums, (s[6] + sum(v)) & mask, s[7] + 1]

    increments = [(3 + 128) % 101, (2 - 128) % 101]
    assert list(words[:10]) == list(words[10:]) == expected(32) + increments
    assert list(longs[:8]) == list(longs[8:]) == expected(64)
    total = sum(int(value) & 255 for value in values)
    assert single.tolist() == [total, total]
    assert double[0] == total
    assert torch.from_numpy(pair.view(np.int16)).view(torch.bfloat16).tolist() == [128.0, 256.0]


def test_last_block_sees_the_others(instructions: Sim, schedule: dict[str, Any]) -> None:
    instructions.options(**schedule, cta_order="random")
    data = rng().integers(0, 99, (20, 32)).astype(np.int32)
    out = np.zeros(1, np.int32)
    instructions.last_block(data, np.zeros(20, np.int32), out, 20)
    assert out[0] == data.sum()


def test_results_do_not_depend_on_the_number_of_threads(ampere: Sim) -> None:
    results = []
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 64, generator=generator).bfloat16(), torch.randn(128, 64, generator=generator).bfloat16()
    for threads in (1, 2, 7):
        c = torch.zeros(256, 128)
        ampere.options(threads=threads, sched="random", async_="random", seed=4)
        ampere.gemm(a, b, c, 256, 128, 64, 0)
        results.append(c)
    assert all(torch.equal(result, results[0]) for result in results)


# ---- integers
def signed(value: int, bits: int = 64) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def signed_field(x: int, position: int, length: int) -> int:
    if length == 0:
        return 0
    field = signed(x) >> position & (1 << length) - 1
    return signed(field, length)


WIDE: list[Callable[[int, int], int]] = [
    lambda x, y: x * y,
    lambda x, y: x * y >> 64,
    lambda x, y: signed(x) * signed(y) >> 64,
    lambda x, y: x // (y | 1),
    lambda x, y: int(math.copysign(abs(signed(x)) % (y >> 9 | 1), 1)) * (-1 if signed(x) < 0 else 1),
    lambda x, y: x.bit_count(),
    lambda x, y: 64 - x.bit_length(),
    lambda x, y: int(f"{x:064b}"[::-1], 2),
    lambda x, y: (x & -x).bit_length(),
    lambda x, y: x << (y & 63),
    lambda x, y: signed(x) >> (y & 63),
    lambda x, y: x * y + x,
    lambda x, y: (x * y + x) >> 64,
    lambda x, y: y - (x < y),
    lambda x, y: signed_field(x, y & 63, y >> 8 & 63),
]


def test_64_bit_integers(instructions: Sim) -> None:
    a, b = (rng().integers(0, 1 << 64, 128, dtype=np.uint64) for _ in "ab")
    b = b[::-1].copy()
    a[:4], b[:4] = [0, MASK64, 1 << 63, 1], [MASK64, MASK64, 3, 1 << 63]
    out = np.zeros((len(WIDE), 128), np.uint64)
    instructions.wide(a, b, out, 128)
    for index, operation in enumerate(WIDE):
        for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            if index == 4:  # in Python integers: doubles are not exact
                magnitude = abs(signed(x)) % (y >> 9 | 1)
                want = -magnitude if signed(x) < 0 else magnitude
            else:
                want = operation(x, y)
            assert int(out[index, i]) == want & MASK64, f"operation {index}: x={x:#x} y={y:#x}"


# ---- conversions and 16-bit floats
def clamp(value: float, low: int, high: int, rounding: Callable[[float], float], nan: int) -> int:
    if math.isnan(value):
        return nan
    return int(min(max(rounding(value), low), high)) if math.isfinite(value) else (high if value > 0 else low)


def test_floats_to_integers(instructions: Sim) -> None:
    special = [math.nan, math.inf, -math.inf, -0.0, 127.5, -128.5, 2.5, 3.5, 1e30, -1e30, 2147483648.0, 255.9, -0.9]
    values = np.array([*special, *(rng().standard_normal(115) * 10.0 ** rng().integers(0, 20, 115))])
    single = values.astype(np.float32)
    out = np.zeros((8, 128), np.int64)
    instructions.to_integers(single, values, out, 128)
    i32, i64 = 1 << 31, 1 << 63
    for i in range(128):
        x, z = float(single[i]), float(values[i])
        want = [
            clamp(x, -128, 127, round, 0),
            clamp(x, 0, 255, math.trunc, 0),
            clamp(x, -i32, i32 - 1, round, 0),
            clamp(x, 0, 2 * i32 - 1, math.floor, 0),
            clamp(x, -i64, i64 - 1, math.trunc, -i64),
            signed(clamp(x, 0, 2 * i64 - 1, math.trunc, i64)),
            clamp(z, -i32, i32 - 1, math.ceil, -i32),
            clamp(z, -i64, i64 - 1, math.trunc, -i64),
        ]
        assert out[:, i].tolist() == want, f"{x} {z}"


def decode(bits: int, exponent_bits: int, fraction_bits: int) -> Fraction | float:
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction, bias = bits & (1 << fraction_bits) - 1, (1 << (exponent_bits - 1)) - 1
    sign = -1 if bits >> 15 else 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * Fraction(fraction, 1) * Fraction(2) ** (1 - bias - fraction_bits)
    return sign * (Fraction(fraction, 1 << fraction_bits) + 1) * Fraction(2) ** (exponent - bias)


def encode(value: Fraction, exponent_bits: int, fraction_bits: int) -> int:
    """Bits of the nearest value, ties to even; zero has no sign."""
    bias, sign, magnitude = (1 << (exponent_bits - 1)) - 1, int(value < 0) << 15, abs(value)
    if not magnitude:
        return 0
    exponent = max(math.frexp(float(magnitude))[1] - 1, 1 - bias)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > 1 - bias and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    scaled = round(magnitude / Fraction(2) ** (exponent - fraction_bits))  # rounds ties to even
    bits = ((exponent + bias - 1) << fraction_bits) + scaled
    return sign | min(bits, ((1 << exponent_bits) - 1) << fraction_bits)


F16, BF16 = (5, 10), (8, 7)


def test_half_arithmetic_is_rounded_once(instructions: Sim) -> None:
    n = 1024
    x, y, z = (
        rng_.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
        for rng_ in map(np.random.default_rng, (1, 2, 3))
    )
    # Addends that are far below half a unit of the product decide ties: two roundings would go wrong.
    x[:64], y[:64] = 0x3C013C01, 0x3C203C20
    z[:64] = np.arange(64, dtype=np.uint32) * 0x00010001 + 1
    x[64:128], y[64:128] = 0x3F813F81, 0x40404040
    z[64:128] = (np.arange(64, dtype=np.uint32) % 2 * 0x8000 + 0x0100 + np.arange(64, dtype=np.uint32)) * 0x00010001
    out = np.zeros((8, n), np.uint32)
    instructions.halves(x, y, z, out, n)

    def check(row: int, layout: tuple[int, int], operation: Callable[..., Fraction], *operands: np.ndarray) -> None:
        checked = 0
        for i in range(n):
            for shift in (0, 16):
                values = [decode(int(operand[i]) >> shift & 0xFFFF, *layout) for operand in operands]
                if any(isinstance(value, float) for value in values):
                    continue
                want, got = encode(operation(*values), *layout), int(out[row, i]) >> shift & 0xFFFF
                checked += 1
                assert got == want or (got & 0x7FFF) == want == 0, f"row {row}: {values} gives {got:#x}, not {want:#x}"
        assert checked > n

    check(0, F16, lambda a, b, c: a * b + c, x, y, z)
    check(1, BF16, lambda a, b, c: a * b + c, x, y, z)
    check(3, F16, lambda a, b: a + b, x, y)
    check(4, F16, lambda a, b: a * b, x, y)
    halves = x.view(np.float16)
    with np.errstate(over="ignore"):
        exponential = np.exp2(halves.astype(np.float64))
    finite = ~np.isnan(halves)
    got = out[7].view(np.uint16).view(np.float16)[finite].astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(got, exponential[finite].astype(np.float16).astype(np.float64), rtol=1e-3, atol=1e-7)


def test_half_minimum_and_maximum(instructions: Sim) -> None:
    n = 512
    x, y = (
        generator.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
        for generator in map(np.random.default_rng, (4, 5))
    )
    out = np.zeros((8, n), np.uint32)
    instructions.halves(x, y, x, out, n)

    def bf16(bits: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float()

    np.testing.assert_array_equal(bf16(out[5]).numpy(), np.fmax(bf16(x).numpy(), bf16(y).numpy()))
    a, b, c = (torch.from_numpy(bits.view(np.float16).astype(np.float32)) for bits in (x, y, out[6]))
    assert torch.equal(c.nan_to_num(-1), torch.maximum(a, b).nan_to_num(-1))


def test_float_conversions_and_flushing(instructions: Sim) -> None:
    n = 256
    bits = np.random.default_rng(6).integers(0, 1 << 32, (2, n), dtype=np.uint64).astype(np.uint32)
    x, y = bits.view(np.float32)
    x[:8] = [1e-40, -1e-40, 1e-38, 65520.0, 65519.0, math.inf, -math.inf, math.nan]
    y[:8] = [1.0, 1.0, 1e-3, 2.0, -3.0, 1.0, 0.5, 4.0]
    out = np.zeros((7, n), np.uint32)
    instructions.floats(x.copy(), y.copy(), out, n)

    def upper(t: torch.Tensor) -> np.ndarray:
        return t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    tx, ty = torch.from_numpy(x.copy()), torch.from_numpy(y.copy())
    number = ~(np.isnan(x) | np.isnan(y))
    pairs = upper(tx.bfloat16()) << 16 | upper(ty.bfloat16())
    assert (out[0] == pairs)[number].all()
    assert out[0, 7] >> 16 == 0x7FFF  # the canonical NaN
    half = x.astype(np.float32)
    with np.errstate(over="ignore"):
        nearest = half.astype(np.float16)
    assert (out[3][number] == nearest.view(np.uint16)[number]).all()
    toward_zero = (out[1] >> 16).astype(np.uint16).view(np.float16)
    assert (np.abs(toward_zero[number].astype(np.float64)) <= np.abs(x[number].astype(np.float64))).all()
    assert toward_zero[3] == 65504
    assert (out[2] >> 16 & 0x8000)[number].max() == 0  # relu

    def flushed(v: np.ndarray) -> np.ndarray:
        return np.where(np.abs(v) < np.float32(2.0**-126), np.copysign(np.float32(0), v), v).astype(np.float32)

    with np.errstate(over="ignore", invalid="ignore"):
        exact, plain = flushed(flushed(x) * flushed(y)), x * y
        np.testing.assert_allclose(out[4].view(np.float32)[number], flushed(np.exp2(flushed(x)))[number], rtol=3e-6)
    compare = number & ~np.isnan(plain)
    assert (out[5].view(np.float32) == exact)[compare & ~np.isnan(exact)].all()
    assert (out[6].view(np.float32) == plain)[compare].all()


def test_doubles(instructions: Sim) -> None:
    n = 128
    x = np.random.default_rng(7).uniform(-1e5, 1e5, n)
    y = np.random.default_rng(8).uniform(0.5, 20, n)
    x[:3] = [1e-9, 105414357.85197, 2.5]
    out = np.zeros((12, n))
    instructions.doubles(x, y, out, n)
    exact = [x / y, np.sqrt(np.abs(x)), np.fmod(x, y), np.rint(x), x.astype(np.float32).astype(np.float64)]
    for row, want in zip((2, 3, 7, 10, 11), exact, strict=True):
        assert (out[row] == want).all(), f"row {row}"
    close = {0: np.sin(x), 1: np.cos(x), 5: np.exp(y), 6: np.log(np.abs(x)), 8: np.sin(x * 1e6), 9: np.cos(x * 1e6)}
    for row, want in close.items():
        np.testing.assert_allclose(out[row], want, rtol=1e-14, atol=1e-15, err_msg=f"row {row}")
    fused = [float(Fraction(a) * Fraction(b) - Fraction(a)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert out[4].tolist() == fused


def test_recursion(instructions: Sim) -> None:
    out = np.zeros(8, np.int32)
    instructions.recursion(out)
    assert out.tolist() == [2 * n + 3 for n in range(8)]


# ---- matrix fragments, as the PTX ISA lays them out
def test_ldmatrix(instructions: Sim, schedule: dict[str, Any]) -> None:
    instructions.options(**schedule)
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)  # four 8x8 matrices, a row of 16 bytes per lane
    out = np.zeros((14, 32), np.uint32)
    instructions.ldmatrix(rows, out)

    def fragment(matrix: np.ndarray) -> list[int]:  # lane l: row l / 4, columns 2 (l % 4) and the next
        return [int(matrix[l // 4, l % 4 * 2]) | int(matrix[l // 4, l % 4 * 2 + 1]) << 16 for l in range(32)]  # noqa: E741

    plain = [fragment(matrix) for matrix in rows]
    transposed = [fragment(matrix.T) for matrix in rows]
    for start, fragments in ((0, plain), (7, transposed)):
        assert out[start].tolist() == fragments[0]
        assert out[start + 1 : start + 3].tolist() == fragments[:2]
        assert out[start + 3 : start + 7].tolist() == fragments


def place_a(matrix: np.ndarray) -> np.ndarray:
    """[32][4] registers of the 16 x K operand, 32 bytes per row: groups of 4 lanes hold a row, 4 bytes each."""
    words = matrix.view(np.uint32)  # [16][8]
    return np.array([[words[lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)] for r in range(4)] for lane in range(32)])


def place_b(matrix: np.ndarray) -> np.ndarray:
    """[32][2] registers of the K x 8 operand, given as [8][K]."""
    words = matrix.view(np.uint32)
    return np.array([[words[lane // 4, lane % 4 + 4 * r] for r in range(2)] for lane in range(32)])


def place_c(matrix: np.ndarray) -> np.ndarray:
    """[32][4] registers of the 16 x 8 accumulator."""
    words = matrix.view(np.uint32)
    return np.array([[words[lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2] for r in range(4)] for lane in range(32)])


def as_16_bit(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("kind", "dtype"), [(0, torch.bfloat16), (1, torch.float16)])
def test_mma_16_bit(instructions: Sim, schedule: dict[str, Any], kind: int, dtype: torch.dtype) -> None:
    instructions.options(**schedule)
    generator = torch.Generator().manual_seed(kind)
    a, b = (torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in ((16, 16), (8, 16)))
    c = torch.randint(-99, 99, (16, 8), generator=generator).float()
    fragments = place_c(c.numpy())
    instructions.mma(place_a(as_16_bit(a)), place_b(as_16_bit(b)), fragments, kind)
    assert (fragments == place_c((c + a.float() @ b.float().T).numpy())).all()


@pytest.mark.parametrize(("kind", "unsigned"), [(2, False), (3, True)])
def test_mma_8_bit(instructions: Sim, kind: int, unsigned: bool) -> None:
    generator = rng()
    a = (
        generator.integers(0, 256, (16, 32)).astype(np.uint8)
        if unsigned
        else generator.integers(-128, 128, (16, 32)).astype(np.int8)
    )
    b = generator.integers(-128, 128, (8, 32)).astype(np.int8)
    c = generator.integers(-99, 99, (16, 8)).astype(np.int32)
    fragments = place_c(c)
    instructions.mma(place_a(a), place_b(b), fragments, kind)
    assert (fragments == place_c(c + a.astype(np.int32) @ b.astype(np.int32).T)).all()


@pytest.mark.parametrize(("kind", "overflow"), [(2, -(1 << 31)), (4, (1 << 31) - 1)])
def test_mma_8_bit_overflow(instructions: Sim, kind: int, overflow: int) -> None:
    """Wraps around, or clamps with .satfinite."""
    a, b = np.zeros((16, 32), np.int8), np.zeros((8, 32), np.int8)
    a[:, 0] = b[:, 0] = 1
    fragments = place_c(np.full((16, 8), (1 << 31) - 1, np.int32))
    instructions.mma(place_a(a), place_b(b), fragments, kind)
    assert (fragments == np.uint32(overflow & 0xFFFFFFFF)).all()


# ---- the host side
def test_graphs_repeat_what_was_captured(instructions: Sim) -> None:
    counts, copied = np.zeros(2, np.int32), np.zeros(1, np.int32)
    instructions.graph(counts, copied, 3)
    assert counts.tolist() == [3, -1]
    assert copied[0] == 3


def test_fills_and_copies_are_checked(instructions: Sim) -> None:
    memory = np.ones(64, np.uint8)
    instructions.fill(memory, 64)
    assert not memory.any()
    with pytest.raises(Fault, match=r"memset: 65 bytes at .* are not within an allocation"):
        instructions.fill(memory, 65)
    with pytest.raises(Fault, match="copy from the device: 65 bytes"):
        instructions.copy(np.zeros(100, np.uint8), memory, 65)
    with pytest.raises(Fault, match="copy to the device: 65 bytes"):
        instructions.copy(memory, np.zeros(100, np.uint8), 65)


def test_the_device_is_of_the_architecture_that_is_asked_for() -> None:
    major = ctypes.c_int()
    runtime = testing.runtime()
    for arch in (80, 90):
        testing.options(arch=arch)
        runtime.cudaDeviceGetAttribute(ctypes.byref(major), 75, 0)  # cudaDevAttrComputeCapabilityMajor
        assert major.value == arch // 10
    testing.options(arch=0)
