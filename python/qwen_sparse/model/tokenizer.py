"""Text and tokens: ``tokenizer.json`` through ``tokenizers``, the chat template through a jinja2 sandbox."""

from __future__ import annotations

import codecs
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import decoders

from ..base.text import read_text
from .checkpoint import read_json
from .gguf import GgufFile, is_gguf

__all__ = ["StreamDecoder", "Tokenizer"]

REPLACEMENT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible characters for all bytes, which byte-level tokens are spelled in, to the bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # of byte fallback


class Tokenizer:
    """A tokenizer with its chat template.

    Args:
        backend: the ``tokenizers`` object.
        chat_template: jinja2 source; None if the model has none.
        special_tokens: variables the template may use, such as ``bos_token`` and ``eos_token``.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """From ``tokenizer.json``, with ``tokenizer_config.json`` and ``chat_template.jinja`` if any; or a GGUF file.

        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: a file cannot be parsed.
        """
        path = Path(path)
        file, config_file, template_file = (
            path / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        )
        if is_gguf(path):
            header = GgufFile(path)
            backend = _parsed(path, tokenizers.Tokenizer.from_str, json.dumps(header.tokenizer()))
            return cls._made(backend, header.tokenizer_config(), path)
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {path}")
        backend = _parsed(file, tokenizers.Tokenizer.from_file, str(file))
        tokenizer = cls._made(backend, read_json(config_file) if config_file.is_file() else {}, config_file)
        if template_file.is_file():
            tokenizer.chat_template = read_text(template_file)
        return tokenizer

    @classmethod
    def _made(cls, backend: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path) -> Tokenizer:
        """With the chat template and the special tokens of tokenizer_config.json, which came from ``file``."""
        special = {
            name: _special_token(name, value, file)
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, (str, Mapping))
        }
        return cls(backend, chat_template=_default_template(config.get("chat_template"), file), special_tokens=special)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: a compiled template cannot be pickled; it is compiled again when it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_template"}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens spelled out in it become their ids.

        ``add_special_tokens`` also adds those that the tokenizer's post-processor puts around a text. Other threads run
        meanwhile: unlike ``encode``, ``encode_batch_fast`` releases the interpreter's lock, and it leaves out offsets.

        Raises:
            ValueError: ``text`` holds lone surrogates, which are no text.
        """
        try:
            return list(self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError as error:
            raise ValueError(f"text must be Unicode, got {text[:80]!a}: lone surrogates, or no string") from error

    def parts(self, text: str) -> list[str]:
        """``text`` cut in front of every added token (``<|im_start|>`` and the like) that it spells out.

        Added tokens are found before anything else is done to a text, so that the tokens of the parts, one after the
        other, are those of the text. Where an added token takes in what stands around it or is looked for in normalised
        text, that does not hold, and ``text`` is its only part.
        """
        if self._added is None:
            return [text]
        starts = [match.start() for match in self._added.finditer(text) if match.start()]
        return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        """Matches added tokens, the longest where several begin; None: texts cannot be cut at them."""
        tokens = self.backend.get_added_tokens_decoder().values()
        if not tokens or any(token.lstrip or token.single_word or token.normalized for token in tokens):
            return None
        return re.compile("|".join(re.escape(text) for text in sorted((t.content for t in tokens), key=len)[::-1]))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters; a special token's are its name."""
        name = self.backend.id_to_token(token_id)
        if name is None:
            return b""
        if not self.is_byte_level:
            return str(self.backend.decode([token_id], skip_special_tokens=False)).encode()
        # As tokenizers does: a name with other characters, which added tokens can have, stands for itself.
        is_spelled = all(character in _BYTE_OF for character in name)
        return bytes(_BYTE_OF[character] for character in name) if is_spelled else name.encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the text of tokens is their bytes, one after the other, as UTF-8."""
        return isinstance(self.backend.decoder, decoders.ByteLevel)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(number for number, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def is_skipped(self, token_id: int) -> bool:
        """Whether :meth:`decode` passes over a token, as it does over special ones and over ids of none."""
        return token_id in self._special_ids or self.backend.id_to_token(token_id) is None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a conversation to text, in a sandbox: a template cannot reach or change Python objects.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: more template variables, such as ``tools``.

        Raises:
            ValueError: there is no chat template, or the template refuses the messages or fails.

        Example:
            >>> tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))
        """
        template = self._template
        try:
            return template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
                **variables,
            )
        except Exception as error:  # a template's expressions can raise anything
            raise _template_error(error) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template (tokenizer_config.json or chat_template.jinja)")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
        environment.filters["tojson"] = _tojson
        try:
            return environment.from_string(self.chat_template)
        except Exception as error:
            raise _template_error(error) from error


class StreamDecoder:
    """Turns a stream of tokens into a stream of text without ever splitting a UTF-8 character.

    The bytes of an unfinished character, three at most, are held back until later tokens finish it or show that they
    cannot, or until :meth:`flush`. The concatenation of all pieces equals decoding all tokens at once (with a
    byte-fallback decoder, which Qwen's is not: for valid UTF-8).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Where the decoder is not byte-level:
        self._context: list[int] = []  # tokens of the last piece: some decoders treat a text's start apart
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if self._tokenizer.is_skipped(token_id):
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._pending.append(token_id)
        return "" if self._is_unfinished(token_id) else self._release()

    def flush(self) -> str:
        """What is still held back; an unfinished character becomes U+FFFD."""
        held = self._utf8.decode(b"", final=True)
        return held if self._tokenizer.is_byte_level else self._release()

    def _is_unfinished(self, token_id: int) -> bool:
        """Whether pending tokens end inside of a character; ``token_id`` is the last of them."""
        name = self._tokenizer.backend.id_to_token(token_id) or ""  # it has one: it was not skipped
        if byte := _BYTE_TOKEN.fullmatch(name):
            self._utf8.decode(bytes.fromhex(byte[1]))
            return bool(self._utf8.getstate()[0])
        self._utf8.reset()
        # Bytes in some other spelling. An unfinished character has no more tokens than bytes.
        return len(self._pending) <= 3 and REPLACEMENT not in name and self._new_text().endswith(REPLACEMENT)

    def _release(self) -> str:
        text = self._new_text()
        if text or not self._context:  # a context without text would be a text's start
            self._context = self._pending
        self._pending = []
        return text

    def _new_text(self) -> str:
        context = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(context) :]


def _parsed(file: Path, parse: Callable[[str], tokenizers.Tokenizer], source: str) -> tokenizers.Tokenizer:
    """The tokenizer that ``parse`` makes of ``source``, which is or came from ``file``."""
    try:
        return parse(source)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file} is not a tokenizer: {error}") from error


def _default_template(template: object, file: Path) -> str | None:
    """A template is a string, or a list of named ones of which "default" is used."""
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        if "default" not in named:
            raise ValueError(f"{file}: chat_template must have an entry named 'default', got {sorted(named)}")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{file}: chat_template must be a string or a list, got {type(template).__name__}")
    return template


def _special_token(name: str, value: str | Mapping[str, Any], file: Path) -> str:
    """A special token is a string, or an object that has it as its content."""
    text = value if isinstance(value, str) else value.get("content")
    if not isinstance(text, str):
        raise ValueError(f"{file}: {name} must be a string, or an object with a string as its content, got {value!r}")
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _template_error(error: Exception) -> ValueError:
    """Of what is not jinja2's own, the class is part of the message: ``'content'`` alone would say little."""
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return ValueError(f"chat template: {kind}{error}")


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
