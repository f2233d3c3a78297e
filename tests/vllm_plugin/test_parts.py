"""Parts of the vLLM plugin without an engine: cache views, batches, what is refused, versions."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from engine import environment
from torch import Tensor, nn
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, compute_layer_kv_cache_shape_bytes

from conftest import DUAL_CHUNK, budgets
from qwen_sparse import ops
from qwen_sparse.model import rope
from qwen_sparse.vllm import lengths, register, support
from qwen_sparse.vllm.backend import DualChunkBackend
from qwen_sparse.vllm.metadata import DualChunkMetadataBuilder
from qwen_sparse.vllm.pages import split_cache
from qwen_sparse.vllm.projection import key_bias, remember_parent

CHUNK_LEN = DUAL_CHUNK["chunk_size"] - DUAL_CHUNK["local_size"]


def spec(dtype: torch.dtype, mode: KVQuantMode, num_kv_heads: int = 3, head_size: int = 64) -> FullAttentionSpec:
    plain = FullAttentionSpec(
        block_size=32, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype, kv_quant_mode=mode
    )
    customized: FullAttentionSpec = DualChunkBackend.customize_spec(plain)
    return customized


def cache_of(spec: FullAttentionSpec, num_blocks: int = 5) -> Tensor:
    """As vLLM makes it, in the layout that the backend asks for."""
    shape = compute_layer_kv_cache_shape_bytes(spec, num_blocks)
    return torch.zeros(shape, dtype=torch.int8).view(spec.dtype)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.bfloat16, KVQuantMode.NONE), (torch.int8, KVQuantMode.INT8_PER_TOKEN_HEAD)],
    ids=["bfloat16", "int8"],
)
def test_cache_views(dtype: torch.dtype, mode: KVQuantMode) -> None:
    """What is stored through the views is gathered through them, fills the cache, and rows are aligned for a GPU."""
    cache = cache_of(spec(dtype, mode))
    pages = split_cache(cache, 3, 64)
    assert pages.k.shape == pages.v.shape == (5, 32, 3, 64)
    assert all(stride * pages.k.element_size() % 16 == 0 for stride in pages.k.stride()[:3])
    assert pages.v.data_ptr() % 16 == 0
    k, v = (torch.randn(160, 3, 64, dtype=torch.bfloat16) for _ in range(2))
    scales = {"k_scale": pages.k_scale, "v_scale": pages.v_scale}
    ops.store_kv(k, v, pages.k, pages.v, torch.arange(160), **scales)
    out = torch.empty_like(k), torch.empty_like(v)
    ops.gather_kv(pages.k, pages.v, torch.arange(5, dtype=torch.int32), *out, **scales)
    limit = 0.0 if mode is KVQuantMode.NONE else 0.03
    assert all(float((a - b).abs().max()) <= limit for a, b in zip((k, v), out, strict=True))
    if mode is KVQuantMode.NONE:
        assert torch.equal(cache[0, 1, 7, :64], k[7, 1])
        assert torch.equal(cache[0, 1, 7, 64:], v[7, 1])


@pytest.mark.parametrize(("num_kv_heads", "head_size", "expected"), [(1, 64, 144), (4, 128, 1056), (3, 64, 416)])
def test_bytes_of_int8_rows(num_kv_heads: int, head_size: int, expected: int) -> None:
    """2 H (D + 4), rounded up to 16."""
    int8 = spec(torch.int8, KVQuantMode.INT8_PER_TOKEN_HEAD, num_kv_heads, head_size)
    assert int8.page_size_bytes == 32 * expected
    assert spec(torch.bfloat16, KVQuantMode.NONE).page_size_bytes == 32 * 3 * 64 * 2 * 2


def engine_config(**changes: Any) -> SimpleNamespace:
    text = SimpleNamespace(dual_chunk_attention_config=DUAL_CHUNK, rope_parameters={"rope_theta": 1e4})
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, dtype=torch.bfloat16, uses_mrope=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[]),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return config


def common(query_lens: list[int], seqlens: list[int]) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    rows = [range(end - n, end) for n, end in zip(query_lens, seqlens, strict=True)]
    positions = torch.tensor([position for each in rows for position in each], dtype=torch.int64)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seqlens, dtype=torch.int32),
        num_reqs=len(seqlens),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seqlens),
        block_table_tensor=torch.zeros(len(seqlens), 64, dtype=torch.int32),
        slot_mapping=torch.arange(len(positions)),
        positions=positions,
        seq_lens_cpu_upper_bound=torch.tensor(seqlens, dtype=torch.int32),
    )


@pytest.fixture
def builder() -> DualChunkMetadataBuilder:
    return DualChunkMetadataBuilder(None, [], engine_config(), torch.device("cpu"))


def test_mixed_batch(builder: DualChunkMetadataBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_of_runner = SimpleNamespace(num_prompt_tokens=np.array([100, 900, 900, 40, 7], dtype=np.int32))
    monkeypatch.setattr(lengths, "_running", [SimpleNamespace(input_batch=batch_of_runner)])
    batch = builder.build(common_prefix_len=0, common_attn_metadata=common([1, 1, 30, 20], [300, 600, 130, 40]))
    assert (batch.num_decodes, batch.num_rows) == (2, 52)
    assert [tuple(prefill) for prefill in batch.prefills] == [(2, slice(2, 32), 130, 900), (3, slice(32, 52), 40, 40)]
    assert torch.equal(batch.rotations, batch.positions % CHUNK_LEN)
    assert [prefill.dense_rows for prefill in batch.prefills] == [0, 20]
    # The second row is one token of a longer prompt: its temperature follows the prompt.
    expected = [rope.dual_chunk_temperature(length, 256) ** 2 for length in (300, 900)]
    assert batch.scale_factors is not None
    assert batch.scale_factors[:2].tolist() == pytest.approx(expected, rel=1e-6)


BUDGETS = budgets({"num_attention_heads": 4, "num_hidden_layers": 2}, 40, 100)


@pytest.mark.parametrize(
    ("additional", "dual_chunk", "coverage", "threshold"),
    [
        ({}, {}, None, None),
        ({"other": {"coverage": 3}}, {"sparse_attention_config": BUDGETS}, None, 32768),
        ({"qwen_sparse": {"coverage": 0.95}}, {"sparse_attention_config": BUDGETS}, 0.95, 32768),
        ({"qwen_sparse": {"coverage": 0.9}}, {"sparse_attention_threshold": 400}, 0.9, 400),
        ({"qwen_sparse": {"coverage": 0.9, "threshold": 0}}, {"sparse_attention_threshold": 400}, 0.9, 0),
        ({"qwen_sparse": {"coverage": 0.9}}, {"sparse_attention_enabled": True}, 0.9, 32768),
    ],
)
def test_sparse_config(
    additional: dict[str, Any], dual_chunk: dict[str, Any], coverage: float | None, threshold: int | None
) -> None:
    """A coverage replaces budgets, and needs none."""
    found = support.sparse_config(additional, {**DUAL_CHUNK, **dual_chunk}, num_layers=2, num_heads=4)
    assert (found and (found.coverage, found.threshold, found.enabled)) == (
        None if threshold is None else (coverage, threshold, True)
    )
    if found is not None:
        own = found.of_layer(1, slice(2, 4))
        assert own.vertical_sizes == (() if coverage else ((40, 40),))
        assert own.slash_sizes == (() if coverage else ((100, 100),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (0.95, r'must be an object such as {"coverage": 0\.95}, got 0\.95'),
        ({}, r"must have a coverage, the share of attention to keep, got {}"),
        ({"threshold": 5}, r"must have a coverage, the share of attention to keep, got {'threshold': 5}"),
        ({"coverage": 0.9, "budget": 5}, "unsupported keys budget; known are coverage, threshold"),
        ({"coverage": 1.5}, r"coverage must lie in \(0, 1\), got 1\.5"),
        ({"coverage": "0.9"}, r"coverage must lie in \(0, 1\), got '0\.9'"),
        ({"coverage": 0.9, "threshold": -1}, r"threshold must be an integer in \[0, .*got -1"),
        ({"coverage": 0.9, "threshold": 1.5}, r"threshold must be an integer in \[0, .*got 1\.5"),
    ],
)
def test_wrong_additional_config(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^qwen_sparse: additional_config\['qwen_sparse'\].*" + message):
        support.sparse_config({"qwen_sparse": options}, DUAL_CHUNK, num_layers=2, num_heads=4)


def test_additional_config_without_dual_chunk() -> None:
    """Options of the plugin for a model that it leaves alone would do nothing, so they are refused."""
    asked = {"qwen_sparse": {"coverage": 0.9}}
    support.check_unused(engine_config(additional_config=asked))
    plain = engine_config(additional_config={}, model_config__hf_text_config=SimpleNamespace())
    support.check_unused(plain)
    plain.additional_config = asked
    with pytest.raises(ValueError, match="is for models with a dual_chunk_attention_config, and this one has none"):
        support.check_unused(plain)


def test_decode_batches_lie_at_fixed_addresses(builder: DualChunkMetadataBuilder) -> None:
    """A captured graph reads them again in later steps; padding (no tokens, length 0) changes nothing."""
    first = builder.build_for_cudagraph_capture(common([1, 1, 1], [300, 10, 600]))
    second = builder.build(0, common([1, 1, 0], [700, 11, 0]))
    assert (first.num_decodes, second.num_decodes, second.prefills) == (3, 2, [])
    assert first.scale_factors is not None
    assert second.scale_factors is not None
    for name in ("rotations", "scale_factors"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    expected = [rope.dual_chunk_temperature(length, 256) ** 2 for length in (700, 11, 0)]
    assert first.scale_factors.tolist() == pytest.approx(expected, rel=1e-6)


def test_prompt_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """From both of vLLM's model runners; unknown while none runs a model."""
    batch = SimpleNamespace(num_reqs=3, req_idx=np.array([4, 0]))
    assert lengths.prompt_lengths(batch) is None
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([10, 11, 12, 13, 14], dtype=np.int32)))
    monkeypatch.setattr(lengths, "_running", [SimpleNamespace(req_states=states)])
    known = lengths.prompt_lengths(batch)
    assert known is not None
    assert known[:2].tolist() == [14, 10]
    monkeypatch.setattr(lengths, "_running", [SimpleNamespace()])
    assert lengths.prompt_lengths(batch) is None


def test_runners_are_noted_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class GPUModelRunner:
        def execute_model(self) -> None:
            seen.append(list(lengths._running))
            raise KeyboardInterrupt

    module = SimpleNamespace(GPUModelRunner=GPUModelRunner)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", module)
    for _ in range(2):
        lengths.watch_runners()
    runner = GPUModelRunner()
    with pytest.raises(KeyboardInterrupt):
        runner.execute_model()
    assert seen == [[runner]]
    assert lengths._running == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("speculative_config", object(), "speculative_config is not supported"),
        ("kv_transfer_config", object(), "kv_transfer_config is not supported"),
        ("parallel_config__decode_context_parallel_size", 2, "decode_context_parallel_size is not supported"),
        ("parallel_config__prefill_context_parallel_size", 2, "prefill_context_parallel_size is not supported"),
        ("parallel_config__enable_dbo", True, "enable_dbo is not supported"),
        ("cache_config__kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill is not supported"),
        ("model_config__dtype", torch.float64, "dtype must be bfloat16 or float16 or float32, got torch.float64"),
        ("model_config__uses_mrope", True, "one position per token"),
        (
            "model_config__hf_text_config__rope_parameters",
            {"rope_type": "yarn"},
            "rope_parameters must be rope_type 'default'",
        ),
    ],
)
def test_refused_engine_options(name: str, value: Any, message: str) -> None:
    support.check_engine(engine_config())
    with pytest.raises(ValueError, match=message):
        support.check_engine(engine_config(**{name: value}))


@pytest.mark.parametrize(
    ("methods", "build", "message"),
    [
        ({"is_rocm": True, "is_cpu": False}, "13.0", "device must be a CPU or an NVIDIA GPU"),
        ({"is_cpu": False}, "13.0", "device must be a CPU or an NVIDIA GPU"),
        ({"is_cpu": False, "is_cuda": True}, None, "device must be a build of qwen_sparse with CUDA"),
        (
            {"is_cpu": False, "is_cuda": True, "has_device_capability": False, "get_device_capability": "7.5"},
            "13.0",
            "compute capability 8.0 or later, got 7.5",
        ),
    ],
)
def test_refused_devices(
    methods: dict[str, Any], build: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, value in methods.items():
        monkeypatch.setattr(type(current_platform), method, lambda *_, value=value: value)
    monkeypatch.setattr(support._C, "build_info", lambda: {"cuda": build})
    with pytest.raises(ValueError, match=message):
        support.check_engine(engine_config())


def test_float32_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, value in {"is_cpu": False, "is_cuda": True, "has_device_capability": True}.items():
        monkeypatch.setattr(type(current_platform), method, lambda *_, value=value: value)
    monkeypatch.setattr(support._C, "build_info", lambda: {"cuda": "13.0"})
    support.check_engine(engine_config())
    with pytest.raises(ValueError, match=r"dtype must be bfloat16 or float16, got torch\.float32"):
        support.check_engine(engine_config(model_config__dtype=torch.float32))


LAYER = {
    "head_size": 128,
    "group_size": 7,
    "kv_cache_dtype": "auto",
    "dtype": torch.bfloat16,
    "attn_type": "decoder",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_size": 96}, "head_size must be 64 or 128, got 96"),
        ({"group_size": 65}, "num_heads / num_kv_heads must be at most 64, got 65"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype must be 'auto' or .*'bfloat16', got 'float16'"),
        ({"attn_type": "encoder_only"}, "attn_type must be 'decoder', got 'encoder_only'"),
        ({"sliding_window": 4096}, "sliding_window must be None, got 4096"),
        ({"sinks": torch.zeros(1)}, "sinks must be None"),
    ],
)
def test_refused_layers(changes: dict[str, Any], message: str) -> None:
    support.check_layer(**LAYER)
    support.check_layer(**{**LAYER, "kv_cache_dtype": "bfloat16", "sliding_window": None})
    with pytest.raises(ValueError, match=message):
        support.check_layer(**{**LAYER, **changes})


def test_rope_theta() -> None:
    assert support.check_rope_theta({"rope_theta": 1e7}) == 1e7
    with pytest.raises(ValueError, match="rope_parameters must be an object with rope_theta, got None"):
        support.check_rope_theta(None)


def test_key_bias() -> None:
    """The middle of the fused bias; none behind a norm; a model that hides it is refused."""
    parent = nn.Module()
    with pytest.raises(ValueError, match=r"has no qkv_proj; use the default kv_cache_dtype"):
        key_bias(parent, 4, 2, 64)
    parent.qkv_proj = nn.Linear(8, 8 * 64, dtype=torch.bfloat16)
    bias = key_bias(parent, 4, 2, 64)
    assert bias is not None
    assert torch.equal(bias, parent.qkv_proj.bias[256:384].float().view(2, 64))
    with pytest.raises(ValueError, match="= 768 elements, got 512"):
        key_bias(parent, 4, 4, 64)
    parent.k_norm = nn.Identity()
    assert key_bias(parent, 4, 2, 64) is None


def test_parent_is_noted_once() -> None:
    layer, other = nn.Module(), nn.Module()
    layer.impl = SimpleNamespace(parent=None)  # type: ignore[assignment]
    remember_parent(layer)
    parent, second = nn.Module(), nn.Module()
    parent.other = other
    assert layer.impl.parent is None
    parent.attn = layer
    second.attn = layer
    assert layer.impl.parent() is parent


def test_other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.version_problem() is None
    monkeypatch.setattr(vllm, "__version__", "0.99.1+cpu")
    with pytest.raises(RuntimeError, match=r"supported in vLLM 0\.32, and this is vLLM 0\.99\.1\+cpu; install 'vllm=="):
        support.check_version()


REGISTER = """
import vllm, sys
vllm.__version__ = sys.argv[1]
from qwen_sparse.vllm import register
register()
register()
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import get_rope
print("layers", getattr(Attention.__init__, "qwen_sparse", False))
with set_current_vllm_config(VllmConfig()):
    print("plain", type(get_rope(64, 128, rope_parameters={"rope_theta": 1e4})).__name__)
    rope = get_rope(64, 128, dual_chunk_attention_config={"chunk_size": 256, "local_size": 128})
print("dual chunk", type(rope).__name__)
"""


@pytest.mark.parametrize("version", [vllm.__version__, "0.99.1"])
def test_register(version: str) -> None:
    """Twice is once. In another vLLM other models are left alone, and those that need the plugin are refused."""
    settings = environment(VLLM_PLUGINS="")
    done = subprocess.run([sys.executable, "-c", REGISTER, version], env=settings, capture_output=True, text=True)
    assert "plain RotaryEmbedding" in done.stdout
    if version == vllm.__version__:
        assert "layers True" in done.stdout
        assert "dual chunk KeyRotaryEmbedding" in done.stdout
    else:
        assert "layers False" in done.stdout
        assert "and this is vLLM 0.99.1" in done.stderr
        assert done.returncode == 1


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SPARSE_VLLM", "off")
    with pytest.raises(ValueError, match="QWEN_SPARSE_VLLM must be 0 or 1, got 'off'"):
        register()
