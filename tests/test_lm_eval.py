"""lm-evaluation-harness: requests against values computed directly, and a task of a local file end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import DUAL_CHUNK, WriteCheckpoint
from qwen_sparse import generate, prefill
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.engine.likelihood import likelihoods
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.passkey import make_prompt

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_passkey_model(device="cpu")


def harness(path: str | Path, **options: Any) -> Any:
    """The model class; the tests that need the harness call this and are skipped without it."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: make test-lm-eval")
    from qwen_sparse.lm_eval import QwenSparseLM

    return QwenSparseLM(path, device="cpu", dtype="float32", **options)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, request, number) for number, request in enumerate(arguments)]


def stepwise(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """As generation would go: the context is a prompt, then one token at a time."""
    result = prefill(model, context)
    logits, total, greedy = result.logits, 0.0, True
    for token in continuation:
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        logits = model.forward(torch.tensor([token]), result.cache)
    return total, greedy


def test_likelihoods_are_those_of_all_logits(model: Decoder) -> None:
    tokens = model.tokenizer.encode(make_prompt(3000, 0.5, seed=3).text)
    for runner in (model.with_options(attention="dense"), model.with_options(attention="sparse")):
        for count, chunk in ((2999, None), (700, 1024), (1, 1024)):  # over pieces of logits and prefill chunks
            found = likelihoods(runner, tokens[:-1], tokens[-count:], chunk_tokens=chunk)
            logits = prefill(runner, tokens[:-1], chunk_tokens=chunk, logits="all").logits[-count:]
            wanted = torch.tensor(tokens[-count:])
            expected = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            torch.testing.assert_close(found.log_probability, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(found.greedy, logits.argmax(-1) == wanted)
            assert count == 1 or 0 < int(found.greedy.sum()) < count


def test_likelihoods_behind_a_cache_are_those_of_decoding(model: Decoder) -> None:
    tokens = model.tokenizer.encode(make_prompt(2600, 0.5, seed=3).text)
    context, behind = tokens[:2500], tokens[2500:]
    for runner in (model.with_options(attention="sparse"), model.with_options(kv_cache_dtype="int8")):
        cache = prefill(runner, context).cache
        found = likelihoods(runner, behind[:-1], behind[1:], cache=cache)
        assert cache.seqlen == len(tokens) - 1
        total, _ = stepwise(runner, context, behind)
        first = float(prefill(runner, context).logits.log_softmax(-1)[behind[0]])
        assert first + float(found.log_probability.sum()) == pytest.approx(total, rel=2e-3)


def test_likelihoods_check_their_arguments(model: Decoder) -> None:
    with pytest.raises(ValueError, match="targets must be at most as many as input_ids, 2, got 3"):
        likelihoods(model, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="input_ids must have shape"):
        likelihoods(model, [], [1])


@pytest.mark.parametrize("options", [{"attention": "dense"}, {"attention": "sparse"}, {"coverage": 0.9}], ids=str)
def test_continuations(model: Decoder, options: dict[str, Any]) -> None:
    """Equal contexts, not next to each other, share a prefill and get what each would get alone."""
    if "coverage" in options:
        options = {**options, "attention": "sparse"}
    lm = harness(model.path, **options)
    prompts = [make_prompt(4096, 0.3, seed=seed) for seed in (1, 2)]
    wrong = str(int(prompts[0].key[::-1]))
    asked = [
        (prompts[0].text, prompts[0].key),
        (prompts[1].text, prompts[1].key),
        (prompts[0].text, wrong),
        (prompts[0].text, prompts[0].key[0]),
        ("", "def f(x):\n    return x"),
    ]
    found = lm.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    runner = model.with_options(**options)
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        tokens = runner.tokenizer.encode(context) or [256]  # <|endoftext|>
        behind = runner.tokenizer.encode(continuation)
        if context.endswith(" "):  # the harness scores a space at the end with what follows
            tokens, behind = tokens[:-1], tokens[-1:] + behind
        expected, expected_greedy = stepwise(runner, tokens, behind)
        assert total == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert greedy == expected_greedy
    assert found[0][1]
    assert found[1][1]
    assert found[3][1]
    assert not found[2][1]
    assert found[0][0] > found[2][0] + 5


def test_a_context_is_prefilled_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = harness(model.path)
    from qwen_sparse import lm_eval as adapter

    prefilled: list[int] = []
    monkeypatch.setattr(
        adapter,
        "prefill",
        lambda model, ids, **options: (prefilled.append(len(ids)), prefill(model, ids, **options))[1],
    )
    asked = [("The sky", " is blue"), ("The sun", " is yellow"), ("The sky", " is green"), ("The sky", ".")]
    lm.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    assert prefilled == [7, 7]


def test_rolling(model: Decoder) -> None:
    text = "".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(100))
    tokens = model.tokenizer.encode(text)
    whole, empty = harness(model.path).loglikelihood_rolling(
        instances("loglikelihood_rolling", (text,), ("",)), disable_tqdm=True
    )
    logits = prefill(model, [256, *tokens[:-1]], logits="all").logits.log_softmax(-1)
    assert len(tokens) > model.config.sparse.threshold  # prefilled sparsely
    assert whole == pytest.approx(float(logits.gather(1, torch.tensor(tokens)[:, None]).double().sum()), rel=1e-5)
    assert empty == 0
    (windowed,) = harness(model.path, max_seq_len=1000).loglikelihood_rolling(
        instances("loglikelihood_rolling", (text,)), disable_tqdm=True
    )
    expected = 0.0
    inputs = [256, *tokens[:-1]]
    for start in range(0, len(tokens), 1000):  # the last window reaches back as far as it may
        end = min(start + 1000, len(tokens))
        rows = prefill(model, inputs[end - 1000 : end], logits="all").logits.log_softmax(-1)[start - end :]
        expected += float(rows.gather(1, torch.tensor(tokens[start:end])[:, None]).double().sum())
    assert windowed == pytest.approx(expected, rel=1e-5)


def test_answers(model: Decoder) -> None:
    lm = harness(model.path)
    prompt = make_prompt(3000, 0.4, seed=5)
    given = {"until": ["\n", ""], "max_gen_toks": 5}
    asked = [
        (prompt.text, given),
        (prompt.text, {**given, "until": [prompt.key[2]]}),
        (prompt.text, {"max_gen_toks": 3}),
        ("import ", {"until": None, "max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "seed": 1}),
        ("import ", {"max_gen_toks": 8, "do_sample": False, "temperature": 2.0}),
        ("", {"max_gen_toks": 8}),
    ]
    answers = lm.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert answers[:3] == [prompt.key, prompt.key[: prompt.key.index(prompt.key[2])], prompt.key[:3]]
    ids = model.tokenizer.encode("import ")
    assert answers[5] == model.tokenizer.decode(list(generate(model, [256], max_new_tokens=8)))  # <|endoftext|>
    greedy = list(generate(model, ids, max_new_tokens=8))
    sampled = list(generate(model, ids, max_new_tokens=8, temperature=2.0, seed=1))
    assert answers[3:5] == [model.tokenizer.decode(sampled), model.tokenizer.decode(greedy)]
    assert answers[3] != answers[4]
    with pytest.raises(ValueError, match=r"gen_kwargs must be of .*, got \['num_beams'\]"):
        lm.generate_until(instances("generate_until", ("a", {"num_beams": 2})))


def test_long_contexts_are_cut_from_the_left(model: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    lm = harness(model.path, max_seq_len=600)
    long = "x" * 900 + make_prompt(500, 0.4, seed=5).text.rstrip()
    short = long[-(600 - 4) :]
    cut, same = lm.loglikelihood(instances("loglikelihood", (long, " 1234"), (short, " 1234")), disable_tqdm=True)
    assert cut == same
    assert "a context of 1399 tokens is cut to its last 596" in caplog.text
    first, second = lm.generate_until(
        instances("generate_until", *((text, {"max_gen_toks": 4}) for text in (long, short))), disable_tqdm=True
    )
    assert first == second
    with pytest.raises(ValueError, match="max_seq_len must be above 700, the tokens behind a context, got 600"):
        lm.generate_until(instances("generate_until", ("a", {"max_gen_toks": 700})))


def test_chat(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(tokenizer=True, sparse=(40, 110), dual_chunk_attention_config=DUAL_CHUNK)
    (path / "chat_template.jinja").write_text(CHAT)
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    lm = harness(path)
    assert lm.chat_template(True) == CHAT
    assert "/" not in lm.tokenizer_name
    assert lm.prefix_token_id == 258
    history = [{"role": "user", "content": " Hi "}]
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert lm.apply_chat_template(history) == asked
    history.append({"role": "assistant", "content": "Hi, I am "})
    assert lm.apply_chat_template(history, add_generation_prompt=False) == f"{asked}Hi, I am"


def test_bad_arguments(model: Decoder, write_checkpoint: WriteCheckpoint) -> None:
    with pytest.raises(TypeError, match="fast"):
        harness(model.path, fast=True)
    with pytest.raises(ValueError, match="batch_size must be 1 or 'auto'"):
        harness(model.path, batch_size=8)
    with pytest.raises(ValueError, match="attention must be"):
        harness(model.path, attention="quick")
    with pytest.raises(ValueError, match="prefix_token_id must be given"):
        harness(write_checkpoint(tokenizer=True))
    with pytest.raises(ValueError, match="context and continuation must have tokens"):
        harness(model.path)._loglikelihood_tokens([(("a", ""), [97], [])])


TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(key)}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{key}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


def test_a_local_task_end_to_end(model: Decoder, tmp_path: Path) -> None:
    """The harness's own command line with tasks of a local file, without a network: scores, and every likelihood."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: make test-lm-eval")
    prompts = [make_prompt(2500, depth, seed=seed) for seed, depth in enumerate((0.2, 0.6, 0.9))]
    documents = [{"text": p.text.rstrip(" "), "key": f" {p.key}", "choices": [" 10000", f" {p.key}"]} for p in prompts]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test"}
        files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**common, **files, **task}))  # JSON is YAML
    command = [sys.executable, "-m", "qwen_sparse.lm_eval", "run", "--model", "qwen_sparse"]
    command += ["--model_args", f"pretrained={model.path},dtype=float32,attention=sparse,coverage=0.9"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (scores,) = (json.loads(file.read_text())["results"] for file in (tmp_path / "out").rglob("results_*.json"))
    assert scores["local_choice"]["acc,none"] == 1
    assert scores["local_answer"]["exact_match,none"] == 1
    runner = model.with_options(attention="sparse", coverage=0.9)
    samples = {
        name: [
            json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*")).read_text().splitlines()
        ]
        for name in TASKS
    }
    total = 0.0
    for number, document in enumerate(documents):
        tokens = runner.tokenizer.encode(document["text"])
        sample = samples["local_choice"][number]
        for choice, ((found, greedy),) in zip(document["choices"], sample["resps"], strict=True):
            expected, expected_greedy = stepwise(runner, tokens, runner.tokenizer.encode(choice))
            assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-3)
            assert str(greedy) == str(expected_greedy)
        logits = prefill(runner, [256, *tokens[:-1]], logits="all").logits.log_softmax(-1)
        rolling = float(logits.gather(1, torch.tensor(tokens)[:, None]).double().sum())
        assert float(samples["local_text"][number]["resps"][0][0]) == pytest.approx(rolling, rel=1e-5)
        total += rolling
    expected = torch.tensor(-total / sum(len(document["text"]) for document in documents)).exp()
    assert scores["local_text"]["byte_perplexity,none"] == pytest.approx(float(expected), rel=1e-4)


def test_without_the_harness() -> None:
    """In a process of its own, which cannot import it; one line on the command line."""
    hide = "import sys; sys.modules['lm_eval'] = None; "
    for code, status in (
        ("import runpy; runpy.run_module('qwen_sparse.lm_eval', run_name='__main__')", 2),
        ("import qwen_sparse.lm_eval", 1),
    ):
        result = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)
        assert result.returncode == status
        assert "qwen_sparse.lm_eval needs the extra [lm-eval]: pip install 'lm-eval" in result.stderr
        assert status == 1 or result.stderr.count("\n") == 1
