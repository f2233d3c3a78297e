"""Draws what sparse prefill keeps of a released model, from the JSON of bench_released.py.

    python bench/plot_released.py bench/results/released_cpu.json --output bench/results/released_cpu.png

A panel per part, text and length: KL against dense attention, or facts found, by density, a line per method.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

STYLES = {
    "groups": ("block groups", "#D55E00", "o"),
    "vertical-slash": ("vertical-slash (V / S of every head)", "#0072B2", "s"),
}
"""Title, colour (Okabe and Ito) and marker."""
PARTS = {"tail": ("kl", "KL to dense attention, nats per token"), "probes": ("found", "facts found")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of bench_released.py")
    parser.add_argument("--parts", nargs="+", default=["tail"], choices=list(PARTS))
    parser.add_argument("--columns", type=int, default=2, help="panels beside each other")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    arguments = parser.parse_args()
    panels: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for path in arguments.results:
        for row in json.loads(path.read_text())["rows"]:
            if row["part"] in arguments.parts:
                panels.setdefault((row["part"], row["length"], row["text"]), []).append(row)
    if not panels:
        raise SystemExit(f"plot_released: no rows of {', '.join(arguments.parts)} in the files given")
    columns = min(arguments.columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (key, rows) in zip(grid.flat, sorted(panels.items()), strict=False):
        draw(axes, *key, rows)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(arguments.output, dpi=150)


def draw(axes: Axes, part: str, length: int, text: str, rows: list[dict[str, Any]]) -> None:
    value, label = PARTS[part]
    for family, (title, colour, marker) in STYLES.items():
        points = sorted((row for row in rows if row["method"].startswith(family)), key=lambda row: row["density"])
        if not points:
            continue
        x, y = [row["density"] for row in points], [row[value] for row in points]
        axes.plot(x, y, color=colour, marker=marker, label=title)
        for row in points:
            name = row["method"].partition(":")[2].replace(":", " / ")
            axes.annotate(
                name, (row["density"], row[value]), (4, 4), textcoords="offset points", fontsize=7, color=colour
            )
    if part == "tail":
        axes.set_yscale("log")
    else:
        dense = next((row["found"] for row in rows if row["method"] == "dense"), None)
        if dense is not None:
            axes.axhline(dense, color="#595959", linestyle="--", label="dense")
        axes.set_ylim(0, max(row["questions"] for row in rows) + 0.5)
    axes.set_xscale("log")
    ticks = [
        t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1) if t < 1.6 * max(row["density"] for row in rows if row["density"] < 1)
    ]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("causal pairs attended")
    axes.set_ylabel(label)
    axes.set_title(f"{text}, {length:,} tokens", fontsize=10)
    axes.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    main()
