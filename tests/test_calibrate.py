"""Calibration: recall by its definition, the search on planted structure, resuming, memory, files and command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, WriteCheckpoint
from qwen_sparse import calibrate as module
from qwen_sparse import estimate_memory, load_model, prefill, reference
from qwen_sparse.calibrate import (
    BASE_PAIRS,
    HeadBudget,
    LayerRecall,
    _one_layer,
    choose_base,
    measure_budgets,
    refine,
    synthetic_tokens,
)
from qwen_sparse.cli import main
from qwen_sparse.engine.memory import estimate_calibration_memory, index_bytes
from qwen_sparse.model.attention import Queries
from qwen_sparse.model.config import SparseConfig
from qwen_sparse.model.decoder import Decoder
from test_memory import QWEN_7B, allocated_peak
from test_model import random_ids

calibrate = module.calibrate
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "dual_chunk": {"dual_chunk_attention_config": DUAL_CHUNK}}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, write_checkpoint: WriteCheckpoint) -> Decoder:
    return load_model(write_checkpoint(**KINDS[request.param]))


def layer_recall(q: Tensor, k: Tensor) -> LayerRecall:
    """Of keys and queries as they are, without positions."""
    _, lse = Queries(q).attend_dense(k, k, q.shape[-1] ** -0.5)
    return LayerRecall(
        queries=lambda start, end: Queries(q[start:end]),
        keys=lambda end: (k[:end], k[:end]),
        lse=lse,
        scale=q.shape[-1] ** -0.5,
        last_q=64,
    )


def random_recall(n: int = 600) -> LayerRecall:
    generator = torch.Generator().manual_seed(0)
    return layer_recall(torch.randn(n, 4, 64, generator=generator), torch.randn(n, 2, 64, generator=generator))


# --- recall ---


@pytest.mark.parametrize("ends", [[600], [256, 512, 600]], ids=["one_chunk", "chunks"])
def test_recall_is_one_with_full_budgets_and_never_outside_its_range(ends: list[int]) -> None:
    meter = random_recall()
    sizes = [(600, 0), (0, 600), (700, 900), (0, 0)]
    recalls, attended = meter.measure(sizes, ends)
    assert recalls == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert attended == [600 * 601 // 2] * 3 + [0]
    for sizes in ([(1, 0)] * 4, [(0, 1)] * 4, [(30, 100)] * 4, [(200, 300)] * 4, [(599, 599)] * 4):
        recalls, attended = meter.measure(sizes, ends)
        assert all(0 < recall <= 1 for recall in recalls)
        assert all(0 < pairs <= 600 * 601 // 2 for pairs in attended)


def test_recall_by_its_definition(model: Decoder, tmp_path: Path) -> None:
    """exp(LSE_sparse - LSE_full) of the first layer, with the reference's selection and attention."""
    n, ids = 700, random_ids(700)
    result = calibrate(model, ids, tmp_path / "out.json", recall=0.01, pairs=[(60, 128)], chunk_tokens=n)
    cache = prefill(model, ids, chunk_tokens=n).cache
    k, v = cache.workspace(0, n)
    q = model.queries(0, model.weights.embedding[ids], 0, critical_rows=64)
    scale: dict[str, Any] = {"softmax_scale": model.softmax_scale(n)}
    if q.chunk_len is None:
        vertical, slash = reference.select_vertical_slash(q.q, k, vertical_size=60, slash_size=128, **scale)
        _, full = reference.attention(q.q, k, v, return_lse=True, **scale)
        _, kept = reference.vertical_slash_attention(q.q, k, v, vertical, slash, return_lse=True, **scale)
    else:
        chunk: dict[str, Any] = {"chunk_len": q.chunk_len, **scale}
        vertical, slash = reference.select_vertical_slash(
            q.q,
            k,
            vertical_size=60,
            slash_size=128,
            q_succ=q.q_succ_critical,
            q_inter=q.q_inter_critical,
            **chunk,
        )
        rotations = (q.q, q.q_succ, q.q_inter)
        _, full = reference.dual_chunk_attention(*rotations, k, v, return_lse=True, **chunk)
        _, kept = reference.dual_chunk_attention(
            *rotations, k, v, vertical_indexes=vertical, slash_indexes=slash, return_lse=True, **chunk
        )
    expected = (kept.double() - full.double()).exp().mean(0).tolist()
    assert [head.recall for head in result.layers[0]] == pytest.approx(expected, abs=1e-5)
    assert min(expected) < 0.95
    mask = reference.vertical_slash_mask(vertical, slash, n, n)
    assert [head.attended for head in result.layers[0]] == mask.flatten(1).sum(1).tolist()


def test_budgets_are_measured_as_calibration_measures_them(model: Decoder, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    sparse = SparseConfig.from_budgets(written, num_layers=2, num_heads=2)
    found = measure_budgets(model, random_ids(700), sparse, chunk_tokens=256)
    assert found.layers == tuple(tuple(replace(head, steps=0) for head in layer) for layer in result.layers)
    with pytest.raises(ValueError, match="chunk_tokens must be >= 1, got 0"):
        measure_budgets(model, random_ids(700), sparse, chunk_tokens=0)


@pytest.fixture
def sparse_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill whose last block is not dense, as calibration takes all rows alike."""
    real = Decoder._prefill_step
    monkeypatch.setattr(Decoder, "_prefill_step", lambda *arguments: replace(real(*arguments), dense_rows=0))


@pytest.mark.usefixtures("sparse_to_the_end")
def test_selection_is_that_of_prefill(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    """The budgets' density in a sparse prefill of the same prompt is what calibration counted, pair for pair."""
    directory = write_checkpoint(num_hidden_layers=1, dual_chunk_attention_config=DUAL_CHUNK)
    ids = random_ids(1000)
    output = directory / "sparse_attention_config.json"
    result = calibrate(
        load_model(directory), ids, output, recall=0.8, pairs=[(30, 50)], step=40, chunk_tokens=300, base_length=300
    )
    sparse = load_model(directory, attention="sparse")
    stats = prefill(sparse, ids, chunk_tokens=300, logits="all").stats  # "all": the last layer computes every row
    assert stats.density == pytest.approx(result.density, rel=1e-12)
    assert result.density < 0.99  # of a dense head it would say nothing


@pytest.mark.usefixtures("sparse_to_the_end")
def test_recall_of_block_groups(model: Decoder) -> None:
    """More coverage keeps more, and the pairs are those that prefill attends for it."""
    ids = random_ids(700)
    previous = 0.0
    for coverage in (0.3, 0.9):
        sparse = model.config.with_coverage(coverage).sparse
        assert sparse is not None
        found = measure_budgets(model, ids, sparse, chunk_tokens=256)
        assert previous < found.recall < 1
        previous = found.recall
        first = _one_layer(model, 0)
        runner = first.with_options(attention="sparse", coverage=coverage)
        stats = prefill(runner, ids, chunk_tokens=256, logits="all").stats
        layer = [head.attended / found.causal_pairs for head in found.layers[0]]
        assert stats.density == pytest.approx(sum(layer) / len(layer), rel=1e-12)
        assert stats.density < 0.99


# --- search ---


def planted() -> tuple[Tensor, Tensor]:
    """Two heads: all rows attend columns 0, 300 and 700; every row attends distance 400 (the first 400 themselves)."""
    n, generator = 1024, torch.Generator().manual_seed(0)
    q, k = torch.zeros(n, 2, 64), torch.zeros(n, 2, 64)
    q[:, 0, 0] = 18.0
    k[[0, 300, 700], 0, 0] = 18.0
    directions = torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1)
    k[:, 1] = 18 * directions
    q[:400, 1], q[400:, 1] = 18 * directions[:400], 18 * directions[: n - 400]
    return q, k


@pytest.mark.parametrize("ends", [[1024], [768, 1024]], ids=["one_chunk", "chunks"])
def test_planted_structure_is_found(ends: list[int]) -> None:
    q, k = planted()
    meter = layer_recall(q, k)

    def measure(sizes: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
        return meter.measure(sizes, ends)

    base = choose_base(measure, [(30, 100), (500, 300), (32, 100), (30, 101)], 2, 0.99)
    assert [(head.vertical, head.slash) for head in base] == [(32, 100), (30, 101)]
    assert all(head.recall > 0.999 for head in base)
    grown = refine(measure, [(30, 100)] * 2, threshold=0.99, step=3, length=1024)
    assert [(head.vertical, head.slash, head.steps) for head in grown] == [(33, 103, 1)] * 2
    vertical, slash, *_ = Queries(q).select(k, 1 / 8, vertical_size=[32, 30], slash_size=[100, 101], last_q=64)
    assert vertical is not None
    assert slash is not None
    assert {300, 700} < set(vertical[0].tolist())
    assert 400 in slash[1].tolist()


def test_base_pair_is_the_cheapest_that_keeps_enough() -> None:
    table = {(1, 1): ([0.96, 0.5, 0.2], [90, 90, 90]), (2, 2): ([0.97, 0.96, 0.9], [50, 70, 70])}
    table[3, 3] = ([0.99, 0.99, 0.8], [60, 70, 10])

    def measure(sizes: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
        assert len(set(sizes)) == 1
        return table[sizes[0]]

    chosen = choose_base(measure, list(table), 3, 0.95)
    assert chosen == [HeadBudget(2, 2, 0.97, 50), HeadBudget(2, 2, 0.96, 70), HeadBudget(2, 2, 0.9, 70)]


def test_refinement_is_monotone_and_stops() -> None:
    meter, seen = random_recall(), list[list[tuple[int, int]]]()
    history: list[list[float]] = []

    def measure(sizes: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
        seen.append(list(sizes))
        recalls, attended = meter.measure(sizes, [256, 600])
        history.append(recalls)
        return recalls, attended

    start = [(30, 10), (40, 100), (0, 500), (590, 10)]
    found = refine(measure, start, threshold=0.9, step=60, length=600)
    assert len(seen) > 2
    for head in range(4):
        sizes = [pairs[head] for pairs in seen if pairs[head] != (0, 0)]
        assert sizes == sorted(sizes)
        assert all(later[0] - earlier[0] == later[1] - earlier[1] == 60 for earlier, later in pairwise(sizes))
        recalls = [recalls[head] for recalls in history][: len(sizes)]
        assert recalls == sorted(recalls)
        assert all(recall < 0.9 for recall in recalls[:-1])  # it stops as soon as it keeps enough
    assert all(head.recall >= 0.9 for head in found)
    assert found == refine(measure, start, threshold=0.9, step=60, length=600)


def test_refinement_ends_with_dense_heads() -> None:
    calls = []

    def measure(sizes: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
        calls.append(list(sizes))
        return [0.5, 0.5], [7, 7]

    found = refine(measure, [(10, 90), (5, 0)], threshold=1.0, step=40, length=100)
    assert found == [HeadBudget(50, 100, 1.0, 5050, 1), HeadBudget(100, 100, 1.0, 5050, 3)]
    assert calls == [[(10, 90), (5, 0)], [(0, 0), (45, 40)], [(0, 0), (85, 80)]]


def test_thirty_columns_are_served_as_130(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    model = load_model(write_checkpoint())
    result = calibrate(model, random_ids(400), tmp_path / "out.json", recall=0.01, pairs=[(30, 50)])
    assert {(head.vertical, head.slash) for layer in result.layers for head in layer} == {(130, 50)}
    written = json.loads((tmp_path / "out.json").read_text())
    read = SparseConfig.from_budgets(written, num_layers=2, num_heads=2)
    assert read.vertical_sizes == ((130, 130), (130, 130))
    grown = refine(lambda _: ([0.5], [1]), [(10, 10)], threshold=0.9, step=20, length=140)
    assert (grown[0].vertical, grown[0].slash) == (140, 50)  # 10, 30 as 130, then all


# --- files ---

OPTIONS: dict[str, Any] = {"recall": 0.9, "pairs": [(40, 60), (100, 20)], "step": 50, "chunk_tokens": 256}


def run(model: Decoder, output: Path, **options: Any) -> module.Calibration:
    return calibrate(model, random_ids(700), output, **{"base_length": 300, **OPTIONS, **options})


def stop_after(layer: int) -> Callable[[int], None]:
    def stop(done: int) -> None:
        if done == layer:
            raise KeyboardInterrupt

    return stop


def test_the_written_config_serves(model: Decoder, tmp_path: Path) -> None:
    assert model.path is not None
    result = run(model, model.path / "sparse_attention_config.json")
    sparse = load_model(model.path, attention="sparse")
    assert sparse.config.sparse is not None
    assert sparse.config.sparse.vertical_sizes == tuple(tuple(h.vertical for h in layer) for layer in result.layers)
    assert sparse.config.sparse.slash_sizes == tuple(tuple(h.slash for h in layer) for layer in result.layers)
    stats = prefill(sparse, random_ids(700), chunk_tokens=256).stats
    assert 0 < stats.density < 1
    provenance = json.loads((model.path / "sparse_attention_config.provenance.json").read_text())
    assert provenance["model"] == model.path.name
    assert (provenance["length"], provenance["base_length"], provenance["recall"]) == (700, 300, 0.9)
    assert provenance["density"] == result.density
    assert [[head["recall"] for head in layer] for layer in provenance["layers"]] == [
        [head.recall for head in layer] for layer in result.layers
    ]
    assert all(head.recall >= 0.9 for layer in result.layers for head in layer)
    assert {head.steps for layer in result.layers for head in layer} != {0}
    assert str(model.path) not in json.dumps(provenance)


def test_a_resumed_run_writes_the_same_bytes(model: Decoder, tmp_path: Path) -> None:
    run(model, tmp_path / "whole.json")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts.json", on_layer=stop_after(0))
    assert not (tmp_path / "parts.json").exists()
    layers: list[int] = []
    run(model, tmp_path / "parts.json", resume=True, on_layer=layers.append)
    assert layers == [1]
    for suffix in (".json", ".provenance.json"):
        assert (tmp_path / f"parts{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert len(list(tmp_path.glob("parts*"))) == 2  # nothing partial is left


def test_a_run_stopped_while_saving_resumes(model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(model, tmp_path / "whole.json")
    write, calls = module._write, list[Path]()

    def failing(file: Path, text: str) -> None:
        calls.append(file)
        if len(calls) == 2:  # the second layer's hidden states are there, the file that names them is not
            raise OSError("disk full")
        write(file, text)

    monkeypatch.setattr(module, "_write", failing)
    with pytest.raises(OSError, match="disk full"):
        run(model, tmp_path / "parts.json")
    run(model, tmp_path / "parts.json", resume=True)
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert len(list(tmp_path.glob("parts*"))) == 2


def test_files_that_are_there(model: Decoder, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run(model, output, on_layer=stop_after(0))
    with pytest.raises(FileExistsError, match="of an interrupted run exists; resume it or remove it"):
        run(model, output)
    with pytest.raises(ValueError, match=r"other inputs \(recall, step differ\)"):
        run(model, output, resume=True, recall=0.5, step=51)
    with pytest.raises(ValueError, match=r"other inputs \(length, tokens_sha256 differ\)"):
        calibrate(model, random_ids(701), output, resume=True, base_length=300, **OPTIONS)
    run(model, output, resume=True)
    with pytest.raises(FileExistsError, match=r"out\.json exists"):
        run(model, output)
    with pytest.raises(FileNotFoundError, match="no directory"):
        run(model, tmp_path / "absent" / "out.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 0.0}, r"recall must be in \(0, 1\], got 0.0"),
        ({"recall": 1.1}, r"recall must be in \(0, 1\], got 1.1"),
        ({"base_length": 701}, r"base_length must be in \[1, 700\], got 701"),
        ({"step": 0}, "step must be >= 1, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
        ({"last_q": 65}, r"last_q must be in \[1, 64\], got 65"),
        ({"pairs": []}, r"pairs must be \(V, S\) with V, S >= 0 and not both 0, got \[\]"),
        ({"pairs": [(0, 0)]}, "not both 0"),
        ({"pairs": [(99999999999999999999, 1)]}, r"V of pairs must be in \[0, 2147483647\], got 99999999999999999999"),
        ({"pairs": [(1, 10**30)]}, r"S of pairs must be in \[0, 2147483647\], got 10{30}"),
        ({"pairs": [(-1, 1)]}, r"V of pairs must be in \[0, 2147483647\], got -1"),
        ({"pairs": [(1.5, 1)]}, "V of pairs must be an integer in .*, got 1.5"),
        ({"chunk_tokens": 1.5}, "chunk_tokens must be an integer >= 1, got 1.5"),
    ],
)
def test_arguments(write_checkpoint: WriteCheckpoint, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(load_model(write_checkpoint()), tmp_path / "out.json", **options)
    assert list(tmp_path.glob("out*")) == []


def test_too_long_and_too_large(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(write_checkpoint(), max_seq_len=600)
    with pytest.raises(ValueError, match="max_seq_len = 600 tokens, got 700"):
        run(model, tmp_path / "out.json")
    monkeypatch.setattr(module, "available_memory", lambda _: 1000)
    with pytest.raises(
        MemoryError, match=r"calibrating on 700 tokens is estimated to need .* more memory, and 1.00 KB"
    ):
        run(load_model(model.path or ""), tmp_path / "out.json")


# --- memory ---


def test_memory_stays_within_the_estimate(write_checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    n, chunk_tokens = 4096, 512
    model = load_model(write_checkpoint(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3))

    def search(name: str) -> None:
        calibrate(model, random_ids(n), tmp_path / name, recall=0.01, pairs=[(64, 200)], chunk_tokens=chunk_tokens)

    search("warm.json")  # constants that stay
    peak = allocated_peak(lambda: search("out.json"))
    estimate = estimate_calibration_memory(model.config, n, chunk_tokens=chunk_tokens)
    indexes = index_bytes(4, 64, chunk_tokens, n, 64, 200, 4, on_gpu=False)
    expected = estimate.total - estimate.weights - estimate.indexes + indexes
    assert 0.7 * expected < peak < 1.05 * expected


def test_memory_is_below_that_of_prefill() -> None:
    million = 10**6
    for device in ("cpu", "cuda"):
        calibration = estimate_calibration_memory(QWEN_7B, million, chunk_tokens=32768, device=device)
        serving = estimate_memory(QWEN_7B, million, chunk_tokens=32768, device=device)
        assert calibration.kv_cache * QWEN_7B.num_layers == serving.kv_cache
        assert calibration.weights == serving.weights
        assert calibration.total < 0.75 * serving.total


# --- command line ---


def test_command_line(write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tokenizer=True, dual_chunk_attention_config=DUAL_CHUNK)
    options = "--length 1100 --base-length 600 --recall 0.8 --step 100 --pair 40 60 --pair 100 20 --chunk-tokens 512"
    command = ["calibrate", "--model", str(checkpoint), *options.split()]
    assert main([*command, "--synthetic", "--seed", "3", "-o", str(tmp_path / "a.json"), "--progress"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'a.json'}: 1,100 tokens, recall 0.")
    assert "calibrate: 100%" in captured.err
    provenance = json.loads((tmp_path / "a.provenance.json").read_text())
    assert provenance["source"] == {"synthetic": "passkey", "seed": 3}
    assert (provenance["pairs"], provenance["base_length"]) == ([[40, 60], [100, 20]], 600)

    model = load_model(checkpoint)
    text = tmp_path / "text.txt"
    text.write_text(model.tokenizer.decode(synthetic_tokens(model, 1100, 3)) + "what follows is not read")
    assert main([*command, "--file", str(text), "-o", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    assert json.loads((tmp_path / "b.provenance.json").read_text())["source"]["file"] == "text.txt"
    capsys.readouterr()

    assert main([*command, "--file", str(text), "-o", str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err == f"qwen-sparse calibrate: calibrate: {tmp_path / 'b.json'} exists; " + (
        "remove it or choose another output\n"
    )
    text.write_text("short")
    for length in (1100, 6, 0, -3):
        assert main([*command, "--length", str(length), "--file", str(text), "-o", str(tmp_path / "c.json")]) == 2
        assert f"--length must be in [1, 5], the tokens of {text}, got {length}" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:  # what does not fit is refused before its text is made
        patch.setattr("qwen_sparse.calibrate.make_prompt", None)
        options = ["--synthetic", "--length", "99999999999", "-o", str(tmp_path / "c.json")]
        assert main([*command, *options]) == 2
    assert "calibrating on 99999999999 tokens is estimated to need" in capsys.readouterr().err
    assert main([*command, "--synthetic", "--pair", "9" * 20, "1", "-o", str(tmp_path / "c.json")]) == 2
    assert "V of pairs must be in [0, 2147483647], got 99999999999999999999" in capsys.readouterr().err
    text.write_text("")
    assert main([*command, "--file", str(text), "-o", str(tmp_path / "c.json")]) == 2
    assert capsys.readouterr().err == f"qwen-sparse calibrate: {text} is empty\n"


def test_synthetic_prompts(write_checkpoint: WriteCheckpoint) -> None:
    model = load_model(write_checkpoint(tokenizer=True))
    tokens = synthetic_tokens(model, 2000, 1)
    assert len(tokens) == 2000
    assert tokens == synthetic_tokens(model, 2000, 1) != synthetic_tokens(model, 2000, 2)
    text = model.tokenizer.decode(tokens)
    assert text.endswith("The pass key is ")
    assert "door code is" in text
    with pytest.raises(ValueError, match="length must be >= 1024, got 1000"):
        synthetic_tokens(model, 1000, 0)


def test_base_pairs_are_those_of_the_report() -> None:
    assert BASE_PAIRS == ((30, 800), (100, 750), (500, 700), (1000, 6096), (3500, 100))
