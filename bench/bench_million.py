"""A prompt of a million tokens on one GPU, end to end: time to first token by phase, memory, decode; beside dense.

    python bench/bench_million.py --device cuda --time-limit 480 --output bench/results/h200/million.json
    python bench/bench_million.py --device cuda --budgets sparse_attention_config.json --output ...
    python bench/bench_million.py --shape tiny --tokens 2048 --chunk-tokens 512 --chunk-size 768 --local-size 256 \\
        --density 0.5 --new-tokens 8                                             # on a CPU, in seconds

A model in the shape of Qwen2.5-7B-Instruct-1M, with random weights made on the device, takes a random prompt in prefill
chunks, as qwen_sparse.prefill does, into an int8 cache; then decode steps follow (captured in a CUDA graph on a GPU).
Selection is real and its time counts. Budgets are those of a file (--budgets, published format), or the same for every
head, such that selection on these weights attends about --density of the causal pairs: find_budgets.py says how, and
what selection finds on random weights. The density in the output is what the attention kernels counted. Index sets are
as large for the first tokens as for the last, as with published budgets: prefill chunks start dense and get sparser.

Time to first token is from the first prefill chunk, with the cache reserved and the model warm, to the last token's
logits. "One layer" is the last prefill chunk's attention in one layer, beside our dense kernel and torch's SDPA
(one_layer.py). A dense prefill is measured at --dense-tokens. For the whole prompt its time is extrapolated, and
labelled so: "rule" in the JSON says how. In the last layer only the last row attends (prefill needs no other), in every
figure.

No figure is printed before prefill and decode of the same weights agree with the reference (check_model.py). After
--time-limit seconds no further prefill chunk or figure is begun: the prefill is then marked incomplete, its figures are
of the tokens that it reached, and the figures left out are listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from check_model import check_model
from checkpoint import SHAPES, model_config, random_weights
from find_budgets import find_budgets
from indexes import read_budgets, with_budgets
from one_layer import Chunk, Row, extrapolated, measure_layer
from qwen_sparse.base.resources import format_bytes, peak_resident_memory
from qwen_sparse.engine.decoding import decode
from qwen_sparse.engine.memory import default_chunk_tokens, estimate_memory
from qwen_sparse.engine.prefill import check_request, chunk_ends
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.config import ModelConfig, SparseConfig
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.kv_cache import PagedKVCache, kv_cache_bytes
from qwen_sparse.model.stats import ForwardStats
from qwen_sparse.testing import Timing
from report import (
    add_check_argument,
    add_device_argument,
    add_output_argument,
    finish,
    print_environment,
    print_table,
    save,
    skip,
    time_cells,
)

ROPE_THETA = 1e7  # of the 1M models
STEPS_BEFORE_TIMING = 3  # decode: the first runs as it is, the second is captured, and the host looks one step back
MIN_NEW_TOKENS = STEPS_BEFORE_TIMING + 3


class Clock:
    """Time since the start, and whether there is any left for another piece of work."""

    def __init__(self, limit: float | None) -> None:
        self._start, self._limit = time.perf_counter(), math.inf if limit is None else limit

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether work that is expected to take this long may begin."""
        return self.elapsed + seconds < self._limit


def make_model(arguments: argparse.Namespace) -> Decoder:
    """The model, with weights on the device and no budgets yet."""
    config = model_config(
        arguments.shape,
        arguments.layers,
        rope_theta=ROPE_THETA,
        max_position_embeddings=arguments.tokens + arguments.new_tokens,
        dual_chunk_attention_config={
            "chunk_size": arguments.chunk_size,
            "local_size": arguments.local_size,
            "original_max_position_embeddings": arguments.chunk_size,
        },
    )
    weights = random_weights(config, arguments.device, arguments.seed)
    return Decoder(config, weights, config.dtype, arguments.device, kv_cache_dtype=arguments.kv_cache_dtype)


def choose_budgets(arguments: argparse.Namespace, model: Decoder) -> tuple[SparseConfig, Row]:
    """Those of the file, or those found for the density; and what is to say about them."""
    config = model.config
    if arguments.budgets is None:
        found = find_budgets(model, arguments.tokens, arguments.chunk_tokens, arguments.density, arguments.seed)
        print(
            f"budgets: {found.vertical_size:,} columns and {found.slash_size:,} distances for every head; of "
            f"{found.keys:,} keys that is {found.density:.1%} in {found.runs:,.0f} runs of slashes, "
            f"{found.columns_outside_runs:.0%} of the columns outside of them"
        )
        return found.for_model(config), {"figure": "budgets", **dataclasses.asdict(found)}
    sparse = read_budgets(arguments.budgets, config.num_layers, config.num_heads)
    sizes = {"vertical_size": sparse.vertical_sizes, "slash_size": sparse.slash_sizes}
    means = {name: sum(map(sum, values)) / sum(map(len, values)) for name, values in sizes.items()}
    print("budgets: of the file; means {vertical_size:,.0f} columns and {slash_size:,.0f} distances".format(**means))
    return sparse, {"figure": "budgets", **means}


def run_prefill(
    model: Decoder,
    tokens: Tensor,
    cache: PagedKVCache,
    chunk_tokens: int,
    *,
    sparse: bool,
    clock: Clock | None = None,
) -> tuple[list[Chunk], Tensor | None]:
    """Prefill an empty cache, chunk by chunk.

    Args:
        model: the model.
        tokens: the prompt ``[n]``, on the model's device.
        cache: holds what was prefilled afterwards.
        chunk_tokens: rows per prefill chunk.
        sparse: vertical-slash attention; else dense.
        clock: stop before a chunk that it does not allow, taking it for as long as the one before; lines tell of the
            progress. None: run to the end, silently.

    Returns:
        The chunks that ran, and the last token's logits ``[vocab]``; None if it was not reached.
    """
    cache.truncate(0)
    chunks: list[Chunk] = []
    logits, start, total = None, 0, len(tokens)
    try:
        for end in chunk_ends(0, total, chunk_tokens):
            if clock is not None and chunks and not clock.allows(chunks[-1].seconds):
                break
            stats, begin = ForwardStats(model.device), time.perf_counter()
            logits = model.forward(
                tokens[start:end],
                cache,
                prompt_len=total,
                sparse=sparse,
                output="last" if end == total else "none",
                stats=stats,
            )
            stats.finish()
            seconds = time.perf_counter() - begin
            phases: dict[str, float] = {**stats.seconds}
            chunks.append(Chunk(end - start, end, seconds, phases, stats.attended_pairs, stats.causal_pairs))
            if clock is not None:
                print(f"prefill: {end:,} of {total:,} tokens, chunk {seconds:.2f} s", flush=True)
            start = end
    finally:
        cache.pool.release_workspace()
    return chunks, logits


def linear_flop(config: ModelConfig, rows: int, outputs: int) -> int:
    """Of the matrix products of one prefill chunk; in the last layer only ``outputs`` rows go on behind K and V."""
    heads = config.num_heads * config.head_dim
    qkv = config.hidden_size * (heads + 2 * config.num_kv_heads * config.head_dim)
    behind = config.hidden_size * (heads + 3 * config.intermediate_size)
    behind_rows = (config.num_layers - 1) * rows + outputs
    return 2 * (
        config.num_layers * rows * qkv + behind_rows * behind + outputs * config.vocab_size * config.hidden_size
    )


def prefill_row(name: str, model: Decoder, chunks: list[Chunk], total: int) -> Row:
    """Figures of a prefill."""
    config, reached = model.config, chunks[-1].end
    seconds = sum(chunk.seconds for chunk in chunks)
    phases = {phase: sum(chunk.phases[phase] for chunk in chunks) for phase in chunks[0].phases}
    attended, causal = (sum(getattr(chunk, name) for chunk in chunks) for name in ("attended_pairs", "causal_pairs"))
    flop = sum(linear_flop(config, chunk.rows, int(chunk.end == total)) for chunk in chunks)
    per_pair = 4 * config.head_dim  # FLOP
    return {
        "figure": "prefill",
        "attention": name,
        "tokens": total,
        "reached": reached,
        "complete": reached == total,
        "seconds": seconds,
        "phases": phases,
        "outside_phases": seconds - sum(phases.values()),
        "tokens_per_second": reached / seconds,
        "density": attended / causal,
        "attention_executed_gflops": per_pair * attended / phases["attention"] / 1e9,
        "attention_dense_equivalent_gflops": per_pair * causal / phases["attention"] / 1e9,
        "linear_gflops": flop / phases["linear"] / 1e9,
        "chunks": [dataclasses.asdict(chunk) for chunk in chunks],
    }


@contextmanager
def memory_peak(device: torch.device, row: Row) -> Iterator[None]:
    """Adds to a row what the block took at most, in bytes: weights and cache included."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what came before is not to count as reserved
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        row["peak_allocated"] = torch.cuda.max_memory_allocated(device)
        row["peak_reserved"] = torch.cuda.max_memory_reserved(device)
        row["device_used_afterwards"] = whole - free
    else:
        row["peak_resident"] = peak_resident_memory()  # of the process, since its start


def measure_prefill(
    arguments: argparse.Namespace, model: Decoder, tokens: Tensor, cache: PagedKVCache, clock: Clock
) -> tuple[list[Chunk], Tensor | None, Row]:
    """The sparse prefill of the whole prompt, after one chunk to warm up."""
    memory: Row = {}
    with memory_peak(model.device, memory):
        run_prefill(model, tokens[: arguments.chunk_tokens], cache, arguments.chunk_tokens, sparse=True)
        chunks, logits = run_prefill(model, tokens, cache, arguments.chunk_tokens, sparse=True, clock=clock)
    estimate = estimate_memory(
        model.config,
        arguments.tokens + arguments.new_tokens,
        kv_cache_dtype=model.kv_cache_dtype,
        dtype=model.dtype,
        chunk_tokens=arguments.chunk_tokens,
        device=model.device,
    )
    memory["estimate"] = {**dataclasses.asdict(estimate), "total": estimate.total}
    row = prefill_row("vertical-slash", model, chunks, len(tokens)) | {"memory": memory}
    if logits is not None and not logits.isfinite().all():
        raise AssertionError("the logits of the last token are not finite")
    return chunks, logits, row


def measure_decode(model: Decoder, cache: PagedKVCache, logits: Tensor | None, new_tokens: int) -> Row:
    """Greedy tokens behind the prompt; from arbitrary logits where its end was not reached."""
    vocabulary, device, keys = model.config.vocab_size, model.device, cache.seqlen
    logits = torch.zeros(vocabulary, device=device) if logits is None else logits
    seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)
    memory: Row = {}
    with memory_peak(device, memory):
        steps = decode(model, cache, logits[None], seen, sampler=Sampler(), max_new_tokens=new_tokens)
        times = [time.perf_counter() for _ in steps]
    cache.truncate(keys)
    seconds = Timing.of([after - before for before, after in itertools.pairwise(times)][STEPS_BEFORE_TIMING:])
    weights = model.weights
    read = weights.nbytes - (0 if model.config.tie_word_embeddings else weights.embedding.nbytes)
    read += kv_cache_bytes(model.config, keys, cache.pool.storage_dtype)
    return {
        "figure": "decode",
        "keys": keys,
        "seconds": vars(seconds),
        "tokens_per_second": 1 / seconds.median,
        "bytes": read,
        "gigabytes_per_second": read / seconds.median / 1e9,
        "memory": memory,
    }


def run(arguments: argparse.Namespace, clock: Clock) -> tuple[list[Row], list[Row]]:
    """All rows, and those of figures that were left out."""
    model = make_model(arguments)
    rows = check_model(model, arguments.seed) if arguments.check else []
    sparse, described = choose_budgets(arguments, model)
    model = with_budgets(model, sparse)
    rows.append(described)
    check_request(
        model,
        arguments.tokens,
        cache=None,
        chunk_tokens=arguments.chunk_tokens,
        max_new_tokens=arguments.new_tokens,
    )
    cache = model.new_cache(arguments.tokens + arguments.new_tokens)
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    tokens = torch.randint(model.config.vocab_size, (arguments.tokens,), generator=generator, device=model.device)
    chunks, logits, prefilled = measure_prefill(arguments, model, tokens, cache, clock)
    rows.append(prefilled)
    skipped: list[Row] = []
    save("million", arguments, rows)

    def wanted(figure: str, unwanted: bool) -> bool:
        if not unwanted and not clock.allows():
            skip(figure, TimeoutError(f"{clock.elapsed:.0f} s had passed, --time-limit was reached"), skipped)
            return False
        return not unwanted

    if wanted("decode", arguments.skip_decode):
        rows.append(measure_decode(model, cache, logits, arguments.new_tokens))
        save("million", arguments, rows, skipped)
    if wanted("one layer", arguments.skip_dense and arguments.skip_sdpa):
        layers = measure_layer(arguments, model, cache, chunks[-1], skipped)
        rows += layers + [extrapolated(prefilled, row) for row in layers if "causal_pairs" in row]
        save("million", arguments, rows, skipped)
    if wanted("dense prefill", arguments.skip_dense):
        dense_tokens = tokens[: arguments.dense_tokens]
        dense_chunks, _ = run_prefill(model, dense_tokens, cache, arguments.chunk_tokens, sparse=False)
        rows.append(prefill_row("dense", model, dense_chunks, len(dense_tokens)))
    return rows, skipped


def print_rows(rows: list[Row]) -> None:
    """Tables for people."""
    by_figure: dict[str, list[Row]] = {}
    for row in rows:
        by_figure.setdefault(row["figure"], []).append(row)
    for row in by_figure["prefill"]:
        print_prefill(row)
    for row in by_figure.get("decode", []):
        print(
            f"\ndecode at {row['keys']:,} keys: {row['tokens_per_second']:.1f} tokens/s "
            f"({', '.join(time_cells(row['seconds']))} per token: median, p10, p90), "
            f"{row['gigabytes_per_second']:,.0f} GB/s of weights and cache"
        )
    if layers := by_figure.get("one layer"):
        print(f"\none layer, {layers[0]['rows']:,} rows, {layers[0]['keys']:,} keys")
        print_table(
            ["kernel", "density", "median", "TFLOP/s", "x SDPA"],
            [
                [
                    row["kernel"],
                    f"{row['density']:.1%}",
                    f"{1e3 * row['seconds']['median']:,.1f} ms",
                    f"{row['executed_gflops'] / 1e3:,.3g}",
                    "" if row["speedup_over_sdpa"] is None else f"{row['speedup_over_sdpa']:.2f}",
                ]
                for row in layers
            ],
        )
    for row in by_figure.get("dense prefill", []):
        print(
            f"extrapolated: with {row['attention']} attention {row['reached']:,} tokens would take "
            f"{row['seconds']:,.1f} s, {row['speedup_of_sparse']:.1f} times as long; "
            f"attention alone {row['attention_speedup_of_sparse']:.1f} times"
        )


def print_prefill(row: Row) -> None:
    """A prefill by phase, and its memory."""
    reached = "" if row["complete"] else f", INCOMPLETE: stopped at {row['reached']:,}"
    print(f"\n{row['attention']} prefill, {row['tokens']:,} tokens{reached}; density {row['density']:.2%}, counted")
    rates = {
        "linear": f"{row['linear_gflops'] / 1e3:,.3g} TFLOP/s",
        "attention": f"{row['attention_executed_gflops'] / 1e3:,.3g} TFLOP/s executed",
    }
    parts = {**row["phases"], "outside": row["outside_phases"], "all": row["seconds"]}
    print_table(
        ["phase", "seconds", "share", "rate"],
        [
            [
                name if name != "all" else "TTFT" if row["complete"] else "so far",
                f"{seconds:.3f}",
                f"{seconds / row['seconds']:.1%}",
                rates.get(name, f"{row['tokens_per_second']:,.0f} tokens/s" if name == "all" else ""),
            ]
            for name, seconds in parts.items()
        ],
    )
    if "memory" in row:
        memory = {name: size for name, size in row["memory"].items() if name != "estimate"}
        estimate = row["memory"]["estimate"]
        print("memory: " + ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in memory.items()))
        parts = {name.replace("_", " "): format_bytes(size) for name, size in estimate.items() if name != "total"}
        listed = ", ".join(f"{name} {size}" for name, size in parts.items())
        print(f"estimated: {format_bytes(estimate['total'])} ({listed})")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", choices=list(SHAPES), help="sizes of this Qwen2.5 model")
    parser.add_argument("--layers", type=int, help="keep this many layers of the shape (2 or more); all when absent")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the prompt")
    parser.add_argument("--chunk-tokens", type=int, help="rows of a prefill chunk; the device's default when absent")
    parser.add_argument(
        "--chunk-size", type=int, default=262144, help="of Dual Chunk Attention; also the trained length"
    )
    parser.add_argument("--local-size", type=int, default=8192, help="of Dual Chunk Attention")
    parser.add_argument("--kv-cache-dtype", default="int8", choices=["int8", "bfloat16"])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--density", type=float, default=0.08, help="find budgets for about this (default: 0.08)")
    source.add_argument("--budgets", type=Path, help="per-head budgets of this file (published format)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--dense-tokens", type=int, default=131072, help="length of the dense prefill that is measured")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of one layer's kernels")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing further is begun; none if absent")
    for what, leaves_out in (("dense", "our dense mode"), ("sdpa", "torch's attention"), ("decode", "decode steps")):
        parser.add_argument(f"--skip-{what}", action="store_true", help=f"leave out {leaves_out}")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompt")
    add_check_argument(parser)
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()
    for name, least in (("layers", 2), ("tokens", 1), ("chunk_tokens", 1), ("dense_tokens", 1), ("repeats", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    if arguments.new_tokens < MIN_NEW_TOKENS:
        parser.error(f"--new-tokens must be >= {MIN_NEW_TOKENS} (the first are not timed), got {arguments.new_tokens}")
    if not 0 < arguments.density <= 1:
        parser.error(f"--density must be in (0, 1], got {arguments.density}")
    if arguments.device.type == "cuda" and arguments.device.index is None:
        arguments.device = torch.device("cuda", torch.cuda.current_device())
    if arguments.chunk_tokens is None:
        arguments.chunk_tokens = default_chunk_tokens(arguments.device)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    print_environment()
    rows, skipped = run(arguments, Clock(arguments.time_limit))
    print_rows(rows)
    finish("million", arguments, rows, skipped)


if __name__ == "__main__":
    main()
