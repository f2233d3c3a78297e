"""Requests of the HTTP API: what is taken, what is refused and in which words, and what it becomes for the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from qwen_sparse.engine.sampling import Sampler
from qwen_sparse.model.tokenizer import Tokenizer
from qwen_sparse.serve.errors import ApiError
from qwen_sparse.serve.generation import SamplingDefaults, generation_request
from qwen_sparse.serve.limits import MAX_DEPTH, check_json
from qwen_sparse.serve.protocol import ChatRequest, CompletionRequest, parse
from qwen_sparse.serve.requests import LogitRules

SECRET = "the secret of the prompt"
USER = [{"role": "user", "content": SECRET}]


def parse_chat(**body: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": USER, **body}).encode())


def parse_completion(**body: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": SECRET, **body}).encode())


def tokenizer(template: str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}") -> Tokenizer:
    return Tokenizer(byte_tokenizer(), chat_template=template)


HARMLESS = {
    "user": "somebody",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "metadata": {"key": "value"},
    "parallel_tool_calls": True,
    "store": False,
    "service_tier": "auto",
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "min_p": 0,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}
HINTS = {"cache_prompt": True, "prompt_cache_retention": "24h"}
HARMLESS_IN_CHAT = {
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "chat_template_kwargs": {},
}


def test_harmless_parameters_are_accepted_and_change_nothing() -> None:
    plain = generation_request(parse_chat(), tokenizer(), (256,), SamplingDefaults())
    full = parse_chat(**HARMLESS, **HARMLESS_IN_CHAT)
    assert generation_request(full, tokenizer(), (256,), SamplingDefaults()) == plain
    parse_completion(**HARMLESS, best_of=1, echo=False, suffix=None)


def test_null_is_as_good_as_absent() -> None:
    nothing = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert parse_chat(**nothing).model_dump() == parse_chat().model_dump()
    nothing = {name: None for name in CompletionRequest.model_fields if name != "prompt"}
    assert parse_completion(**nothing).model_dump() == parse_completion().model_dump()


@pytest.mark.parametrize(
    ("name", "value", "only"),
    [
        ("n", 2, "1"),
        ("tool_choice", "required", "'none' or 'auto'"),
        ("functions", [], "null"),
        ("function_call", "auto", "null"),
        ("response_format", {"type": "json_object"}, "{'type': 'text'}"),
        ("modalities", ["text", "audio"], "['text']"),
        ("audio", {"voice": "x"}, "null"),
        ("prediction", {}, "null"),
        ("reasoning_effort", "low", "null"),
        ("verbosity", "low", "null"),
        ("web_search_options", {}, "null"),
        ("store", True, "false"),
        ("service_tier", "flex", "'auto' or 'default'"),
        ("skip_special_tokens", False, "true"),
        ("include_stop_str_in_output", True, "false"),
        ("prompt_logprobs", 1, "null"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name: str, value: object, only: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse_chat(**{name: value})
    error = raised.value
    assert (error.status, error.param, error.code) == (400, name, "unsupported_value")
    assert error.message.startswith(f"{name} is not supported: only {only} is accepted")


@pytest.mark.parametrize(("name", "value"), [("best_of", 2), ("echo", True), ("echo", 0.0), ("suffix", "x"), ("n", 0)])
def test_what_completions_lack(name: str, value: object) -> None:
    with pytest.raises(ApiError, match=f"^{name} is not supported: only .* is accepted, got {value!r}$"):
        parse_completion(**{name: value})


@pytest.mark.parametrize(
    ("changes", "param", "code", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter", "unknown parameter temprature"),
        ({"messages": None}, "messages", "invalid_type", "messages should be a valid array, got None"),
        ({"messages": []}, "messages", "invalid_value", "messages: list should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "is required"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "invalid_value", "got 'critic'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type", "must be a string"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type", "must be a string"),
        ({"messages": [{"content": None, "role": "system"}]}, "messages[0].content", "invalid_type", "got None"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing_required_parameter", "is required"),
        ({"messages": [{"role": "critic", "content": None}]}, "messages[0].role", "invalid_value", "got 'critic'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_type", "list of text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "invalid_value",
            "part 0 must be of type 'text', the only one supported",
        ),
        ({"messages": [{**USER[0], "weight": 1}]}, "messages[0].weight", "unknown_parameter", "messages[0].weight"),
        ({"temperature": 2.5}, "temperature", "invalid_value", "should be less than or equal to 2, got 2.5"),
        ({"temperature": -0.1}, "temperature", "invalid_value", "greater than or equal to 0, got -0.1"),
        ({"temperature": "1"}, "temperature", "invalid_type", "temperature should be a valid number, got '1'"),
        ({"temperature": True}, "temperature", "invalid_type", "got True"),
        ({"top_p": 0}, "top_p", "invalid_value", "should be greater than 0, got 0"),
        ({"top_k": -2}, "top_k", "invalid_value", "greater than or equal to -1"),
        ({"top_k": 1.5}, "top_k", "invalid_type", "should be a valid integer"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value", "greater than or equal to 0.1"),
        ({"seed": 2**63}, "seed", "invalid_value", "less than or equal to"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1, got 0"),
        ({"stop": ""}, "stop[0]", "invalid_value", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value", "at most 16 items"),
        ({"stop": "x" * 257}, "stop[0]", "invalid_value", "at most 256 characters"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value", "greater than or equal to 0"),
        ({"top_logprobs": 3}, None, "invalid_value", "top_logprobs goes with logprobs = true only"),
        ({"logprobs": False, "top_logprobs": 1}, None, "invalid_value", "top_logprobs goes with logprobs = true only"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "less than or equal to 20, got 21"),
        ({"stream_options": {}}, None, "invalid_value", "stream_options goes with stream = true only"),
        ({"return_progress": True}, None, "invalid_value", "return_progress goes with stream = true only"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "invalid_value", "must be equal where both are given"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "unsupported_value",
            "only false is accepted, got True",
        ),
    ],
)
def test_errors_name_the_parameter_the_rule_and_the_value(
    changes: dict[str, Any], param: str | None, code: str, message: str
) -> None:
    with pytest.raises(ApiError) as raised:
        parse_chat(**changes)
    error = raised.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert message in error.message
    assert SECRET not in error.message
    assert json.loads(error.body())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": ' + b"[" * 300,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
        json.dumps({"messages": f"{SECRET}"}).encode(),
        json.dumps({"messages": [{"role": SECRET * 9, "content": "x"}]}).encode(),
        json.dumps({SECRET * 9: 1, "messages": USER}).encode(),
    ],
)
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        parse(ChatRequest, body)
    assert raised.value.status == 400
    assert SECRET * 3 not in raised.value.message


def test_whole_floats_are_integers() -> None:
    assert parse_chat(max_tokens=5.0, seed=-1.0).max_tokens == 5


def test_messages_become_the_template_s() -> None:
    request = parse_chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\x00"}],
                "name": "x",
            },
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
            {"content": None, "role": "assistant"},
        ]
    )
    made = generation_request(request, tokenizer(), (256,), SamplingDefaults())
    assert bytes(made.prompt) == b"[system]Be brief.[user]a\nb\x00[assistant]c[assistant]"


def test_a_template_may_refuse() -> None:
    refusing = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ApiError, match="chat template: roles must alternate") as raised:
        generation_request(parse_chat(), refusing, (), SamplingDefaults())
    assert (raised.value.status, raised.value.param) == (400, "messages")
    with pytest.raises(ApiError, match="no chat template"):
        generation_request(parse_chat(), Tokenizer(byte_tokenizer()), (), SamplingDefaults())
    with pytest.raises(ApiError, match="messages must have at least one token"):
        generation_request(parse_chat(), tokenizer(""), (), SamplingDefaults())


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [97, 98]),
        ([97, 98], [97, 98]),
        ([97.0, 98], [97, 98]),
        (["ab"], [97, 98]),
        ([[97, 98]], [97, 98]),
        ("\x00", [0]),
    ],
)
def test_forms_of_a_prompt(prompt: object, tokens: list[int]) -> None:
    made = generation_request(parse_completion(prompt=prompt), tokenizer(), (256,), SamplingDefaults())
    assert list(made.prompt) == tokens
    assert made.max_new_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([[]], "at least one token"),
        ([[], []], "must be one prompt, got 2"),
        (["a", "b"], "must be one prompt, got 2"),
        ([True], "integers >= 0"),
        ([-1], "integers >= 0"),
        ([1.5], "integers >= 0"),
        ([1, "a"], "integers >= 0"),
        (5, "must be a string or a list of token ids"),
        ({"a": 1}, "must be a string or a list of token ids"),
    ],
)
def test_no_prompts(prompt: object, message: str) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        parse_completion(prompt=prompt)
    assert raised.value.param == "prompt"


def test_an_empty_prompt_has_no_tokens() -> None:
    with pytest.raises(ApiError, match="prompt must have at least one token"):
        generation_request(parse_completion(prompt=""), tokenizer(), (), SamplingDefaults())


def test_parameters_reach_the_engine() -> None:
    request = parse_chat(
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        repetition_penalty=1.1,
        seed=-3,
        stop=["a", "b"],
        stop_token_ids=[7],
        logprobs=True,
        top_logprobs=4,
    )
    made = generation_request(request, tokenizer(), (256, 258), SamplingDefaults(top_k=20))
    assert made.sampler == Sampler(0.5, 0.9, 0, 1.1, -3)
    assert (made.max_new_tokens, made.stop, made.logprobs) == (9, ("a", "b"), 4)
    assert made.stop_token_ids == {7, 256, 258}
    assert generation_request(parse_chat(logprobs=True), tokenizer(), (), SamplingDefaults()).logprobs == 0
    ignoring = generation_request(parse_chat(ignore_eos=True, stop="x"), tokenizer(), (256,), SamplingDefaults())
    assert (ignoring.stop_token_ids, ignoring.stop, ignoring.max_new_tokens) == (frozenset(), ("x",), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty should be less than or equal to 2, got 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty should be greater than or equal to -2, got -3"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens, got 5 and 4"),
        ({"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens must be at most max_tokens, got 5 and 4"),
    ],
)
def test_rules_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        parse_chat(**changes)
    assert raised.value.status == 400


def test_bias_of_tokens_that_are_none() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    request = parse_completion(prompt="x", logit_bias={"258": -1, "259": 2})
    with pytest.raises(ApiError, match="logit_bias must have token ids below 259, got 259"):
        generation_request(request, tokenizer, (), SamplingDefaults())
    request = parse_completion(prompt="x", logit_bias={"258": -1})
    assert generation_request(request, tokenizer, (), SamplingDefaults()).rules == LogitRules(bias={258: -1.0})


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not enable_thinking %}no{% endif %}{{ style }}{% endif %}"
)


def rendered(**parameters: Any) -> str:
    tokenizer = Tokenizer(byte_tokenizer(), chat_template=TEMPLATE)
    request = parse_chat(**parameters)
    return tokenizer.decode(generation_request(request, tokenizer, (), SamplingDefaults()).prompt)


def test_template_variables() -> None:
    user = [{"role": "user", "content": "Hi"}]
    assert rendered(messages=user) == "<user>Hi</><assistant>no"
    assert rendered(messages=user, enable_thinking=True) == "<user>Hi</><assistant>"
    variables = {"enable_thinking": True, "style": "!"}
    assert rendered(messages=user, chat_template_kwargs=variables) == "<user>Hi</><assistant>!"
    assert rendered(messages=user, chat_template_kwargs=variables, enable_thinking=False) == "<user>Hi</><assistant>no!"
    assert rendered(messages=user, add_generation_prompt=False) == "<user>Hi</>"
    for name in ("messages", "tools", "add_generation_prompt"):
        with pytest.raises(ApiError, match=f"chat_template_kwargs must not have {name}"):
            parse_chat(chat_template_kwargs={name: []})


def test_going_on_with_the_last_message() -> None:
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi, I am "}]
    assert rendered(messages=begun, continue_final_message=True) == "<user>Hi</><assistant>Hi, I am"
    for messages in (begun[:1], [*begun[:1], {"role": "assistant", "content": " "}]):
        with pytest.raises(ApiError, match=r"^continue_final_message goes with a last message of the assistant"):
            parse_chat(messages=messages, continue_final_message=True)
    with pytest.raises(ApiError, match="goes without add_generation_prompt = true"):
        parse_chat(messages=begun, continue_final_message=True, add_generation_prompt=True)
    upper = Tokenizer(byte_tokenizer(), chat_template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    request = parse_chat(messages=begun, continue_final_message=True)
    with pytest.raises(ApiError, match="the chat template changes the last message's text"):
        generation_request(request, upper, (), SamplingDefaults())


def test_hints_about_caching_change_nothing() -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    sent = {"role": "assistant", "content": [part], "id": "msg_1", "reasoning_content": None, "reasoning": None}
    request = parse_chat(messages=[{**USER[0], "cache_control": {"type": "ephemeral"}}, sent, USER[0]], **HINTS)
    assert [message.content for message in request.messages] == [USER[0]["content"], "Hi", USER[0]["content"]]
    with pytest.raises(ApiError, match=r"^messages\[0\]\.reasoning_content .* got 'Because'$"):
        parse_chat(messages=[{**sent, "reasoning_content": "Because"}])
    with pytest.raises(ApiError, match=r"part 0 must have the keys 'type' and 'text', a string"):
        parse_chat(messages=[{"role": "user", "content": [{**part, "weight": 1}]}])


def test_unknown_parameters_can_be_ignored() -> None:
    body = json.dumps({"messages": [{**USER[0], "weight": 1}], "temprature": 1, "top_k": 5}).encode()
    request = parse(ChatRequest, body, ignore_unknown=True)
    assert request.top_k == 5
    assert request.messages[0].content == USER[0]["content"]
    with pytest.raises(ApiError, match=r"unknown parameter (temprature|messages)"):
        parse(ChatRequest, body)
    known = json.dumps({"messages": USER, "verbosity": "low"}).encode()
    with pytest.raises(ApiError, match="verbosity is not supported"):
        parse(ChatRequest, known, ignore_unknown=True)


def test_defaults_are_openai_s_or_the_checkpoint_s(tmp_path: Path) -> None:
    openai = SamplingDefaults.from_directory(tmp_path)
    assert openai.sampler(parse_chat()) == Sampler(1.0, 1.0, 0, 1.0, None)
    assert openai.sampler(parse_chat(min_p=0.1)) == Sampler(1.0, 1.0, 0, 1.0, None, 0.1)
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 3}'
    )
    qwen = SamplingDefaults.from_directory(tmp_path)
    assert qwen.sampler(parse_chat()) == Sampler(0.7, 0.8, 20, 1.05, None)
    assert qwen.sampler(parse_chat(temperature=0, top_k=0, top_p=1, repetition_penalty=1)) == Sampler(0, 1, 0, 1)
    assert SamplingDefaults.ignored(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(
        '{"top_k": -1, "presence_penalty": 1.5, "min_p": 0.05, "num_beams": 1, "max_new_tokens": 2048}'
    )
    qwen3 = SamplingDefaults.from_directory(tmp_path)
    assert qwen3 == SamplingDefaults(top_k=0, min_p=0.05, presence_penalty=1.5)
    assert SamplingDefaults.ignored(tmp_path) == {"max_new_tokens": 2048}
    assert qwen3.rules(parse_chat(), {}) == LogitRules(presence_penalty=1.5)
    assert qwen3.rules(parse_chat(presence_penalty=0, min_tokens=3), {5: 1.0}) == LogitRules(0, 0, {5: 1.0}, 3)
    (tmp_path / "generation_config.json").write_text('{"presence_penalty": 3}')
    with pytest.raises(ValueError, match=r"generation_config\.json: presence_penalty must be in \[-2, 2\], got 3"):
        SamplingDefaults.from_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p must be in \(0, 1\], got 7"):
        SamplingDefaults.from_directory(tmp_path)


@pytest.mark.parametrize(("given", "used"), [(0, 0), (5e-324, 0.01), (0.005, 0.01), (0.01, 0.01), (2, 2)])
def test_tiny_temperatures_count_as_a_hundredth(given: float, used: float) -> None:
    assert SamplingDefaults().sampler(parse_chat(temperature=given)).temperature == used


# Costly JSON.


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b'{"a": "[[[[[[[[[[[[[[[[[[[[{{{{{{{{{{,,,,,,,,,,,,,,,,,,::::::::::"}',
        rb'{"a": "\"[[[[[[[[[[[[[[[[[[[[\\\"[[[[,,,,,,,,,,,,,,,,,,,,,,,,,,,,\\"}',
        b'{"a": [1,2,3,4,5,6,7,8]}',
        b'{"a": ' + b"1" * 64 + b"}",
        b'{"a": "' + b"1" * 100 + b'"}',
    ],
)
def test_cheap_json_passes(body: bytes) -> None:
    check_json(body, 16)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 17 + b"]" * 17, "at most 16 levels"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "at most 16 levels"),
        (b'["\\\\",' + b"[" * 17 + b"]" * 17 + b"]", "at most 16 levels"),
        (b"[" * 200_000, "at most"),
        (b"[" + b"1," * 200 + b"1]", "at most 200 values"),
        (b"[" + b"[]," * 200 + b"[]]", "at most 200 values"),
        (b"[" + b'"",' * 200_000 + b"1]", "at most 200 values"),
        (b'{"a": ' + b"1" * 65 + b"}", "at most 64 characters"),
        (b'{"a": -1.5e' + b"1" * 65 + b"}", "at most 64 characters"),
    ],
)
def test_costly_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        check_json(body, 200)
    assert (raised.value.status, raised.value.code) == (400, "invalid_json")


def test_many_keys_are_refused() -> None:
    body = json.dumps({str(number): 1 for number in range(65537)}).encode()
    with pytest.raises(ApiError, match="at most 65536 keys"):
        check_json(body, 10**6)
