"""Loads, stores, atomics and cache control."""

from __future__ import annotations

from ..ptxparse import SIZES
from .context import C_TYPES, CACHING, FLOATS, HALVES, ORDER, SPACES, VECTORS, Context, instruction, vector


@instruction("ld", "ldu", modifiers=f"{SPACES} {CACHING} {ORDER} {VECTORS} unified")
def _ld(c: Context) -> str:
    registers = vector(c.args[0])
    size, c_type = SIZES[c.type], C_TYPES[c.type]
    polls = c.has("volatile", "relaxed", "acquire")
    address, space = c.address(c.args[1]), c.space
    if space == "param" and c.is_symbolic(c.args[1]):
        place = f"(const u8 *)({address})"
    else:
        space = {"const": "global", "param": "generic"}.get(space, space)
        access = "at" if polls and space in ("shared", "generic") else "ld"
        place = f"{space}_{access}(t, {address}, {size * len(registers)})"
    if len(registers) == 1 and not polls:
        return c.write(registers[0], c.type, f"rd<{c_type}>({place})")
    hint = "spin_hint(t);" if polls else ""
    loads = " ".join(f"{c_type} x{i}_ = rd<{c_type}>(p_ + {i * size});" for i in range(len(registers)))
    writes = " ".join(c.write(name, c.type, f"x{i}_") for i, name in enumerate(registers) if name != "_")
    return f"{{ {hint} const u8 *p_ = {place}; {loads} {writes} }}"


@instruction("st", modifiers=f"{SPACES} {CACHING} {ORDER} {VECTORS}")
def _st(c: Context) -> str:
    registers = vector(c.args[1])
    size, c_type = SIZES[c.type], C_TYPES[c.type]
    address, space = c.address(c.args[0]), c.space
    writes = " ".join(f"wr<{c_type}>(p_ + {i * size}, {c.read(a, c.type)});" for i, a in enumerate(registers))
    if space == "param" and c.is_symbolic(c.args[0]):
        return f"{{ u8 *p_ = (u8 *)({address}); {writes} }}"
    place = f"u8 *p_ = {space}_st(t, {address}, {size * len(registers)});"
    if c.has("volatile", "relaxed", "release") and space in ("shared", "generic"):  # it synchronises: not a race
        place = f"u32 f_ = t.flags; t.flags &= ~F_RACE; {place} t.flags = f_;"
    return f"{{ {place} {writes} }}"


UPDATES = {
    "add": "o + x",
    "min": "(o < x ? o : x)",
    "max": "(o > x ? o : x)",
    "and": "o & x",
    "or": "o | x",
    "xor": "o ^ x",
    "exch": "x",
    "inc": "(o >= x ? 0 : o + 1)",
    "dec": "(o == 0 || o > x ? x : o - 1)",
    "cas": "(o == x ? y : o)",
}
"""New value of an atomic from the old value o and the operands x and y."""


def _update(kind: str, ptx_type: str) -> str:
    if ptx_type in FLOATS and kind in ("min", "max"):
        return f"f{kind}_(o, x)"
    if ptx_type in HALVES and kind in ("add", "min", "max"):
        decode, encode = HALVES[ptx_type]
        value = {"add": "p + q", "min": "fmin_(p, q)", "max": "fmax_(p, q)"}[kind]
        one = f"[](u16 o_, u16 x_, u16) -> u16 {{ f32 p = {decode}(o_), q = {decode}(x_); return {encode}({value}); }}"
        return f"map2({one}, o, x)" if ptx_type.endswith("x2") else f"({one})(o, x, (u16)0)"
    return UPDATES[kind]


@instruction("atom", "red", modifiers=f"{SPACES} {CACHING} {ORDER} {VECTORS} noftz {' '.join(UPDATES)}")
def _atom(c: Context) -> str:
    """Subnormal operands and results of global .f32 additions are kept, where hardware flushes them."""
    args = list(c.args)
    kind = c.one_of(*UPDATES)
    results = vector(args.pop(0)) if c.root == "atom" else []
    size, c_type = SIZES[c.type], C_TYPES[c.type]
    values = vector(args[1])
    body = f"spin_hint(t); u8 *p_ = {c.space}_at(t, {c.address(args[0])}, {size * len(values)});"
    for i, value in enumerate(values):
        operands = f"{c_type} x = {c.read(value, c.type)};"
        if kind == "cas":
            operands += f" {c_type} y = {c.read(args[2], c.type)};"
        update = f"rmw<{c_type}>(p_ + {i * size}, [&]({c_type} o) -> {c_type} {{ return {_update(kind, c.type)}; }})"
        keep = c.write(results[i], c.type, "r_") if results else "(void)r_;"
        body += f" {{ {operands} {c_type} r_ = {update}; {keep} }}"
    return f"{{ {body} }}"


@instruction("prefetch", "prefetchu", modifiers=f"{SPACES} {CACHING} L1 L2 tensormap")
def _prefetch(c: Context) -> str:
    return ";"


@instruction("applypriority", modifiers=f"{SPACES} {CACHING} L2::evict_normal")
def _applypriority(c: Context) -> str:
    return ";"


@instruction("createpolicy", modifiers=f"fractional range cvt L2 {SPACES} {CACHING}")
def _createpolicy(c: Context) -> str:
    return c.write(c.args[0], "b64", "0ull")
