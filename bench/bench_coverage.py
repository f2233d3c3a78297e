"""Fixed budgets beside index sets chosen by coverage, on the shipped passkey model, from too little to plenty.

    python bench/bench_coverage.py --output bench/results/coverage_cpu.json

Every row runs the same prompts and text; density is what attention counted, so rows of equal density compare the two
ways. Prompts: the passkey's usual wording, and a harder kind, which states the key once and holds a second number of
another name. Dense attention is the most that a row could reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_sparse.calibrate import measure_budgets, synthetic_tokens
from qwen_sparse.config import SparseConfig
from qwen_sparse.demo import DEPTHS, TRAINED_LENGTH, accuracy, accuracy_grid, load_passkey_model
from qwen_sparse.evaluate import Mode, evaluate_perplexity
from qwen_sparse.models.qwen2 import Qwen2Model
from qwen_sparse.passkey import FILLERS, held_out_source
from report import RESULTS, add_device_argument, add_output_argument, finish, print_table

PROMPTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "harder": {"wording": "short", "second_label": "door code"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32], help="in trained lengths")
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[30, 100, 48, 100, 64, 100, 96, 100, 128, 100, 256, 100, 512, 110],
        help="columns and distances of every head: V S V S ...",
    )
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
    parser.add_argument(
        "--calibrated", type=Path, default=RESULTS / "calibrate_cpu.json", help="budgets by head of bench_calibrate.py"
    )
    parser.add_argument("--samples", type=int, default=2, help="prompts per length, filler and depth, of each kind")
    parser.add_argument("--windows", type=int, default=8, help="windows of 256 tokens that perplexity is of")
    parser.add_argument("--seed", type=int, default=1000)
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_passkey_model("float32", arguments.device)
    rows = []
    for length in arguments.lengths:
        for name, runner, mode in candidates(model, arguments):
            rows.append({"index_sets": name, **measured(runner, mode, length * TRAINED_LENGTH, arguments)})
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "wrong"}), flush=True)
    print_table(
        [
            "bytes",
            "index sets",
            *(f"{kind} found" for kind in PROMPTS),
            "density",
            "recall",
            "density",
            "ppl",
            "density",
        ],
        [
            [
                f"{row['bytes']:,}",
                row["index_sets"],
                *(f"{row['found'][kind]} of {row['prompts']}" for kind in PROMPTS),
                f"{row['density']:.2%}",
                f"{row['recall']:.3f}",
                f"{row['recall_density']:.2%}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity_density']:.2%}",
            ]
            for row in rows
        ],
    )
    finish("coverage", arguments, rows)


def candidates(model: Qwen2Model, arguments: argparse.Namespace) -> Iterator[tuple[str, Qwen2Model, str]]:
    """Name, model and mode of every row."""
    sparse, config = model.config.sparse, model.config
    if sparse is None:
        raise ValueError("the passkey model must have budgets, got none")

    def budgeted(vertical: Any, slash: Any) -> Qwen2Model:
        return model.with_options(
            config=replace(config, sparse=replace(sparse, vertical_sizes=vertical, slash_sizes=slash))
        )

    yield "dense", model, "dca"
    for vertical, slash in zip(arguments.budgets[::2], arguments.budgets[1::2], strict=True):
        every = [((size,) * config.num_heads,) * config.num_layers for size in (vertical, slash)]
        yield f"fixed {vertical}/{slash}", budgeted(*every), "dca+sparse"
    for row in json.loads(arguments.calibrated.read_text())["rows"]:
        if row["budgets"].startswith("recall"):
            by_head = [tuple(tuple(pair[part] for pair in layer) for layer in row["sizes"]) for part in (0, 1)]
            yield f"calibrated, {row['budgets']}", budgeted(*by_head), "dca+sparse"
    for coverage in arguments.coverages:
        yield f"coverage {coverage:g}", model, f"dca+coverage{coverage}"


def measured(model: Qwen2Model, mode: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    results = {
        kind: [
            result
            for filler in FILLERS
            for result in accuracy_grid(
                model,
                mode,
                [length // TRAINED_LENGTH],
                DEPTHS,
                arguments.samples,
                seed=arguments.seed,
                filler=filler,
                **options,
            )
        ]
        for kind, options in PROMPTS.items()
    }
    every = [result for found in results.values() for result in found]
    (text,) = evaluate_perplexity(model, held_out_source(), [mode], [length], samples=arguments.windows)
    sparse: SparseConfig | None = Mode.parse(mode).apply(model).config.sparse
    recall, recall_density = 1.0, 1.0
    if mode != "dca" and sparse is not None:
        kept = measure_budgets(model, synthetic_tokens(model, length, arguments.seed), sparse)
        recall, recall_density = kept.recall, kept.density
    return {
        "bytes": length,
        "prompts": len(results["usual"]),
        "found": {kind: sum(result.correct for result in found) for kind, found in results.items()},
        "accuracy": accuracy(every),
        "density": sum(result.density for result in every) / len(every),
        "recall": recall,
        "recall_density": recall_density,
        "perplexity": text["perplexity"],
        "perplexity_density": text["density"],
        "wrong": [[result.depth, result.key, result.answer] for result in every if not result.correct],
    }


if __name__ == "__main__":
    main()
