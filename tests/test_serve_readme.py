"""The README's examples of serving, as they stand there but for the model's name and the port."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import passkey_model
from serving.process import Process, serving_process
from test_docs import Block, split_blocks

README = Path(__file__).resolve().parent.parent / "README.md"
NAME = "Qwen/Qwen2.5-7B-Instruct-1M"
SERVER = "http://localhost:8000"


def blocks() -> list[Block]:
    """Those of the section."""
    section = README.read_text(encoding="utf-8").partition("\n## Serve it\n")[2].partition("\n## ")[0]
    return split_blocks(section)[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    program, command, *arguments = shlex.split(blocks()[0].code)
    assert (program, command) == ("qwen-sparse", "serve")
    arguments = [str(passkey_model().path) if argument == NAME else argument for argument in arguments]
    with serving_process(*arguments, "--port", "0") as process:
        process.ready()
        yield process


def adapted(block: Block, server: Process) -> str:
    """The block for this server and its model."""
    assert block.code.count(NAME) == 1
    assert block.code.count(SERVER) == 1
    host, port = server.ready()
    return block.code.replace(NAME, "passkey").replace(SERVER, f"http://{host}:{port}")


def test_the_section_has_these_blocks() -> None:
    assert [block.language for block in blocks()] == ["bash", "bash", "python"]


def test_curl(server: Process) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    code = adapted(blocks()[1], server)
    done = subprocess.run(["bash", "-c", code], capture_output=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]
    assert answer["model"] == "passkey"


def test_python(server: Process) -> None:
    code = adapted(blocks()[2], server)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip()
