"""Pages of shared pools: who has which, what a prefix finds, what goes first; and the plan for the memory."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import TINY
from qwen_sparse.engine.memory import estimate_memory
from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.kv_cache import kv_cache_bytes
from qwen_sparse.serve.pages import PageAllocator, page_digests
from qwen_sparse.serve.plan import EngineOptions, plan_pages, prefill_bytes

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dict({**TINY, "max_position_embeddings": 4096})
PAGE_BYTES = kv_cache_bytes(CONFIG, 128, torch.float32)


def tokens(*values: int) -> array[int]:
    """128 times each value."""
    return array("q", [value for value in values for _ in range(128)])


def test_digests_know_what_was_before() -> None:
    one, other = page_digests(tokens(1, 2, 3), b""), page_digests(tokens(1, 9, 3), b"")
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[2] != other[2]
    assert not set(one) & set(page_digests(tokens(1, 2, 3), b"sparse"))
    assert page_digests(tokens(1, 2, 3) + array("q", [4]), b"", one[:2]) == one


def test_a_prefix_is_shared() -> None:
    pages, digests = PageAllocator(4), page_digests(tokens(1, 2, 3), b"")
    assert pages.take_prefix(digests) == []
    mine = pages.take(3)
    assert mine == [0, 1, 2]
    pages.register(0, digests[0])
    pages.register(1, digests[1])
    assert pages.take_prefix(digests) == [0, 1]  # while it is in use
    assert pages.take(2) is None
    pages.give_back(mine)
    assert (pages.used, pages.available) == (2, 2)
    assert pages.take_prefix(digests[:1]) == [0]
    pages.give_back([0, 1])
    pages.give_back([0])
    assert pages.used == 0
    assert pages.take_prefix(digests) == [0, 1]  # when nobody uses it any more


def test_the_end_of_the_oldest_prefix_goes_first() -> None:
    pages = PageAllocator(4)
    first, second = page_digests(tokens(1, 2), b""), page_digests(tokens(3, 4), b"")
    for digests in (first, second):
        taken = pages.take(2)
        assert taken is not None
        for page, digest in zip(taken, digests, strict=True):
            pages.register(page, digest)
        pages.give_back(taken)
    assert pages.take(1) == [1]
    assert pages.take_prefix(first) == [0]
    assert pages.take(2) == [3, 2]
    assert pages.take_prefix(second) == []


def test_untouched_pages_can_be_refused() -> None:
    pages, (digest,) = PageAllocator(3), page_digests(tokens(1), b"")
    assert pages.take(1) == [0]
    pages.register(0, digest)
    pages.give_back([0])
    assert pages.take(2, untouched=0) is None
    assert pages.take_prefix([digest]) == [0]  # nothing was lost in trying
    pages.give_back([0])
    assert pages.take(2, untouched=1) == [1, 0]
    assert pages.take_prefix([digest]) == []


def test_without_caching() -> None:
    pages, digests = PageAllocator(2, caching=False), page_digests(tokens(1), b"")
    taken = pages.take(1)
    assert taken is not None
    pages.register(taken[0], digests[0])
    pages.give_back(taken)
    assert pages.take_prefix(digests) == []


class Users(RuleBasedStateMachine):
    """Any order of calls: a page has one content, and is never written while someone else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(8)
        self.content: dict[int, bytes] = {}
        self.users: list[list[int]] = []

    @rule(values=st.lists(st.integers(0, 2), min_size=1, max_size=4), untouched=st.none() | st.integers(-1, 3))
    def begin(self, values: list[int], untouched: int | None) -> None:
        digests = page_digests(tokens(*values), b"")
        prefix = self.allocator.take_prefix(digests)
        assert [self.content[page] for page in prefix] == digests[: len(prefix)]
        available = self.allocator.available
        rest = self.allocator.take(len(digests) - len(prefix), untouched=untouched)
        if rest is None:
            assert untouched is not None or available < len(digests) - len(prefix)
            self.allocator.give_back(prefix)
            return
        in_use = {page for user in self.users for page in user} | set(prefix)
        assert not in_use & set(rest)
        assert len(set(rest)) == len(rest)
        for page, digest in zip(rest, digests[len(prefix) :], strict=True):
            self.content[page] = digest
            self.allocator.register(page, digest)
        self.users.append([*prefix, *rest])

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        self.allocator.give_back(self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @invariant()
    def counts(self) -> None:
        assert self.allocator.used == len({page for user in self.users for page in user})
        assert self.allocator.used + self.allocator.available == 8


TestUsers = Users.TestCase
TestUsers.settings = settings(max_examples=100, deadline=None)


# --- The plan ---


def plan(available: int | None, weights: int = 0, config: ModelConfig = CONFIG, **options: Any) -> int:
    engine_options = EngineOptions(**options)
    return plan_pages(
        config,
        engine_options,
        longest=engine_options.length_for(config),
        available=available,
        kv_cache_dtype="auto",
        dtype=torch.float32,
        device=CPU,
        weights=weights,
    )


def beside(seqlen: int, rows: int = 16384) -> int:
    return prefill_bytes(CONFIG, seqlen, rows=rows, kv_cache_dtype="auto", dtype=torch.float32, device=CPU)


def test_prefill_counts_a_workspace_for_scattered_pages() -> None:
    estimate = estimate_memory(CONFIG, 1000, dtype=torch.float32, chunk_tokens=500)
    gathered = 2 * 1000 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert beside(1000, 500) == estimate.total - estimate.weights - estimate.kv_cache + gathered
    estimate = estimate_memory(CONFIG, 1000, dtype=torch.float32, chunk_tokens=500, kv_cache_dtype="int8")
    arguments: dict[str, Any] = {"rows": 500, "dtype": torch.float32, "device": CPU}
    in_int8 = prefill_bytes(CONFIG, 1000, kv_cache_dtype="int8", **arguments)
    assert in_int8 == estimate.total - estimate.weights - estimate.kv_cache


def test_what_is_left_becomes_pages() -> None:
    budget = beside(4096) + 50 * PAGE_BYTES
    assert plan(budget, memory_utilization=1.0) == 50
    assert plan(2 * budget, memory_utilization=0.5) == 50
    weights = estimate_memory(CONFIG, 4096, dtype=torch.float32).weights
    assert plan(budget + weights, memory_utilization=1.0, weights=weights) == 50
    assert plan(2**50) == 32 * 16  # no more than all sequences can use
    assert plan(None, max_num_seqs=3) == 32 * 3


def test_too_little_memory_says_what_would_fit() -> None:
    budget = beside(1280) + 10 * PAGE_BYTES
    with pytest.raises(
        MemoryError, match=r"max_model_len = 4096 tokens needs .* KV cache .*; max_model_len = 1280 would"
    ):
        plan(budget, memory_utilization=1.0)
    assert plan(budget, memory_utilization=1.0, max_model_len=1280) == 10
    with pytest.raises(MemoryError, match="not even one token fits"):
        plan(1000)


def test_given_pages() -> None:
    assert plan(2**40, kv_cache_memory=40 * PAGE_BYTES + 5) == 40
    with pytest.raises(ValueError, match=r"kv_cache_memory must hold one sequence of max_model_len = 4096"):
        plan(2**40, kv_cache_memory=32 * PAGE_BYTES - 1)
    with pytest.raises(MemoryError, match=r"for the KV cache, and .* are available; lower kv_cache_memory"):
        plan(beside(4096) + 39 * PAGE_BYTES, kv_cache_memory=40 * PAGE_BYTES)


def test_rules() -> None:
    for name in ("max_model_len", "chunk_tokens", "max_num_seqs", "max_queue", "kv_cache_memory"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            EngineOptions(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"memory_utilization must be in \(0, 1\], got 1.5"):
        EngineOptions(memory_utilization=1.5)
    with pytest.raises(ValueError, match=r"at most 4096, the tokens that this model reads .*got 5000"):
        plan(2**40, max_model_len=5000)
    assert EngineOptions(max_model_len=100).length_for(CONFIG) == 100
    assert EngineOptions().length_for(replace(CONFIG, max_position_embeddings=77)) == 77
    chunks = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 512}
    dual_chunk = ModelConfig.from_dict({**TINY, "dual_chunk_attention_config": chunks})
    assert EngineOptions(max_model_len=5000).length_for(dual_chunk) == 5000
    assert EngineOptions().length_for(dual_chunk, 300) == 300
    for config in (CONFIG, dual_chunk):
        with pytest.raises(ValueError, match="max_model_len must be at most 300, the model's max_seq_len, got 301"):
            EngineOptions(max_model_len=301).length_for(config, 300)
