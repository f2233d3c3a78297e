"""Evaluation: prompts re-parsed, scores, windows, rows, figures, and the command line."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from conftest import DUAL_CHUNK, WriteCheckpoint, byte_tokenizer
from qwen_sparse import load_model
from qwen_sparse.calibrate import measure_budgets, synthetic_tokens
from qwen_sparse.cli import main
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.evaluate import (
    Mode,
    Task,
    answer,
    common_words,
    default_modes,
    evaluate_recall,
    evaluate_tasks,
    frequent_words,
    make_prompt,
    niah,
    passkey,
    question_answering,
    read_questions,
    variable_tracking,
)
from qwen_sparse.evaluate.command import head_grids, length_label
from qwen_sparse.evaluate.figures import draw_heat_maps, line_styles
from qwen_sparse.evaluate.prompts import haystack, place
from qwen_sparse.evaluate.questions import Question
from qwen_sparse.evaluate.scoring import exact_match, score
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.tokenizer import Tokenizer

TASKS = {
    task.name: task
    for task in (passkey(), niah(1), niah(4), niah(16), variable_tracking(), common_words(), frequent_words())
}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
imshow = Axes.imshow
NUMBER = re.compile(r"The ([a-z ]+) is (\d+)\. Remember it\. (\d+) is the ([a-z ]+)\.\n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer(), chat_template=CHAT)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_passkey_model(device="cpu")


@pytest.fixture
def tiny(write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint(tokenizer=True, sparse=(40, 110), dual_chunk_attention_config=DUAL_CHUNK)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_prompts_fit_and_hold_their_needles(tokenizer: Tokenizer, task: Task, chat: bool) -> None:
    for length in (5000, 9001):
        prompt = make_prompt(task, tokenizer, length, 0.5, seed=3, chat=chat)
        assert prompt.tokens == tokenizer.encode(prompt.text)
        room = length - len(prompt.tokens) - prompt.max_new_tokens
        assert 0 <= room < 100  # one unit more would not fit
        assert prompt.max_new_tokens > len(tokenizer.encode(", ".join(prompt.answers)))
        for needle in prompt.needles:
            assert prompt.text[needle.start : needle.start + len(needle.text)] == needle.text
            assert prompt.text.count(needle.text) == 1
        assert prompt == make_prompt(task, tokenizer, length, 0.5, seed=3, chat=chat)
        assert prompt.answers != make_prompt(task, tokenizer, length, 0.5, seed=4, chat=chat).answers
        assert prompt.answers != make_prompt(task, tokenizer, length, 0.5, seed=3, sample=1, chat=chat).answers
    if chat:
        before, _, opening = prompt.text.partition("<|im_end|>\n<|im_start|>assistant\n")
        assert before.startswith("<|im_start|>user\n")
        assert "?" not in opening
        assert not opening.startswith(" ")


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_niah_is_what_it_says(tokenizer: Tokenizer, count: int, depth: float) -> None:
    prompt = make_prompt(niah(count), tokenizer, 6000, depth, seed=1)
    found = [(match[1], match[2]) for match in NUMBER.finditer(prompt.text)]
    assert len(found) == len(prompt.needles) == count
    assert len({label for label, _ in found}) == len({key for _, key in found}) == count
    for match in NUMBER.finditer(prompt.text):
        assert (match[1], match[2]) == (match[4], match[3])
    asked = re.search(r"\nWhat is the ([a-z ]+)\? The ([a-z ]+) is $", prompt.text)
    assert asked is not None
    assert asked[1] == asked[2]
    assert prompt.answers == (dict(found)[asked[1]],)
    without = NUMBER.sub("", prompt.text.split("\n\n", 1)[1].rsplit("\nWhat is", 1)[0])
    start = next(match.start() for match in NUMBER.finditer(prompt.text) if match[1] == asked[1])
    before = NUMBER.sub("", prompt.text[:start].split("\n\n", 1)[1])
    sentences = re.findall(r"[^.]+\. ", without)
    assert "".join(sentences) == without
    assert before == "".join(sentences[: round(depth * prompt.units)])


def test_the_asked_number_is_not_always_of_one_name(tokenizer: Tokenizer) -> None:
    prompts = [make_prompt(niah(4), tokenizer, 2000, sample=sample) for sample in range(20)]
    assert len({prompt.text.rsplit("What is the ", 1)[1].split("?")[0] for prompt in prompts}) == 4


def test_variable_tracking_follows_its_chain(tokenizer: Tokenizer) -> None:
    prompt = make_prompt(variable_tracking(), tokenizer, 4000, seed=2)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.\n", prompt.text):  # in the order of the text
        assert name not in values
        values[name] = values.get(source, source)
    asked = re.search(r"the value (\d+) in the text above", prompt.text)
    assert asked is not None
    assert set(values.values()) == {asked[1]}
    assert set(values) == set(prompt.answers)
    assert len(prompt.answers) == 5


def test_words_have_their_counts(tokenizer: Tokenizer) -> None:
    prompt = make_prompt(common_words(), tokenizer, 8000, seed=2)
    listed = re.findall(r"(\d+)\. ([a-z]{6})\b", prompt.text)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, count in counts.items() if count == 30} == set(prompt.answers)
    assert len(prompt.answers) == 10
    assert {count for word, count in counts.items() if word not in prompt.answers} == {3}

    prompt = make_prompt(frequent_words(), tokenizer, 8000, seed=2)
    counts = Counter(prompt.text.split("coded words.\n")[1].split("\nQuestion")[0].split(" "))
    ranked = counts.most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(prompt.answers)
    assert len({count for _, count in ranked[:5]}) == 5
    total = ranked[0][1]
    assert all(abs(count - total / rank**2) < 1.01 for rank, (_, count) in enumerate(ranked, 1))


def test_placing() -> None:
    text, needles = place("H|", ["a ", "b ", "c ", "d "], [(1.0, "Z"), (0.0, "A"), (0.5, "M"), (0.5, "N")])
    assert text == "H|Aa b MNc d Z"
    assert [(needle.text, needle.start) for needle in needles] == [("A", 2), ("M", 7), ("N", 8), ("Z", 13)]


def test_haystack_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "book.txt"
    file.write_text("One is here.  Two!\nA line without an end\n\nLast one")
    prompt = make_prompt(passkey(str(file)), tokenizer, 1000, 0.5)
    filler = NUMBER.sub("", prompt.text)
    assert filler.count("One is here.  Two!\nA line without an end\n\nLast one\n") > 5
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="haystack must have text"):
        haystack(str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match=r"haystack must be 'grass', 'sentences' or a text file, got 'novel'"):
        haystack("novel")


def test_questions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "qa.jsonl"
    entries = [
        {"context": f"Text {number}. " * 20, "question": f"What is {number}?", "answers": [f"thing {number}", "it"]}
        for number in range(6)
    ]
    file.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    task = question_answering(read_questions(file))
    for sample, depth, place_of_gold in ((2, 0.0, 0), (2, 1.0, 4), (8, 0.5, 2)):
        prompt = make_prompt(task, tokenizer, 1200, depth, sample=sample)
        documents = re.findall(r"Document:\nText (\d)", prompt.text)
        assert len(documents) == len(set(documents)) == 5  # of six: as many as fit
        assert documents[place_of_gold] == "2"
        assert prompt.text.endswith("Question: What is 2? Answer:")
        assert prompt.answers == ("thing 2", "it")
        assert len(prompt.tokens) + prompt.max_new_tokens <= 1200
    assert make_prompt(task, tokenizer, 10**6).units == 5  # all there are


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 must be JSON"),
        ("[]", r"line 2 must be an object, got \[\]"),
        ('{"context": "", "question": "q", "answers": ["a"]}', "line 2: context must be a text, got ''"),
        ('{"context": "c", "answers": ["a"]}', "line 2: question must be a text, got None"),
        ('{"context": "c", "question": "q", "answers": []}', r"line 2: answers must be a list of texts, got \[\]"),
        ('{"context": "c", "question": "q", "answers": "a"}', "line 2: answers must be a list of texts, got 'a'"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text(f'{{"context": "c", "question": "q", "answers": ["a"]}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_questions(file)


def test_no_questions(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must have at least one line, got none"):
        read_questions(tmp_path / "qa.jsonl")


@pytest.mark.parametrize(
    ("scoring", "answers", "output", "expected"),
    [
        ("number", ["12345"], " 12345.", 1),
        ("number", ["12345"], "123456", 0),
        ("number", ["12345"], "99999 or 12345", 0),
        ("number", ["12345"], "none", 0),
        ("all", ["ab", "cd"], "1. AB 2. xy", 0.5),
        ("all", ["ab", "cd"], "abc, cd", 0.5),
        ("all", ["ab", "cd"], "cd ab", 1),
        ("any", ["The Hague", "Den Haag"], "It is in Hague!", 1),
        ("any", ["art"], "a party", 0),
    ],
)
def test_scores(scoring: Any, answers: list[str], output: str, expected: float) -> None:
    assert score(scoring, answers, output) == expected


def test_exact_match() -> None:
    assert exact_match(["the Hague"], " Hague.\nMore")
    assert not exact_match(["the Hague"], "in The Hague")


def test_modes(model: Decoder, write_checkpoint: WriteCheckpoint) -> None:
    for name in ("rope", "dca", "rope+sparse", "dca+int8", "dca+sparse+int8", "rope+coverage0.0001+int8"):
        assert Mode.parse(name).name == name
    assert Mode.parse("dca+coverage.90").name == "dca+coverage0.9"
    assert Mode.parse("dca+sparse+int8").title == "DCA + vertical-slash + int8 KV"
    assert Mode.parse("dca+coverage0.9+int8").title == "DCA + block groups (coverage 0.9) + int8 KV"
    runner = Mode.parse("rope+int8").apply(model)
    assert (runner.config.dual_chunk, runner.attention, runner.kv_cache_dtype) == (None, "dense", "int8")
    runner = Mode.parse("dca+sparse").apply(runner.with_options(config=model.config))
    assert (runner.config.dual_chunk, runner.attention, runner.kv_cache_dtype) == (
        model.config.dual_chunk,
        "sparse",
        "auto",
    )
    assert default_modes(model) == ["rope", "dca", "dca+sparse"]
    covered = Mode.parse("dca+coverage0.9+int8").apply(runner)
    assert (covered.attention, covered.kv_cache_dtype) == ("sparse", "int8")
    assert covered.config == model.config.with_coverage(0.9)
    assert default_modes(covered) == ["rope", "dca"]  # no budgets are left to a model with a coverage
    with pytest.raises(ValueError, match=r"mode 'dca\+sparse' needs budgets"):
        Mode.parse("dca+sparse").apply(covered)
    plain = load_model(write_checkpoint(), device="cpu")
    assert default_modes(plain) == ["rope"]
    with pytest.raises(ValueError, match="mode 'dca' needs dual_chunk_attention_config"):
        Mode.parse("dca").apply(plain)
    with pytest.raises(ValueError, match=r"mode 'rope\+sparse' needs budgets"):
        Mode.parse("rope+sparse").apply(plain)
    assert Mode.parse("rope+coverage0.9").apply(plain).config.sparse.coverage == 0.9  # needs no budgets
    for name in ("dca+coverage0.0", "dca+coverage.0000"):
        with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\), got 0.0"):
            Mode.parse(name)
    wrong = ("dense", "dca+fast", "dca+sparse+sparse", "dca+int8+sparse", "dca+sparse+coverage0.9", "sparse", "")
    for name in (*wrong, "dca+coverage", "dca+coverage1", "dca+coverage1.5", "dca+coverage-0.5", "dca+coverage9e-1"):
        with pytest.raises(ValueError, match=f"mode must be .*got {re.escape(repr(name))}"):
            Mode.parse(name)


def test_an_answer_ends(model: Decoder) -> None:
    prompt = make_prompt(passkey(), model.tokenizer, 512)
    given = answer(model, prompt.tokens, prompt.max_new_tokens)
    assert given.text == prompt.answers[0]  # the end token came before max_new_tokens
    assert answer(model, prompt.tokens, 1).text == prompt.answers[0][0]
    eos = replace(model.config, eos_token_ids=(ord(prompt.answers[0][0]),))
    assert len(answer(model.with_options(config=eos), prompt.tokens, 20).text) == 1


def test_evaluation_of_the_passkey_model(model: Decoder) -> None:
    modes = ["rope", "dca", "dca+sparse", "dca+sparse+int8", "dca+coverage0.9", "dca+coverage0.5+int8"]
    rows = list(evaluate_tasks(model, [passkey(), frequent_words()], modes, [8192, 1536], [1.0, 0.0], samples=1))
    cells = {(row["task"], row["mode"], row["length"], row["depth"]): row for row in rows}
    assert list(dict.fromkeys(row["length"] for row in rows)) == [1536, 8192]
    assert len(cells) == len(rows) == 2 * 3 * 6
    for mode in modes:
        for depth in (0.0, 1.0):
            assert cells["passkey", mode, 8192, depth]["accuracy"] == (mode != "rope")
        assert cells["frequent-words", mode, 8192, None]["accuracy"] == 0
        row = cells["passkey", mode, 8192, 1.0]
        assert (row["density"] < 0.5) == ("+" in mode)
        assert 8192 - 60 < row["tokens"] < 8192
        assert (row["wrong"] == []) == (mode != "rope")
    density = {mode: cells["passkey", mode, 8192, 1.0]["density"] for mode in modes}
    assert density["dca+coverage0.5+int8"] < density["dca+coverage0.9"] != density["dca+sparse"]


def test_recall_by_head(model: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the rows say is in the figure's cells, layer down and head across; the diffuse head stands out."""
    modes = ["dca+sparse", "dca+coverage0.9"]
    rows = list(evaluate_recall(model, None, modes, [4096, 1024], seed=1))
    assert [(row["length"], row["mode"]) for row in rows] == [(n, mode) for n in (1024, 4096) for mode in modes]
    tokens = synthetic_tokens(model, 4096, 1)
    for row in rows:
        heads = [recall for layer in row["recall_by_head"] for recall in layer]
        assert len(row["recall_by_head"]) == 4
        assert len(heads) == 8
        assert row["recall"] == pytest.approx(sum(heads) / 8)
        assert row["lowest_recall"] == min(heads)
        assert row["density"] == pytest.approx(sum(map(sum, row["density_by_head"])) / 8)
    sparse = Mode.parse("dca+sparse").apply(model)
    direct = measure_budgets(sparse, tokens, sparse.config.sparse)
    assert rows[2]["recall_by_head"] == [[head.recall for head in layer] for layer in direct.layers]
    assert rows[2]["lowest_recall"] == rows[2]["recall_by_head"][2][1]  # docs/calibration.md: layer 2 head 1
    assert rows[2]["recall_by_head"][2][1] < 0.9 * min(rows[2]["recall_by_head"][1])

    drawn: list[Any] = []
    monkeypatch.setattr(
        Axes, "imshow", lambda axis, values, **options: drawn.append(values) or imshow(axis, values, **options)
    )
    grids = head_grids(rows)
    assert list(grids) == [
        f"DCA + {kind}, {n}" for kind in ("vertical-slash", "block groups (coverage 0.9)") for n in ("1K", "4K")
    ]
    draw_heat_maps(grids, tmp_path / "heads.png", row_label=str, xlabel="head", ylabel="layer", value="recall")
    assert drawn == [row["recall_by_head"] for row in (rows[0], rows[2], rows[1], rows[3])]

    text = model.tokenizer.decode(tokens)
    (same,) = evaluate_recall(model, text, ["dca+sparse"], [4096])
    assert same["recall_by_head"] == rows[2]["recall_by_head"]
    for mode in ("dca", "dca+sparse+int8"):
        with pytest.raises(
            ValueError, match=f"modes must be sparse ones without int8 for recall, got {re.escape(repr(mode))}"
        ):
            evaluate_recall(model, None, [mode], [1024])
    with pytest.raises(ValueError, match="the text must have at least 5000 tokens, got 4096"):
        evaluate_recall(model, text, ["dca+sparse"], [5000])


def test_large_heat_maps_keep_to_a_dozen_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[list[str]] = []
    monkeypatch.setattr(Axes, "set_yticks", lambda axis, places, names, **_: ticks.append(list(names)))
    monkeypatch.setattr(Axes, "text", lambda *_, **__: pytest.fail("no room for numbers"))
    draw_heat_maps({"a": {(y, x): 0.5 for y in range(28) for x in range(28)}}, tmp_path / "a.png", row_label=str)
    assert ticks == [[str(layer) for layer in range(0, 28, 3)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ["dense"]}, "got 'dense'"),
        ({"lengths": [40]}, r"length must be at least \d+ tokens for passkey \(prompt and answer\), got 40"),
        ({"lengths": []}, "lengths must be at least one number >= 1"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        ({"depths": [1.5]}, r"depths must be at least one number between 0 and 1, got \[1.5\]"),
    ],
)
def test_bad_arguments_are_named_at_once(model: Decoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(model, [passkey()], **{"modes": ["dca"], "lengths": [1000], **arguments})


def test_other_bad_arguments(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="needles must be between 1 and 16, got 17"):
        niah(17)
    with pytest.raises(ValueError, match="depth must be between 0 and 1, got -1"):
        make_prompt(passkey(), tokenizer, 1000, -1)
    with pytest.raises(ValueError, match="at most max_seq_len = 600 tokens"):
        evaluate_tasks(replace(model, max_seq_len=600), [passkey()], ["dca"], [1000])
    trimming = Tokenizer(byte_tokenizer(), chat_template="{{ messages[0].content | upper }}")
    with pytest.raises(ValueError, match="the chat template must not change the message"):
        make_prompt(question_answering([Question("c", "q", ("a",))]), trimming, 1000, chat=True)


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_commands(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every task writes its table, JSON and figures; the model is random, so that accuracy means nothing."""
    (tmp_path / "text.txt").write_text("The grass is green. " * 100)
    (tmp_path / "qa.jsonl").write_text('{"context": "It is so.", "question": "Is it?", "answers": ["yes"]}\n')
    few = ["--samples", "1", "--lengths", "600,1k", "--modes", "rope,dca+sparse+int8,dca+coverage0.8,dca+coverage0.9"]
    depths = ["--depths", "0,1"]
    extra: dict[str, list[str | Path]] = {
        "passkey": [*few, *depths],
        "niah": [*few, *depths, "--needles", "1", "2"],
        "ruler": ["--samples", "1", "--lengths", "6k", "--depths", "0.5", "--modes", "dca"],
        "qa": [*few, *depths, "--questions", tmp_path / "qa.jsonl", "--answer-tokens", "4"],
        "recall": ["--synthetic", "--lengths", "1k", "--modes", "dca+sparse,dca+coverage0.5"],
        "perplexity": [*few, "--text", tmp_path / "text.txt", "--window", "128"],
    }
    images = {
        "passkey": ["passkey_depth", "passkey_accuracy", "passkey_density"],
        "niah": ["niah-1_depth", "niah-2_depth", "niah_accuracy", "niah_density"],
        "ruler": ["niah-1_depth", "niah-4_depth", "ruler_accuracy", "ruler_density"],
        "qa": ["qa_depth", "qa_accuracy", "qa_density"],
        "recall": ["recall", "recall_heads", "recall_density"],
        "perplexity": ["perplexity", "perplexity_density"],
    }
    for task, arguments in extra.items():
        output = tmp_path / "out" / task
        code, out, err = run(capsys, "eval", task, "--model", tiny, "--device", "cpu", "-o", output, *arguments)
        assert (code, err) == (0, "")
        record = json.loads((output / f"{task}.json").read_text())
        assert str(tmp_path) not in json.dumps(record)
        assert (record["benchmark"], record["model"]) == (f"eval {task}", "model")
        assert record["machine"]["cores"]
        names = {row["task"] for row in record["rows"]}
        assert all(name in out for name in names)
        assert sorted(file.stem for file in output.glob("*.png")) == sorted(images[task])
        assert all(str(output / f"{name}.png") in out for name in images[task])
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in output.glob("*.png"))
    assert names == {"perplexity"}
    assert record["options"]["text"] == "text.txt"
    assert record["options"]["lengths"] == [600, 1024]
    assert (record["options"]["window"], record["options"]["tail"], record["options"]["samples"]) == (128, None, 1)


def test_without_figures(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--samples", "1", "--lengths", "600", "--depths", "1", "--no-figures"]
    code, out, _ = run(capsys, "eval", "passkey", "--model", tiny, "-o", tmp_path / "out", *arguments)
    assert code == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["passkey.json"]
    assert re.search(r"passkey +dca\+sparse +\d+\.\d%", out)


LATIN = "<a file that is not UTF-8>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["passkey", "--lengths", "100"], "length must be at least"),
        (["passkey", "--lengths", "600", "--samples", "0"], "samples must be >= 1, got 0"),
        (["passkey", "--haystack", "novel"], "haystack must be"),
        (["niah", "--needles", "0"], "needles must be between 1 and 16, got 0"),
        (["passkey", "--chat"], "this tokenizer has no chat template"),
        (["qa", "--questions", "absent.jsonl"], "absent.jsonl"),
        (["perplexity", "--text", "absent.txt"], "absent.txt"),
        (["perplexity", "--text", LATIN], "latin.txt must be UTF-8 text, and is not UTF-8 at byte 2"),
        (["recall", "--text", LATIN], "latin.txt must be UTF-8 text, and is not UTF-8 at byte 2"),
        (["passkey", "--haystack", LATIN], "latin.txt must be UTF-8 text, and is not UTF-8 at byte 2"),
        (["qa", "--questions", LATIN], "latin.txt must be UTF-8 text, and is not UTF-8 at byte 2"),
        (["recall", "--text", "absent.txt"], "absent.txt"),
        (["recall", "--synthetic", "--lengths", "1k", "--modes", "dca"], "modes must be sparse ones without int8"),
    ],
)
def test_errors_are_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Grüße".encode("latin-1"))
    arguments = [str(latin) if part == LATIN else part for part in arguments]
    code, out, err = run(capsys, "eval", *arguments, "--model", tiny, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("qwen-sparse eval: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--modes", "dca,fast", "mode must be 'rope' or 'dca', then '+sparse' or '+coverage'"),
        ("--modes", "dca+coverage0.0", "coverage must lie in (0, 1), got 0.0"),
        ("--lengths", "4x", "a length must be a number of tokens such as 512, 4k or 1m, got '4x'"),
        ("--lengths", "0", "got '0'"),
        ("--depths", "0,2", "depths must be numbers between 0 and 1, got '0,2'"),
        ("--depths", "deep", "depths must be numbers between 0 and 1, got 'deep'"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], option: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "passkey", "--model", "m", "-o", "out", option, value])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_every_mode_has_a_style_of_its_own() -> None:
    """Up to three coverages; int8 shares the colour of the same prefill."""
    prefills = ("rope", "rope+sparse", "dca", "dca+sparse", "dca+coverage0.8", "dca+coverage0.9", "rope+coverage0.9")
    styles = line_styles([f"{prefill}{kv}" for prefill in prefills for kv in ("", "+int8")])
    seen = {(style["color"], style["marker"], style.get("linestyle")) for style in styles.values()}
    assert len(seen) == len(styles) == 2 * len(prefills)
    assert all(styles[prefill]["color"] == styles[f"{prefill}+int8"]["color"] for prefill in prefills)
    assert len({styles[prefill]["color"] for prefill in prefills}) == len(prefills)


def test_length_labels() -> None:
    assert [length_label(length) for length in (512, 1024, 1000, 32768, 2**20)] == ["512", "1K", "1000", "32K", "1M"]
