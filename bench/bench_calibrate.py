"""Budgets of the shipped passkey model, those in its directory beside calibrated ones: recall, density, retrieval.

    python bench/bench_calibrate.py --output bench/results/calibrate_cpu.json

Each threshold is calibrated as `qwen-sparse calibrate --synthetic --length ...` does, on one prompt. All budgets are
then measured in two ways: recall and attended pairs of every head on another prompt of that length (dense hidden
states), and passkeys found in sparse prefills.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_sparse.calibrate import Calibration, calibrate, measure_budgets, synthetic_tokens
from qwen_sparse.demo import DEPTHS, TRAINED_LENGTH, accuracy, accuracy_grid, load_passkey_model
from qwen_sparse.model.config import SparseConfig
from qwen_sparse.model.decoder import Decoder
from report import add_device_argument, add_output_argument, finish, print_table

FILLERS = ("grass", "sentences", "source")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens of the prompts that budgets are found on")
    parser.add_argument("--recalls", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--pairs", type=int, nargs="+", default=[30, 110, 256, 110, 512, 110], help="V S V S ...")
    parser.add_argument("--step", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32], help="of passkeys, in trained lengths")
    parser.add_argument("--samples", type=int, default=2, help="prompts per length, depth and filler")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the calibration prompt; others are measured with seed + 1"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_passkey_model(arguments.dtype, arguments.device)
    if model.config.sparse is None:
        raise ValueError("the passkey model must have budgets, got none")
    candidates: dict[str, SparseConfig] = {"asset": model.config.sparse}
    prompt = synthetic_tokens(model, arguments.length, arguments.seed)
    for recall in arguments.recalls:
        candidates[f"recall {recall:g}"] = calibrated(model, prompt, recall, arguments)
    other = synthetic_tokens(model, arguments.length, arguments.seed + 1)
    rows = [measured(model, name, sparse, other, arguments) for name, sparse in candidates.items()]
    print_table(
        ["budgets", "recall", "lowest", "density", *(f"{n}x found" for n in arguments.lengths)],
        [
            [
                row["budgets"],
                f"{row['recall']:.3f}",
                f"{row['lowest_recall']:.3f}",
                f"{row['density']:.1%}",
                *(f"{cell['accuracy']:.1%} at {cell['density']:.1%}" for cell in row["passkeys"]),
            ]
            for row in rows
        ],
    )
    finish("calibrate", arguments, rows)


def calibrated(model: Decoder, prompt: list[int], recall: float, arguments: argparse.Namespace) -> SparseConfig:
    pairs = list(zip(arguments.pairs[::2], arguments.pairs[1::2], strict=True))
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "sparse_attention_config.json"
        result = calibrate(model, prompt, output, recall=recall, pairs=pairs, step=arguments.step, progress=True)
    return SparseConfig.from_budgets(
        result.budgets(), num_layers=model.config.num_layers, num_heads=model.config.num_heads
    )


def measured(
    model: Decoder, name: str, sparse: SparseConfig, prompt: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    found: Calibration = measure_budgets(model, prompt, sparse)
    heads = [head for layer in found.layers for head in layer]
    server = model.with_options(config=replace(model.config, sparse=sparse))
    passkeys = []
    for length in arguments.lengths:
        results = [
            result
            for filler in FILLERS
            for result in accuracy_grid(
                server, "dca+sparse", [length], DEPTHS, arguments.samples, seed=1000, filler=filler
            )
        ]
        passkeys.append(
            {
                "bytes": length * TRAINED_LENGTH,
                "prompts": len(results),
                "accuracy": accuracy(results),
                "density": sum(result.density for result in results) / len(results),
            }
        )
    return {
        "budgets": name,
        "tokens": len(prompt),
        "sizes": [[[head.vertical, head.slash] for head in layer] for layer in found.layers],
        "recall_by_head": [[head.recall for head in layer] for layer in found.layers],
        "density_by_head": [[head.attended / found.causal_pairs for head in layer] for layer in found.layers],
        "recall": found.recall,
        "lowest_recall": min(head.recall for head in heads),
        "density": found.density,
        "passkeys": passkeys,
    }


if __name__ == "__main__":
    main()
