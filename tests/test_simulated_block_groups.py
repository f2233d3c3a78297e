"""Block groups on the CUDA kernels, in the simulator: attention and selection against the reference.

Beside what every kernel is tested for (``test_block_groups.py``): the ways in which tiles of groups come about (of
one block of a row tile, of both, too few for a tile, more words than a warp reads at once), splits of the selection,
schedules, and bits behind what a row sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import simulated
from ptxsim.fixtures import SCHEDULES
from qwen_sparse import reference
from qwen_sparse.testing import assert_close_to_reference, random_qkv

pytestmark = pytest.mark.ptxsim

BLOCK, GROUP = 64, 16


@pytest.fixture(scope="module")
def simulated_ops() -> Any:
    if reason := simulated.unavailable():
        pytest.skip(reason)
    return simulated.load()


@pytest.fixture(params=simulated.archs(), ids="sm{}".format)
def arch(request: pytest.FixtureRequest, simulated_ops: Any) -> Iterator[int]:
    simulated.reset()
    simulated.options(arch=request.param, sms=3)  # so few that persistent CTAs take several work items
    yield request.param
    simulated.reset()


def pack(attended: Tensor) -> Tensor:
    """The bitmap ``[heads, blocks, words]`` of bools ``[heads, blocks, groups]``."""
    bits = torch.nn.functional.pad(attended, (0, -attended.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def chosen(seqlen_q: int, seqlen_k: int, num_heads: int, density: float) -> Tensor:
    """A bitmap whose bits are set at random."""
    blocks = -(-seqlen_k // BLOCK) - (seqlen_k - seqlen_q) // BLOCK
    generator = torch.Generator().manual_seed(seqlen_k)
    return pack(torch.rand(num_heads, blocks, -(-seqlen_k // GROUP), generator=generator) < density)


def by_turns(seqlen_q: int, seqlen_k: int, num_heads: int, _: float) -> Tensor:
    """Even blocks attend even groups, odd blocks odd ones: no group is attended by both blocks of a row tile."""
    blocks = torch.arange((seqlen_k - seqlen_q) // BLOCK, -(-seqlen_k // BLOCK))[:, None]
    groups = torch.arange(-(-seqlen_k // GROUP))[None]
    return pack(((blocks + groups) % 2 == 0).expand(num_heads, -1, -1))


def first_blocks(seqlen_q: int, seqlen_k: int, num_heads: int, _: float) -> Tensor:
    """Even blocks attend everything, odd ones nothing: their rows are 0 and their log-sum-exp is -inf."""
    blocks = torch.arange((seqlen_k - seqlen_q) // BLOCK, -(-seqlen_k // BLOCK))[:, None]
    return pack((blocks % 2 == 0).expand(num_heads, -1, -(-seqlen_k // GROUP)))


@dataclass(frozen=True)
class Case:
    name: str
    seqlen_q: int
    seqlen_k: int
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    chunk_len: int | None = None
    density: float = 0.3
    bitmap: Callable[[int, int, int, float], Tensor] = chosen
    softmax_scale: float = 0.125
    strided: bool = False

    def __str__(self) -> str:
        return self.name

    def tensors(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Rotations of q (one without DCA), k and v."""
        q, k, v = random_qkv(self.seqlen_q, self.seqlen_k, self.num_heads, self.num_kv_heads, self.head_dim, self.dtype)
        if self.strided:
            q, k, v = (torch.nn.functional.pad(x, (0, 8, 0, 1))[:, :-1, :-8] for x in (q, k, v))
        rotations = [q] if self.chunk_len is None else [q, torch.roll(q, 1, -1), torch.roll(q, 2, -1)]
        return rotations, k, v


ATTENTION = [
    Case("regular", 256, 256, head_dim=128),
    Case("ragged_tail", 100, 333, dtype=torch.float16),
    Case("gqa_7", 65, 300, num_heads=7, head_dim=128, dtype=torch.float16),
    Case("past_not_on_block_border", 170, 707),
    Case("one_row", 1, 513),
    Case("one_key", 1, 1, density=1),
    Case("all", 200, 400, density=1, head_dim=128),
    Case("none", 90, 200, density=0),
    Case("a_tenth_in_several_batches", 70, 20011, density=0.1),
    Case("no_group_of_both_blocks", 250, 900, bitmap=by_turns, head_dim=128),
    Case("every_other_block", 300, 520, bitmap=first_blocks),
    Case("rows_before_first_key", 90, 40, density=0.7),
    Case("less_than_a_tile_in_a_batch", 70, 34000, density=0.003),
    Case("negative_scale", 70, 300, softmax_scale=-0.3),
    Case("strided", 130, 200, num_heads=4, num_kv_heads=2, strided=True),
    Case("dual_chunk", 150, 700, chunk_len=192),
    Case("dual_chunk_all", 210, 520, chunk_len=128, density=1, head_dim=128),
    Case("dual_chunk_by_turns", 100, 600, chunk_len=64, bitmap=by_turns, dtype=torch.float16),
    Case("dual_chunk_far_back", 80, 35000, chunk_len=17408, density=0.01),
]


def run_attention(ops: Any, case: Case, tensors: tuple[list[Tensor], Tensor, Tensor], block_groups: Tensor) -> Any:
    rotations, k, v = tensors
    if case.chunk_len is None:
        return ops.block_group_attention(*rotations, k, v, block_groups, case.softmax_scale)
    return ops.dual_chunk_attention(*rotations, k, v, case.chunk_len, None, None, block_groups, case.softmax_scale)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case: Case, simulated_ops: Any, arch: int) -> None:
    rotations, k, v = tensors = case.tensors()
    block_groups = case.bitmap(case.seqlen_q, case.seqlen_k, case.num_heads, case.density)
    out, lse, attended = run_attention(simulated_ops, case, tensors, block_groups)
    options: dict[str, Any] = {"block_groups": block_groups, "softmax_scale": case.softmax_scale, "return_lse": True}
    if case.chunk_len is None:
        definition = reference.block_group_attention
    else:
        definition = reference.dual_chunk_attention
        options["chunk_len"] = case.chunk_len
    inputs = (*rotations, k, v)
    exact, exact_lse = definition(*(x.double() for x in inputs), **options)
    rounded, rounded_lse = definition(*inputs, compute_dtype=case.dtype, **options)
    assert_close_to_reference(out, exact, rounded)
    assert_close_to_reference(lse, exact_lse, rounded_lse, floor=2e-5)
    mask = reference.block_group_mask(block_groups, case.seqlen_q, case.seqlen_k)
    assert torch.equal(attended, mask.sum((1, 2)))
    nothing = ~mask.any(-1).T
    assert (out[nothing] == 0).all()
    assert (lse[nothing] == -math.inf).all()


SCHEDULED = [
    case for case in ATTENTION if case.name in ("past_not_on_block_border", "no_group_of_both_blocks", "dual_chunk")
]


@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_schedules_change_nothing_in_attention(case: Case, simulated_ops: Any, arch: int) -> None:
    tensors, block_groups = case.tensors(), case.bitmap(case.seqlen_q, case.seqlen_k, case.num_heads, case.density)
    expected = run_attention(simulated_ops, case, tensors, block_groups)
    for schedule in SCHEDULES[1:]:
        simulated.options(**schedule)
        for ours, theirs in zip(run_attention(simulated_ops, case, tensors, block_groups), expected, strict=True):
            assert torch.equal(ours, theirs), schedule


@pytest.mark.parametrize("chunk_len", [None, 128], ids=["plain", "dual_chunk"])
def test_values_outside_of_tiles_of_few_groups(chunk_len: int | None, simulated_ops: Any, arch: int) -> None:
    """What no row attends does not show, be it NaN, nor do bits behind the last key or behind the row."""
    case = Case("", 70, 250, chunk_len=chunk_len)
    rotations, k, v = case.tensors()
    attended = torch.zeros(2, 2, 32, dtype=torch.bool)  # of the rows 180 to 191, and 192 to 249
    attended[:, :, 2] = attended[0, 0, 5] = attended[:, 1, 15] = True
    inside = run_attention(simulated_ops, case, (rotations, k, v), pack(attended))
    unused = ~attended.any(1).any(0)[:16].repeat_interleave(GROUP)[:250]
    k[unused] = v[unused] = math.nan
    behind = attended.clone()
    behind[:, 0, 12:] = behind[:, 1, 16:] = True
    for ours, theirs in zip(run_attention(simulated_ops, case, (rotations, k, v), pack(behind)), inside, strict=True):
        assert torch.equal(ours, theirs)


SELECTION = [
    Case("regular", 256, 256, head_dim=128),
    Case("ragged_tail", 100, 333, dtype=torch.float16),
    Case("gqa_7", 65, 300, num_heads=7, head_dim=128, dtype=torch.float16),
    Case("heads_of_their_own", 200, 500, num_heads=3, num_kv_heads=3),
    Case("past_not_on_block_border", 170, 707),
    Case("past_not_on_group_border", 5, 70),
    Case("one_row", 1, 513),
    Case("one_key", 1, 1),
    Case("more_blocks_than_a_warp_takes", 1200, 1250, num_heads=1),
    Case("several_splits", 40, 34000, head_dim=128),
    Case("negative_scale", 70, 300, softmax_scale=-0.3),
    Case("strided", 130, 200, num_heads=4, num_kv_heads=2, strided=True),
    Case("dual_chunk", 300, 1100, chunk_len=192),
    Case("dual_chunk_128", 100, 600, chunk_len=64, head_dim=128, dtype=torch.float16),
    Case("dual_chunk_splits", 80, 34900, chunk_len=17408),
]


def run_selection(ops: Any, case: Case, tensors: tuple[list[Tensor], Tensor, Tensor], thresholds: Tensor) -> Any:
    rotations, k, _ = tensors
    rotated = rotations[1:] or [None, None]
    return ops.select_block_groups(rotations[0], k, thresholds, case.softmax_scale, *rotated, case.chunk_len)


def selection_inputs(case: Case) -> tuple[tuple[list[Tensor], Tensor, Tensor], Tensor]:
    """Inputs whose shares differ widely, and thresholds around the mean share; the first block of a head has 0."""
    rotations, k, v = case.tensors()
    blocks = -(-case.seqlen_k // BLOCK) - (case.seqlen_k - case.seqlen_q) // BLOCK
    factors = torch.linspace(0.5, 1.5, case.num_heads * blocks).view(case.num_heads, blocks).clone()
    factors[0, 0] = 0
    return ([24 * q for q in rotations], k, v), factors / case.seqlen_k


@pytest.mark.parametrize("case", SELECTION, ids=str)
@pytest.mark.parametrize("arch", [80], ids="sm{}".format, indirect=True)  # one kernel serves all
def test_selection(case: Case, simulated_ops: Any, arch: int) -> None:
    tensors, thresholds = selection_inputs(case)
    bits, kept = run_selection(simulated_ops, case, tensors, thresholds)
    rotations, k, _ = tensors
    options: dict[str, Any] = {"softmax_scale": case.softmax_scale, "chunk_len": case.chunk_len}
    if case.chunk_len is not None:
        options |= {"q_succ": rotations[1], "q_inter": rotations[2]}
    expected, expected_kept = reference.select_block_groups(rotations[0], k, thresholds, **options)
    shares = reference.block_group_shares(rotations[0], k, **options)
    least = GROUP * thresholds[..., None].double()
    undecided = ((shares - least).abs() <= 0.01 * least) & (least > 0)
    wrong = bits ^ expected
    assert (wrong & ~pack(undecided) == 0).all()
    assert undecided.double().mean() < 0.05
    torch.testing.assert_close(kept, expected_kept, atol=1e-3 + (shares * undecided).sum(-1).max().item(), rtol=0)
    if case.seqlen_q > 100:  # the choice is one
        attended = reference.block_group_mask(expected, case.seqlen_q, case.seqlen_k)
        causal = case.num_heads * sum(range(case.seqlen_k - case.seqlen_q + 1, case.seqlen_k + 1))
        assert 0.1 < attended.sum() / causal < 0.9


@pytest.mark.parametrize("arch", [80], ids="sm{}".format, indirect=True)
def test_selection_attends_what_is_not_a_number(simulated_ops: Any, arch: int) -> None:
    case = Case("", 130, 200)
    (rotations, k, v), thresholds = selection_inputs(case)
    k[20] = math.nan
    bits, kept = run_selection(simulated_ops, case, (rotations, k, v), torch.ones_like(thresholds))
    expected, _ = reference.select_block_groups(rotations[0], k, torch.ones_like(thresholds), softmax_scale=0.125)
    assert torch.equal(bits, expected)
    assert kept.isnan().all()


@pytest.mark.parametrize("name", ["past_not_on_block_border", "dual_chunk"])
@pytest.mark.parametrize("arch", [80], ids="sm{}".format, indirect=True)
def test_schedules_change_nothing_in_selection(name: str, simulated_ops: Any, arch: int) -> None:
    case = next(case for case in SELECTION if case.name == name)
    inputs = selection_inputs(case)
    expected = run_selection(simulated_ops, case, *inputs)
    for schedule in SCHEDULES[1:]:
        simulated.options(**schedule)
        for ours, theirs in zip(run_selection(simulated_ops, case, *inputs), expected, strict=True):
            assert torch.equal(ours, theirs), schedule
