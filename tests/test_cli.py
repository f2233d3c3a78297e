"""The command line: output, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_sparse
from conftest import DUAL_CHUNK, WriteCheckpoint
from qwen_sparse import generate_text, load_model
from qwen_sparse.cli import main


@pytest.fixture
def checkpoint(write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint(tokenizer=True, sparse=(40, 110), dual_chunk_attention_config=DUAL_CHUNK)


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "".join(generate_text(load_model(checkpoint), "The sky", max_new_tokens=8))
    arguments = ["generate", "--model", checkpoint, "--prompt", "The sky", "--max-new-tokens", "8"]
    assert run(capsys, *arguments) == (0, expected + "\n", "")
    code, out, err = run(capsys, *arguments, "--progress")
    assert (code, out) == (0, expected + "\n")
    assert "prefill: 100%" in err


def test_prompt_from_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(checkpoint)
    expected = "".join(generate_text(model, "Grüße\n\nWhat?", max_new_tokens=4)) + "\n"
    (tmp_path / "text.txt").write_text("Grüße", encoding="utf-8")
    options = ["--prompt", "What?", "--max-new-tokens", "4"]
    assert run(capsys, "generate", "--model", checkpoint, "--file", tmp_path / "text.txt", *options)[1] == expected
    monkeypatch.setattr("sys.stdin", (tmp_path / "text.txt").open(encoding="utf-8"))
    assert run(capsys, "generate", "--model", checkpoint, "--file", "-", *options)[1] == expected


def test_options_reach_the_model(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def spy(model: object, prompt: object, **options: object) -> list[str]:
        seen.update(options, model=model, prompt=prompt)
        return ["text"]

    monkeypatch.setattr("qwen_sparse.cli.generate_text", spy)
    options = "--sparse --kv-cache-dtype int8 --dtype bfloat16 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3"
    options += " --min-p 0.1 --repetition-penalty 1.1 --stop END --stop STOP --chunk-tokens 64"
    options += " --max-seq-len 300 --truncate tail"
    code, out, _ = run(
        capsys, "generate", "--model", checkpoint, "--prompt", "x" * 400, "--max-new-tokens", "9", *options.split()
    )
    assert (code, out) == (0, "text\n")
    model = seen.pop("model")
    assert isinstance(model, qwen_sparse.model.decoder.Decoder)
    assert (model.attention, model.kv_cache_dtype, str(model.dtype)) == ("sparse", "int8", "torch.bfloat16")
    assert seen.pop("prompt") == [ord("x")] * 291
    assert seen == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop": ["END", "STOP"],
        "seed": 3,
        "chunk_tokens": 64,
        "progress": False,
    }
    run(capsys, "generate", "--model", checkpoint, "--prompt", "x", "--dense")
    assert seen["model"].attention == "dense"


def test_chat(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(source)
    expected = "".join(generate_text(load_model(checkpoint), "[system]Brief.[user]Hi", max_new_tokens=4)) + "\n"
    arguments = ["--prompt", "Hi", "--chat", "--system", "Brief.", "--max-new-tokens", "4"]
    assert run(capsys, "generate", "--model", checkpoint, *arguments)[1] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --prompt, --file or both"),
        (["--file", "absent.txt"], "absent.txt"),
        (["--prompt", "x", "--system", "y"], "--system goes with --chat"),
        (["--prompt", "x", "--chat"], "this tokenizer has no chat template"),
        (["--prompt", "x", "--dtype", "int4"], "dtype must be one of bfloat16, float16, float32, got 'int4'"),
        (["--prompt", "x", "--device", "mps"], "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'mps'"),
        (["--prompt", "x", "--device", "cuda:99"], "got 'cuda:99'"),
        (["--prompt", "x", "--threads", "0"], f"--threads must be in [1, {4 * (os.cpu_count() or 1)}]"),
        (["--prompt", "x", "--threads", "100000"], "CPUs, got 100000"),
        (["--prompt", "x", "--threads", "99999999999"], "CPUs, got 99999999999"),
        (["--prompt", "x", "--seed", str(2**64)], f"seed must be in [-{2**63}, {2**64 - 1}], got {2**64}"),
        (["--prompt", "x", "--temperature", "1e-310"], "temperature must be 0 or >= 1e-250, got 1e-310"),
        (
            ["--prompt", "x", "--coverage", "0.9", "--dense"],
            "--coverage is of sparse prefill and cannot go with --dense",
        ),
        (["--prompt", ""], "--prompt must have text, and has none"),
        (["--prompt", "x", "--model", ""], "--model must not be empty"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["--prompt", "x", "--truncate", "tail"], "--truncate needs --max-seq-len"),
        (
            ["--prompt", "x", "--truncate", "tail", "--max-seq-len", "100"],
            "--truncate: --max-new-tokens must be less than --max-seq-len = 100, got 256",
        ),
        (
            ["--prompt", "x", "--truncate", "tail", "--max-seq-len", "100", "--max-new-tokens", "100"],
            "--truncate: --max-new-tokens must be less than --max-seq-len = 100, got 100",
        ),
        (["--prompt", "x" * 50, "--max-seq-len", "40", "--max-new-tokens", "5"], "max_seq_len = 40 tokens"),
    ],
)
def test_errors_are_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, "generate", "--model", checkpoint, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("qwen-sparse generate: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_file_that_is_not_utf8_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Grüße".encode("latin-1"))
    rule = "must be UTF-8 text, and is not UTF-8 at byte 2"
    for command, options in {
        "generate": ["--file", file],
        "calibrate": ["--file", file, "--length", "3", "-o", tmp_path / "out.json"],
    }.items():
        code, out, err = run(capsys, command, "--model", checkpoint, *options)
        assert (code, out, err) == (2, "", f"qwen-sparse {command}: {file} {rule}\n")
    monkeypatch.setattr("sys.stdin", file.open(encoding="utf-8"))
    _, _, err = run(capsys, "generate", "--model", checkpoint, "--file", "-")
    assert err == f"qwen-sparse generate: standard input {rule}\n"
    (checkpoint / "chat_template.jinja").write_bytes(file.read_bytes())
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "x", "--chat")
    assert (code, err) == (2, f"qwen-sparse generate: {checkpoint / 'chat_template.jinja'} {rule}\n")


def test_a_broken_model_is_one_line(write_checkpoint: WriteCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_checkpoint(tokenizer=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, directory / "model.safetensors")
    code, _, err = run(capsys, "generate", "--model", directory, "--prompt", "x")
    assert (code, err) == (2, "qwen-sparse generate: generate: the logits of new token 0 are not finite\n")


def test_out_of_memory_is_said(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qwen_sparse.options.load_model", fail)
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "x")
    assert (code, err) == (2, "qwen-sparse generate: out of memory\n")


def test_wrong_model_and_usage(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "memory", "--model", tmp_path)
    assert (code, err) == (2, f"qwen-sparse memory: no config.json in {tmp_path}\n")
    code, _, err = run(capsys, "memory", "--model", checkpoint, "--context", "1" + "0" * 400)  # no float is as large
    assert (code, err.count("\n")) == (2, 1)
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--prompt", "x"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        main(["generate", "--model", "m", "--prompt", "x", "--dense", "--sparse"])


def test_interrupt(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_sparse.options.load_model", interrupted)
    code, _, err = run(capsys, "generate", "--model", checkpoint, "--prompt", "x")
    assert (code, err) == (130, "\ninterrupted\n")


def test_memory(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "model.safetensors").unlink()  # config.json is enough
    options = ["--context", "1000", "50000", "--batch", "1", "32", "--dtype", "bfloat16"]
    code, out, err = run(capsys, "memory", "--model", checkpoint, *options)
    assert (code, err) == (0, "")
    table = out.splitlines()
    code, out, err = run(capsys, "memory", "--model", checkpoint, *options, "--json")
    assert (code, err) == (0, "")
    records = json.loads(out)
    assert len(table) == 2 + len(records) == 10
    config = qwen_sparse.model.config.ModelConfig.from_directory(checkpoint)
    for row, record in zip(table[2:], records, strict=True):
        estimate = qwen_sparse.estimate_memory(
            config,
            record["context"],
            batch=record["batch"],
            kv_cache_dtype=record["kv_cache_dtype"],
            dtype=qwen_sparse.model.config.parse_dtype("bfloat16"),
        )
        assert record["total"] == estimate.total
        assert record["kv_cache"] == estimate.kv_cache
        assert row.split()[:3] == [f"{record['context']:,}", str(record["batch"]), record["kv_cache_dtype"]]
        assert row.endswith(qwen_sparse.base.resources.format_bytes(estimate.total))
    assert [record["kv_cache_dtype"] for record in records] == ["bfloat16", "int8"] * 4


def test_enabled_sparse_attention_without_budgets(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs no budgets runs, and one command makes them."""
    enabled = {**DUAL_CHUNK, "sparse_attention_enabled": True}
    checkpoint = write_checkpoint(tokenizer=True, dual_chunk_attention_config=enabled)
    generate = ["generate", "--model", checkpoint, "--prompt", "The sky", "--max-new-tokens", "2"]
    assert run(capsys, *generate, "--dense")[0] == 0
    assert run(capsys, *generate, "--coverage", "0.9")[0] == 0
    assert run(capsys, "memory", "--model", checkpoint)[0] == 0
    code, _, err = run(capsys, *generate)
    assert code == 2
    assert "attention 'auto' needs budgets where sparse_attention_enabled is true in config.json" in err
    budgets = checkpoint / "sparse_attention_config.json"
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    calibrate = ["calibrate", "--model", checkpoint, "--length", "500", "--file", tmp_path / "text.txt"]
    assert run(capsys, *calibrate, "--pair", "30", "50", "-o", budgets)[0] == 0
    assert run(capsys, *generate)[0] == 0


def test_memory_on_a_gpu_needs_none(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def activations(*options: str) -> int:
        arguments = ["memory", "--model", checkpoint, "--context", "100000", "--dtype", "bfloat16", *options]
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert out.startswith(f"{checkpoint} on {options[-1]}, weights and activations in bfloat16")
        return int(json.loads(run(capsys, *arguments, "--json")[1])[0]["activations"])

    config = qwen_sparse.model.config.ModelConfig.from_directory(checkpoint)
    for device in ("cpu", "cuda:98"):
        expected = qwen_sparse.estimate_memory(config, 100_000, dtype=torch.bfloat16, device=device)
        assert activations("--device", device) == expected.activations
    assert activations("--device", "cuda:98") > activations("--device", "cpu")  # of larger prefill chunks
    code, _, err = run(capsys, "memory", "--model", checkpoint, "--device", "cuda", "--dtype", "float32")
    assert code == 2
    assert err == "qwen-sparse memory: dtype must be 'bfloat16' or 'float16' on a GPU, got 'float32'\n"


def test_memory_defaults_to_what_the_model_is_for(
    write_checkpoint: WriteCheckpoint, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contexts(directory: Path) -> list[int]:
        return [record["context"] for record in json.loads(run(capsys, "memory", "--model", directory, "--json")[1])]

    assert max(contexts(checkpoint)) == 2**20
    assert max(contexts(write_checkpoint("plain", max_position_embeddings=32768))) == 32768


def test_no_command_reads_more_than_the_model(
    write_checkpoint: WriteCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """YaRN by a model card: max_position_embeddings stays, and the factor says what is read."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    path = str(write_checkpoint(tokenizer=True, rope_scaling=yarn))
    generate = ["generate", "--model", path, "--prompt", "x", "--max-new-tokens", "1", "--no-progress"]
    for command in (
        [*generate, "--max-seq-len"],
        ["chat", "--model", path, "--max-seq-len"],
        ["memory", "--model", path, "--context"],
        ["serve", "--model", path, "--port", "0", "--max-model-len"],
    ):
        assert main([*command, "16385"]) == 2
        assert "must be at most 16384, the tokens that this model reads" in capsys.readouterr().err
    assert main([*generate, "--max-seq-len", "16384"]) == 0
    assert main(["memory", "--model", path, "--context", "16384"]) == 0


def test_config_is_chosen_by_name(write_checkpoint: WriteCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tokenizer=True)
    raw = json.loads((path / "config.json").read_text())
    (path / "config_1m.json").write_text(json.dumps({**raw, "dual_chunk_attention_config": DUAL_CHUNK}))
    assert main(["memory", "--model", str(path), "--context", "1000000"]) == 2
    assert main(["memory", "--model", str(path), "--context", "1000000", "--config", "config_1m.json"]) == 0
    capsys.readouterr()
    options = ["--prompt", "x", "--max-new-tokens", "1", "--no-progress", "--max-seq-len", "100000"]
    assert main(["generate", "--model", str(path), *options]) == 2
    assert main(["generate", "--model", str(path), *options, "--config", "config_1m.json"]) == 0


def test_demo_is_dispatched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = types.ModuleType("qwen_sparse.demo")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--lengths", type=int)

    demo.add_arguments = add_arguments  # type: ignore[attr-defined]
    demo.run = lambda args: args.lengths  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen_sparse.demo", demo)
    monkeypatch.setattr(qwen_sparse, "demo", demo, raising=False)
    assert main(["demo", "--lengths", "7"]) == 7


def test_device_of_the_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "demo", "--device", "cuda:99", "--dtype", "bfloat16", "--output", tmp_path / "demo")
    assert (code, out) == (2, "")
    assert "got 'cuda:99'" in err
    assert not (tmp_path / "demo").exists()


def test_a_demo_that_does_not_fit_is_refused_before_its_prompt_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a prompt was made")

    monkeypatch.setattr("qwen_sparse.demo.make_prompt", fail)
    code, out, err = run(capsys, "demo", "--length", "999999999", "--output", tmp_path / "demo")
    assert (code, out) == (2, "")
    assert "a sequence of 511999999488 tokens is estimated to need" in err
    assert not (tmp_path / "demo").exists()


def test_as_a_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qwen_sparse.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("generate", "memory", "demo"):
        assert command in result.stdout
    version = subprocess.run(
        [sys.executable, "-m", "qwen_sparse.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout == f"qwen-sparse {qwen_sparse.__version__}\n"


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("sys.modules['torch'] = None", "qwen_sparse needs torch >= 2.10, and torch cannot be imported"),
        ("import torch; torch.__version__ = '2.9.1'", "qwen_sparse needs torch >= 2.10, got torch 2.9.1"),
        ("sys.modules['qwen_sparse._C'] = None", "the extension module qwen_sparse._C cannot be imported"),
    ],
    ids=["no_torch", "old_torch", "no_extension"],
)
def test_import_errors(setup: str, message: str) -> None:
    code = f"import sys; {setup}\nimport qwen_sparse"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"ImportError: {message}" in result.stderr


def test_nothing_needs_the_helpers_of_tests() -> None:
    """``qwen_sparse.testing`` is for tests and benchmarks; the package does without."""
    package = Path(qwen_sparse.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.parent != package / "testing"]
    assert package / "cli.py" in sources
    importing = re.compile(r"^\s*(from|import)\s.*\btesting\b", re.MULTILINE)
    assert [path.name for path in sources if importing.search(path.read_text())] == []
