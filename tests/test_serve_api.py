"""The HTTP API over a scripted engine: formats, streams, errors, clients that leave, metrics and logs."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from qwen_sparse.serve.generation import Generation
from qwen_sparse.serve.metrics import Metrics
from qwen_sparse.serve.records import Record
from qwen_sparse.serve.requests import (
    Finished,
    NewToken,
    Progress,
    QueueFullError,
    ShuttingDownError,
    TokenLogprobs,
    TooLongError,
)
from serving import CHAT, COMPLETIONS, Live, ScriptedEngine, Submitted, chat, events_of, eventually, live_server, stats

SECRET = "nobody but the model may read this"


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def server(engine: ScriptedEngine) -> Iterator[Live]:
    with live_server(engine, keep_alive=0.1) as live:
        yield live


@pytest.fixture
def live(server: Live, engine: ScriptedEngine) -> Live:
    engine.submitted, engine.refusal, engine.healthy, engine.on_submit = [], None, True, lambda request: None
    server.records.clear()
    return server


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(api_key="EMPTY", base_url=f"{live.url}/v1", max_retries=0, timeout=20)


def answer(*texts: str, rest: str = "", reason: str = "stop") -> Any:
    """What the engine does with a request: say something and end."""

    def act(request: Submitted) -> None:
        request.say(*texts)
        request.finish(reason, rest, len(texts))

    return act


LOGPROBS = TokenLogprobs(-0.5, ((97, -0.5), (0xC3, -1.5), (258, float("-inf"))))


def says_with_logprobs(request: Submitted) -> None:
    request.say("a", "", "b", logprobs=LOGPROBS)
    request.finish("length", "", 3)


# Formats.


def test_chat(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("Grü", "ße", rest="!", reason="length")
    status, headers, data = live.send("POST", CHAT, chat())
    found = json.loads(data)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    assert found.pop("id") == f"chatcmpl-{headers['x-request-id']}"
    assert abs(found.pop("created") - time.time()) < 30
    assert found.pop("system_fingerprint").startswith("fp_")
    assert found == {
        "object": "chat.completion",
        "model": "passkey",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüße!", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_completion(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("a", "b")
    status, found = live.json("POST", COMPLETIONS, {"model": "alias", "prompt": "x"})
    assert status == 200
    assert found.pop("id").startswith("cmpl-")
    del found["created"], found["system_fingerprint"]
    assert found == {
        "object": "text_completion",
        "model": "passkey",
        "choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_chat_stream(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("a", "", "b", rest="c")
    status, headers, data = live.send("POST", CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, end = events_of(data)
    assert end == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{headers['x-request-id']}"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in (
            ({"role": "assistant", "content": ""}, None),
            ({"content": "a"}, None),
            ({"content": "b"}, None),
            ({"content": "c"}, None),
            ({}, "stop"),
        )
    ] + [[]]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1]["usage"]["total_tokens"] == 10


def test_completion_stream(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("a", "b", rest="c", reason="length")
    *chunks, end = events_of(live.send("POST", COMPLETIONS, {"prompt": "x", "stream": True})[2])
    assert end == "[DONE]"
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
        for text, reason in (("a", None), ("b", None), ("c", "length"))
    ]
    assert all("usage" not in chunk for chunk in chunks)


def test_progress(live: Live, engine: ScriptedEngine) -> None:
    def act(request: Submitted) -> None:
        request.listener(Progress(237, 100, 128, 0.1812))
        request.say("a")
        request.finish()

    engine.on_submit = act
    for path, body in ((CHAT, chat(stream=True)), (COMPLETIONS, {"prompt": "x", "stream": True})):
        shown = events_of(live.send("POST", path, {**body, "return_progress": True})[2])
        progress = [event for event in shown[:-1] if not event["choices"]]
        assert [event["prompt_progress"] for event in progress] == [
            {"total": 237, "cache": 100, "processed": 128, "time_ms": 181}
        ]
        silent = events_of(live.send("POST", path, body)[2])
        assert len(silent) == len(shown) - 1
        assert all("prompt_progress" not in event for event in silent[:-1])


def test_chat_logprobs(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = says_with_logprobs
    alternatives = [
        {"token": "a", "logprob": -0.5, "bytes": [97]},
        {"token": "\ufffd", "logprob": -1.5, "bytes": [0xC3]},
        {"token": "", "logprob": -9999.0, "bytes": []},
    ]
    expected = [
        {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": alternatives}
        for token in ("a", "?", "b")
    ]
    body = chat(logprobs=True, top_logprobs=3)
    choice = live.json("POST", CHAT, body)[1]["choices"][0]
    assert choice["logprobs"] == {"content": expected, "refusal": None}
    chunks = events_of(live.send("POST", CHAT, {**body, "stream": True})[2])[:-1]
    streamed = [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert streamed == [[token] for token in expected]
    assert engine.next().request.logprobs == 3


def test_completion_logprobs(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = says_with_logprobs
    found = live.json("POST", COMPLETIONS, {"prompt": "x", "logprobs": 3})[1]["choices"][0]["logprobs"]
    alternatives = {"a": -0.5, "bytes:\\xc3": -1.5, "": -9999.0}
    assert found == {
        "tokens": ["a", "?", "b"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [alternatives, {**alternatives, "?": -0.5}, {**alternatives, "b": -0.5}],
        "text_offset": [0, 1, 1],  # the second one showed nothing
    }
    chunks = events_of(live.send("POST", COMPLETIONS, {"prompt": "x", "logprobs": 3, "stream": True})[2])[:-1]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]] == [[0], [1], [1]]


@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_count_characters_that_several_tokens_spell(
    live: Live, engine: ScriptedEngine, stream: bool
) -> None:
    def act(request: Submitted) -> None:
        for token, text in ((0xC3, ""), (0xA9, "é"), (0x61, "a")):
            request.listener(NewToken(token, text, LOGPROBS))
        request.finish("length", "", 3)

    engine.on_submit = act
    _, _, data = live.send("POST", COMPLETIONS, {"prompt": "x", "logprobs": 0, "stream": stream})
    answers = events_of(data)[:-1] if stream else [json.loads(data)]
    choices = [answer["choices"][0] for answer in answers]
    assert "".join(choice["text"] for choice in choices) == "éa"
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [offset for logprobs in found for offset in logprobs["text_offset"]] == [0, 0, 1]
    assert [token for logprobs in found for token in logprobs["tokens"]] == ["bytes:\\xc3", "bytes:\\xa9", "a"]


def test_keep_alive_comments_while_nothing_happens(live: Live, engine: ScriptedEngine) -> None:
    connection = live.connect()
    connection.request("POST", CHAT, json.dumps(chat(stream=True)), {"Content-Type": "application/json"})
    request = engine.next()
    time.sleep(0.35)
    answer("a")(request)
    data = connection.getresponse().read()
    connection.close()
    assert data.count(b": keep-alive\n\n") >= 2
    assert [event["choices"][0]["delta"].get("content") for event in events_of(data)[:-1]] == ["", "a", None]


def test_models(client: openai.OpenAI, live: Live) -> None:
    assert [(card.id, card.owned_by) for card in client.models.list()] == [
        ("passkey", "qwen-sparse"),
        ("alias", "qwen-sparse"),
    ]
    assert live.json("GET", "/v1/models/alias")[1]["max_model_len"] == 1024
    with pytest.raises(openai.NotFoundError, match="model must be one of: passkey, alias"):
        client.models.retrieve("other/name")


def test_the_official_client_streams(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("Hello", " you")
    stream = client.chat.completions.create(
        model="passkey",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"repetition_penalty": 1.05, "top_k": 20},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello you"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 4
    sampler = engine.next().request.sampler
    assert (sampler.repetition_penalty, sampler.top_k, sampler.temperature) == (1.05, 20, 1.0)


# Errors.


def error_of(live: Live, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    status, given, data = live.send(method, path, body, headers)
    assert given["content-type"] == "application/json"
    found = json.loads(data)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    record = live.last_record()
    assert (record["status"], record["error"]) == (status, found["error"]["code"] or found["error"]["type"])
    return status, found["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/", None, 404, "unknown_route"),
        ("GET", "/docs", None, 404, "unknown_route"),
        ("GET", "/redoc", None, 404, "unknown_route"),
        ("GET", "/v1/models/", None, 404, "model_not_found"),
        ("POST", "/v1/embeddings", {}, 404, "unknown_route"),
        ("GET", CHAT, None, 405, "method_not_allowed"),
        ("POST", "/health", {}, 405, "method_not_allowed"),
        ("POST", CHAT, b"{", 400, "invalid_json"),
        ("POST", CHAT, b"[" * 1000, 400, "invalid_json"),
        ("POST", CHAT, {}, 400, "missing_required_parameter"),
        ("POST", CHAT, chat(n=2), 400, "unsupported_value"),
        ("POST", CHAT, {**chat(), "model": "gpt-5"}, 404, "model_not_found"),
        ("POST", COMPLETIONS, {"prompt": ""}, 400, "invalid_value"),
    ],
)
def test_refusals(live: Live, method: str, path: str, body: Any, status: int, code: str) -> None:
    found, error = error_of(live, method, path, body)
    assert (found, error["code"]) == (status, code)
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_405_says_what_is_allowed(live: Live) -> None:
    assert live.send("DELETE", CHAT)[1]["allow"] == "POST"


@pytest.mark.parametrize(
    ("refusal", "status", "kind", "code"),
    [
        (TooLongError("too long"), 400, "invalid_request_error", "context_length_exceeded"),
        (ValueError("token 300 is none"), 400, "invalid_request_error", "invalid_value"),
        (QueueFullError("full", retry_after=7), 429, "rate_limit_error", "queue_full"),
        (ShuttingDownError("stopping"), 503, "server_error", "shutting_down"),
        (RuntimeError(SECRET), 500, "server_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(
    live: Live, engine: ScriptedEngine, refusal: Exception, status: int, kind: str, code: str | None, stream: bool
) -> None:
    engine.refusal = refusal
    answered, headers, data = live.send("POST", CHAT, chat(stream=stream))
    error = json.loads(data)["error"]
    assert (answered, error["type"], error["code"]) == (status, kind, code)
    assert SECRET not in data.decode()
    assert headers.get("retry-after") == {429: "7", 503: "30"}.get(status)


@pytest.mark.parametrize(("retry", "status"), [(True, 503), (False, 500)])
def test_what_fails_later(live: Live, engine: ScriptedEngine, retry: bool, status: int) -> None:
    engine.on_submit = lambda request: request.fail("no memory", retry=retry)
    found, error = error_of(live, "POST", CHAT, chat())
    assert (found, error["message"]) == (status, "no memory")
    assert live.last_record()["finish_reason"] == "error"

    def act(request: Submitted) -> None:
        request.say("a")
        request.fail("no memory", retry=retry)

    engine.on_submit = act
    status, _, data = live.send("POST", CHAT, chat(stream=True))
    *chunks, failed, end = events_of(data)
    assert (status, len(chunks), end) == (200, 2, "[DONE]")
    assert failed["error"]["message"] == "no memory"
    assert live.last_record()["error"] == ("overloaded" if retry else "server_error")


def test_the_official_client_sees_errors(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match="n is not supported: only 1 is accepted, got 2"):
        client.chat.completions.create(model="passkey", messages=messages, n=2)
    engine.refusal = QueueFullError("full", retry_after=1)
    with pytest.raises(openai.RateLimitError, match="full"):
        client.chat.completions.create(model="passkey", messages=messages)
    engine.refusal = None
    engine.on_submit = lambda request: request.fail("broken")
    with pytest.raises(openai.APIError, match="broken"):
        list(client.chat.completions.create(model="passkey", messages=messages, stream=True))


def test_an_engine_that_stops(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = lambda request: request.finish("abort")
    assert error_of(live, "POST", CHAT, chat())[1]["code"] == "shutting_down"
    events = events_of(live.send("POST", CHAT, chat(stream=True))[2])
    assert events[-2]["error"]["code"] == "shutting_down"


# Clients that leave.


def post(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_leaves_cancels_its_request(
    live: Live, engine: ScriptedEngine, stream: bool, reset: bool
) -> None:
    connection = live.raw(post(CHAT, chat(stream=stream)))
    request = engine.next()
    request.say("a")
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()
    assert request.cancelled.wait(10)
    record = live.last_record()
    assert (record["status"], record["error"], record["finish_reason"]) == (
        200 if stream else 499,
        "client_gone",
        "abort",
    )


def test_a_client_that_leaves_before_its_request_is_submitted(live: Live, engine: ScriptedEngine) -> None:
    def act(request: Submitted) -> None:
        time.sleep(0.3)

    engine.on_submit = act
    connection = live.raw(post(CHAT, chat()))
    eventually(lambda: engine.submitted, "the engine has it")
    connection.close()
    assert engine.next().cancelled.wait(10)
    assert live.last_record()["error"] == "client_gone"


def test_a_client_that_leaves_and_is_refused(live: Live, engine: ScriptedEngine) -> None:
    def act(request: Submitted) -> None:
        time.sleep(0.3)
        raise QueueFullError("full", retry_after=1)

    engine.on_submit = act
    connection = live.raw(post(CHAT, chat()))
    eventually(lambda: engine.submitted, "the engine has it")
    connection.close()
    assert live.last_record()["error"] == "client_gone"


def test_a_client_that_has_been_answered_is_not_cancelled(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("a")
    for stream in (False, True):
        live.send("POST", CHAT, chat(stream=stream))
        assert not engine.next().cancelled.is_set()
        assert live.last_record()["error"] is None


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("ticks", range(5))
def test_a_cancellation_that_comes_with_an_event_is_not_lost(
    engine: ScriptedEngine, timeout: float | None, ticks: int
) -> None:
    """asyncio.wait_for would lose it, and the request of a client that has left would go on to its end."""

    async def run() -> None:
        metrics = Metrics("passkey", 1024, engine.snapshot)
        generation = Generation(engine, metrics, Record())
        waiting = asyncio.ensure_future(generation.next_events(timeout))
        await asyncio.sleep(0)
        generation._hear(NewToken(97, "a", None), 0.0)
        for _ in range(ticks):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            assert await waiting == [NewToken(97, "a", None)]

    asyncio.run(run())


# Metrics and logs.


def metrics_of(live: Live) -> dict[str, float]:
    _, headers, data = live.send("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=")
    lines = [line.rsplit(" ", 1) for line in data.decode().splitlines() if not line.startswith("#")]
    return {name.replace('model_name="passkey"', "").replace("{}", ""): float(value) for name, value in lines}


def test_metrics(live: Live, engine: ScriptedEngine) -> None:
    before = metrics_of(live)
    engine.on_submit = answer("a", "b", "c")
    live.send("POST", CHAT, chat())
    never_scheduled = Finished("length", "", stats(0, scheduled=None, first_token=None, density=None))
    engine.on_submit = lambda request: request.listener(never_scheduled)
    live.send("POST", CHAT, chat(stream=True))
    after = metrics_of(live)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    prefix = "qwen_sparse:"
    for name, value in {
        "prompt_tokens_total": 7,
        "generation_tokens_total": 3,
        'request_success_total{finished_reason="stop",}': 1,
        'request_success_total{finished_reason="length",}': 1,
        'request_success_total{finished_reason="error",}': 0,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "request_queue_time_seconds_count": 2,
        "request_queue_time_seconds_sum": 1 + 6,
        "request_prefill_time_seconds_sum": 2,
        "request_decode_time_seconds_sum": 3,
        "request_inference_time_seconds_sum": 5,
        "request_time_per_output_token_seconds_sum": 1.5,
        "request_prompt_tokens_sum": 7,
        "request_generation_tokens_sum": 3,
        "request_attention_density_sum": 0.25,
        "request_attention_density_count": 1,
    }.items():
        assert grown[prefix + name] == pytest.approx(value), name
    for name, value in {
        "num_requests_running": 3,
        "num_requests_waiting": 5,
        "kv_cache_usage_perc": 0.5,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 40,
        "num_preemptions_total": 2,
    }.items():
        assert after[prefix + name] == value, name


@pytest.mark.parametrize("turn", ["first", "second"])  # nothing is left of the first
def test_health(live: Live, engine: ScriptedEngine, turn: str) -> None:
    status, _, data = live.send("GET", "/health")
    assert (status, data) == (200, b"")
    engine.healthy = False  # a GPU that answers no more
    status, _, data = live.send("GET", "/health")
    assert (status, json.loads(data)["error"]["code"]) == (503, "engine_stopped")


def test_a_record_per_request(live: Live, engine: ScriptedEngine) -> None:
    engine.on_submit = answer("a", "b")
    _, headers, _ = live.send("POST", CHAT, chat(SECRET, stream=True))
    record = live.last_record()
    assert record.pop("id") == headers["x-request-id"]
    assert record.pop("time").endswith("+00:00")
    assert 0 < record.pop("total_seconds") < 20
    assert record == {
        "event": "request",
        "route": CHAT,
        "status": 200,
        "stream": True,
        "finish_reason": "stop",
        "error": None,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "completion_tokens": 2,
        "queue_seconds": 1.0,
        "prefill_seconds": 2.0,
        "decode_seconds": 3.0,
        "density": 0.25,
        "preemptions": 0,
    }


@pytest.mark.parametrize("raised", [RuntimeError(SECRET), KeyError(SECRET), UnicodeError(SECRET)])
def test_no_text_in_logs(
    live: Live, engine: ScriptedEngine, raised: Exception, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """Neither of prompts and answers, nor of what is wrong with a request, nor of exceptions; not on paths either."""
    engine.on_submit = answer(SECRET)
    live.send("POST", CHAT, chat(SECRET))
    live.send("POST", CHAT, chat(SECRET, n=SECRET, **{SECRET: SECRET}))
    live.send("POST", CHAT, json.dumps(chat(SECRET)).encode()[:-5])
    live.send("POST", CHAT, {**chat(SECRET), "model": SECRET})
    live.send("GET", f"/{SECRET.replace(' ', '%20')}")
    live.send("GET", f"/v1/models/{SECRET.replace(' ', '%20')}")
    engine.refusal = raised
    status, _, data = live.send("POST", CHAT, chat(SECRET))
    if not isinstance(raised, ValueError):
        assert status == 500
        assert SECRET not in data.decode()
        assert live.records[-1]["error"] == type(raised).__name__
        assert live.records[-1]["where"][-1].startswith("__init__.py:")
    eventually(lambda: len(live.records) == 7, "all are recorded")
    output = capfd.readouterr()
    for place in (json.dumps(live.records), output.out, output.err, caplog.text):
        assert "nobody" not in place


def test_records_are_lines_of_json_on_stderr(engine: ScriptedEngine, capfd: pytest.CaptureFixture[str]) -> None:
    from qwen_sparse.serve.records import write_line

    with live_server(engine, write_record=write_line) as live:
        live.send("GET", "/health")
        live.send("GET", "/no/such/route")
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["route"] for line in lines] == ["/health", None]
