"""Documents from files: text, and the text of PDF files."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .base.text import decode_text

__all__ = ["Document", "read_document"]


_PAGES_SHOWN = 20


@dataclass(frozen=True)
class Document:
    """A text with the name that it is asked about by."""

    name: str
    text: str
    blank_pages: tuple[int, ...] = ()
    """Pages of a PDF file, from 1 on, that hold no text: pictures, perhaps."""

    def warning(self) -> str | None:
        """What a user should know of it."""
        if not self.blank_pages:
            return None
        pages = ", ".join(map(str, self.blank_pages[:_PAGES_SHOWN]))
        more = f" and {len(self.blank_pages) - _PAGES_SHOWN} more" if len(self.blank_pages) > _PAGES_SHOWN else ""
        return f"{self.name}: no text on {'pages' if len(self.blank_pages) > 1 else 'page'} {pages}{more}"


def read_document(path: str | Path) -> Document:
    """Read a text file, or a PDF file through ``pypdf``: the pages' text, with blank lines between pages.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, neither text (:func:`qwen_sparse.base.text.decode_text`) nor PDF, or a PDF that is
            encrypted, damaged or without text; or it is a PDF and pypdf is missing.
    """
    path = Path(path).expanduser()
    data = path.read_bytes()
    if path.suffix.lower() == ".pdf" or data.startswith(b"%PDF-"):
        pages = _pdf_pages(path, data)
        if not any(page.strip() for page in pages):
            raise ValueError(f"{path} holds no text: pages that are pictures need text recognition first")
        blank = tuple(number for number, page in enumerate(pages, 1) if not page.strip())
        return Document(path.name, "\n\n".join(pages), blank)
    text = decode_text(data, str(path))
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return Document(path.name, text)


def _pdf_pages(path: Path, data: bytes) -> list[str]:
    """The text of each page."""
    try:
        import pypdf
    except ImportError as error:
        raise ValueError(f"{path} is a PDF file, which needs pypdf: pip install pypdf") from error
    try:
        with _quiet(logging.getLogger("pypdf")):  # it logs what it mends in files
            return [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except (pypdf.errors.FileNotDecryptedError, pypdf.errors.DependencyError) as error:
        raise ValueError(f"{path} is encrypted; save it without a password first") from error
    except Exception as error:  # of a damaged file, pypdf lets through whatever its parts raise
        raise ValueError(f"{path} is not a readable PDF file: {error}") from error


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Without the messages of a logger and of those under it."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
