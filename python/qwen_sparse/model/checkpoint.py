"""Files of a checkpoint: JSON, and what the headers of its safetensors files say. No weight is read here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

__all__ = ["FLOAT_DTYPES", "StoredTensor", "parse_json", "read_json", "stored_tensors", "weight_files", "weights_dtype"]

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}
"""The dtypes of safetensors that weights may have, and what they are loaded as."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: ``BF16``."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or holds something else; the message names it.
    """
    value = parse_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got a {type(value).__name__}")
    return value


def parse_json(path: Path) -> Any:
    """Whatever is in a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file: run 'git lfs pull' in {path.parent}"
            ) from error
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """The single safetensors file, or every shard that the index names.

    Raises:
        FileNotFoundError: neither is there, or shards are missing (all are named).
        ValueError: the index is no map of names to files.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(name, str) for name in weight_map.values())
        ):
            shown = f"{weight_map!r}"[:200]
            raise ValueError(f"{index} must have a weight_map of tensor names to names of files, got {shown}")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{directory} lacks shards that its index names: {', '.join(missing)}")
        return files
    if single.is_file():
        return [single]
    raise FileNotFoundError(
        f"neither model.safetensors nor model.safetensors.index.json in {directory}" + _other_weights(directory)
    )


def _other_weights(directory: Path) -> str:
    """What to do about weights of another kind that are there instead."""
    names = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return (
            f"; {pickles[0]} holds pickled weights, which are not read: save them with "
            "transformers' save_pretrained, or take the revision of the hub that has safetensors"
        )
    for kind in (".gguf", ".part", ".incomplete"):
        found = [name for name in names if name.endswith(kind)]
        if found:
            why = "give its own path to read it" if kind == ".gguf" else "the download did not finish"
            return f"; there is {found[0]}: {why}"
    return ""


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what git-lfs puts in place of one that was not downloaded."""
    with file.open("rb") as stream:
        return stream.read(_POINTER_BYTES).startswith(_LFS_POINTER)


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """The headers of all tensors, by name.

    Raises:
        ValueError: a file is damaged.
    """
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    header = tensors.get_slice(name)
                    stored[name] = StoredTensor(file, tuple(header.get_shape()), str(header.get_dtype()))
        except SafetensorError as error:
            if is_lfs_pointer(file):
                raise ValueError(
                    f"{file} is a git-lfs pointer, not the weights: run 'git lfs pull' in {file.parent}"
                ) from error
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return stored


def weights_dtype(directory: Path) -> torch.dtype | None:
    """What the embedding is stored in; None without weights, and for dtypes that weights must not have.

    Raises:
        ValueError: a file is damaged.
    """
    try:
        files = weight_files(directory)
    except FileNotFoundError:
        return None
    embedding = stored_tensors(files).get("model.embed_tokens.weight")
    return None if embedding is None else FLOAT_DTYPES.get(embedding.dtype)
