"""What fits where: the memory that models take by length and bits, from the formula of ``estimate_memory``.

    python bench/memory_table.py --output bench/results/memory.json

Sizes are those of the released config.json files. Nothing is measured: tests/test_memory.py compares the formula with
what is really allocated.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from qwen_sparse import estimate_memory
from qwen_sparse.base.resources import format_bytes
from qwen_sparse.model.config import ModelConfig
from report import add_output_argument, finish, print_table

DUAL_CHUNK = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "head_dim": 128,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1010000,
    "rope_theta": 1e7,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "dual_chunk_attention_config": DUAL_CHUNK,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B-1M": {
        **QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen2.5-14B-1M": {
        **QWEN2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B-2507": {
        **QWEN2,
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
LENGTHS = {"128K": 2**17, "1M": 2**20}
COVERAGE = 0.87


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_argument(parser)
    arguments = parser.parse_args()
    rows = []
    for (name, raw), quantization, cache in itertools.product(MODELS.items(), (None, "int8"), ("bfloat16", "int8")):
        config = ModelConfig.from_dict(raw).with_coverage(COVERAGE)
        for length, seqlen in LENGTHS.items():
            # chunks of a GPU's size: what a CPU widens on the way depends on the machine
            estimate = estimate_memory(
                config, seqlen, kv_cache_dtype=cache, quantization=quantization, device="cuda", chunk_tokens=32768
            )
            parts = {part: getattr(estimate, part) for part in ("weights", "kv_cache", "total")}
            weights = quantization or "bfloat16"
            rows.append({"model": name, "weights_dtype": weights, "kv_cache_dtype": cache, "length": length, **parts})
    columns = ["model", "weights_dtype", "kv_cache_dtype", "length"]
    sizes = ["weights", "kv_cache", "total"]
    print_table(
        [*columns, *sizes],
        [[*(str(row[name]) for name in columns), *(format_bytes(row[name]) for name in sizes)] for row in rows],
    )
    finish("memory", arguments, rows)


if __name__ == "__main__":
    main()
