"""What the compiler made of the CUDA kernels: checks the machine code in a built module, and the log of its build.

    python bench/check_sass.py build/gpu-suite/site/qwen_sparse/_C*.so --build-log build/gpu-suite/build.log

ptxas's report (make resources) speaks of PTX compiled for the occasion; this reads what will run. The exit status is 1
if a family of kernels is missing or breaks a rule: no local memory (LDL, STL: spilled registers, or an array that is
indexed at run time); Hopper prefill multiplies with wgmma and copies with TMA, and ptxas did not serialise its wgmma.
Needs cuobjdump and nvdisasm of the CUDA toolkit, and c++filt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REQUIRED = ("sm80::prefill", "sm80::select", "sm80::select_groups", "sm80::decode")
"""Families that every build has, for all of ARCHITECTURES; others are checked where a module has them, or where
--require names them."""
ARCHITECTURES = ("sm_80", "sm_90")
"""A Hopper GPU would compile what is there for sm_80 only when a process first runs it, which takes seconds."""
FAMILY = re.compile(r"qwen_sparse::(sm\d+::(?:prefill|select|select_groups|decode))::")
LOCAL_MEMORY = ("LDL", "STL")
HOPPER_PREFILL = ("HGMMA", "UTMALDG")
SERIALISED = re.compile(r"\((C75\d\d)\)")  # ptxas: wgmma is serialised, or setmaxnreg ignored
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
COMPILED = re.compile(r"Building CUDA object (\S+)")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    architecture: str
    instructions: Counter[str] = field(default_factory=Counter)
    """By operation, without modifiers: LDG.E.128 counts as LDG."""

    @property
    def family(self) -> str | None:
        """Such as sm80::prefill; None for kernels that no rule is about."""
        found = FAMILY.search(self.name)
        return found[1] if found else None


def kernels_of(dump: Iterable[str]) -> list[Kernel]:
    """The kernels in the output of ``cuobjdump --dump-sass``, with mangled names."""
    kernels: list[Kernel] = []
    architecture = "unknown"
    for line in dump:
        if found := re.match(r"\s*code for (sm_\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernels.append(Kernel(found[1], architecture))
        elif kernels and (found := INSTRUCTION.match(line)):
            kernels[-1].instructions[found[1]] += 1
    return kernels


def serialised(log: Iterable[str]) -> dict[str, set[str]]:
    """By object file that a build's log has compiled, ptxas's warnings about wgmma in its last compilation."""
    warnings: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in log:
        if found := COMPILED.search(line):
            current = warnings[found[1]] = set()
        current.update(SERIALISED.findall(line))
    return warnings


def faults(
    kernels: Iterable[Kernel], warnings: dict[str, set[str]], required: Iterable[str] = REQUIRED
) -> Iterator[str]:
    """One line for each rule that is broken."""
    kernels = list(kernels)
    for family in required:
        there = {kernel.architecture for kernel in kernels if kernel.family == family}
        if not there:
            yield f"{family}: the module has no such kernel"
        elif family in REQUIRED:
            yield from (
                f"{family}: not for {architecture}" for architecture in ARCHITECTURES if architecture not in there
            )
    for kernel in kernels:
        if kernel.family is None:
            continue
        where = f"{kernel.name} ({kernel.architecture})"
        for operation in LOCAL_MEMORY:
            if count := kernel.instructions[operation]:
                yield f"{where}: {count} {operation} (local memory)"
        if kernel.family == "sm90::prefill":
            for operation in HOPPER_PREFILL:
                if not kernel.instructions[operation]:
                    yield f"{where}: no {operation}"
    hopper = {name: codes for name, codes in warnings.items() if "sm90" in name}
    if any(kernel.family == "sm90::prefill" for kernel in kernels) and not hopper:
        yield "the module has sm90 kernels that the build log does not compile: remove the build folder, build anew"
    for name, codes in hopper.items():
        for code in sorted(codes):
            yield f"{name}: ptxas warned of serialised wgmma ({code})"


def dumped(module: Path, cuobjdump: str) -> list[Kernel]:
    """The kernels of a module, demangled."""
    with subprocess.Popen([cuobjdump, "--dump-sass", str(module)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kernels = kernels_of(process.stdout)
    if process.returncode != 0:
        raise RuntimeError(f"{cuobjdump} --dump-sass {module}: exit status {process.returncode}")
    names = "\n".join(kernel.name for kernel in kernels)
    demangled = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True, check=True).stdout
    for kernel, name in zip(kernels, demangled.splitlines(), strict=True):
        kernel.name = name.replace("(anonymous namespace)::", "")
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path, help="the extension, or any object file with kernels")
    parser.add_argument("--build-log", type=Path, required=True, help="output of its build, of ninja and nvcc")
    parser.add_argument("--cuobjdump", default="cuobjdump", help="the program (default: the one on the path)")
    parser.add_argument("--require", nargs="+", default=[], help="families besides those of every build")
    arguments = parser.parse_args()
    kernels = dumped(arguments.module, arguments.cuobjdump)
    for (architecture, family), count in sorted(
        Counter((kernel.architecture, kernel.family or "others") for kernel in kernels).items()
    ):
        print(f"{architecture:8}  {family:20}  {count:4} kernels")
    with arguments.build_log.open(errors="replace") as log:
        broken = list(faults(kernels, serialised(log), [*REQUIRED, *arguments.require]))
    for fault in broken:
        print(fault, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
