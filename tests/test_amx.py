"""What is particular to attention on AMX tiles; all else is tested with the other instruction sets.

``amx_emulated`` runs the same kernels on any CPU, with the bits of the unit; test builds hold it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import WriteCheckpoint
from qwen_sparse import _C, ops, prefill, reference
from qwen_sparse.engine.memory import estimate_memory
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.loader import load_config
from qwen_sparse.testing import random_indexes, random_qkv

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import texts

SUPPORTED = _C.cpu_features()["supported"]
TILES = [name for name in SUPPORTED if name.startswith("amx")]


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("")


def run(isa: str, name: str, *arguments: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Output and LSE of an op with the kernels of an instruction set."""
    _C.set_cpu_isa(isa)
    try:
        return getattr(ops, name)(*arguments, return_lse=True, **options)  # type: ignore[no-any-return]
    finally:
        _C.set_cpu_isa("")


def base(tiles: str) -> str:
    """The set that does what tiles do not."""
    return {"amx": "avx512", "amx_emulated": "avx2"}[tiles]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


SHAPES = {
    "dense": ("attention", (300, 700, 4, 2, 64), {}),
    "wide": ("attention", (130, 333, 7, 1, 128), {}),
    "long": ("attention", (64, 2500, 1, 1, 64), {}),
    "window": ("attention", (150, 400, 2, 1, 64), {"window": 70}),
    "full": ("attention", (100, 300, 2, 1, 64), {"causal": False}),
    "sparse": ("vertical_slash_attention", (200, 900, 2, 1, 64), {}),
    "groups": ("block_group_attention", (200, 900, 2, 1, 128), {}),
}


def problem(name: str, factor: float = 1.0) -> tuple[str, tuple[Tensor, ...], dict[str, object]]:
    op, shape, options = SHAPES[name]
    q, k, v = random_qkv(*shape, torch.bfloat16)
    sets: tuple[Tensor, ...] = ()
    if name == "sparse":
        sets = random_indexes(2, 900, [40, 90], seed=1), random_indexes(2, 900, [6, 30], seed=2)
    if name == "groups":
        sets = (ops.select_block_groups(q, k, torch.full((2, ops.row_blocks(200, 900)), 1 / 900))[0],)
    return op, (q * factor, k, v, *sets), options


@pytest.mark.skipif("amx" not in SUPPORTED or "amx_emulated" not in SUPPORTED, reason="needs AMX and its emulation")
@pytest.mark.parametrize("factor", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("name", SHAPES)
def test_the_emulation_has_the_bits_of_the_unit(name: str, factor: float) -> None:
    op, tensors, options = problem(name, factor)
    assert same(run("amx", op, *tensors, **options), run("amx_emulated", op, *tensors, **options))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["dense", "sparse", "groups"])
def test_what_tiles_cannot_do_is_done_without_them(name: str, where: str, value: float, tiles: str) -> None:
    """Not a number, infinities and numbers whose products overflow: results are those of the other kernels."""
    op, tensors, options = problem(name)
    tensors["qkv".index(where)][150] = value
    if value == 3e38:
        tensors["kvq".index(where)][:] *= 1e4
    expected = run(base(tiles), op, *tensors, **options)
    assert same(run(tiles, op, *tensors, **options), expected)


@pytest.mark.parametrize("scale", [1e6, 1e20, -1e20])
def test_scores_beyond_the_arithmetic_of_weights(scale: float, tiles: str) -> None:
    op, tensors, _ = problem("dense")
    expected = run(base(tiles), op, *tensors, softmax_scale=scale)
    assert same(run(tiles, op, *tensors, softmax_scale=scale), expected)


@pytest.mark.parametrize("scale", [-0.3, 30.0, 1000.0])
def test_scores_far_below_the_maximum(scale: float, tiles: str) -> None:
    """Scores 16,384 binades and more below a row's maximum have no weight, wherever the maximum comes."""
    q, k, v = random_qkv(100, 400, 2, 1, 64, torch.bfloat16)
    out, lse = run(tiles, "attention", q, k, v, softmax_scale=scale)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), softmax_scale=scale, return_lse=True)
    assert (out - exact).abs().max() < 0.02
    assert ((lse - exact_lse).abs() / exact_lse.abs().clamp(min=1)).max() < 2e-3


def test_attended_pairs_are_counted_when_tiles_are_given_up(tiles: str) -> None:
    q, k, v = random_qkv(300, 300, 2, 1, 64, torch.bfloat16)
    q[10] = math.nan  # not in the first task: others have counted before
    groups, _ = ops.select_block_groups(q, k, torch.full((2, 5), 1 / 300))
    _C.set_cpu_isa(tiles)
    attended = ops._ops.block_group_attention(q, k, v, groups, 0.125)[2]
    mask = reference.block_group_mask(groups, 300, 300)
    assert attended.tolist() == mask.sum(dim=(1, 2)).tolist()


@pytest.mark.parametrize("name", ["dense", "groups"])
def test_rows_do_not_depend_on_where_a_prompt_is_cut(name: str, tiles: str) -> None:
    q, k, v = random_qkv(640, 640, 2, 1, 64, torch.bfloat16)
    groups, _ = ops.select_block_groups(q, k, torch.full((2, 10), 1 / 640))

    def rows(begin: int, end: int) -> Tensor:
        if name == "dense":
            return run(tiles, "attention", q[begin:end], k[:end], v[:end])[0]
        bitmap = groups[:, begin // 64 : end // 64, : -(-end // 512)].contiguous()
        return run(tiles, "block_group_attention", q[begin:end], k[:end], v[:end], bitmap)[0]

    assert torch.equal(torch.cat([rows(0, 192), rows(192, 256), rows(256, 640)]), rows(0, 640))


@pytest.mark.parametrize(("rows", "keys"), [(0, 10), (5, 0), (40, 3)])
def test_no_rows_and_no_keys(rows: int, keys: int, tiles: str) -> None:
    q, k, v = random_qkv(rows, keys, 2, 1, 64, torch.bfloat16)
    out, lse = run(tiles, "attention", q, k, v)
    assert out.shape == (rows, 2, 64)
    before_the_first_key = max(0, rows - keys)
    assert not out[:before_the_first_key].any()
    assert (lse[:before_the_first_key] == -math.inf).all()
    assert lse[before_the_first_key:].isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_accuracy_beside_torch(head_dim: int, tiles: str) -> None:
    q, k, v = random_qkv(512, 512, 2, 1, head_dim, torch.bfloat16)
    exact = reference.attention(q.double(), k.double(), v.double())
    heads_first = [x.transpose(0, 1)[None] for x in (q, k.expand(-1, 2, -1), v.expand(-1, 2, -1))]
    torchs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)
    error = [(x.double() - exact).pow(2).mean().sqrt() for x in (run(tiles, "attention", q, k, v)[0], torchs)]
    assert error[0] < 1.25 * error[1]


def test_tiles_are_left_as_they_were_found(tiles: str) -> None:
    """oneDNN multiplies on the same unit, in the same threads."""
    q, k, v = random_qkv(200, 600, 4, 2, 64, torch.bfloat16)
    a, b = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(512, 384, dtype=torch.bfloat16)
    product, attended = a @ b, run(tiles, "attention", q, k, v)[0]
    _C.set_cpu_isa(tiles)

    def in_turns(_: int) -> bool:
        for _ in range(3):
            if not torch.equal(ops.attention(q, k, v), attended) or not torch.equal(a @ b, product):
                return False
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(in_turns, range(6)))


def test_packed_keys_are_in_the_estimate(tiles: str, write_checkpoint: WriteCheckpoint) -> None:
    config = replace(load_config(write_checkpoint()), num_heads=4, num_kv_heads=2, head_dim=64)
    of_tiles = estimate_memory(config, 1000, dtype="bfloat16").workspace
    of_float32 = estimate_memory(config, 1000, dtype="float32").workspace
    _C.set_cpu_isa(base(tiles))
    assert of_tiles - estimate_memory(config, 1000, dtype="bfloat16").workspace == 2 * (2 * 1024 * 64 * 2 + 4096)
    assert of_float32 == estimate_memory(config, 1000, dtype="float32").workspace


@pytest.mark.released
@pytest.mark.parametrize("coverage", [None, 0.9])
def test_a_trained_model_writes_the_same(coverage: float | None, tiles: str, released_cut: Decoder) -> None:
    """Trained heads have keys with large biases and scores of every size."""
    tokens = torch.tensor(released_cut.tokenizer.encode(texts.code())[:1536])
    mode = "dense" if coverage is None else "sparse"
    model = released_cut.with_options(attention=mode, coverage=coverage)
    found = prefill(model, tokens).logits
    _C.set_cpu_isa(base(tiles))
    expected = prefill(model, tokens).logits
    _C.set_cpu_isa("")
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
