"""The HTTP application: routes, streams, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from .. import __version__
from .errors import ApiError, ErrorResponse
from .generation import (
    ClientGoneError,
    Generation,
    SamplingDefaults,
    chat_tokens,
    failure,
    generation_request,
    until_disconnect,
)
from .limits import BODY, Body, BodyLimits, KeyCheck, LimitBodies, OriginCheck, check_json
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse, template_tools
from .records import RECORD, Record, RecordRequests, send_error, write_line
from .requests import Failed, Finished, NewToken, Progress
from .responses import ChatChunk, ChatCompletion, Completion, Detokenized, ModelCard, ModelList, Tokenized
from .tools import ToolParser
from .writing import ChatWriter, CompletionWriter, Writer

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Settings", "create_app"]

T = TypeVar("T")
P = TypeVar("P", TokenizeRequest, DetokenizeRequest)

PREPARING_THREADS = 4
"""For parsing, chat templates and tokenising."""


@dataclass(frozen=True)
class Settings:
    """How the application runs."""

    served_names: tuple[str, ...]
    """Names that requests may give as ``model``; answers have the first."""
    api_keys: tuple[str, ...] = ()
    """None: everyone is let in."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the API; "*" for all."""
    ignore_unknown_parameters: bool = False
    """Whether requests with parameters that this server does not know are answered as if they were not there."""
    keep_alive: float = 15.0
    """Seconds of silence after which a stream gets a comment."""
    body_timeout: float = 120.0
    """Seconds for a request's body to arrive."""
    write_record: Callable[[dict[str, Any]], None] = field(default=write_line, repr=False)


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application.

    Args:
        engine: has been started; it is not shut down here.
        settings: names, keys and times.

    Raises:
        ValueError: no served name, or a bad generation_config.json beside the model.
    """
    if not settings.served_names:
        raise ValueError("served_names must have at least one name")
    api = _Api(engine, settings)
    app = FastAPI(
        title="qwen-sparse",
        version=__version__,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_error},
        middleware=_middleware(engine, settings),
    )
    errors, reading, open_to_all = _refusals(_ERRORS), _refusals((401, 403)), _refusals((403,))
    plain: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    app.add_api_route(
        "/v1/chat/completions",
        api.chat,
        methods=["POST"],
        responses={**errors, 200: _either(ChatCompletion)},
        openapi_extra=_takes(ChatRequest),
        summary="Continue a conversation",
    )
    app.add_api_route(
        "/v1/completions",
        api.complete,
        methods=["POST"],
        responses={**errors, 200: _either(Completion)},
        openapi_extra=_takes(CompletionRequest),
        summary="Continue a prompt",
    )
    for path, route, kind, answer, summary in (
        ("/tokenize", api.tokenize, TokenizeRequest, Tokenized, "Tokens of a text or a conversation"),
        ("/detokenize", api.detokenize, DetokenizeRequest, Detokenized, "The text of tokens"),
    ):
        app.add_api_route(
            path,
            route,
            methods=["POST"],
            responses={**errors, 200: {"model": answer}},
            openapi_extra=_takes(kind),
            summary=summary,
        )
    app.add_api_route(
        "/v1/models", api.models, methods=["GET"], responses=reading, response_model=ModelList, summary="Served names"
    )
    app.add_api_route(
        "/v1/models/{model:path}",
        api.model,
        methods=["GET"],
        responses={**reading, **_refusals((404,))},
        response_model=ModelCard,
        summary="One served name",
    )
    app.add_api_route(
        "/health",
        api.health,
        methods=["GET"],
        response_class=Response,
        responses={200: plain, **open_to_all, **_refusals((503,))},
        summary="200 while requests are answered",
    )
    app.add_api_route(
        "/metrics",
        api.metrics_text,
        methods=["GET"],
        response_class=Response,
        responses={200: plain, **open_to_all},
        summary="For Prometheus",
    )
    app.openapi = lambda: _document(app, keyed=bool(settings.api_keys))  # type: ignore[method-assign]
    return app


_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


def _middleware(engine: Engine, settings: Settings) -> list[Middleware]:
    """Outermost first."""
    layers = [Middleware(RecordRequests, write=settings.write_record)]
    if settings.allowed_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
                allow_private_network=True,  # of allowed origins: a browser asks before a page may reach this machine
            )
        )
    layers.append(Middleware(OriginCheck, allowed=settings.allowed_origins))
    if settings.api_keys:
        layers.append(Middleware(KeyCheck, keys=settings.api_keys))
    limits = BodyLimits.of_length(engine.max_model_len, seconds=settings.body_timeout)
    layers.append(Middleware(LimitBodies, limits=limits))
    return layers


class _Api:
    """What the routes do."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        model = engine.model
        self._engine, self._settings = engine, settings
        self._tokenizer = model.tokenizer
        self._eos = model.config.eos_token_ids
        self._defaults = SamplingDefaults.from_directory(model.path)
        self._ignore_unknown = settings.ignore_unknown_parameters
        self._max_values = BodyLimits.of_length(engine.max_model_len).max_values
        self._created = int(time.time())
        self._metrics = Metrics(settings.served_names[0], engine.max_model_len, engine.snapshot)
        parts = (__version__, settings.served_names[0], model.dtype, model.kv_cache_dtype, model.attention)
        self._fingerprint = f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="qwen_sparse prepare")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, ChatRequest, ChatWriter, "messages")

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, CompletionRequest, CompletionWriter, "prompt")

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        return await self._in_thread(lambda: self._tokenize(request.scope[BODY]))

    def _tokenize(self, body: Body) -> Response:
        parameters = self._parse(TokenizeRequest, body)
        if parameters.prompt is not None:
            tokens = self._tokenizer.encode(parameters.prompt)
        else:
            messages, tools = parameters.messages or (), template_tools(parameters.tools)
            open_turn = parameters.add_generation_prompt is not False
            tokens = chat_tokens(self._tokenizer, messages, tools, open_turn=open_turn)
        answer = Tokenized(count=len(tokens), max_model_len=self._engine.max_model_len, tokens=tokens)
        if parameters.return_token_strs:
            answer.token_strs = [self._tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        return await self._in_thread(lambda: self._detokenize(request.scope[BODY]))

    def _detokenize(self, body: Body) -> Response:
        parameters, vocab_size = self._parse(DetokenizeRequest, body), self._engine.model.config.vocab_size
        if wrong := [token for token in parameters.tokens if token >= vocab_size]:
            text = f"tokens must be in [0, vocab_size = {vocab_size}), got {wrong[0]}"
            raise ApiError(400, text, param="tokens", code="invalid_value")
        text = self._tokenizer.decode(parameters.tokens, skip_special_tokens=False)
        return Response(Detokenized(prompt=text).model_dump_json(), media_type="application/json")

    def _parse(self, kind: type[P], body: Body) -> P:
        """A request without generation, whose body is let go."""
        check_json(body.data, self._max_values)
        parameters = parse(kind, body.data, ignore_unknown=self._ignore_unknown)
        body.release()
        self._check_name(parameters.model)
        return parameters

    async def models(self) -> ModelList:
        """GET /v1/models."""
        return ModelList(data=[self._card(name) for name in self._settings.served_names])

    async def model(self, model: str) -> ModelCard:
        """GET /v1/models/NAME."""
        self._check_name(model)
        return self._card(model)

    async def health(self) -> Response:
        """GET /health."""
        if not self._engine.healthy:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return Response(media_type="text/plain")

    async def metrics_text(self) -> Response:
        """GET /metrics."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def _card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name, created=self._created, owned_by="qwen-sparse", max_model_len=self._engine.max_model_len
        )

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self._settings.served_names:
            served = ", ".join(self._settings.served_names)
            raise ApiError(404, f"model must be one of: {served}", param="model", code="model_not_found")

    async def _generate(
        self,
        request: Request,
        kind: type[ChatRequest] | type[CompletionRequest],
        writer_class: type[Writer],
        param: str,
    ) -> Response:
        record: Record = request.scope[RECORD]
        body: Body = request.scope[BODY]
        generation = Generation(self._engine, self._metrics, record)
        async with AsyncExitStack() as closing:
            await closing.enter_async_context(generation.closing())
            try:
                work = self._in_thread(lambda: self._submit(generation, kind, body.data, param))
                parameters = await until_disconnect(request.receive, work)
                body.release()
                record.stream = bool(parameters.stream)
                name, usage = self._settings.served_names[0], parameters.include_usage
                writer = writer_class(record.id, name, self._fingerprint, self._tokenizer, usage)
                if isinstance(parameters, ChatRequest) and (tools := parameters.offered_tools):
                    names = [tool["function"]["name"] for tool in tools]
                    writer.tools = ToolParser(names, parallel=parameters.parallel_tool_calls is not False)
                if record.stream:
                    progress = bool(parameters.return_progress)
                    return _EventStream(
                        generation, closing.pop_all(), writer, record, progress, self._settings.keep_alive
                    )
                answer = await until_disconnect(request.receive, _collect(generation, writer))
            except ClientGoneError:
                record.error = "client_gone"
                return _NoResponse()
        return Response(answer, media_type="application/json")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _submit(
        self, generation: Generation, kind: type[ChatRequest] | type[CompletionRequest], body: bytearray, param: str
    ) -> ChatRequest | CompletionRequest:
        """Everything that takes long for long prompts, outside of the event loop."""
        check_json(body, self._max_values)
        parameters = parse(kind, body, ignore_unknown=self._ignore_unknown)
        self._check_name(parameters.model)
        generation.submit(generation_request(parameters, self._tokenizer, self._eos, self._defaults), param)
        return parameters


async def _collect(generation: Generation, writer: Writer) -> bytes:
    while True:
        for event in await generation.next_events():
            if error := failure(event):
                raise error
            if isinstance(event, NewToken):
                writer.keep(event)
            elif isinstance(event, Finished):
                return writer.whole(event)


class _NoResponse(Response):
    """Nobody is there to read one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing."""


class _EventStream(Response):
    """Server-sent events, as they come; a client that goes away cancels its request."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        closing: AsyncExitStack,
        writer: Writer,
        record: Record,
        progress: bool,
        keep_alive: float,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._closing, self._writer, self._record = generation, closing, writer, record
        self._progress, self._keep_alive = progress, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with self._closing:
            try:
                await until_disconnect(receive, self._send(send))
            except ClientGoneError:
                self._record.error = "client_gone"

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._write(send, self._writer.opening())
        while True:
            events = await self._generation.next_events(self._keep_alive)
            if not events:
                await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            chunks: list[bytes] = []
            for event in events:
                if error := failure(event):
                    self._record.error = error.code or error.type
                    chunks.append(error.body())
                elif isinstance(event, Progress):
                    chunks += [self._writer.progress(event)] if self._progress else []
                elif isinstance(event, NewToken):
                    chunks += self._writer.token(event)
                elif isinstance(event, Finished):
                    chunks += self._writer.closing(event)
            await self._write(send, chunks)
            if events and isinstance(events[-1], (Finished, Failed)):
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
                return

    @staticmethod
    async def _write(send: Send, chunks: list[bytes]) -> None:
        if chunks:
            body = b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks)
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
        message = {404: "there is no such route", 405: "the route does not take this method"}
        text = message.get(error.status_code, "the request cannot be answered")
        error = ApiError(error.status_code, text, code=code, headers=error.headers)
    assert isinstance(error, ApiError)
    return _ErrorAnswer(error)


class _ErrorAnswer(Response):
    def __init__(self, error: ApiError) -> None:
        self._error = error
        super().__init__(status_code=error.status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the error."""
        await send_error(scope, send, self._error)


# --- The OpenAPI document ---


def _refusals(statuses: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


def _either(whole: type[ChatCompletion] | type[Completion]) -> dict[str, Any]:
    chunk = "ChatChunk" if whole is ChatCompletion else "Completion"
    return {
        "model": whole,
        "description": f"The answer; with stream = true, events of data: a {chunk} each, and data: [DONE] in the end",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document(app: FastAPI, *, keyed: bool) -> dict[str, Any]:
    """FastAPI's document with what it cannot know: bodies are parsed and keys are checked without it."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, extra = models_json_schema(
        [
            *((kind, "validation") for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)),
            (ChatChunk, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components["schemas"] = {**extra["$defs"], **components.get("schemas", {})}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, path in document["paths"].items():
            for operation in path.values():
                operation["security"] = [{"key": []}] if name.startswith("/v1/") else []
    app.openapi_schema = document
    return document
