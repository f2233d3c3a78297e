"""Time to first token of vLLM with the plugin (dense, vertical-slash) and without, on the same weights.

    python bench/bench_vllm.py --vllm-python build/vllm/env/bin/python --shape 0.5b --layers 8 --seqlens 16384 65536 \\
        --repeats 3 1 --output bench/results/vllm_cpu.json

Three checkpoints share one file of random bf16 weights: without the key dual_chunk_attention_config (vLLM's own
attention, which the plugin leaves alone), with it, and with it and budgets for every head. vLLM runs in its own
environment, which must have this package too (make test-vllm makes one), one process per checkpoint, one after
another: leave the machine alone meanwhile. Settings are those of bench/peers/README.md.

Random weights have no attention structure: selection runs and chooses as many columns and diagonals as the budgets say,
but which ones, and so how many keys they cover, says nothing about a trained model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from checkpoint import SHAPES, write_checkpoint
from report import add_output_argument, finish, print_environment, print_table

TTFT = Path(__file__).parent / "peers" / "vllm_ttft.py"
WITHOUT, DENSE, SPARSE = "vLLM without the plugin", "plugin, dense", "plugin, vertical-slash"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="interpreter with vLLM and qwen_sparse")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--repeats", type=int, nargs="+", default=[3, 1], help="per length, or one for all")
    parser.add_argument("--chunk-size", type=int, default=262144, help="of the 1M models, as the next two")
    parser.add_argument("--local-size", type=int, default=8192)
    parser.add_argument("--original-length", type=int, default=262144)
    parser.add_argument("--budget", type=int, nargs=2, default=[500, 700], metavar=("V", "S"), help="of every head")
    parser.add_argument("--kv-cache-gib", type=int, default=4, help="VLLM_CPU_KVCACHE_SPACE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="keep checkpoints here; a temporary directory by default")
    add_output_argument(parser)
    return parser.parse_args()


def write_checkpoints(arguments: argparse.Namespace, workdir: Path) -> dict[str, Path]:
    """The three checkpoints; the last two link to the weights of the first."""
    plain = write_checkpoint(workdir, arguments.shape, arguments.layers, max(arguments.seqlens), arguments.seed)
    config = json.loads((plain / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": arguments.chunk_size,
        "local_size": arguments.local_size,
        "original_max_position_embeddings": arguments.original_length,
        "sparse_attention_threshold": 0,
    }
    vertical, slash = arguments.budget
    head = ["vertical_and_slash", vertical, slash, 1.0]
    budgets = [dict.fromkeys(map(str, range(config["num_attention_heads"])), head)] * config["num_hidden_layers"]
    checkpoints = {WITHOUT: plain}
    for name, suffix in ((DENSE, "dca"), (SPARSE, "dca-sparse")):
        directory = checkpoints[name] = Path(f"{plain}-{suffix}")
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        weights = directory / "model.safetensors"
        weights.unlink(missing_ok=True)
        weights.symlink_to(plain.resolve() / "model.safetensors")
        if name == SPARSE:
            (directory / "sparse_attention_config.json").write_text(json.dumps(budgets))
    return checkpoints


def measure(arguments: argparse.Namespace, name: str, model: Path, prompts: Path) -> list[dict[str, Any]]:
    """Rows of one engine."""
    settings = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(arguments.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [str(arguments.vllm_python), str(TTFT), "--model", str(model), "--prompts", str(prompts), "--repeats"]
    command += map(str, arguments.repeats)
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    record = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        {
            "engine": f"{record['engine']} {record['version']}",
            "attention": name,
            "seqlen": row["seqlen"],
            "seconds": statistics.median(row["samples"]),
            "samples": row["samples"],
            "first_token": row["first_token"],
        }
        for row in record["rows"]
    ]


def main() -> None:
    arguments = parse_arguments()
    print_environment()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = arguments.workdir or Path(temporary)
        checkpoints = write_checkpoints(arguments, workdir)
        vocab = SHAPES[arguments.shape].get("vocab_size", 151643)
        generator = torch.Generator().manual_seed(arguments.seed)
        lengths = {str(n): torch.randint(1, vocab, (n,), generator=generator).tolist() for n in arguments.seqlens}
        prompts = Path(temporary) / "prompts.json"
        prompts.write_text(json.dumps(lengths))
        rows = [row for name, model in checkpoints.items() for row in measure(arguments, name, model, prompts)]
    baseline = {row["seqlen"]: row["seconds"] for row in rows if row["attention"] == WITHOUT}
    for row in rows:
        row["speedup"] = baseline[row["seqlen"]] / row["seconds"]
    cells = [
        [row["attention"], f"{row['seqlen']:,}", f"{row['seconds']:.2f} s", f"{row['speedup']:.2f} x"] for row in rows
    ]
    print_table(["attention", "tokens", "first token", "against without"], cells)
    finish("vllm", arguments, rows)


if __name__ == "__main__":
    main()
