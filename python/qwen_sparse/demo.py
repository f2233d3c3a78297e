"""``qwen-sparse demo``: a tiny model finds a passkey in a prompt 128 times longer than any it was trained on.

The model ships with the package (``assets/passkey``, trained on sequences of up to 512 bytes by
``examples/train_passkey.py``). The demo runs the same weights with plain RoPE, with Dual Chunk Attention, and with Dual
Chunk Attention plus sparse attention (vertical-slash by budgets, block groups by coverage), then draws retrieval
accuracy over depth and length.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import _C
from .base.machine import machine
from .base.resources import format_bytes
from .evaluate import Mode, answer
from .evaluate.figures import draw_heat_maps
from .evaluate.run import check_lengths
from .model.decoder import Decoder
from .model.loader import load_model
from .passkey import PasskeyPrompt, make_prompt

__all__ = ["MODES", "Retrieval", "accuracy_grid", "add_arguments", "load_passkey_model", "retrieve", "run"]

MODES = {name: Mode.parse(name).title for name in ("rope", "dca", "dca+sparse", "dca+coverage0.8")}
"""The ways to run the model, and how tables name them."""

_WIDTH = max(map(len, MODES.values()))

TRAINED_LENGTH = 512
LONGEST = 128
GRID = {mode: (1, 2, 4, 8, 16) if mode == "rope" else (1, 2, 4, 8, 16, 32, 64) for mode in MODES}
"""Prompt lengths of the heat maps, in trained lengths; plain RoPE stops where it has long failed."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Retrieval:
    """One prompt's outcome."""

    mode: str
    length: int
    """Prompt bytes (= tokens)."""
    depth: float
    key: str
    answer: str
    """What the model wrote, up to the key's length; unprintable bytes as U+FFFD."""
    ttft: float
    """Seconds from prompt to the first token."""
    density: float
    """Attended over causal (row, key) pairs of the prefill."""
    kv_bytes: int
    peak_memory: int
    """Bytes resident in the process at the prefill's peak."""

    @property
    def correct(self) -> bool:
        """Exact match."""
        return self.answer == self.key


def load_passkey_model(dtype: str = "float32", device: str | torch.device = "auto") -> Decoder:
    """The model that ships with the package; arguments as of :func:`~qwen_sparse.load_model`."""
    return load_model(str(files("qwen_sparse") / "assets" / "passkey"), dtype=dtype, device=device)


def retrieve(model: Decoder, mode: str, prompt: PasskeyPrompt, *, progress: bool = False) -> Retrieval:
    """Ask for the key of one prompt, greedily, in a mode that :class:`qwen_sparse.evaluate.Mode` can parse."""
    runner = Mode.parse(mode).apply(model)
    tokens = runner.tokenizer.encode(prompt.text)
    given = answer(runner, tokens, len(prompt.key), progress=progress)
    return Retrieval(
        mode=mode,
        length=len(tokens),
        depth=prompt.depth,
        key=prompt.key,
        answer=given.text,
        ttft=given.ttft,
        density=given.density,
        kv_bytes=given.kv_bytes,
        peak_memory=given.peak_memory,
    )


def accuracy_grid(
    model: Decoder,
    mode: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    *,
    seed: int = 0,
    **prompt_options: Any,
) -> list[Retrieval]:
    """``samples`` prompts for every length (in trained lengths) and depth, with a progress bar.

    ``prompt_options`` go to :func:`qwen_sparse.passkey.make_prompt`.
    """
    results = []
    cells = [(length, depth, sample) for length in lengths for depth in depths for sample in range(samples)]
    title, total = Mode.parse(mode).title, sum(length for length, _, _ in cells)
    with tqdm(total=total, desc=title, unit="x", file=sys.stderr) as bar:
        for length, depth, sample in cells:
            prompt = make_prompt(length * TRAINED_LENGTH, depth, seed=seed + sample, **prompt_options)
            results.append(retrieve(model, mode, prompt))
            bar.update(length)
    return results


def accuracy(results: Sequence[Retrieval]) -> float:
    """Share of exact matches."""
    return sum(result.correct for result in results) / len(results)


def plot_grids(grids: dict[str, list[Retrieval]], path: Path) -> None:
    """Heat maps of accuracy, depth against length, one per mode.

    Raises:
        ValueError: matplotlib is missing.
    """
    cells: dict[str, dict[tuple[float, int], list[Retrieval]]] = {mode: {} for mode in grids}
    for mode, results in grids.items():
        for result in results:
            cells[mode].setdefault((result.depth, result.length), []).append(result)
    draw_heat_maps(
        {MODES[mode]: {cell: accuracy(found) for cell, found in grid.items()} for mode, grid in cells.items()},
        path,
        column_label=lambda length: f"{length // TRAINED_LENGTH}×",
        xlabel=f"prompt length / trained length ({TRAINED_LENGTH} bytes)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qwen-sparse demo``."""
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory for heat map and JSON")
    parser.add_argument("--length", type=int, default=LONGEST, help="long prompt, in trained lengths (default 128)")
    parser.add_argument("--samples", type=int, default=1, help="prompts per cell of the heat map (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of keys and filler")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and activations"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N; GPUs (auto: if there is one) want --dtype bfloat16"
    )
    parser.add_argument("--no-grid", action="store_true", help="leave out the heat map")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status, 1 when a Dual Chunk Attention run missed the long passkey."""
    if args.length < 1 or args.samples < 1:
        raise ValueError(f"--length and --samples must be >= 1, got {args.length} and {args.samples}")
    begin = time.perf_counter()
    model = load_passkey_model(args.dtype, args.device)
    kernels = _C.cpu_features()["isa"] if model.device.type == "cpu" else str(model.device)
    check_lengths([Mode.parse(mode).apply(model) for mode in MODES], [args.length * TRAINED_LENGTH])
    args.output.mkdir(parents=True, exist_ok=True)
    prompt = make_prompt(args.length * TRAINED_LENGTH, 0.4, seed=args.seed)
    print(
        f"A model of {model.weights.nbytes // model.dtype.itemsize:,} parameters, trained on sequences of up to "
        f"{TRAINED_LENGTH} bytes, reads {len(prompt.text):,} bytes ({args.length}x). The pass key in there is "
        f"{prompt.key}. Kernels: {kernels}, {args.dtype}.\n"
    )
    long_runs = _long_table(model, prompt)
    grids: dict[str, list[Retrieval]] = {}
    if not args.no_grid:
        print()
        for mode, lengths in GRID.items():
            grids[mode] = accuracy_grid(model, mode, lengths, DEPTHS, args.samples, seed=args.seed)
        for mode, results in grids.items():
            print(
                f"{MODES[mode]:>{_WIDTH}}: {accuracy(results):6.1%} of {len(results)} passkeys, 1x to {GRID[mode][-1]}x"
            )
        heat_map = args.output / "passkey.png"
        plot_grids(grids, heat_map)
        print(f"heat map: {heat_map}")
    record = {
        "machine": machine(model.device),
        "dtype": args.dtype,
        "long": [asdict(result) for result in long_runs],
        "grid": {mode: [asdict(result) for result in results] for mode, results in grids.items()},
    }
    (args.output / "passkey.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0 if all(result.correct for result in long_runs if result.mode != "rope") else 1


def _long_table(model: Decoder, prompt: PasskeyPrompt) -> list[Retrieval]:
    """Run every mode on one long prompt, printing each row as it is done."""
    columns = ("", "answer", "", "first token", "density", "KV cache", "peak memory")
    layout = f"{{:>{_WIDTH}}}" + "  {:>8}  {:<6}  {:>11}  {:>7}  {:>9}  {:>11}"
    print(layout.format(*columns))
    results = []
    for mode, name in MODES.items():
        result = retrieve(model, mode, prompt, progress=sys.stderr.isatty())
        results.append(result)
        print(
            layout.format(
                name,
                repr(result.answer)[1:-1][:8],
                "found" if result.correct else "missed",
                f"{result.ttft:.1f} s",
                f"{result.density:.1%}",
                format_bytes(result.kv_bytes),
                format_bytes(result.peak_memory),
            ),
            flush=True,
        )
    return results
