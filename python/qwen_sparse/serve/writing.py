"""From the engine's events to OpenAI's answers: whole ones, and chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..model.tokenizer import Tokenizer
from .requests import Finished, NewToken, Progress, RequestStats, TokenLogprobs
from .responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    PromptProgress,
    PromptTokensDetails,
    Reason,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from .tools import ToolCallText, ToolParser

__all__ = ["ChatWriter", "CompletionWriter", "Writer"]

LOWEST_LOGPROB = -9999.0
"""What minus infinity becomes, which JSON lacks; vLLM's choice."""


@dataclass
class Writer(ABC):
    """Writes the answer to one request.

    Chunks come from :meth:`opening`, :meth:`progress`, :meth:`token` and :meth:`closing`; a whole answer from
    :meth:`whole`, after every token has been given to :meth:`keep`. All are JSON.
    """

    request_id: str
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    include_usage: bool = False
    tools: ToolParser | None = None
    """Where the model was offered tools."""

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self._text: list[str] = []
        self._logprobs: list[tuple[NewToken, TokenLogprobs]] = []
        self._offset = 0
        self._written = 0

    @abstractmethod
    def opening(self) -> list[bytes]:
        """Before anything is known."""

    def progress(self, event: Progress) -> bytes:
        """The prompt has been read so far: a chunk without choices."""
        return self._dump([], prompt_progress=_progress(event))

    @abstractmethod
    def token(self, event: NewToken) -> list[bytes]:
        """A token; nothing while it shows nothing."""

    def closing(self, event: Finished) -> list[bytes]:
        """The rest of the text, how it ended, and the usage if it is asked for."""
        return self._ending(event) + ([self._dump([], usage=_usage(event.stats))] if self.include_usage else [])

    @abstractmethod
    def whole(self, event: Finished) -> bytes:
        """Everything at once."""

    @abstractmethod
    def _ending(self, event: Finished) -> list[bytes]:
        """The rest of the text, and how it ended."""

    @abstractmethod
    def _chunk_of(self, choices: list[Any]) -> ChatChunk | Completion:
        """A chunk with these choices."""

    def keep(self, event: NewToken) -> None:
        """Remember a token for :meth:`whole`."""
        self._text.append(event.text)
        if event.logprobs is not None:
            self._logprobs.append((event, event.logprobs))

    def _whole_text(self, event: Finished) -> str:
        return "".join(self._text) + event.text

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")

    def _dump(
        self, choices: list[Any], usage: Usage | None = None, prompt_progress: PromptProgress | None = None
    ) -> bytes:
        """JSON; as OpenAI has it, usage is there if it was asked for, and null in every chunk but the last."""
        chunk = self._chunk_of(choices)
        if self.include_usage:
            chunk.usage = usage
        if prompt_progress is not None:
            chunk.prompt_progress = prompt_progress
        return chunk.model_dump_json(exclude_unset=True).encode()


class ChatWriter(Writer):
    """``/v1/chat/completions``."""

    def _deltas(self, pieces: list[str | ToolCallText]) -> list[bytes]:
        """Chunks of content and of whole calls."""
        chunks = []
        for piece in pieces:
            if isinstance(piece, str):
                chunks.append(self._chunk(ChatDelta(content=piece)))
            else:
                call = ToolCallDelta(index=self._written, id=piece.id, type="function", function=_function(piece))
                self._written += 1
                chunks.append(self._chunk(ChatDelta(tool_calls=[call])))
        return chunks

    def opening(self) -> list[bytes]:
        """The chunk with the role."""
        return [self._chunk(ChatDelta(role="assistant", content=""))]

    def token(self, event: NewToken) -> list[bytes]:
        """A chunk with text; with logprobs also where the text is held back."""
        if self.tools is not None:
            chunks = self._deltas(self.tools.push(event.text))
            if event.logprobs is not None:  # of every token, those of calls too: in chunks without text
                chunks.append(self._chunk(ChatDelta(content=""), self._chat_logprobs([(event, event.logprobs)])))
            return chunks
        if event.logprobs is not None:
            return [self._chunk(ChatDelta(content=event.text), self._chat_logprobs([(event, event.logprobs)]))]
        return [self._chunk(ChatDelta(content=event.text))] if event.text else []

    def whole(self, event: Finished) -> bytes:
        """A ``chat.completion``."""
        text = self._whole_text(event)
        pieces: list[str | ToolCallText] = [text] if self.tools is None else self.tools.push(text) + self.tools.flush()
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        choice = ChatChoice(
            index=0,
            message=ChatMessage(
                content=content if content or not calls else None,
                tool_calls=[ToolCall(id=call.id, function=_function(call)) for call in calls],
            ),
            logprobs=self._chat_logprobs(self._logprobs) if self._logprobs else None,
            finish_reason=self._chat_reason(event),
        )
        completion = ChatCompletion(
            id=f"chatcmpl-{self.request_id}",
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=_usage(event.stats),
            system_fingerprint=self.fingerprint,
        )
        return completion.model_dump_json().encode()

    def _ending(self, event: Finished) -> list[bytes]:
        if self.tools is None:
            held_back = [self._chunk(ChatDelta(content=event.text))] if event.text else []
        else:
            held_back = self._deltas(self.tools.push(event.text) + self.tools.flush())
        return [*held_back, self._chunk(ChatDelta(), reason=self._chat_reason(event))]

    def _chat_reason(self, event: Finished) -> Reason:
        reason = _reason(event)
        return "tool_calls" if reason == "stop" and self.tools is not None and self.tools.calls else reason

    def _chunk(self, delta: ChatDelta, logprobs: ChatLogprobs | None = None, reason: Reason | None = None) -> bytes:
        return self._dump([ChatChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=reason)])

    def _chunk_of(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            system_fingerprint=self.fingerprint,
        )

    def _chat_logprobs(self, tokens: Sequence[tuple[NewToken, TokenLogprobs]]) -> ChatLogprobs:
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._candidate(event.token_id, logprobs.chosen).model_dump(),
                    top_logprobs=[self._candidate(*candidate) for candidate in logprobs.top],
                )
                for event, logprobs in tokens
            ],
            refusal=None,
        )

    def _candidate(self, token_id: int, logprob: float) -> TopLogprob:
        spelled = self.tokenizer.token_bytes(token_id)
        return TopLogprob(token=self._token_text(token_id), logprob=_finite(logprob), bytes=list(spelled))


class CompletionWriter(Writer):
    """``/v1/completions``."""

    def opening(self) -> list[bytes]:
        """Nothing."""
        return []

    def token(self, event: NewToken) -> list[bytes]:
        """A chunk with text; with logprobs also where the text is held back."""
        if event.logprobs is not None:
            return [self._chunk(event.text, self._completion_logprobs([(event, event.logprobs)]))]
        return [self._chunk(event.text)] if event.text else []

    def whole(self, event: Finished) -> bytes:
        """A ``text_completion``."""
        choice = CompletionChoice(
            index=0,
            text=self._whole_text(event),
            logprobs=self._completion_logprobs(self._logprobs) if self._logprobs else None,
            finish_reason=_reason(event),
        )
        completion = self._chunk_of([choice])
        completion.usage = _usage(event.stats)
        return completion.model_dump_json(exclude_unset=True).encode()

    def _ending(self, event: Finished) -> list[bytes]:
        return [self._chunk(event.text, reason=_reason(event))]

    def _chunk(self, text: str, logprobs: CompletionLogprobs | None = None, reason: Reason | None = None) -> bytes:
        return self._dump([CompletionChoice(index=0, text=text, logprobs=logprobs, finish_reason=reason)])

    def _chunk_of(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=f"cmpl-{self.request_id}",
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            system_fingerprint=self.fingerprint,
        )

    def _token_name(self, token_id: int) -> str:
        """A token's text; one that is no whole characters is spelled ``bytes:\\xe6\\x97``, as by OpenAI."""
        spelled = self.tokenizer.token_bytes(token_id)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _completion_logprobs(self, tokens: Sequence[tuple[NewToken, TokenLogprobs]]) -> CompletionLogprobs:
        offsets = []
        for event, _ in tokens:
            offsets.append(self._offset)
            self._offset += len(event.text)
        return CompletionLogprobs(
            tokens=[self._token_name(event.token_id) for event, _ in tokens],
            token_logprobs=[_finite(logprobs.chosen) for _, logprobs in tokens],
            top_logprobs=[self._alternatives(event, logprobs) for event, logprobs in tokens],
            text_offset=offsets,
        )

    def _alternatives(self, event: NewToken, logprobs: TokenLogprobs) -> dict[str, float]:
        """The chosen token is among them, as with OpenAI; of tokens that are spelled alike, the most likely one."""
        found: dict[str, float] = {}
        for token_id, logprob in (*logprobs.top, (event.token_id, logprobs.chosen)):
            found.setdefault(self._token_name(token_id), _finite(logprob))
        return found


def _function(call: ToolCallText) -> FunctionCall:
    return FunctionCall(name=call.name, arguments=call.arguments)


def _reason(event: Finished) -> Reason:
    return "length" if event.reason == "length" else "stop"


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _usage(stats: RequestStats) -> Usage:
    return Usage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        total_tokens=stats.prompt_tokens + stats.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stats.cached_tokens),
    )


def _progress(event: Progress) -> PromptProgress:
    return PromptProgress(
        total=event.total, cache=event.cached, processed=event.processed, time_ms=round(event.seconds * 1000)
    )
