"""Routes about tokens, and what browsers ask before a page may use the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serving import Live, ScriptedEngine, live_server

MESSAGES = [{"role": "user", "content": "Grüße"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[Live]:
    with live_server(engine, allowed_origins=("https://example.org",)) as live:
        yield live


def test_tokens_of_a_text(live: Live, engine: ScriptedEngine) -> None:
    status, answer = live.json("POST", "/tokenize", {"prompt": "Grüße", "model": "passkey"})
    tokens = engine.model.tokenizer.encode("Grüße")
    assert (status, answer) == (200, {"count": 7, "max_model_len": 1024, "tokens": tokens})
    named = live.json("POST", "/tokenize", {"prompt": "a\n", "return_token_strs": True})[1]
    assert named["token_strs"] == ["a", "\n"]
    assert live.json("POST", "/detokenize", {"tokens": tokens}) == (200, {"prompt": "Grüße"})
    assert live.json("POST", "/tokenize", {"prompt": ""})[1]["tokens"] == []
    assert live.json("POST", "/detokenize", {"tokens": []}) == (200, {"prompt": ""})


@pytest.mark.parametrize("opened", [True, False, None])
def test_tokens_of_a_conversation(live: Live, engine: ScriptedEngine, opened: bool | None) -> None:
    tokenizer = engine.model.tokenizer
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=opened is not False)
    body = {"messages": MESSAGES, "add_generation_prompt": opened}
    assert live.json("POST", "/tokenize", body)[1]["tokens"] == tokenizer.encode(text)
    tokens = live.json("POST", "/tokenize", body)[1]["tokens"]
    assert live.json("POST", "/detokenize", {"tokens": tokens}) == (200, {"prompt": text})


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "the body must have either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "the body must have either prompt or messages"),
        ("/tokenize", {"prompt": 5}, 400, "prompt should be a valid string, got 5"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model must be one of: passkey"),
        ("/tokenize", {"prompt": "x", "weight": 1}, 400, "unknown parameter weight"),
        (
            "/tokenize",
            {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
            400,
            "tools must",
        ),
        ("/detokenize", {"tokens": [3, 264]}, 400, "tokens must be in [0, vocab_size = 264), got 264"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0] should be greater than or equal to 0, got -1"),
        ("/detokenize", {}, 400, "tokens is required"),
    ],
)
def test_what_is_wrong_is_named(live: Live, path: str, body: dict[str, Any], status: int, message: str) -> None:
    found, answer = live.json("POST", path, body)
    assert found == status
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(("origin", "status"), [("https://example.org", 200), ("https://example.com", 400)])
def test_a_page_may_ask_for_a_private_network(live: Live, origin: str, status: int) -> None:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Private-Network": "true",
    }
    found, headers, _ = live.send("OPTIONS", "/v1/chat/completions", None, headers=asked)
    assert found == status
    assert (headers.get("access-control-allow-origin") == origin) == (status == 200)
    assert headers["access-control-allow-private-network"] == "true"  # worth nothing without the header above
