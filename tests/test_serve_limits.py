"""What stands before the API: keys, origins, sizes, times, and what is not HTTP."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qwen_sparse.serve import limits, server
from qwen_sparse.serve.limits import BodyLimits, LimitBodies
from serving import CHAT, Live, ScriptedEngine, Submitted, chat, events_of, eventually, live_server

KEYS = ("first-key", "zweiter-Schlüssel")


@pytest.fixture
def engine() -> ScriptedEngine:
    def act(request: Submitted) -> None:
        request.say("a")
        request.finish()

    engine = ScriptedEngine()
    engine.on_submit = act
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[Live]:
    with live_server(engine) as live:
        yield live


def code_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]["code"]


# Keys.


def test_keys(engine: ScriptedEngine) -> None:
    with live_server(engine, api_keys=KEYS) as live:
        for key in KEYS:
            headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
            assert live.send("POST", CHAT, chat(), headers)[0] == 200
            assert (
                live.send(
                    "GET",
                    "/v1/models",
                    headers={**headers, "Authorization": headers["Authorization"].replace("Bearer", "bearer")},
                )[0]
                == 200
            )
        for path in ("/health", "/metrics", "/openapi.json"):
            assert live.send("GET", path)[0] == 200
        document = json.loads(live.send("GET", "/openapi.json")[2])
        assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-keyy",
        "Basic first-key",
        "first-key",
        "Bearer first-key, x",
    ],
)
def test_without_a_key(engine: ScriptedEngine, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    with live_server(engine, api_keys=KEYS) as live:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/no/such/route"), ("GET", "//health")):
            status, given, data = live.send(method, path, chat() if method == "POST" else None, headers)
            assert (status, given["www-authenticate"]) == (401, "Bearer")
            assert json.loads(data)["error"]["type"] == "authentication_error"
            assert live.last_record()["error"] == "invalid_api_key"
        assert engine.submitted == []


def test_two_keys_in_one_request_are_none(engine: ScriptedEngine) -> None:
    with live_server(engine, api_keys=KEYS) as live:
        head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"Authorization: Bearer first-key\r\n" * 2 + b"\r\n"
        assert live.raw(head).recv(1000).startswith(b"HTTP/1.1 401")


def test_every_key_is_compared_in_constant_time(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(limits.hmac, "compare_digest", compare)
    with live_server(engine, api_keys=KEYS) as live:
        for key in ("first-key", "x" * 5000):
            live.send("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert compared == [(32, 32)] * 2
            compared.clear()


# Web pages.


def test_pages_are_kept_out_unless_allowed(engine: ScriptedEngine) -> None:
    page = {"Origin": "https://example.org"}
    with live_server(engine) as live:
        assert code_of(live.send("POST", CHAT, chat(), page)) == (403, "origin_not_allowed")
        assert live.send("OPTIONS", CHAT, headers={**page, "Access-Control-Request-Method": "POST"})[0] == 403
        assert "access-control-allow-origin" not in live.send("GET", "/v1/models")[1]
    with live_server(engine, allowed_origins=("https://example.org",), api_keys=KEYS) as live:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        status, headers, _ = live.send("OPTIONS", CHAT, headers={**page, **asked})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
        status, headers, _ = live.send("POST", CHAT, chat(), {**page, "Authorization": "Bearer first-key"})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
        assert live.send("POST", CHAT, chat(), page)[0] == 401
        other = {"Origin": "https://example.org.evil", "Authorization": "Bearer first-key"}
        assert live.send("POST", CHAT, chat(), other)[0] == 403
    with live_server(engine, allowed_origins=("*",)) as live:
        assert live.send("POST", CHAT, chat(), page)[1]["access-control-allow-origin"] == "*"


# Bodies.

MAX_BYTES = BodyLimits.of_length(ScriptedEngine.max_model_len).max_bytes


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "Application/JSON"}, 200),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "identity"}, 200),
    ],
)
def test_media_types(live: Live, headers: dict[str, str], status: int) -> None:
    assert live.send("POST", CHAT, chat(), headers)[0] == status


def test_no_media_type(live: Live) -> None:
    assert (
        live.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        .recv(99)
        .startswith(b"HTTP/1.1 415")
    )


def test_size(live: Live) -> None:
    room = MAX_BYTES - len(json.dumps(chat("")))
    assert live.send("POST", CHAT, chat("x" * room))[0] == 200
    assert code_of(live.send("POST", CHAT, chat("x" * (room + 1)))) == (413, "request_too_large")


@pytest.mark.parametrize("length", [str(MAX_BYTES + 1), "9" * 18, "9" * 30])
def test_a_length_that_is_too_large_is_refused_at_once(live: Live, length: str) -> None:
    assert live.raw(head_of(int(length))).recv(99).split()[1] in (b"413", b"400")


def test_chunked_bodies_are_counted(live: Live) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection = live.raw(head.encode())
    for _ in range(2 * MAX_BYTES // 65536):
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        if select.select([connection], [], [], 0.01)[0]:  # no more once it has answered: it hangs up then
            break
    assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def head_of(length: int) -> bytes:
    """Of a chat request with a body of so many bytes."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return head.encode()


def test_bodies_that_are_held_at_the_same_time(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LimitBodies] = []
    plain = LimitBodies.__init__

    def remember(self: LimitBodies, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(LimitBodies, "__init__", remember)
    counted = MAX_BYTES - 2**18
    with live_server(engine) as live:
        fit = 4 * MAX_BYTES // counted
        holding = [live.raw(head_of(MAX_BYTES) + b" " * (MAX_BYTES - 1)) for _ in range(fit)]
        eventually(lambda: made and made[0].held == fit * (counted - 1), "bodies fill the room")
        large, small = chat("x" * (MAX_BYTES - 200)), chat("x" * 200_000)
        status, headers, data = live.send("POST", CHAT, large)
        assert (status, headers["retry-after"], json.loads(data)["error"]["code"]) == (503, "5", "overloaded")
        assert live.send("POST", CHAT, small)[0] == 200
        for connection in holding:
            connection.close()
        eventually(lambda: made[0].held == 0, "the room is free again")
        assert live.send("POST", CHAT, large)[0] == 200


def test_a_body_is_not_held_while_tokens_are_generated(engine: ScriptedEngine) -> None:
    engine.on_submit = lambda request: None
    large = json.dumps(chat("x" * (MAX_BYTES - 200), stream=True)).encode()
    with live_server(engine) as live:
        for _ in range(6):
            connection = live.raw(head_of(len(large)) + large)
            request = engine.next()
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            request.say("a")


def test_a_slow_body(engine: ScriptedEngine) -> None:
    with live_server(engine, body_timeout=0.3) as live:
        connection = live.raw(head_of(9999))
        for _ in range(4):
            time.sleep(0.1)
            connection.sendall(b" ")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert live.last_record()["error"] == "request_timeout"


@pytest.mark.parametrize("kind", ["values", "depth"])
def test_costly_json(live: Live, kind: str) -> None:
    body = b"[" + b"1," * 70000 + b"1]" if kind == "values" else b"[" * 100000
    started = time.monotonic()
    assert code_of(live.send("POST", CHAT, body)) == (400, "invalid_json")
    assert time.monotonic() - started < 5


# Connections.


def closed_within(connection: socket.socket, seconds: float) -> bytes:
    """What came until the other side closed."""
    connection.settimeout(seconds)
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> Iterator[Live]:
    monkeypatch.setattr(server, "SILENCE", 0.4)
    monkeypatch.setattr(server, "STALL", 0.4)
    with live_server(engine) as live:
        yield live


def test_silent_connections_are_closed(impatient: Live) -> None:
    assert closed_within(impatient.raw(b""), 5) == b""


def test_slow_heads_are_cut_off(impatient: Live) -> None:
    connection = impatient.raw(b"GET /health HTTP/1.1\r\n")
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 5:
            connection.sendall(b"X-Header: x\r\n")
            time.sleep(0.05)
    assert time.monotonic() - started < 4


def test_a_second_head_has_the_same_limit(impatient: Live) -> None:
    connection = impatient.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\n")
    data = closed_within(connection, 5)
    assert data.count(b"HTTP/1.1 200 OK") == 1


def test_answers_may_take_longer_than_heads(impatient: Live, engine: ScriptedEngine) -> None:
    def act(request: Submitted) -> None:
        time.sleep(1)
        request.finish()

    engine.on_submit = act
    assert impatient.send("POST", CHAT, chat())[0] == 200


def test_clients_that_do_not_read_are_cut_off(impatient: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = lambda request: None
    body = json.dumps(chat(stream=True)).encode()
    connection = impatient.raw(head_of(len(body)) + body)
    request = engine.next()
    for _ in range(200):
        request.say("x" * 65536)
    assert request.cancelled.wait(10)
    connection.close()


def test_long_heads_are_refused(live: Live) -> None:
    connection = live.raw(b"GET /health HTTP/1.1\r\nX-Header: " + b"x" * 40000)
    data = closed_within(connection, 5)
    assert data.startswith(b"HTTP/1.1 400")
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELLO\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n"]
)
def test_what_is_not_http(live: Live, garbage: bytes) -> None:
    connection = live.raw(garbage + b"\r\n\r\n")
    data = closed_within(connection, 5)
    assert data.startswith(b"HTTP/1.1 400")
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert live.send("GET", "/health")[0] == 200


def test_one_connection_too_many(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_max_connections", lambda: 3)
    with live_server(engine) as live:
        three = [live.raw(b"") for _ in range(3)]
        eventually(lambda: len(live.server.server_state.connections) == 3, "three are connected")
        assert closed_within(live.raw(b""), 5) == b""
        three[0].close()
        eventually(lambda: len(live.server.server_state.connections) == 2, "one has left")
        assert live.send("GET", "/health")[0] == 200


def test_websockets_are_not_spoken(live: Live) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "eA==",
    }
    assert live.send("GET", "/health", headers=upgrade)[0] == 200


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    body = json.dumps(chat()).encode()
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    data = closed_within(live.raw((head_of(len(body)) + body) * 3 + last), 10)
    assert data.count(b"HTTP/1.1 200 OK") == 4
    assert data.count(b"chatcmpl-") == 3


def test_concurrent_streams_do_not_mix(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = lambda request: None
    connections: list[Any] = []
    for number in range(8):
        connection = live.connect()
        connection.request(
            "POST", CHAT, json.dumps(chat(str(number), stream=True)), {"Content-Type": "application/json"}
        )
        connections.append(connection)
    eventually(lambda: len(engine.submitted) == 8, "all are submitted")
    for turn in range(3):
        for request in engine.submitted:
            request.say(f"{turn}:{bytes(request.request.prompt).decode()} ")
    for request in engine.submitted:
        request.finish()
    for number, connection in enumerate(connections):
        chunks = events_of(connection.getresponse().read())[:-1]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        prompt = text.split()[0].partition(":")[2]
        assert text == "".join(f"{turn}:{prompt} " for turn in range(3))
        assert str(number) in prompt
        connection.close()
