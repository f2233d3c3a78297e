"""sm_90a: TMA, mbarriers, wgmma and clusters, and kernels that forget a wait, a fence or a release."""

import numpy as np
import pytest
import torch

from ptxsim.testing import Fault

pytestmark = pytest.mark.ptxsim


def bf16(*s, seed=0):
    return torch.randn(s, generator=torch.Generator().manual_seed(seed)).bfloat16()


def gemm(h, M, N, K, fault=0, **opts):
    h.options(**opts)
    a, b, c = bf16(M, K), bf16(N, K, seed=1), torch.zeros(M, N).bfloat16()
    h.gemm(a, b, c, M, N, K, fault)
    return c.float(), a.float() @ b.float().T


@pytest.mark.parametrize(("M", "N", "K"), [(128, 64, 64), (256, 128, 512), (200, 72, 320), (136, 64, 104)])
def test_gemm(hopper, schedule, M, N, K):
    c, ref = gemm(hopper, M, N, K, **schedule)
    torch.testing.assert_close(c, ref, atol=1e-2, rtol=1e-2)


def test_missing_wgmma_wait(hopper):
    with pytest.raises(Fault, match="wgmma result that has not been waited for"):
        gemm(hopper, 128, 64, 512, fault=1)


def test_early_release(hopper):
    """The stage is refilled while a wgmma still reads it."""

    def wrong(s):
        try:
            c, ref = gemm(hopper, 128, 64, 1024, fault=2, sched="random", async_="eager", seed=s)
        except Fault as e:  # a slow warp can also miss a whole phase of the full barrier
            return "deadlock" in str(e)
        return not torch.allclose(c, ref, atol=1e-2, rtol=1e-2)

    assert any(wrong(s) for s in range(4))


def test_missing_proxy_fence(hopper):
    with pytest.raises(Fault, match=r"without fence\.proxy\.async"):
        gemm(hopper, 128, 64, 64, fault=3)


def test_missing_full_wait(hopper):
    with pytest.raises(Fault, match="that an asynchronous copy still writes"):
        gemm(hopper, 128, 64, 128, fault=4)


def test_missing_store_wait(hopper):
    with pytest.raises(Fault, match="bulk store has"):
        gemm(hopper, 128, 64, 64, fault=5)


def test_pipeline_deadlock(hopper):
    with pytest.raises(Fault, match=r"deadlock[\s\S]*warp 0 lanes 00000001: waiting on mbarrier[\s\S]*try_wait"):
        gemm(hopper, 128, 64, 512, fault=6)


def test_bulk(hopper, schedule):
    hopper.options(**schedule)
    x, o = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32), np.ones(256, np.float32)
    hopper.bulk(x, o, 3, 256)
    np.testing.assert_allclose(o, 1 + 2 * x.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("at", [(0, 0, 0), (-8, -2, 1), (40, 5, -1), (-3, 1, 4)])
def test_tma_box(hopper, schedule, swizzle, at):
    hopper.options(**schedule)
    d, b = (72, 9, 5), (8 << max(swizzle, 1), 4, 3)
    x = np.arange(1, 1 + d[0] * d[1] * d[2], dtype=np.uint16).reshape(d[::-1])
    o = np.zeros(b[::-1], np.uint16)
    hopper.box(x, o, *d, *b, *at, swizzle)
    pad = np.pad(x, 64)
    ref = pad[tuple(slice(64 + at[i], 64 + at[i] + b[i]) for i in (2, 1, 0))]
    assert (o == ref).all()


def test_cp_async_mbarrier(hopper, schedule):
    hopper.options(**schedule)
    x, o = np.arange(128, dtype=np.int32).reshape(32, 4), np.zeros((32, 4), np.int32)
    hopper.cpmbar(x, o)
    assert (o == x[::-1]).all()


def test_cluster(hopper, schedule):
    hopper.options(**schedule)
    x, o = np.arange(128, dtype=np.int32) * 7, np.zeros((4, 128), np.int32)
    hopper.cluster(x, o, 4)
    for i in range(4):
        assert (o[i, :64] == (i ^ 1) * 1000 + np.arange(64)).all()
        assert (o[i, 64:] == x[i // 2 * 64 : i // 2 * 64 + 64]).all()


NAMES = [
    "K128",
    "K64/K32",
    "K-inter",
    "MN128",
    "MN64/K64",
    "K32/MN32",
    "MN-inter",
    "RS/MN128",
    "e4m3",
    "s8",
    "f16-acc",
    "tf32",
]


@pytest.mark.parametrize("v", range(12), ids=NAMES)
def test_cute(cute, v):
    n = 128
    g = torch.Generator().manual_seed(v)
    if v == 9:
        a, b = (torch.randint(-128, 128, (n, n), generator=g).to(torch.int8) for _ in "ab")
        c = torch.zeros(n, n, dtype=torch.int32)
        ref = a.int() @ b.int().T
    else:
        t = {8: torch.float8_e4m3fn, 10: torch.float16, 11: torch.float32}.get(v, torch.bfloat16)
        a, b = (torch.randn(n, n, generator=g).bfloat16().to(t) for _ in "ab")
        c = torch.zeros(n, n, dtype=torch.float16 if v == 10 else torch.float32)
        ref = a.float() @ b.float().T
    cute.cute_gemm(a.view(torch.uint8), b.view(torch.uint8), c, v)
    tol = 0.1 if v == 10 else 1e-4
    torch.testing.assert_close(c.to(ref.dtype), ref, atol=tol, rtol=tol)


@pytest.mark.parametrize(
    ("v", "k", "ta", "tb", "tc"),
    [
        (0, 16, "bfloat16", "bfloat16", "float32"),
        (1, 8, "bfloat16", "bfloat16", "float32"),
        (2, 8, "float32", "float32", "float32"),
        (3, 4, "float32", "float32", "float32"),
        (4, 16, "float16", "float16", "float16"),
        (5, 32, "uint8", "int8", "int32"),
        (6, 16, "int8", "int8", "int32"),
    ],
)
def test_mma_atoms(cute, v, k, ta, tb, tc):
    g = torch.Generator().manual_seed(v)

    def make(t, *s):
        t = getattr(torch, t)
        return (
            torch.randn(s, generator=g).bfloat16().to(t)
            if t.is_floating_point
            else torch.randint(0 if t == torch.uint8 else -128, 255 if t == torch.uint8 else 128, s, generator=g).to(t)
        )

    a, b, c = make(ta, 16, k), make(tb, 8, k), make(tc, 16, 8)
    wide = torch.float32 if c.is_floating_point() else torch.int32
    ref = c.to(wide) + a.to(wide) @ b.to(wide).T
    cute.mma_atom(a.view(torch.uint8), b.view(torch.uint8), c, v)
    torch.testing.assert_close(c.to(wide), ref, atol=2e-2 if tc == "float16" else 1e-4, rtol=1e-3)


def test_cute_missing_wait(cute):
    a, b, c = bf16(128, 128), bf16(128, 128, seed=1), torch.zeros(128, 128)
    with pytest.raises(Fault, match="wgmma result that has not been waited for"):
        cute.cute_gemm(a, b, c, 100)
