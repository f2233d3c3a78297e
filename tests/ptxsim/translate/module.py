"""Functions and modules: one C++ function per .entry and .func, and the tables that describe them to the runtime."""

from __future__ import annotations

import math
import re
import struct

from ..ptxparse import SIZES, Function, Label, Module, PtxError, Variable, parse, split_args
from .context import Context, SharedLayout, Step, c_name, label_name, register_name, storage_type, variable_name
from .matrix import WGMMA_WAIT

# Instructions that cannot fault, block or call need no line number.
PURE = set(
    """
    mov cvt cvta add sub mul div rem min max mad fma neg abs and or xor not shl shr setp selp lop3 prmt bfe bfi shf
    ex2 lg2 rcp sqrt rsqrt bra popc clz set slct ret
    """.split()  # noqa: SIM905
)


def _parameter_layout(function: Function) -> tuple[list[int], int]:
    """Offsets of a kernel's parameters, and their size in all."""
    offsets, end = [], 0
    for parameter in function.params:
        end = (end + parameter.align - 1) // parameter.align * parameter.align
        offsets.append(end)
        end += parameter.size
    return offsets, (end + 7) // 8 * 8


def _token_registers(c: Context) -> set[str]:
    """Registers that may hold results of a wgmma that is still running: its destinations and copies of them."""
    tokens = set(c.wgmma_results)
    while new := {destination for destination, source in c.copies if source in tokens} - tokens:
        tokens |= new
    return tokens


def _live_tokens(steps: list[Step], tokens: set[str]) -> dict[int, list[str]]:
    """For every wgmma.wait_group, the registers of tokens that are live after it."""
    bit = {name: 1 << i for i, name in enumerate(sorted(tokens))}

    def mask(names: set[str]) -> int:
        return sum(bit[name] for name in names if name in bit)

    count = len(steps)
    where = {step.label: i for i, step in enumerate(steps) if step.label}
    successors = [
        [where[label] for label in step.targets] + ([i + 1] if step.falls_through and i + 1 < count else [])
        for i, step in enumerate(steps)
    ]
    uses = [mask(step.uses) for step in steps]
    kills = [0 if step.guarded else mask(step.defs) for step in steps]
    live_in, live_out = [0] * count, [0] * count
    changed = True
    while changed:
        changed = False
        for i in range(count - 1, -1, -1):
            out = 0
            for successor in successors[i]:
                out |= live_in[successor]
            entering = uses[i] | (out & ~kills[i])
            if out != live_out[i] or entering != live_in[i]:
                live_out[i], live_in[i], changed = out, entering, True
    return {
        i: sorted(name for name in tokens if live_out[i] & bit[name])
        for i, step in enumerate(steps)
        if step.is_wgmma_wait
    }


def _resolve_wgmma(c: Context, lines: list[str], steps: list[Step]) -> None:
    """Fills in the waits, and checks the registers that instructions other than moves read.

    A wait replaces, in the registers that are live after it, what its operations have computed.
    """
    types = {register_name(scope, name): ptx_type for (scope, name), ptx_type in c.function.registers.items()}
    tokens = {name for name in _token_registers(c) if SIZES[types[name]] == 4}
    for i, live in _live_tokens(steps, tokens).items():
        values = ", ".join(f"bc<u32>({name})" for name in live) or "0"
        back = " ".join(f"{name} = bc<{storage_type(types[name])}>(w_[{k}]);" for k, name in enumerate(live))
        call = rf"wgmma_wait(t, \1, \2, w_, {len(live)});"
        lines[i] = WGMMA_WAIT.sub(f"{{ u32 w_[] = {{{values}}}; {call} {back} }}", lines[i])
    for i, step in enumerate(steps):
        if not step.may_hold_tokens:
            checks = [f"check_resolved(t, {step.line}, bc<u32>({name}));" for name in sorted(step.uses & tokens)]
            lines[i] = " ".join([*checks, lines[i]])


def _translate_body(c: Context) -> tuple[list[str], list[Step]]:
    lines: list[str] = []
    steps: list[Step] = []
    for item in c.function.body or []:
        if isinstance(item, Label):
            label = label_name(item.scope, item.name)
            lines.append(f"{label}: ;")
            steps.append(Step(label=label))
            continue
        code, step = c.translate(item)
        if c.root not in PURE:
            code = f"t.line = {item.line}; {code}"
        step.line = item.line
        lines.append(code)
        steps.append(step)
    return lines, steps


def _declarations(c: Context, lines: list[str], steps: list[Step]) -> list[str]:
    """C++ variables for the registers that are used, and for .local and .param variables."""
    used: set[str] = set().union(*(step.uses | step.defs for step in steps))
    names: dict[str, list[str]] = {}
    for (scope, name), ptx_type in c.function.registers.items():
        if register_name(scope, name) in used:
            names.setdefault(storage_type(ptx_type), []).append(f"{register_name(scope, name)} = {{}}")
    code = [f"  {c_type} {', '.join(group)};" for c_type, group in names.items()]
    for (scope, name), variable in c.function.variables.items():
        if variable.space in ("local", "param"):
            array = variable_name(scope, name)
            code.append(f"  alignas({max(variable.align, 8)}) u8 {array}[{max(variable.size, 1)}];")
            if variable.space == "local":
                code.append(f"  memset({array}, 0xff, sizeof {array});")
    if any("cc_" in line for line in lines):
        code.append("  bool cc_ = false;")
    return code


def _signature(function: Function, index: int, functions: dict[str, str]) -> str:
    if function.kind == "entry":
        return f"static void F{index}(Thread &t)"
    parameters = function.results + function.params
    if any(parameter.space == "reg" for parameter in parameters):
        raise PtxError(f"{function.name}: line {function.line}: .reg parameters are not supported")
    places = [f"u8 *P_{c_name(parameter.name)}" for parameter in parameters]
    return f"static void {functions[function.name]}({', '.join(['Thread &t', *places])})"


def _translate_function(c: Context, signature: str) -> str:
    c.param_offsets, _ = _parameter_layout(c.function)
    lines, steps = _translate_body(c)
    _resolve_wgmma(c, lines, steps)
    for i, step in enumerate(steps):
        if step.condition:
            lines[i] = f"if ({step.condition}) {{ {lines[i]} }}"
    constants = [line % f"constant_{c.index}_{i}" for i, line in enumerate(c.constants)]
    dynamic = "  const u64 DYN_SMEM = t.smem_end - t.dyn_smem; (void)DYN_SMEM;"
    body = [dynamic, *_declarations(c, lines, steps), *lines]
    return "\n".join([*constants, f"// {c.function.name}", f"{signature} {{", *body, "}"])


def _describe_kernel(function: Function, index: int, shared: SharedLayout, arch: int) -> str:
    offsets, size = _parameter_layout(function)
    pairs = zip(offsets, function.params, strict=True)
    parameters = ", ".join(f"{{{offset}, {parameter.size}}}" for offset, parameter in pairs) or "{0, 0}"
    limits = {name: math.prod(function.attributes.get(name, [0])) for name in ("maxntid", "reqntid")}
    cluster = [*function.attributes.get("reqnctapercluster", [0]), 1, 1][:3]
    fields = [f'"{function.name}"', "PTX_FILE", f"F{index}", f"p{index}", len(function.params), max(size, 8)]
    fields += [shared.end, shared.dynamic_align, limits["maxntid"], limits["reqntid"]]
    fields += ["{" + ", ".join(map(str, cluster)) + "}", arch]
    return (
        f"static const ParamInfo p{index}[] = {{{parameters}}};\n"
        f"static const KernelInfo k{index} = {{{', '.join(map(str, fields))}}};"
    )


def _define_variable(variable: Variable) -> tuple[str, list[str]]:
    """Definition of a .global or .const variable, and statements for initialisers that hold addresses."""
    size, width = max(variable.size, 1), SIZES[variable.type]
    name = f"G_{c_name(variable.name)}"
    definition = f"alignas({max(variable.align, 16)}) static u8 {name}[{size}]"
    if not variable.initialiser:
        return f"{definition};", []
    data, addresses = b"", []
    for position, value in enumerate(split_args(variable.initialiser.strip().strip("{}"))):
        symbol = re.match(r"(?:generic\()?([A-Za-z_$][\w$]*)\)?(?:\s*\+\s*(\d+))?$", value)
        if symbol and not re.match(r"0[fFdDxX]", value):
            target = f"(u64)G_{c_name(symbol.group(1))} + {symbol.group(2) or 0}"
            addresses.append(f"wr<u64>({name} + {position * width}, {target});")
            data += bytes(width)
        elif re.match(r"0[fFdD]", value):
            data += int(value[2:], 16).to_bytes(width, "little")
        elif "." in value:
            data += struct.pack("<f" if width == 4 else "<d", float(value))
        else:
            data += (int(value, 0) & (1 << 8 * width) - 1).to_bytes(width, "little")
    return f"{definition} = {{{','.join(map(str, data.ljust(size, bytes(1))))}}};", addresses


def _tables(module: Module, kernels: list[int], initialisers: list[str], entry: str) -> list[str]:
    """The Module, what loads it, and the __cudaRegisterFatBinary of its host code."""
    variables = [
        f'{{"{variable.name}", G_{c_name(variable.name)}, {max(variable.size, 1)}}}'
        for variable in module.variables.values()
        if variable.space in ("global", "const") and not variable.extern
    ]
    code = [
        f"const KernelInfo *const KERNELS[] = {{{', '.join(f'&k{index}' for index in kernels) or 'nullptr'}}};",
        f"const GlobalInfo GLOBALS[] = {{{', '.join(variables) or '{}'}}};",
        f"void init() {{ {' '.join(initialisers)} }}",
        f"Module module_ = {{KERNELS, {len(kernels)}, GLOBALS, {len(variables)}, init, false}};",
        "struct Load { Load() { load_module(module_); } } load_;",
        "}",
    ]
    if entry:
        code.append(
            f'extern "C" __attribute__((visibility("hidden"))) void **{entry}(void *) '
            "{ load_module(module_); return (void **)&module_; }"
        )
    return code


def translate(text: str, ptx_path: str, entry: str = "") -> str:
    """C++ source that loads a PTX module into the simulator.

    ``ptx_path`` is where reports look the PTX up; ``entry`` is the name under which host code registers the module.
    """
    module = parse(text)
    target = re.search(r"\d+", module.target)
    out = ['#include "runtime.hpp"', "using namespace ptxsim;", "namespace {", f'const char PTX_FILE[] = "{ptx_path}";']
    initialisers: list[str] = []
    for variable in module.variables.values():
        if variable.space in ("global", "const") and not variable.extern:
            definition, addresses = _define_variable(variable)
            out.append(definition)
            initialisers += addresses
    bodies = [function for function in module.functions if function.body is not None]
    functions = {f.name: f"F{i}_{c_name(f.name)}" for i, f in enumerate(bodies) if f.kind == "func"}
    out += [_signature(function, i, functions) + ";" for i, function in enumerate(bodies)]
    of_functions = SharedLayout()  # variables of device functions: the same place in every kernel
    infos, kernels = [], []
    for index, function in sorted(enumerate(bodies), key=lambda item: item[1].kind == "entry"):
        shared = SharedLayout(of_functions) if function.kind == "entry" else of_functions
        c = Context(module, function, index, shared, functions)
        out.append(_translate_function(c, _signature(function, index, functions)))
        if function.kind == "entry":
            infos.append(_describe_kernel(function, index, shared, int(target.group()) if target else 0))
            kernels.append(index)
    return "\n".join([*out, *infos, *_tables(module, kernels, initialisers, entry)]) + "\n"
