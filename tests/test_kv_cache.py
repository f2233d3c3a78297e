"""The paged cache by itself: pages, commits, growth, int8 storage, workspaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DUAL_CHUNK, TINY
from qwen_sparse import PagedKVCache, reference
from qwen_sparse.model.config import ModelConfig
from qwen_sparse.model.kv_cache import KVPool, KVRotation, kv_cache_bytes, resolve_kv_cache_dtype
from qwen_sparse.model.rope import inverse_frequencies

CONFIG = ModelConfig.from_dict({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2})
CHUNKED = ModelConfig.from_dict({**TINY, "dual_chunk_attention_config": DUAL_CHUNK})
CHUNK_LEN = 128


def random_kv(n: int, seed: int = 0, num_kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, n, num_kv_heads, 64, generator=generator)
    return k, v


def new_cache(config: ModelConfig, *, capacity: int = 0, **options: Any) -> PagedKVCache:
    return PagedKVCache.owning(KVPool(config, **options), capacity)


def fill(cache: PagedKVCache, k: Tensor, v: Tensor) -> None:
    slots = cache.next_slots(k.shape[0])
    for layer in range(cache.pool.config.num_layers):
        cache.pool.append(layer, k + layer, v - layer, slots)
    cache.commit(k.shape[0])


def int8_rotation() -> KVRotation:
    generator = torch.Generator().manual_seed(9)
    bias = [torch.zeros(1, 64), torch.zeros(1, 64)]
    for layer in bias:
        layer[0, :4] = 300 * torch.randn(4, generator=generator)  # a few huge channels, as in Qwen2.5-7B
    return KVRotation(inverse_frequencies(CHUNKED), 1.0, CHUNK_LEN, bias)


def test_what_is_appended_is_read_back() -> None:
    cache = new_cache(CONFIG)
    k, v = random_kv(300)
    for start, end in ((0, 5), (5, 128), (128, 290), (290, 300)):
        fill(cache, k[start:end], v[start:end])
    assert cache.seqlen == 300
    for layer in range(2):
        read_k, read_v = cache.workspace(layer, 300)
        assert torch.equal(read_k, k + layer)
        assert torch.equal(read_v, v - layer)


def test_workspace_is_a_view_of_the_pool() -> None:
    cache = new_cache(CONFIG, capacity=256)
    fill(cache, *random_kv(200))
    k, v = cache.workspace(1, 200)
    assert k.data_ptr() == cache.pool.pages(1).k.data_ptr()
    assert v.data_ptr() == cache.pool.pages(1).v.data_ptr()
    assert k.is_contiguous()
    assert cache.pool.workspace_nbytes == 0


def test_chunk_counts_only_once_committed() -> None:
    cache = new_cache(CONFIG)
    k, v = random_kv(100)
    fill(cache, k, v)
    cache.pool.append(0, *random_kv(70, seed=1), cache.next_slots(70))  # a chunk that stops after the first layer
    assert cache.seqlen == 100
    assert torch.equal(cache.workspace(0, 100)[0], k)
    again_k, again_v = random_kv(70, seed=2)
    fill(cache, again_k, again_v)
    assert cache.seqlen == 170
    assert torch.equal(cache.workspace(0, 170)[0], torch.cat((k, again_k)))


def test_growth_keeps_tokens_and_is_geometric() -> None:
    cache = new_cache(CONFIG, capacity=128 * 64)
    k, v = random_kv(128 * 64)
    fill(cache, k, v)
    fill(cache, *random_kv(1, seed=1))
    assert cache.capacity == 128 * 72  # an eighth more
    assert torch.equal(cache.workspace(1, 128 * 64)[1], v - 1)
    before = cache.pool.pages(0).k.data_ptr()
    cache.reserve(100)  # never shrinks
    assert cache.capacity == 128 * 72
    assert cache.pool.pages(0).k.data_ptr() == before


def test_truncate() -> None:
    cache = new_cache(CONFIG)
    k, v = random_kv(200)
    fill(cache, k, v)
    cache.truncate(77)
    assert cache.seqlen == 77
    fill(cache, k[:3], v[:3])
    assert torch.equal(cache.workspace(0, 80)[0], torch.cat((k[:77], k[:3])))


def test_sequences_share_a_pool() -> None:
    pool = KVPool(CONFIG, num_pages=8)
    scattered = PagedKVCache(pool, [2, 0, 3, 1])
    together = PagedKVCache(pool, [5])
    k, v = random_kv(600)
    fill(scattered, k[:100], v[:100])
    fill(together, -k[:90], -v[:90])
    with pytest.raises(ValueError, match=r"at most 512, what the sequence's pages of a shared pool hold"):
        scattered.next_slots(500)
    scattered.extend([4])
    together.extend([6])
    fill(scattered, k[100:], v[100:])
    fill(together, -k[90:200], -v[90:200])
    assert scattered.block_table.tolist() == [[2, 0, 3, 1, 4]]
    assert torch.equal(pool.pages(0).k[2], k[:128])
    assert torch.equal(pool.pages(0).k[4, :88], k[512:])
    read_k, read_v = together.workspace(1, 200)  # consecutive pages: read in place
    assert torch.equal(read_k, -k[:200] + 1)
    assert torch.equal(read_v, -v[:200] - 1)
    assert read_k.data_ptr() == pool.pages(1).k[5].data_ptr()
    assert pool.workspace_nbytes == 0
    read_k, read_v = scattered.workspace(1, 600)
    assert torch.equal(read_k, k + 1)
    assert torch.equal(read_v, v - 1)
    assert pool.workspace_nbytes == 2 * 640 * 2 * 64 * 4
    assert (scattered.nbytes, together.nbytes) == (pool.nbytes * 5 // 8, pool.nbytes * 2 // 8)


def test_pages_that_are_filled_already() -> None:
    pool = KVPool(CONFIG, num_pages=4)
    k, v = random_kv(256)
    fill(PagedKVCache(pool, [3, 1]), k, v)
    again = PagedKVCache(pool, [3, 1, 0], seqlen=128)
    assert again.seqlen == 128
    assert torch.equal(again.workspace(0, 128)[0], k[:128])


def test_slots_of_several_sequences() -> None:
    tables = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    slots = new_cache(CHUNKED, rotation=int8_rotation()).pool.slots(torch.tensor([[127, 128], [5, 255]]), tables)
    assert slots.positions.tolist() == [127, 128, 5, 255]
    assert slots.rotations.tolist() == [127, 0, 5, 127]
    assert slots.slot_mapping.tolist() == [2 * 128 + 127, 0, 128 + 5, 3 * 128 + 127]


@pytest.mark.parametrize("pages", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=["consecutive", "scattered"])
def test_int8(pages: list[int]) -> None:
    rotation = int8_rotation()
    assert rotation.k_bias is not None
    pool = KVPool(CHUNKED, kv_cache_dtype="int8", num_pages=4, rotation=rotation)
    cache = PagedKVCache(pool, pages)
    k, v = random_kv(500, num_kv_heads=1)
    positions = torch.arange(500) % CHUNK_LEN
    for layer in range(2):
        bias = rotation.k_bias[layer].expand(500, 1, 64)
        rotated = reference.rotate(k + bias, positions, rotation.inv_freq).float()
        for start, end in ((0, 130), (130, 500)):
            cache.pool.append(layer, rotated[start:end], v[start:end], cache.next_slots(end - start))
            cache.commit(end - start)
        read_k, read_v = cache.workspace(layer, 500)
        unbiased = rotated - reference.rotate(bias, positions, rotation.inv_freq).float()
        half_step = unbiased.abs().amax(-1, keepdim=True) / 127 / 2
        assert ((read_k - rotated).abs() <= half_step + 1e-3).all()  # without the bias trick: steps of ~ 300 / 127
        assert ((read_v - v).abs() <= v.abs().amax(-1, keepdim=True) / 127 / 2 + 1e-5).all()
        cache.truncate(0)
    assert cache.pool.pages(0).k.dtype == torch.int8


def test_int8_bytes_do_not_depend_on_the_cut() -> None:
    k, v = random_kv(300, num_kv_heads=1)
    caches = []
    for cuts in ((300,), (1, 127, 128, 200, 300)):
        cache = new_cache(CHUNKED, kv_cache_dtype="int8", rotation=int8_rotation())
        start = 0
        for end in cuts:
            fill(cache, k[start:end], v[start:end])
            start = end
        caches.append(cache)
    for layer in range(2):
        for one, other in zip(*(cache.pool.pages(layer) for cache in caches), strict=True):
            assert one is not None
            assert torch.equal(one.flatten(0, 1)[:300], other.flatten(0, 1)[:300])


def test_layers_share_the_workspace() -> None:
    cache = new_cache(CHUNKED, kv_cache_dtype="int8", rotation=int8_rotation())
    fill(cache, *random_kv(200, num_kv_heads=1))
    first, second = cache.workspace(0, 200)[0], cache.workspace(1, 200)[0]
    assert first.data_ptr() == second.data_ptr()
    assert cache.pool.workspace_nbytes == 2 * 256 * 64 * 4
    cache.pool.release_workspace()
    assert cache.pool.workspace_nbytes == 0


@pytest.mark.parametrize(("name", "storage"), [("auto", torch.float32), ("int8", torch.int8)])
def test_nbytes(name: str, storage: torch.dtype) -> None:
    cache = new_cache(CONFIG, kv_cache_dtype=name, capacity=1000, rotation=KVRotation(torch.ones(32)))
    assert cache.capacity == 1024
    assert cache.nbytes == kv_cache_bytes(CONFIG, 1000, storage)
    assert f"nbytes={cache.nbytes}" in repr(cache)


def test_storage_dtype() -> None:
    assert resolve_kv_cache_dtype("auto", torch.float16) == torch.float16
    assert resolve_kv_cache_dtype("bfloat16", torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match=r"needs a model in bfloat16.*got dtype float16"):
        resolve_kv_cache_dtype("bfloat16", torch.float16)
    with pytest.raises(ValueError, match="must be 'auto', 'bfloat16' or 'int8', got 'fp8'"):
        resolve_kv_cache_dtype("fp8", torch.bfloat16)
    with pytest.raises(ValueError, match="rotation must be given"):
        new_cache(CONFIG, kv_cache_dtype="int8")


def test_rules() -> None:
    cache = new_cache(CONFIG)
    k, v = random_kv(10)
    slots = cache.next_slots(10)
    with pytest.raises(ValueError, match=r"slot_mapping must have shape \[n\] = \[9\], got \[10\]"):
        cache.pool.append(0, k[:9], v[:9], slots)
    with pytest.raises(ValueError, match=r"= \[\*, 2, 64\], got \[10, 1, 64\] and \[10, 1, 64\]"):
        cache.pool.append(0, k[:, :1], v[:, :1], slots)
    with pytest.raises(ValueError, match=r"got \[10, 2, 64\] and \[9, 2, 64\]"):
        cache.pool.append(0, k, v[:9], slots)
    with pytest.raises(ValueError, match=r"num_tokens must be in \[0, 128\], got 129"):
        cache.commit(129)
    with pytest.raises(ValueError, match=r"must be in \[0, 0\], got 1"):
        cache.truncate(1)
    with pytest.raises(ValueError, match=r"must be an integer in \[0, 0\], got 0.0"):
        cache.truncate(0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"capacity = 128\], got 129"):
        cache.workspace(0, 129)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        cache.reserve(-1)
    with pytest.raises(ValueError, match="this one has its own and grows by itself"):
        cache.extend([1])
    pool = KVPool(CONFIG, num_pages=2)
    with pytest.raises(ValueError, match=r"pages must be in \[0, num_pages = 2\), got \[0, 2\]"):
        PagedKVCache(pool, [0, 2])
    with pytest.raises(ValueError, match=r"pages must be distinct and new to the sequence, got \[1, 1\]"):
        PagedKVCache(pool, [1, 1])
    with pytest.raises(ValueError, match=r"pages must be distinct and new to the sequence, got \[0\]"):
        PagedKVCache(pool, [0, 1]).extend([0])
    with pytest.raises(ValueError, match=r"num_tokens must be in \[0, 128\], got 129"):
        PagedKVCache(pool, [0], seqlen=129)
    with pytest.raises(ValueError, match="pool must have no pages yet, got 2"):
        PagedKVCache.owning(pool)
