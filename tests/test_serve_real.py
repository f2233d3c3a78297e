"""The whole server over the real engine and the repository's own model: its answers are those of ``generate``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from qwen_sparse import generate_text
from qwen_sparse.serve.engine import Engine
from serving import (
    CHAT,
    COMPLETIONS,
    Live,
    chat,
    events_of,
    eventually,
    live_server,
    passkey_model,
    running_engine,
)

TEXT = "import os\nimport sys\n\n\ndef main():\n    "
DOCUMENT = "The grass is green. The sky is blue. " * 40
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine(max_queue=2, max_num_seqs=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[Live]:
    with live_server(engine) as live:
        yield live


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(api_key="EMPTY", base_url=f"{live.url}/v1", max_retries=0, timeout=60)


def expected(prompt: str, **options: Any) -> str:
    return "".join(generate_text(passkey_model(), prompt, **{"max_new_tokens": 24, **options}))


def rendered(content: str) -> str:
    return passkey_model().tokenizer.apply_chat_template([{"role": "user", "content": content}])


@pytest.mark.parametrize("options", [{}, {"stop": ["\n"]}, {"stop": "o"}, {"repetition_penalty": 1.3}], ids=str)
def test_answers_are_those_of_generate(client: openai.OpenAI, options: dict[str, Any]) -> None:
    penalty = {key: value for key, value in options.items() if key != "stop"}
    given: Any = {**GREEDY, "extra_body": penalty, **({"stop": options["stop"]} if "stop" in options else {})}
    answer = client.chat.completions.create(model="passkey", messages=[{"role": "user", "content": TEXT}], **given)
    text = expected(rendered(TEXT), **options)
    assert answer.choices[0].message.content == text
    completion = client.completions.create(model="passkey", prompt=TEXT, **given)
    assert completion.choices[0].text == expected(TEXT, **options)
    chunks = client.completions.create(model="passkey", prompt=list(TEXT.encode()), stream=True, **given)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(TEXT, **options)


def test_seeds(client: openai.OpenAI) -> None:
    given: Any = {"model": "passkey", "prompt": TEXT, "temperature": 1.5, "max_tokens": 24}
    first, second, other = (client.completions.create(seed=seed, **given).choices[0].text for seed in (1, 1, 2))
    assert first == second != other


def test_a_second_question_costs_the_question(client: openai.OpenAI, live: Live) -> None:
    texts, usages = [], []
    for question in ("What is green?", "What is blue?", "What is blue?"):
        answer = client.completions.create(model="passkey", prompt=DOCUMENT + question, **GREEDY)
        texts.append(answer.choices[0].text)
        usages.append(answer.usage)
    assert texts == [expected(DOCUMENT + question) for question in ("What is green?", "What is blue?", "What is blue?")]
    cold, warm, again = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert cold == 0
    assert warm == again == len(DOCUMENT) // 128 * 128
    chunks = events_of(
        live.send(
            "POST",
            CHAT,
            chat(DOCUMENT * 2, stream=True, return_progress=True, stream_options={"include_usage": True}, **GREEDY),
        )[2]
    )
    progress = [chunk["prompt_progress"] for chunk in chunks[:-1] if chunk.get("prompt_progress")]
    total = len(rendered(DOCUMENT * 2))
    assert {step["total"] for step in progress} == {total}
    assert [step["processed"] for step in progress] == sorted({step["processed"] for step in progress})
    assert (
        progress[0]["processed"]
        == progress[0]["cache"]
        == chunks[-2]["usage"]["prompt_tokens_details"]["cached_tokens"]
    )
    assert progress[-1]["processed"] == total
    assert len(progress) >= 3


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"prompt": "x" * 4096}, 400, "context_length_exceeded", "at most 4095 tokens, one less than max_model_len"),
        ({"prompt": [264]}, 400, "invalid_value", "vocab_size = 264"),
    ],
)
def test_refused_by_the_engine(live: Live, body: dict[str, Any], status: int, code: str, message: str) -> None:
    found, answer = live.json("POST", COMPLETIONS, body)
    assert (found, answer["error"]["code"], answer["error"]["param"]) == (status, code, "prompt")
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    "content",
    ["\x00", "\x00\x01\x02\ufffe\uffff", "\u202e\u200b\ufeff", "<|endoftext|>", "{{ 7 * 7 }}{% raw %}", "🙂" * 50],
)
def test_strange_text_is_text(live: Live, content: str) -> None:
    status, answer = live.json("POST", CHAT, chat(content, **GREEDY))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected(rendered(content))


def test_a_full_queue(live: Live, engine: Engine) -> None:
    endless = chat(TEXT, stream=True, ignore_eos=True, temperature=0)
    busy = []
    for count in range(4):  # two run, two wait
        connection = live.connect()
        connection.request("POST", CHAT, json.dumps(endless), {"Content-Type": "application/json"})
        busy.append(connection)
        places = min(count + 1, 2), max(count - 1, 0)
        eventually(lambda at=places: (engine.snapshot().running, engine.snapshot().waiting) == at, f"{places}")
    status, headers, data = live.send("POST", CHAT, chat(**GREEDY))
    assert (status, json.loads(data)["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    for connection in busy:
        connection.close()
    eventually(lambda: engine.snapshot().running + engine.snapshot().waiting == 0, "they are gone")
    assert engine.snapshot().kv_cache_usage == 0
    assert live.send("POST", CHAT, chat(**GREEDY))[0] == 200


def test_a_long_prompt_holds_nobody_up(live: Live, client: openai.OpenAI) -> None:
    """While one prompt is read, others' tokens go on: chunks of both interleave."""
    order: list[str] = []
    begun = threading.Event()

    def talk() -> None:
        stream = client.completions.create(
            model="passkey", prompt=TEXT, stream=True, max_tokens=400, temperature=0, extra_body={"ignore_eos": True}
        )
        for _ in stream:
            order.append("token")
            begun.set()

    talker = threading.Thread(target=talk)
    talker.start()
    assert begun.wait(20)
    long = client.completions.create(
        model="passkey", prompt="x" * 3500, stream=True, max_tokens=1, extra_body={"return_progress": True}
    )
    for chunk in long:
        if not chunk.choices:
            order.append("chunk")
    talker.join()
    chunks = [place for place, what in enumerate(order) if what == "chunk"]
    assert len(chunks) > 10
    assert "token" in order[chunks[0] : chunks[-1]]
