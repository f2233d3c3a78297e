"""Servers for tests: the real stack on a free port of the loopback, over the real engine or a scripted one."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qwen_sparse.demo import load_passkey_model
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.serve.api import Settings, create_app
from qwen_sparse.serve.engine import Engine, EngineOptions, Snapshot
from qwen_sparse.serve.requests import Event, Failed, Finished, GenerationRequest, NewToken, RequestStats, TokenLogprobs
from qwen_sparse.serve.server import bind, make_server

WAIT = 20.0
"""Seconds after which something that should happen counts as not happening."""


@cache
def passkey_model() -> Decoder:
    """The repository's own model, dense in every prefill so that a warm prefix gives the same tokens as a cold one."""
    return load_passkey_model().with_options(attention="dense")


def eventually(condition: Callable[[], object], what: object) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT:g} s: {what}"
        time.sleep(0.005)


def stats(completion_tokens: int = 0, **changes: Any) -> RequestStats:
    """Of a request that took 1 s in the queue, 2 s of prefill, 3 s of decode."""
    values: dict[str, Any] = {
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "completion_tokens": completion_tokens,
        "arrived": 10.0,
        "scheduled": 11.0,
        "first_token": 13.0,
        "finished": 16.0,
        "density": 0.25,
        "preemptions": 0,
    }
    return RequestStats(**{**values, **changes})


@dataclass
class Submitted:
    """A request that the scripted engine holds, and its handle."""

    request: GenerationRequest
    listener: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """As the engine, which then tells the end."""
        if not self.cancelled.is_set():
            self.cancelled.set()
            threading.Thread(target=self.listener, args=(Finished("abort", "", stats()),)).start()

    def say(self, *texts: str, logprobs: TokenLogprobs | None = None) -> None:
        """Tokens (id: the first byte) with these texts."""
        for text in texts:
            self.listener(NewToken((text.encode() or b"?")[0], text, logprobs))

    def finish(self, reason: Any = "stop", text: str = "", tokens: int = 1) -> None:
        """The end."""
        self.listener(Finished(reason, text, stats(tokens)))

    def fail(self, message: str, retry: bool = False) -> None:
        """The other end."""
        self.listener(Failed(message, stats(), retry))


class ScriptedEngine:
    """Takes requests and does with them what the test says."""

    max_model_len = 1024

    def __init__(self) -> None:
        self.model = passkey_model()
        self.submitted: list[Submitted] = []
        self.refusal: Exception | None = None
        self.healthy = True
        self.on_submit: Callable[[Submitted], None] = lambda request: None

    def submit(self, request: GenerationRequest, listener: Callable[[Event], None]) -> Submitted:
        """Keep it."""
        if self.refusal is not None:
            raise self.refusal
        held = Submitted(request, listener)
        self.submitted.append(held)
        self.on_submit(held)
        return held

    def snapshot(self) -> Snapshot:
        """Made up."""
        return Snapshot(running=3, waiting=5, kv_cache_usage=0.5, prefix_queries=100, prefix_hits=40, preemptions=2)

    def next(self) -> Submitted:
        """The next request."""
        eventually(lambda: self.submitted, "a request reaches the engine")
        return self.submitted.pop(0)


@dataclass
class Live:
    """A running server."""

    port: int
    records: list[dict[str, Any]]
    server: Any
    recording: bool = True
    """Whether ``records`` are kept."""

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        """A new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of the answer; a body that is not bytes is sent as JSON."""
        connection = self.connect()
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {"Content-Type": "application/json"} if data is not None else {}
            connection.request(method, path, data, {**given, **(headers or {})})
            response = connection.getresponse()
            answer = response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        finally:
            connection.close()
        if self.recording:
            eventually(lambda: any(record["id"] == answer[1]["x-request-id"] for record in self.records), "a record")
        return answer

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and parsed body."""
        status, _, data = self.send(method, path, body, headers)
        return status, json.loads(data)

    def raw(self, data: bytes) -> socket.socket:
        """A socket that has sent something."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)
        connection.sendall(data)
        return connection

    def last_record(self) -> dict[str, Any]:
        """The line of the newest request, which may still be on its way."""
        eventually(lambda: self.records, "a record")
        return self.records[-1]


@contextmanager
def live_server(engine: Any, **settings: Any) -> Iterator[Live]:
    """A server over an engine that has been started."""
    records: list[dict[str, Any]] = []
    values = {"served_names": ("passkey", "alias"), "write_record": records.append, **settings}
    listening = bind("127.0.0.1", 0)
    server = make_server(create_app(engine, Settings(**values)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started, "the server starts")
        yield Live(listening.getsockname()[1], records, server, recording="write_record" not in settings)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(WAIT)
        listening.close()
        assert not thread.is_alive()


@contextmanager
def running_engine(**options: Any) -> Iterator[Engine]:
    """The real engine over the passkey model."""
    engine = Engine(passkey_model(), EngineOptions(**{"max_model_len": 4096, "chunk_tokens": 256, **options}))
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown(drain=False)


def events_of(data: bytes) -> list[Any]:
    """The events of a stream, parsed; comments left out, the last "[DONE]" as it is."""
    lines = [line for line in data.decode().split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(content: Any = "Hi", **parameters: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "passkey", "messages": [{"role": "user", "content": content}], **parameters}
