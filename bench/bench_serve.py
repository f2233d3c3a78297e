"""What the serving engine costs and saves: batched decoding, a second question about a document, answers beside it.

    python bench/bench_serve.py --shape 0.5b --layers 8 --document 16384 --output bench/results/serve_cpu.json

The engine is asked directly, without HTTP, and decodes greedily but where a temperature is named. Three measurements:

- **decode**: requests of equal prompts' length at the same time; tokens per second of all, from the moment the last one
  has its first token to the moment the first one ends. Greedily, and with temperature 1, the server's default.
- **reuse**: time to first token of a question behind a document, cold and then with another question.
- **beside**: gaps between the tokens of an answer while the document of another request is read, and without one.

Random weights: prefill is dense.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from checkpoint import SHAPES, model_config, random_weights
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.serve.engine import Engine, EngineOptions
from qwen_sparse.serve.requests import Event, Failed, Finished, GenerationRequest, NewToken
from report import add_device_argument, add_output_argument, finish, print_environment, print_table, save


class Answer:
    """Hears a request, and knows when."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.tokens: list[float] = []
        self.last: Event | None = None
        self.started, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, NewToken):
            self.tokens.append(time.monotonic())
            self.started.set()
        elif isinstance(event, (Finished, Failed)):
            self.last = event
            self.started.set()
            self.ended.set()

    def finished(self) -> Finished:
        self.ended.wait()
        if not isinstance(self.last, Finished):
            raise RuntimeError(f"the request failed: {self.last}")
        return self.last

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.tokens)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--document", type=int, default=16384, help="tokens of the document")
    parser.add_argument("--question", type=int, default=64, help="tokens of a question")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="requests that decode together")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of their prompts")
    parser.add_argument("--new-tokens", type=int, default=64, help="of their answers")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="rows per prefill chunk, beside an answer")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "int8"))
    parser.add_argument("--seed", type=int, default=0)
    add_device_argument(parser)
    add_output_argument(parser)
    return parser.parse_args()


def ask(engine: Engine, tokens: list[int], new_tokens: int, temperature: float = 0.0) -> Answer:
    answer, sampler = Answer(), Sampler(temperature=temperature, seed=0)
    engine.submit(GenerationRequest(tokens, new_tokens, sampler, stop_token_ids=frozenset()), answer)
    return answer


def measure_decode(engine: Engine, arguments: argparse.Namespace, prompts: list[list[int]]) -> list[dict[str, Any]]:
    rows = []
    for batch, temperature in itertools.product(arguments.batches, (0.0, 1.0)):
        # The first ones wait for the prefill of the last: they get tokens enough to be there when all are.
        spare = [2 * (batch - number) for number in range(batch)]
        answers = [ask(engine, prompts[n], arguments.new_tokens + spare[n], temperature) for n in range(batch)]
        for answer in answers:
            answer.finished()
        together = max(answer.tokens[0] for answer in answers), min(answer.tokens[-1] for answer in answers)
        count = sum(together[0] < when <= together[1] for answer in answers for when in answer.tokens)
        rate = count / (together[1] - together[0])
        rows.append(
            {
                "measurement": "decode",
                "batch": batch,
                "temperature": temperature,
                "tokens": count,
                "tokens_per_second": rate,
            }
        )
    return rows


def measure_reuse(engine: Engine, document: list[int], questions: list[list[int]]) -> list[dict[str, Any]]:
    rows = []
    for name, question in zip(("cold", "second question"), questions, strict=True):
        answer = ask(engine, document + question, 1)
        stats = answer.finished().stats
        rows.append(
            {
                "measurement": "reuse",
                "case": name,
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.cached_tokens,
                "seconds": answer.tokens[0] - answer.began,
            }
        )
    return rows


def measure_beside(engine: Engine, document: list[int], prompt: list[int]) -> list[dict[str, Any]]:
    alone = ask(engine, prompt, 33)
    alone.finished()
    chunks = -(-len(document) // engine.chunk_tokens)
    answer = ask(engine, prompt, chunks + 33)
    answer.started.wait()
    other = ask(engine, document, 1)
    other.finished()
    answer.finished()
    beside = [gap for gap, when in zip(answer.gaps, answer.tokens[1:], strict=True) if when <= other.tokens[0]]
    rows = []
    for name, gaps in (("alone", alone.gaps), (f"beside a prompt of {len(document)} tokens", beside)):
        rows.append(
            {
                "measurement": "beside",
                "case": name,
                "chunk_tokens": engine.chunk_tokens,
                "median_gap": statistics.median(gaps),
                "largest_gap": max(gaps),
                "gaps": len(gaps),
            }
        )
    return rows


def make_engine(model: Decoder, arguments: argparse.Namespace, chunk_tokens: int | None) -> Engine:
    options = EngineOptions(
        max_model_len=arguments.document + 2 * arguments.question + 128 + arguments.new_tokens,
        chunk_tokens=chunk_tokens,
        max_num_seqs=max(arguments.batches),
    )
    engine = Engine(model, options)
    engine.start()
    return engine


def main() -> None:
    arguments = parse_arguments()
    print_environment()
    config = model_config(arguments.shape, arguments.layers, max_position_embeddings=2**20)
    weights = random_weights(config, arguments.device, arguments.seed)
    model = Decoder(
        config,
        weights,
        config.dtype,
        arguments.device,
        kv_cache_dtype=arguments.kv_cache_dtype,
        path=Path(str(files("qwen_sparse") / "assets" / "passkey")),  # for a tokenizer: texts do not matter here
    )
    generator = torch.Generator().manual_seed(arguments.seed)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(1, 256, (count,), generator=generator).tolist()

    prompts = [random_tokens(arguments.prompt) for _ in range(max(arguments.batches))]
    document, other = random_tokens(arguments.document), random_tokens(arguments.document)
    questions = [random_tokens(arguments.question) for _ in range(2)]

    engine = make_engine(model, arguments, None)
    ask(engine, prompts[0][:256], 4).finished()  # libraries are loaded, threads started
    rows = measure_decode(engine, arguments, prompts)
    save("serve", arguments, rows)
    rows += measure_reuse(engine, document, questions)
    save("serve", arguments, rows)
    engine.shutdown(drain=True)
    del engine  # its pool takes most of a GPU's memory: the next one's would not fit beside it
    engine = make_engine(model, arguments, arguments.chunk_tokens)
    rows += measure_beside(engine, other, prompts[0])
    engine.shutdown(drain=True)

    print_table(
        ["decode together", "temperature", "tokens/s"],
        [
            [str(row["batch"]), f"{row['temperature']:g}", f"{row['tokens_per_second']:.1f}"]
            for row in rows
            if row["measurement"] == "decode"
        ],
    )
    print_table(
        ["question", "tokens", "cached", "first token"],
        [
            [row["case"], f"{row['prompt_tokens']:,}", f"{row['cached_tokens']:,}", f"{row['seconds']:.2f} s"]
            for row in rows
            if row["measurement"] == "reuse"
        ],
    )
    print_table(
        ["answer", "median gap", "largest gap"],
        [
            [row["case"], f"{1e3 * row['median_gap']:.1f} ms", f"{1e3 * row['largest_gap']:.1f} ms"]
            for row in rows
            if row["measurement"] == "beside"
        ],
    )
    finish("serve", arguments, rows)


if __name__ == "__main__":
    main()
