"""The benchmark scripts run and end with their JSON; drawn index sets have what they promise."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, budgets
from qwen_sparse import reference
from qwen_sparse.reference import vertical_slash_mask

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import flashinfer_peer  # noqa: E402
from bench_attention import block_attention  # noqa: E402
from indexes import (  # noqa: E402
    BAND,
    SINKS,
    blocks_density,
    clustered_indexes,
    index_counts,
    occupied_blocks,
    read_budgets,
)
from plot import spread  # noqa: E402
from report import working  # noqa: E402


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
    assert record["not_measured"] == []
    for name, row in rows.items():
        assert row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert (row["density"] < 1) == (name in sparse)
        assert (row["time_over_density_times_dense"] is not None) == (name in sparse)


@pytest.mark.parametrize("seqlen", [256, 300, 449])
def test_occupied_blocks(seqlen: int) -> None:
    """Every block with an attended pair, and no other."""
    sets = clustered_indexes(3, seqlen, 0.3, seed=1)
    sets[1][0, BAND - 20 :] = -1  # distances that end inside of a block
    attended = vertical_slash_mask(*sets, seqlen, seqlen)
    padding = -seqlen % 64
    by_block = torch.nn.functional.pad(attended, (0, padding, 0, padding)).unflatten(2, (-1, 64)).unflatten(1, (-1, 64))
    occupied = occupied_blocks(*sets, seqlen)
    assert torch.equal(occupied, by_block.any(dim=4).any(dim=2))
    whole = pairs_in(occupied, seqlen)
    assert blocks_density(occupied, seqlen) == pytest.approx(float(whole.sum()) / (3 * seqlen * (seqlen + 1) / 2))


def pairs_in(occupied: torch.Tensor, seqlen: int) -> torch.Tensor:
    """The causal pairs of occupied blocks, ``[heads, seqlen, seqlen]``."""
    return occupied.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :seqlen, :seqlen].tril()


class FlashinferStub(types.ModuleType):
    """What flashinfer's documentation says that the functions and classes take and compute, for CPU tensors."""

    class VariableBlockSparseAttentionWrapper:
        def __init__(self, workspace: torch.Tensor) -> None:
            assert workspace.dtype == torch.uint8

        def plan(
            self,
            block_mask_map: torch.Tensor,  # [num_kv_heads, row blocks, column blocks]
            block_row_sz: torch.Tensor,  # [num_kv_heads, row blocks]
            block_col_sz: torch.Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim: int,
            causal: bool,
            q_data_type: torch.dtype,
        ) -> None:
            assert block_mask_map.dtype == torch.bool
            assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
            assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
            self.blocks = (block_mask_map, block_row_sz.tolist(), block_col_sz.tolist())
            self.heads, self.causal, self.dtype = (num_qo_heads, num_kv_heads, head_dim), causal, q_data_type

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            """Every tensor ``[heads, length, head_dim]``; the blocks of a row of blocks are one short sequence."""
            assert (q.shape[0], k.shape[0], q.shape[2]) == self.heads
            assert q.dtype == self.dtype
            mask, row_sizes, column_sizes = self.blocks
            out = torch.empty_like(q)
            for head in range(q.shape[0]):
                kv_head = head // (q.shape[0] // k.shape[0])
                rows, columns = (x[head].split(sizes[kv_head]) for x, sizes in ((out, row_sizes), (q, row_sizes)))
                keys, values = (x[kv_head].split(column_sizes[kv_head]) for x in (k, v))
                for block, (target, queries) in enumerate(zip(rows, columns, strict=True)):
                    chosen = mask[kv_head, block].nonzero().flatten().tolist()
                    k_row, v_row = (torch.cat([x[i] for i in chosen])[:, None] for x in (keys, values))
                    target.copy_(reference.attention(queries[:, None], k_row, v_row, causal=self.causal)[:, 0])
            return out

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace: torch.Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
            assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")

        def plan(
            self,
            indptr: torch.Tensor,
            indices: torch.Tensor,
            last_page_len: torch.Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim: int,
            page_size: int,
            q_data_type: torch.dtype,
            kv_data_type: torch.dtype,
        ) -> None:
            assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
            assert indptr.tolist() == [0, len(indices)]
            self.pages = indices.long()
            self.seqlen = (len(indices) - 1) * page_size + int(last_page_len)
            self.shapes = ((1, num_qo_heads, head_dim), (page_size, num_kv_heads, head_dim))
            self.dtypes = {q_data_type, kv_data_type}

        def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            assert q.shape == self.shapes[0]
            assert all(x.shape[1:] == self.shapes[1] for x in kv)
            assert {x.dtype for x in (q, *kv)} == self.dtypes
            k, v = (x[self.pages].flatten(0, 1)[: self.seqlen] for x in kv)
            return reference.attention(q, k, v)

    @staticmethod
    def single_prefill_with_kv_cache(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
    ) -> torch.Tensor:
        return reference.attention(q, k, v, causal=causal)


def test_flashinfer_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", FlashinferStub("flashinfer"))
    monkeypatch.setattr(flashinfer_peer, "WORKSPACE_BYTES", 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, heads, 64, generator=generator, dtype=torch.double) for heads in (4, 2, 2))
    torch.testing.assert_close(flashinfer_peer.dense_prefill(q, k, v)(), reference.attention(q, k, v))
    occupied = (torch.rand(4, 5, 5, generator=generator) < 0.4).tril() | torch.eye(5, dtype=torch.bool)
    out = flashinfer_peer.block_sparse_prefill(q, k, v, occupied)()
    attended = pairs_in(occupied, 300).transpose(0, 1)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("phd,jhd->phj", q, keys) / 8
    weights = scores.masked_fill(~attended, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("phj,jhd->phd", weights, values))
    torch.testing.assert_close(block_attention(q[-64:], k, v, occupied=occupied), out[-64:])

    q, k, v = (torch.randn(*shape, 64, generator=generator).bfloat16() for shape in ((1, 1, 4), (5, 16, 2), (5, 16, 2)))
    table, seqlens = torch.tensor([[3, 0, 4]], dtype=torch.int32), torch.tensor([39], dtype=torch.int32)
    decode = flashinfer_peer.paged_decode(table, 39 - 32, 16, 4, 2, 64)
    torch.testing.assert_close(decode(q, k, v), reference.decode_attention(q, k, v, table, seqlens))


def test_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)

    def broken() -> None:
        raise RuntimeError("no kernel\nfor this shape")

    q = torch.randn(3, 1, 64)
    skipped: list[dict[str, Any]] = []
    makers = {"a": lambda: flashinfer_peer.dense_prefill(q, q, q), "b": lambda: broken, "c": lambda: lambda: None}
    assert list(working(makers, skipped, seqlen=3)) == ["c"]
    assert [(row["kernel"], row["seqlen"]) for row in skipped] == [("a", 3), ("b", 3)]
    assert "flashinfer" in skipped[0]["reason"]
    assert skipped[1]["reason"] == "RuntimeError: no kernel"
    assert capsys.readouterr().out.count("not measured") == 2


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
