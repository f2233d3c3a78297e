"""Text from files and from standard input."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

__all__ = ["decode_text", "read_text"]

_MARKS = (  # the longer ones first: UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path) -> str:
    """Read a text file; ``-`` is standard input.

    Raises:
        OSError: the file cannot be read.
        ValueError: see :func:`decode_text`.
    """
    if str(path) == "-":
        buffer = getattr(sys.stdin, "buffer", None)
        return sys.stdin.read() if buffer is None else decode_text(buffer.read(), "standard input")
    return decode_text(Path(path).read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """Text in UTF-8, or what its byte-order mark says; lines end with ``\n`` alone, and there is no mark.

    Args:
        data: the bytes.
        name: of their source, for errors.

    Raises:
        ValueError: other bytes, or text with NUL characters: binary data, or UTF-16 without a mark.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        shown = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise ValueError(f"{name} must be {shown} text, and is not {shown} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError(
            f"{name} must be text, and has a NUL character at {text.index(chr(0))}: it is binary data, or UTF-16 "
            "without a byte-order mark"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
