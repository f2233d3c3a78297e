"""Every instruction form the simulator claims, against ptxas (is it PTX?), the translator and g++."""
import shutil
import subprocess

import pytest
from ptxsim.build import CXX, CXXFLAGS, HERE
from ptxsim.ptxparse import PtxError
from ptxsim.translate import OPS, translate

pytestmark = pytest.mark.ptxsim
FORMS = [l for l in (HERE / 'coverage.ptx.txt').read_text().splitlines() if l and l[0] != '#']
HEAD = '''.version 8.6
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 sm[];
.global .align 4 .u32 gv;
.const .align 4 .f32 cv[4] = {0f3F800000, 1.5, 2.0, 3.0};
'''
REGS = '''  .reg .pred p<4>; .reg .b16 h<8>; .reg .b32 r<8>; .reg .b64 l<8>; .reg .f32 f<8>; .reg .f64 d<4>;
'''


def kernel(name, insts):
    return f'.visible .entry {name}(.param .u64 arg)\n.maxntid 128, 1, 1\n{{\n{REGS}' + '\n'.join(f'  {i};' for i in insts) + '\n  ret;\n}\n'


def test_forms_translate(tmp_path):
    bad = []
    for i in FORMS:
        try:
            translate(HEAD + kernel('k', [i]), 'x.ptx')
        except PtxError as e:
            bad.append(str(e))
    assert not bad, '\n'.join(bad)
    src = tmp_path / 'all.cpp'
    src.write_text(translate(HEAD + ''.join(kernel(f'k{n}', [i]) for n, i in enumerate(FORMS)), 'x.ptx'))
    r = subprocess.run([CXX, *CXXFLAGS, '-O0', '-w', '-I', str(HERE), '-c', str(src), '-o', str(tmp_path / 'all.o')], capture_output=True, text=True)
    assert not r.returncode, r.stderr[:4000]


@pytest.mark.skipif(not shutil.which('ptxas'), reason='no ptxas')
def test_forms_are_ptx(tmp_path):
    f = tmp_path / 'all.ptx'
    f.write_text(HEAD + ''.join(kernel(f'k{n}', [i]) for n, i in enumerate(FORMS)))
    r = subprocess.run(['ptxas', '-arch=sm_90a', str(f), '-o', str(tmp_path / 'a.cubin')], capture_output=True, text=True)
    lines = f.read_text().splitlines()
    errs = [l + '   <- ' + lines[int(l.split('line ')[1].split(';')[0].split(',')[0]) - 1] for l in r.stderr.splitlines() if 'error' in l and 'line ' in l]
    assert not r.returncode, '\n'.join(errs) or r.stderr[:3000]


@pytest.mark.parametrize('inst,msg', [('frob.u32 r0, r1', 'line 11: unknown instruction: "frob.u32 r0, r1"'), ('add.u32 r0, zz, r1', 'unknown operand zz'), ('bra NOWHERE', 'unknown label')])
def test_errors_name_the_line(inst, msg):
    with pytest.raises(PtxError, match=msg.replace('(', r'\(')):
        translate(HEAD + kernel('k', [inst]), 'x.ptx')
