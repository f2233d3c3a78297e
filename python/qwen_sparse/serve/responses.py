"""Responses of the HTTP API, whole and in chunks; the field names are OpenAI's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Detokenized",
    "FunctionCall",
    "ModelCard",
    "ModelList",
    "PromptProgress",
    "TokenLogprob",
    "Tokenized",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
]

Reason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Of a prompt."""

    cached_tokens: int = Field(description="Tokens taken from the prefix cache.")


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptProgress(BaseModel):
    """How far the prompt has been read (llama.cpp's extension)."""

    total: int = Field(description="Tokens of the prompt.")
    cache: int = Field(description="Of these, taken from the prefix cache.")
    processed: int = Field(description="Of these, done, cached ones included.")
    time_ms: int = Field(description="Since the request left the queue.")


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float = Field(description="Natural logarithm of its probability, -9999 at the least.")
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that stands there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of a chat completion, token by token."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    """What a tool call asks for."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(BaseModel):
    """A tool call of the model."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolCallDelta(ToolCall):
    """A whole tool call in a chunk."""

    index: int


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] = []

    @model_serializer(mode="wrap")
    def _without_calls(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """An answer that calls nothing has no list of calls."""
        dumped: dict[str, Any] = dump(self)
        if not self.tool_calls:
            del dumped["tool_calls"]
        return dumped


class ChatChoice(BaseModel):
    """The one choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(BaseModel):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class ChatDelta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """The one choice of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(BaseModel):
    """A chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None
    prompt_progress: PromptProgress | None = None


class CompletionLogprobs(BaseModel):
    """Logprobs of a completion, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Characters of the answer's text that were there before the token.")


class CompletionChoice(BaseModel):
    """The one choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


class Completion(BaseModel):
    """The answer to a prompt, or a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | None = None
    prompt_progress: PromptProgress | None = None


class Tokenized(BaseModel):
    """Tokens of a text; the names are vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(default=None, description="Where return_token_strs asks for them.")


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


class ModelCard(BaseModel):
    """A served name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int = Field(description="Most tokens of prompt and output together.")


class ModelList(BaseModel):
    """All served names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
