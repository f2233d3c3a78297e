"""Every instruction form the simulator claims, against ptxas (is it PTX?), the translator and g++."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ptxsim.build import CXX, CXXFLAGS, HERE
from ptxsim.ptxparse import PtxError
from ptxsim.translate import translate

pytestmark = pytest.mark.ptxsim

LINES = (HERE / "coverage.ptx.txt").read_text().splitlines()
FORMS = [line for line in LINES if line and not line.startswith("#")]
HEAD = """.version 8.6
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 sm[];
.global .align 4 .u32 gv;
.const .align 4 .f32 cv[4] = {0f3F800000, 1.5, 2.0, 3.0};
"""
REGISTERS = ".reg .pred p<4>; .reg .b16 h<8>; .reg .b32 r<8>; .reg .b64 l<8>; .reg .f32 f<8>; .reg .f64 d<4>;"


def kernel(name: str, instruction: str) -> str:
    return (
        f".visible .entry {name}(.param .u64 .ptr .align 1 arg)\n.maxntid 128, 1, 1\n"
        f"{{\n{REGISTERS}\n  {instruction};\n  ret;\n}}\n"
    )


def all_forms() -> str:
    return HEAD + "".join(kernel(f"k{number}", form) for number, form in enumerate(FORMS))


def test_forms_translate(tmp_path: Path) -> None:
    errors = []
    for form in FORMS:
        try:
            translate(HEAD + kernel("k", form), "x.ptx")
        except PtxError as error:
            errors.append(str(error))
    assert not errors, "\n".join(errors)
    source = tmp_path / "all.cpp"
    source.write_text(translate(all_forms(), "x.ptx"))
    command = [CXX, *CXXFLAGS, "-O0", "-w", "-I", HERE, "-c", source, "-o", tmp_path / "all.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not result.returncode, result.stderr[:4000]


@pytest.mark.skipif(not shutil.which("ptxas"), reason="ptxas is not on PATH")
def test_forms_are_ptx(tmp_path: Path) -> None:
    source = tmp_path / "all.ptx"
    source.write_text(all_forms())
    command = ["ptxas", "-arch=sm_90a", source, "-o", tmp_path / "all.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = source.read_text().splitlines()
    errors = [
        f"{message}   <- {lines[int(number) - 1]}" for message, number in re.findall(r"(.*line (\d+).*)", result.stderr)
    ]
    assert not result.returncode, "\n".join(errors) or result.stderr[:3000]


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("frob.u32 r0, r1", 'k: line 11: unknown instruction: "frob.u32 r0, r1"'),
        ("add.u32 r0, zz, r1", "unknown operand zz"),
        ("bra NOWHERE", "unknown label NOWHERE"),
        ("min.xorsign.abs.f32 f0, f1, f2", "modifier .xorsign is not supported"),
        ("cvt.rm.f16.f32 h0, f1", "only .rn and .rz round to 16-bit types"),
        ("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [r0], r1, [r2]", "modifier .async"),
        ("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {f0}, {r0}, {r1}, {f0}, r2, 0", "modifier .sp"),
    ],
)
def test_what_is_not_supported_is_an_error(instruction: str, message: str) -> None:
    with pytest.raises(PtxError, match=re.escape(message)):
        translate(HEAD + kernel("k", instruction), "x.ptx")
