"""Sparse prefill on a released model, beside dense attention: perplexity, KL, recall and answers by method and length.

    make released
    python bench/bench_released.py --output bench/results/released_cpu.json
    python bench/bench_released.py --parts probes --lengths 16384 32768 --output bench/results/released_probes_cpu.json

Methods are ``dense``, ``groups:C`` (block groups of coverage C) and ``vertical-slash:V:S`` (V columns and S distances
for every head, voted by the last 64 rows of a prefill chunk). All rows of every layer are prefilled by the method, but
those of the prompt's last block, which is dense.

Prompts beyond --trained tokens are read with each of --ropes: ``dca:CHUNK:LOCAL`` (Dual Chunk Attention), ``yarn``
(with the factor that reaches their length) or ``plain``.

Parts: ``tail``, what the model predicts of the last tokens of a prompt: perplexity and, where ``dense`` is among the
methods, KL and top token against it;
``recall``, what a method keeps of the attention of all rows and layers, with the hidden states of dense attention;
``probes``, facts in one text that is prefilled once, asked for one by one; ``decode``, the time of greedy decode steps
behind the prompt, whatever the method.

Rows that the output already holds are not measured again (--resume), so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import texts
from qwen_sparse import load_model, prefill
from qwen_sparse.calibrate import measure_budgets
from qwen_sparse.engine.likelihood import last_hidden
from qwen_sparse.engine.memory import default_chunk_tokens
from qwen_sparse.evaluate import evaluate_probes
from qwen_sparse.evaluate.perplexity import Predictions, divergence
from qwen_sparse.model.config import DualChunkConfig, SparseConfig
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.quantized import QUANTIZATIONS
from qwen_sparse.model.stats import ForwardStats
from report import add_device_argument, add_output_argument, finish, print_table, save

ROOT = Path(__file__).parents[1]
TEXTS = {"code": texts.code, "prose": texts.prose}
METHODS = [
    "dense",
    *(f"groups:{c}" for c in (0.8, 0.87, 0.92, 0.95)),
    *(f"vertical-slash:{b}" for b in ("500:700", "1000:1500", "2000:3000")),
]
KEY = ("part", "text", "length", "rope", "method", "quantization")
PLAIN = "plain"
PARTS = ["tail", "recall", "probes", "decode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build/released/qwen2.5-coder-0.5b", help="directory")
    parser.add_argument("--parts", nargs="+", default=["tail", "recall"], choices=PARTS)
    parser.add_argument("--texts", nargs="+", default=["code", "prose"], choices=list(TEXTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tail", type=int, default=2048, help="tokens that perplexity and KL are of")
    parser.add_argument("--probes", type=int, default=20, help="facts in a text")
    parser.add_argument("--trained", type=int, default=32768, help="longest prompt of the model's own rotations")
    parser.add_argument("--ropes", nargs="+", default=["dca:24576:4096"], metavar="ROPE", help="of longer prompts")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "int8"])
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the weights")
    parser.add_argument("--steps", type=int, default=32, help="of decode, after as many that are not timed")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --output holds")
    add_device_argument(parser)
    add_output_argument(parser)
    arguments = parser.parse_args()

    model = load_model(
        arguments.model,
        device=arguments.device,
        dtype="bfloat16",
        kv_cache_dtype=arguments.kv_cache_dtype,
        max_seq_len=2**21,
        quantization=arguments.quantization,
    )
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.resume and arguments.output.exists() else []
    done = {tuple(row[name] for name in KEY) for row in rows}
    for row in measured(model, arguments, done):
        rows.append({**row, "model": arguments.model.name, "python": texts.PYTHON})
        print(json.dumps({name: value for name, value in row.items() if name not in ("layers", "wrong")}), flush=True)
        save("released", arguments, rows)
    columns = ["density", "perplexity", "KL", "same top", "recall", "found", "tokens/s"]
    print_table([*KEY, *columns], [cells(row) for row in rows])
    finish("released", arguments, rows)


def cells(row: dict[str, Any]) -> list[str]:
    formats = {"density": ".1%", "perplexity": ".3f", "kl": ".4f", "same_top": ".1%", "recall": ".3f", "found": "d"}
    formats["tokens_per_second"] = ".1f"
    return [*(str(row[name]) for name in KEY), *(format(row[n], f) if n in row else "" for n, f in formats.items())]


def measured(model: Decoder, arguments: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows that are not done, from the shortest length on."""
    for length, text in itertools.product(sorted(arguments.lengths), arguments.texts):
        tokens = model.tokenizer.encode(TEXTS[text]())[:length]
        if len(tokens) < length:
            print(f"{text} has only {len(tokens)} tokens: {length} not measured", flush=True)
            continue
        for rope, part in itertools.product(
            [PLAIN] if length <= arguments.trained else arguments.ropes, arguments.parts
        ):
            own = arguments.quantization
            missing = [m for m in arguments.methods if (part, text, length, rope, m, own) not in done]
            if missing:
                of_part = {"tail": tails, "recall": recalls, "probes": probes, "decode": decodes}[part]
                for row in of_part(with_rope(model, rope, length, arguments), text, tokens, missing, arguments):
                    yield {"part": part, "text": text, "length": length, "rope": rope, "quantization": own, **row}


def with_rope(model: Decoder, rope: str, length: int, arguments: argparse.Namespace) -> Decoder:
    name, *sizes = rope.split(":")
    config = replace(model.config, sparse=None)
    if name == "dca":
        config = replace(config, dual_chunk=DualChunkConfig(*map(int, sizes), arguments.trained))
    elif name == "yarn":
        factor = length / arguments.trained
        config = replace(
            config, rope=replace(config.rope, factor=factor, original_max_position_embeddings=arguments.trained)
        )
    elif name != PLAIN:
        raise ValueError(f"--ropes must be dca:CHUNK:LOCAL, yarn or plain, got {rope!r}")
    return model.with_options(config=config)


def by_method(model: Decoder, method: str) -> Decoder:
    """The model that prefills by a method."""
    name, *values = method.split(":")
    if name == "dense":
        return model.with_options(attention="dense")
    if name == "groups":
        return model.with_options(attention="sparse", coverage=float(values[0]))
    if name != "vertical-slash":
        raise ValueError(f"--methods must be dense, groups:C or vertical-slash:V:S, got {method!r}")
    config = model.config
    sizes = [((int(value),) * config.num_heads,) * config.num_layers for value in values]
    return model.with_options(config=replace(config, sparse=SparseConfig(*sizes)), attention="sparse")


@torch.inference_mode()
def predict(model: Decoder, tokens: list[int], tail: int) -> tuple[Predictions, ForwardStats]:
    """Of the last ``tail`` tokens, as evaluate.perplexity.predict_tail, and what it cost."""
    prompt, stats = torch.tensor(tokens, device=model.device), ForwardStats(model.device)
    sparse, chunk_tokens = model.prefills_sparse(len(tokens)), default_chunk_tokens(model.device)
    cache = model.new_cache(len(tokens))
    hidden = torch.cat(
        list(last_hidden(model, prompt, tail + 1, cache, sparse=sparse, chunk_tokens=chunk_tokens, stats=stats))
    )
    stats.finish()
    none = torch.empty(0, model.config.vocab_size, device=model.device)
    return Predictions(model, none, hidden[:-1], prompt[-tail:], stats.attended_pairs / stats.causal_pairs), stats


def tails(
    model: Decoder, text: str, tokens: list[int], methods: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    reference = None
    compared = ["dense"] * ("dense" in arguments.methods)
    for method in [*compared, *(m for m in methods if m != "dense")]:
        began = time.perf_counter()
        found, stats = predict(by_method(model, method), tokens, arguments.tail)
        seconds = time.perf_counter() - began
        if method == "dense":
            reference = found
        if method not in methods:
            continue
        row = {
            "method": method,
            "density": found.density,
            "kept_estimate": stats.kept,
            "perplexity": float(torch.tensor(found.loss()).exp()),
            "seconds": seconds,
            "phases": stats.seconds,
        }
        if reference is not None:
            far = divergence(reference, found)
            row |= {"kl": far.kl, "same_top": far.same_top}
        yield row


def recalls(
    model: Decoder, text: str, tokens: list[int], methods: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for method in methods:
        if method == "dense":
            continue
        runner = by_method(model, method)
        assert runner.config.sparse is not None
        found = measure_budgets(runner, tokens, runner.config.sparse)
        by_layer = [[head.recall for head in layer] for layer in found.layers]
        yield {
            "method": method,
            "density": found.density,
            "recall": found.recall,
            "lowest_recall": min(map(min, by_layer)),
            "layers": [sum(layer) / len(layer) for layer in by_layer],
        }


def decodes(
    model: Decoder, text: str, tokens: list[int], methods: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Seconds of a step, and the bytes of weights that it reads."""
    for method in methods:
        cache = prefill(by_method(model, method), tokens).cache
        steps = []
        for _ in range(2 * arguments.steps):
            began = time.perf_counter()
            next_tokens = torch.tensor(tokens[-1:], device=model.device)
            logits = model.forward(next_tokens, cache)
            assert logits is not None
            tokens = [*tokens, int(logits.argmax())]
            steps.append(time.perf_counter() - began)
        timed = sorted(steps[arguments.steps :])
        yield {
            "method": method,
            "seconds": timed[len(timed) // 2],
            "tokens_per_second": 1 / timed[len(timed) // 2],
            "p10": timed[len(timed) // 10],
            "p90": timed[-1 - len(timed) // 10],
            "weight_bytes": model.weights.nbytes,
        }


def probes(
    model: Decoder, text: str, tokens: list[int], methods: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        hay = Path(directory) / f"{text}.txt"
        hay.write_text(TEXTS[text](), encoding="utf-8")
        for method in methods:
            runner = by_method(model, method)
            mode = "dca" if model.config.dual_chunk is not None else "rope"
            name, _, value = method.partition(":")
            mode += {"dense": "", "groups": f"+coverage{value}", "vertical-slash": "+sparse"}[name]
            found = list(evaluate_probes(runner, arguments.probes, [mode], [len(tokens)], hay=str(hay), chat=True))
            yield {
                "method": method,
                "density": found[0]["density"],
                "tokens": found[0]["tokens"],
                "questions": len(found),
                "found": sum(row["found"] for row in found),
                "by_depth": "".join("x" if row["found"] else "." for row in found),
                "seconds": found[0]["seconds"],
                "answer_seconds": found[0]["answer_seconds"],
                "wrong": [row["wrong"] for row in found if row["wrong"]],
            }


if __name__ == "__main__":
    main()
