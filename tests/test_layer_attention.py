"""Attention of a layer: which rows are dense, and a prompt in two parts, against the reference."""

from __future__ import annotations

import pytest
import torch

from qwen_sparse import reference
from qwen_sparse.model.attention import Queries, attend, dense_rows
from qwen_sparse.model.config import SparseConfig
from qwen_sparse.model.coverage import thresholds


@pytest.mark.parametrize(
    ("rows", "seqlen", "prompt_len", "dense"),
    [
        (256, 256, 900, 0),  # a piece in the middle
        (256, 900, 2000, 0),
        (900, 900, 900, 4),  # a prompt in one piece: its last block
        (960, 960, 960, 64),
        (40, 40, 40, 40),
        (900, 1000, 1010, 40),  # a piece that ends within the last block
        (512, 1000, 1000, 512),  # up to 512 behind cached ones
        (513, 1000, 1000, 40),
        (300, 1000, 1001, 40),  # one token is still to come
        (700, 1000, 910, 104),  # generated tokens are computed again
        (700, 1700, 910, 700),
    ],
)
def test_dense_rows(rows: int, seqlen: int, prompt_len: int, dense: int) -> None:
    assert dense_rows(rows, seqlen, prompt_len) == dense


@pytest.mark.parametrize("dense", [0, 40, 400])
@pytest.mark.parametrize("kind", ["dense", "budgets", "coverage"])
def test_attend(kind: str, dense: int) -> None:
    """400 rows behind 200 keys, the last ``dense`` of them over all keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(400, 4, 64), torch.randn(600, 2, 64), torch.randn(600, 2, 64)
    q, k = 2 * q, k + 2 * torch.randn(600, 1, 1)
    expected = reference.attention(q, k, v, softmax_scale=0.1)
    first = slice(0, 400 - dense)
    before, keys, values = q[first], k[: 600 - dense], v[: 600 - dense]
    sparse = None
    if kind == "budgets":
        sparse = SparseConfig(((40,) * 4, (50,) * 4), ((100,) * 4, (110,) * 4), last_q=32).of_layer(1)
        if dense < 400:
            sets = reference.select_vertical_slash(q, k, vertical_size=50, slash_size=110, last_q=32, softmax_scale=0.1)
            sets = [torch.where(each < 600 - dense, each, -1) for each in sets]
            expected[first] = reference.vertical_slash_attention(before, keys, values, *sets, softmax_scale=0.1)
    elif kind == "coverage":
        sparse = SparseConfig(coverage=0.6)
        if dense < 400:
            by_block = thresholds(0.6, 400 - dense, 600 - dense).expand(4, -1)
            groups, _ = reference.select_block_groups(before, keys, by_block, softmax_scale=0.1)
            expected[first] = reference.block_group_attention(before, keys, values, groups, softmax_scale=0.1)
    actual = attend(Queries(q), k, v, 0.1, sparse, dense)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)
    everything = reference.attention(q, k, v, softmax_scale=0.1).float()
    assert ((actual[first] - everything[first]).abs() > 0.01).any() == (sparse is not None and dense < 400)
    torch.testing.assert_close(actual[400 - dense :], everything[400 - dense :], rtol=0, atol=1e-5)
