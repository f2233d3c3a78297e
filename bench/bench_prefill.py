"""Time to first token, end to end: dense and vertical-slash prefill beside transformers, vLLM and OpenVINO GenAI.

    python bench/bench_prefill.py --shape 0.5b --layers 8 --seqlens 16384 65536 --repeats 3 1 \\
        --vllm-python ~/vllm/bin/python --openvino-python ~/openvino/bin/python --output bench/results/prefill_cpu.json
    python bench/bench_prefill.py --device cuda --shape 7b --layers 4 --seqlens 131072 --chunk-tokens 32768

    python bench/bench_prefill.py --model build/released/qwen2.5-coder-0.5b --seqlens 16384 --repeats 3 \\
        --vllm-python ~/vllm/bin/python --output bench/results/prefill_released_cpu.json

All engines load one checkpoint with random bf16 weights and get the same token ids; the first token's logits or id
end the time. Ours and transformers take turns in this process, after a short warm-up prompt; the others run after
them in processes of their own (bench/peers/README.md) and are not measured unless their interpreter is given.

Random weights have no attention structure, so with --density (the default) selection runs and its time counts, but
attention gets index sets drawn for that density, new ones for every layer, prefill chunk and head; the prompt's last
block is dense and adds to it. With --budgets nothing is replaced. With --model all engines load that checkpoint and
read the beginning of bench/texts.py's code; our sparse prefill has the block groups of --coverage.

Nothing is timed before short prompts agree with transformers (dense) and with our reference of vertical-slash
attention (with random weights), by the rule of the tests: at most twice the error of plain PyTorch in bf16, both
measured against float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import texts
from checkpoint import SHAPES, write_checkpoint
from indexes import (
    add_index_arguments,
    clustered_indexes,
    describe_indexes,
    index_counts,
    read_budgets,
    with_budgets,
)
from qwen_sparse import load_model, ops, prefill, reference
from qwen_sparse.engine.memory import default_chunk_tokens
from qwen_sparse.engine.prefill import PrefillResult, PrefillStats, chunk_ends
from qwen_sparse.model import attention as layer_attention
from qwen_sparse.model.config import SparseConfig
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.testing import Timing, assert_close_to_reference, interleaved
from report import (
    add_check_argument,
    add_device_argument,
    add_output_argument,
    finish,
    print_environment,
    print_table,
    save,
    time_cells,
)

PEERS = Path(__file__).parent / "peers"
WARM_UP_TOKENS = 512
AGREEING_RANK = 10
"""A dense peer's first token must be among this many most likely ones of ours: bf16 may swap close ones."""

IndexSets = dict[int, list[tuple[Tensor, Tensor]]]
"""By end of the prefill chunk, one (vertical, slash) pair per layer."""


def drawn_sets(model: Decoder, seqlen: int, chunk_tokens: int, density: float, seed: int) -> IndexSets:
    """Index sets of the asked density for every prefill chunk and layer of a prompt."""
    config, sets, start = model.config, {}, 0
    for end in chunk_ends(0, seqlen, chunk_tokens):
        drawn = [
            clustered_indexes(config.num_heads, end, density, seed + layer, rows=end - start)
            for layer in range(config.num_layers)
        ]
        sets[end] = [(vertical.to(model.device), slash.to(model.device)) for vertical, slash in drawn]
        start = end
    return sets


def with_sizes(model: Decoder, sets: IndexSets) -> Decoder:
    """The model with budgets as large as the last chunk's drawn sets, so that selection works as much."""
    vertical, slash = zip(*sets[max(sets)], strict=True)
    sparse = SparseConfig(
        vertical_sizes=tuple(tuple(index_counts(indexes)) for indexes in vertical),
        slash_sizes=tuple(tuple(index_counts(indexes)) for indexes in slash),
    )
    return with_budgets(model, sparse)


@contextlib.contextmanager
def replaced_selection(sets: IndexSets) -> Iterator[None]:
    """During one prefill, let selection run and hand attention the drawn sets instead of its result."""
    select, layers = ops.select_vertical_slash, Counter[int]()

    def replacement(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        select(q, k, **options)
        end = k.shape[0]
        layers[end] += 1
        return sets[end][layers[end] - 1]

    with mock.patch.object(ops, "select_vertical_slash", replacement):
        yield


def sparse_prefill(model: Decoder, tokens: Tensor, chunk_tokens: int, sets: IndexSets | None) -> PrefillResult:
    with contextlib.nullcontext() if sets is None else replaced_selection(sets):
        return prefill(model, tokens, chunk_tokens=chunk_tokens)


def load_transformers(path: Path, dtype: torch.dtype, device: torch.device) -> Any | None:
    """The model in transformers with torch's scaled_dot_product_attention, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path), **options)  # in evaluation mode
    return model.to(device)


@torch.inference_mode()
def transformers_logits(model: Any, tokens: Tensor) -> Tensor:
    """float32 logits of the last position, with the KV cache filled."""
    logits: Tensor = model(tokens[None].to(model.device), use_cache=True, logits_to_keep=1).logits[0, -1].float()
    return logits


def plain_attention(dtype: torch.dtype) -> Callable[..., tuple[Tensor, None, Tensor]]:
    """The sparse attention op by its definition, computed by PyTorch in ``dtype``."""

    def run(q: Tensor, k: Tensor, v: Tensor, vertical: Tensor, slash: Tensor, scale: float) -> Any:
        out = reference.vertical_slash_attention(q, k, v, vertical, slash, softmax_scale=scale, compute_dtype=dtype)
        return out, None, torch.zeros(1, dtype=torch.int64)

    return run


def check(arguments: argparse.Namespace, path: Path, model: Decoder) -> None:
    """Compares the last logits of a short prompt, dense with transformers and sparse with the reference (on the CPU).

    Raises:
        AssertionError: an error is more than twice that of plain PyTorch in bf16.
    """
    seqlen, chunk_tokens = arguments.check_tokens, max(64, arguments.check_tokens // 2)
    tokens = prompt(arguments, model, seqlen)
    cpu = torch.device("cpu")
    wide, narrow = (load_transformers(path, dtype, cpu) for dtype in (torch.float32, model.dtype))
    if wide is None:
        print("check: dense not compared, transformers is not installed")
    else:
        actual = prefill(model, tokens, chunk_tokens=chunk_tokens).logits.cpu()
        exact, plain = (transformers_logits(peer, tokens) for peer in (wide, narrow))
        report_check("dense, against transformers", seqlen, actual, exact, plain)
    del wide, narrow
    if arguments.model is not None:  # the kernels of block groups are compared where their accuracy is measured
        return
    exact_model, plain_model = (load_model(path, device=cpu, dtype=dtype) for dtype in ("float32", model.dtype))
    runs = []
    for source, dtype in ((model, None), (exact_model, torch.float32), (plain_model, model.dtype)):
        sets = drawn_sets(source, seqlen, chunk_tokens, max(arguments.density, 0.3), arguments.seed)
        attention = layer_attention._ops.vertical_slash_attention if dtype is None else plain_attention(dtype)
        with mock.patch.object(layer_attention._ops, "vertical_slash_attention", attention):
            runs.append(sparse_prefill(with_sizes(source, sets), tokens, chunk_tokens, sets).logits.cpu())
    report_check("vertical-slash, against the reference", seqlen, *runs)


def report_check(name: str, seqlen: int, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    ours, allowed = float((actual - exact).abs().max()), 2 * float((plain - exact).abs().max())
    spread = float(exact.std())
    print(f"check: {name}, {seqlen:,} tokens: error of logits {ours:.3g}, allowed {allowed:.3g}, spread {spread:.3g}")
    assert_close_to_reference(actual, exact, plain)


def prompt(arguments: argparse.Namespace, model: Decoder, seqlen: int) -> Tensor:
    if arguments.model is not None:
        return torch.tensor(model.tokenizer.encode(texts.code())[:seqlen])
    generator = torch.Generator().manual_seed(arguments.seed + seqlen)
    return torch.randint(model.config.vocab_size, (seqlen,), generator=generator)


def measure(
    arguments: argparse.Namespace, model: Decoder, peer: Any | None, seqlen: int, repeats: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of one length: ours dense and sparse, and transformers; and our dense logits."""
    tokens = prompt(arguments, model, seqlen)
    sets, sparse_name = None, "vertical-slash"
    if arguments.model is not None:
        sparse = model.with_options(attention="sparse", coverage=arguments.coverage)
        sparse_name = f"block groups, coverage {arguments.coverage:g}"
    elif arguments.budgets is None:
        sets = drawn_sets(model, seqlen, arguments.chunk_tokens, arguments.density, arguments.seed)
        sparse = with_sizes(model, sets)
    else:
        config = model.config
        sparse = with_budgets(model, read_budgets(arguments.budgets, config.num_layers, config.num_heads))
    stats: dict[str, list[PrefillStats]] = {"dense": [], sparse_name: []}
    logits: dict[str, Tensor] = {}

    def ours(name: str, run: Callable[[], PrefillResult]) -> None:
        result = run()
        stats[name].append(result.stats)
        logits[name] = result.logits.cpu()

    def theirs(name: str) -> None:
        logits[name] = transformers_logits(peer, tokens).cpu()

    chunk_tokens = arguments.chunk_tokens
    candidates: dict[str, Callable[[], object]] = {
        sparse_name: partial(ours, sparse_name, lambda: sparse_prefill(sparse, tokens, chunk_tokens, sets)),
        "dense": partial(ours, "dense", lambda: prefill(model, tokens, chunk_tokens=chunk_tokens)),
    }
    warm = tokens[:WARM_UP_TOKENS]
    prefill(model, warm)
    prefill(sparse, warm)
    if peer is not None:
        transformers_logits(peer, warm)
        candidates["transformers"] = partial(theirs, "transformers")
    timings = interleaved(candidates, repeats=repeats, warmup=0, device=arguments.device)
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"engine": "qwen_sparse", "attention": name, "seqlen": seqlen, "density": 1.0}
        row["first_token"] = int(logits[name].argmax())
        if name == "transformers":
            row |= {"engine": "transformers SDPA", "attention": "dense"}
        else:
            middle = min(stats[name], key=lambda run: abs(run.total_seconds - timing.median))
            phases = {phase: seconds / middle.total_seconds for phase, seconds in middle.seconds.items()}
            row |= {"density": middle.density, "peak_memory": middle.peak_memory, "phase_shares": phases}
            row["outside_share"] = 1 - phases["linear"] - phases["attention"]
        rows.append({**row, "seconds": vars(timing)})
    announce(rows)
    return rows, logits["dense"]


def announce(rows: list[dict[str, Any]]) -> None:
    """Progress: a run with long prompts takes an hour."""
    for row in rows:
        name = f"{row['engine']} {row['attention']}"
        print(f"measured: {name}, {row['seqlen']:,} tokens: {time_cells(row['seconds'])[0]}", flush=True)


def peer_rows(
    arguments: argparse.Namespace, python: Path, script: str, path: Path, prompts: Path, extra: list[str]
) -> list[dict[str, Any]]:
    """Rows of an engine that runs under its own interpreter."""
    command = [str(python), str(PEERS / script), "--model", str(path), "--prompts", str(prompts)]
    command += ["--repeats", *map(str, arguments.repeats), *extra]
    threads = str(torch.get_num_threads())
    variables = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": "", "PYTHONHASHSEED": "0"}
    library = python.parent.parent / "lib" / "libiomp5.so"
    if script.startswith("vllm"):
        variables |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": str(arguments.vllm_kv_cache)}
        variables |= {"LD_PRELOAD": str(library)} if library.is_file() else {}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    record = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        {
            **{key: row[key] for key in ("attention", "seqlen", "first_token")},
            "engine": record["engine"],
            "version": record["version"],
            "options": record["options"],
            "seconds": vars(Timing.of(row["samples"])),
        }
        for row in record["rows"]
    ]


def add_comparisons(rows: list[dict[str, Any]], logits: dict[int, Tensor]) -> None:
    """Ratios to the best dense peer, and where each first token stands in our dense logits.

    Raises:
        AssertionError: the first token of a dense engine is none of our most likely ones.
    """
    for row in rows:
        dense = [
            other["seconds"]["median"]
            for other in rows
            if other["engine"] != "qwen_sparse" and other["attention"] == "dense" and other["seqlen"] == row["seqlen"]
        ]
        row["speedup_over_best_dense_peer"] = min(dense) / row["seconds"]["median"] if dense else None
        ours = logits[row["seqlen"]]
        row["first_token_rank"] = 1 + int((ours > ours[row["first_token"]]).sum())
        if row["attention"] == "dense" and row["first_token_rank"] > AGREEING_RANK:
            raise AssertionError(
                f"{row['engine']}: first token is number {row['first_token_rank']} of our dense logits"
            )


def print_rows(rows: list[dict[str, Any]]) -> None:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    phases = ["linear", "attention", "selection", "cache"]
    print_table(
        [
            *("engine", "attention", "tokens", "density", "TTFT", "p10", "p90", "x best dense peer", "token rank"),
            *phases,
            "outside linear + attention",
        ],
        [
            [
                row["engine"],
                row["attention"],
                f"{row['seqlen']:,}",
                share(row.get("density")),
                *time_cells(row["seconds"]),
                "" if row["speedup_over_best_dense_peer"] is None else f"{row['speedup_over_best_dense_peer']:.2f}",
                str(row["first_token_rank"]),
                *(share(row.get("phase_shares", {}).get(phase)) for phase in phases),
                share(row.get("outside_share")),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint, in place of random weights of --shape")
    parser.add_argument("--coverage", type=float, default=0.87, help="of our sparse prefill with --model")
    parser.add_argument("--shape", default="0.5b", choices=list(SHAPES), help="sizes of this Qwen2.5 model")
    parser.add_argument("--layers", type=int, help="keep this many layers of the shape; all when absent")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 16384], help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, nargs="+", default=[3], help="rounds: one number, or one per length")
    parser.add_argument("--chunk-tokens", type=int, help="rows of our prefill chunks; the device's default when absent")
    add_index_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and index sets")
    parser.add_argument("--workdir", type=Path, help="keep checkpoints and prompts here; a temporary one when absent")
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--vllm-kv-cache", type=int, default=4, help="GiB for vLLM's KV cache")
    parser.add_argument("--openvino-python", type=Path, help="interpreter of an environment with openvino-genai")
    parser.add_argument(
        "--openvino-modes",
        nargs="+",
        default=["dense", "xattention"],
        choices=["dense", "xattention", "trishape"],
        help="attention of OpenVINO GenAI",
    )
    parser.add_argument(
        "--xattention-threshold",
        type=float,
        help="share of importance that XAttention keeps; the asked density when absent (bench/peers/README.md)",
    )
    parser.add_argument("--check-tokens", type=int, default=1024, help="length of the prompt that is checked")
    add_check_argument(parser)
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()
    if len(arguments.repeats) not in (1, len(arguments.seqlens)):
        parser.error(f"--repeats takes one number or one per length, got {len(arguments.repeats)}")
    if arguments.chunk_tokens is None:
        arguments.chunk_tokens = default_chunk_tokens(arguments.device)
    if arguments.xattention_threshold is None:
        arguments.xattention_threshold = arguments.density

    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary) if arguments.workdir is None else arguments.workdir.resolve()
        rows = run(arguments, workdir)
    print_rows(rows)
    finish("prefill", arguments, rows)


def run(arguments: argparse.Namespace, workdir: Path) -> list[dict[str, Any]]:
    """All rows, with checkpoints and prompts in ``workdir``."""
    path = arguments.model
    if path is None:
        path = write_checkpoint(workdir, arguments.shape, arguments.layers, max(arguments.seqlens), arguments.seed)
    model = load_model(path, attention="dense", device=arguments.device)
    print_environment()
    if arguments.model is None:
        print(describe_indexes(arguments))
    if arguments.model is None and arguments.budgets is None:
        print("selection: runs and is timed; its result is replaced by the drawn sets (per layer, chunk and head)")
    if arguments.check:
        check(arguments, path, model)
    peer = load_transformers(path, model.dtype, model.device) if arguments.transformers else None
    repeats = arguments.repeats if len(arguments.repeats) > 1 else arguments.repeats * len(arguments.seqlens)
    rows: list[dict[str, Any]] = []
    logits = {}
    for seqlen, count in zip(arguments.seqlens, repeats, strict=True):
        measured, logits[seqlen] = measure(arguments, model, peer, seqlen, count)
        rows += measured
        save("prefill", arguments, rows)
    prompts = workdir / "prompts.json"
    prompts.write_text(json.dumps({n: prompt(arguments, model, n).tolist() for n in arguments.seqlens}))
    peers: list[tuple[str, Path | None, str, list[str]]] = [
        ("vllm-cpu", arguments.vllm_python, "vllm_ttft.py", []),
        (
            "OpenVINO GenAI",
            arguments.openvino_python,
            "openvino_ttft.py",
            ["--modes", *arguments.openvino_modes, "--xattention-threshold", str(arguments.xattention_threshold)],
        ),
    ]
    if peer is None:
        print("transformers SDPA: not measured")
    del model, peer
    for name, python, script, extra in peers:
        if python is None:
            print(f"{name}: not measured (no interpreter given)")
        else:
            try:
                measured = peer_rows(arguments, python, script, path, prompts, extra)
            except RuntimeError as error:
                print(f"{name}: not measured: {error}")
                continue
            announce(measured)
            rows += measured
            save("prefill", arguments, rows)
    add_comparisons(rows, logits)
    return sorted(rows, key=lambda row: row["seqlen"])


if __name__ == "__main__":
    main()
