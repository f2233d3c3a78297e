"""Dual Chunk Attention over vLLM's pages: writes keys and values, decodes from pages, prefills from a workspace."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionImpl

from ..kernels import ops
from ..model import rope
from ..model.attention import Queries, attend
from ..model.config import DualChunkConfig
from ..model.decoder import DECODE_ROWS
from ..model.kv_cache import LayerPages
from .metadata import DualChunkMetadata, Prefill
from .pages import split_cache
from .projection import key_bias
from .support import INT8, check_engine, check_layer, check_rope_theta, sparse_config
from .workspace import Workspace

__all__ = ["DualChunkImpl"]


class DualChunkImpl(AttentionImpl[DualChunkMetadata]):
    """One attention layer; arguments are those that vLLM gives.

    ``query`` comes without rotation and ``key`` rotated at its position modulo ``chunk_len`` (``rotary.py``).

    Raises:
        ValueError: something that is not supported; the message names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        layer_idx: int,
        dual_chunk_attention_config: dict[str, Any],
        **options: Any,
    ) -> None:
        config = get_current_vllm_config()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        check_engine(config)
        check_layer(
            head_size=head_size,
            group_size=num_heads // self.num_kv_heads,
            kv_cache_dtype=kv_cache_dtype,
            dtype=config.model_config.dtype,
            attn_type=attn_type,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **options,
        )
        text_config = config.model_config.hf_text_config
        self.dual_chunk = DualChunkConfig.from_dict(dual_chunk_attention_config)
        sparse = sparse_config(
            config.additional_config,
            dual_chunk_attention_config,
            num_layers=text_config.num_hidden_layers,
            num_heads=text_config.num_attention_heads,
        )
        first_head = get_tensor_model_parallel_rank() * num_heads
        own = slice(first_head, first_head + num_heads)
        self.sparse = None if sparse is None else sparse.of_layer(layer_idx, own)
        theta = check_rope_theta(text_config.rope_parameters)
        self.inv_freq = rope.plain_frequencies(theta, head_size)
        self.parent: weakref.ref[nn.Module] | None = None  # set by remember_parent
        self.bias_arguments: dict[str, Any] = {}
        self.max_model_len = config.model_config.max_model_len
        self.workspace = Workspace.of(self.inv_freq.device, config.model_config.dtype, (self.num_kv_heads, head_size))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the bias of the key projection, which int8 pages leave out."""
        if self.kv_cache_dtype == INT8:
            bias = key_bias(
                None if self.parent is None else self.parent(), self.num_heads, self.num_kv_heads, self.head_size
            )
            self.bias_arguments = {} if bias is None else {"k_bias": bias, "inv_freq": self.inv_freq}

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: DualChunkMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch.

        Args:
            layer: vLLM's layer.
            query: ``[num_tokens, num_heads, head_size]``, not rotated.
            key: ``[num_tokens, num_kv_heads, head_size]``, rotated.
            value: shaped like ``key``.
            kv_cache: the layer's pages; written.
            attn_metadata: the batch; None while vLLM measures memory.
            output: written; ``[num_tokens, num_heads, head_size]``.
            output_scale: must be None.
            output_block_scale: must be None.

        Raises:
            NotImplementedError: a quantised output is asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("qwen_sparse: attention with quantised output is not supported")
        if attn_metadata is None:
            self.workspace.reserve(self.max_model_len)  # counts as memory that is not left for pages
            return output.fill_(0)
        batch, pages = attn_metadata, split_cache(kv_cache, self.num_kv_heads, self.head_size)
        ops.store_kv(
            key[: batch.num_rows],
            value[: batch.num_rows],
            pages.k,
            pages.v,
            batch.slot_mapping,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            positions=batch.rotations if self.bias_arguments else None,
            **self.bias_arguments,
        )
        if batch.num_decodes:
            rows = slice(0, batch.num_decodes)
            self._attend_pages(query, output, rows, rows, None, pages, batch)
        for prefill in batch.prefills:
            self._prefill(query, output, prefill, pages, batch)
        return output

    def _prefill(
        self, query: Tensor, output: Tensor, prefill: Prefill, pages: LayerPages, batch: DualChunkMetadata
    ) -> None:
        rows, seqlen, length = prefill.rows, prefill.seqlen, max(prefill.prompt_len, prefill.seqlen)
        original = self.dual_chunk.original_max_position_embeddings
        scale = self.scale * rope.dual_chunk_temperature(length, original) ** 2
        sparse, num_rows, dense = self.sparse, rows.stop - rows.start, prefill.dense_rows
        if sparse is not None and (not sparse.enabled or length <= sparse.threshold or dense == num_rows):
            sparse = None
        if sparse is None and num_rows <= DECODE_ROWS:
            request = slice(prefill.request, prefill.request + 1)
            self._attend_pages(query, output, rows, request, scale, pages, batch)
            return
        k, v = self._gather(prefill, pages, batch)
        critical_rows = 0 if sparse is None or sparse.coverage is not None else sparse.last_q
        q = self._queries(query[rows], batch.positions[rows], seqlen, critical_rows)
        output[rows] = attend(q, k, v, scale, sparse, dense)

    def _queries(self, q: Tensor, positions: Tensor, seqlen: int, critical_rows: int) -> Queries:
        """All rotations that attention needs; within the first chunk it equals plain rotary embedding."""
        if seqlen <= self.dual_chunk.chunk_len:
            return Queries(cast(tuple[Tensor, Tensor], ops.rotary(q, q[:, :0], positions, self.inv_freq))[0])
        rotated = self._rotate(q, positions, critical_rows)
        return Queries(
            rotated.q_intra,
            rotated.q_succ,
            rotated.q_inter,
            self.dual_chunk.chunk_len,
            rotated.q_succ_critical,
            rotated.q_inter_critical,
        )

    def _rotate(self, q: Tensor, positions: Tensor, critical_rows: int) -> ops.DualChunkRotary:
        rotated = ops.rotary(
            q,
            q[:, :0],
            positions,
            self.inv_freq,
            chunk_size=self.dual_chunk.chunk_size,
            chunk_len=self.dual_chunk.chunk_len,
            critical_rows=critical_rows,
        )
        return cast(ops.DualChunkRotary, rotated)

    def _gather(self, prefill: Prefill, pages: LayerPages, batch: DualChunkMetadata) -> tuple[Tensor, Tensor]:
        """Keys and values of a request, contiguous; the next call overwrites them."""
        k, v = self.workspace.buffers(prefill.seqlen)
        ops.gather_kv(
            pages.k,
            pages.v,
            batch.block_table[prefill.request],
            k,
            v,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            chunk_len=self.dual_chunk.chunk_len,
            **self.bias_arguments,
        )
        return k, v

    def _attend_pages(
        self,
        query: Tensor,
        output: Tensor,
        rows: slice,
        requests: slice,
        scale: float | None,
        pages: LayerPages,
        batch: DualChunkMetadata,
    ) -> None:
        """Dense attention of the same number of rows for each of some requests; None: scaled by the batch's factors."""
        rotated = self._rotate(query[rows], batch.positions[rows], 0)
        by_request = (requests.stop - requests.start, -1, self.num_heads, self.head_size)
        out = ops.decode_attention(
            rotated.q_intra.view(by_request),
            pages.k,
            pages.v,
            batch.block_table[requests],
            batch.seqlens[requests],
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            q_succ=rotated.q_succ.view(by_request),
            q_inter=rotated.q_inter.view(by_request),
            chunk_len=self.dual_chunk.chunk_len,
            softmax_scale=self.scale if scale is None else scale,
            scale_factors=None if scale is not None or batch.scale_factors is None else batch.scale_factors[requests],
            **self.bias_arguments,
        )
        output[rows] = cast(Tensor, out).flatten(0, 1)
