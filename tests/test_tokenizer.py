"""Tokenizer, chat template and streaming decoder."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from conftest import byte_tokenizer
from qwen_sparse import Tokenizer
from qwen_sparse.model.tokenizer import StreamDecoder

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
        ("{{ messages + 'x' }}", "chat template: TypeError: can only concatenate list"),
        ("{{ 1 // 0 }}", "chat template: ZeroDivisionError: "),
        ("{{ 2.0 ** 5000 }}", "chat template: OverflowError: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template: RecursionError: "),
    ],
    ids=["raise_exception", "syntax", "escape", "mutation", "type", "zero", "overflow", "depth"],
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
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁sky": 257, "▁": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


BYTES, FALLBACK = Tokenizer(byte_tokenizer()), byte_fallback_tokenizer()
BYTES.backend.add_tokens(["<tool>", "a tool", "é", AddedToken("\ufffd", normalized=False)])  # 259, 260, 233, 261
FALLBACK.backend.add_special_tokens(["<s>", "</s>"])  # 259, 260
FALLBACK.backend.add_tokens(["\ufffd"])  # 261


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token gives, and the flush."""
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


# Text, torn characters ("é", "世", "🙂" in part), bytes that are none, special and added tokens, ids of no token.
TORN = st.sampled_from("Aé世🙂".encode())
IDS = st.lists(st.one_of(TORN, st.integers(0, 255), st.integers(256, 263)), max_size=24)


@settings(deadline=None, max_examples=500)
@given(IDS)
def test_stream_of_bytes(ids: list[int]) -> None:
    """All pieces are the whole, and no piece comes late: only an unfinished character is missing."""
    shown = ""
    parts = pieces(BYTES, ids)
    for number, piece in enumerate(parts[:-1]):
        shown += piece
        missing = BYTES.decode(ids[: number + 1])[len(shown) :]
        assert missing in ("", "\ufffd")
        held = b"".join(BYTES.token_bytes(token) for token in ids[: number + 1] if not BYTES.is_skipped(token))[-3:]
        assert not missing or any(is_unfinished(held[-length:]) for length in range(1, 4))
    assert shown + parts[-1] == BYTES.decode(ids)


def is_unfinished(held: bytes) -> bool:
    """Whether bytes begin a UTF-8 character."""
    try:
        held.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


WORDS = st.sampled_from([[256], [257], [258], [259], [260], [261], [999], *(list(c.encode()) for c in "aé世🙂\ufffd ")])


@settings(deadline=None, max_examples=500)
@given(st.lists(WORDS, max_size=12))
def test_stream_with_byte_fallback(words: list[list[int]]) -> None:
    """Of valid UTF-8; the first word alone would lose its space."""
    ids = [token for word in words for token in word]
    assert "".join(pieces(FALLBACK, ids)) == FALLBACK.decode(ids)


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (BYTES, b"ok\xff\xfeok", ["o", "k", "\ufffd", "\ufffd", "o", "k", ""]),
        (BYTES, b"a\xf0\x9fb", ["a", "", "", "\ufffdb", ""]),
        (BYTES, "\ufffd.".encode(), ["", "", "\ufffd", ".", ""]),
        (FALLBACK, b"\x80\x80a", ["\ufffd", "\ufffd", "\ufffd", ""]),
        (FALLBACK, "\ufffd.".encode(), ["", "", "\ufffd", ".", ""]),
    ],
)
def test_what_is_no_character_is_not_waited_for(tokenizer: Tokenizer, text: bytes, expected: list[str]) -> None:
    assert pieces(tokenizer, list(text)) == expected


def test_parts_of_characters_in_another_spelling() -> None:
    """Known by their text alone, and waited for as long as they can be parts: three tokens."""
    backend = byte_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    tokenizer = Tokenizer(backend)
    assert pieces(tokenizer, list("a🙂é".encode())) == ["a", "", "", "", "🙂", "", "é", ""]
    assert pieces(tokenizer, [0x80] * 6) == ["", "", "", "\ufffd" * 4, "", "", "\ufffd" * 2]


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [(BYTES, 257), (BYTES, 999), (BYTES, 0x80), (FALLBACK, 259), (FALLBACK, 999), (FALLBACK, 0x80)],
)
def test_no_token_is_decoded_again_and_again(tokenizer: Tokenizer, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = 0, Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    text = "".join(pieces(tokenizer, [token] * 500))
    assert text == "\ufffd" * (500 if token == 0x80 else 0)
    assert decoded <= 20 * 500


def test_stream_never_splits_a_character() -> None:
    decoder = StreamDecoder(Tokenizer(byte_tokenizer()))
    pieces = [decoder.push(byte) for byte in "aé世🙂".encode()]
    assert pieces == ["a", "", "é", "", "", "世", "", "", "", "🙂"]
    assert decoder.flush() == ""
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"


def test_bytes_of_tokens() -> None:
    assert [BYTES.token_bytes(token) for token in (65, 0xC3, 258, 259, 260, 999)] == [
        b"A",
        b"\xc3",
        b"<|im_end|>",
        b"<tool>",
        b"a tool",
        b"",
    ]
    assert [FALLBACK.token_bytes(token) for token in (65, 257, 259, 999)] == [b"A", b"sky", b"<s>", b""]
