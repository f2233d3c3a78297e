"""What a batch needs, prepared once per step for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from ..model import rope
from ..model.attention import dense_rows
from ..model.config import DualChunkConfig
from .lengths import prompt_lengths, watch_runners

__all__ = ["DualChunkMetadata", "DualChunkMetadataBuilder", "Prefill"]


class Prefill(NamedTuple):
    """Rows of one request that are more than a decode step."""

    request: int
    """Row of the block table."""
    rows: slice
    """Of the batch's tokens."""
    seqlen: int
    """Tokens of the request with those of this step."""
    prompt_len: int
    """Of the whole prompt; ``seqlen`` where nobody knows."""

    @property
    def dense_rows(self) -> int:
        """Of the last rows, those that attend all keys also where the prompt is prefilled sparsely."""
        return dense_rows(self.rows.stop - self.rows.start, self.seqlen, self.prompt_len)


@dataclass
class DualChunkMetadata(AttentionMetadata):
    """Decode steps come first, one row each, then prefills."""

    num_rows: int
    """Rows with tokens; the batch may be padded beyond."""
    num_decodes: int
    positions: Tensor
    """int64 ``[num_rows]``."""
    rotations: Tensor
    """int64 ``[num_rows]``: positions modulo ``chunk_len``, which keys are rotated at."""
    slot_mapping: Tensor
    """int64 ``[num_rows]``; negative ones (padding, on a GPU) are skipped."""
    block_table: Tensor
    """int32 ``[num_reqs, max_blocks]``."""
    seqlens: Tensor
    """int32 ``[num_reqs]``, on the device."""
    scale_factors: Tensor | None
    """float32 ``[num_reqs]``: the squared temperature of decode steps; None if there is none."""
    prefills: list[Prefill]


class DualChunkMetadataBuilder(AttentionMetadataBuilder[DualChunkMetadata]):
    """Makes :class:`DualChunkMetadata`; decode steps are read from tensors of the device only.

    CUDA graphs are captured for batches of decode steps. All that their kernels read lies at fixed addresses: vLLM's
    own persistent tensors, and the two buffers here.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1
    supports_update_block_table: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        watch_runners()
        self._init_reorder_batch_threshold(1)
        self.dual_chunk = DualChunkConfig.from_dict(vllm_config.model_config.hf_text_config.dual_chunk_attention_config)
        scheduler = vllm_config.scheduler_config
        graph_sizes = getattr(vllm_config.compilation_config, "cudagraph_capture_sizes", None) or [0]
        rows = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, *graph_sizes)
        self._rotations = torch.zeros(rows, dtype=torch.int64, device=device)
        self._scale_factors = torch.ones(rows, dtype=torch.float32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DualChunkMetadata:
        """Metadata of a batch whose requests of one token come first."""
        common = common_attn_metadata
        num_decodes, _, num_decode_rows, _ = split_decodes_and_prefills(common, decode_threshold=1)
        num_rows = int(common.query_start_loc_cpu[-1])
        num_decodes = min(num_decodes, num_decode_rows, num_rows)
        prompts = prompt_lengths(common)
        rotations = self._rotations[:num_rows]
        torch.remainder(common.positions[:num_rows], self.dual_chunk.chunk_len, out=rotations)
        return DualChunkMetadata(
            num_rows=num_rows,
            num_decodes=num_decodes,
            positions=common.positions[:num_rows],
            rotations=rotations,
            slot_mapping=common.slot_mapping[:num_rows],
            block_table=common.block_table_tensor,
            seqlens=common.seq_lens,
            scale_factors=self._decode_scale_factors(common.seq_lens, prompts),
            prefills=self._prefills(common, num_decodes, prompts),
        )

    def _decode_scale_factors(self, seqlens: Tensor, prompts: Tensor | None) -> Tensor | None:
        original = self.dual_chunk.original_max_position_embeddings
        if original == 0:
            return None
        if prompts is not None:  # matters for the rows of a prompt that comes token by token
            seqlens = torch.maximum(seqlens, prompts.to(seqlens, non_blocking=True))
        factors = self._scale_factors[: seqlens.shape[0]]
        return factors.copy_(rope.dual_chunk_scale_factors(seqlens, original))

    def _prefills(self, common: Any, num_decodes: int, prompts: Tensor | None) -> list[Prefill]:
        if num_decodes == common.num_reqs:
            return []
        starts = common.query_start_loc_cpu.tolist()
        known = common.seq_lens_cpu_upper_bound  # exact for rows that are being prefilled
        seqlens = (common.seq_lens.cpu() if known is None else known).tolist()
        prompt_lens = seqlens if prompts is None else prompts.tolist()
        return [
            Prefill(i, slice(starts[i], starts[i + 1]), seqlens[i], prompt_lens[i])
            for i in range(num_decodes, common.num_reqs)
            if starts[i + 1] > starts[i]
        ]
