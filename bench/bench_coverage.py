"""Passkey retrieval of the shipped model with index sets chosen by coverage, beside its fixed budgets.

    python bench/bench_coverage.py --output bench/results/coverage_cpu.json

Same prompts for every row; density is what attention counted, so rows of equal density compare the two ways.
"""

from __future__ import annotations

import argparse

from qwen_sparse.demo import DEPTHS, TRAINED_LENGTH, accuracy, accuracy_grid, load_passkey_model
from report import add_device_argument, add_output_argument, finish, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32, 64], help="in trained lengths")
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--samples", type=int, default=2, help="prompts per length and depth")
    parser.add_argument("--seed", type=int, default=1000)
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_passkey_model("float32", arguments.device)
    rows = []
    for coverage in (None, *arguments.coverages):
        runner = model if coverage is None else model.with_options(coverage=coverage)
        for length in arguments.lengths:
            results = accuracy_grid(runner, "dca+sparse", [length], DEPTHS, arguments.samples, seed=arguments.seed)
            rows.append(
                {
                    "coverage": coverage,
                    "length": length,
                    "bytes": length * TRAINED_LENGTH,
                    "prompts": len(results),
                    "accuracy": accuracy(results),
                    "density": sum(result.density for result in results) / len(results),
                    "wrong": [[result.depth, result.key, result.answer] for result in results if not result.correct],
                }
            )
    print_table(
        ["index sets", "length", "bytes", "prompts", "accuracy", "density"],
        [
            [
                "fixed budgets" if row["coverage"] is None else f"coverage {row['coverage']:.0%}",
                f"{row['length']}x",
                f"{row['bytes']:,}",
                str(row["prompts"]),
                f"{row['accuracy']:.0%}",
                f"{row['density']:.1%}",
            ]
            for row in rows
        ],
    )
    finish("coverage", arguments, rows)


if __name__ == "__main__":
    main()
