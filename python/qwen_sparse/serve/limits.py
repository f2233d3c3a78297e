"""What stands before the API: keys, origins, and limits on bodies, as plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .records import send_error

__all__ = ["BODY", "Body", "BodyLimits", "KeyCheck", "LimitBodies", "OriginCheck", "check_json"]

OPEN_PATHS = frozenset({"/health", "/metrics", "/openapi.json"})
"""What needs no key, as with vLLM; everything else does, whether it exists or not."""

BODY = "qwen_sparse.body"
"""Key of the scope where a request's :class:`Body` is."""

MAX_DEPTH = 16
_FREE_BYTES = 2**18
_MAX_NUMBER_LENGTH = 64
_MAX_KEYS = 65536
_NUMBER_TOO_LONG = re.compile(rb"[0-9eE+.\-]{%d}" % (_MAX_NUMBER_LENGTH + 1))
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")


@dataclass(frozen=True)
class BodyLimits:
    """How much a request may send."""

    max_bytes: int
    max_values: int
    """JSON values of one body."""
    max_held: int
    """Bytes that all bodies together hold beyond the first 256 KiB of each: short requests get in beside long ones."""
    seconds: float
    """For one body to arrive."""

    @classmethod
    def of_length(cls, max_model_len: int, *, seconds: float = 120.0) -> BodyLimits:
        """For prompts of so many tokens: 32 bytes for each (text has about four, of which JSON may make 24), and as
        many values, for prompts of token ids.
        """
        max_bytes = 2**20 + 32 * max_model_len
        return cls(max_bytes, max_values=max_model_len + 65536, max_held=4 * max_bytes, seconds=seconds)


def header(scope: Scope, name: bytes) -> list[bytes]:
    """The values of a header, as they came."""
    return [value for key, value in scope["headers"] if key == name]


class KeyCheck:
    """401 for requests without one of the keys. The time it takes does not depend on how much of a key is right."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allows(header(scope, b"authorization")):
            await self._app(scope, receive, send)
            return
        await send_error(
            scope,
            send,
            ApiError(
                401,
                "this server needs a key: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            ),
        )

    def _allows(self, values: Sequence[bytes]) -> bool:
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return scheme.lower() == b"bearer" and any(found)


class OriginCheck:
    """403 for requests of web pages, unless their origin is allowed.

    Browsers name the page's origin with every POST. Without this check any page a user looks at could reach a server on
    their machine (under a name that it makes point there, even as its own origin).
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app, self._allowed = app, frozenset(origin.encode() for origin in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        origins = header(scope, b"origin") if scope["type"] == "http" else []
        if b"*" in self._allowed or all(origin in self._allowed for origin in origins):
            await self._app(scope, receive, send)
            return
        message = "requests of web pages are refused: start the server with --allowed-origin and the page's origin"
        await send_error(scope, send, ApiError(403, message, code="origin_not_allowed"))


class Body:
    """A request's body, counted as long as it is held."""

    def __init__(self, limiter: LimitBodies) -> None:
        self._limiter, self._counted = limiter, 0
        self.data = bytearray()

    def append(self, chunk: bytes) -> None:
        """Hold more."""
        self.data += chunk
        self._count(len(self.data))

    def release(self) -> None:
        """Forget it; may be called again."""
        self.data = bytearray()
        self._count(0)

    def _count(self, size: int) -> None:
        counted = max(size - _FREE_BYTES, 0)
        self._limiter.held += counted - self._counted
        self._counted = counted


class LimitBodies:
    """Reads the body of a POST, within limits, before anything else sees the request; it is ``scope[BODY]`` then."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app, self._limits = app, limits
        self.held = 0
        """Bytes of bodies that count, now."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its whole body, or answer it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = Body(self)
        try:
            if await self._filled(body, scope, receive, send):
                scope[BODY] = body
                await self._app(scope, receive, send)
        finally:
            body.release()

    async def _filled(self, body: Body, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the whole body is there; otherwise the request has been answered, or its client is gone."""
        try:
            self._check_headers(scope)
            return await asyncio.wait_for(self._read(receive, body), self._limits.seconds)
        except ApiError as error:
            await send_error(scope, send, error)
        except asyncio.TimeoutError:
            rule = f"the body must arrive within {self._limits.seconds:g} seconds"
            await send_error(scope, send, ApiError(408, rule, code="request_timeout"))
        return False

    def _check_headers(self, scope: Scope) -> None:
        kinds = header(scope, b"content-type")
        if len(kinds) != 1 or kinds[0].partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "send the body with 'Content-Type: application/json'", code="unsupported_media_type")
        if header(scope, b"content-encoding") not in ([], [b"identity"]):
            raise ApiError(415, "send the body without Content-Encoding", code="unsupported_media_type")
        for length in header(scope, b"content-length"):
            if not length.isdigit() or len(length) > 18 or int(length) > self._limits.max_bytes:
                raise self._too_large()

    async def _read(self, receive: Receive, body: Body) -> bool:
        """Fill ``body``; False when the client goes away."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            body.append(message.get("body", b""))
            if len(body.data) > self._limits.max_bytes:
                raise self._too_large()
            if self.held > self._limits.max_held and len(body.data) > _FREE_BYTES:
                rule = "too many large requests at the same time"
                raise ApiError(503, rule, code="overloaded", headers={"Retry-After": "5"})
            if not message.get("more_body", False):
                return True

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body must have at most {self._limits.max_bytes} bytes", code="request_too_large")


def check_json(body: bytes | bytearray, max_values: int) -> None:
    """Refuse JSON that is small but costly once parsed, in a few passes that run at the speed of memory.

    Raises:
        ApiError: 400; more than ``max_values`` values, 65536 keys or 16 levels, or a number of more than 64 characters.
            Malformed JSON may pass, or be refused for one of these.
    """
    # Without escaped backslashes, then without escaped quotes, each quote begins or ends a string.
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if body.count(b'"') > 2 * (max_values + _MAX_KEYS):
        raise _refused(f"at most {max_values} values")
    outside = b" ".join(body.split(b'"')[::2])
    if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > max_values:
        raise _refused(f"at most {max_values} values")
    if outside.count(b":") > _MAX_KEYS:
        raise _refused(f"at most {_MAX_KEYS} keys")
    if _NUMBER_TOO_LONG.search(outside):
        raise _refused(f"numbers of at most {_MAX_NUMBER_LENGTH} characters")
    brackets = outside.translate(_AS_SQUARE, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):  # each pass takes the innermost pairs away
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise _refused(f"at most {MAX_DEPTH} levels, and brackets that match")


def _refused(rule: str) -> ApiError:
    return ApiError(400, f"the body must be JSON with {rule}", code="invalid_json")
