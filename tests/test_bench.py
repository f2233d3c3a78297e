"""The benchmark scripts run and end with their JSON; drawn index sets have what they promise."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, budgets
from qwen_sparse.reference import vertical_slash_mask

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

from indexes import BAND, SINKS, clustered_indexes, index_counts, read_budgets  # noqa: E402
from plot import spread  # noqa: E402


def run(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON of the last line; the output must come before it."""
    command = [sys.executable, str(BENCH / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) > 2
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def test_attention(tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    sizes = ["--seqlens", "256", "--head-dims", "64", "--dtypes", "bfloat16", "--repeats", "1"]
    record = run("bench_attention.py", *sizes, "--no-flex", "--density", "0.8", "--output", str(output))
    assert record == json.loads(output.read_text())
    assert record["benchmark"] == "attention"
    assert {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"} <= set(record["environment"])
    rows = {row["kernel"]: row for row in record["rows"]}
    sparse = {"vertical-slash", "selection + vertical-slash", "DCA vertical-slash"}
    assert set(rows) == {"torch SDPA", "dense", "DCA dense"} | sparse
    for name, row in rows.items():
        assert row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert (row["density"] < 1) == (name in sparse)
        assert (row["time_over_density_times_dense"] is not None) == (name in sparse)


def test_prefill_and_its_plot(tmp_path: Path) -> None:
    output, image = tmp_path / "prefill.json", tmp_path / "prefill.png"
    sizes = ["--shape", "tiny", "--seqlens", "256", "1024", "--repeats", "1", "--check-tokens", "192"]
    sizes += ["--chunk-tokens", "512", "--density", "0.5"]
    record = run("bench_prefill.py", *sizes, "--output", str(output))
    assert record["benchmark"] == "prefill"
    rows = {(row["engine"], row["attention"], row["seqlen"]): row for row in record["rows"]}
    engines = [("qwen_sparse", "dense"), ("qwen_sparse", "vertical-slash"), ("transformers SDPA", "dense")]
    assert set(rows) == {(*engine, seqlen) for engine in engines for seqlen in (256, 1024)}
    assert all(row["seconds"]["median"] > 0 for row in record["rows"])
    sparse = rows["qwen_sparse", "vertical-slash", 1024]
    assert sparse["density"] == pytest.approx(0.5, abs=0.03)
    assert set(sparse["phase_shares"]) == {"linear", "selection", "attention", "cache"}
    assert sparse["phase_shares"]["selection"] > 0
    assert 0 < sparse["outside_share"] < 1
    subprocess.run(
        [sys.executable, str(BENCH / "plot.py"), str(output), "--output", str(image)], check=True, capture_output=True
    )
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seqlen", "rows", "density"), [(1024, 1024, 0.4), (1024, 256, 0.35), (1500, 1500, 0.3), (1000, 200, 0.9)]
)
def test_drawn_density(seqlen: int, rows: int, density: float) -> None:
    sets = clustered_indexes(2, seqlen, density, seed=3, rows=rows)
    pairs = 2 * rows * (2 * seqlen - rows + 1) / 2
    assert float(vertical_slash_mask(*sets, rows, seqlen).sum()) / pairs == pytest.approx(density, rel=0.03)


@pytest.mark.parametrize("seqlen", [20, 96, 128, 192])
def test_drawing_ends_where_sinks_and_band_are_everything(seqlen: int) -> None:
    for density in (0.0, 0.5, 1.0):
        columns, slashes = clustered_indexes(1, seqlen, density, seed=0)
        assert columns[0, : min(SINKS, seqlen)].tolist() == list(range(min(SINKS, seqlen)))
        assert slashes[0, : min(BAND, seqlen)].tolist() == list(range(min(BAND, seqlen)))


def test_drawn_sets() -> None:
    columns, slashes = clustered_indexes(3, 2000, 0.3, seed=0)
    for indexes, forced in ((columns, SINKS), (slashes, BAND)):
        assert indexes.dtype == torch.int32
        assert max(index_counts(indexes)) == indexes.shape[1]
        for row, count in zip(indexes.tolist(), index_counts(indexes), strict=True):
            assert row[:forced] == list(range(forced))
            assert row[:count] == sorted(set(row[:count]))
            assert row[count - 1] < 2000
            assert row[count:] == [-1] * (len(row) - count)
    again, other = (clustered_indexes(3, 2000, 0.3, seed=seed) for seed in (0, 1))
    assert torch.equal(columns, again[0])
    assert torch.equal(slashes, again[1])
    assert not torch.equal(columns[0], columns[1])
    assert other[0].shape != columns.shape or not torch.equal(other[0], columns)


def test_budgets_of_fewer_layers_and_heads(tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps([budgets(TINY, 100 * layer, 7)[0] for layer in range(1, 9)]))
    sparse = read_budgets(file, num_layers=2, num_heads=1)
    assert sparse.vertical_sizes == ((300,), (700,))
    assert sparse.slash_sizes == ((7,), (7,))


def test_labels_are_spread() -> None:
    assert spread([0.0, 5.0], 1.0) == [0.0, 5.0]
    assert spread([1.0, 1.0, 1.0, 9.0], 1.0) == [0.0, 1.0, 2.0, 9.0]
    moved = spread([0.0, 0.1, 0.9, 1.0, 1.05], 1.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in itertools.pairwise(moved))
