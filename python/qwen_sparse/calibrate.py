"""Offline calibration: how many columns and distances each head needs to keep its attention.

``calibrate`` searches the budgets of vertical-slash attention (MInference, arXiv 2407.02490) for one checkpoint on one
long prompt, and refines them as the Qwen2.5-1M report does (arXiv 2501.15383, "sparsity refinement"):

1. **Base pair.** On the prompt's first ``base_length`` tokens each head takes, of :data:`BASE_PAIRS`, the pair that
   attends fewest (row, key) pairs among those that reach the recall asked for, else the one with the highest recall.
2. **Refinement.** On the whole prompt, V and S of every head below that recall grow by ``step``, until the recall is
   reached or the head is dense (V or S covers all keys).

The recall of a head is exp(LSE_sparse - LSE_full), averaged over all rows of those tokens; both log-sum-exps come from
the attention kernels. Columns and distances are chosen as prefill chooses them: once per prefill chunk, by its last
rows, with the critical rotations under Dual Chunk Attention. Grown budgets select supersets, so recall only rises.

Layers go one after the other: the hidden states of all tokens pass through one layer, in prefill chunks and with dense
attention, and only that layer's keys and values are kept. ``qwen_sparse.engine.memory.estimate_calibration_memory`` has
the formula. After every layer a partial result is written beside the output, from which an interrupted run can go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .base.arguments import check_integer, check_number
from .base.machine import machine
from .base.resources import available_memory, format_bytes
from .engine.memory import default_chunk_tokens, estimate_calibration_memory
from .engine.prefill import chunk_ends, token_tensor
from .model.attention import Indexes, Queries
from .model.checkpoint import read_json
from .model.config import SparseConfig, SparseSwitches, served_columns
from .model.decoder import Decoder
from .passkey import make_prompt

__all__ = [
    "BASE_LENGTH",
    "BASE_PAIRS",
    "Calibration",
    "HeadBudget",
    "LayerRecall",
    "calibrate",
    "check_length",
    "choose_base",
    "measure_budgets",
    "refine",
    "synthetic_tokens",
]

BASE_PAIRS = ((30, 800), (100, 750), (500, 700), (1000, 6096), (3500, 100))
"""(V, S) as budgets write them: V = 30 means 130."""
BASE_LENGTH = 32768
"""Tokens on which base pairs are compared, unless the prompt is shorter."""

_MOST_BUDGET = 2**31 - 1  # index lists are int32

Sizes = tuple[int, int]
Measure = Callable[[Sequence[Sizes]], tuple[list[float], list[int]]]
"""From (columns, distances) of every head to its recall and the number of (row, key) pairs that it attends."""


@dataclass(frozen=True)
class HeadBudget:
    """What one head got."""

    vertical: int
    """Columns, as served."""
    slash: int
    """Distances."""
    recall: float
    """Measured on the tokens that decided, in [0, 1]."""
    attended: int
    """(row, key) pairs attended there."""
    steps: int = 0
    """How often refinement grew it."""


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`."""

    layers: tuple[tuple[HeadBudget, ...], ...]
    """By layer and head."""
    base: tuple[tuple[HeadBudget, ...], ...]
    """The pairs that refinement began with, and what they kept of the first ``base_length`` tokens."""
    causal_pairs: int
    """(row, key) pairs of one dense head on the whole prompt."""

    @property
    def density(self) -> float:
        """Attended over causal pairs, mean over layers and heads."""
        return _mean([head.attended / self.causal_pairs for layer in self.layers for head in layer])

    @property
    def recall(self) -> float:
        """Mean over layers and heads."""
        return _mean([head.recall for layer in self.layers for head in layer])

    def budgets(self) -> list[dict[str, list[Any]]]:
        """The published format: by layer ``{"head": ["vertical_and_slash", V, S, score]}``; score is the recall."""
        return [
            {
                str(number): ["vertical_and_slash", head.vertical, head.slash, round(head.recall, 6)]
                for number, head in enumerate(layer)
            }
            for layer in self.layers
        ]


@dataclass(frozen=True)
class LayerRecall:
    """The recall of one layer's heads, for any budgets."""

    queries: Callable[[int, int], Queries]
    """From positions [start, end) to rotated queries, critical rotations included."""
    keys: Callable[[int], tuple[Tensor, Tensor]]
    """Keys and values of the first tokens, ``[n, num_kv_heads, head_dim]`` each."""
    lse: Tensor
    """Log-sum-exp over all keys, float32 ``[n, num_heads]``."""
    scale: float
    last_q: int
    """Rows that vote in the selection."""

    @torch.inference_mode()
    def measure(self, sizes: Sequence[Sizes], ends: Sequence[int]) -> tuple[list[float], list[int]]:
        """Recall of every head, averaged over the rows up to ``ends[-1]``, and how many pairs it attended.

        Args:
            sizes: (columns, distances) by head. A head with (0, 0) costs next to nothing and has recall 0.
            ends: positions at which prefill chunks end.
        """
        vertical, slash = zip(*sizes, strict=True)
        return self._measure(
            lambda q, k: q.select(k, self.scale, vertical_size=vertical, slash_size=slash, last_q=self.last_q), ends
        )

    @torch.inference_mode()
    def measure_coverage(self, coverage: float, ends: Sequence[int]) -> tuple[list[float], list[int]]:
        """As :meth:`measure`, of block groups chosen by coverage."""
        return self._measure(lambda q, k: q.select_by_coverage(k, self.scale, coverage), ends)

    def _measure(
        self, select: Callable[[Queries, Tensor], Indexes], ends: Sequence[int]
    ) -> tuple[list[float], list[int]]:
        kept = torch.zeros(self.lse.shape[1], dtype=torch.float64, device=self.lse.device)
        attended = torch.zeros(self.lse.shape[1], dtype=torch.int64, device=self.lse.device)
        for start, end in pairwise([0, *ends]):
            q, (k, v) = self.queries(start, end), self.keys(end)
            _, lse, pairs = q.attend_sparse(k, v, self.scale, select(q, k))
            # A subset's sum cannot be larger, but two kernels may round differently.
            kept += (lse - self.lse[start:end]).double().exp_().clamp_(max=1).sum(0)
            attended += pairs
        return (kept / ends[-1]).tolist(), attended.tolist()


def choose_base(measure: Measure, pairs: Sequence[Sizes], num_heads: int, threshold: float) -> list[HeadBudget]:
    """For each head, of the pairs that reach the threshold the one that attends least; else the one that keeps most.

    Args:
        measure: recall and attended pairs of all heads.
        pairs: (columns, distances) to choose from; of equals, the earlier wins.
        num_heads: query heads.
        threshold: recall asked for.
    """
    candidates: list[list[HeadBudget]] = [[] for _ in range(num_heads)]
    for pair in pairs:
        for head, (recall, attended) in enumerate(zip(*measure([pair] * num_heads), strict=True)):
            candidates[head].append(HeadBudget(*pair, recall, attended))
    return [
        min(options, key=lambda option: (option.recall < threshold, max(threshold - option.recall, 0), option.attended))
        for options in candidates
    ]


def refine(
    measure: Measure,
    start: Sequence[Sizes],
    *,
    threshold: float,
    step: int,
    length: int,
    report: Callable[[int], object] = lambda _: None,
) -> list[HeadBudget]:
    """Grow V and S of each head until its recall is reached or it is dense.

    Args:
        measure: recall and attended pairs of all heads, on ``length`` tokens.
        start: (columns, distances) of each head to begin with.
        threshold: recall to reach.
        step: what both grow by at a time.
        length: keys of the last row. A head with as many columns or distances is dense: recall 1, not measured.
        report: called before each measurement with the number of heads that take part.
    """
    sizes = [(min(vertical, length), min(slash, length)) for vertical, slash in start]
    found: list[HeadBudget | None] = [None] * len(sizes)
    growing, steps = list(range(len(sizes))), 0
    while growing:
        for head in growing:
            if length in sizes[head]:
                found[head] = HeadBudget(*sizes[head], 1.0, _causal_pairs(length), steps)
        growing = [head for head in growing if length not in sizes[head]]
        if not growing:
            break
        report(len(growing))
        recalls, attended = measure([pair if head in growing else (0, 0) for head, pair in enumerate(sizes)])
        for head in growing:
            found[head] = HeadBudget(*sizes[head], recalls[head], attended[head], steps)
        growing, steps = [head for head in growing if recalls[head] < threshold], steps + 1
        for head in growing:
            vertical, slash = sizes[head]
            sizes[head] = min(served_columns(vertical + step), length), min(slash + step, length)
    return [head for head in found if head is not None]


@torch.inference_mode()
def calibrate(
    model: Decoder,
    input_ids: Sequence[int] | Tensor,
    output: str | Path,
    *,
    recall: float = 0.95,
    base_length: int | None = None,
    pairs: Sequence[Sizes] = BASE_PAIRS,
    step: int = 2048,
    last_q: int | None = None,
    chunk_tokens: int | None = None,
    source: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = False,
    on_layer: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Search budgets for ``model`` on a prompt and write them to ``output``.

    Beside it, ``NAME.provenance.json`` says what they were made from and what every head keeps. While the search runs,
    ``NAME.partial.json`` and ``NAME.partial-LAYER.safetensors`` (hidden states of all tokens) hold the finished layers.

    Args:
        model: the model; attention is dense and its cache holds the model's dtype, whatever its options say.
        input_ids: the prompt, as long as the prompts that the budgets are for.
        output: file to write, usually sparse_attention_config.json; it must not exist.
        recall: attention that each head has to keep, in (0, 1].
        base_length: tokens from the start on which base pairs are compared; None: 32768, or all of a shorter prompt.
        pairs: base pairs (V, S), written as budgets are: V = 30 means 130.
        step: what refinement adds to V and S at a time.
        last_q: rows that vote in the selection; None: as the model's config says, 64 where it has no budgets.
        chunk_tokens: rows per prefill chunk; None: the device's default. Selection is per chunk.
        source: where the prompt comes from, for the provenance.
        resume: go on from the partial result, if there is one.
        progress: show a bar.
        on_layer: called with a layer's number once its partial result is on disk.

    Returns:
        Budgets with measured recall and density.

    Raises:
        ValueError: an argument breaks its rule, or the partial result is of other inputs.
        FileExistsError: the output exists, or a partial result does and ``resume`` is false.
        MemoryError: the estimate of what this adds exceeds the memory that is left.

    Example:
        >>> tokens = model.tokenizer.encode(text)[:131072]
        >>> calibrate(model, tokens, "sparse_attention_config.json", recall=0.95, progress=True).density
    """
    tokens = token_tensor(model, input_ids)
    length = tokens.shape[0]
    search = _Search(
        length=length,
        base_length=min(BASE_LENGTH, length) if base_length is None else base_length,
        recall=recall,
        pairs=tuple((vertical, slash) for vertical, slash in pairs),
        step=step,
        last_q=(model.config.sparse or model.config.sparse_switches).last_q if last_q is None else last_q,
        chunk_tokens=default_chunk_tokens(model.device) if chunk_tokens is None else chunk_tokens,
    )
    search.check(model)
    files = _Files(Path(output))
    files.check(resume)
    inputs = {
        **_model_digest(model),
        "tokens_sha256": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        "source": dict(source or {}),
        **asdict(search),
        "pairs": [list(pair) for pair in search.pairs],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {"qwen_sparse": version("qwen-sparse"), "torch": torch.__version__},
    }
    partial = files.load(inputs) if resume else None
    if partial is None:
        base, layers = list[list[HeadBudget]](), list[list[HeadBudget]]()
        hidden = F.embedding(tokens, model.weights.embedding)
    else:
        base, layers, hidden = partial
        hidden = hidden.to(model.device)
    num_layers = model.config.num_layers
    with tqdm(total=num_layers, initial=len(layers), desc="calibrate", unit="layer", disable=not progress) as bar:
        for layer in range(len(layers), num_layers):
            first, refined, hidden = search.run(_one_layer(model, layer), hidden, bar.set_postfix_str)
            base.append(first)
            layers.append(refined)
            files.save(inputs, base, layers, hidden)
            bar.update()
            on_layer(layer)
    result = Calibration(tuple(map(tuple, layers)), tuple(map(tuple, base)), _causal_pairs(length))
    files.finish(result, inputs, machine(model.device))
    return result


@torch.inference_mode()
def measure_budgets(
    model: Decoder,
    input_ids: Sequence[int] | Tensor,
    sparse: SparseConfig,
    *,
    chunk_tokens: int | None = None,
    progress: bool = False,
) -> Calibration:
    """What given budgets, or a coverage, keep of a prompt's attention, head by head, with exact (dense) hidden states.

    Args:
        model: the model.
        input_ids: the prompt.
        sparse: the budgets; with a coverage, the block groups that it chooses.
        chunk_tokens: rows per prefill chunk; None: the device's default.
        progress: show a bar.

    Returns:
        Sizes (clipped to the prompt; 0 with a coverage), recall and attended pairs; ``base`` repeats them.

    Raises:
        ValueError: bad tokens, or ``chunk_tokens`` below 1.
        MemoryError: as :func:`calibrate`.
    """
    tokens = token_tensor(model, input_ids)
    length = tokens.shape[0]
    chunk_tokens = default_chunk_tokens(model.device) if chunk_tokens is None else chunk_tokens
    check_integer("measure_budgets: chunk_tokens", chunk_tokens, least=1)
    _check_model(model, length, chunk_tokens)
    hidden, ends = F.embedding(tokens, model.weights.embedding), chunk_ends(0, length, chunk_tokens)
    layers = []
    for layer in tqdm(range(model.config.num_layers), desc="measure", unit="layer", disable=not progress):
        meter, hidden = _dense_layer(_one_layer(model, layer), hidden, chunk_tokens, sparse.last_q)
        if sparse.coverage is None:
            sizes = [
                (min(vertical, length), min(slash, length))
                for vertical, slash in zip(sparse.vertical_sizes[layer], sparse.slash_sizes[layer], strict=True)
            ]
            measured = meter.measure(sizes, ends)
        else:
            sizes = [(0, 0)] * model.config.num_heads
            measured = meter.measure_coverage(sparse.coverage, ends)
        heads = zip(sizes, *measured, strict=True)
        layers.append(tuple(HeadBudget(*pair, recall, attended) for pair, recall, attended in heads))
    return Calibration(tuple(layers), tuple(layers), _causal_pairs(length))


def synthetic_tokens(model: Decoder, length: int, seed: int) -> list[int]:
    """The last ``length`` tokens of a passkey prompt: short sentences, two numbers, and the question for the first.

    Raises:
        ValueError: fewer than 1024 tokens, which the prompt's fixed parts could fill.
    """
    check_integer("synthetic_tokens: length", length, least=1024)
    size, tokens = length, list[int]()
    while len(tokens) < length:  # a token is at most a few bytes, and at least about one
        prompt = make_prompt(size, 0.5, seed=seed, filler="sentences", second_label="door code")
        tokens = model.tokenizer.encode(prompt.text)
        size = int(1.02 * size * max(1.0, length / len(tokens))) + 1
    return tokens[-length:]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def _one_layer(model: Decoder, layer: int) -> Decoder:
    """A model of this layer alone, so that its cache holds this layer alone."""
    return replace(
        model,
        config=replace(model.config, num_layers=1, sparse=None),
        weights=replace(model.weights, layers=[model.weights.layers[layer]]),
        attention="dense",
        kv_cache_dtype="auto",
    )


@dataclass(frozen=True)
class _Search:
    """What a calibration looks for; see :func:`calibrate`."""

    length: int
    base_length: int
    recall: float
    pairs: tuple[Sizes, ...]
    step: int
    last_q: int
    chunk_tokens: int

    def check(self, model: Decoder) -> None:
        if not 0 < check_number("calibrate: recall", self.recall) <= 1:
            raise ValueError(f"calibrate: recall must be in (0, 1], got {self.recall}")
        for name, most in (("base_length", self.length), ("last_q", 64), ("step", None), ("chunk_tokens", None)):
            check_integer(f"calibrate: {name}", getattr(self, name), least=1, most=most)
        if not self.pairs or any(max(pair) == 0 for pair in self.pairs):
            raise ValueError(f"calibrate: pairs must be (V, S) with V, S >= 0 and not both 0, got {list(self.pairs)}")
        for pair in self.pairs:
            for name, value in zip("VS", pair, strict=True):
                check_integer(f"calibrate: {name} of pairs", value, least=0, most=_MOST_BUDGET)
        check_length(model, self.length, chunk_tokens=self.chunk_tokens)

    def run(
        self, model: Decoder, hidden: Tensor, report: Callable[[str], object]
    ) -> tuple[list[HeadBudget], list[HeadBudget], Tensor]:
        """Base pairs and refined budgets of a model of one layer, and the hidden states behind it."""
        report("dense")
        meter, hidden = _dense_layer(model, hidden, self.chunk_tokens, self.last_q)
        report("base pairs")
        base_ends = chunk_ends(0, self.base_length, self.chunk_tokens)
        base = choose_base(
            lambda sizes: meter.measure(sizes, base_ends),
            [(served_columns(vertical), slash) for vertical, slash in self.pairs],
            model.config.num_heads,
            self.recall,
        )
        ends = chunk_ends(0, self.length, self.chunk_tokens)
        refined = refine(
            lambda sizes: meter.measure(sizes, ends),
            [(head.vertical, head.slash) for head in base],
            threshold=self.recall,
            step=self.step,
            length=self.length,
            report=lambda heads: report(f"heads to measure: {heads}"),
        )
        return base, refined, hidden


def check_length(model: Decoder, length: int, *, chunk_tokens: int | None = None) -> None:
    """Refuse a prompt of ``length`` tokens that cannot be calibrated on, before it is made.

    Raises:
        ValueError: fewer than one token, more than ``model.max_seq_len``, or ``chunk_tokens`` below 1.
        MemoryError: the estimate exceeds the memory that is left.
    """
    check_integer("calibrate: length", length, least=1)
    most = model.max_seq_len
    if most is not None and length > most:
        raise ValueError(f"calibrate: the prompt must have at most max_seq_len = {most} tokens, got {length}")
    chunk_tokens = default_chunk_tokens(model.device) if chunk_tokens is None else chunk_tokens
    check_integer("calibrate: chunk_tokens", chunk_tokens, least=1)
    _check_model(model, length, chunk_tokens)


def _check_model(model: Decoder, length: int, chunk_tokens: int) -> None:
    if model.config.windows:
        raise ValueError("calibration is of models whose layers attend all keys; this one has sliding windows")
    estimate = estimate_calibration_memory(
        model.config, length, dtype=model.dtype, chunk_tokens=chunk_tokens, device=model.device
    )
    needed, available = estimate.total - estimate.weights, available_memory(model.device)
    if available is not None and needed > available:
        raise MemoryError(
            f"calibrating on {length} tokens is estimated to need {format_bytes(needed)} more memory, and "
            f"{format_bytes(available)} are available; estimate for all: {estimate}"
        )


def _dense_layer(model: Decoder, hidden: Tensor, chunk_tokens: int, last_q: int) -> tuple[LayerRecall, Tensor]:
    """A model of one layer, densely, over all rows: what measures its recall, and the hidden states behind it."""
    length = hidden.shape[0]
    cache, result = model.new_cache(length), torch.empty_like(hidden)
    lse = torch.empty(length, model.config.num_heads, dtype=torch.float32, device=model.device)
    for start, end in pairwise([0, *chunk_ends(0, length, chunk_tokens)]):
        result[start:end], lse[start:end] = model.forward_layer(0, hidden[start:end], cache, prompt_len=length)
        cache.commit(end - start)
    meter = LayerRecall(
        queries=lambda start, end: model.queries(0, hidden[start:end], start, critical_rows=last_q),
        keys=lambda end: cache.workspace(0, end),
        lse=lse,
        scale=model.softmax_scale(length),
        last_q=last_q,
    )
    return meter, result


def _model_digest(model: Decoder) -> dict[str, Any]:
    """The model's name, and digests of its config (budgets aside) and of the weights in front of the final norm."""
    config = json.dumps(
        asdict(replace(model.config, sparse=None, sparse_switches=SparseSwitches())), sort_keys=True, default=str
    )
    digest, behind = hashlib.sha256(), (model.weights.norm, model.weights.lm_head)
    for tensor in model.weights.tensors():
        if any(tensor is other for other in behind) and tensor is not model.weights.embedding:
            continue
        data: Any = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
        digest.update(memoryview(data).cast("B"))
    return {
        "model": None if model.path is None else model.path.resolve().name,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
    }


class _Files:
    """The output, its provenance and the partial result; each is written aside and then renamed into place."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.provenance = output.with_name(f"{output.stem}.provenance.json")
        self.partial = output.with_name(f"{output.stem}.partial.json")

    def check(self, resume: bool) -> None:
        if not self.output.parent.is_dir():
            raise FileNotFoundError(f"calibrate: no directory {self.output.parent} to write {self.output.name} to")
        for file in (self.output, self.provenance):
            if file.exists():
                raise FileExistsError(f"calibrate: {file} exists; remove it or choose another output")
        if self.partial.exists() and not resume:
            raise FileExistsError(f"calibrate: {self.partial} of an interrupted run exists; resume it or remove it")

    def save(self, inputs: Mapping[str, Any], base: Sequence[Any], layers: Sequence[Any], hidden: Tensor) -> None:
        """The hidden states first, then the file that names them: whenever this stops, one pair of both is whole."""
        states = self._states(len(layers))
        aside = states.with_suffix(".tmp")
        save_file({"hidden": hidden.cpu()}, aside)
        _into_place(aside, states)
        record = {
            "inputs": inputs,
            "base": [[asdict(head) for head in layer] for layer in base],
            "layers": [[asdict(head) for head in layer] for layer in layers],
        }
        _write(self.partial, json.dumps(record))
        self._states(len(layers) - 1).unlink(missing_ok=True)

    def load(self, inputs: Mapping[str, Any]) -> tuple[list[list[HeadBudget]], list[list[HeadBudget]], Tensor] | None:
        if not self.partial.exists():
            return None
        record = read_json(self.partial)
        differing = sorted(key for key, value in inputs.items() if record["inputs"].get(key) != value)
        if differing:
            raise ValueError(
                f"calibrate: {self.partial} is of a run with other inputs ({', '.join(differing)} differ); "
                "give those, or remove it"
            )
        base, layers = ([[HeadBudget(**head) for head in layer] for layer in record[key]] for key in ("base", "layers"))
        return base, layers, load_file(self._states(len(layers)))["hidden"]

    def finish(self, result: Calibration, inputs: Mapping[str, Any], on: Mapping[str, Any]) -> None:
        """Provenance, then the budgets, then the partial result goes."""
        record = {
            **inputs,
            "rows": "all",
            "machine": on,
            "mean_recall": result.recall,
            "density": result.density,
            "layers": [
                [
                    {
                        **asdict(head),
                        "density": head.attended / result.causal_pairs,
                        "base": {"vertical": first.vertical, "slash": first.slash, "recall": first.recall},
                    }
                    for head, first in zip(layer, base, strict=True)
                ]
                for layer, base in zip(result.layers, result.base, strict=True)
            ],
        }
        _write(self.provenance, json.dumps(record, indent=1) + "\n")
        lines = ",\n".join(f"  {json.dumps(layer)}" for layer in result.budgets())
        _write(self.output, f"[\n{lines}\n]\n")
        self.partial.unlink()
        self._states(len(result.layers)).unlink()

    def _states(self, layers: int) -> Path:
        return self.output.with_name(f"{self.output.stem}.partial-{layers}.safetensors")


def _write(file: Path, text: str) -> None:
    aside = file.with_name(f"{file.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    _into_place(aside, file)


def _into_place(aside: Path, file: Path) -> None:
    """Rename a file once its contents are on the disk."""
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(aside, file)
