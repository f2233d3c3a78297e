"""Requests made up from the served OpenAPI document: whatever is sent, answers are as it says, and none is a 5xx."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from qwen_sparse.serve.responses import ChatChunk, Completion
from serving import CHAT, COMPLETIONS, Live, events_of, live_server, running_engine

HEADERS = {"Authorization": "Bearer key"}
OPERATIONS = [
    ("POST", CHAT, 150),
    ("POST", COMPLETIONS, 150),
    ("POST", "/tokenize", 60),
    ("POST", "/detokenize", 60),
    ("GET", "/v1/models", 5),
    ("GET", "/v1/models/{model}", 50),
    ("GET", "/health", 5),
    ("GET", "/metrics", 5),
]
NOTHING_TO_GET_WRONG = ("/health", "/metrics")

BEYOND_SCHEMAS = re.compile(
    "must have at least one token|content is required|tool_calls goes with the role|tools must be left out|"
    "must be a JSON object, as text|must have finite numbers and whole characters|"
    "content must be a string or a list of text parts, got None|"
    "goes with (stream|logprobs) = true only|must be equal where both are given|"
    "at most 159 tokens, one less than max_model_len|vocab_size = 264|"
    "continue_final_message goes with|must have either prompt or messages|"
    "logit_bias must have token ids below|min_tokens must be at most max_tokens"
)
"""What a request that fits the document may be refused for."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running_engine(max_model_len=160) as engine, live_server(engine, api_keys=("key",)) as live:
        yield live


@pytest.fixture(scope="module")
def document(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def test_every_operation_is_fuzzed(document: Any) -> None:
    labels = {operation.ok().label for operation in document.get_all_operations()}
    assert labels == {f"{method} {path}" for method, path, _ in OPERATIONS}


def fuzz(document: Any, mode: GenerationMode, method: str, path: str, examples: int) -> Counter[int]:
    """Send so many requests that fit the document, or do not, and check the answers; how often each status came."""
    seen: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        response = case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])
        seen[response.status_code] += 1
        if response.headers["content-type"][0].startswith("text/event-stream"):
            *chunks, end = events_of(response.content)
            assert end == "[DONE]"
            for chunk in chunks:
                (ChatChunk if path == CHAT else Completion).model_validate(chunk, strict=True, extra="forbid")
        if mode == GenerationMode.POSITIVE and response.status_code == 400:
            assert BEYOND_SCHEMAS.search(response.json()["error"]["message"])

    send()
    return seen


@pytest.mark.parametrize(("method", "path", "examples"), OPERATIONS)
def test_requests_that_fit(document: Any, live: Live, method: str, path: str, examples: int) -> None:
    seen = fuzz(document, GenerationMode.POSITIVE, method, path, examples)
    assert set(seen) <= {200, 400, 404}
    assert seen[200] > 0 or path == "/v1/models/{model}"


@pytest.mark.parametrize(
    ("method", "path", "examples"), [case for case in OPERATIONS if case[1] not in NOTHING_TO_GET_WRONG]
)
def test_requests_that_do_not_fit(document: Any, live: Live, method: str, path: str, examples: int) -> None:
    seen = fuzz(document, GenerationMode.NEGATIVE, method, path, examples)
    # 401: of what reaches no route; 415: a body of another media type; 200: where what is wrong is a header
    assert set(seen) <= {200, 400, 401, 404, 415}
    assert seen[200] < examples / 2
    assert live.send("GET", "/health")[0] == 200
