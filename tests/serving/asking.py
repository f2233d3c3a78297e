"""The real engine, asked directly: what tests of it share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qwen_sparse import generate
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.passkey import make_prompt
from qwen_sparse.serve.engine import Engine, EngineOptions, RequestHandle
from qwen_sparse.serve.requests import Event, Failed, Finished, GenerationRequest, NewToken, Progress

MODEL = load_passkey_model(device="cpu")
DENSE = MODEL.with_options(attention="dense")


def prompt(length: int, seed: int = 0) -> list[int]:
    """That many tokens at most, of a passkey prompt."""
    return MODEL.tokenizer.encode(make_prompt(max(length, 260), depth=0.4, seed=seed).text)[-length:]


class Listener:
    """Collects events, and waits for them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self.times.append(time.monotonic())
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[Event], bool]) -> Event:
        def found() -> Event | None:
            return next((event for event in self.events if condition(event)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout=60), self.events
        event = found()
        assert event is not None
        return event

    def end(self) -> Finished:
        event = self.wait_for(lambda event: isinstance(event, (Finished, Failed)))
        assert isinstance(event, Finished), event
        assert event is self.events[-1]
        return event

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, NewToken)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, (NewToken, Finished)))

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]


def is_token(event: Event) -> bool:
    return isinstance(event, NewToken)


@contextmanager
def serving(model: Decoder = DENSE, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, EngineOptions(**{"max_model_len": 8192, "chunk_tokens": 512, **options}))
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown(drain=False)
        assert engine._pages.used == 0


def ask(engine: Engine, tokens: Sequence[int], **options: Any) -> tuple[Listener, RequestHandle]:
    listener = Listener()
    options = {"max_new_tokens": 20, "stop_token_ids": frozenset(), **options}
    return listener, engine.submit(GenerationRequest(tokens, **options), listener)


def expected(tokens: Sequence[int], model: Decoder = DENSE, **options: Any) -> list[int]:
    options = {"max_new_tokens": 20, "stop_token_ids": (), "chunk_tokens": 512, **options}
    return list(generate(model, tokens, **options))
