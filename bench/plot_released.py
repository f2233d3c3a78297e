"""Draws what sparse prefill keeps of a released model, from the JSON of bench_released.py.

    python bench/plot_released.py bench/results/released_cpu.json --output bench/results/released_cpu.png

A panel per part, text and length: KL against dense attention, or facts found, by density, a line per method. With
--by length instead two panels per text, density and KL of block groups by length, a line per coverage.
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
LINES = {"groups:0.95": "#0072B2", "groups:0.87": "#D55E00", "groups:0.8": "#009E73"}
"""Colour by coverage."""
PARTS = {"tail": ("kl", "KL to dense attention, nats per token"), "probes": ("found", "facts found")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of bench_released.py")
    parser.add_argument("--parts", nargs="+", default=["tail"], choices=list(PARTS))
    parser.add_argument("--by", default="density", choices=["density", "length"])
    parser.add_argument("--columns", type=int, default=2, help="panels beside each other")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    arguments = parser.parse_args()
    if arguments.by == "length":
        return by_length([row for path in arguments.results for row in json.loads(path.read_text())["rows"]], arguments)
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


def by_length(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Panels of density and KL."""
    rows = [row for row in rows if row["part"] == "tail" and row["method"].startswith("groups:")]
    texts = [t for t in sorted({row["text"] for row in rows}) if len({r["length"] for r in rows if r["text"] == t}) > 1]
    if not texts:
        raise SystemExit("plot_released: no text has rows of block groups at two lengths in the files given")
    figure, grid = plt.subplots(len(texts), 2, figsize=(9.2, 3.2 * len(texts)), squeeze=False, layout="constrained")
    for line, text in zip(grid, texts, strict=True):
        for axes, value, label in zip(
            line, ("density", "kl"), ("causal pairs attended", "KL to dense attention, nats per token"), strict=True
        ):
            for (method, colour), marker in zip(LINES.items(), "os^", strict=True):
                points = sorted(
                    (row["length"], row[value]) for row in rows if (row["method"], row["text"]) == (method, text)
                )
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=method.partition(":")[2])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length / 1024:.0f}K"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            form = ".0%" if value == "density" else "g"
            axes.set_yticks([0.03, 0.05, 0.1, 0.2] if value == "density" else [0.005, 0.01, 0.02, 0.05])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda found, _, form=form: format(found, form)))
            axes.set_xlabel("prompt, tokens")
            axes.set_ylabel(label)
            axes.set_title(text, fontsize=10)
            axes.grid(alpha=0.3, which="both")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="coverage", loc="outside right upper", frameon=False)
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
