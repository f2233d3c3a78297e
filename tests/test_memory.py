"""The memory formula against what is really allocated."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DUAL_CHUNK, GPU_KERNELS, TINY, WriteCheckpoint
from qwen_sparse import PagedKVCache, estimate_memory, load_model, ops
from qwen_sparse.base import resources
from qwen_sparse.base.resources import available_memory, format_bytes, peak_resident_memory, resident_memory
from qwen_sparse.engine import memory
from qwen_sparse.engine.memory import estimate_calibration_memory, index_bytes
from qwen_sparse.model import linear
from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.loader import load_config
from test_config import QWEN25_7B_1M

QWEN_7B = ModelConfig.from_dict(QWEN25_7B_1M)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": False}, {"num_attention_heads": 4, "num_hidden_layers": 3}],
    ids=["plain", "tied", "no_bias", "wider"],
)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_weights_and_cache_are_exact(
    write_checkpoint: WriteCheckpoint, options: dict[str, Any], kv_cache_dtype: str
) -> None:
    model = load_model(write_checkpoint(**options), dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    estimate = estimate_memory(model.config, 1000, kv_cache_dtype=kv_cache_dtype, dtype=torch.bfloat16)
    assert estimate.weights == model.weights.nbytes
    assert estimate.kv_cache == model.new_cache(1000).nbytes


def test_million_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the Qwen2.5-1M report: 71 GB of activations become 2.4 GB; 57 GB of keys and values halve."""
    monkeypatch.setattr(memory, "widens", lambda *_: False)  # whatever the CPU
    million = 10**6
    wide = estimate_memory(QWEN_7B, million, chunk_tokens=32768)
    int8 = estimate_memory(QWEN_7B, million, kv_cache_dtype="int8", chunk_tokens=32768)
    one_shot = estimate_memory(QWEN_7B, million, chunk_tokens=million)
    assert wide.weights == pytest.approx(15.23e9, rel=1e-3)
    assert wide.kv_cache == pytest.approx(57.3e9, rel=2e-3)
    assert int8.kv_cache == pytest.approx(57.3e9 * (1 + 4 / 128) / 2, rel=2e-3)
    assert 1 - wide.activations / one_shot.activations == pytest.approx(0.967, abs=1e-3)
    assert wide.total == wide.weights + wide.kv_cache + wide.activations + wide.indexes + wide.workspace
    assert str(wide).startswith("76.0 GB (weights 15.2 GB, KV cache 57.3 GB, activations 3.42 GB, ")


def test_batch_multiplies_the_cache_only() -> None:
    one, many = estimate_memory(QWEN_7B, 8192), estimate_memory(QWEN_7B, 8192, batch=64)
    assert many.kv_cache == 64 * one.kv_cache
    assert (many.weights, many.activations, many.workspace) == (one.weights, one.activations, one.workspace)


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out at once during ``run``, on top of those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measured_peak(model: Decoder, n: int, chunk_tokens: int, cache: PagedKVCache) -> int:
    """Most bytes that a prefill of n tokens held at once on top of weights and cache, by the allocator's records."""
    ids = torch.randint(TINY["vocab_size"], (n,), generator=torch.Generator().manual_seed(0))
    start, total = cache.seqlen, cache.seqlen + n
    model.forward(ids[:chunk_tokens], cache, sparse=model.prefills_sparse(total))  # constants that stay
    cache.truncate(start)
    cache.pool.release_workspace()

    def run() -> None:
        for row in range(0, n, chunk_tokens):
            model.forward(ids[row : row + chunk_tokens], cache, sparse=model.prefills_sparse(total), prompt_len=total)

    return allocated_peak(run)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize(("chunked", "sparse"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("intermediate_size", [192, 1024], ids=["attention_peak", "mlp_peak"])
def test_prefill_stays_within_the_estimate(
    write_checkpoint: WriteCheckpoint, intermediate_size: int, chunked: bool, sparse: bool, kv_cache_dtype: str
) -> None:
    """Measured from below and above: kernel scratch is the only thing the formula leaves out."""
    model = load_model(
        write_checkpoint(
            intermediate_size=intermediate_size,
            num_attention_heads=4,
            num_key_value_heads=2,
            sparse=(64, 200) if sparse else None,
            **({"dual_chunk_attention_config": DUAL_CHUNK} if chunked else {}),
        ),
        kv_cache_dtype=kv_cache_dtype,
        attention="sparse" if sparse else "dense",
    )
    estimate = estimate_memory(model.config, 4096, kv_cache_dtype=kv_cache_dtype, chunk_tokens=2048)
    peak = measured_peak(model, 4096, 2048, model.new_cache(4096))
    expected = estimate.activations + estimate.indexes + estimate.workspace
    assert 0.6 * expected < peak < 1.1 * expected


def test_widened_products_are_in_the_estimate(
    write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_FAST", frozenset())
    model = load_model(write_checkpoint(intermediate_size=2048), dtype="bfloat16")
    estimate = estimate_memory(model.config, 2048, dtype=torch.bfloat16)
    assert estimate.workspace > estimate.activations / 2
    peak = measured_peak(model, 2048, 2048, model.new_cache(2048))
    assert 0.6 * (estimate.activations + estimate.workspace) < peak < 1.1 * (estimate.activations + estimate.workspace)


def test_selection_scores_are_in_the_estimate(write_checkpoint: WriteCheckpoint) -> None:
    """With short prefill chunks of a long prompt they are half of what a sparse prefill needs."""
    model = load_model(
        write_checkpoint(num_attention_heads=4, num_key_value_heads=2, sparse=(64, 200)), max_seq_len=2**15
    )
    model = model.with_options(attention="sparse")
    estimate = estimate_memory(model.config, 2**15, chunk_tokens=128)
    cache = model.new_cache(2**15)
    cache.commit(2**15 - 256)  # as if so many tokens had been prefilled
    peak = measured_peak(model, 256, 128, cache)
    assert estimate.workspace == 0
    assert estimate.indexes > 8 * 4 * 2**15 > estimate.activations
    expected = (
        estimate.activations + estimate.indexes - 8 * 2**15 * torch.get_num_threads()
    )  # not torch's: for the top-k
    assert 0.8 * expected < peak < 1.1 * expected


INDEX_CASES = {"selection": (9000, 20, 30), "attention": (700, 600, 300)}
"""Keys, columns and distances; named after the step that takes more."""


def index_run(namespace: Any, device: str, seqlen: int, vertical: int, slash: int) -> Callable[[], object]:
    """Selection and attention of 4 heads for the last 64 rows, in bfloat16."""
    q = torch.zeros(64, 4, 64, device=device, dtype=torch.bfloat16)  # scores are equal, so the top-k goes through all
    k, v = (torch.randn(seqlen, 2, 64, device=device).bfloat16() for _ in range(2))

    def run() -> object:
        indexes = namespace.select_vertical_slash(q, k, [vertical] * 4, [slash] * 4, 64, 0.125, None, None, None)
        return namespace.vertical_slash_attention(q, k, v, *indexes, 0.125)

    return run


@pytest.mark.parametrize("case", INDEX_CASES)
@pytest.mark.parametrize("kernels", GPU_KERNELS, indirect=True)
def test_indexes_on_a_gpu_are_exact(case: str, kernels: str) -> None:
    """Every byte that the ops allocate, but for roundings and attention's results, which activations hold."""
    seqlen, vertical, slash = INDEX_CASES[case]
    device, namespace = ("cuda", torch.ops.qwen_sparse) if kernels == "cuda" else ("cpu", ops._ops.namespace)
    run = index_run(namespace, device, seqlen, vertical, slash)
    if kernels == "cuda":
        gc.collect()  # what earlier tests left would be freed during the run, and lower its peak
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = allocated_peak(run)
    expected = index_bytes(4, 64, 64, seqlen, vertical, slash, 2, on_gpu=True)
    results = 64 * 4 * (64 * 2 + 4) + 8 * 4 if case == "attention" else 0
    assert expected <= peak - results <= expected + 16 * 512


RESIDENT_GROWTH = """
from pathlib import Path
import torch
from test_memory import index_run

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(2)
run = index_run(torch.ops.qwen_sparse, "cpu", {case})
run()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = high_water()
run()
print(high_water() - before)
"""


@pytest.mark.parametrize("case", [(2**20, 100, 100), (2**16, 60_000, 1000)], ids=list(INDEX_CASES))
def test_indexes_on_a_cpu(case: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are allocated outside of torch: measured by resident memory, in a process that returns what it frees."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not reset a process's peak of resident memory")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    code = RESIDENT_GROWTH.format(case=", ".join(map(str, case)))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "QWEN_SPARSE_CPU_ISA": "baseline",  # the others have no more of indexes, and tiles pack keys besides
    }
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = index_bytes(4, 64, 64, *case, 2, on_gpu=False)
    assert expected > 50_000_000
    assert int(output.stdout) == pytest.approx(expected, rel=0.03)


def test_indexes_of_the_widest_layer(write_checkpoint: WriteCheckpoint) -> None:
    config = load_config(write_checkpoint(sparse=(64, 200)))
    layers = ((64, 64), (50, 3000)), ((200, 200), (100, 4000))  # columns and distances of two layers' heads
    assert config.sparse is not None
    sparse = replace(config.sparse, vertical_sizes=layers[0], slash_sizes=layers[1])
    for device, on_gpu in (("cpu", False), ("cuda", True)):
        estimate = estimate_memory(replace(config, sparse=sparse), 4096, device=device)
        assert estimate.indexes == index_bytes(2, 64, 4096, 4096, 3000, 4000, 4, on_gpu=on_gpu)
        assert estimate_memory(replace(config, sparse=None), 4096, device=device).indexes == 0


def test_rules() -> None:
    for name in ("seqlen", "batch", "chunk_tokens"):
        for value in (0, 1.5, float("nan"), "many", True):
            with pytest.raises(ValueError, match=rf"{name} must be (an integer )?>= 1, got {value!r}"):
                estimate_memory(QWEN_7B, **{"seqlen": 1, name: value})
    for estimate in (estimate_memory, estimate_calibration_memory):
        assert estimate(QWEN_7B, 2000, dtype="bfloat16") == estimate(QWEN_7B, 2000, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"dtype must be one of bfloat16, float16, float32, got torch\.int8"):
            estimate(QWEN_7B, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="kv_cache_dtype must be"):
        estimate_memory(QWEN_7B, 1, kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="needs a model in bfloat16"):
        estimate_memory(replace(QWEN_7B, dtype=torch.float32), 1, kv_cache_dtype="bfloat16")


def test_what_the_system_says() -> None:
    available, resident = available_memory(), resident_memory()
    if available is None or resident is None:
        pytest.skip("this system has no /proc")
    assert 10**6 < available < 10**15
    assert 10**7 < resident <= 1.05 * peak_resident_memory()
    ballast = torch.ones(25_000_000)
    grown = resident_memory()
    assert grown is not None
    assert grown - resident == pytest.approx(ballast.nbytes, rel=0.1)


def test_control_group_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 200000\nactive_file 100000\n")
    monkeypatch.setattr(resources, "_CONTROL_GROUPS", ((tmp_path, "memory.max", "memory.current"),))
    if available_memory() is None:
        pytest.skip("this system has no /proc")
    assert available_memory() == 800_000  # 500000 unused, 300000 of file pages
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = available_memory()
    assert unlimited is not None
    assert unlimited > 10**6


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (822_400, "822 KB"),
        (999_600, "1.00 MB"),
        (15_230_000_000, "15.2 GB"),
        (2 * 10**12, "2.00 TB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
