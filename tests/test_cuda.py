"""The whole model on the CUDA kernels: on a GPU, and in the simulator, beside the CPU's kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, GPU_KERNELS, MovedOps, WriteCheckpoint
from qwen_sparse import generate, load_model, ops, prefill
from qwen_sparse.models import qwen2
from qwen_sparse.testing import reference_error
from test_simulated import CALLS

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


@pytest.fixture
def two_gpus() -> None:
    """Skips where there are not two equal ones: the division of decode's work, and so its bits, follow the model."""
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the first two CUDA devices are not equal")


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", CALLS)
def test_ops_on_another_device_than_the_current_one(name: str) -> None:
    """Every op on the second GPU while the first is current, and on both in turns; nothing is left on the first."""
    results = []
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            torch.cuda.synchronize(0)
            torch.cuda.reset_peak_memory_stats(0)
            held = torch.cuda.memory_allocated(0)
            moved = MovedOps(torch.ops.qwen_sparse, torch.device(device))
            result = CALLS[name](moved)
            results.append([result] if isinstance(result, Tensor) else list(result))
            assert torch.cuda.current_device() == 0
            if device == "cuda:1":
                assert torch.cuda.max_memory_allocated(0) == held
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
def test_models_on_two_devices(write_checkpoint: WriteCheckpoint) -> None:
    """One on each, in turns, while the first is current; caches grow on their own device."""
    path = write_checkpoint(sparse=(40, 120), dual_chunk_attention_config=DUAL_CHUNK)
    options = {"dtype": "bfloat16", "attention": "sparse", "kv_cache_dtype": "int8"}
    with torch.cuda.device(0):
        held = torch.cuda.memory_allocated(0)
        torch.cuda.reset_peak_memory_stats(0)
        alone = last_logits(path, "cuda:1", **options)
        assert torch.cuda.max_memory_allocated(0) == held
        models = [load_model(path, device=device, **options) for device in ("cuda:0", "cuda:1")]
        caches = [prefill(model, TOKENS[:-1], chunk_tokens=192).cache for model in models]
        for model, cache in zip(models, caches, strict=True):
            logits = prefill(model, TOKENS[-1:], cache=cache).logits
            assert logits.device == model.device
            assert torch.equal(logits.cpu(), alone)


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
def test_no_context_on_other_devices() -> None:
    """A process that uses the second GPU takes no memory of the first, not even for a context."""
    code = """
import os, subprocess, torch
from qwen_sparse import ops
q = torch.randn(64, 2, 64, dtype=torch.bfloat16, device="cuda:1")
ops.attention(q, q, q)
torch.cuda.synchronize(1)
query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
print(len([line for line in lines if line.split(",")[0].strip() == str(os.getpid())]))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if output == "0":
        pytest.skip("nvidia-smi does not see this process (another PID namespace)")
    assert output == "1"


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
