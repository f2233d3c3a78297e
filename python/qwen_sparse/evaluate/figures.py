"""Figures of an evaluation, in colours that people with colour vision deficiencies tell apart (cividis; Okabe, Ito)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .modes import Mode

__all__ = ["Grid", "draw_heat_maps", "draw_lines", "line_styles", "require_matplotlib"]

Grid = Mapping[tuple[float, int], float]
"""Values from 0 to 1 by row and column: accuracy by depth and length, recall by layer and head."""

_MOST_NAMED = 12  # rows or columns whose cells have room for numbers, and axes for all ticks

_Prefill = tuple[bool, bool, float | None]
"""Of a mode: DCA or plain RoPE, sparse or not, coverage."""
_STYLES: dict[_Prefill, tuple[str, str]] = {
    (False, False, None): ("#000000", "o"),
    (True, False, None): ("#0072B2", "s"),
    (False, True, None): ("#CC79A7", "v"),
    (True, True, None): ("#D55E00", "^"),
}
"""Colour and mark of a line."""
_COVERAGE_STYLES = (("#009E73", "D"), ("#E69F00", "P"), ("#56B4E9", "X"))
"""Of the coverages in a figure, in their order."""


def require_matplotlib() -> None:
    """Refuse early where figures cannot be drawn.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")


def draw_heat_maps(
    grids: Mapping[str, Grid],
    path: Path,
    *,
    column_label: Callable[[int], str] = str,
    row_label: Callable[[float], str] = "{:.0%}".format,
    xlabel: str = "length in tokens",
    ylabel: str = "depth",
    value: str = "retrieved",
) -> None:
    """One panel per title with its mean; the labels name a column (length, head) and a row (depth, layer).

    Raises:
        ValueError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import pyplot

    columns = 3 if len(grids) % 3 == 0 else min(len(grids), 2)
    lines = -(-len(grids) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.4 * columns, 3.3 * lines + 0.3), squeeze=False, layout="constrained"
    )
    image: Any = None
    for axis in axes.flat[len(grids) :]:
        axis.set_axis_off()
    for axis, (title, grid) in zip(axes.flat, grids.items(), strict=False):
        ys, xs = sorted({row for row, _ in grid}), sorted({column for _, column in grid})
        values = [[grid.get((row, column), float("nan")) for column in xs] for row in ys]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        if max(len(xs), len(ys)) <= _MOST_NAMED:
            for y, row in enumerate(values):
                for x, number in enumerate(row):
                    if number == number:
                        colour = "black" if number > 0.55 else "white"
                        axis.text(x, y, f"{number:.0%}", ha="center", va="center", fontsize=10, color=colour)
        for named, names in ((axis.set_xticks, [*map(column_label, xs)]), (axis.set_yticks, [*map(row_label, ys)])):
            step = -(-len(names) // _MOST_NAMED)
            named(range(0, len(names), step), names[::step], fontsize=10)
        mean = sum(grid.values()) / len(grid)
        axis.set_title(f"{title}: {mean:.1%}", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel, fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel, fontsize=11)
    figure.colorbar(image, ax=axes.ravel().tolist(), label=value)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_lines(
    rows: Sequence[Mapping[str, Any]], value: str, path: Path, *, label: Callable[[int], str], ylabel: str
) -> None:
    """``value`` of the rows (each with task, mode and length) against length: a panel per task, a line per mode.

    Raises:
        ValueError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    styles = line_styles(dict.fromkeys(row["mode"] for row in rows))
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.8 * columns, 3.8 * lines + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, tasks, strict=False):
        of_task = [row for row in rows if row["task"] == task]
        for name in dict.fromkeys(row["mode"] for row in of_task):
            points = sorted((row["length"], row[value]) for row in of_task if row["mode"] == name)
            axis.plot(*zip(*points, strict=True), **styles[name])
        lengths = sorted({row["length"] for row in of_task})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [label(length) for length in lengths], fontsize=10)
        axis.xaxis.set_minor_locator(NullLocator())
        if value == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(-0.03, 1.05)
            axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_title(task, fontsize=11)
        axis.set_xlabel("length in tokens", fontsize=11)
        axis.set_ylabel(ylabel, fontsize=11)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By mode. Lines of int8 are dashed, with open and larger marks, so that one shows behind the other."""
    styles, found = {}, dict(_STYLES)
    for name in names:
        mode = Mode.parse(name)
        key = mode.dual_chunk, mode.sparse, mode.coverage
        if key not in found:
            found[key] = _COVERAGE_STYLES[(len(found) - len(_STYLES)) % len(_COVERAGE_STYLES)]
        colour, mark = found[key]
        style = {"color": colour, "marker": mark, "label": mode.title, "linewidth": 1.8}
        if mode.int8:
            styles[name] = style | {"linestyle": "--", "markersize": 10, "markerfacecolor": "none"}
        else:
            styles[name] = style | {"markersize": 5 if mode.sparse else 7}
    return styles
