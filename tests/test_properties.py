"""Properties that hold for every shape and every index set, on examples that hypothesis draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen_sparse import ops, reference
from qwen_sparse.testing import assert_close_to_reference, random_qkv

# The `isa` fixture is set once per test and meant to be: every example runs on that instruction set.
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Problem:
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    columns: Tensor
    slashes: Tensor
    chunk_len: int | None
    seed: int

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return random_qkv(
            self.seqlen_q, self.seqlen_k, self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, seed=self.seed
        )

    def mask(self) -> Tensor:
        """bool ``[num_heads, seqlen_q, seqlen_k]``: the definition, row by row and key by key."""
        p = torch.arange(self.seqlen_k - self.seqlen_q, self.seqlen_k).view(1, -1, 1, 1)
        j = torch.arange(self.seqlen_k).view(1, 1, -1, 1)
        columns, slashes = (indexes[:, None, None, :] for indexes in (self.columns, self.slashes))
        first = p.div(64, rounding_mode="floor") * 64 - slashes
        in_slash = (slashes >= 0) & (first <= j) & (j < first + 64)
        return ((j == columns).any(-1) | in_slash.any(-1)) & (j <= p)[..., 0]


@st.composite
def index_sets(draw: st.DrawFn, num_heads: int, seqlen_k: int) -> Tensor:
    """int32 ``[num_heads, width]``: ascending, padded with -1; runs are as likely as scattered entries."""
    rows = []
    for _ in range(num_heads):
        chosen = draw(st.sets(st.integers(0, seqlen_k - 1), max_size=12))
        for start, width in draw(st.lists(st.tuples(st.integers(0, seqlen_k - 1), st.integers(1, 150)), max_size=2)):
            chosen |= set(range(start, min(start + width, seqlen_k)))
        rows.append(sorted(chosen))
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32).view(num_heads, width)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    seqlen_k = draw(st.integers(1, 700))
    num_kv_heads = draw(st.integers(1, 2))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    return Problem(
        seqlen_q=draw(st.integers(1, min(seqlen_k, 200))),
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([64, 128])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        columns=draw(index_sets(num_heads, seqlen_k)),
        slashes=draw(index_sets(num_heads, seqlen_k)),
        chunk_len=draw(st.sampled_from([None, 64, 128, 320])),
        seed=draw(st.integers(0, 1000)),
    )


@EXAMPLES
@given(problem=problems())
def test_sparse_attention_equals_the_definition(problem: Problem, isa: str) -> None:
    q, k, v = problem.qkv()
    indexes = {"vertical_indexes": problem.columns, "slash_indexes": problem.slashes, "return_lse": True}
    if problem.chunk_len is None:
        rotations, name, options = [q], "vertical_slash_attention", indexes
    else:
        rotations = [q, q.flip(0).contiguous(), q.flip(1).contiguous()]
        name, options = "dual_chunk_attention", {**indexes, "chunk_len": problem.chunk_len}
    out, lse = getattr(ops, name)(*rotations, k, v, **options)
    exact, exact_lse = getattr(reference, name)(*(x.double() for x in (*rotations, k, v)), **options)
    rounded, rounded_lse = getattr(reference, name)(*rotations, k, v, compute_dtype=problem.dtype, **options)
    assert_close_to_reference(out, exact, rounded)
    assert_close_to_reference(lse, exact_lse, rounded_lse, floor=2e-5)


@EXAMPLES
@given(problem=problems())
def test_attended_set_is_exact(problem: Problem, isa: str) -> None:
    """Zero queries weigh all attended keys alike: the LSE counts them, and values that are one-hot in the key's
    position (mod head_dim) name them."""
    q, k, _ = (x.float() for x in problem.qkv())
    v = torch.eye(problem.head_dim)[torch.arange(problem.seqlen_k) % problem.head_dim]
    v = v[:, None].expand(-1, problem.num_kv_heads, -1)
    scale = problem.head_dim**-0.5
    q = torch.zeros_like(q)
    if problem.chunk_len is None:
        result = torch.ops.qwen_sparse.vertical_slash_attention(q, k, v, problem.columns, problem.slashes, scale)
    else:
        result = torch.ops.qwen_sparse.dual_chunk_attention(
            q, q, q, k, v, problem.chunk_len, problem.columns, problem.slashes, None, scale
        )
    out, lse, attended = result
    mask = problem.mask()
    counts = mask.sum(-1).T  # [seqlen_q, num_heads]
    torch.testing.assert_close(lse.exp(), counts.float(), atol=1e-3, rtol=1e-4)
    assert torch.equal(attended, mask.sum((1, 2)))
    residues = torch.zeros(problem.num_heads, problem.seqlen_q, problem.head_dim)
    residues.index_add_(2, torch.arange(problem.seqlen_k) % problem.head_dim, mask.float())
    torch.testing.assert_close(out * counts[..., None], residues.transpose(0, 1), atol=1e-2, rtol=1e-4)


@EXAMPLES
@given(problem=problems(), vertical_size=st.integers(0, 800), slash_size=st.integers(0, 800))
def test_selection_is_valid_for_attention(problem: Problem, vertical_size: int, slash_size: int, isa: str) -> None:
    """Whatever is selected is accepted, holds what is forced, and has the size that was asked."""
    q, k, v = problem.qkv()
    vertical, slash = ops.select_vertical_slash(q, k, vertical_size=vertical_size, slash_size=slash_size)
    ops.vertical_slash_attention(q, k, v, vertical, slash)
    for indexes, size, forced in ((vertical, vertical_size, 30), (slash, slash_size, 100)):
        size = min(size, problem.seqlen_k)
        assert indexes.shape == (problem.num_heads, size)
        assert (indexes.diff(dim=1) > 0).all()
        assert torch.equal(
            indexes[:, : min(forced, size)],
            torch.arange(min(forced, size), dtype=torch.int32).expand(problem.num_heads, -1),
        )
