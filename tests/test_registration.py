"""What PyTorch expects of registered ops: schemas, fake kernels, torch.compile; and the choice of CPU kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qwen_sparse
import simulated
from qwen_sparse import _C, ops
from qwen_sparse.model.rope import dual_chunk_scale_factors
from qwen_sparse.testing import random_indexes, random_qkv

q, k, v = random_qkv(70, 200, 4, 2, 64, torch.float32)
COLUMNS, SLASHES = random_indexes(4, 200, [20]), random_indexes(4, 200, [5])
THRESHOLDS = torch.full((4, 2), 1 / 200)
GROUPS, _ = ops.select_block_groups(q, k, THRESHOLDS)
POSITIONS = torch.arange(70)
INV_FREQ = 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
PAGES = [torch.randn(3, 16, 2, 64) for _ in range(2)]
TABLE, SEQLENS = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
QUANTIZED = ops.quantize_kv(k, v)

SAMPLES: dict[str, tuple[Any, ...]] = {
    "attention": (q, k, v, 0.125, True, None),
    "vertical_slash_attention": (q, k, v, COLUMNS, SLASHES, 0.125),
    "dual_chunk_attention": (q, q, q, k, v, 64, COLUMNS, SLASHES, None, 0.125),
    "block_group_attention": (q, k, v, GROUPS, 0.125),
    "select_block_groups": (q, k, THRESHOLDS, 0.125, q, q, 64),
    "select_vertical_slash": (q, k, [5, 50, 0, 9], [9] * 4, 64, 0.125, q, q, 64),
    "vertical_slash_scores": (q, k, 64, 0.125, q, q, 64),
    "top_indexes": (torch.randn(4, 200), [5, 50, 0, 300], 9),
    "rotary": (q, k[:70], POSITIONS, INV_FREQ, 1.0),
    "rotary_dual_chunk": (q, k[:70], POSITIONS, INV_FREQ, 1.0, 128, 64, 64),
    "quantize_kv": (k[:70], v[:70], torch.randn(2, 64), POSITIONS, INV_FREQ, 1.0),
    "dequantize_kv": (*QUANTIZED, None, None, None, 1.0, torch.bfloat16),
    "store_kv": (
        k[:20], v[:20], *(torch.zeros(3, 16, 2, 64, dtype=torch.int8) for _ in range(2)), torch.arange(20).flip(0) + 9,
        *(torch.zeros(3, 16, 2) for _ in range(2)), torch.randn(2, 64), POSITIONS[:20], INV_FREQ, 1.0
    ),
    "gather_kv": (
        *PAGES, TABLE[0], None, None, None, None, 1.0, None, torch.empty(20, 2, 64), torch.empty(20, 2, 64)
    ),
    "decode_attention": (
        torch.randn(1, 2, 4, 64), *PAGES, TABLE, SEQLENS, None, None, None, None, 1.0, None, None, None, 0.125,
        torch.tensor([1.3]), None
    ),
}  # fmt: skip


def registered_ops() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("qwen_sparse::") for name in names if name.startswith("qwen_sparse::")}


def test_every_registered_op_has_a_sample() -> None:
    assert registered_ops() == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.qwen_sparse, name).default, SAMPLES[name])


def test_compile_full_graph() -> None:
    """The whole chain of a sparse dual-chunk prefill compiles without a graph break and gives the same result."""

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rotated = ops.rotary(q, k, torch.arange(q.shape[0]), INV_FREQ, chunk_size=128, chunk_len=64)
        assert isinstance(rotated, ops.DualChunkRotary)
        vertical, slash = ops.select_vertical_slash(
            rotated.q_intra,
            rotated.k,
            vertical_size=40,
            slash_size=[110, 120, 130, 140],
            q_succ=rotated.q_succ_critical,
            q_inter=rotated.q_inter_critical,
            chunk_len=64,
        )
        out = ops.dual_chunk_attention(
            rotated.q_intra,
            rotated.q_succ,
            rotated.q_inter,
            rotated.k,
            v,
            chunk_len=64,
            vertical_indexes=vertical,
            slash_indexes=slash,
        )
        assert isinstance(out, torch.Tensor)
        return out * 2 + ops.attention(q, k, v)

    long_q = torch.randn(200, 4, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(long_q, k, v), layer(long_q, k, v))


def test_compile_decode() -> None:
    """With lengths and scale factors that the compiled code computes."""

    def step(q: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        factors = dual_chunk_scale_factors(past + 2, 8)
        out = ops.decode_attention(q, *PAGES, TABLE, (past + 2).int(), scale_factors=factors)
        assert isinstance(out, torch.Tensor)
        return out * 2

    rows, past = torch.randn(1, 2, 4, 64), torch.tensor([18])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, past), step(rows, past))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("attention: k must have dtype float32, got float16", ValueError),
        ("qwen_sparse: prefill: CUDA error: out of memory", RuntimeError),
    ],
)
def test_errors_of_later_torch(message: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2.15 on, what an operator throws is a RuntimeError whatever its type."""

    def fail(*_arguments: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(ops, "_ops", SimpleNamespace(attention=fail))
    with pytest.raises(error, match=re.escape(message)) as caught:
        ops.attention(q, k, v)
    assert type(caught.value) is error


def test_build_info_and_cpu_features() -> None:
    info = qwen_sparse.build_info()
    assert info["version"] == qwen_sparse.__version__
    assert "baseline" in info["cpu_isas"]
    features = qwen_sparse.cpu_features()
    assert features["isa"] in features["supported"]
    assert features["supported"][0] == "baseline"


def test_every_supported_isa_is_tested(isa: str) -> None:
    assert qwen_sparse.cpu_features()["isa"] == isa


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_isa_can_be_chosen_by_environment() -> None:
    result = run_python("import qwen_sparse; print(qwen_sparse.cpu_features()['isa'])", QWEN_SPARSE_CPU_ISA="baseline")
    assert result.stdout.strip() == "baseline", result.stderr


def test_unknown_isa_is_refused() -> None:
    code = "import torch, qwen_sparse; x = torch.zeros(1, 1, 64); qwen_sparse.ops.attention(x, x, x)"
    result = run_python(code, QWEN_SPARSE_CPU_ISA="sse9")
    assert result.returncode == 1
    assert "ValueError: QWEN_SPARSE_CPU_ISA must name an instruction set" in result.stderr
    assert "got 'sse9'" in result.stderr
    with pytest.raises(ValueError, match=r"isa must name an instruction set .*got 'sse9'"):
        _C.set_cpu_isa("sse9")


def test_cuda_arch_of_this_build() -> None:
    archs = qwen_sparse.build_info()["cuda_archs"]
    with pytest.raises(ValueError, match="got 'sm70'"):
        _C.set_cuda_arch("sm70")
    for arch in ("sm80", "sm90"):
        if arch in archs:
            _C.set_cuda_arch(arch)
        else:
            with pytest.raises(ValueError, match=f"this build has no.*got '{arch}'"):
                _C.set_cuda_arch(arch)
    _C.set_cuda_arch("")


@pytest.mark.ptxsim
@pytest.mark.parametrize(
    ("arch", "message"),
    [("sm90", "kernels for sm90 were asked for, but device 0 has compute capability 8.0"), ("sm9", "got 'sm9'")],
)
def test_cuda_arch_from_the_environment(arch: str, message: str) -> None:
    code = """
import torch, simulated
ops = simulated.load()
simulated.options(arch=80)
q = torch.zeros(4, 1, 64).bfloat16()
ops.attention(q, q, q, 1.0, True, None)
"""
    if 90 not in simulated.archs():
        pytest.skip("no kernels for sm90 in this build")
    result = run_python(code, QWEN_SPARSE_CUDA_ARCH=arch, PYTHONPATH=os.pathsep.join(sys.path))
    assert result.returncode != 0
    assert message in result.stderr
