"""Floating-point arithmetic, and conversions between all types."""

from __future__ import annotations

from collections.abc import Callable

from ..ptxparse import SIZES
from .context import C_TYPES, FLOATS, FP8_PAIRS, HALVES, Context, instruction, is_float


def _wrap(condition: bool, function: str, expression: str) -> str:
    return f"{function}({expression})" if condition else expression


def float_operation(c: Context, sources: list[str], combine: Callable[..., str]) -> str:
    """Writes combine(operand expressions), with .ftz, .sat and .relu; 16-bit types compute in f32 and round once."""
    d, ptx_type = c.args[0], c.type
    flush = c.has("ftz") and ptx_type != "f64"
    if ptx_type in HALVES:
        decode, encode = HALVES[ptx_type]
        names = "xyz"[: len(sources)]
        flush_bits = "ftz_f16" if ptx_type.startswith("f16") else "ftz_bf16"
        body = combine(*[f"{decode}({_wrap(flush, flush_bits, name)})" for name in names])
        body = f"sat01({body})" if c.has("sat") else _wrap(c.has("relu"), "relu", body)
        body = _wrap(flush, flush_bits, f"{encode}({body})")
        function = f"[&](u16 x, u16 y, u16 z) -> u16 {{ return {body}; }}"
        values = ", ".join(c.read(source, ptx_type) for source in sources)
        if ptx_type.endswith("x2"):
            return c.write(d, ptx_type, f"map2({function}, {values})")
        return c.write(d, ptx_type, f"({function})({values}{', (u16)0' * (3 - len(sources))})")
    expression = combine(*[_wrap(flush, "ftz", c.read(source, ptx_type)) for source in sources])
    return c.write(d, ptx_type, _wrap(c.has("sat"), "sat01", _wrap(flush, "ftz", expression)))


def _directed(c: Context) -> str:
    """The rounding of an f32 or f64 instruction if it is not to the nearest."""
    return c.rounding if c.rounding != "RN" and c.type in FLOATS else ""


@instruction("add", "sub", "mul", "div", modifiers="rn rz rm rp ftz sat approx full", domain="float")
def _arithmetic(c: Context) -> str:
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[c.root]
    if len(c.types) == 2:  # add.f32.bf16 d, a, b: a is 16 bits wide
        d, a, b = c.args
        return c.write(d, "f32", f"{HALVES[c.type][0]}({c.read(a, c.type)}) {sign} {c.read(b, 'f32')}")
    if rounding := _directed(c):
        return float_operation(c, c.args[1:], lambda x, y: f"arith_rnd('{sign}', {rounding}, {x}, {y})")
    return float_operation(c, c.args[1:], lambda x, y: f"({x} {sign} {y})")


@instruction("fma", "mad", modifiers="rn rz rm rp ftz sat relu", domain="float")
def _fma(c: Context) -> str:
    if rounding := _directed(c):
        return float_operation(c, c.args[1:], lambda x, y, z: f"arith_rnd('f', {rounding}, {x}, {y}, {z})")
    function = "fma16" if c.type in HALVES else "std::fma"
    return float_operation(c, c.args[1:], lambda x, y, z: f"{function}({x}, {y}, {z})")


@instruction("min", "max", modifiers="ftz NaN", domain="float")
def _minimum(c: Context) -> str:
    function = f"f{c.root}nan" if c.has("NaN") else f"f{c.root}_"
    if len(c.args) == 4:
        return float_operation(c, c.args[1:], lambda x, y, z: f"{function}({function}({x}, {y}), {z})")
    return float_operation(c, c.args[1:], lambda x, y: f"{function}({x}, {y})")


@instruction("neg", "abs", modifiers="ftz", domain="float")
def _sign(c: Context) -> str:
    d, a = c.args
    if c.type in HALVES and not c.has("ftz"):
        bits = "0x80008000u" if c.type.endswith("x2") else "0x8000"
        change = f"^ {bits}" if c.root == "neg" else f"& ~{bits}"
        return c.write(d, c.type, f"({C_TYPES[c.type]})({c.read(a, c.type)} {change})")
    return float_operation(c, [a], lambda x: f"-{x}" if c.root == "neg" else f"std::fabs({x})")


FUNCTIONS = {
    "ex2": "ex2({})",
    "lg2": "lg2({})",
    "rcp": "(1 / {})",
    "sqrt": "std::sqrt({})",
    "rsqrt": "(1 / std::sqrt({}))",
    "sin": "std::sin({})",
    "cos": "std::cos({})",
    "tanh": "std::tanh({})",
}
"""Approximate functions are computed accurately, which is laxer than hardware."""


@instruction(*FUNCTIONS, modifiers="rn rz rm rp approx ftz")
def _function(c: Context) -> str:
    if rounding := _directed(c):
        code = {"rcp": "r", "sqrt": "s"}[c.root]
        return float_operation(c, [c.args[1]], lambda x: f"arith_rnd('{code}', {rounding}, {x})")
    return float_operation(c, [c.args[1]], FUNCTIONS[c.root].format)


@instruction("copysign")
def _copysign(c: Context) -> str:
    d, sign, magnitude = c.args
    return c.write(d, c.type, f"std::copysign({c.read(magnitude, c.type)}, {c.read(sign, c.type)})")


@instruction("testp", modifiers="finite infinite number notanumber normal subnormal")
def _testp(c: Context) -> str:
    d, a = c.args
    x = c.read(a, c.type)
    test = {
        "finite": f"std::isfinite({x})",
        "infinite": f"std::isinf({x})",
        "number": f"!std::isnan({x})",
        "notanumber": f"std::isnan({x})",
        "normal": f"std::isnormal({x})",
        "subnormal": f"(std::fpclassify({x}) == FP_SUBNORMAL)",
    }
    return c.write(d, "pred", test[c.modifiers[0]])


# ---- conversions
@instruction("cvt", modifiers="rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite relu pack")
def _cvt(c: Context) -> str:
    if c.has("pack"):
        return _pack(c)
    names = [name for name in c.modifiers if name in C_TYPES or name in FP8_PAIRS]
    to, source = names[0], names[-1]
    if to in FP8_PAIRS:
        return _to_fp8(c, to, source)
    if source in FP8_PAIRS:
        e5m2, bits = ("true" if source == "e5m2x2" else "false"), c.read(c.args[1], "b16")
        return c.write(c.args[0], "b32", f"(u32)f2h(fp82f({bits} >> 8, {e5m2})) << 16 | f2h(fp82f((u8){bits}, {e5m2}))")
    if to in ("f16x2", "bf16x2"):
        d, high, low = c.args
        return c.write(d, to, f"(u32){_half(c, to, c.read(high, source))} << 16 | {_half(c, to, c.read(low, source))}")
    if is_float(to) and is_float(source):
        return _float_to_float(c, to, source)
    d, a = c.args
    value = c.read(a, source)
    if is_float(source):
        if source in HALVES:
            value = f"{HALVES[source][0]}({value})"
        value = _wrap(c.has("ftz") and source == "f32", "ftz", value)
        invalid = f"(u64)1 << {8 * SIZES[to] - 1}" if source == "f64" or SIZES[to] == 8 else "0"  # of a NaN
        return c.write(d, to, f"f2i<{C_TYPES[to]}>({value}, {c.rounding or 'RZ'}, {invalid})")
    if is_float(to):
        return _integer_to_float(c, to, source)
    return c.write(d, to, f"isat<{C_TYPES[to]}>({value})" if c.has("sat") else f"({C_TYPES[to]}){value}")


def _pack(c: Context) -> str:
    """cvt.pack.sat.to.source{.b32} d, a, b{, c}"""
    to, source = c.types[:2]
    d, a, b = c.args[:3]
    unsigned, shift = f"u{SIZES[to] * 8}", SIZES[to] * 8
    high, low = (f"({unsigned})isat<{C_TYPES[to]}>({c.read(operand, source)})" for operand in (a, b))
    rest = f" | {c.read(c.args[3], 'b32')} << 16" if len(c.args) > 3 else ""
    return c.write(d, "b32", f"(u32){high} << {shift} | {low}{rest}")


def _to_fp8(c: Context, to: str, source: str) -> str:
    e5m2 = "true" if to == "e5m2x2" else "false"
    if source == "f32":
        high, low = c.read(c.args[1], "f32"), c.read(c.args[2], "f32")
    else:
        bits, decode = c.read(c.args[1], "b32"), HALVES[source][0]
        high, low = f"{decode}({bits} >> 16)", f"{decode}((u16){bits})"
    high, low = (f"f2fp8({_wrap(c.has('relu'), 'relu', value)}, {e5m2})" for value in (high, low))
    return c.write(c.args[0], "b16", f"(u16)({high} << 8 | {low})")


def _half(c: Context, to: str, value: str) -> str:
    """Encodes an f32 expression as f16 or bf16, with the rounding, .relu, .sat and .satfinite of the instruction."""
    if c.rounding not in ("", "RN", "RZ") and not any(name.endswith("i") for name in c.modifiers):
        c.error("only .rn and .rz round to 16-bit types")
    if c.has("satfinite") and c.has("ftz"):
        c.error(".satfinite with .ftz is not supported")
    value = f"sat01({value})" if c.has("sat") else _wrap(c.has("relu"), "relu", value)
    encode = HALVES[to][1] + ("_rz" if c.has("rz") else "")
    return _wrap(c.has("satfinite"), "f16_finite" if to.startswith("f16") else "bf16_finite", f"{encode}({value})")


def _integer_to_float(c: Context, to: str, source: str) -> str:
    d, a = c.args
    value = c.read(a, source)
    kind = "'i'" if source.startswith("s") else "'u'"
    wide = f"(u64)(s64){value}" if source.startswith("s") else f"(u64){value}"
    nearest = c.rounding in ("", "RN")
    if to == "f64":
        return c.write(d, to, f"(f64){value}" if nearest else f"conv_rnd64({kind}, {c.rounding}, {wide})")
    if to in HALVES:
        exact = f"f32_odd({value})" if SIZES[source] >= 4 else f"(f32){value}"  # odd: rounded once in the end
        return c.write(d, to, _half(c, to, exact))
    converted = f"(f32){value}" if nearest else f"conv_rnd({kind}, {c.rounding}, {wide})"
    return c.write(d, to, _wrap(c.has("sat"), "sat01", converted))


def _float_to_float(c: Context, to: str, source: str) -> str:
    d, a = c.args
    value = c.read(a, "f32" if source == "tf32" else source)
    if source in HALVES:
        value = f"{HALVES[source][0]}({value})"
    value = _wrap(c.has("ftz") and source == "f32", "ftz", value)
    if to == "tf32":
        value = _wrap(c.has("relu"), "relu", f"{'tf32_rna' if c.has('rna') else 'tf32_rn'}({value})")
        return c.write(d, "f32", _wrap(c.has("satfinite"), "tf32_finite", value))
    integral = c.has("rni", "rzi", "rmi", "rpi")
    if integral:
        value = f"({'f64' if source == 'f64' else 'f32'})fround({value}, {c.rounding})"
    if to in HALVES:
        return c.write(d, to, _half(c, to, f"f32_odd({value})" if source == "f64" else value))
    value = _wrap(c.has("sat"), "sat01", _wrap(c.has("relu"), "relu", value))
    if to == "f32" and source == "f64" and not integral and c.rounding not in ("", "RN"):
        value = f"conv_rnd('d', {c.rounding}, bc<u64>({value}))"
    elif to != source:
        value = f"({C_TYPES[to]})({value})"
    return c.write(d, to, _wrap(c.has("ftz") and to == "f32", "ftz", value))
