"""One decode step of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..engine.decoding import StepGraph
from ..model.decoder import Decoder
from ..model.kv_cache import KVPool, PagedKVCache

__all__ = ["DecodeBatch"]


class DecodeBatch:
    """Feeds one token of each sequence through the model.

    On a GPU, the step is captured in a CUDA graph for 1, 2, 4, ... sequences, and others of the next such number are
    padded with rows that write to a page of their own.

    Args:
        model: the model.
        pool: the pages of all sequences.
        max_pages: most pages of a sequence.
        padding_page: a page that no sequence uses, for CUDA graphs; None: without them.
    """

    def __init__(self, model: Decoder, pool: KVPool, max_pages: int, padding_page: int | None) -> None:
        self._model, self._pool, self._max_pages, self._padding_page = model, pool, max_pages, padding_page
        self._shapes: dict[int, _Captured] = {}
        self._table = torch.empty(0)
        self._tables: list[Tensor] = []

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], sequences: Sequence[PagedKVCache]) -> Tensor:
        """Logits behind one more token of each sequence, which has room for it; takes it into their caches.

        Args:
            tokens: the next token of each.
            sequences: what is cached of each; in the pool.

        Returns:
            float32 ``[batch, vocab]``; the next call may overwrite it.
        """
        device = self._model.device
        ids = torch.tensor(tokens, dtype=torch.int64).to(device)
        seqlens = torch.tensor([cache.seqlen for cache in sequences]).to(device)
        table = self._block_table(sequences)
        if self._padding_page is None:
            logits = self._model.decode_step(ids, seqlens, self._pool, table)
        else:
            logits = self._replay(ids, seqlens, table, self._padding_page)
        for cache in sequences:
            cache.commit(1)
        return logits

    def _block_table(self, sequences: Sequence[PagedKVCache]) -> Tensor:
        tables = [cache.block_table for cache in sequences]
        if len(tables) != len(self._tables) or any(a is not b for a, b in zip(tables, self._tables, strict=True)):
            self._tables = tables  # a table that gets pages is a new tensor
            self._table = pad_sequence([table[0] for table in tables], batch_first=True)
        return self._table

    def _replay(self, ids: Tensor, seqlens: Tensor, table: Tensor, padding_page: int) -> Tensor:
        count = ids.shape[0]
        size = 1 << (count - 1).bit_length()
        captured = self._shapes.get(size)
        if captured is None:
            self._shapes[size] = captured = _Captured.empty(size, self._max_pages, self._model, padding_page)
        captured.ids[:count] = ids
        captured.seqlens[:count] = seqlens
        captured.seqlens[count:] = 0
        if captured.shown is not table:
            captured.table.fill_(padding_page)
            captured.table[:count, : table.shape[1]] = table
            captured.shown = table

        def step() -> None:
            captured.logits = self._model.decode_step(captured.ids, captured.seqlens, self._pool, captured.table)

        captured.graph.run(step)
        return captured.logits[:count]


@dataclass
class _Captured:
    """The tensors that a graph reads and writes, always the same."""

    ids: Tensor
    seqlens: Tensor
    table: Tensor
    graph: StepGraph
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    shown: Tensor | None = None
    """What ``table`` was made of."""

    @classmethod
    def empty(cls, size: int, max_pages: int, model: Decoder, padding_page: int) -> _Captured:
        ids, seqlens = (torch.zeros(size, dtype=torch.int64, device=model.device) for _ in range(2))
        table = torch.full((size, max_pages), padding_page, dtype=torch.int32, device=model.device)
        return cls(ids, seqlens, table, StepGraph(model.device))
