"""Translates PTX to C++: one function per .entry/.func, executed per thread on a ptxsim::Thread.

Instructions are handled by functions registered with @op('root', ...), keyed by the text
before the first '.'.  A handler receives a Ctx and returns C++ statements; operands are
read with c.get(operand, ptx_type) and written with c.set(operand, ptx_type, expression),
which also records uses and definitions for the liveness analysis that wgmma needs.
"""
import re
import struct
from .ptxparse import Label, PtxError, SIZES, parse, split_args

CT = {'pred': 'bool', 'b8': 'u8', 'u8': 'u8', 's8': 's8', 'b16': 'u16', 'u16': 'u16', 's16': 's16', 'f16': 'u16', 'bf16': 'u16',
      'b32': 'u32', 'u32': 'u32', 's32': 's32', 'f32': 'f32', 'f16x2': 'u32', 'bf16x2': 'u32', 'tf32': 'u32',
      'b64': 'u64', 'u64': 'u64', 's64': 's64', 'f64': 'f64', 'b128': 'u128'}
STORE = {'pred': 'bool', 1: 'u8', 2: 'u16', 4: 'u32', 8: 'u64', 16: 'u128', 'f32': 'f32', 'f64': 'f64'}
FLOATS = ('f32', 'f64')
HALF = {'f16': ('h2f', 'f2h'), 'bf16': ('b2f', 'f2b'), 'f16x2': ('h2f', 'f2h'), 'bf16x2': ('b2f', 'f2b')}
WIDE = {'u16': 'u32', 's16': 's32', 'u32': 'u64', 's32': 's64', 'u64': 'b128', 's64': 'b128'}
ROUND = {'rn': 'RN', 'rz': 'RZ', 'rm': 'RM', 'rp': 'RP', 'rni': 'RN', 'rzi': 'RZ', 'rmi': 'RM', 'rpi': 'RP', 'rna': 'RNA'}
SREG = {**{f'%{r}.{d}': f't.{n}[{i}]' for r, n in [('tid', 'tid'), ('ntid', 'ntid'), ('ctaid', 'ctaid'), ('nctaid', 'nctaid'),
           ('cluster_ctaid', 'cluster_ctaid'), ('cluster_nctaid', 'cluster_nctaid')] for i, d in enumerate('xyz')},
        **{f'%clusterid.{d}': f'(t.ctaid[{i}] / t.cluster_nctaid[{i}])' for i, d in enumerate('xyz')},
        **{f'%nclusterid.{d}': f'(t.nctaid[{i}] / t.cluster_nctaid[{i}])' for i, d in enumerate('xyz')},
        '%laneid': 't.lane', '%warpid': 't.warp', '%nwarpid': '((t.ntid[0]*t.ntid[1]*t.ntid[2]+31)/32)', '%smid': '0u', '%nsmid': '132u',
        '%gridid': '1u', '%clock': '(u32)clock64(t)', '%clock_hi': '(u32)(clock64(t)>>32)', '%clock64': 'clock64(t)',
        '%globaltimer': 'clock64(t)', '%globaltimer_lo': '(u32)clock64(t)', '%cluster_ctarank': 't.cluster_rank',
        '%cluster_nctarank': 't.cluster_size', '%is_explicit_cluster': '(t.cluster_size > 1)', '%lanemask_eq': '(1u << t.lane)',
        '%lanemask_lt': '((1u << t.lane) - 1)', '%lanemask_le': '((2u << t.lane) - 1)', '%lanemask_gt': '~((2u << t.lane) - 1)',
        '%lanemask_ge': '~((1u << t.lane) - 1)', '%dynamic_smem_size': 't.dyn_smem', '%total_smem_size': '(t.smem_end - SMEM_BASE)'}
OPS = {}


def op(*roots):
    def reg(fn):
        for r in roots:
            OPS[r] = fn
        return fn
    return reg


def cname(s):
    return re.sub(r'\W', '_', s.lstrip('%'))


class Ctx:
    """State while one function is translated; one instruction is current at a time."""

    def __init__(self, mod, fn, smem, funcs):
        self.mod, self.fn, self.smem, self.funcs = mod, fn, smem, funcs
        self.waits = []          # indices of wgmma.wait_group instructions
        self.token_src = set()   # registers written by wgmma
        self.copies = []         # (dst, src) register moves
        self.specs = []          # static constants emitted before the function
        self.labels = {(i.scope, i.name) for i in fn.body if isinstance(i, Label)}
        self.info = []           # per body item: (uses, defs, guarded)

    # ---- names
    def _scoped(self, table, name):
        s = self.inst.scope
        while s >= 0:
            if (s, name) in table:
                return s
            s = self.fn.scopes[s]
        return None

    def err(self, msg):
        i = self.inst
        raise PtxError(f'{self.fn.name}: line {i.line}: {msg}: "{i.op} {", ".join(i.args)}"')

    def reg(self, name):
        """(C++ name, ptx type) or None."""
        s = self._scoped(self.fn.regs, name)
        return None if s is None else (f'v_{cname(name)}' + (f'_s{s}' if s else ''), self.fn.regs[s, name])

    def var(self, name):
        s = self._scoped(self.fn.vars, name)
        return None if s is None else (f'P_{cname(name)}' + (f'_s{s}' if s else ''), self.fn.vars[s, name])

    def label(self, name):
        s = self._scoped(self.labels, name)
        if s is None:
            self.err(f'unknown label {name}')
        return f'L_{cname(name)}_s{s}'

    # ---- operands
    def get(self, a, ty):
        ct = CT[ty]
        if a.startswith('!'):
            return f'!{self.get(a[1:], ty)}'
        if a.startswith('{'):
            parts = split_args(a[1:-1])
            w = SIZES[ty] // len(parts)
            e = ' | '.join(f'({ct if ct not in FLOATS else "u%d" % (SIZES[ty] * 8)}){self.get(p, f"b{w * 8}")} << {i * w * 8}' for i, p in enumerate(parts))
            return f'({ct})({e})' if ct not in FLOATS else f'bc<{ct}>({e})'
        r = self.reg(a)
        if r:
            name, rt = r
            self.uses.add(name)
            st = self.storage(rt)
            if st == ct:
                return name
            if ct in FLOATS or st in FLOATS:
                if SIZES[rt] != SIZES[ty]:
                    if st in FLOATS:
                        self.err(f'operand {a} of type .{rt} used as .{ty}')
                    return f'bc<{ct}>((u{SIZES[ty] * 8}){name})'
                return f'bc<{ct}>({name})'
            return f'({ct}){name}'
        if re.match(r'[-+]?0[fF][0-9a-fA-F]{8}$', a):
            v = int(a[-8:], 16)
            return f'bc<f32>(0x{v:08x}u)' if ct == 'f32' else f'({ct})bc<f32>(0x{v:08x}u)' if ct == 'f64' else f'({ct})0x{v:08x}u'
        if re.match(r'[-+]?0[dD][0-9a-fA-F]{16}$', a):
            v = int(a[-16:], 16)
            return f'(f32)bc<f64>(0x{v:016x}ull)' if ct == 'f32' else f'bc<f64>(0x{v:016x}ull)' if ct == 'f64' else f'({ct})0x{v:016x}ull'
        m = re.match(r'([-+~]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$', a)
        if m:
            v = int(m.group(2), 8 if re.match(r'0[0-7]+$', m.group(2)) else 0)
            v = -v if m.group(1) == '-' else ~v if m.group(1) == '~' else v
            if ty == 'pred':
                return 'true' if v else 'false'
            if ct in FLOATS:
                return f'({ct}){v}'
            return f'({ct})0x{v & (1 << 64) - 1:x}ull'
        if re.match(r'[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$', a):
            return f'({ct}){a}'
        if a in SREG:
            return f'({ct})({SREG[a]})'
        if a == 'WARP_SZ':
            return f'({ct})32'
        s = self.symbol(a)
        if s:
            return f'({ct})({s})'
        self.err(f'unknown operand {a}')

    def symbol(self, a):
        """Address expression (u64) of a variable, or None."""
        m = re.match(r'generic\((.*)\)$', a)
        if m:
            return self.symbol(m.group(1))
        m = re.match(r'([\w$.%]+)\s*\+\s*(-?\d+)$', a)
        if m:
            s = self.symbol(m.group(1))
            return s and f'({s} + {m.group(2)})'
        v = self.var(a)
        if v:
            name, var = v
            if var.space == 'shared':
                return self.smem.offset(a, var)
            return f'(u64){name}'
        for i, p in enumerate(self.fn.params):
            if p.name == a:
                return f'((u64)t.params + {self.param_offsets[i]})' if self.fn.kind == 'entry' else f'(u64)P_{cname(a)}'
        if any(p.name == a for p in self.fn.rets):
            return f'(u64)P_{cname(a)}'
        if a in self.mod.vars:
            var = self.mod.vars[a]
            if var.space == 'shared':
                return self.smem.offset(a, var)
            if var.extern:
                self.err(f'extern variable {a} is not defined in this module')
            return f'(u64)G_{cname(a)}'
        return None

    def storage(self, ty):
        return STORE.get(ty) or STORE[SIZES[ty]]

    def set(self, a, ty, expr):
        """Statement storing expr (of C++ type CT[ty]) in register a."""
        if a == '_':
            return f'(void)({expr});'
        if a.startswith('{'):
            parts = split_args(a[1:-1])
            w = SIZES[ty] // len(parts)
            u = f'u{SIZES[ty] * 8}'
            src = f'bc<{u}>({expr})' if CT[ty] in FLOATS else f'({u})({expr})'
            return f'{{ {u} x_ = {src}; ' + ' '.join(self.set(p, f'b{w * 8}', f'(u{w * 8})(x_ >> {i * w * 8})') for i, p in enumerate(parts) if p != '_') + ' }'
        r = self.reg(a)
        if not r:
            self.err(f'unknown destination {a}')
        name, rt = r
        self.defs.add(name)
        st, ct = self.storage(rt), CT[ty]
        if st == ct:
            return f'{name} = {expr};'
        if st in FLOATS or ct in FLOATS:
            if SIZES[rt] == SIZES[ty]:
                return f'{name} = bc<{st}>({ct}({expr}));'
            if st in FLOATS:
                self.err(f'destination {a} of type .{rt} written as .{ty}')
            return f'{name} = bc<u{SIZES[ty] * 8}>({ct}({expr}));'
        return f'{name} = ({st})({ct})({expr});'

    def addr(self, a):
        """(u64 expression, symbol name or None) of a [..] operand."""
        a = a.strip()
        if not (a.startswith('[') and a.endswith(']')):
            self.err(f'expected an address, got {a}')
        a = a[1:-1].strip()
        m = re.match(r'(.+?)\s*\+\s*(-?\w+)$', a) or re.match(r'(.+?)\s*(-\d+)$', a)
        base, off = (m.group(1), int(m.group(2), 0)) if m else (a, 0)
        r = self.reg(base)
        if r:
            self.uses.add(r[0])
            if SIZES[r[1]] == 4:
                return (f'(u64)(u32)({r[0]} + ({off}))' if off else f'(u64){r[0]}'), None
            return (f'({r[0]} + ({off}ll))' if off else r[0]), None
        if re.match(r'\d|0x', base):
            return f'{int(base, 0) + off}ull', None
        s = self.symbol(base)
        if not s:
            self.err(f'unknown address {a}')
        return (f'({s} + ({off}))' if off else s), base

    def spec(self, ctype, init):
        """A static constant; returns its name."""
        line = f'static const {ctype} %s = {init};'
        for i, l in enumerate(self.specs):
            if l == line:
                return f'spec_{self.index}_{i}'
        self.specs.append(line)
        return f'spec_{self.index}_{len(self.specs) - 1}'

    @property
    def mods(self):
        return self.inst.op.split('.')[1:]

    def has(self, *names):
        return any(n in self.mods for n in names)

    def types(self):
        return [m for m in self.mods if m in CT]

    def space(self, default='generic'):
        for m in self.mods:
            s = m.split('::')[0]
            if s in ('global', 'shared', 'local', 'param', 'const'):
                return s
        return default

    def key(self, name):
        """Rendezvous key: the source line for .aligned instructions, else the kind."""
        return f'{self.inst.line}u' if self.has('aligned') else f'0x{0x80000000 + sum(map(ord, name)):x}u'


# ================================================================ moves and conversions
@op('mov')
def _mov(c):
    ty, (d, s) = c.types()[-1], c.inst.args
    rd, rs = c.reg(d), c.reg(s)
    if rd and rs:
        c.copies.append((rd[0], rs[0]))
    if ty == 'pred':
        return c.set(d, 'pred', c.get(s, 'pred'))
    return c.set(d, ty, c.get(s, ty))


@op('cvta')
def _cvta(c):
    ty, (d, s) = c.types()[-1], c.inst.args
    v = c.get(s, 'u64')
    if c.space() == 'shared':
        v = f'{v} - SHARED_WINDOW' if c.has('to') else f'{v} + SHARED_WINDOW'
    return c.set(d, 'u64', v)


@op('isspacep')
def _isspacep(c):
    d, s = c.inst.args
    v = c.get(s, 'u64')
    e = {'shared': f'is_shared({v})', 'local': f'is_local(t, {v})', 'global': f'(!is_shared({v}) && !is_local(t, {v}))',
         'param': f'({v} - (u64)t.params < t.params_size)', 'const': 'false'}[c.space()]
    return c.set(d, 'pred', e)


@op('mapa')
def _mapa(c):
    d, a, r = c.inst.args
    ty = c.types()[-1]
    return c.set(d, ty, f'({CT[ty]})mapa(t, {c.get(a, ty)}, {c.get(r, "u32")}, {"false" if c.space() == "shared" else "true"})')


@op('getctarank')
def _getctarank(c):
    d, a = c.inst.args
    v = c.get(a, 'u64')
    return f'{{ u32 r_ = ({v} & 0xffffffff) >> 24; {c.set(d, "u32", "r_ ? r_ - 1 : t.cluster_rank")} }}'


@op('cvt')
def _cvt(c):
    args = c.inst.args
    tys = [m for m in c.mods if m in CT or m in ('e4m3x2', 'e5m2x2')]
    rnd = next((ROUND[m] for m in c.mods if m in ROUND), None)
    if c.has('pack'):                       # cvt.pack.sat.dt.st{.b32} d, a, b {, c}
        dt, st = tys[0], tys[1]
        if SIZES[dt] == 2:
            return c.set(args[0], 'b32', f'(u32)(u16)isat<{CT[dt]}>({c.get(args[1], st)}) << 16 | (u16)isat<{CT[dt]}>({c.get(args[2], st)})')
        e = f'(u32)(u8)isat<{CT[dt]}>({c.get(args[1], st)}) << 8 | (u8)isat<{CT[dt]}>({c.get(args[2], st)})'
        return c.set(args[0], 'b32', e + (f' | {c.get(args[3], "b32")} << 16' if len(args) > 3 else ''))
    dt, st = tys[0], tys[-1]
    relu = c.has('relu')
    if dt in ('f16x2', 'bf16x2') and st == 'f32':
        f = HALF[dt][1] + ('_rz' if rnd == 'RZ' else '')
        w = (lambda e: f'relu({e})') if relu else (lambda e: e)
        return c.set(args[0], dt, f'(u32){f}({w(c.get(args[1], "f32"))}) << 16 | {f}({w(c.get(args[2], "f32"))})')
    if dt in ('e4m3x2', 'e5m2x2'):
        e5 = 'true' if dt == 'e5m2x2' else 'false'
        if st == 'f32':
            hi, lo = c.get(args[1], 'f32'), c.get(args[2], 'f32')
        else:
            v, f = c.get(args[1], 'b32'), HALF[st][0]
            hi, lo = f'{f}({v} >> 16)', f'{f}((u16){v})'
        w = (lambda e: f'relu({e})') if relu else (lambda e: e)
        return c.set(args[0], 'b16', f'(u16)(f2fp8({w(hi)}, {e5}) << 8 | f2fp8({w(lo)}, {e5}))')
    if st in ('e4m3x2', 'e5m2x2'):
        e5, v = ('true' if st == 'e5m2x2' else 'false'), c.get(args[1], 'b16')
        return c.set(args[0], 'b32', f'(u32)f2h(fp82f({v} >> 8, {e5})) << 16 | f2h(fp82f((u8){v}, {e5}))')
    v = c.get(args[1], st)
    isf = lambda t: t in ('f16', 'bf16', 'f32', 'f64', 'tf32')
    if not isf(dt) and not isf(st):
        return c.set(args[0], dt, f'isat<{CT[dt]}>({v})' if c.has('sat') else f'({CT[dt]}){v}')
    if isf(st) and st in HALF:
        v = f'{HALF[st][0]}({v})'
    if c.has('ftz') and st == 'f32':
        v = f'ftz({v})'
    if not isf(dt):                          # float -> int
        return c.set(args[0], dt, f'f2i<{CT[dt]}>({v}, {rnd or "RZ"})')
    if not isf(st):                          # int -> float
        o = "'u'" if st[0] in 'ub' else "'i'"
        wide = f'(u64)(s64){v}' if st[0] == 's' else f'(u64){v}'
        if dt == 'f64':
            return c.set(args[0], dt, f'(f64){v}' if rnd in (None, 'RN') else f'conv_rnd64({o}, {rnd}, {wide})')
        e = f'(f32){v}' if rnd in (None, 'RN') else f'conv_rnd({o}, {rnd}, {wide})'
        e = f'sat01({e})' if c.has('sat') else e
        return c.set(args[0], dt, f'{HALF[dt][1]}({e})' if dt in HALF else e)
    if dt == 'tf32':
        e = f'tf32_rna({v})' if rnd == 'RNA' else f'tf32_rn({v})'
        return c.set(args[0], 'f32', f'relu({e})' if relu else e)
    integral = any(m in ('rni', 'rzi', 'rmi', 'rpi') for m in c.mods)
    if integral:
        v = f'fround({v}, {rnd})' if st == 'f64' else f'(f32)fround({v}, {rnd})'
    if c.has('sat'):
        v = f'sat01({v})'
    if relu:
        v = f'relu({v})'
    if dt in HALF:
        v = f'(f32)({v})' if st == 'f64' else v
        same = dt == st
        f = HALF[dt][1] + ('_rz' if rnd == 'RZ' and not integral and not same else '')
        return c.set(args[0], dt, f'{f}({v})')
    if dt == 'f32' and st == 'f64' and not integral and rnd not in (None, 'RN'):
        v = f"conv_rnd('d', {rnd}, bc<u64>({v}))"
    elif dt != st:
        v = f'({CT[dt]})({v})'
    return c.set(args[0], dt, f'ftz({v})' if c.has('ftz') and dt == 'f32' else v)


# ================================================================ arithmetic
def _float_op(c, ty, fn, srcs, ftz=True):
    """fn maps operand expressions (f32 or f64) to an expression; handles ftz, sat, halves."""
    d, relu = c.inst.args[0], c.has('relu')
    if ty in HALF:
        h, f = HALF[ty]
        body = fn(*[f'{h}({x})' for x in 'xyz'[:len(srcs)]])
        body = f'sat01({body})' if c.has('sat') else f'relu({body})' if relu else body
        lam = f'[&](u16 x, u16 y, u16 z) {{ return {f}({body}); }}'
        vals = ', '.join(c.get(s, ty) for s in srcs)
        if ty.endswith('x2'):
            return c.set(d, ty, f'map2({lam}, {vals})')
        return c.set(d, ty, f'({lam})({vals}{", (u16)0" * (3 - len(srcs))})')
    z = (lambda e: f'ftz({e})') if c.has('ftz') and ty == 'f32' and ftz else (lambda e: e)
    e = fn(*[z(c.get(s, ty)) for s in srcs])
    e = z(e)
    return c.set(d, ty, f'sat01({e})' if c.has('sat') else e)


def _isfloat(ty):
    return ty in HALF or ty in FLOATS


@op('add', 'sub', 'mul', 'div', 'rem', 'min', 'max', 'mul24')
def _binary(c):
    root, ty, a = c.inst.op.split('.')[0], c.types()[-1], c.inst.args
    if len(c.types()) > 1 and c.types()[0] == 'f32' and ty in HALF:   # mixed-precision add.f32.bf16
        return c.set(a[0], 'f32', f'{HALF[ty][0]}({c.get(a[1], ty)}) {"+" if root == "add" else "-"} {c.get(a[2], "f32")}')
    if _isfloat(ty):
        rnd = next((ROUND[m] for m in c.mods if m in ('rz', 'rm', 'rp')), None)
        sym = {'add': '+', 'sub': '-', 'mul': '*', 'div': '/'}.get(root)
        if sym and rnd and ty in FLOATS:
            return _float_op(c, ty, lambda x, y: f"arith_rnd('{sym}', {rnd}, {x}, {y})", a[1:])
        if sym:
            return _float_op(c, ty, lambda x, y: f'({x} {sym} {y})', a[1:])
        f = f'f{root}' + ('nan' if c.has('NaN') else '_')
        if len(a) == 4:
            return _float_op(c, ty, lambda x, y, z: f'{f}({f}({x}, {y}), {z})', a[1:])
        return _float_op(c, ty, lambda x, y: f'{f}({x}, {y})', a[1:])
    if c.has('wide'):
        w = {'u16': 'u32', 's16': 's32', 'u32': 'u64', 's32': 's64'}.get(ty)
        if not w:
            x, y = ('(u128)', '') if ty == 'u64' else ('(u128)(__int128)', '')
            return c.set(a[0], 'b128', f'{x}{c.get(a[1], ty)} * {x}{c.get(a[2], ty)}')
        return c.set(a[0], w, f'({w})({c.get(a[1], ty)}) * ({w})({c.get(a[2], ty)})')
    x, y = c.get(a[1], ty), c.get(a[2], ty)
    if ty in ('u16x2', 's16x2'):
        c.err('packed 16-bit integers are not supported')
    ct = CT[ty]
    if root in ('add', 'sub') and (c.has('cc')):
        u = 'u64' if SIZES[ty] == 8 else 'u32'
        return f'{{ {u} x_ = {c.get(a[1], u)}, y_ = {c.get(a[2], u)}; ' + (
            f'cc_ = ({u})(x_ + y_) < x_; {c.set(a[0], u, "x_ + y_")} }}' if root == 'add' else f'cc_ = x_ < y_; {c.set(a[0], u, "x_ - y_")} }}')
    e = {'add': f'addsat({x}, {y})' if c.has('sat') else f'({ct})({x} + {y})', 'sub': f'subsat({x}, {y})' if c.has('sat') else f'({ct})({x} - {y})',
         'mul': f'mulhi({x}, {y})' if c.has('hi') else f'({ct})(({"u32" if SIZES[ty] < 4 else ct}){x} * {y})', 'div': f'idiv<{ct}>({x}, {y})', 'rem': f'irem<{ct}>({x}, {y})',
         'min': f'({x} < {y} ? {x} : {y})', 'max': f'({x} > {y} ? {x} : {y})', 'mul24': f'mul24({x}, {y})'}[root]
    return c.set(a[0], ty, e)


@op('addc', 'subc')
def _carry(c):
    ty, a, add = c.types()[-1], c.inst.args, c.inst.op.startswith('addc')
    u, w = ('u64', 'u128') if SIZES[ty] == 8 else ('u32', 'u64')
    x, y = c.get(a[1], u), c.get(a[2], u)
    calc = f'{w} r_ = ({w}){x} {"+" if add else "-"} {y} {"+" if add else "-"} cc_;'
    return f'{{ {calc} {"cc_ = r_ >> %d & 1; " % (SIZES[ty] * 8) if c.has("cc") else ""}{c.set(a[0], u, f"({u})r_")} }}'


@op('mad', 'fma', 'madc', 'mad24')
def _mad(c):
    ty, a = c.types()[-1], c.inst.args
    if _isfloat(ty):
        rnd = next((ROUND[m] for m in c.mods if m in ('rz', 'rm', 'rp')), None)
        if rnd and ty in FLOATS:
            return _float_op(c, ty, lambda x, y, z: f"arith_rnd('f', {rnd}, {x}, {y}, {z})", a[1:])
        f = 'fma16' if ty in HALF else 'std::fma'
        return _float_op(c, ty, lambda x, y, z: f'{f}({x}, {y}, {z})', a[1:])
    x, y = c.get(a[1], ty), c.get(a[2], ty)
    if c.has('wide'):
        w = {'u16': 'u32', 's16': 's32', 'u32': 'u64', 's32': 's64'}[ty]
        return c.set(a[0], w, f'({w})({x}) * ({w})({y}) + {c.get(a[3], w)}')
    z, ct = c.get(a[3], ty), CT[ty]
    prod = f'mulhi({x}, {y})' if c.has('hi') else f'mul24({x}, {y})' if c.inst.op.startswith('mad24') else f'({ct})(({"u32" if SIZES[ty] < 4 else ct}){x} * {y})'
    if c.inst.op.startswith('madc') or c.has('cc'):
        u, w = ('u64', 'u128') if SIZES[ty] == 8 else ('u32', 'u64')
        return (f'{{ {w} r_ = ({w})({u})({prod}) + ({u}){z}{" + cc_" if c.inst.op.startswith("madc") else ""}; '
                + (f'cc_ = r_ >> {SIZES[ty] * 8} & 1; ' if c.has('cc') else '') + c.set(a[0], u, f'({u})r_') + ' }')
    return c.set(a[0], ty, f'({ct})({prod} + {z})')


@op('sad')
def _sad(c):
    ty, a = c.types()[-1], c.inst.args
    x, y = c.get(a[1], ty), c.get(a[2], ty)
    return c.set(a[0], ty, f'({CT[ty]})({c.get(a[3], ty)} + ({x} < {y} ? {y} - {x} : {x} - {y}))')


UNARY_F = {'neg': '-({})', 'abs': 'std::fabs({})', 'ex2': 'ex2({})', 'lg2': 'lg2({})', 'rcp': '(1 / {})', 'sqrt': 'std::sqrt({})',
           'rsqrt': '(1 / std::sqrt({}))', 'sin': 'std::sin({})', 'cos': 'std::cos({})', 'tanh': 'std::tanh({})'}


@op(*UNARY_F)
def _unary(c):
    root, ty, a = c.inst.op.split('.')[0], c.types()[-1], c.inst.args
    if not _isfloat(ty):
        x = c.get(a[1], ty)
        return c.set(a[0], ty, f'({CT[ty]})({"-" + x if root == "neg" else f"({x} < 0 ? -{x} : {x})"})')
    if root in ('neg', 'abs') and ty in HALF:   # exact sign-bit operations
        m = '0x80008000u' if ty.endswith('x2') else '0x8000'
        return c.set(a[0], ty, f'({CT[ty]})({c.get(a[1], ty)} {"^ " + m if root == "neg" else "& ~" + m})')
    rnd = next((ROUND[m] for m in c.mods if m in ('rz', 'rm', 'rp')), None)
    if root in ('rcp', 'sqrt') and rnd:
        return _float_op(c, ty, lambda x: f"arith_rnd('{'r' if root == 'rcp' else 's'}', {rnd}, {x})", a[1:])
    return _float_op(c, ty, lambda x: UNARY_F[root].format(x), a[1:])


@op('copysign')
def _copysign(c):
    ty, a = c.types()[-1], c.inst.args
    return c.set(a[0], ty, f'std::copysign({c.get(a[2], ty)}, {c.get(a[1], ty)})')


@op('testp')
def _testp(c):
    ty, a = c.types()[-1], c.inst.args
    x = c.get(a[1], ty)
    e = {'finite': f'std::isfinite({x})', 'infinite': f'std::isinf({x})', 'number': f'!std::isnan({x})', 'notanumber': f'std::isnan({x})',
         'normal': f'std::isnormal({x})', 'subnormal': f'(std::fpclassify({x}) == FP_SUBNORMAL)'}[c.mods[0]]
    return c.set(a[0], 'pred', e)


# ================================================================ logic and bits
@op('and', 'or', 'xor', 'not', 'cnot', 'shl', 'shr')
def _logic(c):
    root, ty, a = c.inst.op.split('.')[0], c.types()[-1], c.inst.args
    x = c.get(a[1], ty)
    if root == 'not':
        return c.set(a[0], ty, f'!{x}' if ty == 'pred' else f'({CT[ty]})~{x}')
    if root == 'cnot':
        return c.set(a[0], ty, f'({CT[ty]})({x} == 0)')
    if root in ('shl', 'shr'):
        return c.set(a[0], ty, f'{root}<{CT[ty]}>({x}, {c.get(a[2], "u32")})')
    y = c.get(a[2], ty)
    return c.set(a[0], ty, f'({CT[ty]})({x} {dict(zip(("and", "or", "xor"), "&|^"))[root]} {y})')


BITS = {  # root: (argument types, expression); T is the instruction's type
    'lop3': (['b32', 'b32', 'b32', 'u32'], 'lop3({0}, {1}, {2}, {3})'), 'popc': (['T'], '(u32)__builtin_popcountll({0})'),
    'clz': (['T'], 'clz({0})'), 'brev': (['T'], 'brev({0})'), 'bfe': (['T', 'u32', 'u32'], 'bfe<{T}>({0}, {1}, {2})'),
    'bfi': (['T', 'T', 'u32', 'u32'], 'bfi<{T}>({0}, {1}, {2}, {3})'), 'fns': (['b32', 'b32', 's32'], 'fns({0}, {1}, {2})'),
    'bmsk': (['u32', 'u32'], '({1} >= 32 ? ~0u : (1u << {1}) - 1) << ({0} & 31)'),
    'szext': (['T', 'u32'], 'bfe<{T}>({0}, 0, {1})'),
}


@op(*BITS)
def _bits(c):
    root, ty, a = c.inst.op.split('.')[0], c.types()[-1], c.inst.args
    tys, e = BITS[root]
    if root == 'lop3' and '|' in a[0]:
        c.err('lop3 with a predicate output is not supported')
    e = e.format(*[c.get(s, ty if t == 'T' else t) for s, t in zip(a[1:], tys)], T=CT[ty])
    return c.set(a[0], 'u32' if root in ('popc', 'clz') else ty, e)


@op('bfind')
def _bfind(c):
    ty, a = c.types()[-1], c.inst.args
    return c.set(a[0], 'u32', f'bfind<{CT[ty]}>({c.get(a[1], ty)}, {"true" if c.has("shiftamt") else "false"})')


@op('shf')
def _shf(c):
    a = c.inst.args
    return c.set(a[0], 'b32', f'shf({c.get(a[1], "b32")}, {c.get(a[2], "b32")}, {c.get(a[3], "u32")}, {"true" if c.has("l") else "false"}, {"true" if c.has("clamp") else "false"})')


@op('prmt')
def _prmt(c):
    a = c.inst.args
    mode = next((i for i, m in enumerate(('', 'f4e', 'b4e', 'rc8', 'ecl', 'ecr', 'rc16')) if m in c.mods), 0)
    return c.set(a[0], 'b32', f'prmt({c.get(a[1], "b32")}, {c.get(a[2], "b32")}, {c.get(a[3], "b32")}, {mode})')


@op('dp4a')
def _dp4a(c):
    a, (ta, tb) = c.inst.args, c.types()
    return c.set(a[0], 's32', f'dp4a({c.get(a[1], "b32")}, {c.get(a[2], "b32")}, {c.get(a[3], "s32")}, {"true" if ta == "s32" else "false"}, {"true" if tb == "s32" else "false"})')


# ================================================================ comparison and selection
CMP = {'eq': '==', 'ne': '!=', 'lt': '<', 'le': '<=', 'gt': '>', 'ge': '>=', 'lo': '<', 'ls': '<=', 'hi': '>', 'hs': '>='}


def _compare(c, ty, cmp, x, y):
    if not _isfloat(ty):
        u = f'u{SIZES[ty] * 8}' if cmp in ('lo', 'ls', 'hi', 'hs') else CT[ty]
        return f'(({u}){x} {CMP[cmp]} ({u}){y})'
    if ty in HALF:
        x, y = f'{HALF[ty][0]}({x})', f'{HALF[ty][0]}({y})'
    elif c.has('ftz'):
        x, y = f'ftz({x})', f'ftz({y})'
    if cmp == 'num':
        return f'({x} == {x} && {y} == {y})'
    if cmp == 'nan':
        return f'({x} != {x} || {y} != {y})'
    if cmp == 'ne':       # ordered: false on NaN
        return f'({x} < {y} || {x} > {y})'
    if cmp in CMP:
        return f'({x} {CMP[cmp]} {y})'
    neg = {'equ': 'ne', 'neu': 'eq', 'ltu': 'ge', 'leu': 'gt', 'gtu': 'le', 'geu': 'lt'}[cmp]
    if neg == 'ne':
        return f'!({x} < {y} || {x} > {y})'
    return f'!({x} {CMP[neg]} {y})'


def _bool(e, boolop, third):
    return f'({e} {dict(zip(("and", "or", "xor"), ("&&", "||", "!=")))[boolop]} {third})' if boolop else e


def _boolop(c):
    """The combining operation of setp/set and the expression of its third operand."""
    k = next((m for m in c.mods[1:] if m in ('and', 'or', 'xor')), None)
    return k, c.get(c.inst.args[3], 'pred') if k else ''


@op('setp')
def _setp(c):
    a, ty = c.inst.args, c.types()[-1]
    ds = [d.strip() for d in a[0].split('|')]
    k, third = _boolop(c)
    x, y = c.get(a[1], ty), c.get(a[2], ty)
    if ty.endswith('x2'):
        es = [_bool(_compare(c, ty, c.mods[0], f'(u16)({x}{s})', f'(u16)({y}{s})'), k, 'b_') for s in ('', ' >> 16')]
    else:
        e = _compare(c, ty, c.mods[0], x, y)
        es = [_bool(e, k, 'b_'), _bool('!' + e, k, 'b_')]
    out = ' '.join(f'bool c{i}_ = {e};' for i, e in enumerate(es[:len(ds)]))
    out += ' ' + ' '.join(c.set(d, 'pred', f'c{i}_') for i, d in enumerate(ds))
    return '{ ' + (f'bool b_ = {third}; ' if k else '') + out + ' }'


@op('set')
def _set(c):
    a, (dt, st) = c.inst.args, c.types()[-2:]
    k, third = _boolop(c)
    x, y = c.get(a[1], st), c.get(a[2], st)
    if st.endswith('x2'):
        one = {'f16x2': '0x3c00u', 'bf16x2': '0x3f80u'}.get(dt, '0xffffu')
        es = [_bool(_compare(c, st, c.mods[0], f'(u16)({x}{s})', f'(u16)({y}{s})'), k, third) for s in ('', ' >> 16')]
        return c.set(a[0], 'b32', f'({es[0]} ? {one} : 0u) | ({es[1]} ? {one} << 16 : 0u)')
    one = {'f32': '1.f', 'f16': '(u16)0x3c00', 'bf16': '(u16)0x3f80'}.get(dt, f'({CT[dt]})-1')
    return c.set(a[0], dt, f'({_bool(_compare(c, st, c.mods[0], x, y), k, third)} ? {one} : ({CT[dt]})0)')


@op('selp')
def _selp(c):
    a, ty = c.inst.args, c.types()[-1]
    for s in a[1:3]:
        if c.reg(a[0]) and c.reg(s):
            c.copies.append((c.reg(a[0])[0], c.reg(s)[0]))
    return c.set(a[0], ty, f'({c.get(a[3], "pred")} ? {c.get(a[1], ty)} : {c.get(a[2], ty)})')


@op('slct')
def _slct(c):
    a, (dt, ct) = c.inst.args, c.types()
    return c.set(a[0], dt, f'({c.get(a[3], ct)} >= 0 ? {c.get(a[1], dt)} : {c.get(a[2], dt)})')


# ================================================================ control flow
@op('bra')
def _bra(c):
    c.succ, c.falls = [c.label(c.inst.args[0])], bool(c.inst.pred)
    return f'goto {c.succ[0]};'


@op('brx')
def _brx(c):
    idx, table = c.inst.args
    c.succ, c.falls = [c.label(x) for x in c.fn.targets[table]], False
    return f'switch ({c.get(idx, "u32")}) {{ ' + ' '.join(f'case {i}: goto {x};' for i, x in enumerate(c.succ)) + ' default: fault(t, "brx.idx out of range"); }'


@op('ret', 'exit')
def _ret(c):
    c.falls = bool(c.inst.pred)
    if c.inst.op.startswith('exit') and c.fn.kind == 'func':
        c.err('exit inside a .func is not supported')
    return 'return;'


@op('trap')
def _trap(c):
    return 'fault(t, "trap");'


@op('brkpt', 'nop', 'pmevent', 'setmaxnreg', 'griddepcontrol', 'prefetch', 'prefetchu', 'applypriority', 'discard')
def _nop(c):
    return ';'


@op('createpolicy')
def _createpolicy(c):
    return c.set(c.inst.args[0], 'b64', '0ull')


@op('nanosleep')
def _nanosleep(c):
    return 'yield_exit(t);'


@op('call')
def _call(c):
    a = list(c.inst.args)
    rets = split_args(a.pop(0)[1:-1]) if a[0].startswith('(') else []
    name = a.pop(0)
    params = split_args(a.pop(0)[1:-1]) if a else []
    p = [c.var(x)[0] for x in rets + params]
    if name == 'vprintf':
        return f'wr<s32>({p[0]}, device_printf(t, rd<u64>({p[1]}), rd<u64>({p[2]})));'
    if name == '__assertfail':
        return f'fault(t, "assertion failed: %s (%s:%u)", (const char *)rd<u64>({p[0]}), (const char *)rd<u64>({p[1]}), rd<u32>({p[2]}));'
    if c.reg(name):
        c.err('indirect calls are not supported')
    if name not in c.funcs:
        c.err(f'call of a function with no body in this module')
    return f'{c.funcs[name]}({", ".join(["t"] + p)});'


# ================================================================ memory
def _vec(c, a):
    return split_args(a[1:-1]) if a.startswith('{') else [a]


@op('ld', 'ldu')
def _ld(c):
    d, ty, sp = c.inst.args[0], c.types()[-1], c.space()
    ad, sym = c.addr(c.inst.args[1])
    regs = _vec(c, d)
    n, ct = SIZES[ty], CT[ty]
    poll = c.has('volatile', 'relaxed', 'acquire')
    if sp == 'param' and sym:
        p = f'(const u8 *)({ad})'
    else:
        sp = {'const': 'global', 'param': 'generic'}.get(sp, sp)
        p = f'{sp}_{"at" if poll and sp in ("shared", "generic") else "ld"}(t, {ad}, {n * len(regs)})'
    if len(regs) == 1 and not poll:
        return c.set(regs[0], ty, f'rd<{ct}>({p})')
    hint = 'spin_hint(t); ' if poll else ''
    return f'{{ {hint}const u8 *p_ = {p}; ' + ' '.join(f'{ct} x{i}_ = rd<{ct}>(p_ + {i * n});' for i in range(len(regs))) + ' ' + ' '.join(c.set(r, ty, f'x{i}_') for i, r in enumerate(regs) if r != '_') + ' }'


@op('st')
def _st(c):
    a, ty, sp = c.inst.args, c.types()[-1], c.space()
    if c.has('async'):
        c.err('st.async is not supported')
    ad, sym = c.addr(a[0])
    regs, n, ct = _vec(c, a[1]), SIZES[ty], CT[ty]
    if sp == 'param' and sym:
        p = f'(u8 *)({ad})'
    else:
        at = c.has('volatile', 'relaxed', 'release') and sp in ('shared', 'generic')
        p = f'{sp}_st(t, {ad}, {n * len(regs)})'
        if at:
            return f'{{ u32 f_ = t.flags; t.flags &= ~F_RACE; u8 *p_ = {p}; t.flags = f_; ' + ' '.join(f'wr<{ct}>(p_ + {i * n}, {c.get(r, ty)});' for i, r in enumerate(regs)) + ' }'
    return f'{{ u8 *p_ = {p}; ' + ' '.join(f'wr<{ct}>(p_ + {i * n}, {c.get(r, ty)});' for i, r in enumerate(regs)) + ' }'


ATOM = {'add': 'o + x', 'min': '(o < x ? o : x)', 'max': '(o > x ? o : x)', 'and': 'o & x', 'or': 'o | x', 'xor': 'o ^ x', 'exch': 'x',
        'inc': '(o >= x ? 0 : o + 1)', 'dec': '(o == 0 || o > x ? x : o - 1)', 'cas': '(o == x ? y : o)'}


@op('atom', 'red')
def _atom(c):
    a, ty = list(c.inst.args), c.types()[-1]
    if c.has('async'):
        c.err('red.async is not supported')
    kind = next(m for m in c.mods if m in ATOM)
    d = a.pop(0) if c.inst.op.startswith('atom') else '_'
    ad, _ = c.addr(a[0])
    sp, ct, n = c.space(), CT[ty], SIZES[ty]
    vals = _vec(c, a[1])
    e = ATOM[kind]
    if ty in HALF:
        h, f = HALF[ty]
        fe = {'add': 'p + q', 'min': 'fmin_(p, q)', 'max': 'fmax_(p, q)'}.get(kind)
        if fe:
            half = f'[](u16 o_, u16 x_, u16) {{ f32 p = {h}(o_), q = {h}(x_); return {f}({fe}); }}'
            e = f'map2({half}, o, x)' if ty.endswith('x2') else f'({half})(o, x, (u16)0)'
    elif ty in FLOATS and kind in ('min', 'max'):
        e = f'f{kind}_(o, x)'
    body = f'spin_hint(t); u8 *p_ = {sp}_at(t, {ad}, {n * len(vals)}); '
    for i, v in enumerate(vals):
        y = f'{ct} y = {c.get(a[2], ty)}; ' if kind == 'cas' else ''
        body += f'{{ {ct} x = {c.get(v, ty)}; {y}{ct} r_ = rmw<{ct}>(p_ + {i * n}, [&]({ct} o) {{ return {e}; }}); '
        body += (c.set(_vec(c, d)[i], ty, 'r_') if d != '_' else '(void)r_;') + ' } '
    return f'{{ {body}}}'


# ================================================================ barriers and warp operations
@op('bar', 'barrier')
def _bar(c):
    a = c.inst.args
    u = lambda x: c.get(x, 'u32')
    if c.has('warp'):
        return f'warp_bar(t, {c.key("warp")}, {u(a[0])});'
    if c.has('cluster'):
        return f'cluster_bar(t, {"true, false" if c.has("arrive") else "false, true"});'
    if c.has('red'):
        opn = {'popc': 0, 'and': 1, 'or': 2}[next(m for m in c.mods if m in ('popc', 'and', 'or'))]
        cnt = u(a[2]) if len(a) == 4 else '0'
        return c.set(a[0], 'u32' if opn == 0 else 'pred', f'bar_red(t, {u(a[1])}, {cnt}, {opn}, {c.get(a[-1], "pred")})')
    return f'bar(t, {u(a[0])}, {u(a[1]) if len(a) > 1 else 0}, {"true" if c.has("arrive") else "false"});'


@op('membar', 'fence')
def _fence(c):
    return f'fence(t, {"true" if c.has("proxy") and any(m.startswith("async") for m in c.mods) else "false"});'


@op('shfl')
def _shfl(c):
    a = c.inst.args
    mode = ('up', 'down', 'bfly', 'idx').index(next(m for m in c.mods if m in ('up', 'down', 'bfly', 'idx')))
    d = [x.strip() for x in a[0].split('|')]
    e = f'{{ bool q_; u32 r_ = shfl(t, {c.key("shfl")}, {mode}, {c.get(a[1], "b32")}, {c.get(a[2], "b32")}, {c.get(a[3], "b32")}, {c.get(a[4], "b32")}, &q_); '
    return e + c.set(d[0], 'b32', 'r_') + (' ' + c.set(d[1], 'pred', 'q_') if len(d) > 1 else '') + ' }'


@op('vote')
def _vote(c):
    a = c.inst.args
    mode = ('ballot', 'any', 'all', 'uni').index(next(m for m in c.mods if m in ('ballot', 'any', 'all', 'uni')))
    return c.set(a[0], 'b32' if mode == 0 else 'pred', f'vote(t, {c.key("vote")}, {mode}, {c.get(a[1], "pred")}, {c.get(a[2], "b32")})')


@op('match')
def _match(c):
    a, ty = c.inst.args, c.types()[-1]
    d = [x.strip() for x in a[0].split('|')]
    e = f'{{ bool q_; u32 r_ = match(t, {c.key("match")}, {"true" if c.has("all") else "false"}, {c.get(a[1], ty)}, {c.get(a[2], "b32")}, &q_); '
    return e + c.set(d[0], 'b32', 'r_') + (' ' + c.set(d[1], 'pred', 'q_') if len(d) > 1 else '') + ' }'


@op('redux')
def _redux(c):
    a, ty = c.inst.args, c.types()[-1]
    k = next(m for m in c.mods if m in ('and', 'or', 'xor', 'add', 'min', 'max'))
    i = {'and': 0, 'or': 1, 'xor': 2, 'add': 3, 'min': 4, 'max': 5}[k] + (2 if k in ('min', 'max') and ty == 's32' else 0)
    if ty == 'f32':
        c.err('redux.f32 is not supported')
    return c.set(a[0], 'b32', f'redux(t, {c.key("redux")}, {i}, {c.get(a[1], "b32")}, {c.get(a[2], "b32")})')


@op('activemask')
def _activemask(c):
    return c.set(c.inst.args[0], 'b32', 'activemask(t)')


@op('elect')
def _elect(c):
    d = [x.strip() for x in c.inst.args[0].split('|')]
    return f'{{ u32 l_; bool e_ = elect(t, {c.key("elect")}, {c.get(c.inst.args[1], "b32")}, &l_); {c.set(d[0], "b32", "l_")} {c.set(d[1], "pred", "e_")} }}'


# ================================================================ matrix instructions
ELT = {'f16': 'E_F16', 'bf16': 'E_BF16', 'tf32': 'E_TF32', 'e4m3': 'E_E4M3', 'e5m2': 'E_E5M2', 's8': 'E_S8', 'u8': 'E_U8', 'f32': 'E_F32', 's32': 'E_S32'}


def _arr(c, name, a, ty='b32'):
    regs = _vec(c, a)
    return f'u32 {name}[{len(regs)}] = {{{", ".join(c.get(r, "b32") for r in regs)}}};', len(regs)


def _unarr(c, name, a):
    return ' '.join(c.set(r, 'b32', f'{name}[{i}]') for i, r in enumerate(_vec(c, a)))


@op('ldmatrix')
def _ldmatrix(c):
    if not c.has('m8n8') or not c.has('b16'):
        c.err('only m8n8 .b16 is supported')
    d, n = c.inst.args[0], len(_vec(c, c.inst.args[0]))
    return f'{{ u32 d_[{n}]; ldmatrix(t, {c.inst.line}u, {n}, {"true" if c.has("trans") else "false"}, {c.addr(c.inst.args[1])[0]}, d_); {_unarr(c, "d_", d)} }}'


@op('stmatrix')
def _stmatrix(c):
    if not c.has('m8n8') or not c.has('b16'):
        c.err('only m8n8 .b16 is supported')
    s, n = _arr(c, 's_', c.inst.args[1])
    return f'{{ {s} stmatrix(t, {c.inst.line}u, {n}, {"true" if c.has("trans") else "false"}, {c.addr(c.inst.args[0])[0]}, s_); }}'


@op('movmatrix')
def _movmatrix(c):
    d, s = c.inst.args
    return f'{{ u32 d_ = movmatrix(t, {c.inst.line}u, {c.get(s, "b32")}); {c.set(d, "b32", "d_")} }}'


@op('mma')
def _mma(c):
    m = re.search(r'\.m16n8k(\d+)\.row\.col', c.inst.op)
    tys = [x for x in c.mods if x in ELT]
    if not m or len(tys) != 4 or tys[1] not in ELT or c.has('sp', 'xor', 'and', 'block_scale'):
        c.err('only dense m16n8kK.row.col with f16/bf16/tf32/e4m3/e5m2/s8/u8 operands is supported')
    sp = c.spec('MmaSpec', f'{{16, 8, {m.group(1)}, {ELT[tys[1]]}, {ELT[tys[2]]}, {ELT[tys[0]]}, {"true" if c.has("satfinite") else "false"}}}')
    d, a, b, cc = c.inst.args
    n = len(_vec(c, d))
    return f'{{ {_arr(c, "a_", a)[0]} {_arr(c, "b_", b)[0]} {_arr(c, "c_", cc)[0]} u32 d_[{n}]; mma(t, {c.inst.line}u, {sp}, a_, b_, c_, d_); {_unarr(c, "d_", d)} }}'


@op('wgmma')
def _wgmma(c):
    a, line = c.inst.args, f'{c.inst.line}u'
    if c.has('fence'):
        return f'wgmma_fence(t, {line});'
    if c.has('commit_group'):
        return f'wgmma_commit(t, {line});'
    if c.has('wait_group'):
        c.is_wait = True
        return f'@@WAIT {c.inst.line} {c.get(a[0], "u32")}@@'
    m = re.search(r'\.m64n(\d+)k(\d+)', c.inst.op)
    tys = [x for x in c.mods if x in ELT]
    if c.has('sp') or not m or len(tys) != 3:
        c.err('unsupported wgmma form')
    regs = _vec(c, a[0])
    a_reg = a[1].startswith('{')
    imm = [int(x) for x in a[4:]]
    sa, sb = (imm[0], imm[1]) if len(imm) >= 2 else (1, 1)
    tr = imm[2:]
    ta, tb = ((0, tr[0]) if a_reg and tr else (tr + [0, 0])[:2])
    sp = c.spec('WgmmaSpec', f'{{{m.group(1)}, {m.group(2)}, {ELT[tys[1]]}, {ELT[tys[2]]}, {ELT[tys[0]]}, {int(a_reg)}, {ta}, {tb}, {sa}, {sb}}}')
    d, n = _arr(c, 'd_', a[0])
    ar = _arr(c, 'a_', a[1])[0] if a_reg else 'const u32 *a_ = nullptr;'
    ad = '0' if a_reg else c.get(a[1], 'b64')
    scale = c.get(a[3], 'pred') if len(a) > 3 else 'true'
    out = f'{{ {d} {ar} wgmma(t, {line}, {sp}, d_, {n}, a_, {ad}, {c.get(a[2], "b64")}, {scale}); {_unarr(c, "d_", a[0])} }}'
    c.token_src |= {c.reg(r)[0] for r in regs}
    return out


# ================================================================ asynchronous copies, mbarriers
@op('cp')
def _cp(c):
    a, m = c.inst.args, c.inst.op
    A = lambda x: c.addr(x)[0]
    if '.bulk' in m:
        return _bulk(c)
    if '.mbarrier.arrive' in m:
        return f'cp_async_mbar(t, {A(a[0])}, {"true" if c.has("noinc") else "false"});'
    if c.has('commit_group'):
        return 'cp_async_commit(t);'
    if c.has('wait_group'):
        return f'cp_async_wait(t, {c.get(a[0], "s32")});'
    if c.has('wait_all'):
        return 'cp_async_wait(t, -1);'
    size = src = c.get(a[2], 'u32')
    if len(a) > 3:
        r = c.reg(a[3].lstrip('!'))
        if r and r[1] == 'pred':
            src = f'({c.get(a[3], "pred")} ? 0u : {size})'
        elif not any('cache_hint' in x for x in c.mods) or len(a) > 4:
            src = c.get(a[3], 'u32')
    return f'cp_async(t, {A(a[0])}, {A(a[1])}, {size}, {src});'


def _bulk(c):
    a, m = c.inst.args, c.inst.op
    A = lambda x: c.addr(x)[0]
    if c.has('prefetch'):
        return ';'
    if c.has('commit_group'):
        return 'bulk_commit(t);'
    if c.has('wait_group'):
        return f'bulk_wait(t, {c.get(a[0], "u32")}, {"true" if c.has("read") else "false"});'
    red = 'R_NONE'
    if m.startswith('cp.reduce'):
        k = next(x for x in c.mods if x in ('add', 'min', 'max', 'and', 'or', 'xor', 'inc', 'dec'))
        ty = (c.types() or ['f32'])[-1]
        red = {'add': {'f32': 'R_ADD_F32', 'f16': 'R_ADD_F16', 'bf16': 'R_ADD_BF16', 'u64': 'R_ADD_U64'}.get(ty, 'R_ADD_U32'), 'and': 'R_AND', 'or': 'R_OR', 'xor': 'R_XOR',
               'min': 'R_MIN_S32', 'max': 'R_MAX_S32'}.get(k)
        if not red or (k in ('min', 'max') and ty not in ('s32', 'f32')):
            c.err('unsupported bulk reduction')
    load = any(x.startswith('mbarrier::') for x in c.mods)
    mask = '0'
    if any(x.startswith('multicast') for x in c.mods):
        mask = c.get(a[-2] if c.has('L2::cache_hint') else a[-1], 'u32')
    if c.has('im2col'):
        c.err('im2col tensor maps are not supported')
    if c.has('tensor'):
        dim = int(next(x for x in c.mods if re.match(r'[1-5]d$', x))[0])
        def tensor(x):
            mp, co = split_args(x.strip()[1:-1])
            return A(f'[{mp}]'), f's32 x_[] = {{{", ".join(c.get(y, "s32") for y in split_args(co[1:-1]))}}};'
        if load:
            mp, co = tensor(a[1])
            return f'{{ {co} tma_load(t, {dim}, {A(a[0])}, {mp}, x_, {A(a[2])}, {mask}); }}'
        mp, co = tensor(a[0])
        return f'{{ {co} tma_store(t, {dim}, {mp}, x_, {A(a[1])}, {red}); }}'
    spaces = [x.split('::')[0] for x in c.mods if x.split('::')[0] in ('global', 'shared')]
    if spaces == ['shared', 'global']:
        return f'bulk_g2s(t, {A(a[0])}, {A(a[1])}, {c.get(a[2], "u32")}, {A(a[3])}, {mask});'
    if spaces == ['global', 'shared']:
        return f'bulk_s2g(t, {A(a[0])}, {A(a[1])}, {c.get(a[2], "u32")}, {red});'
    return f'bulk_s2s(t, {A(a[0])}, {A(a[1])}, {c.get(a[2], "u32")}, {A(a[3])});'


@op('mbarrier')
def _mbarrier(c):
    a, what = c.inst.args, c.mods[0]
    u = lambda x: c.get(x, 'u32')
    A = lambda x: c.addr(x)[0]
    if what == 'init':
        return f'mbar_init(t, {A(a[0])}, {u(a[1])});'
    if what == 'inval':
        return f'mbar_inval(t, {A(a[0])});'
    if what == 'expect_tx':
        return f'mbar_tx(t, {A(a[0])}, {u(a[1])});'
    if what == 'complete_tx':
        return f'mbar_tx(t, {A(a[0])}, -(s32){u(a[1])});'
    if what in ('arrive', 'arrive_drop'):
        state, rest = ('_', a) if a[0].startswith('[') else (a[0], a[1:])
        tx = c.has('expect_tx')
        cnt = '1' if tx or len(rest) < 2 else u(rest[1])
        return c.set(state, 'b64', f'mbar_arrive(t, {A(rest[0])}, {cnt}, {u(rest[1]) if tx else 0}, {"true" if what == "arrive_drop" else "false"})')
    if what in ('try_wait', 'test_wait'):
        blocking = 'true' if what == 'try_wait' else 'false'
        if c.has('parity'):
            return c.set(a[0], 'pred', f'mbar_wait_parity(t, {A(a[1])}, {u(a[2])}, {blocking})')
        return c.set(a[0], 'pred', f'mbar_wait_state(t, {A(a[1])}, {c.get(a[2], "b64")}, {blocking})')
    if what == 'pending_count':
        return c.set(a[0], 'u32', f'(u32)mbar_pending({c.get(a[1], "b64")})')
    c.err('unsupported mbarrier operation')


# ================================================================ functions and modules
class Smem:
    """Static shared-memory layout of one kernel; extern [] arrays follow the static ones."""

    def __init__(self, base=0):
        self.at, self.end, self.dyn_align, self.uses_dyn = {}, base, 16, False

    def offset(self, name, var):
        if var.extern or var.size == 0:
            self.dyn_align = max(self.dyn_align, var.align)
            return 'DYN_SMEM'
        if name not in self.at:
            self.end = (self.end + var.align - 1) // var.align * var.align
            self.at[name] = self.end
            self.end += var.size
        return f'(u64)(SMEM_BASE + {self.at[name]})'


# Instructions that cannot fault, block or call need no line number.
PURE = set('mov cvt cvta add sub mul div rem min max mad fma neg abs and or xor not shl shr setp selp lop3 prmt bfe bfi shf ex2 lg2 rcp sqrt rsqrt bra popc clz set slct ret'.split())


def _param_layout(fn):
    off, out = 0, []
    for p in fn.params:
        off = (off + p.align - 1) // p.align * p.align
        out.append(off)
        off += p.size
    return out, (off + 7) // 8 * 8


def _liveness(c, items):
    """Registers live after each wgmma.wait_group, restricted to those that may hold tokens."""
    tok = set(c.token_src)
    while True:
        new = {d for d, s in c.copies if s in tok} - tok
        if not new:
            break
        tok |= new
    bit = {r: 1 << i for i, r in enumerate(sorted(tok))}
    mask = lambda rs: sum(bit[r] for r in rs if r in bit)
    n = len(items)
    where = {l: i for i, (l, *_r) in enumerate(items) if l}
    succ, use, kill = [], [], []
    for i, (label, uses, defs, guarded, targets, falls, wait) in enumerate(items):
        succ.append([where[x] for x in targets] + ([i + 1] if falls and i + 1 < n else []))
        use.append(mask(uses))
        kill.append(0 if guarded else mask(defs))
    live_in, live_out = [0] * n, [0] * n
    changed = True
    while changed:
        changed = False
        for i in range(n - 1, -1, -1):
            o = 0
            for s in succ[i]:
                o |= live_in[s]
            v = use[i] | (o & ~kill[i])
            if o != live_out[i] or v != live_in[i]:
                live_out[i], live_in[i], changed = o, v, True
    return {i: sorted(r for r in tok if live_out[i] & bit[r]) for i in range(n) if items[i][6]}


def translate_function(mod, fn, index, smem, funcs):
    c = Ctx(mod, fn, smem, funcs)
    c.index = index
    c.param_offsets, psize = _param_layout(fn)
    lines, items, carry = [], [], False
    for it in fn.body:
        c.uses, c.defs, c.succ, c.falls, c.is_wait = set(), set(), [], True, False
        c.inst = it
        if isinstance(it, Label):
            name = f'L_{cname(it.name)}_s{it.scope}'
            lines.append(f'{name}: ;')
            items.append((name, set(), set(), False, [], True, False))
            continue
        root = it.op.split('.')[0]
        if root not in OPS:
            c.err('unknown instruction')
        try:
            code = OPS[root](c)
        except PtxError:
            raise
        except Exception as e:
            c.err(f'cannot translate ({type(e).__name__}: {e})')
        carry |= 'cc_' in code
        if root not in PURE:
            code = f't.line = {it.line}; {code}'
        if it.pred:
            code = f'if ({c.get(("!" if it.neg else "") + it.pred, "pred")}) {{ {code} }}'
        lines.append('  ' + code)
        items.append((None, c.uses, c.defs, bool(it.pred), c.succ, c.falls, c.is_wait))
    if any(i[6] for i in items):
        types = {c_: t for c_, t in ((f'v_{cname(n)}' + (f'_s{s}' if s else ''), t) for (s, n), t in fn.regs.items())}
        for i, live in _liveness(c, items).items():
            def fill(m):
                vals = ', '.join(f'bc<u32>({r})' for r in live)
                back = ' '.join(f'{r} = bc<{c.storage(types[r])}>(w_[{k}]);' for k, r in enumerate(live))
                return f'{{ u32 w_[] = {{{vals}{"" if live else "0"}}}; wgmma_wait(t, {m.group(1)}, {m.group(2)}, w_, {len(live)}); {back} }}'
            lines[i] = re.sub(r'@@WAIT (\d+) (.*?)@@', fill, lines[i])
    used = set().union(*[i[1] | i[2] for i in items]) if items else set()
    decls = {}
    for (s, n), ty in fn.regs.items():
        name = f'v_{cname(n)}' + (f'_s{s}' if s else '')
        if name in used:
            decls.setdefault(c.storage(ty), []).append(f'{name} = {{}}')
    head = [f'  {ty} {", ".join(ns)};' for ty, ns in decls.items()]
    for (s, n), v in fn.vars.items():
        if v.space in ('local', 'param'):
            head.append(f'  alignas({max(v.align, 8)}) u8 P_{cname(n)}{f"_s{s}" if s else ""}[{max(v.size, 1)}];')
    if carry:
        head.append('  bool cc_ = false;')
    text = '\n'.join(head + lines)
    if fn.kind == 'entry':
        sig = f'static void F{index}(Thread &t)'
    else:
        sig = f'static void {funcs[fn.name]}(' + ', '.join(['Thread &t'] + [f'u8 *P_{cname(p.name)}' for p in fn.rets + fn.params]) + ')'
        for p in fn.rets + fn.params:
            if p.space == 'reg':
                raise PtxError(f'{fn.name}: line {fn.line}: .reg parameters are not supported')
    specs = [s % f'spec_{index}_{i}' for i, s in enumerate(c.specs)]
    return specs, sig, text


def _global_def(v):
    n, ct = max(v.size, 1), CT[v.type]
    name = f'G_{cname(v.name)}'
    if not v.init:
        return f'alignas({max(v.align, 16)}) static u8 {name}[{n}];', ''
    vals, setup = split_args(v.init.strip().strip('{}')), []
    w, blob = SIZES[v.type], b''
    for k, x in enumerate(vals):
        m = re.match(r'(?:generic\()?([A-Za-z_$][\w$]*)\)?(?:\s*\+\s*(\d+))?$', x)
        if m and not re.match(r'0[fFdDxX]', x):
            setup.append(f'wr<u64>({name} + {k * w}, (u64)G_{cname(m.group(1))} + {m.group(2) or 0});')
            blob += bytes(w)
        elif re.match(r'0[fFdD]', x):
            blob += int(x[2:], 16).to_bytes(w, 'little')
        elif '.' in x:
            blob += struct.pack('<f' if w == 4 else '<d', float(x))
        else:
            blob += (int(x, 0) & (1 << 8 * w) - 1).to_bytes(w, 'little')
    blob = blob.ljust(n, b'\0')
    return f'alignas({max(v.align, 16)}) static u8 {name}[{n}] = {{{",".join(map(str, blob))}}};', ' '.join(setup)


def translate(text, ptx_path, entry=''):
    """PTX text -> C++ source that loads its module into the simulator; entry names its __cudaRegisterFatBinary."""
    mod = parse(text)
    out = ['#include "runtime.hpp"', 'using namespace ptxsim;', 'namespace {']
    setup, kernels, variables = [], [], []
    for v in mod.vars.values():
        if v.space in ('global', 'const') and not v.extern:
            d, s = _global_def(v)
            out.append(d)
            setup.append(s)
            variables.append(f'{{"{v.name}", G_{cname(v.name)}, {max(v.size, 1)}}}')
    bodies = [f for f in mod.funcs if f.body is not None]
    funcs = {f.name: f'F{i}_{cname(f.name)}' for i, f in enumerate(bodies) if f.kind == 'func'}
    shared = Smem()             # variables of device functions: the same place in every kernel
    protos, texts, infos = [], [], []
    arch = int(re.search(r'\d+', mod.target).group()) if mod.target else 0
    order = [f for f in bodies if f.kind == 'func'] + [f for f in bodies if f.kind == 'entry']
    for f in order:
        i = bodies.index(f)
        smem = shared
        if f.kind == 'entry':
            smem = Smem(shared.end)
            smem.at.update(shared.at)
            smem.dyn_align = shared.dyn_align
        specs, sig, body = translate_function(mod, f, i, smem, funcs)
        dyn = f'const u64 DYN_SMEM = t.smem_end - t.dyn_smem; (void)DYN_SMEM;'
        protos.append(sig + ';')
        texts.append('\n'.join(specs) + f'\n// {f.name}\n{sig} {{\n  {dyn}\n{body}\n}}')
        if f.kind == 'entry':
            offs, psize = _param_layout(f)
            ps = ', '.join(f'{{{o}, {p.size}}}' for o, p in zip(offs, f.params)) or '{0, 0}'
            mx = 1
            for x in f.attrs.get('maxntid', []):
                mx *= x
            rq = 1
            for x in f.attrs.get('reqntid', []):
                rq *= x
            cl = (f.attrs.get('reqnctapercluster') or [0]) + [1, 1]
            infos.append(f'static const ParamInfo p{i}[] = {{{ps}}};\nstatic const KernelInfo k{i} = {{"{f.name}", PTX_FILE, F{i}, p{i}, {len(f.params)}, {max(psize, 8)}, '
                         f'{smem.end}, {smem.dyn_align}, {mx if "maxntid" in f.attrs else 0}, {rq if "reqntid" in f.attrs else 0}, {{{cl[0]}, {cl[1]}, {cl[2]}}}, {arch}}};')
            kernels.append(f'&k{i}')
    out.append(f'const char PTX_FILE[] = "{ptx_path}";')
    out += protos + texts + infos
    out.append(f'const KernelInfo *const KERNELS[] = {{{", ".join(kernels) or "nullptr"}}};')
    out.append(f'const GlobalInfo GLOBALS[] = {{{", ".join(variables) or "{}"}}};')
    out.append('void init() { ' + ' '.join(s for s in setup if s) + ' }')
    out.append(f'Module module_ = {{KERNELS, {len(kernels)}, GLOBALS, {len(variables)}, init, false}};')
    out.append('struct Load { Load() { load_module(module_); } } load_;')
    out.append('}')
    if entry:
        out.append(f'extern "C" __attribute__((visibility("hidden"))) void **{entry}(void *) {{ load_module(module_); return (void **)&module_; }}')
    return '\n'.join(out) + '\n'
