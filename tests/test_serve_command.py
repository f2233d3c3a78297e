"""``qwen-sparse serve`` as a process: how it starts, how it fails to, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import WriteCheckpoint
from qwen_sparse import generate_text
from qwen_sparse.cli import main
from qwen_sparse.passkey import make_prompt
from qwen_sparse.serve import command
from qwen_sparse.serve.command import add_arguments, size
from qwen_sparse.serve.server import bind
from serving import CHAT, chat, eventually, passkey_model
from serving.process import Process, serving_process

MODEL = str(passkey_model().path)
OPTIONS = ["--port", "0", "--max-model-len", "4096", "--max-num-batched-tokens", "256"]


@contextlib.contextmanager
def running(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Process]:
    with serving_process("--model", MODEL, *OPTIONS, *arguments, environment=environment) as started:
        yield started


def ask(process: Process, body: Any, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*process.ready(), timeout=60)
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
    return connection.getresponse()


LONG = chat("import os\n", stream=True, max_tokens=4000, ignore_eos=True)


def test_start_answer_and_drain() -> None:
    """The first signal lets answers be finished and takes no new connections."""
    with running("--served-model-name", "passkey", "other") as server:
        host, port = server.ready()
        assert server.out == [f"qwen-sparse serve: ready at http://127.0.0.1:{port}/v1: passkey, up to 4096 tokens"]
        answer = ask(server, {**LONG, "max_tokens": 300})
        assert answer.status == 200
        assert answer.read(10)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: len(server.out) == 2, "it says that it stops")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5)
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert server.wait() == 0
        (record,) = server.records()
        assert (record["status"], record["finish_reason"], record["completion_tokens"]) == (200, "length", 300)
        assert all(line.startswith("{") for line in server.err)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(first: signal.Signals) -> None:
    with running() as server:
        answer = ask(server, LONG)
        assert answer.read(10)
        server.process.send_signal(first)
        eventually(lambda: len(server.out) == 2, "it says that it stops")
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT if first == signal.SIGTERM else signal.SIGTERM)
        assert server.wait() == 128 + first
        assert time.monotonic() - started < 10
        assert not any("Traceback" in line for line in server.err)


def test_a_second_signal_does_not_wait_for_a_prefill_chunk() -> None:
    """Dense attention over 60000 tokens in one chunk: seconds in which the engine cannot be interrupted."""
    options = ["--max-model-len", "65536", "--max-num-batched-tokens", "65536", "--dense", "--dtype", "float32"]
    with running(*options) as server:
        answer = ask(server, chat("x" * 60000, stream=True))
        assert answer.read(10)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: len(server.out) == 2, "it says that it stops")
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - started < 3
        (record,) = server.records()
        assert record["error"] in ("cancelled", "client_gone")
        assert len(server.err) == 1


def test_a_key_from_the_environment() -> None:
    with running("--host", "0.0.0.0", environment={command.API_KEY_VARIABLE: "secret"}) as server:
        assert ask(server, chat()).status == 401
        assert ask(server, chat(max_tokens=1), {"Authorization": "Bearer secret"}).status == 200
        eventually(lambda: [record["status"] for record in server.records()] == [401, 200], "both are logged")
        assert not any("secret" in line for line in (*server.out, *server.err))


def test_a_warning_where_anyone_can_reach_it() -> None:
    with running("--host", "0.0.0.0") as server:
        idle = socket.create_connection(server.ready())
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        idle.close()
        (warning,) = server.err
        rule = r"qwen-sparse serve: warning: anyone who reaches http://0\.0\.0\.0:\d+ can use it: there is no --api-key"
        assert re.fullmatch(rule, warning)


def test_coverage() -> None:
    """Above the checkpoint's threshold, 2048 tokens, prompts take block groups; answers are those of ``generate``."""
    model = passkey_model().with_options(attention="auto", coverage=0.5)
    text = make_prompt(3000, depth=0.4, seed=3).text
    messages = model.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    with running("--coverage", "0.5", "--served-model-name", "passkey") as server:
        answers = [json.load(ask(server, chat(text, temperature=0, max_tokens=8))) for _ in range(2)]
        eventually(lambda: len(server.records()) == 2, "both are logged")
        cold, warm = server.records()
    expected = "".join(generate_text(model, messages, max_new_tokens=8, chunk_tokens=256))
    assert answers[0]["choices"][0]["message"]["content"] == expected
    assert cold["density"] < 0.5
    assert (warm["density"], warm["cached_tokens"]) == (1, cold["prompt_tokens"] // 128 * 128)


def test_ipv6() -> None:
    try:
        listening = bind("::1", 0)
    except OSError as error:
        pytest.skip(f"no IPv6: {error}")
    with listening:
        assert re.fullmatch(r"http://\[::1\]:\d+", command._url(listening))


# Failures, each in one line and before the weights are read.


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(command, "load", refuse)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line on stderr."""
    assert main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qwen-sparse serve: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.usefixtures("no_weights")
def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = fails(capsys, "--model", MODEL, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in error


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/directory/anywhere"], "no model directory at no/such/directory/anywhere"),
        (["--model", MODEL, "--port", "70000"], "--port must be in [0, 65535], got 70000"),
        (["--model", MODEL, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0: "),
        (["--model", MODEL, "--threads", "0"], "--threads must be in [1, "),
        (["--model", ""], "--model must not be empty"),
        (["--model", MODEL, "--coverage", "0.9", "--dense"], "--coverage is of sparse prefill and cannot go with"),
        (["--model", MODEL, "--max-num-batched-tokens", "0"], "--max-num-batched-tokens must be >= 1, got 0"),
        (["--model", MODEL, "--kv-cache-memory-bytes", "-1"], "--kv-cache-memory-bytes must be >= 1, got -1"),
        (["--model", MODEL, "--max-queue", "0"], "--max-queue must be >= 1, got 0"),
        (["--model", MODEL, "--memory-utilization", "2"], "memory_utilization must be in (0, 1], got 2.0"),
        (["--model", MODEL, "--api-key", ""], "--api-key and QWEN_SPARSE_API_KEY must not be empty"),
        (["--model", MODEL, "--served-model-name", ""], "--served-model-name must not be empty"),
        (["--model", MODEL, "--coverage", "3"], "coverage must lie in (0, 1), got 3.0"),
        (["--model", MODEL, "--device", "cuda:99"], "got 'cuda:99'"),
        (["--model", MODEL, "--dtype", "int4"], "--dtype must be one of bfloat16, float16, float32, got 'int4'"),
        (["--model", MODEL, "--max-model-len", "100000000000"], "max_model_len = 100000000000 tokens needs"),
        (["--model", MODEL, "--kv-cache-memory-bytes", "5"], "kv_cache_memory must hold one sequence"),
        (["--model", MODEL, "--kv-cache-memory-bytes", str(10**15)], "are available; lower kv_cache_memory"),
    ],
)
def test_what_cannot_work(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in fails(capsys, "--port", "0", *arguments)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json in "),
        ("tokenizer.json", None, "no tokenizer.json in "),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("generation_config.json", '{"top_p": 5}', "generation_config.json: top_p must be in (0, 1], got 5"),
    ],
)
def test_broken_checkpoints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(MODEL, copy)
    (copy / file).unlink(missing_ok=True)
    if content is not None:
        (copy / file).write_text(content)
    assert message in fails(capsys, "--model", str(copy), "--port", "0")


def test_weights_that_are_missing(capsys: pytest.CaptureFixture[str], write_checkpoint: WriteCheckpoint) -> None:
    directory = write_checkpoint(tokenizer=True)
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in fails(capsys, "--model", str(directory), "--port", "0")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = fails(capsys, "--model", MODEL)
    assert "serving needs the packages of an extra: pip install --no-build-isolation '.[serve]'" in error
    assert package in error


ORIGINS = ["*", "null", "https://example.org", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_origins(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setattr(command, "_serve", lambda args, *_: 7 if args.allowed_origin == [origin] else 1)
    assert main(["serve", "--model", MODEL, "--port", "0", "--allowed-origin", origin]) == 7


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("origin", "rule"),
    [
        *((origin, "must be scheme://host or scheme://host:port") for origin in ("foo", "", "example.org", "http://")),
        *((f"https://{rest}", "must be scheme://host") for rest in ("a.org/", "a.org/x", "A.org", "u@a.org", "a:b")),
        ("https://a.org:443", "must leave out https's default port"),
        ("http://a.org:80", "must leave out http's default port"),
    ],
)
def test_what_is_no_origin(capsys: pytest.CaptureFixture[str], origin: str, rule: str) -> None:
    error = fails(capsys, "--model", MODEL, "--port", "0", "--allowed-origin", origin)
    assert f"--allowed-origin {rule}" in error
    assert error.endswith(f"got {origin!r}\n")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("131072", 131072),
        ("8k", 8000),
        ("8K", 8192),
        ("1m", 10**6),
        ("1M", 2**20),
        ("1.5K", 1536),
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("512MB", 512 * 10**6),
        ("64kB", 64000),
        ("-1", -1),
    ],
)
def test_sizes(text: str, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "8 K", "8T", "8kiB", "1e3", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be a (number such as|whole number)"):
        size(text)


def test_options_of_vllm() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    pasted = "--model x --gpu-memory-utilization 0.8 --enable-auto-tool-choice --tool-call-parser hermes"
    args = parser.parse_args(f"{pasted} --max-model-len 128K --kv-cache-memory-bytes 2GB".split())
    assert (args.memory_utilization, args.max_model_len, args.kv_cache_memory_bytes) == (0.8, 131072, 2 * 10**9)


def test_names(tmp_path: Path) -> None:
    assert command._served_names("Qwen/Qwen2.5-7B-Instruct-1M", None) == ("Qwen/Qwen2.5-7B-Instruct-1M",)
    assert command._served_names(str(tmp_path), None) == (tmp_path.name,)
    assert command._served_names(str(tmp_path), ["a", "b"]) == ("a", "b")


def test_options_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(args: Any, options: Any, listening: socket.socket, keys: Any, names: Any) -> int:
        seen.update(args=args, options=options, keys=keys, names=names)
        return 7

    monkeypatch.setattr(command, "_serve", spy)
    monkeypatch.delenv(command.API_KEY_VARIABLE, raising=False)
    options = "--port 0 --max-model-len 2048 --max-num-batched-tokens 128 --max-num-seqs 3 --max-queue 5"
    options += " --kv-cache-memory-bytes 100000000 --memory-utilization 0.5 --no-prefix-caching --api-key a --api-key b"
    assert main(["serve", "--model", MODEL, *options.split()]) == 7
    assert seen["options"] == command.EngineOptions(2048, 128, 3, 5, 100_000_000, 0.5, False)
    assert (seen["keys"], seen["names"]) == (("a", "b"), ("passkey",))
