"""The whole model on the CUDA kernels: on a GPU, and in the simulator, beside the CPU's kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, GPU_KERNELS, MovedOps, WriteCheckpoint
from qwen_sparse import _C, generate, load_model, ops, prefill, reference
from qwen_sparse.model import attention as layer_attention
from qwen_sparse.testing import assert_close_to_reference, random_qkv, reference_error
from test_simulated import CALLS

TOKENS = torch.randint(0, 256, (330,), generator=torch.Generator().manual_seed(0))


def use_model_kernels(monkeypatch: pytest.MonkeyPatch, kernels: str) -> str:
    """Sends a model's ops to the kernels of the fixture; the device its tensors belong on."""
    if kernels == "cuda":
        monkeypatch.setattr(ops, "_ops", torch.ops.qwen_sparse)  # the model's tensors are on the device themselves
        return "cuda"
    assert isinstance(ops._ops, MovedOps)
    monkeypatch.setattr(layer_attention, "_ops", ops._ops)
    return "cpu"


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
    actual = last_logits(path, use_model_kernels(monkeypatch, kernels), "bfloat16", **options)
    assert reference_error(actual, exact) <= 2 * reference_error(plain, exact) + 0.02


PROMPT, END = (
    250,
    262,
)  # positions of the prompt's end and of the last step's: a chunk and the trained length end between
STEP_CONFIGS: dict[str, dict[str, Any]] = {
    "rope": {},
    "dca": {"dual_chunk_attention_config": {**DUAL_CHUNK, "original_max_position_embeddings": 0}},
    "dca_temperature": {"dual_chunk_attention_config": DUAL_CHUNK},
}


def step_logits(path: Path, device: str, dtype: str, kv_cache_dtype: str) -> Tensor:
    """Logits of decode steps behind a prompt."""
    model = load_model(path, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    cache = prefill(model, TOKENS[:PROMPT], cache=model.new_cache(END)).cache
    rows = []
    for token in TOKENS[PROMPT:END].to(device):
        length = torch.tensor([cache.seqlen], device=device)
        rows.append(model.decode_step(token[None], length, cache.pool, cache.block_table))
        cache.commit(1)
    return torch.cat(rows).cpu()


def exact_logits(path: Path, kv_cache_dtype: str) -> Tensor:
    """Of one prefill in float32; with a temperature, which would differ, of passes whose lengths the host knows."""
    model = load_model(path, dtype="float32", kv_cache_dtype=kv_cache_dtype)
    dual_chunk = model.config.dual_chunk
    if dual_chunk is None or dual_chunk.original_max_position_embeddings == 0:
        return prefill(model, TOKENS[:END], logits="all").logits[PROMPT:]
    cache = prefill(model, TOKENS[:PROMPT]).cache
    rows = [model.forward(token[None], cache, output="all") for token in TOKENS[PROMPT:END]]
    return torch.cat([row for row in rows if row is not None])


@pytest.mark.parametrize("kernels", GPU_KERNELS, indirect=True)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("config", STEP_CONFIGS)
def test_decode_steps(
    write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch, config: str, kv_cache_dtype: str, kernels: str
) -> None:
    """Steps that depend on the device only, beside a prefill; errors as in the test above."""
    path = write_checkpoint(**STEP_CONFIGS[config])
    with monkeypatch.context() as cpu:
        cpu.setattr(ops, "_ops", torch.ops.qwen_sparse)
        exact, plain = exact_logits(path, kv_cache_dtype), step_logits(path, "cpu", "bfloat16", kv_cache_dtype)
    actual = step_logits(path, use_model_kernels(monkeypatch, kernels), "bfloat16", kv_cache_dtype)
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
@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe", "Qwen2Moe"])
def test_other_architectures(architecture: str, tmp_path: Path, device: str) -> None:
    """Norms of heads, and experts in grouped products: rows as close to float32 as on the CPU, and captured steps."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=260,
        hidden_size=128,
        head_dim=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    torch.manual_seed(0)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(tmp_path)

    def logits(device: str, dtype: str) -> Tensor:
        return prefill(load_model(tmp_path, device=device, dtype=dtype), TOKENS, logits="all").logits.cpu()

    exact = logits("cpu", "float32")
    own, plain = ((logits(*where) - exact).std(-1).median() for where in ((device, "bfloat16"), ("cpu", "bfloat16")))
    assert own <= 2 * plain + 0.01 * exact.std()
    model = load_model(tmp_path, device=device, dtype="bfloat16")
    assert len(list(generate(model, TOKENS[:50], max_new_tokens=8, stop_token_ids=()))) == 8


GREEDY: dict[str, Any] = {"max_new_tokens": 80, "stop_token_ids": ()}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("config", STEP_CONFIGS)
def test_captured_step_gives_the_eager_tokens(
    write_checkpoint: WriteCheckpoint, config: str, kv_cache_dtype: str, options: dict[str, Any], device: str
) -> None:
    """Over a chunk border and the trained length; the kernels are the same, so all tokens are."""
    path = write_checkpoint(**STEP_CONFIGS[config])
    model = load_model(path, device=device, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    prompt = TOKENS[:200]
    expected = list(generate(model, prompt, cuda_graph=False, **options))
    assert len(expected) == 80
    cache = model.new_cache()
    assert list(generate(model, prompt, cache=cache, **options)) == expected
    assert cache.seqlen == 200 + 79
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert list(generate(model, prompt, **options)) == expected
    tokens = generate(model, prompt, **options)
    moved = [next(tokens)]
    with torch.cuda.stream(side):
        moved += tokens  # another stream than the first step's
    assert moved == expected
    first, second = (generate(model, prompt, **options) for _ in range(2))  # two graphs at once
    assert [token for pair in zip(first, second, strict=True) for token in pair] == [x for x in expected for _ in "12"]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("taken", [1, 2, 3, 7])
def test_leaving_a_captured_loop_early(write_checkpoint: WriteCheckpoint, taken: int, device: str) -> None:
    """A step was ahead of the reader; the cache goes on from the tokens that were read."""
    model = load_model(write_checkpoint(dual_chunk_attention_config=DUAL_CHUNK), device=device, dtype="bfloat16")
    cache = model.new_cache()
    tokens = generate(model, TOKENS[:250], cache=cache, **GREEDY)
    read = [next(tokens) for _ in range(taken)]
    del tokens
    assert cache.seqlen == 250 + taken - 1
    again = prefill(model, torch.cat((TOKENS[:250], torch.tensor(read))))
    ours = prefill(model, read[-1:], cache=cache).logits
    torch.testing.assert_close(ours, again.logits, rtol=0, atol=0.3)  # of logits that spread by 2


UNCAPTURABLE = """
import sys
import torch
from qwen_sparse import generate, load_model
from qwen_sparse.model.decoder import Decoder

model = load_model(sys.argv[1], device="cuda", dtype="bfloat16")
step = Decoder.decode_step

def reading(self, input_ids, *arguments):
    assert int(input_ids[0]) >= 0
    return step(self, input_ids, *arguments)

Decoder.decode_step = reading
try:
    list(generate(model, range(50), max_new_tokens=80, stop_token_ids=()))
except RuntimeError as error:
    print(error)
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_cannot_be_captured_is_said(write_checkpoint: WriteCheckpoint) -> None:
    """In a process of its own: a capture that fails leaves torch's generator and allocator unusable."""
    command = [sys.executable, "-c", UNCAPTURABLE, str(write_checkpoint())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be captured in a CUDA graph (cuda_graph=False does without)" in done.stdout


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_captured_steps_keep_no_memory(write_checkpoint: WriteCheckpoint, device: str) -> None:
    model = load_model(write_checkpoint(), device=device, dtype="bfloat16")

    def allocated() -> int:
        list(generate(model, TOKENS[:50], **SAMPLED))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    allocated()  # workspaces of cuBLAS
    assert allocated() == allocated()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_arguments_on_different_devices(device: str) -> None:
    q = torch.randn(4, 2, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"k must be on the device of q \(cuda:0\), got cpu"):
        ops.attention(q, q.cpu(), q)
    with pytest.raises(ValueError, match="q must have dtype bfloat16 or float16 on a GPU, got float32"):
        ops.attention(q.float(), q.float(), q.float())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("chunk_len", [None, 30080], ids=["plain", "dual_chunk"])
@pytest.mark.parametrize("arch", ["", "sm80"], ids=["own_kernels", "sm80"])
def test_block_groups_of_many_keys(arch: str, chunk_len: int | None, device: str) -> None:
    """Several splits of the selection, batches of bitmaps: as the CPU's kernels choose, as the reference attends."""
    q, k, v = random_qkv(1000, 70001, 7, 1, 128, torch.bfloat16)
    queries = [12 * q] if chunk_len is None else [12 * q.roll(i, -1) for i in range(3)]
    rotations: dict[str, Any] = {}
    if chunk_len is not None:
        rotations = {"q_succ": queries[1], "q_inter": queries[2], "chunk_len": chunk_len}
    thresholds = torch.full((7, ops.row_blocks(1000, 70001)), 3 / 70001)
    thresholds[0, 5] = 0

    def moved(values: Any) -> Any:
        return values.to(device) if isinstance(values, Tensor) else values

    def attend(block_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp, attended pairs."""
        namespace = torch.ops.qwen_sparse
        if chunk_len is None:
            return namespace.block_group_attention(*map(moved, (*queries, k, v)), moved(block_groups), 128**-0.5)
        tensors = map(moved, (*queries, k, v))
        return namespace.dual_chunk_attention(*tensors, chunk_len, None, None, moved(block_groups), 128**-0.5)

    _C.set_cuda_arch(arch)
    try:
        options = {name: moved(value) for name, value in rotations.items()}
        bits, kept = ops.select_block_groups(moved(queries[0]), moved(k), moved(thresholds), **options)
        expected_bits, expected_kept = ops.select_block_groups(queries[0], k, thresholds, **rotations)
        torch.testing.assert_close(kept.cpu(), expected_kept, atol=2e-3, rtol=0)
        shifts = torch.arange(32, dtype=torch.int32)
        differing = ((bits.cpu() ^ expected_bits)[..., None] >> shifts & 1).sum()
        assert differing <= 0.01 * (expected_bits[..., None] >> shifts & 1).sum()
        out, lse, attended = attend(expected_bits)
    finally:
        _C.set_cuda_arch("")
    rows, blocks = 100, ops.row_blocks(100, 70001)  # the last ones
    chosen: dict[str, Any] = {"block_groups": expected_bits[:, -blocks:], "return_lse": True}
    definition: Any = reference.block_group_attention
    if chunk_len is not None:
        definition, chosen = reference.dual_chunk_attention, {**chosen, "chunk_len": chunk_len}
    last = (*(x[-rows:] for x in queries), k, v)
    exact, exact_lse = definition(*(x.double() for x in last), **chosen)
    rounded, rounded_lse = definition(*last, compute_dtype=torch.bfloat16, **chosen)
    assert_close_to_reference(out[-rows:].cpu(), exact, rounded)
    assert_close_to_reference(lse[-rows:].cpu(), exact_lse, rounded_lse, floor=2e-5)
    mask = reference.block_group_mask(expected_bits[:1], 1000, 70001)
    assert attended[0].item() == mask.sum()


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
