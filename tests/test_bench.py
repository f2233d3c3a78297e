"""The benchmark scripts run and end with their JSON; drawn index sets have what they promise."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from conftest import TINY, budgets
from qwen_sparse import reference
from qwen_sparse.engine.memory import weight_elements
from qwen_sparse.kernels.reference import vertical_slash_mask
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.testing import random_qkv

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import bench_attention  # noqa: E402
import bench_decode  # noqa: E402
import bench_serve  # noqa: E402
import flashinfer_peer  # noqa: E402
from bench_attention import DENSE_OF, KERNELS, Inputs, block_attention, check  # noqa: E402
from bench_million import linear_flop  # noqa: E402
from check_model import check_model  # noqa: E402
from checkpoint import BIAS_DEVIATION, model_config, random_weights  # noqa: E402
from find_budgets import find_budgets  # noqa: E402
from indexes import (  # noqa: E402
    BAND,
    SINKS,
    attended_keys,
    blocks_density,
    clustered_indexes,
    index_counts,
    occupied_blocks,
    read_budgets,
)
from one_layer import GPU_BACKENDS, first_working, sdpa_chunk  # noqa: E402
from plot import spread  # noqa: E402
from report import finish, save, working  # noqa: E402


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
    assert record["complete"]
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


def test_results_are_written_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "some.json"
    arguments = argparse.Namespace(output=output, sizes=["1/2"])

    def written() -> dict[str, Any]:
        record: dict[str, Any] = json.loads(output.read_text())
        return record

    save("some", arguments, [{"a": 1}])
    assert (written()["rows"], written()["complete"]) == ([{"a": 1}], False)
    finish("some", arguments, [{"a": 1}, {"a": 2}], [{"kernel": "b"}])
    assert (written()["rows"], written()["complete"]) == ([{"a": 1}, {"a": 2}], True)
    assert written()["options"] == {"sizes": ["1/2"]}
    assert json.loads(capsys.readouterr().out) == written()
    assert list(tmp_path.iterdir()) == [output]


STOPPED = {
    "bench_attention.py": ["--seqlens", "256", "-1", "--head-dims", "64", "--dtypes", "bfloat16", "--no-flex"],
    "bench_block_groups.py": ["--seqlens", "1024", "-1", "--num-heads", "4", "--head-dims", "64"],
    "bench_decode.py": ["--keys", "256", "-1", "--shapes", "4/2/64", "--footprint-mib", "1"],
    "bench_selection.py": ["--seqlens", "1024", "-1", "--layouts", "4/2x64"],
    "bench_prefill.py": ["--shape", "tiny", "--seqlens", "256", "-1", "--no-check", "--no-transformers"],
}
"""Options with a second case that no benchmark can run."""


@pytest.mark.parametrize("script", STOPPED)
def test_a_stopped_benchmark_keeps_what_it_measured(script: str, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, str(BENCH / script), *STOPPED[script], "--repeats", "1", "--output", str(output)]
    assert subprocess.run(command, capture_output=True).returncode != 0
    record = json.loads(output.read_text())
    assert not record["complete"]
    sizes = {value for row in record["rows"] for name, value in row.items() if name in ("seqlen", "seqlen_k", "keys")}
    assert sizes in ({256}, {1024})


@pytest.mark.parametrize("name", bench_decode.KERNELS)
def test_check_of_decode_finds_a_wrong_head(name: str) -> None:
    """The reference runs a kv head at a time: each part must have its own scales, bias and queries."""
    generator = torch.Generator().manual_seed(0)
    shape = bench_decode.Shape(6, 3, 64)
    step = bench_decode.decode_input(shape, 300, name.split()[0], bench_decode.KERNELS[name], generator)
    out = step.run()
    bench_decode.compare(step, out)
    for head in range(6):
        wrong = out.clone()
        wrong[:, :, head] = out[:, :, (head + 1) % 6]
        with pytest.raises(AssertionError, match="error"):
            bench_decode.compare(step, wrong)


def test_nothing_is_drawn_for_an_absent_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(bench_decode, "decode_input", lambda *arguments: pytest.fail("was called"))
    shape, generator = bench_decode.Shape(4, 2, 64), torch.Generator()
    with pytest.raises(ImportError, match="flashinfer"):
        bench_decode.flashinfer_steps(shape, 256, 1, generator, checked=True)


@pytest.mark.parametrize("heads_checked", ["all", "a group"])
def test_check_of_attention_finds_a_wrong_kernel(heads_checked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel against its own definition, which is computed once for all kernels that share it."""
    if heads_checked == "a group":
        monkeypatch.setattr(bench_attention, "MOST_CHECKED", 1)
    q, k, v = random_qkv(300, 300, 4, 2, 64, torch.bfloat16)
    columns, slashes = clustered_indexes(4, 300, 0.5, seed=0)
    inputs = Inputs(q, k, v, q.roll(1, dims=-1), q.roll(2, dims=-1), columns, slashes, chunk_len=128)
    ours = inputs.kernels()
    expected: bench_attention.Expected = {}
    checked = [name for name in KERNELS if name in ours and not name.startswith(("selection", "torch"))]
    assert checked == ["dense", "DCA dense", "vertical-slash", "DCA vertical-slash"]
    for name in checked:
        check(inputs, name, {}, expected)
    assert len(expected) == 4
    for name in checked:
        for other in checked:
            stands_for = {name: ours[other]}
            if other == name:
                check(inputs, name, stands_for, expected)
            else:
                with pytest.raises(AssertionError, match="error"):
                    check(inputs, name, stands_for, expected)
    check(inputs, "vertical-slash sm_80", {"vertical-slash sm_80": ours["vertical-slash"]}, expected)
    assert len(expected) == 4
    assert set(DENSE_OF.values()) <= set(KERNELS)


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
    last_block = 1 - pairs(1024 - 64) / pairs(1024)  # is dense
    assert sparse["density"] == pytest.approx(0.5 * (1 - last_block) + last_block, abs=0.03)
    assert set(sparse["phase_shares"]) == {"linear", "selection", "attention", "cache"}
    assert sparse["phase_shares"]["selection"] > 0
    assert 0 < sparse["outside_share"] < 1
    subprocess.run(
        [sys.executable, str(BENCH / "plot.py"), str(output), "--output", str(image)], check=True, capture_output=True
    )
    assert image.read_bytes().startswith(b"\x89PNG")


MILLION = ["--shape", "tiny", "--tokens", "2048", "--chunk-tokens", "512", "--chunk-size", "768", "--local-size", "256"]


def by_figure(record: dict[str, Any], figure: str, name: str) -> dict[str, dict[str, Any]]:
    return {row[name]: row for row in record["rows"] if row["figure"] == figure}


def test_million(tmp_path: Path) -> None:
    output = tmp_path / "million.json"
    sizes = [*MILLION, "--density", "0.5", "--new-tokens", "8", "--dense-tokens", "1024"]
    record = run("bench_million.py", *sizes, "--output", str(output))
    assert record == json.loads(output.read_text())
    assert record["benchmark"] == "million"
    assert record["revision"]
    assert record["not_measured"] == []
    assert len(by_figure(record, "check", "of")) == 3

    prefills = by_figure(record, "prefill", "attention")
    assert set(prefills) == {"vertical-slash", "dense"}
    sparse, dense = prefills["vertical-slash"], prefills["dense"]
    assert sparse["complete"]
    assert [chunk["end"] for chunk in sparse["chunks"]] == [512, 1024, 1536, 2048]
    assert sparse["density"] == pytest.approx(0.5, abs=0.1)
    assert sparse["seconds"] == pytest.approx(sum(chunk["seconds"] for chunk in sparse["chunks"]))
    for row in (sparse, dense):
        assert sum(row["phases"].values()) + row["outside_phases"] == pytest.approx(row["seconds"])
        assert all((row["phases"][phase] > 0) == (row is sparse or phase != "selection") for phase in row["phases"])
        # One of two layers attends; the last row of the prompt in both.
        assert sum(chunk["causal_pairs"] for chunk in row["chunks"]) == 2 * pairs(row["reached"]) + 2 * row["reached"]
    assert (dense["reached"], dense["density"]) == (1024, 1.0)
    estimate = sparse["memory"]["estimate"]
    assert estimate["total"] == sum(size for name, size in estimate.items() if name != "total")
    assert sparse["memory"]["peak_resident"] > estimate["total"]

    (decode,) = by_figure(record, "decode", "keys").values()
    assert (decode["keys"], decode["seconds"]["repeats"]) == (2048, 8 - 1 - 3)
    layers = by_figure(record, "one layer", "kernel")
    assert set(layers) == {"vertical-slash, selection included", "dense", "torch SDPA"}
    assert all((row["rows"], row["keys"]) == (512, 2048) for row in layers.values())
    extrapolated = by_figure(record, "dense prefill", "attention")
    assert set(extrapolated) == {"dense", "torch SDPA"}
    for name, row in extrapolated.items():
        assert row["extrapolated"]
        assert "causal pair" in row["rule"]
        per_pair = layers[name]["seconds"]["median"] / layers[name]["causal_pairs"]
        assert row["attention_seconds"] == pytest.approx(per_pair * (2 * pairs(2048) + 2 * 2048))


def pairs(seqlen: int) -> int:
    return seqlen * (seqlen + 1) // 2


def test_million_stops_at_its_time_limit(tmp_path: Path) -> None:
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps([budgets(TINY, 40, 120)[0]] * 4))
    options = ["--budgets", str(file), "--time-limit", "0.001", "--layers", "3", "--no-check", "--skip-sdpa"]
    record = run("bench_million.py", *MILLION, *options)
    assert by_figure(record, "budgets", "vertical_size").keys() == {40}
    (sparse,) = by_figure(record, "prefill", "attention").values()
    assert (sparse["complete"], sparse["reached"], sparse["tokens"]) == (False, 512, 2048)
    assert {row["kernel"] for row in record["not_measured"]} == {"decode", "one layer", "dense prefill"}
    assert all("--time-limit" in row["reason"] for row in record["not_measured"])
    assert {row["figure"] for row in record["rows"]} == {"budgets", "prefill"}


def test_million_leaves_out_what_is_not_wanted() -> None:
    options = ["--density", "0.5", "--no-check", "--skip-dense", "--skip-sdpa", "--skip-decode"]
    record = run("bench_million.py", *MILLION, *options)
    assert {row["figure"] for row in record["rows"]} == {"budgets", "prefill"}
    assert record["not_measured"] == []


def tiny_model(**changes: object) -> Decoder:
    dual_chunk = {"chunk_size": 768, "local_size": 256, "original_max_position_embeddings": 768}
    config = model_config("tiny", None, dual_chunk_attention_config=dual_chunk, **changes)
    weights = random_weights(config, torch.device("cpu"), seed=0)
    return Decoder(config, weights, config.dtype, torch.device("cpu"), kv_cache_dtype="int8")


@pytest.mark.parametrize("op", ["attention", "dual_chunk_attention", "decode_attention", "gather_kv"])
def test_check_of_a_model_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    model, right = tiny_model(), getattr(torch.ops.qwen_sparse, op)
    check_model(model, seed=0)

    def wrong(*args: Any) -> Any:
        """The values of another key."""
        shifted = list(args)
        place = next(i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.shape[-2] == 2 and i > 0)
        shifted[place] = args[place].roll(1, 0)
        return right(*shifted)

    monkeypatch.setattr(torch.ops.qwen_sparse, op, wrong)
    with pytest.raises(AssertionError, match="error"):
        check_model(model, seed=0)


def test_random_weights_keep_activations_in_range() -> None:
    model = tiny_model(num_hidden_layers=28, tie_word_embeddings=False)
    config, layer = model.config, model.weights.layers[5]
    assert layer.qkv_bias is not None
    assert layer.qkv.float().std() == pytest.approx(config.hidden_size**-0.5, rel=0.05)
    q_and_k, v = layer.qkv_bias.split([4 * config.head_dim, 2 * config.head_dim])
    assert q_and_k.float().std() == pytest.approx(BIAS_DEVIATION, rel=0.2)
    assert not v.any()
    logits = model.forward(torch.arange(256), model.new_cache(), output="all")
    assert logits is not None
    assert logits.std() == pytest.approx(1, rel=0.2)
    again = tiny_model(num_hidden_layers=28, tie_word_embeddings=False)
    assert torch.equal(again.weights.layers[27].mlp.down, model.weights.layers[27].mlp.down)


def test_linear_flop_counts_every_weight() -> None:
    config = tiny_model(tie_word_embeddings=False).config
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    not_multiplied = config.vocab_size * config.hidden_size + config.hidden_size
    not_multiplied += config.num_layers * (2 * config.hidden_size + qkv_rows)
    assert linear_flop(config, 7, 7) == 2 * 7 * (weight_elements(config) - not_multiplied)
    left_out = config.hidden_size * (config.num_heads * config.head_dim + 3 * config.intermediate_size)
    left_out += config.vocab_size * config.hidden_size
    assert linear_flop(config, 7, 0) == linear_flop(config, 7, 7) - 2 * 7 * left_out


def test_found_budgets_attend_about_the_density() -> None:
    model = tiny_model()
    for density in (0.3, 0.6):
        found = find_budgets(model, 2048, 256, density, seed=0)
        assert 0 < found.columns_outside_runs <= 1
        assert found.runs >= 1
        assert found.density < density  # of the last row: earlier ones attend more
    with pytest.raises(ValueError, match=r"density must be at least .*, got 1\.00%"):
        find_budgets(model, 2048, 256, 0.01, seed=0)


@pytest.mark.parametrize("seqlen", [130, 512, 700])
def test_attended_keys(seqlen: int) -> None:
    columns = torch.tensor([[0, 3, 99, 129], [5, 64, -1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    slashes = torch.tensor([[0, 1, 70, 129], [0, -1, -1, -1], [63, 64, 128, -1]], dtype=torch.int32)
    expected = vertical_slash_mask(columns, slashes, 1, seqlen).sum((1, 2))
    assert torch.equal(attended_keys(columns, slashes, seqlen), expected)


def test_sdpa_of_a_chunk_attends_all_causal_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(64, 4, 32, generator=generator)
    k, v = torch.randn(2, 200, 2, 32, generator=generator)
    past, own = (x[0].transpose(0, 1) for x in sdpa_chunk(q, k, v, 0.3, None) if x is not None)
    options: dict[str, Any] = {"softmax_scale": 0.3, "return_lse": True, "compute_dtype": torch.float32}
    expected, lse = reference.attention(q, k, v, **options)
    _, past_lse = reference.attention(q, k[:136], v[:136], causal=False, **options)
    merged = past * torch.exp(past_lse - lse)[..., None] + own * (1 - torch.exp(past_lse - lse))[..., None]
    torch.testing.assert_close(merged, expected)
    only_own = sdpa_chunk(q, k[:64], v[:64], 0.3, None)
    assert only_own[0] is None


def test_sdpa_runs_where_cudnn_refuses() -> None:
    ran = []

    def refusing(backend: SDPBackend | None) -> None:
        if backend == SDPBackend.CUDNN_ATTENTION:
            raise RuntimeError("No available kernel. Aborting execution.")
        ran.append(backend)

    skipped: list[dict[str, Any]] = []
    (found,) = first_working(refusing, GPU_BACKENDS, skipped).items()
    found[1]()
    assert (found[0], ran) == ("torch SDPA flash", [SDPBackend.FLASH_ATTENTION] * 2)
    assert [(row["kernel"], row["figure"]) for row in skipped] == [("torch SDPA cuDNN", "one layer")]
    assert list(first_working(ran.append, GPU_BACKENDS, skipped)) == ["torch SDPA cuDNN"]


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


def test_bench_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "serve.json"
    sizes = {"--document": 1000, "--chunk-tokens": 128, "--prompt": 100, "--new-tokens": 8, "--output": output}
    options = [str(part) for option in sizes.items() for part in option]
    monkeypatch.setattr("sys.argv", ["bench_serve.py", "--shape", "tiny", "--batches", "1", "3", *options])
    bench_serve.main()
    *decode, cold, second, alone, beside = json.loads(output.read_text())["rows"]
    assert [(row["batch"], row["temperature"]) for row in decode] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert all(row["tokens"] > row["batch"] * (8 - 2) for row in decode)
    assert (cold["cached_tokens"], second["cached_tokens"]) == (0, 1000 // 128 * 128)
    assert cold["prompt_tokens"] == second["prompt_tokens"] == 1064
    assert alone["gaps"] == 32
    assert beside["gaps"] >= 1000 // 128
