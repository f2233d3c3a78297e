"""``qwen-sparse serve`` as a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import WAIT


class Process:
    """A server of its own, its output line by line."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen_sparse.cli", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self.readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self.readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))

    def ready(self) -> tuple[str, int]:
        """Host and port, once it takes requests."""
        deadline = time.monotonic() + 120
        while not self.out:
            assert self.process.poll() is None, self.err
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found = re.match(r"qwen-sparse serve: ready at http://([\d.]+):(\d+)/v1: ", self.out[0])
        assert found is not None, self.out
        return found[1], int(found[2])

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(WAIT)
        for reader in self.readers:
            reader.join(WAIT)
        return code

    def records(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.err if line.startswith("{")]


@contextlib.contextmanager
def serving_process(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Process]:
    """Started with these arguments, and killed in the end."""
    started = Process(*arguments, environment=environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
