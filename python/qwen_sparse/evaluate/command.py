"""``qwen-sparse eval``: a table for people, one JSON document, and figures beside it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..base.machine import machine
from ..base.text import read_text
from ..model.decoder import Decoder
from ..model.loader import load_model
from ..options import add_config, add_device, add_quantization
from .figures import draw_heat_maps, draw_lines, require_matplotlib
from .modes import Mode, default_modes
from .needles import niah, passkey, variable_tracking
from .perplexity import evaluate_perplexity
from .probes import MOST_PROBES, evaluate_probes
from .prompts import Task
from .questions import question_answering, read_questions
from .recall import evaluate_recall, sparse_modes
from .run import evaluate_tasks
from .words import common_words, frequent_words

__all__ = ["add_arguments", "head_grids", "length_label", "run"]

_TASKS = {
    "passkey": "one number in a long text",
    "niah": "one of several numbers of different names",
    "ruler": "one and four needles, variable tracking, common words, frequent words",
    "qa": "questions about documents of your own",
    "perplexity": "windows of a text of your own behind contexts of each length",
    "recall": "no answers: how much attention sparse prefill keeps, by layer and head",
}
_UNITS = {"k": 2**10, "m": 2**20}
_SHOWN = (
    "accuracy", "exact_match", "perplexity", "kl", "same_top", "recall", "lowest_recall", "density", "seconds"
)  # fmt: skip
_FORMATS = {"kl": "{:.4f}", "perplexity": "{:.3f}", "seconds": "{:.2f}"}  # of what is no share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qwen-sparse eval``."""
    tasks = parser.add_subparsers(dest="task", required=True)
    parsers = {name: tasks.add_parser(name, help=text, description=text) for name, text in _TASKS.items()}
    for name, task in parsers.items():
        _add_common(task)
        if name not in ("perplexity", "recall"):
            task.add_argument("--chat", action="store_true", help="put prompts through the model's chat template")
        if name in ("passkey", "niah", "ruler", "qa"):
            task.add_argument("--depths", type=_depths, help="0,0.25,0.5,0.75,1")
            task.add_argument("--samples", type=int, help="prompts per length and depth (4; texts with --probes: 1)")
    for name in ("passkey", "niah", "ruler"):
        parsers[name].add_argument("--seed", type=int, default=0, help="of the prompts (0)")
        parsers[name].add_argument("--haystack", "--text", help="grass, sentences or a text file")
    parsers["niah"].add_argument("--needles", type=int, nargs="+", help="numbers in the text, each count a task (1 4)")
    parsers["niah"].add_argument(
        "--probes",
        type=int,
        help="this many needles at even depths of one text, which is prefilled once per mode and length, then each "
        f"needle's question answered from the cache (1 to {MOST_PROBES})",
    )
    parsers["qa"].add_argument("--questions", type=Path, required=True, help="JSON lines: context, question, answers")
    parsers["qa"].add_argument("--answer-tokens", type=int, default=32, help="most tokens of an answer (32)")
    parsers["qa"].add_argument("--seed", type=int, default=0, help="of the order of documents (0)")
    parsers["perplexity"].add_argument("--text", type=Path, required=True, help="text file to predict")
    measured = parsers["perplexity"].add_mutually_exclusive_group()
    measured.add_argument("--tail", type=int, help="predict the last tokens of prompts of each length (2048)")
    measured.add_argument("--window", type=int, help="or this many tokens as a prefill chunk behind their context")
    parsers["perplexity"].add_argument("--samples", type=int, help="tails (1) or windows (8), spread over the text")
    parsers["perplexity"].add_argument(
        "--reference",
        type=_mode,
        help="mode to compare all with (of each mode: rope or dca, its own rotation)",
    )

    text = parsers["recall"].add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, help="text file whose first tokens are measured")
    text.add_argument("--synthetic", action="store_true", help="measure on generated passkey prompts")
    parsers["recall"].add_argument("--seed", type=int, default=0, help="of generated prompts (0)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--lengths", type=_lengths, default=[2**12, 2**14], help="tokens, e.g. 1k,4k,1m (4k,16k)")
    parser.add_argument(
        "--modes",
        type=_modes,
        help="rope or dca, then +sparse (by budgets) or +coverage0.95 (block groups), then +int8",
    )
    add_config(parser)
    add_quantization(parser)
    add_device(parser)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory for the JSON and the figures")
    parser.add_argument("--no-figures", dest="figures", action="store_false", help="table and JSON only")


def _lengths(text: str) -> list[int]:
    return [_length(part) for part in text.split(",")]


def _length(text: str) -> int:
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in _UNITS else (text, "")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"a length must be a number of tokens such as 512, 4k or 1m, got {text!r}")
    return int(number) * _UNITS.get(unit, 1)


def _depths(text: str) -> list[float]:
    try:
        depths = [float(part) for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    if not all(0 <= depth <= 1 for depth in depths):
        raise argparse.ArgumentTypeError(f"depths must be numbers between 0 and 1, got {text!r}")
    return depths


def _modes(text: str) -> list[str]:
    return list(dict.fromkeys(_mode(name) for name in text.split(",")))


def _mode(text: str) -> str:
    try:
        return Mode.parse(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def length_label(length: int) -> str:
    """1048576 -> '1M', 4096 -> '4K', 1000 -> '1000'."""
    for unit, size in reversed(_UNITS.items()):
        if length % size == 0:
            return f"{length // size}{unit.upper()}"
    return str(length)


def run(args: argparse.Namespace) -> int:
    """Run an evaluation; returns the exit status.

    Raises:
        ValueError, OSError, MemoryError: in one line, what is wrong; before anything is computed.
    """
    _set_defaults(args)
    if args.figures:
        require_matplotlib()
    model = load_model(  # modes choose the attention
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_seq_len=max(args.lengths),
        attention="dense",
        config=args.config,
        quantization=args.quantization,
    )
    modes = args.modes or (sparse_modes(model) if args.task == "recall" else default_modes(model))
    found = _rows(model, modes, args)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in found:  # what is done is kept if the rest is interrupted
        rows.append(row)
        _write(args, model, modes, rows)
    _print_tables(rows)
    print(f"\n{args.output / args.task}.json", *(_draw(rows, args) if args.figures else ()), sep="\n")
    return 0


def _set_defaults(args: argparse.Namespace) -> None:
    """Defaults that depend on other options, so that results say what was run.

    Raises:
        ValueError: options that do not go together.
    """
    probes = getattr(args, "probes", None)
    for name in ("depths", "needles"):
        if probes is not None and getattr(args, name) is not None:
            raise ValueError(f"--{name} goes without --probes, which puts a needle for each question at even depths")
    if args.task == "perplexity":
        defaults: dict[str, Any] = {"samples": 8} if args.window is not None else {"samples": 1, "tail": 2048}
    elif probes is None:
        defaults = {"samples": 4, "depths": [0, 0.25, 0.5, 0.75, 1], "needles": [1, 4]}
    else:
        defaults = {"samples": 1}
    for name, value in defaults.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def _rows(model: Decoder, modes: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    progress = sys.stderr.isatty()
    text = None if getattr(args, "text", None) is None else read_text(args.text)
    if args.task == "recall":
        return evaluate_recall(model, text, modes, args.lengths, seed=args.seed, progress=progress)
    if text is not None:
        options = {"samples": args.samples, "reference": args.reference, "progress": progress}
        options |= {"tail": args.tail} if args.window is None else {"window": args.window}
        return evaluate_perplexity(model, text, modes, args.lengths, **options)
    if getattr(args, "probes", None) is not None:
        options = {"seed": args.seed, "chat": args.chat, "progress": progress, **_hay(args)}
        return evaluate_probes(model, args.probes, modes, args.lengths, args.samples, **options)
    return evaluate_tasks(
        model,
        _tasks(args),
        modes,
        args.lengths,
        args.depths,
        args.samples,
        seed=args.seed,
        chat=args.chat,
        progress=progress,
    )


def _tasks(args: argparse.Namespace) -> list[Task]:
    if args.task == "qa":
        return [question_answering(read_questions(args.questions), answer_tokens=args.answer_tokens)]
    hay = _hay(args)
    if args.task == "passkey":
        return [passkey(**hay)]
    if args.task == "niah":
        return [niah(needles, **hay) for needles in dict.fromkeys(args.needles)]
    return [niah(1, **hay), niah(4, **hay), variable_tracking(**hay), common_words(), frequent_words()]


def _hay(args: argparse.Namespace) -> dict[str, str]:
    return {} if args.haystack is None else {"hay": args.haystack}


def _write(args: argparse.Namespace, model: Decoder, modes: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Files by name only: a result says which one, not where it lay."""
    left_out = ("run", "command", "task", "output", "figures", "model", "modes")
    options = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    if options.get("haystack") is not None:
        options["haystack"] = Path(args.haystack).name
    record = {
        "benchmark": f"eval {args.task}",
        "version": __version__,
        "machine": machine(model.device),
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "modes": list(modes),
        "options": {key: value for key, value in options.items() if key not in left_out},
        "rows": list(rows),
    }
    (args.output / f"{args.task}.json").write_text(json.dumps(record, indent=1) + "\n")


def _means(rows: Sequence[dict[str, Any]], value: str) -> list[dict[str, Any]]:
    """The mean over depths, a row for each task, mode and length."""
    cells: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        if value in row:
            cells.setdefault((row["task"], row["mode"], row["length"]), []).append(row[value])
    return [
        {"task": task, "mode": mode, "length": length, value: statistics.mean(values)}
        for (task, mode, length), values in cells.items()
    ]


def _print_tables(rows: Sequence[dict[str, Any]]) -> None:
    for value in _SHOWN:
        if any(value in row for row in rows):
            print(f"\n{value.replace('_', ' ')}")
            print(_table(_means(rows, value), value))


def _table(means: Sequence[dict[str, Any]], value: str) -> str:
    lengths = sorted({row["length"] for row in means})
    cells = {(row["task"], row["mode"], row["length"]): row[value] for row in means}
    lines = [["task", "mode", *(length_label(length) for length in lengths)]]
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in means):
        numbers = [cells[task, mode, length] for length in lengths]
        lines.append([task, mode, *(_FORMATS.get(value, "{:.1%}").format(number) for number in numbers)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def head_grids(rows: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[float, int], float]]:
    """Recall by layer and head: a panel for each mode and length, mode by mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    return {
        f"{Mode.parse(row['mode']).title}, {length_label(row['length'])}": {
            (layer, head): recall
            for layer, recalls in enumerate(row["recall_by_head"])
            for head, recall in enumerate(recalls)
        }
        for row in sorted(rows, key=lambda row: (modes.index(row["mode"]), row["length"]))
    }


def _draw(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """Every figure that the rows have the values for; their files."""
    files = []
    deep = [row for row in rows if row.get("depth") is not None]
    for task in dict.fromkeys(row["task"] for row in deep):
        grids: dict[str, dict[tuple[float, int], float]] = {}
        for row in (row for row in deep if row["task"] == task):
            title = Mode.parse(row["mode"]).title
            grids.setdefault(title, {})[row["depth"], row["length"]] = row["accuracy"]
        files.append(args.output / f"{task}_depth.png")
        draw_heat_maps(grids, files[-1], column_label=length_label)
    if "recall_by_head" in rows[0]:
        files.append(args.output / "recall_heads.png")
        draw_heat_maps(head_grids(rows), files[-1], row_label=str, xlabel="head", ylabel="layer", value="recall")
    names = {
        "accuracy": "score",
        "perplexity": "perplexity per token",
        "recall": "recall, mean over heads",
        "density": "attended share of causal pairs",
    }
    for value, ylabel in names.items():
        if value in rows[0]:
            files.append(args.output / (f"{args.task}.png" if value == args.task else f"{args.task}_{value}.png"))
            draw_lines(_means(rows, value), value, files[-1], label=length_label, ylabel=ylabel)
    return files
