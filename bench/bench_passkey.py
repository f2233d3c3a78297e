"""Passkey retrieval of the shipped model over depth and length, with plain RoPE, DCA and DCA + vertical-slash.

    python bench/bench_passkey.py --output bench/results/passkey_cpu.json
    python bench/bench_passkey.py --variants all --modes dca+sparse --lengths 1 8 64 \\
        --output bench/results/passkey_variants_cpu.json

Every cell is exact match, greedy, on evaluation keys that training never saw.
"""

from __future__ import annotations

import argparse
from typing import Any

from qwen_sparse.demo import DEPTHS, MODES, TRAINED_LENGTH, accuracy, accuracy_grid, load_passkey_model
from report import add_device_argument, add_output_argument, finish, print_table

VARIANTS: dict[str, dict[str, Any]] = {
    "grass": {},
    "sentences": {"filler": "sentences"},
    "source": {"filler": "source"},
    "short wording": {"wording": "short"},
    "magic number": {"label": "special magic number"},
    "4 digits": {"digits": 4},
    "7 digits": {"digits": 7},
    "second needle": {"second_label": "door code"},
    "second needle asked": {"label": "door code", "second_label": "pass key"},
}
"""Prompts by name, as options of make_prompt; the first is the well-known one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4, 16, 32, 64], help="in trained lengths")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--variants", nargs="+", default=["grass"], choices=[*VARIANTS, "all"])
    parser.add_argument("--samples", type=int, default=4, help="prompts per length and depth")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_passkey_model(arguments.dtype, arguments.device)
    rows = []
    variants = list(VARIANTS) if "all" in arguments.variants else arguments.variants
    cells = [
        (variant, mode, length) for variant in variants for mode in arguments.modes for length in arguments.lengths
    ]
    for variant, mode, length in cells:
        results = accuracy_grid(
            model, mode, [length], DEPTHS, arguments.samples, seed=arguments.seed, **VARIANTS[variant]
        )
        rows.append(
            {
                "variant": variant,
                "mode": mode,
                "length": length,
                "bytes": length * TRAINED_LENGTH,
                "prompts": len(results),
                "accuracy": accuracy(results),
                "accuracy_by_depth": {d: accuracy([r for r in results if r.depth == d]) for d in DEPTHS},
                "density": sum(r.density for r in results) / len(results),
                "ttft_seconds_mean": sum(r.ttft for r in results) / len(results),
                "wrong": [[r.depth, r.key, r.answer] for r in results if not r.correct][:5],
            }
        )
    print_table(
        [
            "prompt",
            "mode",
            "length",
            "bytes",
            "prompts",
            "accuracy",
            *(f"depth {d:.0%}" for d in DEPTHS),
            "density",
            "TTFT",
        ],
        [
            [
                row["variant"],
                MODES[row["mode"]],
                f"{row['length']}x",
                f"{row['bytes']:,}",
                str(row["prompts"]),
                f"{row['accuracy']:.1%}",
                *(f"{value:.0%}" for value in row["accuracy_by_depth"].values()),
                f"{row['density']:.1%}",
                f"{row['ttft_seconds_mean']:.2f} s",
            ]
            for row in rows
        ],
    )
    finish("passkey", arguments, rows)


if __name__ == "__main__":
    main()
