"""Options that several commands have: the device, and how a model is loaded and attends."""

from __future__ import annotations

import argparse
import os

import torch

from .model.decoder import Decoder
from .model.loader import load_config, load_model
from .model.quantized import QUANTIZATIONS

__all__ = ["add_config", "add_device", "add_load_options", "add_quantization", "load", "prepare"]

_THREADS_PER_CPU = 4


def add_device(parser: argparse._ActionsContainer) -> None:
    """--device."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda or cuda:N; auto: a GPU where there is one and the dtype has 16 bits",
    )


def add_config(parser: argparse._ActionsContainer) -> None:
    """--config."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="read this instead of config.json: a file beside it, such as config_1m.json of Qwen3-2507, or any path",
    )


def add_quantization(parser: argparse._ActionsContainer) -> None:
    """--quantization."""
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of weights: int8 keeps matrices in 8 bits, half the memory and faster decoding; on CPUs",
    )


def add_load_options(parser: argparse._ActionsContainer) -> None:
    """What :func:`load` and :func:`prepare` read besides --model."""
    attention = parser.add_mutually_exclusive_group()
    attention.add_argument("--dense", dest="attention", action="store_const", const="dense", help="dense prefill")
    attention.add_argument(
        "--sparse", dest="attention", action="store_const", const="sparse", help="sparse prefill, also of short prompts"
    )
    parser.add_argument(
        "--coverage",
        type=float,
        help="sparse prefill with block groups (docs/block-groups.md), not by the checkpoint's vertical-slash budgets: "
        "the share of attention to keep over all rows, such as 0.95, as measured on released models",
    )
    add_config(parser)
    add_device(parser)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add_quantization(parser)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "bfloat16", "int8"))
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")


def prepare(args: argparse.Namespace) -> None:
    """Refuse options that exclude each other, and use as many CPU threads as --threads says.

    Raises:
        ValueError: --coverage with --dense; fewer than one thread, or more than four times the CPUs.
    """
    if args.coverage is not None and args.attention == "dense":
        raise ValueError(f"--coverage is of sparse prefill and cannot go with --dense, got {args.coverage}")
    if args.threads is not None:
        cpus = os.cpu_count() or 1
        if not 1 <= args.threads <= _THREADS_PER_CPU * cpus:  # OpenMP crashes on many thousands
            raise ValueError(
                f"--threads must be in [1, {_THREADS_PER_CPU * cpus}], the most being {_THREADS_PER_CPU} times the "
                f"{cpus} CPUs, got {args.threads}"
            )
        torch.set_num_threads(args.threads)


def load(args: argparse.Namespace, *, max_seq_len: int | None = None) -> Decoder:
    """The model of --model and the options of :func:`add_load_options`; see :func:`qwen_sparse.load_model`.

    Raises:
        ValueError: ``max_seq_len`` is more than the model reads, or as ``load_model``.
    """
    if max_seq_len is not None:
        load_config(args.model, config=args.config).check_length("--max-seq-len", max_seq_len)
    return load_model(
        args.model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_seq_len=max_seq_len,
        attention=args.attention or "auto",
        coverage=args.coverage,
        config=args.config,
        quantization=args.quantization,
    )
