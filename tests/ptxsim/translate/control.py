"""Moves, comparison and selection, branches and calls."""

from __future__ import annotations

from ..ptxparse import SIZES, split_args
from .context import C_TYPES, HALVES, SPACES, Context, instruction, is_float


# ---- moves
@instruction("mov")
def _mov(c: Context) -> str:
    d, a = c.args
    destination, source = c.register(d), c.register(a)
    c.step.may_hold_tokens = True
    if destination and source:
        c.copies.append((destination[0], source[0]))
    return c.write(d, c.type, c.read(a, c.type))


@instruction("cvta", modifiers=f"to {SPACES}")
def _cvta(c: Context) -> str:
    d, a = c.args
    value = c.read(a, "u64")
    if c.space == "shared":
        value = f"{value} {'-' if c.has('to') else '+'} SHARED_WINDOW"
    return c.write(d, "u64", value)


@instruction("isspacep", modifiers=SPACES)
def _isspacep(c: Context) -> str:
    d, a = c.args
    x = c.read(a, "u64")
    test = {
        "shared": f"is_shared({x})",
        "local": f"is_local(t, {x})",
        "global": f"(!is_shared({x}) && !is_local(t, {x}))",
        "param": f"({x} - (u64)t.params < t.params_size)",
        "const": "false",
    }
    return c.write(d, "pred", test[c.space])


@instruction("mapa", modifiers=SPACES)
def _mapa(c: Context) -> str:
    d, a, rank = c.args
    generic = "false" if c.space == "shared" else "true"
    mapped = f"mapa(t, {c.read(a, c.type)}, {c.read(rank, 'u32')}, {generic})"
    return c.write(d, c.type, f"({C_TYPES[c.type]}){mapped}")


@instruction("getctarank", modifiers=SPACES)
def _getctarank(c: Context) -> str:
    d, a = c.args
    rank = f"u32 r_ = ({c.read(a, 'u64')} & 0xffffffff) >> 24;"
    return f"{{ {rank} {c.write(d, 'u32', 'r_ ? r_ - 1 : t.cluster_rank')} }}"


# ---- comparison and selection
INTEGER_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
"""Comparisons that are true for NaN, as the negation of ordered ones."""
BOOLEANS = {"and": "&&", "or": "||", "xor": "!="}
COMPARE_MODIFIERS = " ".join([*COMPARISONS, *INTEGER_COMPARISONS, *UNORDERED, "num", "nan", *BOOLEANS, "ftz"])


def _compare(c: Context, ptx_type: str, x: str, y: str) -> str:
    """bool expression of the first modifier's comparison."""
    comparison = c.modifiers[0]
    if not is_float(ptx_type):
        if comparison in INTEGER_COMPARISONS:
            unsigned = f"u{SIZES[ptx_type] * 8}"
            return f"(({unsigned}){x} {INTEGER_COMPARISONS[comparison]} ({unsigned}){y})"
        return f"(({C_TYPES[ptx_type]}){x} {COMPARISONS[comparison]} ({C_TYPES[ptx_type]}){y})"
    if ptx_type in HALVES:
        flush = ("ftz_f16" if ptx_type.startswith("f16") else "ftz_bf16") if c.has("ftz") else ""
        x, y = f"{HALVES[ptx_type][0]}({flush}({x}))", f"{HALVES[ptx_type][0]}({flush}({y}))"
    elif c.has("ftz"):
        x, y = f"ftz({x})", f"ftz({y})"
    if comparison == "num":
        return f"({x} == {x} && {y} == {y})"
    if comparison == "nan":
        return f"({x} != {x} || {y} != {y})"
    ordered = UNORDERED.get(comparison, comparison)
    test = f"({x} < {y} || {x} > {y})" if ordered == "ne" else f"({x} {COMPARISONS[ordered]} {y})"
    return f"!{test}" if comparison in UNORDERED else test


def _combine(c: Context, test: str, third: str) -> str:
    """A comparison combined with the third operand, if the instruction says so."""
    name = next((modifier for modifier in c.modifiers[1:] if modifier in BOOLEANS), None)
    return f"({test} {BOOLEANS[name]} {third})" if name else test


@instruction("setp", modifiers=COMPARE_MODIFIERS)
def _setp(c: Context) -> str:
    destinations = [name.strip() for name in c.args[0].split("|")]
    x, y = c.read(c.args[1], c.type), c.read(c.args[2], c.type)
    third = f"bool b_ = {c.read(c.args[3], 'pred')};" if len(c.args) > 3 else ""
    if c.type.endswith("x2"):  # one predicate for each half
        tests = [_compare(c, c.type, f"(u16)({x}{half})", f"(u16)({y}{half})") for half in ("", " >> 16")]
    else:  # the second predicate is for the negated comparison
        test = _compare(c, c.type, x, y)
        tests = [test, f"!{test}"]
    pairs = list(enumerate(zip(destinations, tests, strict=False)))
    values = " ".join(f"bool c{i}_ = {_combine(c, test, 'b_')};" for i, (_, test) in pairs)
    writes = " ".join(c.write(d, "pred", f"c{i}_") for i, (d, _) in pairs)
    return f"{{ {third} {values} {writes} }}"


@instruction("set", modifiers=COMPARE_MODIFIERS)
def _set(c: Context) -> str:
    to, source = c.types[-2:]
    d, a, b, *rest = c.args
    x, y = c.read(a, source), c.read(b, source)
    third = c.read(rest[0], "pred") if rest else ""
    if source.endswith("x2"):
        one = {"f16x2": "0x3c00u", "bf16x2": "0x3f80u"}.get(to, "0xffffu")
        low, high = (
            _combine(c, _compare(c, source, f"(u16)({x}{half})", f"(u16)({y}{half})"), third) for half in ("", " >> 16")
        )
        return c.write(d, "b32", f"({low} ? {one} : 0u) | ({high} ? {one} << 16 : 0u)")
    c_type = C_TYPES[to]
    one = {"f32": "1.f", "f16": "(u16)0x3c00", "bf16": "(u16)0x3f80"}.get(to, f"({c_type})-1")
    return c.write(d, to, f"({_combine(c, _compare(c, source, x, y), third)} ? {one} : ({c_type})0)")


@instruction("selp")
def _selp(c: Context) -> str:
    d, a, b, predicate = c.args
    c.step.may_hold_tokens = True
    destination = c.register(d)
    for operand in (a, b):
        source = c.register(operand)
        if destination and source:
            c.copies.append((destination[0], source[0]))
    return c.write(d, c.type, f"({c.read(predicate, 'pred')} ? {c.read(a, c.type)} : {c.read(b, c.type)})")


@instruction("slct", modifiers="ftz")
def _slct(c: Context) -> str:
    d, a, b, sign = c.args
    to, source = c.types
    return c.write(d, to, f"({c.read(sign, source)} >= 0 ? {c.read(a, to)} : {c.read(b, to)})")


# ---- control flow
@instruction("bra", modifiers="uni")
def _bra(c: Context) -> str:
    c.step.targets, c.step.falls_through = [c.label(c.args[0])], bool(c.inst.predicate)
    return f"goto {c.step.targets[0]};"


@instruction("brx", modifiers="idx uni")
def _brx(c: Context) -> str:
    index, table = c.args
    c.step.targets = [c.label(name) for name in c.function.targets[table]]
    c.step.falls_through = False
    cases = " ".join(f"case {i}: goto {label};" for i, label in enumerate(c.step.targets))
    return f'switch ({c.read(index, "u32")}) {{ {cases} default: fault(t, "brx.idx out of range"); }}'


@instruction("ret", "exit", modifiers="uni")
def _ret(c: Context) -> str:
    c.step.falls_through = bool(c.inst.predicate)
    if c.root == "exit" and c.function.kind == "func":
        c.error("exit inside a .func is not supported")
    return "return;"


@instruction("trap")
def _trap(c: Context) -> str:
    return 'fault(t, "trap");'


@instruction("call", modifiers="uni")
def _call(c: Context) -> str:
    args = list(c.args)
    results = split_args(args.pop(0)[1:-1]) if args[0].startswith("(") else []
    name = args.pop(0)
    operands = results + (split_args(args.pop(0)[1:-1]) if args else [])
    if c.register(name):
        c.error("indirect calls are not supported")
    places = []
    for operand in operands:
        variable = c.variable(operand)
        if variable is None:
            c.error(f"argument {operand} is not a .param variable")
        places.append(variable[0])
    if name == "vprintf":
        result, text, values = places
        return f"wr<s32>({result}, device_printf(t, rd<u64>({text}), rd<u64>({values})));"
    if name == "__assertfail":
        text, file, line = (f"rd<u64>({place})" for place in places[:3])
        line = f"rd<u32>({places[2]})"
        return f'fault(t, "assertion failed: %s (%s:%u)", (const char *){text}, (const char *){file}, {line});'
    if name not in c.functions:
        c.error("call of a function with no body in this module")
    return f"{c.functions[name]}({', '.join(['t', *places])});"


# ---- instructions without an effect here
@instruction("brkpt", "nop", "pmevent", "griddepcontrol", modifiers="mask wait launch_dependents")
def _nop(c: Context) -> str:
    """griddepcontrol: launches run one after the other, so that a missing griddepcontrol.wait is not seen."""
    return ";"


@instruction("setmaxnreg", modifiers="inc dec sync aligned")
def _setmaxnreg(c: Context) -> str:
    return ";"


@instruction("nanosleep")
def _nanosleep(c: Context) -> str:
    return "polling_yield(t);"
