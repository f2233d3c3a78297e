"""Tools: offered through the chat template, called in the model's text, sent back in the history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import openai
import pytest

from qwen_sparse.serve.errors import ApiError
from qwen_sparse.serve.generation import SamplingDefaults, generation_request
from qwen_sparse.serve.protocol import ChatRequest, parse
from qwen_sparse.serve.tools import ToolCallText, ToolParser
from serving import Live, ScriptedEngine, Submitted, live_server

TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{{ call.id }}</tool_call>{% endfor %}{{ m.tool_call_id }}\n{% endfor %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


def parsed(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """All content, and all calls, of a text that comes in pieces."""
    parser = ToolParser(**options)
    found = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    assert all(found)  # no empty content
    calls = [part for part in found if isinstance(part, ToolCallText)]
    assert parser.calls == len(calls)
    assert len({call.id for call in calls}) == len(calls)
    content = "".join(part for part in found if isinstance(part, str))
    return content, [(call.name, call.arguments) for call in calls]


ZURICH, TIME = ("weather", '{"city": "Zürich"}'), ("time", "{}")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello.\n", "Hello.\n", []),
        ("", "", []),
        (CALL, "", [ZURICH]),
        (f"Let me see.\n{CALL}", "Let me see.", [ZURICH]),
        (f"{CALL}\n{OTHER}\n", "", [ZURICH, TIME]),
        (f"{CALL} and {OTHER} done", " and done", [ZURICH, TIME]),
        (CALL.removesuffix("</tool_call>"), "", [ZURICH]),
        (
            r'<tool_call>{"name": "f", "arguments": {"s": "a \" </tool_call> <tool_call>"}}</tool_call>',
            "",
            [("f", r'{"s": "a \" </tool_call> <tool_call>"}')],
        ),
        ('<tool_call>{"name": "f</tool_call>', '<tool_call>{"name": "f</tool_call>', []),
        ('<tool_call>{"name": "time", "arguments": "{}"}</tool_call>', "", [TIME]),
        ("<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        (
            '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
            [],
        ),
        *(
            (f'<tool_call>{{"name": "a", "arguments": {{"x": {x}}}}}</tool_call>',) * 2 + ([],)
            for x in ("NaN", "1e999", '"\\ud800"')
        ),
        ('<tool_call>{"name": "weath', '<tool_call>{"name": "weath', []),
        ("a < b, <tool_cal", "a < b, <tool_cal", []),
        ("x <tool_<tool_call>{}</tool_call>", "x <tool_<tool_call>{}</tool_call>", []),
    ],
)
def test_text_is_split_into_content_and_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """Whole, letter by letter, and cut at any one place."""
    expected = content, calls
    assert parsed([text]) == expected
    assert parsed(list(text)) == expected
    for cut in range(1, len(text)):
        assert parsed([text[:cut], text[cut:]]) == expected, cut


BARE = '{"name": "weather", "arguments": {"city": "Zürich"}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (BARE, "", [ZURICH]),
        (f"\n{BARE}\n", "", [ZURICH]),
        (f"```json\n{BARE}\n```", "", [ZURICH]),
        (f"```\n{BARE}\n```\n", "", [ZURICH]),
        ('{\n  "name": "weather",\n  "arguments": {"city": "Zürich"}\n}', "", [ZURICH]),
        (CALL, "", [ZURICH]),
        (f"{BARE} it is", f"{BARE} it is", []),
        (BARE.replace("weather", "other"), BARE.replace("weather", "other"), []),
        (BARE[:-3], BARE[:-3], []),
        ('{"city": "Zürich"}', '{"city": "Zürich"}', []),
        ("```python\nprint()\n```", "```python\nprint()\n```", []),
        ("`", "`", []),
        ("  ", "  ", []),
        ("Hello", "Hello", []),
    ],
)
def test_a_call_without_tags(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """Of an offered tool, and nothing else in the text."""
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(1, len(text)))):
        assert parsed(pieces, names=["weather"]) == (content, calls)
    assert parsed([BARE]) == (BARE, [])


def test_what_is_not_a_call_is_shown_at_once() -> None:
    parser = ToolParser(["weather"])
    text = '{"names": 1}'
    shown = ["".join(map(str, parser.push(letter))) for letter in text]
    assert shown[:6] == [""] * 6
    assert shown[6] == '{"names'
    assert "".join(shown) + "".join(map(str, parser.flush())) == text


def test_no_part_of_a_tag_is_shown() -> None:
    parser, shown = ToolParser(), ""
    for letter in f"One moment.  {CALL}":
        shown += "".join(part for part in parser.push(letter) if isinstance(part, str))
        assert shown in "One moment."
    assert shown == "One moment."


def test_one_call_where_several_are_not_wanted() -> None:
    assert parsed([CALL, OTHER], parallel=False) == ("", [ZURICH])
    assert parsed([CALL, OTHER], parallel=True) == ("", [ZURICH, TIME])


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.model = replace(engine.model)  # with a tokenizer of its own
    engine.model.tokenizer.chat_template = TEMPLATE
    return engine


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[Live]:
    with live_server(engine) as live:
        yield live


@pytest.fixture
def client(live: Live, engine: ScriptedEngine) -> openai.OpenAI:
    engine.submitted = []
    return openai.OpenAI(api_key="EMPTY", base_url=f"{live.url}/v1", max_retries=0, timeout=20)


def says(engine: ScriptedEngine, *texts: str) -> None:
    def act(request: Submitted) -> None:
        request.say(*texts)
        request.finish("stop", "", len(texts))

    engine.on_submit = act


def asked(engine: ScriptedEngine) -> str:
    """The prompt that the engine got."""
    return engine.model.tokenizer.decode(engine.next().request.prompt, skip_special_tokens=False)


MESSAGES: Any = [{"role": "user", "content": "Weather?"}]


def test_a_call(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    says(engine, "Let me see.\n<tool", CALL.removeprefix("<tool"))
    answer = client.chat.completions.create(model="passkey", messages=MESSAGES, tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Zürich"})
    prompt = asked(engine)
    assert prompt.startswith(f"tools: {json.dumps(WEATHER)}\n")

    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    says(engine, "It rains.")
    history = [*MESSAGES, choice.message, result]
    answer = client.chat.completions.create(model="passkey", messages=history, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    rendered = f'assistant: Let me see.<tool_call>weather {{"city": "Zürich"}}{call.id}</tool_call>\n'
    assert asked(engine).endswith(f"user: Weather?\n{rendered}tool: Rain.{call.id}\n")


def test_calls_in_a_stream(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    says(engine, *f"Let me see.\n{CALL}\n{OTHER}")
    stream = client.chat.completions.create(model="passkey", messages=MESSAGES, tools=[WEATHER], stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == [0, 1]
    assert all(delta.id and delta.type == "function" for delta in deltas)
    calls = [(delta.function.name, delta.function.arguments) for delta in deltas if delta.function is not None]
    assert calls == [ZURICH, TIME]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_what_is_no_call_is_content(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """Without tools, or where none may be called, tags mean nothing."""
    says(engine, CALL)
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = client.chat.completions.create(model="passkey", messages=MESSAGES, **options)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].finish_reason == "stop"
        assert "tools" not in asked(engine)


def test_a_call_and_no_room_for_more(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    def act(request: Submitted) -> None:
        request.say(CALL, '\n<tool_call>{"name": "ti')
        request.finish("length", "", 2)

    engine.on_submit = act
    choice = client.chat.completions.create(model="passkey", messages=MESSAGES, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "length"
    assert [call.function.name for call in choice.message.tool_calls or ()] == ["weather"]
    assert choice.message.content == '<tool_call>{"name": "ti'


def test_only_one_call(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    says(engine, CALL, OTHER)
    answer = client.chat.completions.create(
        model="passkey", messages=MESSAGES, tools=[WEATHER], parallel_tool_calls=False
    )
    assert [call.function.name for call in answer.choices[0].message.tool_calls or ()] == ["weather"]


def call_of(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", **changes}}


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "tools[0].function is required"),
        ({"tools": [{**WEATHER, "type": "retrieval"}]}, "tools[0].type", "got 'retrieval'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "got 'a b'"),
        ({"tools": [WEATHER] * 129}, "tools", "at most 128 items"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", "only 'none' or 'auto' is accepted"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call_of(arguments="[1]")]}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object, as text",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call_of(arguments="{")]}]},
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object, as text",
        ),
        *(
            (
                {"messages": [{"role": "assistant", "tool_calls": [call_of(arguments=arguments)]}]},
                "messages[0].tool_calls[0].function.arguments",
                "must have finite numbers and whole characters",
            )
            for arguments in ('{"x": NaN}', '{"x": "\\ud800"}')
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [call_of()]}]},
            "messages[0]",
            "tool_calls goes with the role 'assistant' only",
        ),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content", "content is required"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse(ChatRequest, json.dumps({"messages": MESSAGES, **changes}).encode())
    assert (raised.value.status, raised.value.param) == (400, param)
    assert message in raised.value.message


def test_a_template_without_a_place_for_tools(engine: ScriptedEngine) -> None:
    tokenizer = ScriptedEngine().model.tokenizer
    request = parse(ChatRequest, json.dumps({"messages": MESSAGES, "tools": [WEATHER]}).encode())
    with pytest.raises(ApiError, match="tools must be left out: the model's chat template has no place for them"):
        generation_request(request, tokenizer, (), SamplingDefaults())


@pytest.mark.released
def test_the_released_template(released_cut: Any) -> None:
    """Tools, calls and results come out as Qwen's template writes them."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "Rain."}]
    request = parse(ChatRequest, json.dumps({"messages": messages, "tools": [WEATHER]}).encode())
    tokens = generation_request(request, released_cut.tokenizer, (), SamplingDefaults()).prompt
    text = released_cut.tokenizer.decode(tokens, skip_special_tokens=False)
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>\n" in text
    assert "<|im_start|>user\n<tool_response>\nRain.\n</tool_response><|im_end|>\n" in text
    assert all(before <= after for before, after in pairwise([text.index(x) for x in ("<tools>", "Weather?", "Rain.")]))
