"""Perplexity per byte of the shipped model on held-out Python source, with plain RoPE, DCA and DCA + vertical-slash.

    python bench/bench_perplexity.py --output bench/results/perplexity_cpu.json

The source is the part of the Python standard library that training never saw, so the figures belong to one Python
version, which is printed. Windows do not overlap; every byte but a window's first is predicted, so that a figure is
the mean over all contexts up to the window. ``qwen-sparse eval perplexity`` predicts the same bytes behind each.
"""

from __future__ import annotations

import argparse
import math
import platform

import torch.nn.functional as F

from qwen_sparse.demo import MODES, TRAINED_LENGTH, load_passkey_model
from qwen_sparse.engine.prefill import prefill
from qwen_sparse.evaluate import Mode
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.passkey import held_out_source
from report import add_output_argument, finish, print_table


def perplexity(model: Decoder, text: str, window: int) -> tuple[float, int]:
    """Perplexity per byte over whole windows, and how many bytes were predicted."""
    tokens = model.tokenizer.encode(text)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - window + 1, window):
        result = prefill(model, tokens[start : start + window], logits="all")
        targets = result.logits.new_tensor(tokens[start + 1 : start + window]).long()
        total += float(F.cross_entropy(result.logits[:-1], targets, reduction="sum"))
        count += window - 1
    return math.exp(total / count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 4, 16, 64], help="in trained lengths")
    parser.add_argument("--bytes", type=int, default=2**17, help="of held-out source to read at every length")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_passkey_model()
    text = held_out_source()[: arguments.bytes]
    rows = []
    for mode in arguments.modes:
        for length in arguments.lengths:
            value, count = perplexity(Mode.parse(mode).apply(model), text, length * TRAINED_LENGTH)
            row = {"mode": mode, "length": length, "bytes": length * TRAINED_LENGTH, "predicted": count}
            rows.append({**row, "perplexity": value, "python": platform.python_version()})
    print_table(
        ["mode", "length", "window", "predicted bytes", "perplexity"],
        [
            [
                MODES[row["mode"]],
                f"{row['length']}x",
                f"{row['bytes']:,}",
                f"{row['predicted']:,}",
                f"{row['perplexity']:.3f}",
            ]
            for row in rows
        ],
    )
    finish("perplexity", arguments, rows)


if __name__ == "__main__":
    main()
