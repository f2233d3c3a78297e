"""Draws time against context length, log-log, from the JSON of bench_prefill.py and bench_attention.py.

    python bench/plot.py bench/results/prefill_cpu.json bench/results/prefill_64k_cpu.json \\
        --output bench/results/prefill_cpu.png

One panel per setting (shape, head_dim, dtype, instruction set), with the rows of all files; the median with p10 to p90.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

OURS_SPARSE, OURS_DENSE, GREY = "#D55E00", "#0072B2", "#595959"
PEER_COLOURS = ["#595959", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1"]
"""Colours that people with colour vision deficiencies tell apart (Okabe and Ito)."""
MARKERS = "osD^vP"
NAMES = {
    "dense": "ours, dense",
    "vertical-slash": "ours, sparse",
    "selection + vertical-slash": "ours, sparse + selection",
    "DCA dense": "ours, DCA dense",
    "DCA vertical-slash": "ours, DCA sparse",
}
"""Of our kernels."""
SPARSE_NAMES = {"xattention": "XAttention", "trishape": "TriShape"}

Series = dict[str, list[dict[str, Any]]]


def panels(record: dict[str, Any], grouped: dict[str, Series]) -> None:
    """Adds the rows to those of their panel's title and line's label, in the order of the file."""
    options = record["options"]
    for row in record["rows"]:
        if record["benchmark"] == "prefill":
            layers = f", {options['layers']} layers" if options["layers"] else ""
            title = f"time to first token, Qwen2.5-{options['shape'].upper()} shape{layers}, bf16"
            label = row["engine"]
            if label == "qwen_sparse":
                label = NAMES[row["attention"]]
            elif row["attention"] != "dense":
                label += f", {SPARSE_NAMES.get(row['attention'], row['attention'])}"
        elif record["benchmark"] == "attention":
            heads = f"{options['num_heads']}/{options['num_kv_heads']} heads"
            title = f"attention, {heads}, head_dim {row['head_dim']}, {row['dtype']}, {row['isa']}"
            label = NAMES.get(row["kernel"], row["kernel"])
        else:
            raise ValueError(f"plot: the benchmark must be 'prefill' or 'attention', got {record['benchmark']!r}")
        grouped.setdefault(title, {}).setdefault(label, []).append(row)


def label_of(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The line's name, with the density of its longest context where it is known and below 1."""
    density = rows[-1].get("density", 1.0)
    return name if density is None or density >= 1 else f"{name} ({density:.0%})"


def spread(values: Sequence[float], distance: float) -> list[float]:
    """Ascending values moved apart to at least ``distance``, each group around its own middle."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _middle(groups[-1]) - _middle(groups[-2]) < distance * (
            (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    return [_middle(group) + distance * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _middle(group: Sequence[float]) -> float:
    return sum(group) / len(group)


def duration(seconds: float, _: object = None) -> str:
    """A time axis' tick."""
    return f"{seconds:g} s" if seconds >= 1 else f"{1e3 * seconds:g} ms"


def draw(axes: Axes, title: str, series: Series, height: float) -> None:
    """One panel: lines with their names at their right ends."""
    lengths = sorted({row["seqlen"] for rows in series.values() for row in rows})
    peers = 0
    ends = []
    for name, rows in series.items():
        rows = sorted(rows, key=lambda row: row["seqlen"])
        ours = name.startswith("ours")
        if ours:
            colour, marker = (OURS_SPARSE, "o") if "sparse" in name else (OURS_DENSE, "o")
        else:
            colour, marker = PEER_COLOURS[peers % len(PEER_COLOURS)], MARKERS[1 + peers % (len(MARKERS) - 1)]
            peers += 1
        variant = "DCA" in name or "selection" in name
        medians = [row["seconds"]["median"] for row in rows]
        low = [m - row["seconds"]["p10"] for m, row in zip(medians, rows, strict=True)]
        high = [row["seconds"]["p90"] - m for m, row in zip(medians, rows, strict=True)]
        axes.errorbar(
            [row["seqlen"] for row in rows],
            medians,
            yerr=[low, high],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.2 if ours else 1.4,
            linestyle=(0, (4, 1.5)) if variant else "-",
            elinewidth=1,
            zorder=3 if ours else 2,
        )
        ends.append((medians[-1], rows[-1]["seqlen"], label_of(name, rows), colour, ours))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    times = [row["seconds"]["median"] for rows in series.values() for row in rows]
    low_limit, high_limit = min(times) / 1.5, max(times) * 1.5
    axes.set_ylim(low_limit, high_limit)
    ends.sort(key=lambda end: end[0])
    line = 0.165 / height * math.log(high_limit / low_limit)  # a line of text, in the axis' logarithms
    for place, (time, seqlen, label, colour, ours) in zip(
        spread([math.log(end[0]) for end in ends], line), ends, strict=True
    ):
        axes.annotate(
            label,
            (seqlen, time),
            (lengths[-1] * 1.3, math.exp(place)),
            color=colour,
            fontsize=9,
            fontweight="bold" if ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 and n % 1024 == 0 else f"{n:g}")
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high_limit / low_limit < 300 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(duration))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.tick_params(length=0, which="both", colors=GREY, labelsize=9)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("context, tokens", color=GREY, fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, color="#222222")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON written by bench_prefill.py or bench_attention.py")
    parser.add_argument("--output", type=Path, required=True, help="the PNG")
    parser.add_argument("--panels", default="", help="draw only panels whose title matches this regular expression")
    arguments = parser.parse_args()

    records = [json.loads(path.read_text()) for path in arguments.results]
    grouped: dict[str, Series] = {}
    for record in records:
        panels(record, grouped)
    drawn = [panel for panel in grouped.items() if re.search(arguments.panels, panel[0])]
    if not drawn:
        parser.error(f"--panels must match a title, got {arguments.panels!r}")
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    height = 3.4 if len(drawn) > 1 else 3.8
    figure, grid = plt.subplots(lines, columns, figsize=(7.2 * columns, (height + 1.0) * lines), squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, (title, series) in zip(grid.flat, drawn, strict=False):
        draw(axes, title, series, height)
    # Room on the right of every panel for the names of its lines.
    figure.subplots_adjust(
        left=0.66 / figure.get_figwidth(),
        right=1 - 2.5 / figure.get_figwidth(),
        wspace=3.3 / (figure.get_figwidth() / columns - 3.0),
        bottom=0.55 / figure.get_figheight(),
        top=1 - 0.4 / figure.get_figheight(),
        hspace=1.0 / height,
    )
    figure.savefig(arguments.output, dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
