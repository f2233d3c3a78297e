"""Perplexity behind contexts of different length, and distances between modes, against logits of whole prompts."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import DUAL_CHUNK, WriteCheckpoint
from qwen_sparse import prefill
from qwen_sparse.cli import main
from qwen_sparse.demo import load_passkey_model
from qwen_sparse.evaluate import Mode, evaluate_perplexity
from qwen_sparse.evaluate.perplexity import divergence, predict_tail, predict_window, references_of, window_ends
from qwen_sparse.model.decoder import Decoder

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import texts


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_passkey_model(device="cpu")


def test_perplexity_is_that_of_one_pass(model: Decoder) -> None:
    """Context and window one after the other predict as one pass over both, while the temperature is the same."""
    tokens = model.tokenizer.encode("def f(x):\n    return x + 1\n" * 20)[:480]
    for name in ("rope", "dca"):
        runner = Mode.parse(name).apply(model)
        logits = prefill(runner, tokens, logits="all").logits
        for predict, count in ((predict_window, 128), (predict_tail, 128), (predict_tail, 300)):
            found = predict(runner, tokens, count)
            expected = logits[-count - 1 : -1]
            torch.testing.assert_close(torch.cat(list(found.logits())), expected, rtol=1e-3, atol=1e-3)
            assert found.targets.tolist() == tokens[-count:]
            loss = F.cross_entropy(expected, torch.tensor(tokens[-count:]))
            assert found.loss() == pytest.approx(float(loss), rel=1e-4)
            assert found.density == pytest.approx(1)
    text = "".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(200))
    rows = list(evaluate_perplexity(model, text, ["rope", "dca"], [4096, 512], window=128, samples=2))
    found = {(row["mode"], row["length"]): row for row in rows}
    assert [(row["length"], row["mode"]) for row in rows] == [(n, m) for n in (512, 4096) for m in ("rope", "dca")]
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(sum(row["nll_by_window"]) / 2))
        assert (row["windows"], row["predicted"]) == (2, 256)
        assert (row["reference"], row["kl"], row["same_top"]) == (row["mode"], 0, 1)
    assert found["rope", 512]["perplexity"] == pytest.approx(found["dca", 512]["perplexity"], rel=0.05)
    assert found["rope", 4096]["perplexity"] > 1.5 * found["dca", 4096]["perplexity"]


def test_distances_from_the_reference(model: Decoder) -> None:
    """Those of the logits of whole prompts, in float64; tails and windows."""
    text = "".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(200))
    tokens = model.tokenizer.encode(text)[:2048]
    modes = ["dca+sparse", "dca+coverage0.5+int8", "dca"]
    rows = {row["mode"]: row for row in evaluate_perplexity(model, text, modes, [2048], tail=600)}
    assert list(rows) == ["dca", "dca+sparse", "dca+coverage0.5+int8"]  # references first
    logits = {}
    for mode in modes:
        read = prefill(Mode.parse(mode).apply(model), tokens, logits="all")
        assert rows[mode]["density"] == read.stats.density
        logits[mode] = read.logits[-601:-1].double().log_softmax(1)
        loss = F.nll_loss(logits[mode], torch.tensor(tokens[-600:]))
        assert rows[mode]["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)
        assert (rows[mode]["predicted"], rows[mode]["reference"]) == (600, "dca")
    for mode in modes:
        kl = (logits["dca"].exp() * (logits["dca"] - logits[mode])).sum(1).mean()
        same = (logits["dca"].argmax(1) == logits[mode].argmax(1)).double().mean()
        assert rows[mode]["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        assert rows[mode]["same_top"] == pytest.approx(
            float(same), abs=1 / 600
        )  # a tie of two words may fall otherwise
    assert rows["dca+coverage0.5+int8"]["kl"] > rows["dca+sparse"]["kl"] > 1e-4

    windows = {row["mode"]: row for row in evaluate_perplexity(model, text, modes, [2048], window=128, samples=2)}
    ends = window_ends(len(model.tokenizer.encode(text)), 2048, 128, 2)
    runners = {mode: Mode.parse(mode).apply(model) for mode in modes}
    found = []
    for end in ends:
        part = model.tokenizer.encode(text)[end - 2048 : end]
        exact, sparse = (predict_window(runners[mode], part, 128) for mode in ("dca", "dca+sparse"))
        p, q = (torch.cat(list(predicted.logits())).double().log_softmax(1) for predicted in (exact, sparse))
        found.append(float((p.exp() * (p - q)).sum(1).mean()))
        again = divergence(exact, sparse)  # what was kept is not changed by a comparison
        assert again == divergence(exact, sparse)
        assert again.kl == pytest.approx(found[-1], rel=1e-3)
    assert windows["dca+sparse"]["kl"] == pytest.approx(sum(found) / 2, rel=1e-3)
    with pytest.raises(ValueError, match="divergence: both must predict the same tokens, got 128 and 100"):
        divergence(exact, predict_window(runners["dca"], part, 100))


def test_references(model: Decoder) -> None:
    modes = ["dca+int8", "rope+sparse", "dca+sparse", "rope", "rope+int8"]
    assert references_of(modes) == dict.fromkeys(["rope+sparse", "rope", "rope+int8"], "rope")  # dca does not run
    assert references_of(modes, "dca+int8") == dict.fromkeys(modes, "dca+int8")
    text = "The grass is green. " * 60
    rows = list(evaluate_perplexity(model, text, ["dca+sparse", "rope+int8", "rope"], [700], tail=100))
    assert [(row["mode"], row.get("reference")) for row in rows] == [
        ("rope", "rope"),
        ("dca+sparse", None),
        ("rope+int8", "rope"),
    ]
    assert ["kl" in row for row in rows] == ["same_top" in row for row in rows] == [True, False, True]
    rows = list(evaluate_perplexity(model, text, ["dca", "rope"], [700], tail=100, reference="rope"))
    assert [row["mode"] for row in rows] == ["rope", "dca"]
    assert rows[1]["kl"] > 0
    with pytest.raises(ValueError, match=r"reference must be one of the modes dca, dca\+sparse, got 'rope'"):
        evaluate_perplexity(model, text, ["dca", "dca+sparse"], [700], tail=100, reference="rope")


def test_windows() -> None:
    assert window_ends(1000, 700, 100, 4) == [700, 800, 900, 1000]
    assert window_ends(700, 700, 100, 1) == [700]
    with pytest.raises(ValueError, match=r"at least 1000 tokens \(700 and 3 more windows of 100\), got 999"):
        window_ends(999, 700, 100, 4)
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        window_ends(999, 700, 100, 0)


def test_distances_are_shown(
    write_checkpoint: WriteCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default the last 2048 tokens of each prompt are measured."""
    (tmp_path / "text.txt").write_text("The grass is green. " * 150)
    path = write_checkpoint(tokenizer=True, sparse=(40, 110), dual_chunk_attention_config=DUAL_CHUNK)
    common = ["eval", "perplexity", "--model", str(path), "--text", str(tmp_path / "text.txt"), "--no-figures"]
    common += ["-o", str(tmp_path / "out"), "--modes", "dca+sparse,dca,rope+int8"]
    assert main([*common, "--lengths", "2500,3000"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "perplexity.json").read_text())["rows"]
    assert [(row["mode"], row["predicted"], row.get("same_top", 0) > 0) for row in rows] == [
        ("dca", 2048, True),
        ("dca+sparse", 2048, True),
        ("rope+int8", 2048, False),
    ] * 2
    kl = [row["kl"] for row in rows if row["mode"] == "dca+sparse"]
    assert f"\nperplexity  dca+sparse  {kl[0]:.4f}  {kl[1]:.4f}\n" in out
    assert re.search(r"\nsame top\n.*\nperplexity  dca +100\.0%  100\.0%\n", out)
    assert main([*common, "--lengths", "2500", "--reference", "rope"]) == 2
    assert "reference must be one of the modes dca+sparse, dca, rope+int8, got 'rope'" in capsys.readouterr().err


def test_wrong_arguments_are_named(model: Decoder) -> None:
    with pytest.raises(ValueError, match="window must be >= 64, got 16"):
        evaluate_perplexity(model, "x" * 1000, ["dca"], [512], window=16)
    with pytest.raises(ValueError, match="length must be above window = 256 for perplexity, got 256"):
        evaluate_perplexity(model, "x" * 1000, ["dca"], [256])
    with pytest.raises(ValueError, match="length must be above tail = 512 for perplexity, got 512"):
        evaluate_perplexity(model, "x" * 1000, ["dca"], [512, 600], tail=512)
    with pytest.raises(ValueError, match="tail must be >= 1, got 0"):
        evaluate_perplexity(model, "x" * 1000, ["dca"], [512], tail=0)


@pytest.mark.released
def test_a_trained_model_is_near_itself(released_model: Decoder) -> None:
    """An int8 cache changes little, half of the attention more, and each by a plausible amount."""
    text = texts.prose()[:8000]
    modes = ["rope", "rope+int8", "rope+coverage0.5"]
    rows = {row["mode"]: row for row in evaluate_perplexity(released_model, text, modes, [768], tail=256)}
    assert 2 < rows["rope"]["perplexity"] < 20
    assert 0 < rows["rope+int8"]["kl"] < 0.05
    assert 2 * rows["rope+int8"]["kl"] < rows["rope+coverage0.5"]["kl"] < 5
    assert 0.9 < rows["rope+int8"]["same_top"] < 1
    assert 0.2 < rows["rope+coverage0.5"]["same_top"] < rows["rope+int8"]["same_top"]
    assert rows["rope+coverage0.5"]["density"] < 0.8
