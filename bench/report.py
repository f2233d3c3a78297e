"""What all benchmarks print: a table for people, then one JSON line for machines; and the file that keeps it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_sparse.testing import machine

RESULTS = Path(__file__).parent / "results"


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="also write the JSON here (committed ones are in bench/results)")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def finish(benchmark: str, arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print the JSON line and write it to ``--output``."""
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    record = {"benchmark": benchmark, "machine": machine(), "options": options, "rows": list(rows)}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
