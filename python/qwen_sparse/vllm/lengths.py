"""Lengths of the prompts in a batch, which vLLM's attention metadata does not carry.

The temperature of Dual Chunk Attention and the threshold of sparse attention follow the whole prompt, also while its
first chunk is computed. The model runner knows: this module notes which one is executing a model.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["prompt_lengths", "watch_runners"]

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")  # CPU runners derive from them
_running: list[Any] = []


def watch_runners() -> None:
    """Wrap ``execute_model`` of the model runners that this process has imported; more than one call is harmless."""
    for name in _RUNNERS:
        runner = getattr(sys.modules.get(name), "GPUModelRunner", None)
        original = getattr(runner, "execute_model", None)
        if runner is None or original is None or getattr(original, "qwen_sparse", False):
            continue
        runner.execute_model = _noting(original)


def _noting(original: Any) -> Any:
    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        _running.append(self)
        try:
            return original(self, *args, **kwargs)
        finally:
            _running.pop()

    execute_model.qwen_sparse = True  # type: ignore[attr-defined]
    return execute_model


def prompt_lengths(common: Any) -> Tensor | None:
    """Prompt lengths of the rows of a ``CommonAttentionMetadata``, integers ``[num_reqs]`` on the CPU.

    None where no request is behind the batch (profiling, capture of CUDA graphs). Rows that pad a batch hold anything.
    """
    if not _running:
        return None
    runner, num_reqs = _running[-1], common.num_reqs
    batch = getattr(runner, "input_batch", None)
    if batch is not None and hasattr(batch, "num_prompt_tokens"):
        return torch.from_numpy(batch.num_prompt_tokens[:num_reqs].copy())
    rows = getattr(common, "req_idx", None)
    states = getattr(runner, "req_states", None)
    if rows is None or states is None:
        return None
    lengths = torch.zeros(num_reqs, dtype=torch.int64)
    lengths[: len(rows)] = torch.from_numpy(states.prompt_len.np[rows]).long()
    return lengths
