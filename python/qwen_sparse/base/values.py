"""Reading values of JSON objects: each checked, and an error that names the file, the key, the rule and the value."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["LARGEST", "boolean", "integer", "number", "refuse_unknown", "value"]

LARGEST = 2**31 - 1
"""Of all counts and token ids: what an int32 holds."""


def value(raw: Mapping[str, Any], key: str, where: str, default: object) -> Any:
    """What every reader below starts from: an absent value and null are the default."""
    found = raw.get(key)
    found = default if found is None else found
    if found is None:
        raise ValueError(f"{where}: {key} is missing")
    return found


def integer(
    raw: Mapping[str, Any],
    key: str,
    where: str,
    *,
    minimum: int = 1,
    maximum: int = LARGEST,
    default: int | None = None,
) -> int:
    found = value(raw, key, where, default)
    if type(found) is not int or not minimum <= found <= maximum:
        raise ValueError(f"{where}: {key} must be an integer in [{minimum}, {maximum}], got {found!r}")
    return found


def number(raw: Mapping[str, Any], key: str, where: str, default: float | None = None, *, above: float = 0) -> float:
    found = value(raw, key, where, default)
    if type(found) not in (int, float) or not above < found <= sys.float_info.max:
        raise ValueError(f"{where}: {key} must be a finite number > {above}, got {found!r}")
    return float(found)


def boolean(raw: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    found = value(raw, key, where, default)
    if not isinstance(found, bool):
        raise ValueError(f"{where}: {key} must be true or false, got {found!r}")
    return found


def refuse_unknown(raw: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ValueError(f"{where}: unsupported keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
