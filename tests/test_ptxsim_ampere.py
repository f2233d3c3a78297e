"""sm_80: cp.async, ldmatrix and mma.sync, and kernels that forget a wait."""

import numpy as np
import pytest
import torch

from ptxsim.testing import Fault

pytestmark = pytest.mark.ptxsim


def bf16(*s, seed=0):
    return torch.randn(s, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(("M", "N", "K"), [(128, 64, 64), (256, 128, 256), (200, 72, 192)])
def test_gemm(ampere, schedule, M, N, K):
    ampere.options(**schedule)
    a, b, c = bf16(M, K), bf16(N, K, seed=1), torch.zeros(M, N)
    ampere.gemm(a, b, c, M, N, K, 0)
    torch.testing.assert_close(c, a.float() @ b.float().T, atol=1e-3, rtol=1e-4)


def gemm_wrong(ampere, fault, **opts):
    a, b, c = bf16(256, 256), bf16(128, 256, seed=1), torch.zeros(256, 128)
    ampere.options(**opts)
    ampere.gemm(a, b, c, 256, 128, 256, fault)
    return not torch.allclose(c, a.float() @ b.float().T, atol=1e-3, rtol=1e-4)


def test_missing_cp_async_wait(ampere):
    with pytest.raises(Fault, match="that an asynchronous copy still writes"):
        gemm_wrong(ampere, 1)


def test_missing_cp_async_wait_value(ampere):
    assert gemm_wrong(ampere, 1, uninit=0)


def test_early_refill(ampere):
    """The next tile's cp.async overwrites a buffer that other warps still read."""
    assert any(gemm_wrong(ampere, 2, sched="random", async_="eager", seed=s) for s in range(4))
    with pytest.raises(Fault, match="race"):
        gemm_wrong(ampere, 2, race=1)


def test_imma(ampere, schedule):
    ampere.options(**schedule)
    r = np.random.default_rng(0)
    a, b, c = (
        r.integers(-128, 128, (16, 96)).astype(np.int8),
        r.integers(-128, 128, (8, 96)).astype(np.int8),
        np.zeros((16, 8), np.int32),
    )
    ampere.imma(a, b, c, 96)
    assert (c == a.astype(np.int32) @ b.astype(np.int32).T).all()


@pytest.mark.parametrize("S", [64, 200])
def test_flash(ampere, schedule, S):
    ampere.options(**schedule)
    H, D = 2, 64
    q, k, v = (bf16(H, S, D, seed=i) for i in range(3))
    o, lse = torch.zeros(H, S, D).bfloat16(), torch.zeros(H, S)
    ampere.flash(q, k, v, o, lse, H, S, D**-0.5)
    s = (q.float() @ k.float().transpose(1, 2)) * D**-0.5
    s = s.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(o.float(), torch.softmax(s, -1) @ v.float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1), atol=1e-3, rtol=1e-3)
