"""Decode steps of several sequences: padded to sizes that CUDA graphs are captured for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen_sparse import prefill
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.model.kv_cache import PagedKVCache
from qwen_sparse.passkey import make_prompt
from qwen_sparse.serve import batch as batch_module
from qwen_sparse.serve.batch import DecodeBatch

DENSE = load_passkey_model(device="cpu").with_options(attention="dense")


class Replayed:
    """In place of ``StepGraph``: its function, always the first one."""

    def __init__(self, device: torch.device) -> None:
        self.function: Callable[[], None] | None = None

    def run(self, function: Callable[[], None]) -> None:
        self.function = self.function or function
        self.function()


def test_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of changing size and members give what each sequence gets alone, through tensors that stay."""
    monkeypatch.setattr(batch_module, "StepGraph", Replayed)
    pool = DENSE.new_pool(13)
    batch = DecodeBatch(DENSE, pool, max_pages=4, padding_page=12)
    texts = [make_prompt(300, depth=0.4, seed=length).text[-length:] for length in (130, 300, 64)]
    prompts = [torch.tensor(DENSE.tokenizer.encode(text)) for text in texts]
    tables = [[3, 0, 7], [1, 4, 9], [2]]
    together = [PagedKVCache(pool, table) for table in tables]
    alone = [prefill(DENSE, tokens).cache for tokens in prompts]
    for tokens, cache in zip(prompts, together, strict=True):
        prefill(DENSE, tokens, cache=cache)
    for step in range(80):
        members = [[0, 1, 2], [1], [2, 0], [0, 1, 2]][step // 20]
        if step == 64:
            together[2].extend([5])
        logits = batch.step([40 + member for member in members], [together[member] for member in members])
        for row, member in zip(logits, members, strict=True):
            expected_row = DENSE.forward(torch.tensor([40 + member]), alone[member])
            torch.testing.assert_close(row, expected_row, rtol=0, atol=1e-4)
    assert set(batch._shapes) == {1, 2, 4}
