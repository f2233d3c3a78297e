"""The whole model on the CUDA kernels: on a GPU, and in the simulator, beside the CPU's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, GPU_KERNELS, MovedOps, WriteCheckpoint
from qwen_sparse import generate, load_model, ops, prefill
from qwen_sparse.models import qwen2
from qwen_sparse.testing import reference_error

TOKENS = torch.randint(0, 256, (330,), generator=torch.Generator().manual_seed(0))


def last_logits(path: Path, device: str, dtype: str, **options: str) -> Tensor:
    """Logits behind a prompt in two prefill chunks and a decode step."""
    model = load_model(path, device=device, dtype=dtype, **options)
    cache = prefill(model, TOKENS[:-1], chunk_tokens=192).cache
    return prefill(model, TOKENS[-1:], cache=cache).logits.cpu()


@pytest.mark.parametrize("kernels", GPU_KERNELS, indirect=True)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("dual_chunk", [False, True], ids=["rope", "dca"])
def test_model(
    write_checkpoint: WriteCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    dual_chunk: bool,
    attention: str,
    kv_cache_dtype: str,
    kernels: str,
) -> None:
    """Errors of bfloat16, against float32, are at most twice those of the CPU's kernels."""
    config = {"dual_chunk_attention_config": DUAL_CHUNK} if dual_chunk else {}
    path = write_checkpoint(sparse=(40, 120), **config)
    options = {"attention": attention, "kv_cache_dtype": kv_cache_dtype}
    with monkeypatch.context() as cpu:
        cpu.setattr(ops, "_ops", torch.ops.qwen_sparse)
        exact, plain = (last_logits(path, "cpu", dtype, **options) for dtype in ("float32", "bfloat16"))
    if kernels == "cuda":
        monkeypatch.setattr(ops, "_ops", torch.ops.qwen_sparse)  # the model's tensors are on the device themselves
    else:
        assert isinstance(ops._ops, MovedOps)
        monkeypatch.setattr(qwen2, "_ops", ops._ops)
    actual = last_logits(path, "cuda" if kernels == "cuda" else "cpu", "bfloat16", **options)
    assert reference_error(actual, exact) <= 2 * reference_error(plain, exact) + 0.02


needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_generate_and_statistics(write_checkpoint: WriteCheckpoint, device: str) -> None:
    path = write_checkpoint(sparse=(40, 120), dual_chunk_attention_config=DUAL_CHUNK)
    model = load_model(path, device=device, dtype="bfloat16", attention="sparse")
    result = prefill(model, TOKENS)
    assert 0 < result.stats.density < 1
    assert result.stats.peak_memory > 0
    assert 0 < sum(result.stats.seconds.values()) <= 1.1 * result.stats.total_seconds
    assert len(list(generate(model, TOKENS[:50], max_new_tokens=5, stop_token_ids=()))) == 5


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_arguments_on_different_devices(device: str) -> None:
    q = torch.randn(4, 2, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"k must be on the device of q \(cuda:0\), got cpu"):
        ops.attention(q, q.cpu(), q)
    with pytest.raises(ValueError, match="q must have dtype bfloat16 or float16 on a GPU, got float32"):
        ops.attention(q.float(), q.float(), q.float())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_decode_in_a_graph(device: str) -> None:
    """Captured once and replayed with other lengths, pages and queries."""
    k, v = (torch.randn(40, 64, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 1, 14, 128, device=device, dtype=torch.bfloat16)
    table = torch.randperm(40, device=device).int()[None]
    seqlens = torch.tensor([100], device=device, dtype=torch.int32)
    ops.decode_attention(q, k, v, table, seqlens)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.decode_attention(q, k, v, table, seqlens)
    for length in (1, 777, 2560):
        q.normal_()
        seqlens.fill_(length)
        table.copy_(table.flip(1))
        graph.replay()
        assert torch.equal(out, ops.decode_attention(q, k, v, table, seqlens))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_ops_run_on_the_current_stream(device: str) -> None:
    q = torch.randn(4096, 4, 128, device=device, dtype=torch.bfloat16)
    expected = ops.attention(q, q, q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(10_000_000)
        late.copy_(q)
        out = ops.attention(late, late, late)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_no_memory_is_kept(device: str) -> None:
    q, k, v = (torch.randn(2048, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))

    def step() -> None:
        vertical, slash = ops.select_vertical_slash(q, k, vertical_size=100, slash_size=200)
        ops.vertical_slash_attention(q, k, v, vertical, slash)

    step()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step()
    assert torch.cuda.memory_allocated() == before
