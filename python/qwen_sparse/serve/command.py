"""``qwen-sparse serve``. Whatever can be refused is refused before the weights are read."""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import os
import re
import socket
import sys
from fractions import Fraction
from pathlib import Path

from ..base.resources import available_memory
from ..engine.memory import weight_bytes
from ..model.config import ModelConfig, parse_dtype
from ..model.loader import check_quantization, resolve_device, resolve_directory
from ..model.tokenizer import Tokenizer
from ..options import add_load_options, load, prepare
from .plan import EngineOptions, plan_pages

__all__ = ["add_arguments", "run", "size"]

API_KEY_VARIABLE = "QWEN_SPARSE_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_COUNTS = ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "max_queue", "kv_cache_memory_bytes")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^\sA-Z/?#@:\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``qwen-sparse serve``; the names are vLLM's where it has them."""
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    network.add_argument("--port", type=int, default=8000, help="8000; 0 takes a free one")
    network.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"let in who sends it; may be repeated. The variable {API_KEY_VARIABLE} keeps it out of process lists",
    )
    network.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of web pages that may use the API (https://example.org), * for all; may be repeated",
    )
    network.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names for 'model' in requests (the hub id, or the directory's name)",
    )
    network.add_argument(
        "--ignore-unknown-parameters",
        action="store_true",
        help="answer requests whose parameters this server does not know as if those were not there",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-model-len", type=size, metavar="TOKENS", help="longest sequence, prompt and output: 131072, 128K or 1m"
    )
    engine.add_argument("--max-num-batched-tokens", type=size, metavar="TOKENS", help="rows per prefill chunk")
    engine.add_argument("--max-num-seqs", type=int, default=16, metavar="N", help="sequences at the same time (16)")
    engine.add_argument("--max-queue", type=int, default=64, metavar="N", help="requests that may wait (64)")
    engine.add_argument(
        "--kv-cache-memory-bytes", type=size, metavar="BYTES", help="size of the KV cache: 8000000000, 8GB or 8GiB"
    )
    engine.add_argument(
        "--memory-utilization",
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of available memory to use (0.9)",
    )
    engine.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt anew")
    engine.add_argument(
        "--enable-auto-tool-choice", action="store_true", help="vLLM's switch for tools, which are always on here"
    )
    engine.add_argument(
        "--tool-call-parser", choices=["hermes"], default="hermes", help="vLLM's name of how Qwen writes calls (hermes)"
    )
    add_load_options(engine)


def size(text: str) -> int:
    """A number with a unit, by vLLM's rule: k, m and g are powers of 1000, K, M and G of 1024; of bytes, KB, MB and GB
    are powers of 1000 and KiB, MiB and GiB of 1024.

    Raises:
        argparse.ArgumentTypeError: anything else, or no whole number.
    """
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?:([kmg])|([KMG])|([kKMG])B|([KMG])iB)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number such as 131072, 128K, 1m, 8GB or 8GiB, got {text!r}")
    number, thousands, binary, decimal_bytes, binary_bytes = match.groups()
    base, unit = (1000, thousands or decimal_bytes) if thousands or decimal_bytes else (1024, binary or binary_bytes)
    value = Fraction(number) * base ** (1 + "kmg".index(unit.lower()) if unit else 0)
    if value.denominator != 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}, which is {float(value)}")
    return int(value)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal.

    Returns:
        0 after the first SIGINT or SIGTERM, when all requests have been answered; 128 + its number after the second.

    Raises:
        ValueError, OSError, MemoryError: why it cannot start.
    """
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                "serving needs the packages of an extra: pip install --no-build-isolation '.[serve]' in a clone of "
                f"qwen_sparse ({error})"
            ) from error
    prepare(args)
    for name in _COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    for origin in args.allowed_origin:
        _check_origin(origin)
    options = EngineOptions(
        max_model_len=args.max_model_len,
        chunk_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_queue=args.max_queue,
        kv_cache_memory=args.kv_cache_memory_bytes,
        memory_utilization=args.memory_utilization,
        prefix_caching=not args.no_prefix_caching,
    )
    keys = _api_keys(args.api_key)
    names = _served_names(args.model, args.served_model_name)
    listening = _bind(args.host, args.port, protected=bool(keys))
    with listening:
        _check_model(args, options)
        return _serve(args, options, listening, keys, names)


def _serve(
    args: argparse.Namespace,
    options: EngineOptions,
    listening: socket.socket,
    keys: tuple[str, ...],
    names: tuple[str, ...],
) -> int:
    from .api import Settings, create_app
    from .engine import Engine
    from .server import make_server

    engine = Engine(load(args), options)
    settings = Settings(
        served_names=names,
        api_keys=keys,
        allowed_origins=tuple(args.allowed_origin),
        ignore_unknown_parameters=args.ignore_unknown_parameters,
    )
    server = make_server(create_app(engine, settings))
    server.ready = f"ready at {_url(listening)}/v1: {names[0]}, up to {engine.max_model_len} tokens"
    engine.start()
    server.run(sockets=[listening])
    if server.force_exit:  # the engine is in the middle of a step, which may take long and cannot be interrupted
        sys.stdout.flush()
        os._exit(128 + (server.first_signal or 0))
    engine.shutdown(drain=True)
    return 0


def _check_model(args: argparse.Namespace, options: EngineOptions) -> None:
    """What would fail once the weights are loaded, and can be known before."""
    from .generation import SamplingDefaults

    directory = resolve_directory(args.model, files=("*.json", "*.jinja"))
    config = ModelConfig.from_directory(directory, config=args.config)
    if args.coverage is not None:
        config = config.with_coverage(args.coverage)
    Tokenizer.from_directory(directory)
    SamplingDefaults.from_directory(directory)
    if ignored := SamplingDefaults.ignored(directory):
        values = ", ".join(f"{name} {value!r}" for name, value in ignored.items())
        print(
            f"qwen-sparse serve: warning: generation_config.json asks for {values}, which is not applied",
            file=sys.stderr,
            flush=True,
        )
    dtype = config.dtype if args.dtype == "auto" else parse_dtype(args.dtype, "--dtype")
    device = resolve_device(args.device, dtype)
    check_quantization(args.quantization, device)
    plan_pages(
        config,
        options,
        longest=options.length_for(config),
        available=available_memory(device),
        kv_cache_dtype=args.kv_cache_dtype,
        dtype=dtype,
        device=device,
        weights=weight_bytes(config, dtype, args.quantization),
    )


def _bind(host: str, port: int, *, protected: bool) -> socket.socket:
    from .server import bind

    if not 0 <= port < 65536:
        raise ValueError(f"--port must be in [0, 65535], got {port}")
    listening = bind(host, port)
    if not protected and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        print(
            f"qwen-sparse serve: warning: anyone who reaches {_url(listening)} can use it: there is no --api-key",
            file=sys.stderr,
            flush=True,
        )
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_origin(origin: str) -> None:
    """Refuse what no browser sends as an origin, and what could therefore never match."""
    if origin in ("*", "null"):  # all; of pages from files
        return
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        rule = "scheme://host or scheme://host:port, in lower case and without a path, or *"
        raise ValueError(f"--allowed-origin must be {rule}, got {origin!r}")
    if match[3] is not None and match[3] == _DEFAULT_PORTS.get(match[1]):
        raise ValueError(f"--allowed-origin must leave out {match[1]}'s default port, as browsers do, got {origin!r}")


def _api_keys(given: list[str]) -> tuple[str, ...]:
    keys = [*given, *([os.environ[API_KEY_VARIABLE]] if API_KEY_VARIABLE in os.environ else [])]
    if any(key.strip() != key or not key for key in keys):
        raise ValueError(f"--api-key and {API_KEY_VARIABLE} must not be empty or have blanks around them")
    return tuple(keys)


def _served_names(model: str, given: list[str] | None) -> tuple[str, ...]:
    if given is None:
        return (Path(model).resolve().name if Path(model).is_dir() else model,)
    if not all(given):
        raise ValueError("--served-model-name must not be empty")
    return tuple(given)
