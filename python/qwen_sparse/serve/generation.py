"""Between the engine's thread and the event loop: one request, from its body to its last event."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive

from ..base.arguments import check_number
from ..engine.sampling import Sampler
from ..model.checkpoint import read_json
from ..model.tokenizer import Tokenizer
from .errors import ApiError
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, Message
from .records import Record
from .requests import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    LogitRules,
    NewToken,
    QueueFullError,
    ShuttingDownError,
    TooLongError,
)

if TYPE_CHECKING:
    from .engine import Engine, RequestHandle

__all__ = [
    "ClientGoneError",
    "Generation",
    "SamplingDefaults",
    "chat_tokens",
    "failure",
    "generation_request",
    "until_disconnect",
]

T = TypeVar("T")

LOWEST_TEMPERATURE = 0.01
"""What smaller ones count as, except 0; vLLM's bound."""


_PENALTIES = ("presence_penalty", "frequency_penalty")
_IGNORED: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "max_new_tokens": (None,),
}
"""Keys of generation_config.json that are not applied, and values that ask for nothing."""


@dataclass(frozen=True)
class SamplingDefaults:
    """What requests do not say: OpenAI's defaults, or those of the checkpoint's ``generation_config.json``."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def from_directory(cls, directory: Path | None) -> SamplingDefaults:
        """Those of a checkpoint.

        Raises:
            ValueError: generation_config.json is not JSON, or a value in it is out of range.
        """
        file = None if directory is None else directory / "generation_config.json"
        config = read_json(file) if file is not None and file.is_file() else {}
        given = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        if given.get("top_k") == -1:  # as some checkpoints and vLLM say: all
            given["top_k"] = 0
        try:
            Sampler(**{name: value for name, value in given.items() if name not in _PENALTIES})
            for name in _PENALTIES:
                if not -2 <= check_number(name, given.get(name, 0.0)) <= 2:
                    raise ValueError(f"{name} must be in [-2, 2], got {given[name]}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        return cls(**given)

    @staticmethod
    def ignored(directory: Path) -> dict[str, Any]:
        """What generation_config.json asks for and requests do not get, with its values."""
        file = directory / "generation_config.json"
        config = read_json(file) if file.is_file() else {}
        return {name: config[name] for name, neutral in _IGNORED.items() if config.get(name) not in neutral}

    def sampler(self, parameters: ChatRequest | CompletionRequest) -> Sampler:
        """For one request."""
        chosen = self._with(parameters)
        temperature = chosen.temperature and max(chosen.temperature, LOWEST_TEMPERATURE)
        return Sampler(
            temperature,
            chosen.top_p,
            max(chosen.top_k, 0),
            chosen.repetition_penalty,
            parameters.seed,
            chosen.min_p,
        )

    def rules(self, parameters: ChatRequest | CompletionRequest, bias: Mapping[int, float]) -> LogitRules:
        """For one request; ``bias`` by token id."""
        chosen = self._with(parameters)
        return LogitRules(chosen.presence_penalty, chosen.frequency_penalty, bias, parameters.min_tokens or 0)

    def _with(self, parameters: ChatRequest | CompletionRequest) -> SamplingDefaults:
        names = self.__dataclass_fields__
        return replace(self, **{n: getattr(parameters, n) for n in names if getattr(parameters, n) is not None})


def _template_message(message: Message) -> dict[str, Any]:
    """As chat templates take it."""
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.content}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
            | ({} if call.id is None else {"id": call.id})
            for call in message.tool_calls
        ]
    return rendered


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    variables: Mapping[str, Any] | None = None,
    open_turn: bool = True,
    unclosed: bool = False,
) -> list[int]:
    """Tokens of a conversation, as the chat template writes it.

    Args:
        tokenizer: with the template.
        messages: the conversation.
        tools: that the model may call.
        variables: more of the template's.
        open_turn: whether it ends with the opening of the assistant's turn.
        unclosed: end with the text of the last message instead, for the model to go on with.

    Raises:
        ApiError: 400; the template has no place for tools, refuses the messages or changes the text to go on with.
    """
    if tools and "tools" not in (tokenizer.chat_template or ""):
        text = "tools must be left out: the model's chat template has no place for them"
        raise ApiError(400, text, param="tools", code="unsupported_value")
    given: dict[str, Any] = {**(variables or {}), **({"tools": list(tools)} if tools else {})}
    try:
        text = tokenizer.apply_chat_template(
            [_template_message(message) for message in messages],
            add_generation_prompt=open_turn and not unclosed,
            **given,
        )
        if unclosed:
            last = messages[-1].content.rstrip()
            start = text.rfind(last)
            if start < 0:
                raise ValueError("continue_final_message: the chat template changes the last message's text")
            text = text[: start + len(last)]
        return tokenizer.encode(text)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None


def generation_request(
    parameters: ChatRequest | CompletionRequest, tokenizer: Tokenizer, eos: tuple[int, ...], defaults: SamplingDefaults
) -> GenerationRequest:
    """What the engine is asked for. Takes seconds for long prompts: call it outside of the event loop.

    Raises:
        ApiError: 400; the chat template refuses the messages, or there are no tokens.
    """
    if isinstance(parameters, ChatRequest):
        prompt = chat_tokens(
            tokenizer,
            parameters.messages,
            parameters.offered_tools,
            variables=parameters.template_variables,
            open_turn=parameters.add_generation_prompt is not False,
            unclosed=bool(parameters.continue_final_message),
        )
    else:
        prompt = tokenizer.encode(parameters.prompt) if isinstance(parameters.prompt, str) else parameters.prompt
    if not prompt:
        param = "messages" if isinstance(parameters, ChatRequest) else "prompt"
        raise ApiError(400, f"{param} must have at least one token", param=param, code="invalid_value")
    ends = frozenset(parameters.stop_token_ids or ()) | (frozenset() if parameters.ignore_eos else frozenset(eos))
    bias = {int(token): value for token, value in (parameters.logit_bias or {}).items()}
    known = tokenizer.backend.get_vocab_size()
    if wrong := [token for token in bias if token >= known]:
        text = f"logit_bias must have token ids below {known}, got {min(wrong)}"
        raise ApiError(400, text, param="logit_bias", code="invalid_value")
    return GenerationRequest(
        prompt=prompt,
        rules=defaults.rules(parameters, bias),
        max_new_tokens=parameters.max_new_tokens,
        sampler=defaults.sampler(parameters),
        stop=tuple(parameters.stop or ()),
        stop_token_ids=ends,
        logprobs=parameters.num_logprobs,
    )


class ClientGoneError(Exception):
    """The client went away before it was answered."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Args:
        receive: ASGI's, of a request whose body has been read.
        work: what the client waits for.

    Raises:
        ClientGoneError: the client went away first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Generation:
    """One request in the engine, as the event loop sees it.

    Made in the event loop; :meth:`submit` may be called in another thread, and everything happens inside of
    :meth:`closing`.
    """

    def __init__(self, engine: Engine, metrics: Metrics, record: Record) -> None:
        self._engine, self._metrics, self._record = engine, metrics, record
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._lock = threading.Lock()
        self._handle: RequestHandle | None = None
        self._cancelled = False
        self._submitted = False
        self._last_token: float | None = None

    def submit(self, request: GenerationRequest, param: str) -> None:
        """Hand the request to the engine; from any thread.

        Args:
            request: the request.
            param: the parameter that the prompt came in, for errors.

        Raises:
            ApiError: the engine does not take it.
        """
        with self._lock:
            if self._cancelled:
                return
            self._submitted = True
        try:
            handle = self._engine.submit(request, self._listen)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._ended.set)
            raise _as_api_error(error, param) from error
        with self._lock:
            self._handle = handle
            if self._cancelled:
                handle.cancel()

    def cancel(self) -> None:
        """Give the request up, whether it has been submitted or not."""
        with self._lock:
            self._cancelled = True
            if self._handle is not None:
                self._handle.cancel()

    @asynccontextmanager
    async def closing(self) -> AsyncIterator[None]:
        """Around all that is done with it. At the end, the request is given up unless it has ended, and its end is
        awaited: then its pages are free and it is recorded. Only when the server stops at once, nothing is awaited.
        """
        try:
            yield
        except asyncio.CancelledError:
            self.cancel()
            raise
        except BaseException:
            await self._end()
            raise
        await self._end()

    async def _end(self) -> None:
        if not self._ended.is_set():
            self.cancel()
            if self._submitted:
                await self._ended.wait()

    async def next_events(self, timeout: float | None = None) -> list[Event]:
        """Those that are there, at least one; none if ``timeout`` seconds bring none."""
        # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes with the result.
        timer = None if timeout is None else self._loop.call_later(timeout, self._news.set)
        try:
            await self._news.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._news.clear()
        events, self._events = self._events, []
        return events

    def _listen(self, event: Event) -> None:
        """In the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped at once
            self._loop.call_soon_threadsafe(self._hear, event, time.monotonic())

    def _hear(self, event: Event, now: float) -> None:
        """In the event loop, whether anyone waits for the event or not."""
        if isinstance(event, NewToken):
            before, self._last_token = self._last_token, now
            self._metrics.token(now - (self._record.arrived if before is None else before), first=before is None)
        elif isinstance(event, (Finished, Failed)):
            self._record.stats = event.stats
            self._record.finish_reason = event.reason if isinstance(event, Finished) else "error"
            self._metrics.ended(event, now - self._record.arrived)
            self._ended.set()
        self._events.append(event)
        self._news.set()


def failure(event: Event) -> ApiError | None:
    """What a client is told when the engine could not answer; None for every other event."""
    if isinstance(event, Finished) and event.reason == "abort":  # by the engine: who cancels does not read on
        return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "30"})
    if isinstance(event, Failed):
        if event.retry:
            return ApiError(503, event.message, code="overloaded", headers={"Retry-After": "5"})
        return ApiError(500, event.message)
    return None


def _as_api_error(error: Exception, param: str) -> Exception:
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ShuttingDownError):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "30"})
    if isinstance(error, ValueError):
        return ApiError(400, f"{param}: {error}", param=param, code="invalid_value")
    return error
