"""Time to first token of OpenVINO GenAI, run by bench_prefill.py with the interpreter of OpenVINO's own environment.

    python openvino_ttft.py --model DIRECTORY --prompts prompts.json --repeats 3 --modes dense xattention

Converts the checkpoint first (16-bit weights, no compression), beside it, once. The prompts file maps a length to token
ids. The last line is JSON: version, options and one row per mode and length.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import openvino
import openvino_genai


def convert(model: Path) -> Path:
    """The checkpoint as OpenVINO's representation; bf16 weights stay bf16."""
    output = model.with_name(model.name + "-openvino")
    weights = model / "model.safetensors"
    done = output / "openvino_model.bin"
    if not done.is_file() or done.stat().st_mtime < weights.stat().st_mtime:
        from optimum.exporters.openvino import main_export

        # Without a config of its own, the export compresses the weights of large models to int8.
        from optimum.intel import OVConfig

        main_export(str(model), output=output, task="text-generation-with-past", ov_config=OVConfig(dtype="bf16"))
    return output


def scheduler(arguments: argparse.Namespace, mode: str) -> Any:
    config = openvino_genai.SchedulerConfig()
    config.max_num_batched_tokens = arguments.batched_tokens
    config.enable_prefix_caching = False
    if mode != "dense":
        config.use_sparse_attention = True
        sparse = openvino_genai.SparseAttentionConfig()
        sparse.mode = getattr(openvino_genai.SparseAttentionMode, mode.upper())
        sparse.xattention_threshold = arguments.xattention_threshold
        sparse.xattention_block_size = arguments.xattention_block_size
        config.sparse_attention_config = sparse
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON object: length to token ids")
    parser.add_argument("--repeats", type=int, nargs="+", default=[3], help="per length, in the file's order, or one")
    parser.add_argument("--modes", nargs="+", default=["dense"], choices=["dense", "xattention", "trishape"])
    parser.add_argument("--batched-tokens", type=int, default=4096, help="tokens of a prefill step")
    parser.add_argument("--kv-precision", default="bf16", help="of the KV cache: bf16, u8, ...")
    parser.add_argument("--xattention-threshold", type=float, default=0.8, help="share of the importance to keep")
    parser.add_argument("--xattention-block-size", type=int, default=64, help="tokens of an attention block")
    arguments = parser.parse_args()
    prompts = json.loads(arguments.prompts.read_text())
    repeats = arguments.repeats * len(prompts) if len(arguments.repeats) == 1 else arguments.repeats
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": arguments.kv_precision}
    converted = convert(arguments.model)

    rows = []
    for mode in arguments.modes:
        pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(converted), scheduler(arguments, mode), "CPU", properties
        )
        generation = openvino_genai.GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)

        def first_token(tokens: list[int], pipeline: Any = pipeline, generation: Any = generation) -> int:
            results = pipeline.generate([openvino.Tensor([tokens])], [generation])
            return int(results[0].m_generation_ids[0][0])

        first_token(next(iter(prompts.values()))[:512])
        for tokens, count in zip(prompts.values(), repeats, strict=True):
            samples, token = [], 0
            for _ in range(count):
                began = time.perf_counter()
                token = first_token(tokens)
                samples.append(time.perf_counter() - began)
            rows.append({"attention": mode, "seqlen": len(tokens), "samples": samples, "first_token": token})
        del pipeline, first_token
    options = {key: value for key, value in vars(arguments).items() if key not in ("model", "prompts", "repeats")}
    options |= properties
    version = openvino_genai.__version__
    print(json.dumps({"engine": "OpenVINO GenAI", "version": version, "options": options, "rows": rows}))


if __name__ == "__main__":
    main()
