"""The decode step: equal to a prefill, for several sequences at once, and free of anything a CUDA graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import TINY, WriteCheckpoint
from qwen_sparse import PagedKVCache, load_model, prefill
from qwen_sparse.engine import decoding
from qwen_sparse.engine.decoding import StepGraph, _Steps, decode
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model import decoder
from qwen_sparse.model.decoder import Decoder

VOCAB = TINY["vocab_size"]
IDS = torch.randint(256, (420,), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    name: str
    original: int | None = None
    """Trained length of Dual Chunk Attention (chunks of 192, of which 64 overlap); None: plain RoPE."""
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        return self.name

    def load(self, write_checkpoint: WriteCheckpoint) -> Decoder:
        config: dict[str, Any] = {}
        if self.original is not None:
            sizes = {"chunk_size": 192, "local_size": 64, "original_max_position_embeddings": self.original}
            config["dual_chunk_attention_config"] = sizes
        return load_model(write_checkpoint(**config), kv_cache_dtype=self.kv_cache_dtype)

    @property
    def tolerance(self) -> float:
        """int8: hidden states that differ in the last bit may round to another step."""
        return 5e-5 if self.kv_cache_dtype == "auto" else 3e-2


CASES = [
    Case("rope"),
    Case("rope_int8", kv_cache_dtype="int8"),
    Case("dca", original=0),
    Case("dca_temperature", original=150),
    Case("dca_temperature_int8", original=150, kv_cache_dtype="int8"),
]


def step(model: Decoder, cache: PagedKVCache, token: Tensor) -> Tensor:
    """Logits ``[vocab]`` behind one more token."""
    logits = model.decode_step(token[None], torch.tensor([cache.seqlen]), cache.pool, cache.block_table)
    cache.commit(1)
    return logits[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_forward(case: Case, write_checkpoint: WriteCheckpoint) -> None:
    """Token by token over two chunk borders and the trained length, beside the pass whose lengths the host knows."""
    model = case.load(write_checkpoint)
    stepped, passed = (prefill(model, IDS[:100], cache=model.new_cache(420)).cache for _ in range(2))
    for token in IDS[100:]:
        expected = model.forward(token[None], passed)
        assert expected is not None
        torch.testing.assert_close(step(model, stepped, token), expected, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if not case.original], ids=str)
def test_equals_one_prefill(case: Case, write_checkpoint: WriteCheckpoint) -> None:
    """Without temperature, which follows the current length in decoding."""
    model = case.load(write_checkpoint)
    expected = prefill(model, IDS, logits="all").logits
    cache = prefill(model, IDS[:60], cache=model.new_cache(420)).cache
    for position in range(60, 420):
        logits = step(model, cache, IDS[position])
        torch.testing.assert_close(logits, expected[position], rtol=0, atol=case.tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_sequences(case: Case, write_checkpoint: WriteCheckpoint) -> None:
    """Of different lengths, with pages of one pool; temperatures differ too."""
    model = case.load(write_checkpoint)
    prompts = (IDS[:290], IDS.flip(0)[:120], IDS[50:51])
    alone = [prefill(model, prompt[:-10], cache=model.new_cache(384)).cache for prompt in prompts[:2]]
    alone.append(model.new_cache(384))
    pool = model.new_pool(9)
    tables = torch.tensor([[8, 1, 3], [5, 0, 7], [2, 6, 4]], dtype=torch.int32)
    for table, prompt in zip(tables.tolist(), prompts[:2], strict=False):
        prefill(model, prompt[:-10], cache=PagedKVCache(pool, table))
    for _ in range(10):
        lengths = torch.tensor([cache.seqlen for cache in alone])
        tokens = IDS[lengths]
        logits = model.decode_step(tokens, lengths, pool, tables)
        for row, cache, token in zip(logits, alone, tokens, strict=True):
            torch.testing.assert_close(row, step(model, cache, token), rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replayed(case: Case, write_checkpoint: WriteCheckpoint) -> None:
    """The step's torch calls, recorded once with their Python values, as a CUDA graph does, give the same later on."""
    model = case.load(write_checkpoint)
    cache = prefill(model, IDS[:100], cache=model.new_cache(420)).cache
    length = torch.tensor([cache.seqlen])

    def recorded(tokens: Tensor, lengths: Tensor) -> Tensor:
        return model.decode_step(tokens, lengths, cache.pool, cache.block_table)

    replay = make_fx(recorded)(IDS[100:101], length)
    for position in range(100, 420):
        expected = recorded(IDS[position : position + 1], torch.tensor([position]))
        assert torch.equal(replay(IDS[position : position + 1], torch.tensor([position])), expected)


SAMPLERS = {
    "greedy": Sampler(),
    "all": Sampler(temperature=1.0, seed=0),
    "top_p": Sampler(temperature=1.0, top_p=0.9, seed=0),
    "top_k": Sampler(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=0),
}


class Recorded:
    """In place of ``StepGraph``: records the step's torch calls, with their Python values, and repeats them."""

    def __init__(self) -> None:
        self.replay: Any = None
        self.calls = 0

    def run(self, function: Any) -> None:
        if self.replay is None:
            state = [x for x in vars(function.__self__).values() if isinstance(x, Tensor)]
            before = [x.clone() for x in state]
            self.replay = make_fx(lambda: function())()
            for x, saved in zip(state, before, strict=True):
                x.copy_(saved)  # recording ran the step, which capturing does not
        self.replay()
        self.calls += 1


@torch.inference_mode()
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_step_replayed(
    case: Case, sampler: Sampler, write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sampling and its state, over a chunk border and the trained length, one step ahead of the reader."""
    model = case.load(write_checkpoint)

    def run(ahead: int) -> list[int]:
        cache = model.new_cache(180)
        logits = prefill(model, IDS[:120], cache=cache).logits
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        return list(decode(model, cache, logits[None], seen, sampler=sampler, max_new_tokens=60, ahead=ahead))

    expected, recorded, plain = run(0), Recorded(), _Steps.__init__

    def init(self: _Steps, *arguments: Any) -> None:
        plain(self, *arguments)
        self._graph = recorded

    monkeypatch.setattr(_Steps, "__init__", init)
    assert run(1) == expected
    assert recorded.calls == 59
    assert len(set(expected)) > 5


@pytest.fixture
def cuda_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch.cuda, without a GPU."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "main" if name is None else "side"

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append("back")

    @contextmanager
    def graph(graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        log.append(f"capture on {stream.name}")
        yield
        log.append("captured")

    replacements = {"Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": graph}
    replacements["current_stream"] = lambda: Stream(None)
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(decoding, "_side_stream", decoding._side_stream.__wrapped__)
    return log


def test_when_a_step_is_captured(cuda_log: list[str]) -> None:
    """The first call is the warm-up, the second captures, every one from there on replays."""
    graph = StepGraph(torch.device("cuda", 0))

    def step() -> None:
        cuda_log.append("step")

    graph.run(step)
    assert cuda_log == ["side waits for main", "on side", "step", "back", "main waits for side"]
    cuda_log.clear()
    graph.run(step)
    assert cuda_log == ["on side", "capture on side", "step", "captured", "back", "replay"]
    cuda_log.clear()
    graph.run(step)
    assert cuda_log == ["replay"]


def test_a_capture_that_fails(cuda_log: list[str]) -> None:
    def step() -> None:
        if cuda_log[-1] == "capture on side":
            raise ValueError("not like this")

    graph = StepGraph(torch.device("cuda", 0))
    graph.run(step)
    with pytest.raises(RuntimeError, match=r"cannot be captured .* \(cuda_graph=False does without\): not like this"):
        graph.run(step)


# --- Nothing that stops the host ---

# Tensors of the meta device have shapes and no values. Reading one raises, as does mixing them with another device's.
VALUELESS = torch.device("meta")
_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "allclose")


class OnlyOn(TorchDispatchMode):
    """Refuses operations on tensors of another device, and those that hand a value to the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(_READS), f"{name} hands a value to the host"
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.device == self.device, f"{name} on {leaf.device}"
        self.operations += 1
        return result


def without_values(model: Decoder) -> Decoder:
    def moved(owner: Any) -> Any:
        return replace(owner, **{key: x.to(VALUELESS) for key, x in vars(owner).items() if isinstance(x, Tensor)})

    layers = [moved(replace(layer, mlp=moved(layer.mlp))) for layer in model.weights.layers]
    weights = moved(replace(model.weights, layers=layers))
    return replace(model, weights=weights, device=VALUELESS)


@torch.inference_mode()
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_read_by_the_host(
    case: Case, sampler: Sampler, write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a step and the choice of its token; shapes, which meta tensors have, are all they depend on."""
    monkeypatch.setitem(decoder._NORM_ROWS, "meta", 256)
    model = without_values(case.load(write_checkpoint))
    cache = model.new_cache(420)
    logits, seen = (torch.zeros(1, VOCAB, dtype=dtype, device=VALUELESS) for dtype in (torch.float32, torch.bool))
    steps = _Steps(model, cache, logits, seen, sampler, 5, False)
    steps._step()  # with what is computed once only
    with OnlyOn(VALUELESS) as mode:
        steps._step()
        lengths = torch.zeros(3, dtype=torch.int64, device=VALUELESS)
        logits = model.decode_step(lengths, lengths, cache.pool, cache.block_table.expand(3, -1))
    assert logits.shape == (3, VOCAB)
    assert mode.operations > 100


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.item(),
    "int": int,
    "bool": bool,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "constant": lambda x: x + torch.ones(1),
}


@pytest.mark.parametrize("name", READS)
def test_such_reads_would_be_seen(name: str) -> None:
    """So that the test above means something."""
    x = torch.zeros(1, dtype=torch.int64, device=VALUELESS)
    with OnlyOn(VALUELESS), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        READS[name](x)
