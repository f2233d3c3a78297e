"""Tokenizer, chat template and streaming decoder."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from conftest import byte_tokenizer
from qwen_sparse import Tokenizer
from qwen_sparse.tokenizer import StreamDecoder

TEMPLATE = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' -}}\n"
    "{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界 🙂"}]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_round_trip(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    text = "Grüße, 世界 🙂\n\ttail "
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 259


def test_special_tokens(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("a<|im_end|>") == [ord("a"), 258]
    assert tokenizer.decode([ord("a"), 258]) == "a"
    assert tokenizer.decode([ord("a"), 258], skip_special_tokens=False) == "a<|im_end|>"


def test_text_that_is_none(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"text must be Unicode, got 'a\\udcff': lone surrogates"):
        Tokenizer.from_directory(directory).encode("a\udcff")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("plain", ["plain"]),
        ("<|im_start|>user\nHi<|im_end|>\n", ["<|im_start|>user\nHi", "<|im_end|>\n"]),
        ("a <|im_end|><|im_end|> b", ["a ", "<|im_end|>", "<|im_end|> b"]),
        ("<|im_end|>_longer<|im", ["<|im_end|>_longer<|im"]),
    ],
)
def test_parts(text: str, parts: list[str]) -> None:
    backend = byte_tokenizer()
    backend.add_special_tokens(["<|im_end|>_longer"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.parts(text) == parts
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(text)


@pytest.mark.parametrize("flag", ["lstrip", "single_word", "normalized"])
def test_text_that_cannot_be_cut(flag: str) -> None:
    backend = byte_tokenizer()
    backend.add_tokens([AddedToken("<tool>", **{"normalized": False, flag: True})])
    text = "a <tool> b<|im_end|>c"
    assert Tokenizer(backend).parts(text) == [text]
    assert Tokenizer(byte_tokenizer()).parts(text) == ["a <tool> b", "<|im_end|>c"]


@pytest.mark.parametrize("place", ["string", "list", "file"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_as_in_transformers(directory: Path, place: str, add_generation_prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    config: dict[str, Any] = {"eos_token": "<|im_end|>"}
    if place == "file":
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        config["chat_template"] = TEMPLATE if place == "string" else named
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_directory(directory).apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).apply_chat_template(
        MESSAGES, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours == theirs
    assert ours.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße")
    assert ours.endswith("<|im_start|>assistant\n") == add_generation_prompt


def template(source: str) -> Tokenizer:
    return Tokenizer(byte_tokenizer(), chat_template=source, special_tokens={"eos_token": "<|im_end|>"})


def test_template_variables() -> None:
    rendered = template("{{ eos_token }}{{ tools | tojson }}{% if absent %}x{% endif %}").apply_chat_template(
        [], tools=[{"name": "größe"}]
    )
    assert rendered == '<|im_end|>[{"name": "größe"}]'


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies(copied: Callable[[Tokenizer], Tokenizer]) -> None:
    tokenizer = template("{% for message in messages %}{{ message.content }}{% endfor %}")
    expected = tokenizer.apply_chat_template(MESSAGES)
    again = copied(tokenizer)
    assert again.apply_chat_template(MESSAGES) == expected
    assert again.encode("text") == tokenizer.encode("text")


def test_special_tokens_written_as_objects(directory: Path) -> None:
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(directory).special_tokens == {"eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{% if %}", "chat template: "),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
    ids=["raise_exception", "syntax", "escape", "mutation"],
)
def test_template_errors(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template(source).apply_chat_template(MESSAGES)


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "rag", "template": ""}]}))
    with pytest.raises(ValueError, match=r"must have an entry named 'default', got .'rag'"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ValueError, match="must be a string or a list, got int"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": ["{{ messages }}"]}))
    with pytest.raises(ValueError, match=r"must have an entry named 'default', got \[\]"):
        Tokenizer.from_directory(tmp_path)
    for token in ({"x": 1}, {"content": 5}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
        with pytest.raises(ValueError, match=r"bos_token must be a string, or an object .* got ."):
            Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold an object, got a list"):
        Tokenizer.from_directory(tmp_path)


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece style: byte tokens, and a decoder that drops the first space of a text."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁sky": 257}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


BYTES, FALLBACK = Tokenizer(byte_tokenizer()), byte_fallback_tokenizer()
PARTS = [0x41, 0xC3, 0xA9, 0xF0, 0x9F, 0x99, 0x82]  # of "A", "é" and "🙂": random rows are mostly not UTF-8
RANDOM = random.Random(0)


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [
        (BYTES, list("Grüße, 世界 🙂!".encode())),
        (BYTES, list(b"ok\xff\xfe")),
        (BYTES, list(b"ok\xff\xfeok\xf0\x9f\x99")),
        (FALLBACK, [256, *"é".encode(), 257, 256]),  # the first word alone loses its space
        (FALLBACK, list("Grüße, 世界 🙂!".encode())),
        *((BYTES, RANDOM.choices(PARTS, k=30)) for _ in range(30)),
    ],
)
def test_stream_equals_decoding_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    pieces.append(decoder.flush())
    assert "".join(pieces) == tokenizer.decode(ids)


def test_stream_never_splits_a_character() -> None:
    decoder = StreamDecoder(Tokenizer(byte_tokenizer()))
    pieces = [decoder.push(byte) for byte in "aé世🙂".encode()]
    assert pieces == ["a", "", "é", "", "", "世", "", "", "", "🙂"]
    assert decoder.flush() == ""
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"
