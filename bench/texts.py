"""Two long texts that every CPython brings along, so that figures can be repeated without downloads.

They are those of the interpreter that runs: a result that is measured on them records ``PYTHON`` beside it.
"""

from __future__ import annotations

import platform
import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

__all__ = ["MODULES", "PYTHON", "code", "prose"]

PYTHON = platform.python_version()

MODULES = (
    "argparse", "ast", "calendar", "codecs", "collections", "configparser", "contextlib", "copy", "csv", "ctypes",
    "dataclasses", "_pydecimal", "difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib", "functools",
    "gettext", "glob", "gzip", "heapq", "imaplib", "inspect", "ipaddress", "linecache", "locale", "mailbox",
    "mimetypes", "modulefinder", "ntpath", "numbers", "optparse", "os", "pdb", "pickle", "pickletools", "pkgutil",
    "platform", "plistlib", "poplib", "posixpath", "pprint", "pstats", "pyclbr", "pydoc", "queue", "random", "reprlib",
    "runpy", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics",
    "string", "subprocess", "symtable", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace",
    "tracemalloc", "types", "typing", "uuid", "warnings", "wave", "weakref", "zipapp", "_collections_abc", "_pyio",
    "_strptime", "asyncio.base_events", "asyncio.events", "asyncio.futures", "asyncio.locks", "asyncio.proactor_events",
    "asyncio.queues", "asyncio.selector_events", "asyncio.sslproto", "asyncio.streams", "asyncio.subprocess",
    "asyncio.tasks", "asyncio.transports", "asyncio.unix_events", "asyncio.windows_events", "concurrent.futures._base",
    "concurrent.futures.process", "concurrent.futures.thread", "email._header_value_parser", "email.charset",
    "email.contentmanager", "email.feedparser", "email.generator", "email.header", "email.headerregistry",
    "email.message", "email.policy", "email.utils", "html.entities", "html.parser", "http.client", "http.cookiejar",
    "http.cookies", "http.server", "importlib._bootstrap", "importlib._bootstrap_external", "importlib.util",
    "json.decoder", "json.encoder", "logging.config", "logging.handlers", "multiprocessing.connection",
    "multiprocessing.context", "multiprocessing.managers", "multiprocessing.pool", "multiprocessing.process",
    "multiprocessing.queues", "multiprocessing.resource_tracker", "multiprocessing.shared_memory",
    "multiprocessing.synchronize", "multiprocessing.util", "unittest.async_case", "unittest.case", "unittest.loader",
    "unittest.main", "unittest.mock", "unittest.result", "unittest.suite", "unittest.util", "urllib.parse",
    "urllib.request", "urllib.robotparser", "xml.dom.expatbuilder", "xml.dom.minidom", "xml.etree.ElementTree",
    "xmlrpc.client", "xmlrpc.server", "wsgiref.handlers",
)  # fmt: skip
"""Modules of the standard library, in the order that :func:`code` takes them; packages give their first file."""


@cache
def code() -> str:
    """Python source: the files of :data:`MODULES`, each once; in CPython 3.11, 5.7 million characters.

    Those are 1.3 million tokens of Qwen2.5's tokenizer.

    Raises:
        FileNotFoundError: naming the module whose source the installation lacks (a zipped or stripped one).
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(_source(library, module) for module in MODULES)


def _source(library: Path, module: str) -> str:
    stem = module.replace(".", "/")
    for file in (library / f"{stem}.py", library / stem / "__init__.py"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise FileNotFoundError(f"code: no source of module {module!r} in {library}")


@cache
def prose() -> str:
    """English: the chapters of Python's language reference that ``help()`` shows, by name; each paragraph once.

    Chapters that are part of others stand in both. 373,000 characters in CPython 3.11, 85,000 tokens of Qwen2.5's
    tokenizer; nothing is repeated, so that longer texts are to be made of something else.
    """
    chapters = (topics[name].strip() for name in sorted(topics))
    paragraphs = dict.fromkeys(part for chapter in chapters for part in chapter.split("\n\n") if part.strip())
    return "\n\n".join(paragraphs) + "\n"
