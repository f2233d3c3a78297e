"""Barriers, fences, warp votes and shuffles, asynchronous copies and mbarriers."""

from __future__ import annotations

import re

from ..ptxparse import split_args
from .context import CACHING, ORDER, SPACES, Context, instruction


@instruction(
    "bar", "barrier", modifiers="warp cluster cta sync red arrive wait aligned popc and or release acquire relaxed"
)
def _bar(c: Context) -> str:
    if c.has("warp"):
        return f"warp_bar(t, {c.rendezvous('warp')}, {c.read(c.args[0], 'u32')});"
    if c.has("cluster"):
        return f"cluster_bar(t, {'true, false' if c.has('arrive') else 'false, true'});"
    if c.has("red"):
        kind = c.one_of("popc", "and", "or")
        d, barrier, *count, predicate = c.args
        threads = c.read(count[0], "u32") if count else "0"
        operands = (
            f"{c.read(barrier, 'u32')}, {threads}, {('popc', 'and', 'or').index(kind)}, {c.read(predicate, 'pred')}"
        )
        return c.write(d, "u32" if kind == "popc" else "pred", f"bar_red(t, {operands})")
    barrier, *count = c.args
    threads = c.read(count[0], "u32") if count else "0"
    return f"bar(t, {c.read(barrier, 'u32')}, {threads}, {c.flag('arrive')});"


@instruction(
    "membar",
    "fence",
    modifiers=f"{SPACES} {ORDER} gl alias proxy async async::.* mbarrier_init tensormap::generic sync_restrict::.*",
)
def _fence(c: Context) -> str:
    """Memory is sequentially consistent here: only fence.proxy.async is checked, other missing fences are not seen."""
    async_proxy = c.has("proxy") and any(name.startswith("async") for name in c.modifiers)
    return f"fence(t, {'true' if async_proxy else 'false'});"


# ---- warp
def _with_predicate(c: Context, call: str) -> str:
    """Writes the result of a call that takes bool* last, and the predicate if the instruction has one."""
    d, *predicate = [name.strip() for name in c.args[0].split("|")]
    keep = c.write(predicate[0], "pred", "q_") if predicate else ""
    return f"{{ bool q_; u32 r_ = {call}, &q_); {c.write(d, 'b32', 'r_')} {keep} }}"


@instruction("shfl", modifiers="sync up down bfly idx")
def _shfl(c: Context) -> str:
    names = ("up", "down", "bfly", "idx")
    operands = ", ".join(c.read(operand, "b32") for operand in c.args[1:5])
    return _with_predicate(c, f"shfl(t, {c.rendezvous('shfl')}, {names.index(c.one_of(*names))}, {operands}")


@instruction("vote", modifiers="sync ballot any all uni")
def _vote(c: Context) -> str:
    names = ("ballot", "any", "all", "uni")
    mode = names.index(c.one_of(*names))
    d, predicate, mask = c.args
    operands = f"{mode}, {c.read(predicate, 'pred')}, {c.read(mask, 'b32')}"
    return c.write(d, "pred" if mode else "b32", f"vote(t, {c.rendezvous('vote')}, {operands})")


@instruction("match", modifiers="any all sync")
def _match(c: Context) -> str:
    operands = f"{c.flag('all')}, {c.read(c.args[1], c.type)}, {c.read(c.args[2], 'b32')}"
    return _with_predicate(c, f"match(t, {c.rendezvous('match')}, {operands}")


@instruction("redux", modifiers="sync and or xor add min max", domain="integer")
def _redux(c: Context) -> str:
    d, a, mask = c.args
    names = ("and", "or", "xor", "add", "min", "max")
    kind = names.index(c.one_of(*names))
    kind += 2 if kind >= 4 and c.type == "s32" else 0
    return c.write(d, "b32", f"redux(t, {c.rendezvous('redux')}, {kind}, {c.read(a, 'b32')}, {c.read(mask, 'b32')})")


@instruction("activemask")
def _activemask(c: Context) -> str:
    return c.write(c.args[0], "b32", "activemask(t)")


@instruction("elect", modifiers="sync")
def _elect(c: Context) -> str:
    d, predicate = (name.strip() for name in c.args[0].split("|"))
    call = f"elect(t, {c.rendezvous('elect')}, {c.read(c.args[1], 'b32')}, &l_)"
    return f"{{ u32 l_; bool e_ = {call}; {c.write(d, 'b32', 'l_')} {c.write(predicate, 'pred', 'e_')} }}"


# ---- asynchronous copies
COPY = (
    f"async reduce bulk tensor prefetch mbarrier arrive noinc commit_group wait_group wait_all read [1-5]d tile "
    f"bulk_group mbarrier::complete_tx::bytes multicast::cluster add min max and or xor noftz L2 {SPACES} {CACHING}"
)


@instruction("cp", modifiers=COPY)
def _cp(c: Context) -> str:
    if c.has("bulk"):
        return _bulk(c)
    if c.has("mbarrier"):
        return f"cp_async_mbar(t, {c.address(c.args[0])}, {c.flag('noinc')});"
    if c.has("commit_group"):
        return "cp_async_commit(t);"
    if c.has("wait_group"):
        return f"cp_async_wait(t, {c.read(c.args[0], 's32')});"
    if c.has("wait_all"):
        return "cp_async_wait(t, -1);"
    to, source, size, *rest = c.args
    if c.has("L2::cache_hint"):
        rest.pop()  # the policy
    copied = bytes_to_copy = c.read(size, "u32")
    if rest:  # source size, or a predicate to ignore the source
        register = c.register(rest[0].lstrip("!"))
        if register and register[1] == "pred":
            copied = f"({c.read(rest[0], 'pred')} ? 0u : {bytes_to_copy})"
        else:
            copied = c.read(rest[0], "u32")
    return f"cp_async(t, {c.address(to)}, {c.address(source)}, {bytes_to_copy}, {copied});"


def _reduction(c: Context) -> str:
    """BulkRed enumerator; for tensors R_ADD_F32 stands for an addition in the type of the tensor map."""
    if not c.has("reduce"):
        return "R_NONE"
    kind = c.one_of("add", "min", "max", "and", "or", "xor")
    ptx_type = c.type if c.types else "f32"
    if kind == "add":
        types = {"f32": "R_ADD_F32", "f16": "R_ADD_F16", "bf16": "R_ADD_BF16", "u64": "R_ADD_U64"}
        return types.get(ptx_type) or {"u32": "R_ADD_U32", "s32": "R_ADD_U32"}[ptx_type]
    if kind in ("min", "max"):
        if c.types != ["s32"]:
            c.error("bulk min and max are supported for .s32 only, without a tensor map")
        return f"R_{kind.upper()}_S32"
    if c.types and ptx_type != "b32":
        c.error("bulk and, or, xor are supported for .b32 only")
    return f"R_{kind.upper()}"


def _bulk(c: Context) -> str:
    if c.has("prefetch"):
        return ";"
    if c.has("commit_group"):
        return "bulk_commit(t);"
    if c.has("wait_group"):
        return f"bulk_wait(t, {c.read(c.args[0], 'u32')}, {c.flag('read')});"
    args = list(c.args)
    if c.has("L2::cache_hint"):
        args.pop()
    mask = c.read(args.pop(), "u32") if c.has("multicast::cluster") else "0"
    if c.has("tensor"):
        return _bulk_tensor(c, args, mask)
    to, source, size = c.address(args[0]), c.address(args[1]), c.read(args[2], "u32")
    spaces = [name.split("::")[0] for name in c.modifiers if name.split("::")[0] in ("global", "shared")]
    if spaces == ["shared", "global"]:
        return f"bulk_g2s(t, {to}, {source}, {size}, {c.address(args[3])}, {mask});"
    if spaces == ["global", "shared"]:
        return f"bulk_s2g(t, {to}, {source}, {size}, {_reduction(c)});"
    if c.has("reduce"):
        c.error("reductions in shared memory are not supported")
    return f"bulk_s2s(t, {to}, {source}, {size}, {c.address(args[3])});"


def _bulk_tensor(c: Context, args: list[str], mask: str) -> str:
    dimensions = int(next(name for name in c.modifiers if re.fullmatch("[1-5]d", name))[0])
    load = c.has("mbarrier::complete_tx::bytes")
    tensor_map, coordinates = split_args(args[1 if load else 0].strip()[1:-1])
    position = ", ".join(c.read(operand, "s32") for operand in split_args(coordinates[1:-1]))
    position = f"s32 x_[] = {{{position}}};"
    tensor_map = c.address(f"[{tensor_map}]")
    if load:
        to, barrier = c.address(args[0]), c.address(args[2])
        return f"{{ {position} tma_load(t, {dimensions}, {to}, {tensor_map}, x_, {barrier}, {mask}); }}"
    return f"{{ {position} tma_store(t, {dimensions}, {tensor_map}, x_, {c.address(args[1])}, {_reduction(c)}); }}"


# ---- mbarriers
MBARRIER = "init inval expect_tx complete_tx arrive arrive_drop noComplete try_wait test_wait parity pending_count"


@instruction("mbarrier", modifiers=f"{MBARRIER} {SPACES} {ORDER}")
def _mbarrier(c: Context) -> str:
    args, kind = c.args, c.modifiers[0]
    if kind == "init":
        return f"mbar_init(t, {c.address(args[0])}, {c.read(args[1], 'u32')});"
    if kind == "inval":
        return f"mbar_inval(t, {c.address(args[0])});"
    if kind in ("expect_tx", "complete_tx"):
        sign = "" if kind == "expect_tx" else "-(s32)"
        return f"mbar_tx(t, {c.address(args[0])}, {sign}{c.read(args[1], 'u32')});"
    if kind in ("arrive", "arrive_drop"):
        state, rest = ("_", args) if args[0].startswith("[") else (args[0], args[1:])
        operand = c.read(rest[1], "u32") if len(rest) > 1 else "1"
        count, expected = ("1", operand) if c.has("expect_tx") else (operand, "0")
        drop = "true" if kind == "arrive_drop" else "false"
        return c.write(state, "b64", f"mbar_arrive(t, {c.address(rest[0])}, {count}, {expected}, {drop})")
    if kind in ("try_wait", "test_wait"):
        blocking = "true" if kind == "try_wait" else "false"
        if c.has("parity"):
            return c.write(
                args[0], "pred", f"mbar_wait_parity(t, {c.address(args[1])}, {c.read(args[2], 'u32')}, {blocking})"
            )
        return c.write(
            args[0], "pred", f"mbar_wait_state(t, {c.address(args[1])}, {c.read(args[2], 'b64')}, {blocking})"
        )
    if kind == "pending_count":
        return c.write(args[0], "u32", f"(u32)mbar_pending({c.read(args[1], 'b64')})")
    c.error("unsupported mbarrier operation")
