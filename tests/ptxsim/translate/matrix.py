"""Matrix instructions: ldmatrix, stmatrix, movmatrix, mma.sync and wgmma."""

from __future__ import annotations

import re

from .context import SPACES, Context, instruction, vector

ELEMENTS = {name: f"E_{name.upper()}" for name in ("f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "f32", "s32")}
SHAPE = r"m\d+n\d+k\d+"


def _elements(c: Context) -> list[str]:
    """Elt enumerators of the types of the opcode; fp8 types are not in Context.types."""
    return [ELEMENTS[name] for name in c.modifiers if name in ELEMENTS]


@instruction("ldmatrix", modifiers=f"sync aligned m8n8 x1 x2 x4 trans {SPACES}")
def _ldmatrix(c: Context) -> str:
    if c.types != ["b16"]:
        c.error("only .b16 is supported")
    d, count = c.args[0], len(vector(c.args[0]))
    call = f"ldmatrix(t, {c.rendezvous('')}, {count}, {c.flag('trans')}, {c.address(c.args[1])}, d_);"
    return f"{{ u32 d_[{count}]; {call} {c.write_array('d_', d)} }}"


@instruction("stmatrix", modifiers=f"sync aligned m8n8 x1 x2 x4 trans {SPACES}")
def _stmatrix(c: Context) -> str:
    if c.types != ["b16"]:
        c.error("only .b16 is supported")
    count = len(vector(c.args[1]))
    call = f"stmatrix(t, {c.rendezvous('')}, {count}, {c.flag('trans')}, {c.address(c.args[0])}, s_);"
    return f"{{ {c.read_array('s_', c.args[1])} {call} }}"


@instruction("movmatrix", modifiers="sync aligned m8n8 trans")
def _movmatrix(c: Context) -> str:
    d, a = c.args
    return f"{{ u32 d_ = movmatrix(t, {c.rendezvous('')}, {c.read(a, 'b32')}); {c.write(d, 'b32', 'd_')} }}"


@instruction("mma", modifiers=f"sync aligned row col satfinite e4m3 e5m2 {SHAPE}")
def _mma(c: Context) -> str:
    shape = re.search(r"\.m16n8k(\d+)\.row\.col", c.inst.op)
    elements = _elements(c)
    if shape is None or len(elements) != 4 or elements[0] != elements[3]:
        c.error("only dense m16n8kK.row.col with f16, bf16, tf32, e4m3, e5m2, s8 or u8 operands is supported")
    fields = f"16, 8, {shape.group(1)}, {elements[1]}, {elements[2]}, {elements[0]}, {c.flag('satfinite')}"
    spec = c.constant("MmaSpec", f"{{{fields}}}")
    d, a, b, accumulator = c.args
    arrays = f"{c.read_array('a_', a)} {c.read_array('b_', b)} {c.read_array('c_', accumulator)}"
    call = f"mma(t, {c.rendezvous('')}, {spec}, a_, b_, c_, d_);"
    return f"{{ {arrays} u32 d_[{len(vector(d))}]; {call} {c.write_array('d_', d)} }}"


WGMMA_WAIT = re.compile(r"@@WAIT (\S+) (.*?)@@")
"""Placeholder (rendezvous, groups) of a wait, which needs the live registers; filled in once the function is known."""


@instruction("wgmma", modifiers=f"sync aligned mma_async fence commit_group wait_group satfinite e4m3 e5m2 {SHAPE}")
def _wgmma(c: Context) -> str:
    key = c.rendezvous("")
    if c.has("fence"):
        return f"wgmma_fence(t, {key});"
    if c.has("commit_group"):
        return f"wgmma_commit(t, {key});"
    c.step.may_hold_tokens = True
    if c.has("wait_group"):
        c.step.is_wgmma_wait = True
        return f"@@WAIT {key} {c.read(c.args[0], 'u32')}@@"
    shape = re.search(r"\.m64n(\d+)k(\d+)", c.inst.op)
    elements = _elements(c)
    if shape is None or len(elements) != 3 or c.has("satfinite"):
        c.error("only dense wgmma.mma_async without .satfinite is supported")
    d, a, b = c.args[:3]
    from_registers = a.startswith("{")
    immediates = [int(operand) for operand in c.args[4:]]
    scale_a, scale_b, *transposes = immediates if len(immediates) >= 2 else (1, 1)
    transpose_a, transpose_b = [0] * (2 - len(transposes)) + list(transposes)  # A in registers has none
    fields = [*shape.groups(), elements[1], elements[2], elements[0], str(int(from_registers))]
    fields += [str(value) for value in (transpose_a, transpose_b, scale_a, scale_b)]
    spec = c.constant("WgmmaSpec", f"{{{', '.join(fields)}}}")
    array_a = c.read_array("a_", a) if from_registers else "const u32 *a_ = nullptr;"
    descriptors = f"{'0' if from_registers else c.read(a, 'b64')}, {c.read(b, 'b64')}"
    scale_d = c.read(c.args[3], "pred") if len(c.args) > 3 else "true"
    registers = vector(d)
    call = f"wgmma(t, {key}, {spec}, d_, {len(registers)}, a_, {descriptors}, {scale_d});"
    code = f"{{ {c.read_array('d_', d)} {array_a} {call} {c.write_array('d_', d)} }}"
    for name in registers:
        register = c.register(name)
        if register:
            c.wgmma_results.add(register[0])
    return code
