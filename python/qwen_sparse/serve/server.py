"""uvicorn, made to withstand what clients do: slow ones, silent ones, broken ones, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

__all__ = ["Server", "bind", "make_server"]

SILENCE = 30.0
"""Seconds for a request's head to arrive, from the connection's beginning or the last answer's end; also for what is
left of a body that was not read."""
KEEP_ALIVE = 20
"""Seconds that an idle connection is kept."""
STALL = 60.0
"""Seconds for a client to read on once the network's buffers are full."""
MAX_HEAD = 32768
"""Bytes of a request's line and headers."""


class Server(uvicorn.Server):
    """Drains after the first SIGINT or SIGTERM, and stops at once after the second."""

    first_signal: int | None = None
    ready: str | None = None
    """What to print once requests are taken."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.ready is not None:
            print(f"qwen-sparse serve: {self.ready}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self.first_signal = self.first_signal or sig

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which then raises the signals again: here the process ends as the command says."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end; once forced, cut connections, which the event loop would wait for."""
        if self.ready is not None:
            print(
                "qwen-sparse serve: answering what was asked, then stopping; another signal stops at once", flush=True
            )
        cutting = asyncio.create_task(self._cut_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut_when_forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with time limits that it lacks, and errors in the API's form."""

    _silence: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; one too many is sent away."""
        super().connection_made(transport)
        if len(self.connections) > _max_connections():
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Something came."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """A request has been answered."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        for timer in (self._silence, self._stall):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        body = ApiError(400, "this is not a valid HTTP request", code="invalid_http").body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Run the timer while no request is being answered, and never restart it: drop by drop is slow, too."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and self._silence is not None:
            self._silence.cancel()
            self._silence = None
        elif not busy and self._silence is None:
            self._silence = self.loop.call_later(SILENCE, self.transport.abort)


def _max_connections() -> int:
    """Leaves file descriptors for other things."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(4096, max(soft - 128, soft // 2))


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound


def make_server(app: FastAPI) -> Server:
    """uvicorn for the application; hand it a bound socket."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # records say it, and without anybody's text
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=MAX_HEAD,
        )
    )
