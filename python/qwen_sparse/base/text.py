"""Text from files and from standard input."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["read_text"]


def read_text(path: str | Path) -> str:
    """Read a text file; ``-`` is standard input.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        return sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, and is not UTF-8 at byte {error.start}") from error
