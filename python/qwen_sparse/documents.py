"""Documents from files: UTF-8 text, and the text of PDF files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Document", "read_document"]


@dataclass(frozen=True)
class Document:
    """A text with the name that it is asked about by."""

    name: str
    text: str


def read_document(path: str | Path) -> Document:
    """Read a text file, or a PDF file through ``pypdf``: the pages' text, with blank lines between pages.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, neither UTF-8 nor PDF, or a PDF that is encrypted, damaged or without text; or it is a
            PDF and pypdf is missing.
    """
    path = Path(path).expanduser()
    data = path.read_bytes()
    if path.suffix.lower() == ".pdf" or data.startswith(b"%PDF-"):
        text = _pdf_text(path, data)
        if not text.strip():
            raise ValueError(f"{path} holds no text: pages that are pictures need text recognition first")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8 text or PDF, and is not UTF-8 at byte {error.start}") from error
        if not text.strip():
            raise ValueError(f"{path} is empty")
    return Document(path.name, text)


def _pdf_text(path: Path, data: bytes) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise ValueError(f"{path} is a PDF file, which needs pypdf: pip install pypdf") from error
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except (pypdf.errors.FileNotDecryptedError, pypdf.errors.DependencyError) as error:
        raise ValueError(f"{path} is encrypted; save it without a password first") from error
    except Exception as error:  # of a damaged file, pypdf lets through whatever its parts raise
        raise ValueError(f"{path} is not a readable PDF file: {error}") from error
