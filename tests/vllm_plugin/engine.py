"""What the tests of the vLLM plugin share: checkpoints, engines in processes of their own, our model's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qwen_sparse
from conftest import DUAL_CHUNK, TINY, budgets, random_tensors, save_tensors
from qwen_sparse.model.attention import CONTINUATION_ROWS

CONFIG: dict[str, Any] = {
    **TINY,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dual_chunk_attention_config": DUAL_CHUNK,
}
"""Two kv heads and two query heads for each, so that TP = 2 has something to share out; DCA chunks of 128 tokens."""

VOCAB = CONFIG["vocab_size"]
PREFILL_ROWS = 256  # tokens that a step of the engine takes: prompts come in pieces
JOB = Path(__file__).with_name("engine_job.py")


def write_model(directory: Path, *, seed: int = 0, sparse: Sequence[Any] | None = None, **overrides: Any) -> Path:
    """A checkpoint with random weights; None removes a key, ``sparse`` is sparse_attention_config.json."""
    directory.mkdir()
    config = {key: value for key, value in {**CONFIG, **overrides}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    save_tensors(directory, random_tensors(config, seed))
    if sparse is not None:
        (directory / "sparse_attention_config.json").write_text(json.dumps(sparse))
    return directory


def uneven_budgets(vertical: int, slash: int) -> list[dict[str, Any]]:
    """Every head and layer its own (V, S)."""
    layers = budgets(CONFIG, vertical, slash)
    for layer, heads in enumerate(layers):
        for head, entry in heads.items():
            entry[1] += 7 * int(head) + 3 * layer
            entry[2] += 11 * int(head) + 5 * layer
    return layers


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


@dataclass
class Step:
    """One call of ``generate``."""

    prompts: list[list[int]]
    max_tokens: int = 4


def environment(**changes: str) -> dict[str, str]:
    """Of a process that runs vLLM."""
    settings = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **settings, **changes}


def engine(model: Path, steps: Sequence[Step], *, may_fail: bool = False, **options: Any) -> dict[str, Any]:
    """What ``engine_job.py`` takes; ``options`` of ``vllm.LLM`` beside the common ones."""
    defaults = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_batched_tokens": PREFILL_ROWS,
        "block_size": 32,
        "max_logprobs": VOCAB,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    return {"options": {**defaults, **options}, "steps": [vars(step) for step in steps], "may_fail": may_fail}


def run_engines(engines: Sequence[dict[str, Any]], *, workers: int = 1, **env: str) -> list[dict[str, Any]]:
    """Results of ``engine_job.py``, one after another in a process with ``env``; several workers have their own."""
    directory = Path(engines[0]["options"]["model"])
    job_file, result = directory / "job.json", directory / "result.pt"
    job_file.write_text(json.dumps(list(engines)))
    several = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if workers > 1 else {}
    settings = environment(VLLM_ENABLE_V1_MULTIPROCESSING=str(int(workers > 1)), **several, **env)
    subprocess.run([sys.executable, str(JOB), str(job_file), str(result)], env=settings, check=True)  # pytest shows why
    loaded: list[dict[str, Any]] = torch.load(result)
    return loaded


def run_engine(model: Path, steps: Sequence[Step], *, workers: int = 1, **options: Any) -> dict[str, Any]:
    """:func:`run_engines` with one engine."""
    return run_engines([engine(model, steps, **options)], workers=workers)[0]


class Reference:
    """Our own model on the same checkpoint."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.model = qwen_sparse.load_model(directory, **options)

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], output: list[int], rows: int = PREFILL_ROWS) -> Tensor:
        """Of every token behind the first: ``[len(prompt) - 1 + len(output), vocab]``; prefilled ``rows`` at a time.

        Pieces that vLLM's plugin attends densely are dense: one row, a decode step to vLLM, and up to 512 that end a
        prompt behind others.
        """
        model, cache = self.model, self.model.new_cache()
        sparse = model.prefills_sparse(len(prompt))

        def run(ids: list[int], sparse: bool) -> Tensor:
            logits = model.forward(torch.tensor(ids), cache, prompt_len=len(prompt), sparse=sparse, output="all")
            assert logits is not None
            return logits

        pieces = []
        for begin in range(0, len(prompt), rows):
            piece = prompt[begin : begin + rows]
            ends = begin > 0 and begin + rows >= len(prompt) and len(piece) <= CONTINUATION_ROWS
            pieces.append(run(piece, sparse and len(piece) > 1 and not ends))
        pieces += [run([token], False) for token in output[:-1]]
        return torch.cat(pieces).log_softmax(-1)


def worst(request: dict[str, Any], expected: Tensor) -> float:
    """The largest difference between the log-probabilities of a request and our model's."""
    got = request["logprobs"]
    if request["prompt_logprobs"] is not None:
        got = torch.cat((request["prompt_logprobs"], got))
    return float((got - expected[-len(got) :]).abs().max())
