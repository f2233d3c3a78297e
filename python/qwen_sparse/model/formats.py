"""How checkpoints store matrices in fewer bits: FP8 and int8 with scales, AWQ, GPTQ, compressed-tensors.

A *logical* tensor is what the model has (``model.layers.0.mlp.up_proj.weight``); a checkpoint stores it as one tensor
or as several (``….qweight``, ``….scales``, …). Logical tensors are read one at a time, as numbers; nothing else of the
checkpoint is in memory then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.values import integer
from .checkpoint import FLOAT_DTYPES, StoredTensor

__all__ = ["LogicalTensor", "WeightFormat", "logical_tensors"]

_AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]  # where the columns of eight lie among a word's nibbles, from the lowest on
_PARTS = {  # by method: what is stored under the name of a matrix in place of ".weight"
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "fp8": ("weight", "weight_scale_inv", "weight_scale"),
    "compressed-tensors": (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
    ),
}
_OF_ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "input_zero_point", "input_global_scale")
_EIGHT_BITS = ("F8_E4M3", "I8")

Read = Callable[[str], Tensor]
"""Reads a stored tensor by its name."""


@dataclass(frozen=True)
class WeightFormat:
    """``quantization_config`` of config.json."""

    method: str
    """"fp8", "awq", "gptq" or "compressed-tensors"."""
    bits: int = 8
    block: tuple[int, int] | None = None
    """Rows and columns that have a scale in common; None: what the scales' shape says."""
    zero_offset: int = 0
    """What is added to stored zero points: 1 in GPTQ's first version."""

    @classmethod
    def from_dict(cls, raw: object) -> WeightFormat:
        """From ``quantization_config``.

        Raises:
            ValueError: a method, or an option of one, that is not read; the message names it.
        """
        where = "quantization_config"
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where} must be an object, got {raw!r}")
        method = raw.get("quant_method")
        if method == "fp8":
            block = raw.get("weight_block_size")
            return cls("fp8", block=None if block is None else _block(block, f"{where}: weight_block_size"))
        if method == "awq":
            _one_of(raw, "version", ("gemm", "GEMM", None), where)
            return cls("awq", _bits(raw, "bits", where, (4,)))
        if method == "gptq":
            version = _one_of(raw, "checkpoint_format", ("gptq", "gptq_v2", "", None), where)
            return cls("gptq", _bits(raw, "bits", where, (2, 4, 8)), zero_offset=0 if version == "gptq_v2" else 1)
        if method == "compressed-tensors":
            return cls._from_groups(raw, where)
        raise ValueError(f"{where}: quant_method must be one of {', '.join(sorted(_PARTS))}, got {method!r}")

    @classmethod
    def _from_groups(cls, raw: Mapping[str, Any], where: str) -> WeightFormat:
        formats = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
        _one_of(raw, "format", formats, where)
        groups = raw.get("config_groups")
        schemes = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
        if len(schemes) != 1 or not isinstance(schemes[0], Mapping):
            raise ValueError(f"{where}: config_groups must be one group with weights, got {groups!r}"[:400])
        scheme, strategy = schemes[0], schemes[0].get("strategy")
        _one_of(scheme, "strategy", ("tensor", "channel", "group", "block"), f"{where}: weights")
        block = None
        if strategy == "block":
            block = _block(scheme.get("block_structure"), f"{where}: block_structure")
        return cls("compressed-tensors", _bits(scheme, "num_bits", f"{where}: weights", (4, 8)), block)


def _bits(raw: Mapping[str, Any], key: str, where: str, allowed: tuple[int, ...]) -> int:
    bits = integer(raw, key, where)
    if bits not in allowed:
        raise ValueError(f"{where}: {key} must be one of {', '.join(map(str, allowed))}, got {bits}")
    return bits


def _block(value: object, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"{where} must be two positive integers, got {value!r}")
    return value[0], value[1]


def _one_of(raw: Mapping[str, Any], key: str, allowed: tuple[object, ...], where: str) -> object:
    if raw.get(key) not in allowed:
        names = ", ".join(str(name) for name in allowed if name)
        raise ValueError(f"{where}: {key} must be one of {names}, got {raw.get(key)!r}")
    return raw.get(key)


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor of the model, and the stored ones that it is made of."""

    file: Path
    """Of its first part."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it; of quantised ones, that of the numbers without scales."""
    parts: Mapping[str, str]
    """Kind (``qweight``) to name; of one that is stored as it is, ``weight`` alone."""
    is_number: bool
    """Whether it can be read: floating-point, or quantised by the checkpoint's format."""
    format: WeightFormat | None = None
    """None: stored as it is."""

    def read(self, read: Read) -> Tensor:
        """Its values, in the stored dtype, or float32 where it was quantised.

        Raises:
            ValueError: parts that do not fit each other.
        """
        if self.format is None:
            return read(self.parts["weight"])
        parts = {kind: read(name) for kind, name in self.parts.items()}
        try:
            if self.format.method == "awq":
                return _awq(parts, self.format)
            if self.format.method == "gptq":
                return _gptq(parts, self.format)
            return _scaled(parts, self.format)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{self.parts[kind]} {list(part.shape)}" for kind, part in parts.items())
            raise ValueError(f"the parts of a matrix {list(self.shape)} do not fit each other: {shapes}") from error


def logical_tensors(stored: Mapping[str, StoredTensor], format: WeightFormat | None) -> dict[str, LogicalTensor]:
    """The tensors of a model by name, from the headers of what is stored.

    Args:
        stored: headers by name.
        format: of quantised matrices; others are stored as they are beside them. None: all are.
    """
    if format is None:
        return {name: _plain(name, header) for name, header in stored.items()}
    kinds, matrices = _PARTS[format.method], dict[str, dict[str, str]]()
    result = {}
    for name, header in stored.items():
        base, _, kind = name.rpartition(".")
        if kind in _OF_ACTIVATIONS:
            continue
        quantised = kind in kinds and (kind != "weight" or header.dtype in _EIGHT_BITS)
        if quantised:
            matrices.setdefault(base, {})[kind] = name
        else:
            result[name] = _plain(name, header)
    for base, parts in matrices.items():
        result[f"{base}.weight"] = _quantised(parts, stored, format)
    return result


def _plain(name: str, header: StoredTensor) -> LogicalTensor:
    return LogicalTensor(header.file, header.shape, header.dtype, {"weight": name}, header.dtype in FLOAT_DTYPES)


def _quantised(parts: dict[str, str], stored: Mapping[str, StoredTensor], format: WeightFormat) -> LogicalTensor:
    """Its shape is known from headers; parts that are missing make it one that cannot be read."""
    file = stored[next(iter(parts.values()))].file
    needed = ("qweight", "qzeros", "scales") if format.method in ("awq", "gptq") else ()
    data = next((parts[kind] for kind in ("qweight", "weight_packed", "weight") if kind in parts), None)
    scale = any(kind in parts for kind in ("scales", "weight_scale", "weight_scale_inv"))
    if data is None or not scale or any(kind not in parts for kind in needed):
        missing = ", ".join(kind for kind in needed if kind not in parts) or "data or scales"
        return LogicalTensor(file, (), f"without {missing}", parts, False, format)
    shape, per_word = stored[data].shape, 32 // format.bits
    if format.method == "awq":
        shape = (shape[1] * per_word, shape[0])
    elif format.method == "gptq":
        shape = (shape[1], shape[0] * per_word)
    elif "weight_packed" in parts:
        shape = (shape[0], shape[1] * per_word)
    dtype = stored[data].dtype
    return LogicalTensor(file, shape, dtype, parts, dtype in ("I32", *_EIGHT_BITS), format)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of some bits, from the lowest of each int32 on: ``[..., n]`` to ``[..., n * 32 / bits]``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers: Tensor = ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    return numbers


def _awq(parts: Mapping[str, Tensor], format: WeightFormat) -> Tensor:
    """AWQ's "gemm" layout: ``[in, out / 8]`` words whose nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7."""

    def columns(words: Tensor) -> Tensor:
        ordered: Tensor = _unpacked(words, format.bits).view(*words.shape, 8)[..., _AWQ_COLUMNS].flatten(-2)
        return ordered

    values, zeros, scales = columns(parts["qweight"]), columns(parts["qzeros"]), parts["scales"].float()
    grouped = values.view(scales.shape[0], -1, values.shape[1])
    result: Tensor = ((grouped - zeros[:, None]) * scales[:, None]).flatten(0, 1).T
    return result


def _gptq(parts: Mapping[str, Tensor], format: WeightFormat) -> Tensor:
    """GPTQ: ``[in * bits / 32, out]`` words along the inputs; input i is of group ``g_idx[i]``."""
    values = _unpacked(parts["qweight"].T, format.bits)  # [out, in]
    zeros = (_unpacked(parts["qzeros"], format.bits) + format.zero_offset) & (2**format.bits - 1)  # [groups, out]
    scales = parts["scales"].float()
    if "g_idx" in parts:
        group = parts["g_idx"].long()
    else:
        group = torch.arange(values.shape[1]) // (values.shape[1] // scales.shape[0])
    result: Tensor = (values - zeros[group].T) * scales[group].T
    return result


def _scaled(parts: Mapping[str, Tensor], format: WeightFormat) -> Tensor:
    """Numbers in 8 bits, or packed along the inputs with an offset, times scales by tensor, row, group or block."""
    zero = parts.get("weight_zero_point")
    if "weight_packed" in parts:
        offset = 1 << (format.bits - 1)
        values = (_unpacked(parts["weight_packed"], format.bits) - offset).float()
        if "weight_shape" in parts:
            values = values[:, : int(parts["weight_shape"][1])]
        if zero is not None and zero.dtype == torch.int32:  # packed along the rows
            zero = _unpacked(zero.T, format.bits).T[: values.shape[0]] - offset
    else:
        values = parts["weight"].float()
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    scale = scale.float()
    if "weight_g_idx" in parts:
        group = parts["weight_g_idx"].long()
        return (values if zero is None else values - zero.float()[:, group]) * scale[:, group]
    if zero is not None:
        values -= _spread(zero.float(), values.shape, format.block)
    return values.mul_(_spread(scale, values.shape, format.block))


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """A value per tensor, row, group of columns, or block, as one per element."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale[:, None]
    for dimension, size in enumerate(shape):
        if scale.shape[dimension] not in (1, size):
            length = -(-size // scale.shape[dimension]) if block is None else block[dimension]
            scale = scale.repeat_interleave(length, dimension).narrow(dimension, 0, size)
    return scale
