"""The ``qwen-sparse`` command: ``generate``, ``chat``, ``serve``, ``calibrate``, ``eval``, ``memory`` and ``demo``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .base.resources import available_memory, format_bytes
from .base.text import read_text
from .calibrate import BASE_PAIRS, calibrate, check_length, synthetic_tokens
from .engine.generate import generate_text, truncate_prompt
from .engine.memory import MemoryEstimate, estimate_memory
from .model.config import ModelConfig, parse_dtype
from .model.decoder import Decoder
from .model.loader import load_config, load_model, resolve_device
from .options import add_config, add_device, add_load_options, add_quantization, load, prepare

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 2 after one line about what is wrong; 130 after Ctrl-C. argparse itself exits with 2 on bad usage.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(chosen=argv[0] if argv else None).parse_args(argv)
    try:
        if getattr(args, "model", None) == "":  # as a path, it would be the working directory
            raise ValueError("--model must not be empty")
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError, OverflowError) as error:  # of memory, torch: RuntimeError
        message = " ".join(str(error).split())
        message = message or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
        print(f"qwen-sparse {args.command}: {message}", file=sys.stderr)
        return 2


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-sparse",
        description="Million-token Qwen prompts: Dual Chunk Attention and sparse prefill.",
    )
    parser.add_argument("--version", action="version", version=f"qwen-sparse {version('qwen-sparse')}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands.add_parser("generate", help="stream text from a checkpoint"))
    _add_chat(commands.add_parser("chat", help="ask questions about documents in the terminal"))
    _add_serve(commands.add_parser("serve", help="answer OpenAI's API over HTTP"), chosen == "serve")
    _add_calibrate(commands.add_parser("calibrate", help="search the sparse budgets of a checkpoint"))
    _add_memory(commands.add_parser("memory", help="print memory against context length and batch"))
    _add_eval(commands.add_parser("eval", help="measure accuracy and perplexity at each length"), chosen == "eval")
    _add_demo(commands.add_parser("demo", help="retrieve a passkey far beyond the trained length"), chosen == "demo")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_generate)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    prompt = parser.add_argument_group("prompt (--file and --prompt together: the file, a blank line, the prompt)")
    prompt.add_argument("--prompt", help="text")
    prompt.add_argument("--file", help="read text from a text or PDF file, - for standard input")
    prompt.add_argument("--chat", action="store_true", help="put the text through the model's chat template")
    prompt.add_argument("--system", help="system message; with --chat")
    prompt.add_argument(
        "--truncate", choices=("head", "tail", "both"), help="what to keep of a prompt over --max-seq-len"
    )
    _add_sampling(parser, max_new_tokens=256)
    _add_engine(parser)


def _add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help=f"most tokens to generate ({max_new_tokens})"
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus probability (1: all)")
    sampling.add_argument("--top-k", type=int, default=0, help="most likely tokens to draw from (0: all)")
    sampling.add_argument("--min-p", type=float, default=0.0, help="least share of the most likely token (0: all)")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    sampling.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    sampling.add_argument("--seed", type=int, help="repeat a sampled output")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    add_load_options(engine)
    engine.add_argument("--max-seq-len", type=int, help="most tokens, prompt and output together")
    engine.add_argument("--chunk-tokens", type=int, help="rows per prefill chunk")
    engine.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="prefill bar (default: on a terminal)"
    )


def _run_generate(args: argparse.Namespace) -> int:
    text = _prompt_text(args.prompt, args.file)
    if args.system is not None and not args.chat:
        raise ValueError("--system goes with --chat")
    model = _load(args)
    for piece in generate_text(model, _prompt_tokens(model, text, args), **_generation_options(args)):
        print(piece, end="", flush=True)
    print()
    return 0


def _load(args: argparse.Namespace) -> Decoder:
    prepare(args)
    return load(args, max_seq_len=args.max_seq_len)


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop": args.stop,
        "seed": args.seed,
        "chunk_tokens": args.chunk_tokens,
        "progress": sys.stderr.isatty() if args.progress is None else args.progress,
    }


def _prompt_text(prompt: str | None, file: str | None) -> str:
    if prompt is None and file is None:
        raise ValueError("give --prompt, --file or both")
    parts = []
    if file is not None:
        parts.append(_file_text(file))
    if prompt is not None:
        parts.append(prompt)
    return "\n\n".join(parts)


def _file_text(file: str) -> str:
    from .documents import read_document

    if file == "-":
        return read_text(file)
    document = read_document(file)
    if warning := document.warning():
        print(f"qwen-sparse: {warning}", file=sys.stderr)
    return document.text


def _source(args: argparse.Namespace) -> str:
    """The options that the prompt comes from."""
    return " and ".join(f"--{name}" for name in ("file", "prompt") if getattr(args, name) is not None)


def _prompt_tokens(model: Decoder, text: str, args: argparse.Namespace) -> Sequence[int]:
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        text = model.tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])
    tokens: Sequence[int] = model.tokenizer.encode(text)
    if not tokens:
        raise ValueError(f"{_source(args)} must have text, and has none")
    if args.truncate is None:
        return tokens
    if model.max_seq_len is None:
        raise ValueError("--truncate needs --max-seq-len: this model has no limit of its own")
    room = model.max_seq_len - args.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--truncate: --max-new-tokens must be less than --max-seq-len = {model.max_seq_len}, "
            f"got {args.max_new_tokens}"
        )
    return truncate_prompt(tokens, room, keep=args.truncate)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_chat)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id, with a chat template")
    parser.add_argument(
        "--file", action="append", default=[], metavar="DOC", help="text or PDF file to ask about; may be repeated"
    )
    parser.add_argument("--system", help="system message")
    _add_sampling(parser, max_new_tokens=1024)
    _add_engine(parser)


def _run_chat(args: argparse.Namespace) -> int:
    from . import chat
    from .documents import read_document

    documents = [read_document(file) for file in args.file]
    for document in documents:
        if warning := document.warning():
            print(f"qwen-sparse chat: {warning}", file=sys.stderr)
    return chat.run(_load(args), documents, system=args.system, **_generation_options(args))


def _add_serve(parser: argparse.ArgumentParser, chosen: bool) -> None:
    parser.set_defaults(run=_run_serve)
    if chosen:
        from .serve import command

        command.add_arguments(parser)


def _run_serve(args: argparse.Namespace) -> int:
    from .serve import command

    return command.run(args)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_calibrate)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--file", help="calibrate on the first tokens of a text file, - for standard input")
    text.add_argument("--synthetic", action="store_true", help="calibrate on a generated passkey prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the generated prompt (0)")
    parser.add_argument(
        "--length",
        type=int,
        required=True,
        help="tokens of the prompt that budgets are refined on; with --synthetic, 1024 at least",
    )
    parser.add_argument("--base-length", type=int, help="tokens that base pairs are compared on (32768, or --length)")
    parser.add_argument("--recall", type=float, default=0.95, help="attention that each head has to keep (0.95)")
    parser.add_argument("--step", type=int, default=2048, help="what V and S grow by at a time (2048)")
    parser.add_argument(
        "--pair",
        type=int,
        nargs=2,
        action="append",
        metavar=("V", "S"),
        help=f"base pair; may be repeated ({', '.join(f'{v} {s}' for v, s in BASE_PAIRS)})",
    )
    add_config(parser)
    add_device(parser)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--chunk-tokens", type=int, help="rows per prefill chunk")
    parser.add_argument("-o", "--output", type=Path, default=Path("sparse_attention_config.json"), help="file to write")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="bar (default: on a terminal)")


def _run_calibrate(args: argparse.Namespace) -> int:
    model = load_model(  # may have no budgets yet
        args.model, device=args.device, dtype=args.dtype, attention="dense", config=args.config
    )
    if args.synthetic:
        check_length(model, args.length, chunk_tokens=args.chunk_tokens)
        tokens = synthetic_tokens(model, args.length, args.seed)
        source: dict[str, object] = {"synthetic": "passkey", "seed": args.seed}
    else:
        text = _prompt_text(None, args.file)
        tokens = model.tokenizer.encode(text)
        if not tokens:
            raise ValueError(f"--file: {args.file} must have text, and has none")
        if not 1 <= args.length <= len(tokens):
            raise ValueError(f"--length must be in [1, {len(tokens)}], the tokens of {args.file}, got {args.length}")
        tokens = tokens[: args.length]
        source = {"file": Path(args.file).name, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    result = calibrate(
        model,
        tokens,
        args.output,
        recall=args.recall,
        base_length=args.base_length,
        pairs=BASE_PAIRS if args.pair is None else [(vertical, slash) for vertical, slash in args.pair],
        step=args.step,
        chunk_tokens=args.chunk_tokens,
        source=source,
        resume=args.resume,
        progress=sys.stderr.isatty() if args.progress is None else args.progress,
    )
    lowest = min(head.recall for layer in result.layers for head in layer)
    print(
        f"{args.output}: {len(tokens):,} tokens, recall {result.recall:.3f} in the mean and {lowest:.3f} at least, "
        f"{result.density:.1%} of attention computed"
    )
    return 0


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_memory)
    parser.add_argument("--model", required=True, help="checkpoint directory (config.json is enough) or hub id")
    parser.add_argument("--context", type=int, nargs="+", metavar="TOKENS", help="context lengths")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="sequences in the cache (1)")
    add_config(parser)
    add_quantization(parser)
    add_device(parser)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--chunk-tokens", type=int, help="rows per prefill chunk")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def _run_memory(args: argparse.Namespace) -> int:
    config = load_config(args.model, config=args.config)
    for context in args.context or ():
        config.check_length("--context", context)
    dtype = config.dtype if args.dtype == "auto" else parse_dtype(args.dtype, "--dtype")
    config = replace(config, dtype=dtype)
    device = resolve_device(args.device, dtype, must_exist=False)  # for a machine that is still to be bought, too
    wide = str(dtype).removeprefix("torch.")
    rows = [
        (
            context,
            batch,
            name,
            estimate_memory(
                config,
                context,
                batch=batch,
                kv_cache_dtype=kv,
                chunk_tokens=args.chunk_tokens,
                device=device,
                quantization=args.quantization,
            ),
        )
        for context in args.context or _contexts(config)
        for batch in args.batch
        for kv, name in (("auto", wide), ("int8", "int8"))
    ]
    kept = f"weights and activations in {wide}"
    if args.quantization is not None:
        kept = f"weights in {args.quantization}, activations in {wide}"
    if args.json:
        print(json.dumps([_memory_record(*row) for row in rows]))
    else:
        print(_memory_table(args.model, kept, device, rows))
    return 0


def _contexts(config: ModelConfig) -> list[int]:
    """Powers of four from 4096 to a million tokens with DCA, else to the longest prompt."""
    longest = config.longest or 2**20
    contexts = [4096 * 4**power for power in range(10) if 4096 * 4**power < longest]
    return [*contexts, longest]


def _memory_table(
    model: str, kept: str, device: torch.device, rows: Sequence[tuple[int, int, str, MemoryEstimate]]
) -> str:
    header = ("context", "batch", "KV cache", "weights", "KV", "activations", "indexes", "workspace", "total")
    cells = [
        (
            f"{context:,}",
            str(batch),
            kv,
            *(format_bytes(n) for n in (e.weights, e.kv_cache, e.activations, e.indexes, e.workspace, e.total)),
        )
        for context, batch, kv, e in rows
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *cells)
    ]
    absent = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    available = None if absent else available_memory(device)
    note = "" if available is None else f"; {format_bytes(available)} available here"
    return "\n".join((f"{model} on {device}, {kept}{note}", *lines))


def _memory_record(context: int, batch: int, kv_cache_dtype: str, estimate: MemoryEstimate) -> dict[str, int | str]:
    return {
        "context": context,
        "batch": batch,
        "kv_cache_dtype": kv_cache_dtype,
        "weights": estimate.weights,
        "kv_cache": estimate.kv_cache,
        "activations": estimate.activations,
        "indexes": estimate.indexes,
        "workspace": estimate.workspace,
        "total": estimate.total,
    }


def _add_eval(parser: argparse.ArgumentParser, chosen: bool) -> None:
    parser.set_defaults(run=_run_eval)
    if chosen:
        from .evaluate import command

        command.add_arguments(parser)


def _run_eval(args: argparse.Namespace) -> int:
    from .evaluate import command

    return int(command.run(args))


def _add_demo(parser: argparse.ArgumentParser, chosen: bool) -> None:
    parser.set_defaults(run=_run_demo)
    if chosen:  # the other commands do not pay for the import
        from . import demo

        demo.add_arguments(parser)


def _run_demo(args: argparse.Namespace) -> int:
    from . import demo

    return int(demo.run(args))


if __name__ == "__main__":
    sys.exit(main())
