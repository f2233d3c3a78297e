"""Many needles in one text: what it holds, how it is framed, answers from the cache, rows and command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import DUAL_CHUNK, WriteCheckpoint, byte_tokenizer
from qwen_sparse import generate, prefill
from qwen_sparse.cli import main
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.evaluate import Mode, evaluate_probes, make_probed_text
from qwen_sparse.evaluate import probes as probes_module
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.tokenizer import Tokenizer

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant"
NEEDLE = re.compile(r"The ([A-Za-z ]+) is (\d+)\. Remember it\. (\d+) is the ([A-Za-z ]+)\.\n")
ASKED = re.compile(r"\nWhat is the ([A-Za-z ]+)\?(.*?)The ([A-Za-z ]+) is ", re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer(), chat_template=CHAT)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_passkey_model(device="cpu")


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("count", [1, 5, 16, 40, 256])
def test_a_probed_text_is_what_it_says(tokenizer: Tokenizer, count: int, chat: bool) -> None:
    length = 40_000
    text = make_probed_text(tokenizer, length, count, seed=3, chat=chat)
    assert text == make_probed_text(tokenizer, length, count, seed=3, chat=chat)
    assert text.tokens == tokenizer.encode(text.text)
    assert 0 <= length - text.size < 60  # a sentence more would not fit
    assert text.size == max(len(text.tokens) + len(probe.tokens) + probe.max_new_tokens for probe in text.probes)
    numbers = {match[1]: match[2] for match in NEEDLE.finditer(text.text)}
    assert len(numbers) == len(set(numbers.values())) == len(text.probes) == len(text.needles) == count
    assert len({label for label in numbers if " of " in label}) == (0 if count <= 16 else count)
    for needle, probe in zip(text.needles, text.probes, strict=True):
        assert text.text[needle.start :].startswith(needle.text)
        asked = ASKED.fullmatch(probe.text)
        assert asked is not None
        assert asked[1] == asked[3]
        assert needle.text.startswith(f"The {asked[1]} is {probe.answer}.")
        assert numbers[asked[1]] == probe.answer
        assert asked[2] == ("<|im_end|>\n<|im_start|>assistant" if chat else " ")
        assert probe.tokens == tokenizer.encode(probe.text)
        assert probe.max_new_tokens > len(tokenizer.encode(probe.answer))
    assert text.text.startswith("<|im_start|>user\nThere is" if chat else "There is")
    filler = text.text.split("\n\n", 1)[1]
    sentences = len(re.findall(r"[^.]+\. ", NEEDLE.sub("", filler)))
    assert sentences == text.units
    for number, match in enumerate(NEEDLE.finditer(filler)):  # evenly spread, in the order of the probes
        before = len(re.findall(r"[^.]+\. ", NEEDLE.sub("", filler[: match.start()])))
        assert before == round((number + 0.5) / count * sentences)
        assert text.probes[number].depth == (number + 0.5) / count
        assert text.probes[number].answer == match[2]
    other = make_probed_text(tokenizer, length, count, seed=3, sample=1, chat=chat)
    assert [probe.answer for probe in other.probes] != [probe.answer for probe in text.probes]


def test_a_file_is_hay_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text("One is here.  Two!\nA line without an end\n\nLast one")
    text = make_probed_text(tokenizer, 2000, 4, hay=str(tmp_path / "book.txt"))
    assert NEEDLE.sub("", text.text).count("One is here.  Two!\nA line without an end\n\nLast one\n") > 10


def test_questions_are_answered_from_the_cached_text(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it were the only one; the text is prefilled once per mode and length."""
    modes = ["dca", "dca+sparse", "dca+coverage0.5+int8"]
    prefilled: list[tuple[str, int]] = []

    def counted(runner: Decoder, tokens: list[int], **options: Any) -> Any:
        prefilled.append((runner.attention, len(tokens)))
        return prefill(runner, tokens, **options)

    monkeypatch.setattr(probes_module, "prefill", counted)
    rows = list(evaluate_probes(model, 4, modes, [3000, 1500], seed=2))
    texts = {length: make_probed_text(model.tokenizer, length, 4, seed=2) for length in (1500, 3000)}
    sizes = {length: len(text.tokens) for length, text in texts.items()}
    kinds = ["dense", "sparse", "sparse"]
    assert prefilled == [(kind, sizes[length]) for length in (1500, 3000) for kind in kinds]
    cells = {(row["length"], row["mode"], row["depth"]): row for row in rows}
    assert list(cells) == [(n, mode, d) for n in (1500, 3000) for mode in modes for d in (0.125, 0.375, 0.625, 0.875)]
    for length, text in texts.items():
        for mode in modes:
            runner = Mode.parse(mode).apply(model)
            for probe in text.probes:
                row = cells[length, mode, probe.depth]
                read = prefill(runner, text.tokens)
                written = generate(runner, probe.tokens, cache=read.cache, max_new_tokens=probe.max_new_tokens)
                output = model.tokenizer.decode(list(written))
                right = re.search(r"\d+|$", output)[0] == probe.answer  # type: ignore[index]
                assert row["wrong"] == ([] if right else [[[probe.answer], output]])
                assert (row["found"], row["accuracy"], row["prompts"]) == (right, right, 1)
                assert row["density"] == read.stats.density
                assert row["tokens"] == len(text.tokens)
                assert row["seconds"] > 0
                assert row["answer_seconds"] > 0
    assert 0 < sum(row["found"] for row in rows) < len(rows)  # right and wrong ones have been compared


def test_what_is_found_depends_on_the_mode(model: Decoder) -> None:
    rows = list(evaluate_probes(model, 2, ["rope", "dca", "dca+sparse"], [8192], samples=2))
    found = {mode: [row["found"] for row in rows if row["mode"] == mode] for mode in ("rope", "dca", "dca+sparse")}
    assert found == {"rope": [0, 0], "dca": [2, 2], "dca+sparse": [2, 2]}
    assert {row["prompts"] for row in rows} == {2}
    assert [row["density"] < 0.5 for row in rows] == [False] * 4 + [True] * 2


def test_wrong_arguments_are_named_at_once(model: Decoder, tokenizer: Tokenizer) -> None:
    for count in (0, 257, -1):
        with pytest.raises(ValueError, match=rf"probes must be in \[1, 256\], got {count}"):
            evaluate_probes(model, count, ["dca"], [4096])
    with pytest.raises(ValueError, match=r"probes must be an integer in \[1, 256\], got 2.5"):
        evaluate_probes(model, 2.5, ["dca"], [4096])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        evaluate_probes(model, 2, ["dca"], [4096], samples=0)
    with pytest.raises(ValueError, match=r"length must be at least \d+ tokens for niah-40-probes .*, got 1000"):
        evaluate_probes(model, 40, ["dca"], [4096, 1000])
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        make_probed_text(Tokenizer(byte_tokenizer()), 4096, 2, chat=True)
    with pytest.raises(FileNotFoundError, match="haystack must be 'grass', 'sentences' or a text file, got 'novel'"):
        evaluate_probes(model, 2, ["dca"], [4096], hay="novel")
    shouting = Tokenizer(byte_tokenizer(), chat_template="{{ messages[0].content | upper }}")
    with pytest.raises(ValueError, match="niah-2-probes: the chat template must not change the message, and it does"):
        make_probed_text(shouting, 4096, 2, chat=True)
    measuring = Tokenizer(byte_tokenizer(), chat_template="{{ messages[0].content | length }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="niah-16-probes: the chat template must put the same before every message"):
        make_probed_text(measuring, 4096, 16, chat=True)


def test_command(write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tokenizer=True, sparse=(40, 110), dual_chunk_attention_config=DUAL_CHUNK)
    (tmp_path / "hay.txt").write_text("One line.\nAnother, longer one.\n" * 20)
    common = ["--model", str(path), "--device", "cpu", "-o", str(tmp_path / "out"), "--modes", "dca,dca+sparse"]
    arguments = [*common, "--probes", "3", "--lengths", "900,1k", "--text", str(tmp_path / "hay.txt")]
    assert main(["eval", "niah", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"seconds\ntask +mode +900 +1K\nniah-3-probes +dca +\d+\.\d\d +\d+\.\d\d\n", out)
    record = json.loads((tmp_path / "out" / "niah.json").read_text())
    assert str(tmp_path) not in json.dumps(record)
    options = {name: record["options"][name] for name in ("probes", "samples", "depths", "needles", "haystack")}
    assert options == {"probes": 3, "samples": 1, "depths": None, "needles": None, "haystack": "hay.txt"}
    assert [row["depth"] for row in record["rows"]] == [1 / 6, 0.5, 5 / 6] * 4
    images = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert images == ["niah-3-probes_depth.png", "niah_accuracy.png", "niah_density.png"]

    for more, message in (
        (["--probes", "0"], "probes must be in [1, 256], got 0"),
        (["--probes", "3", "--depths", "0,1"], "--depths goes without --probes"),
        (["--probes", "3", "--needles", "4"], "--needles goes without --probes"),
    ):
        assert main(["eval", "niah", *common, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.released
def test_a_trained_model_finds_its_needles(released_model: Decoder) -> None:
    """Two facts in a chat about 1,000 tokens of prose; the system prompt and the roles are those of the template."""
    text = make_probed_text(released_model.tokenizer, 1000, 2, chat=True)
    assert text.text.startswith("<|im_start|>system\n")
    assert all("<|im_end|>\n<|im_start|>assistant\n" in probe.text for probe in text.probes)
    rows = list(evaluate_probes(released_model, 2, ["rope"], [1000], chat=True))
    assert [row["found"] for row in rows] == [1, 1]
