"""Requests of the HTTP API: OpenAI's parameters, some of vLLM's, and one of llama.cpp's.

A parameter is honoured or refused, never ignored: those that this server does not implement are declared with the one
value that changes nothing, and unknown ones are refused. The exceptions are hints that cannot change an answer
(``user``, ``metadata``, ...); docs/serving.md lists all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import ApiError

__all__ = [
    "MAX_LOGPROBS",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Message",
    "Parameters",
    "TokenizeRequest",
    "parse",
    "template_tools",
]

MAX_LOGPROBS = 20
_INT64 = 2**63
_MAX_STOP_STRINGS, _MAX_STOP_LENGTH, _MAX_STOP_TOKENS = 16, 256, 64

_NOTHING_ELSE = {
    "n": "1",
    "best_of": "1",
    "echo": "false",
    "suffix": "null",
    "tool_choice": "'none' or 'auto'",
    "functions": "null",
    "function_call": "null",
    "response_format": "{'type': 'text'}",
    "modalities": "['text']",
    "audio": "null",
    "prediction": "null",
    "reasoning_effort": "null",
    "verbosity": "null",
    "web_search_options": "null",
    "store": "false",
    "service_tier": "'auto' or 'default'",
    "skip_special_tokens": "true",
    "include_stop_str_in_output": "false",
    "prompt_logprobs": "null",
    "stream_options.include_obfuscation": "false",
    "stream_options.continuous_usage_stats": "false",
}
"""Parameters that are known and not implemented, and what may be given for them besides null."""


_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
"""Variables of chat templates that are not for chat_template_kwargs."""
_PART_HINTS = ("cache_control", "prompt_cache_breakpoint")
"""Keys of a part that ask for caching, which happens anyway."""


def _whole(value: object) -> object:
    """JSON Schema counts 5.0 as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: object) -> object:
    """Python counts 0.0 as False."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "must be a boolean")
    return value


def _stop_strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text_content(value: object) -> str:
    """A message's text; several parts are joined by newlines, as vLLM joins them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    texts: list[str] = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError(
                "unsupported_part", f"part {number} must be of type 'text', the only one supported"
            )
        if not {"type", "text"} <= set(part) <= {"type", "text", *_PART_HINTS} or not isinstance(part["text"], str):
            raise PydanticCustomError("text_part", f"part {number} must have the keys 'type' and 'text', a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _arguments(value: object) -> dict[str, Any]:
    """Of a call: templates write them as JSON, so they must be an object, which clients send as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PydanticCustomError("arguments", "must be a JSON object, as text") from None
    if not isinstance(value, dict):
        raise PydanticCustomError("arguments", "must be a JSON object, as text")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise PydanticCustomError("arguments", "must have finite numbers and whole characters") from None
    return value


def _template_variables(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("object_type", "must be an object")
    if taken := sorted(value.keys() & _OWN_VARIABLES):
        raise PydanticCustomError("own_variable", f"must not have {taken[0]}, which is a parameter of its own")
    return value


def _prompt(value: object) -> str | list[int]:
    """One prompt: a string, token ids, or a list of exactly one of these."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "must be a string or a list of token ids")
    if not value:
        raise PydanticCustomError("empty_prompt", "must have at least one token")
    if all(isinstance(part, (str, list)) for part in value):
        raise PydanticCustomError("several_prompts", f"must be one prompt, got {len(value)}: send a request for each")
    tokens = [token if type(token) is int else _whole(token) for token in value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):  # a bool is an int to Python
        raise PydanticCustomError("token_ids", "must be a string or a list of token ids, integers >= 0")
    return cast(list[int], tokens)


_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}, **{key: {} for key in _PART_HINTS}},
    "required": ["type", "text"],
    "additionalProperties": False,
}

WHOLE = BeforeValidator(_whole)
No = Annotated[Literal[False], BeforeValidator(_boolean)]
Yes = Annotated[Literal[True], BeforeValidator(_boolean)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": 1024,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
One = Annotated[int, Field(ge=1, le=1), WHOLE]
NewTokens = Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=_MAX_STOP_STRINGS),
    BeforeValidator(_stop_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_LENGTH},
                {
                    "type": "array",
                    "maxItems": _MAX_STOP_STRINGS,
                    "items": {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_LENGTH},
                },
            ]
        }
    ),
]
Content = Annotated[
    str,
    PlainValidator(_text_content),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART_SCHEMA}, {"type": "null"}]}
    ),
]
TemplateVariables = Annotated[
    dict[str, Any],
    PlainValidator(_template_variables),
    WithJsonSchema({"type": "object", "propertyNames": {"not": {"enum": sorted(_OWN_VARIABLES)}}}),
]
Prompt = Annotated[
    Any,
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _TOKENS_SCHEMA,
                {"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "maxItems": 1, "items": _TOKENS_SCHEMA},
            ]
        }
    ),
]


_MISSING: Any = object()  # where a message says nothing of its content


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Model):
    """Of a streamed answer."""

    include_usage: bool | None = Field(default=None, description="End the stream with a chunk that holds the usage.")
    include_obfuscation: No | None = None
    continuous_usage_stats: No | None = None


class TextFormat(_Model):
    """The only response format."""

    type: Literal["text"]


class Function(_Model):
    """What a model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of an object.")
    strict: No | None = None


class Tool(_Model):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as chat templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]


class CalledFunction(_Model):
    """What was called."""

    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[
        dict[str, Any],
        PlainValidator(_arguments),
        WithJsonSchema({"type": "string", "description": "A JSON object, as text.", "default": "{}"}),
    ]


class SentToolCall(_Model):
    """A call of an earlier answer, as it was got."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class Message(_Model):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="'developer' counts as 'system'."
    )
    tool_calls: list[SentToolCall] | None = Field(default=None, description="Of the role 'assistant'.")
    tool_call_id: str | None = Field(default=None, description="Of the role 'tool'.")
    content: Content = Field(
        default_factory=lambda: _MISSING,
        validate_default=True,
        description="null, which is no text, only of the role 'assistant'; with tool_calls it may be left out.",
    )
    name: str | None = None
    # What clients send back of an answer as they got it, and what asks for caching, which happens anyway.
    id: str | None = None
    cache_control: Any = None
    reasoning: None = None
    reasoning_content: None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _no_text(cls, value: object, info: ValidationInfo) -> object:
        assistant = info.data.get("role") == "assistant"
        if value is _MISSING and not (assistant and info.data.get("tool_calls")):
            raise PydanticCustomError("missing", "field required")
        return "" if value is _MISSING or (value is None and assistant) else value

    @model_validator(mode="after")
    def _calls_of_the_assistant(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("calls_of_others", "tool_calls goes with the role 'assistant' only")
        return self


class Parameters(_Model):
    """What both endpoints take."""

    model: str | None = Field(default=None, description="A served name; the first one when left out.")
    max_tokens: NewTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = Field(
        default=None, description="Stream chunks with prompt_progress while the prompt is read (from llama.cpp)."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = Field(default=None, description="0 or -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = Field(default=None, description="Added to logits, by token id.")
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = Field(
        default=None, description="As long as the output has fewer, no token ends it."
    )
    seed: Annotated[int, Field(ge=-_INT64, le=_INT64 - 1), WHOLE] | None = None
    stop: StopStrings | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]], Field(max_length=_MAX_STOP_TOKENS)] | None
    ) = Field(default=None, description="Tokens that end the text besides the model's.")
    ignore_eos: bool | None = Field(default=None, description="Go on behind the model's end-of-sequence tokens.")

    # Accepted and without effect.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="False: at most one call.")
    cache_prompt: bool | None = Field(default=None, description="llama.cpp's; prompts are cached by the server's rule.")
    prompt_cache_retention: str | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None

    # Not implemented: only what changes nothing is accepted.
    n: One | None = None
    skip_special_tokens: Yes | None = None
    include_stop_str_in_output: No | None = None
    prompt_logprobs: None = None

    @model_validator(mode="after")
    def _streaming(self) -> Parameters:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "stream_options goes with stream = true only")
        if self.return_progress and not self.stream:
            raise PydanticCustomError("needs_stream", "return_progress goes with stream = true only")
        most = self.max_new_tokens
        if self.min_tokens and most is not None and self.min_tokens > most:
            raise PydanticCustomError(
                "two_limits", f"min_tokens must be at most max_tokens, got {self.min_tokens} and {most}"
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as the longest sequence leaves."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Parameters):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: NewTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: None = None
    function_call: None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    chat_template_kwargs: TemplateVariables | None = Field(
        default=None, description="More variables of the chat template."
    )
    enable_thinking: bool | None = Field(default=None, description="A variable of Qwen3's chat template.")
    add_generation_prompt: bool | None = Field(default=None, description="False: do not open the assistant's turn.")
    continue_final_message: bool | None = Field(
        default=None, description="Go on with the last message, the assistant's, which is not closed."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.continue_final_message:
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls or not last.content.strip():
                raise PydanticCustomError(
                    "continuation",
                    "continue_final_message goes with a last message of the assistant that is text",
                )
            if self.add_generation_prompt:
                raise PydanticCustomError(
                    "continuation", "continue_final_message goes without add_generation_prompt = true only"
                )
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("needs_logprobs", "top_logprobs goes with logprobs = true only")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise PydanticCustomError(
                "two_limits",
                f"max_tokens and max_completion_tokens must be equal where both are given, got {self.max_tokens} and "
                f"{self.max_completion_tokens}",
            )
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """Of the chat template, besides messages and tools."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.chat_template_kwargs or {}), **thinking}

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Tools that the model may call, as templates take them."""
        return [] if self.tool_choice == "none" else template_tools(self.tools)

    @property
    def max_new_tokens(self) -> int | None:
        """None: as many as the longest sequence leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Parameters):
    """The body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None

    best_of: One | None = None
    echo: No | None = None
    suffix: None = None

    @property
    def max_new_tokens(self) -> int:
        """OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no logprobs."""
        return self.logprobs


class TokenizeRequest(_Model):
    """The body of ``POST /tokenize``: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = Field(default=None, description="True: end with the assistant's turn opened.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of_two", "the body must have either prompt or messages")
        return self


class DetokenizeRequest(_Model):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]]


_FIELDS = {
    name
    for model in (
        *(ChatRequest, CompletionRequest, Message, StreamOptions, TextFormat),
        *(Tool, Function, SentToolCall, CalledFunction, TokenizeRequest, DetokenizeRequest),
    )
    for name in model.model_fields
}


Request = TypeVar("Request", bound=_Model)


def parse(model: type[Request], body: bytes | bytearray, *, ignore_unknown: bool = False) -> Request:
    """A request from its body.

    Args:
        model: what the body must be.
        body: JSON.
        ignore_unknown: whether to drop parameters that this server does not know.

    Raises:
        ApiError: 400 about the first thing that is wrong. Of the body it quotes names of parameters, and values only
            of those that are no text of a prompt.
    """
    try:
        return model.model_validate_json(body, extra="ignore" if ignore_unknown else "forbid")
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)[0]
    raise _refusal(details)


def _refusal(error: ErrorDetails) -> ApiError:
    kind, text, unknown = error["type"], error["msg"], error["type"] == "extra_forbidden"
    location = [part for part in error["loc"][:-1] if isinstance(part, int) or part in _FIELDS]
    location += [part for part in error["loc"][-1:] if isinstance(part, int) or part in _FIELDS or unknown]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or None
    text = text[:1].lower() + text[1:]
    if kind == "json_invalid":
        return ApiError(400, f"the body must be JSON: {text.removeprefix('invalid JSON: ')}", code="invalid_json")
    if unknown:
        return ApiError(400, f"unknown parameter {_short(param)}", param=_short(param), code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    got = _quoted(error["input"])
    for name in (param, str(location[0]) if location else None):
        if name in _NOTHING_ELSE:
            text = f"{name} is not supported: only {_NOTHING_ELSE[name]} is accepted{got}"
            return ApiError(400, text, param=name, code="unsupported_value")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    if param is None:
        return ApiError(400, text if kind in _OWN_RULES else f"the body {text.removeprefix('input ')}{got}", code=code)
    rule = text.removeprefix("input ") if text.startswith(("input ", "must ", "part ")) else f": {text}"
    return ApiError(400, f"{param} {rule}{got}".replace(" :", ":", 1), param=param, code=code)


_OWN_RULES = ("continuation", "needs_stream", "needs_logprobs", "two_limits", "one_of_two")


def _quoted(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 32):
        return f", got {_short(repr(value))}"
    return ""


def _short(text: str | None) -> str:
    text = str(text)
    return text if len(text) <= 64 else f"{text[:61]}..."
