"""Checks that arguments of several functions share. Errors name the argument, the rule and the value."""

from __future__ import annotations

import operator
from numbers import Real

__all__ = ["check_integer", "check_number"]


def check_integer(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """An integer, of Python or numpy, within both bounds; None: no bound.

    Raises:
        ValueError: anything else, truth values included.
    """
    rule = "" if least is None else f" >= {least}" if most is None else f" in [{least}, {most}]"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer{rule}, got {value!r}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name} must be{rule}, got {number}")
    return number


def check_number(name: str, value: object) -> float:
    """A real number, of Python or numpy; NaN and the infinities are.

    Raises:
        ValueError: anything else, truth values included.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)
