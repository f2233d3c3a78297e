"""One line of JSON per request on stderr. No text of a prompt or an answer gets here: only numbers and fixed words."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .requests import RequestStats

__all__ = ["RECORD", "Record", "RecordRequests", "send_error", "write_line"]

RECORD = "qwen_sparse.record"
"""Key of the scope where a request's :class:`Record` is."""

CLIENT_GONE = 499
"""The status that logs show, as nginx's do, for a request whose client left before it was answered."""


@dataclass
class Record:
    """What is known of a request."""

    id: str = field(default_factory=lambda: uuid4().hex)
    arrived: float = field(default_factory=time.monotonic)
    route: str | None = None
    """The pattern of the route; None: none matched. Not the path, which a client makes up."""
    status: int | None = None
    stream: bool | None = None
    finish_reason: str | None = None
    error: str | None = None
    """The class of an exception, or the code of what the client was told."""
    where: list[str] | None = None
    """The stack of an exception, without its message."""
    stats: RequestStats | None = None

    def line(self) -> dict[str, Any]:
        """What is logged; times in seconds."""
        stats, now = self.stats, time.monotonic()
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "event": "request",
            "id": self.id,
            "route": self.route,
            "status": self.status,
            "stream": self.stream,
            "finish_reason": self.finish_reason,
            "error": self.error,
            "total_seconds": round(now - self.arrived, 6),
        }
        if stats is not None:
            scheduled, first, finished = stats.scheduled, stats.first_token, stats.finished
            line |= {
                "prompt_tokens": stats.prompt_tokens,
                "cached_tokens": stats.cached_tokens,
                "completion_tokens": stats.completion_tokens,
                "queue_seconds": _rounded(stats.arrived, finished if scheduled is None else scheduled),
                "prefill_seconds": _rounded(scheduled, first),
                "decode_seconds": _rounded(first, finished),
                "density": stats.density if stats.density is None else round(stats.density, 6),
                "preemptions": stats.preemptions,
            }
        if self.where is not None:
            line["where"] = self.where
        return line


def _rounded(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)


def write_line(line: dict[str, Any]) -> None:
    """To stderr, at once."""
    print(json.dumps(line), file=sys.stderr, flush=True)


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer with an error, and note it in the request's record."""
    record: Record = scope[RECORD]
    record.error = record.error or error.code or error.type
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(key.lower().encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class RecordRequests:
    """Logs requests, names them (``x-request-id``), and answers 500 where something unforeseen was raised.

    The outermost layer: an exception goes no further, since whatever prints it could print a prompt with it.
    """

    def __init__(self, app: ASGIApp, write: Callable[[dict[str, Any]], None] = write_line) -> None:
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[RECORD] = Record()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                names = (b"x-request-id", record.id.encode()), (b"x-content-type-options", b"nosniff")
                message = {**message, "headers": [*message.get("headers", []), *names]}
            await send(message)

        try:
            await self._app(scope, receive, named)
        except asyncio.CancelledError:
            record.error = "cancelled"
            raise
        except Exception as error:
            started = record.status is not None
            record.error, record.where = type(error).__name__, stack_of(error)
            if not started:
                await send_error(scope, named, ApiError(500, f"internal error; the server's log has it as {record.id}"))
        finally:
            if record.status is None:
                record.status = CLIENT_GONE
            route = scope.get("route")
            record.route = getattr(route, "path", None)
            self._write(record.line())


def stack_of(error: BaseException) -> list[str]:
    """Files, lines and functions, innermost last; neither the message nor values, which could be somebody's text."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
