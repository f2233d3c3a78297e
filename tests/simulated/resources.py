"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

    python -m simulated.resources

The exit status is 1 if an attention, selection or decode kernel spills registers, or if ptxas warns of one for Hopper:
that its wgmma instructions are serialised, or its setmaxnreg ignored.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import ptx_files

MAIN_KERNELS = re.compile(r"sm\d+::(prefill|select|select_groups|decode)::")


@dataclass(frozen=True)
class Resources:
    """One kernel's."""

    kernel: str
    architecture: str
    registers: int
    shared_memory: int
    """Static, bytes."""
    stack: int
    spills: int
    """Bytes stored and loaded."""
    warnings: tuple[str, ...]
    """Codes of ptxas, such as C7510."""


def _demangled(names: list[str]) -> list[str]:
    result = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|qwen_sparse::|__nv_", "", name) for name in result.stdout.splitlines()]


def report(ptx: Path, architecture: str) -> Iterator[Resources]:
    """What ptxas says of the kernels of one file."""
    command = ["ptxas", "-v", f"-arch={architecture}", str(ptx), "-o", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entries = re.split(r"Compiling entry function '", text)[1:]
    mangled = [entry.split("'", 1)[0] for entry in entries]
    warnings = re.findall(r"\((C75\d\d)\).*?in (?:the )?function '(\w+)'", text)
    for symbol, name, entry in zip(mangled, _demangled(mangled), entries, strict=True):

        def number(pattern: str, entry: str = entry) -> int:
            return sum(int(value) for value in re.findall(pattern, entry))

        yield Resources(
            kernel=name,
            architecture=architecture,
            registers=number(r"Used (\d+) registers"),
            shared_memory=number(r"(\d+) bytes smem"),
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill"),
            warnings=tuple(code for code, function in warnings if function == symbol),
        )


def main() -> int:
    machine_code = {"80": ("sm_80", "sm_90"), "90a": ("sm_90a",)}  # as cmake/cuda.cmake makes of each
    found = (
        entry
        for arch, files in ptx_files().items()
        for ptx in files
        for architecture in machine_code[arch]
        for entry in report(ptx, architecture)
    )
    kernels = sorted(found, key=lambda entry: (entry.kernel, entry.architecture))
    print("architecture  registers  static shared  stack  spills  kernel")
    for entry in kernels:
        numbers = f"{entry.registers:9}  {entry.shared_memory:13}  {entry.stack:5}  {entry.spills:6}"
        print(f"{entry.architecture:12}  {numbers}  {entry.kernel}")
    wrong = [entry for entry in kernels if (entry.spills and MAIN_KERNELS.search(entry.kernel)) or entry.warnings]
    for entry in wrong:
        print(
            f"spills {entry.spills} bytes, warnings {entry.warnings}: {entry.kernel} ({entry.architecture})",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
