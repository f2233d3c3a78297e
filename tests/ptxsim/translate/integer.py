"""Integer arithmetic, logic and bit operations."""

from __future__ import annotations

from ..ptxparse import SIZES
from .context import C_TYPES, WIDER, Context, instruction


def _unsigned(ptx_type: str) -> tuple[str, str]:
    """C++ type of the carry arithmetic of a type, and one that holds its carry."""
    return ("u64", "u128") if SIZES[ptx_type] == 8 else ("u32", "u64")


def _product(c: Context, x: str, y: str) -> str:
    """The .lo, .hi or 24-bit product, in the type of the instruction."""
    c_type = C_TYPES[c.type]
    if c.root.endswith("24"):
        return f"mul24<{c_type}>({x}, {y})"
    if c.has("hi"):
        return f"mulhi({x}, {y})"
    return f"({c_type})(({'u32' if SIZES[c.type] < 4 else c_type}){x} * {y})"


@instruction("add", "sub", modifiers="sat cc", domain="integer")
def _add(c: Context) -> str:
    d, a, b = c.args
    sign = "+" if c.root == "add" else "-"
    if c.has("cc"):
        unsigned, _ = _unsigned(c.type)
        x, y = c.read(a, unsigned), c.read(b, unsigned)
        carry = f"({unsigned})(x_ + y_) < x_" if sign == "+" else "x_ < y_"
        return f"{{ {unsigned} x_ = {x}, y_ = {y}; cc_ = {carry}; {c.write(d, unsigned, f'x_ {sign} y_')} }}"
    x, y = c.read(a, c.type), c.read(b, c.type)
    if c.has("sat"):
        return c.write(d, c.type, f"{c.root}sat({x}, {y})")
    return c.write(d, c.type, f"({C_TYPES[c.type]})({x} {sign} {y})")


@instruction("addc", "subc", modifiers="cc")
def _add_with_carry(c: Context) -> str:
    d, a, b = c.args
    sign = "+" if c.root == "addc" else "-"
    unsigned, wide = _unsigned(c.type)
    result = f"{wide} r_ = ({wide}){c.read(a, unsigned)} {sign} {c.read(b, unsigned)} {sign} cc_;"
    carry = f"cc_ = r_ >> {SIZES[c.type] * 8} & 1;" if c.has("cc") else ""
    return f"{{ {result} {carry} {c.write(d, unsigned, f'({unsigned})r_')} }}"


@instruction("mul", "mul24", modifiers="lo hi wide", domain="integer")
def _mul(c: Context) -> str:
    d, a, b = c.args
    if c.root == "mul24" and c.has("hi"):
        c.error("mul24.hi is not supported")
    if not c.has("wide"):
        return c.write(d, c.type, _product(c, c.read(a, c.type), c.read(b, c.type)))
    wide = WIDER[c.type]
    extend = {"u64": "(u128)", "s64": "(u128)(__int128)"}.get(c.type, f"({wide})")
    return c.write(d, wide, f"{extend}({c.read(a, c.type)}) * {extend}({c.read(b, c.type)})")


@instruction("mad", "madc", "mad24", modifiers="lo hi wide cc", domain="integer")
def _mad(c: Context) -> str:
    d, a, b, addend = c.args
    x, y = c.read(a, c.type), c.read(b, c.type)
    if c.root == "mad24" and c.has("hi"):
        c.error("mad24.hi is not supported")
    if c.has("wide"):
        wide = WIDER[c.type]
        return c.write(d, wide, f"({wide})({x}) * ({wide})({y}) + {c.read(addend, wide)}")
    z, product = c.read(addend, c.type), _product(c, x, y)
    if c.root != "madc" and not c.has("cc"):
        return c.write(d, c.type, f"({C_TYPES[c.type]})({product} + {z})")
    unsigned, wide = _unsigned(c.type)
    carry_in = " + cc_" if c.root == "madc" else ""
    carry_out = f"cc_ = r_ >> {SIZES[c.type] * 8} & 1;" if c.has("cc") else ""
    result = f"{wide} r_ = ({wide})({unsigned})({product}) + ({unsigned}){z}{carry_in};"
    return f"{{ {result} {carry_out} {c.write(d, unsigned, f'({unsigned})r_')} }}"


@instruction("div", "rem", "min", "max", domain="integer")
def _binary(c: Context) -> str:
    d, a, b = c.args
    x, y, c_type = c.read(a, c.type), c.read(b, c.type), C_TYPES[c.type]
    expression = {
        "div": f"idiv<{c_type}>({x}, {y})",
        "rem": f"irem<{c_type}>({x}, {y})",
        "min": f"({x} < {y} ? {x} : {y})",
        "max": f"({x} > {y} ? {x} : {y})",
    }[c.root]
    return c.write(d, c.type, expression)


@instruction("neg", "abs", domain="integer")
def _negate(c: Context) -> str:
    d, a = c.args
    x = c.read(a, c.type)
    expression = f"-{x}" if c.root == "neg" else f"{x} < 0 ? -{x} : {x}"
    return c.write(d, c.type, f"({C_TYPES[c.type]})({expression})")


@instruction("sad")
def _sad(c: Context) -> str:
    d, a, b, addend = c.args
    x, y = c.read(a, c.type), c.read(b, c.type)
    return c.write(d, c.type, f"({C_TYPES[c.type]})({c.read(addend, c.type)} + ({x} < {y} ? {y} - {x} : {x} - {y}))")


@instruction("and", "or", "xor")
def _logic(c: Context) -> str:
    d, a, b = c.args
    symbol = {"and": "&", "or": "|", "xor": "^"}[c.root]
    return c.write(d, c.type, f"({C_TYPES[c.type]})({c.read(a, c.type)} {symbol} {c.read(b, c.type)})")


@instruction("not", "cnot")
def _not(c: Context) -> str:
    d, a = c.args
    x, c_type = c.read(a, c.type), C_TYPES[c.type]
    if c.root == "cnot":
        return c.write(d, c.type, f"({c_type})({x} == 0)")
    return c.write(d, c.type, f"!({x})" if c.type == "pred" else f"({c_type})~{x}")


@instruction("shl", "shr")
def _shift(c: Context) -> str:
    d, a, amount = c.args
    return c.write(d, c.type, f"{c.root}<{C_TYPES[c.type]}>({c.read(a, c.type)}, {c.read(amount, 'u32')})")


@instruction("lop3")
def _lop3(c: Context) -> str:
    if "|" in c.args[0]:
        c.error("lop3 with a predicate output is not supported")
    d, *sources = c.args
    return c.write(d, "b32", f"lop3({', '.join(c.read(source, 'b32') for source in sources)})")


@instruction("popc", "clz")
def _count(c: Context) -> str:
    d, a = c.args
    x = c.read(a, c.type)
    return c.write(d, "u32", f"(u32)__builtin_popcountll({x})" if c.root == "popc" else f"clz({x})")


@instruction("brev")
def _brev(c: Context) -> str:
    d, a = c.args
    return c.write(d, c.type, f"brev({c.read(a, c.type)})")


@instruction("bfe")
def _bfe(c: Context) -> str:
    d, a, position, length = c.args
    x = c.read(a, c.type)
    return c.write(d, c.type, f"bfe<{C_TYPES[c.type]}>({x}, {c.read(position, 'u32')}, {c.read(length, 'u32')})")


@instruction("bfi")
def _bfi(c: Context) -> str:
    d, a, b, position, length = c.args
    x, y = c.read(a, c.type), c.read(b, c.type)
    return c.write(d, c.type, f"bfi<{C_TYPES[c.type]}>({x}, {y}, {c.read(position, 'u32')}, {c.read(length, 'u32')})")


@instruction("bfind", modifiers="shiftamt")
def _bfind(c: Context) -> str:
    d, a = c.args
    return c.write(d, "u32", f"bfind<{C_TYPES[c.type]}>({c.read(a, c.type)}, {c.flag('shiftamt')})")


@instruction("fns")
def _fns(c: Context) -> str:
    d, mask, base, offset = c.args
    return c.write(d, "b32", f"fns({c.read(mask, 'b32')}, {c.read(base, 'b32')}, {c.read(offset, 's32')})")


@instruction("bmsk", modifiers="clamp wrap")
def _bmsk(c: Context) -> str:
    d, position, length = c.args
    return c.write(d, "b32", f"bmsk({c.read(position, 'u32')}, {c.read(length, 'u32')}, {c.flag('clamp')})")


@instruction("szext", modifiers="clamp wrap")
def _szext(c: Context) -> str:
    d, a, length = c.args
    bits = f"szext_bits({c.read(length, 'u32')}, {c.flag('clamp')})"
    return c.write(d, c.type, f"bfe<{C_TYPES[c.type]}>({c.read(a, c.type)}, 0, {bits})")


@instruction("shf", modifiers="l r wrap clamp")
def _shf(c: Context) -> str:
    d, a, b, amount = c.args
    operands = f"{c.read(a, 'b32')}, {c.read(b, 'b32')}, {c.read(amount, 'u32')}"
    return c.write(d, "b32", f"shf({operands}, {c.flag('l')}, {c.flag('clamp')})")


@instruction("prmt", modifiers="f4e b4e rc8 ecl ecr rc16")
def _prmt(c: Context) -> str:
    d, a, b, selector = c.args
    names = ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    mode = next((i for i, name in enumerate(names) if c.has(name)), 0)
    return c.write(d, "b32", f"prmt({c.read(a, 'b32')}, {c.read(b, 'b32')}, {c.read(selector, 'b32')}, {mode})")


@instruction("dp4a", "dp2a", modifiers="lo hi")
def _dot_product(c: Context) -> str:
    d, a, b, addend = c.args
    signed_a, signed_b = ("true" if name == "s32" else "false" for name in c.types)
    high = f", {c.flag('hi')}" if c.root == "dp2a" else ""
    operands = f"{c.read(a, 'b32')}, {c.read(b, 'b32')}, {c.read(addend, 's32')}"
    return c.write(d, "s32", f"{c.root}({operands}, {signed_a}, {signed_b}{high})")
