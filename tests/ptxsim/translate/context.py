"""What instruction handlers work with: the registry, and the operands of the function that is being translated.

A handler is a function registered with ``@instruction("root", ...)``, keyed by the opcode before its first dot. It gets
a Context and returns C++ statements. Operands are read with ``c.read(operand, ptx_type)`` and written with
``c.write(operand, ptx_type, expression)``, which also record uses and definitions for the liveness analysis of wgmma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from ..ptxparse import SIZES, Function, Instruction, Label, Module, PtxError, Variable, split_args

C_TYPES = {
    "pred": "bool",
    **dict.fromkeys(("b8", "u8"), "u8"),
    **dict.fromkeys(("b16", "u16", "f16", "bf16"), "u16"),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2", "tf32"), "u32"),
    **dict.fromkeys(("b64", "u64"), "u64"),
    **{name: name for name in ("s8", "s16", "s32", "s64", "f32", "f64")},
    "b128": "u128",
}
"""The C++ type of an expression of a PTX type; 16-bit floats are held as their bits."""

STORAGE = {"pred": "bool", "f32": "f32", "f64": "f64"}
STORAGE_BY_SIZE = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "u128"}
FLOATS = ("f32", "f64")
HALVES = {"f16": ("h2f", "f2h"), "bf16": ("b2f", "f2b"), "f16x2": ("h2f", "f2h"), "bf16x2": ("b2f", "f2b")}
"""16-bit float types, with the functions that decode to f32 and encode."""

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "u64": "b128", "s64": "b128"}
ROUNDINGS = {
    **{name: name.upper() for name in ("rn", "rz", "rm", "rp", "rna")},
    **{f"{name}i": name.upper() for name in ("rn", "rz", "rm", "rp")},
}
FP8_PAIRS = ("e4m3x2", "e5m2x2")

# Groups of modifiers for the registry.
SPACES = "global shared shared::cta shared::cluster local param param::entry param::func const"
CACHING = "ca cg cs cv lu wb wt nc L1::[a-z_]+ L2::evict_[a-z]+ L2::cache_hint L2::64B L2::128B L2::256B"
ORDER = "weak volatile relaxed acquire release acq_rel sc mmio cta cluster gpu sys"
VECTORS = "v2 v4 v8"


def _special_registers() -> dict[str, str]:
    table = {
        "%laneid": "t.lane",
        "%warpid": "t.warp",
        "%nwarpid": "((t.ntid[0] * t.ntid[1] * t.ntid[2] + 31) / 32)",
        "%smid": "0u",
        "%nsmid": "sm_count()",
        "%gridid": "1u",
        "%clock": "(u32)clock64(t)",
        "%clock_hi": "(u32)(clock64(t) >> 32)",
        "%clock64": "clock64(t)",
        "%globaltimer": "clock64(t)",
        "%globaltimer_lo": "(u32)clock64(t)",
        "%cluster_ctarank": "t.cluster_rank",
        "%cluster_nctarank": "t.cluster_size",
        "%is_explicit_cluster": "(t.cluster_size > 1)",
        "%lanemask_eq": "(1u << t.lane)",
        "%lanemask_lt": "((1u << t.lane) - 1)",
        "%lanemask_le": "((2u << t.lane) - 1)",
        "%lanemask_gt": "~((2u << t.lane) - 1)",
        "%lanemask_ge": "~((1u << t.lane) - 1)",
        "%dynamic_smem_size": "t.dyn_smem",
        "%total_smem_size": "(t.smem_end - SMEM_BASE)",
    }
    for index, axis in enumerate("xyz"):
        for name in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid"):
            table[f"%{name}.{axis}"] = f"t.{name}[{index}]"
        table[f"%clusterid.{axis}"] = f"(t.ctaid[{index}] / t.cluster_nctaid[{index}])"
        table[f"%nclusterid.{axis}"] = f"(t.nctaid[{index}] / t.cluster_nctaid[{index}])"
    return table


SPECIAL_REGISTERS = _special_registers()

Handler = Callable[["Context"], str]
_handlers: dict[tuple[str, str], tuple[Handler, re.Pattern[str]]] = {}


def instruction(*roots: str, modifiers: str = "", domain: str = "") -> Callable[[Handler], Handler]:
    """Registers a handler.

    ``modifiers`` are the ones it takes besides type names, as regular expressions; any other is a translate-time error,
    so that a variant with another meaning is never run as the plain one. ``domain`` restricts the handler to "integer"
    or "float" instructions, by the last type of the opcode.
    """
    pattern = re.compile("|".join(modifiers.split()) or "(?!)")

    def register(handler: Handler) -> Handler:
        for root in roots:
            for key in [domain] if domain else ["integer", "float"]:
                _handlers[root, key] = handler, pattern
        return handler

    return register


def c_name(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


def is_float(ptx_type: str) -> bool:
    return ptx_type in HALVES or ptx_type in FLOATS or ptx_type == "tf32"


class SharedLayout:
    """Where the static shared variables of one kernel lie; extern [] arrays follow the static ones."""

    def __init__(self, base: SharedLayout | None = None) -> None:
        self.offsets: dict[str, int] = dict(base.offsets) if base else {}
        self.end: int = base.end if base else 0
        self.dynamic_align: int = base.dynamic_align if base else 16

    def offset(self, name: str, variable: Variable) -> str:
        if variable.extern or variable.size == 0:
            self.dynamic_align = max(self.dynamic_align, variable.align)
            return "DYN_SMEM"
        if name not in self.offsets:
            self.end = (self.end + variable.align - 1) // variable.align * variable.align
            self.offsets[name] = self.end
            self.end += variable.size
        return f"(u64)(SMEM_BASE + {self.offsets[name]})"


@dataclass
class Step:
    """What the analysis of wgmma needs to know of one item of a function's body."""

    label: str = ""
    line: int = 0
    condition: str = ""  # C++ expression of the predicate
    uses: set[str] = field(default_factory=set)
    defs: set[str] = field(default_factory=set)
    guarded: bool = False
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True
    is_wgmma_wait: bool = False
    may_hold_tokens: bool = False  # moves or issues wgmma: may read results that are not there yet


class Context:
    """A function while it is translated; one instruction is current at a time."""

    def __init__(self, module: Module, function: Function, index: int, shared: SharedLayout, functions: dict[str, str]):
        self.module, self.function, self.index = module, function, index
        self.shared, self.functions = shared, functions
        self.param_offsets: list[int] = []
        self.constants: list[str] = []  # emitted before the function
        self.wgmma_results: set[str] = set()
        self.copies: list[tuple[str, str]] = []  # (destination, source) of register moves
        self.labels = {(item.scope, item.name): item for item in function.body or [] if isinstance(item, Label)}
        self.inst = Instruction(0, "", False, "", [], 0)
        self.step = Step()

    def translate(self, item: Instruction) -> tuple[str, Step]:
        """C++ of one instruction, without its predicate and line number."""
        self.inst, self.step = item, Step(guarded=bool(item.predicate))
        root = self.root
        found = _handlers.get((root, "float" if self.types and is_float(self.types[-1]) else "integer"))
        if found is None:
            self.error("unknown instruction")
        handler, pattern = found
        for modifier in self.modifiers:
            if modifier not in C_TYPES and modifier not in FP8_PAIRS and not pattern.fullmatch(modifier):
                self.error(f"modifier .{modifier} is not supported")
        try:
            code = handler(self)
        except PtxError:
            raise
        except Exception as error:
            self.error(f"cannot translate ({type(error).__name__}: {error})")
        if item.predicate:
            self.step.condition = self.read(("!" if item.negated else "") + item.predicate, "pred")
        return code, self.step

    def error(self, message: str) -> NoReturn:
        item = self.inst
        raise PtxError(f'{self.function.name}: line {item.line}: {message}: "{item.op} {", ".join(item.args)}"')

    # ---- opcode
    @property
    def root(self) -> str:
        return self.inst.op.split(".")[0]

    @property
    def args(self) -> list[str]:
        return self.inst.args

    @property
    def modifiers(self) -> list[str]:
        return self.inst.op.split(".")[1:]

    @property
    def types(self) -> list[str]:
        return [modifier for modifier in self.modifiers if modifier in C_TYPES]

    @property
    def type(self) -> str:
        """The last type of the opcode."""
        return self.types[-1]

    def has(self, *names: str) -> bool:
        return any(name in self.modifiers for name in names)

    def one_of(self, *names: str) -> str:
        """The modifier among names; an error without one."""
        return next((name for name in self.modifiers if name in names), "") or self.error(f"needs one of {names}")

    def flag(self, *names: str) -> str:
        """C++ true or false: whether one of the modifiers is there."""
        return "true" if self.has(*names) else "false"

    @property
    def rounding(self) -> str:
        """Rnd enumerator of the rounding modifier, or an empty string."""
        return next((ROUNDINGS[modifier] for modifier in self.modifiers if modifier in ROUNDINGS), "")

    @property
    def space(self) -> str:
        """State space of the opcode, without ::cta and ::cluster; "generic" without one."""
        for modifier in self.modifiers:
            name = modifier.split("::")[0]
            if name in ("global", "shared", "local", "param", "const"):
                return name
        return "generic"

    def rendezvous(self, name: str) -> str:
        """Which executions belong together: those of one line for .aligned instructions, else those of one kind."""
        line = self.inst.line if self.has("aligned") else 0x80000000 + sum(map(ord, name))
        return f"0x{line:x}u"

    # ---- names
    def _visible(self, table: Mapping[tuple[int, str], object], name: str) -> int | None:
        """The innermost scope around the instruction that declares name in table."""
        scope = self.inst.scope
        while scope >= 0:
            if (scope, name) in table:
                return scope
            scope = self.function.scopes[scope]
        return None

    def register(self, name: str) -> tuple[str, str] | None:
        """(C++ name, PTX type) of a register, or None."""
        scope = self._visible(self.function.registers, name)
        return None if scope is None else (register_name(scope, name), self.function.registers[scope, name])

    def variable(self, name: str) -> tuple[str, Variable] | None:
        """(C++ name, declaration) of a variable of the function, or None."""
        scope = self._visible(self.function.variables, name)
        return None if scope is None else (variable_name(scope, name), self.function.variables[scope, name])

    def label(self, name: str) -> str:
        scope = self._visible(self.labels, name)
        if scope is None:
            self.error(f"unknown label {name}")
        return label_name(scope, name)

    def symbol(self, name: str) -> str | None:
        """Address (u64) of a variable, possibly with an offset; None if there is none of that name."""
        if match := re.match(r"generic\((.*)\)$", name):
            return self.symbol(match.group(1))
        if match := re.match(r"([\w$.%]+)\s*\+\s*(-?\d+)$", name):
            base = self.symbol(match.group(1))
            return base and f"({base} + {match.group(2)})"
        if local := self.variable(name):
            return self.shared.offset(name, local[1]) if local[1].space == "shared" else f"(u64){local[0]}"
        for position, parameter in enumerate(self.function.params):
            if parameter.name == name:
                if self.function.kind == "entry":
                    return f"((u64)t.params + {self.param_offsets[position]})"
                return f"(u64)P_{c_name(name)}"
        if any(result.name == name for result in self.function.results):
            return f"(u64)P_{c_name(name)}"
        variable = self.module.variables.get(name)
        if variable is None:
            return None
        if variable.space == "shared":
            return self.shared.offset(name, variable)
        if variable.extern:
            self.error(f"extern variable {name} is not defined in this module")
        return f"(u64)G_{c_name(name)}"

    # ---- operands
    def read(self, operand: str, ptx_type: str) -> str:
        """Expression of C++ type C_TYPES[ptx_type]."""
        c_type = C_TYPES[ptx_type]
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], ptx_type)}"
        if operand.startswith("{"):
            return self._read_packed(split_args(operand[1:-1]), ptx_type)
        if register := self.register(operand):
            return self._read_register(operand, *register, ptx_type)
        if re.match(r"[-+]?0[fF][0-9a-fA-F]{8}$", operand):
            bits = f"0x{int(operand[-8:], 16):08x}u"
            return {"f32": f"bc<f32>({bits})", "f64": f"(f64)bc<f32>({bits})"}.get(c_type, f"({c_type}){bits}")
        if re.match(r"[-+]?0[dD][0-9a-fA-F]{16}$", operand):
            bits = f"0x{int(operand[-16:], 16):016x}ull"
            return {"f32": f"(f32)bc<f64>({bits})", "f64": f"bc<f64>({bits})"}.get(c_type, f"({c_type}){bits}")
        if match := re.match(r"([-+~]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$", operand):
            sign, digits = match.groups()
            value = int(digits, 8 if re.match(r"0[0-7]+$", digits) else 0)
            value = {"-": -value, "~": ~value}.get(sign, value)
            if ptx_type == "pred":
                return "true" if value else "false"
            return f"({c_type}){value}" if c_type in FLOATS else f"({c_type})0x{value & (1 << 64) - 1:x}ull"
        if re.match(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$", operand):
            return f"({c_type}){operand}"
        if operand in SPECIAL_REGISTERS:
            return f"({c_type})({SPECIAL_REGISTERS[operand]})"
        if operand == "WARP_SZ":
            return f"({c_type})32"
        if address := self.symbol(operand):
            return f"({c_type})({address})"
        self.error(f"unknown operand {operand}")

    def _read_packed(self, parts: list[str], ptx_type: str) -> str:
        c_type, width = C_TYPES[ptx_type], SIZES[ptx_type] * 8 // len(parts)
        bits = f"u{SIZES[ptx_type] * 8}"
        terms = [f"({bits}){self.read(part, f'b{width}')} << {i * width}" for i, part in enumerate(parts)]
        packed = " | ".join(terms)
        return f"bc<{c_type}>(({bits})({packed}))" if c_type in FLOATS else f"({c_type})({packed})"

    def _read_register(self, operand: str, name: str, declared: str, ptx_type: str) -> str:
        self.step.uses.add(name)
        c_type, storage = C_TYPES[ptx_type], storage_type(declared)
        if storage == c_type:
            return name
        if c_type not in FLOATS and storage not in FLOATS:
            return f"({c_type}){name}"
        if SIZES[declared] == SIZES[ptx_type]:
            return f"bc<{c_type}>({name})"
        if storage in FLOATS:
            self.error(f"operand {operand} of type .{declared} used as .{ptx_type}")
        return f"bc<{c_type}>((u{SIZES[ptx_type] * 8}){name})"

    def write(self, operand: str, ptx_type: str, expression: str) -> str:
        """Statement that stores an expression of C++ type C_TYPES[ptx_type] in a register."""
        c_type = C_TYPES[ptx_type]
        if operand == "_":
            return f"(void)({expression});"
        if operand.startswith("{"):
            parts = split_args(operand[1:-1])
            width, bits = SIZES[ptx_type] * 8 // len(parts), f"u{SIZES[ptx_type] * 8}"
            source = f"bc<{bits}>({expression})" if c_type in FLOATS else f"({bits})({expression})"
            writes = [
                self.write(part, f"b{width}", f"(u{width})(x_ >> {i * width})")
                for i, part in enumerate(parts)
                if part != "_"
            ]
            return f"{{ {bits} x_ = {source}; {' '.join(writes)} }}"
        register = self.register(operand)
        if register is None:
            self.error(f"unknown destination {operand}")
        name, declared = register
        self.step.defs.add(name)
        storage = storage_type(declared)
        if storage == c_type:
            return f"{name} = {expression};"
        if storage not in FLOATS and c_type not in FLOATS:
            return f"{name} = ({storage})({c_type})({expression});"
        if SIZES[declared] == SIZES[ptx_type]:
            return f"{name} = bc<{storage}>({c_type}({expression}));"
        if storage in FLOATS:
            self.error(f"destination {operand} of type .{declared} written as .{ptx_type}")
        return f"{name} = bc<u{SIZES[ptx_type] * 8}>({c_type}({expression}));"

    def address(self, operand: str) -> str:
        """u64 expression of a [...] operand."""
        return self._address(operand)[0]

    def is_symbolic(self, operand: str) -> bool:
        """Whether a [...] operand names a variable, rather than a register or a number."""
        return self._address(operand)[1]

    def _address(self, operand: str) -> tuple[str, bool]:
        text = operand.strip()
        if not (text.startswith("[") and text.endswith("]")):
            self.error(f"expected an address, got {text}")
        text = text[1:-1].strip()
        match = re.match(r"(.+?)\s*\+\s*(-?\w+)$", text) or re.match(r"(.+?)\s*(-\d+)$", text)
        base, offset = (match.group(1), int(match.group(2), 0)) if match else (text, 0)
        if register := self.register(base):
            name, declared = register
            self.step.uses.add(name)
            if SIZES[declared] == 4:
                return (f"(u64)(u32)({name} + ({offset}))" if offset else f"(u64){name}"), False
            return (f"({name} + ({offset}ll))" if offset else name), False
        if re.match(r"\d", base):
            return f"{int(base, 0) + offset}ull", False
        symbol = self.symbol(base)
        if symbol is None:
            self.error(f"unknown address {text}")
        return (f"({symbol} + ({offset}))" if offset else symbol), True

    def constant(self, c_type: str, initialiser: str) -> str:
        """Name of a static constant, emitted before the function."""
        line = f"static const {c_type} %s = {initialiser};"
        if line not in self.constants:
            self.constants.append(line)
        return f"constant_{self.index}_{self.constants.index(line)}"

    def read_array(self, name: str, operand: str) -> str:
        """Declaration of u32 name[] with the registers of a {...} operand."""
        values = ", ".join(self.read(part, "b32") for part in vector(operand))
        return f"u32 {name}[] = {{{values}}};"

    def write_array(self, name: str, operand: str) -> str:
        """Statements that store u32 name[] in the registers of a {...} operand."""
        return " ".join(self.write(part, "b32", f"{name}[{i}]") for i, part in enumerate(vector(operand)))


def vector(operand: str) -> list[str]:
    """The elements of a {...} operand, or the operand itself."""
    return split_args(operand[1:-1]) if operand.startswith("{") else [operand]


def storage_type(ptx_type: str) -> str:
    """C++ type of a register."""
    return STORAGE.get(ptx_type) or STORAGE_BY_SIZE[SIZES[ptx_type]]


def _scoped(prefix: str, scope: int, name: str) -> str:
    return f"{prefix}_{c_name(name)}" + (f"_s{scope}" if scope else "")


def register_name(scope: int, name: str) -> str:
    return _scoped("v", scope, name)


def variable_name(scope: int, name: str) -> str:
    return _scoped("P", scope, name)


def label_name(scope: int, name: str) -> str:
    return f"L_{c_name(name)}_s{scope}"
