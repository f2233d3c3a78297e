"""Runs vLLM engines one after another in this process, for test_engine.py: ``python engine_job.py JOB.json RESULT.pt``.

The job is a list of engines. Each has ``options`` of ``vllm.LLM``, ``steps``, a list of
``{"prompts": [[token ids]], "max_tokens": n}`` (one call of ``generate`` each), and ``may_fail``. The result has for
each engine ``steps``, lists of requests with ``tokens``, ``logprobs [n, vocab]`` of what was generated,
``prompt_logprobs [prompt - 1, vocab]`` unless prefix caching is on, and ``num_cached_tokens``; ``batches``, those that
the plugin saw, as (decode steps, [(rows, seqlen, prompt_len)]); ``backends`` of all layers. The last two are known only
of an engine that runs in this process, not with several workers. An engine that fails ends the process unless it may:
then its result is ``{"error": text}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    batches = record_batches()
    results = []
    for job in json.loads(job_file.read_text()):
        try:
            results.append({**run(job, batches), "batches": list(batches)})
        except Exception as error:
            if not job["may_fail"]:
                raise
            results.append({"error": f"{type(error).__name__}: {error}"})
        batches.clear()
        cleanup_dist_env_and_memory()
    torch.save(results, result_file)


def run(job: dict[str, Any], batches: list[Any]) -> dict[str, Any]:
    import vllm

    options = {"skip_tokenizer_init": True, **job["options"]}
    llm = vllm.LLM(**options)
    vocab = llm.model_config.get_vocab_size()
    caching = options.get("enable_prefix_caching", True)
    steps = []
    for step in job["steps"]:
        sampling = vllm.SamplingParams(
            max_tokens=step["max_tokens"],
            temperature=0,
            logprobs=vocab,
            prompt_logprobs=None if caching else vocab,
            detokenize=False,
            ignore_eos=True,
        )
        batches.append("step")
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in step["prompts"]], sampling, use_tqdm=False)
        steps.append([request(output, vocab) for output in outputs])
    return {"steps": steps, "backends": backends(llm)}


def request(output: Any, vocab: int) -> dict[str, Any]:
    def table(rows: list[dict[int, Any]]) -> torch.Tensor:
        return torch.tensor([[row[token].logprob for token in range(vocab)] for row in rows])

    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": table(completion.logprobs),
        "prompt_logprobs": table(output.prompt_logprobs[1:]) if output.prompt_logprobs else None,
        "num_cached_tokens": output.num_cached_tokens,
    }


def record_batches() -> list[Any]:
    from qwen_sparse.vllm.metadata import DualChunkMetadataBuilder

    batches: list[Any] = []
    original = DualChunkMetadataBuilder.build

    def build(self: Any, *arguments: Any, **named: Any) -> Any:
        batch = original(self, *arguments, **named)
        prefills = [(each.rows.stop - each.rows.start, each.seqlen, each.prompt_len) for each in batch.prefills]
        batches.append((batch.num_decodes, prefills))
        return batch

    DualChunkMetadataBuilder.build = build
    return batches


def backends(llm: Any) -> list[str]:
    try:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    except AttributeError:
        return []
    from vllm.model_executor.layers.attention import Attention

    return [module.backend.name for module in model.modules() if isinstance(module, Attention)]


if __name__ == "__main__":
    main()
