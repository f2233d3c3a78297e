"""Block groups on a trained model: its first layers, which are quickly made, and the whole of it where it is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_sparse.calibrate import measure_budgets
from qwen_sparse.evaluate import evaluate_probes
from qwen_sparse.evaluate.perplexity import divergence, predict_tail
from qwen_sparse.model.config import DualChunkConfig, SparseConfig
from qwen_sparse.model.decoder import Decoder

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import texts

TEXTS = {"code": texts.code, "prose": texts.prose}
pytestmark = pytest.mark.released


def tokens_of(model: Decoder, text: str, length: int) -> list[int]:
    return model.tokenizer.encode(TEXTS[text]()[: 10 * length])[:length]


def recall(model: Decoder, tokens: list[int], coverage: float) -> tuple[float, float]:
    """Of all rows, heads and layers, with the hidden states of dense attention; and density."""
    found = measure_budgets(model, tokens, SparseConfig(coverage=coverage))
    return found.recall, found.density


@pytest.mark.parametrize("dual_chunk", [False, True], ids=["rope", "dual_chunk"])
@pytest.mark.parametrize("text", TEXTS)
def test_first_layers_keep_their_attention(released_cut: Decoder, text: str, dual_chunk: bool) -> None:
    """They keep a little less than the mean of all layers, and alike of both texts, with DCA's rotations too."""
    model, tokens = released_cut, tokens_of(released_cut, text, 4096)
    if dual_chunk:  # three chunks; the model was trained at these positions all the same
        model = model.with_options(config=replace(model.config, dual_chunk=DualChunkConfig(2048, 512, 0)))
    for coverage, least, most, densest in ((0.9, 0.80, 0.90, 0.20), (0.95, 0.89, 0.96, 0.35), (0.98, 0.95, 0.99, 0.55)):
        kept, density = recall(model, tokens, coverage)
        assert least < kept < most
        assert density < densest


def test_first_layers_come_close_to_dense(released_cut: Decoder) -> None:
    """Hidden states behind four layers, of all rows but those that are dense anyway: the more coverage, the closer."""
    tokens = torch.tensor(tokens_of(released_cut, "code", 4096))

    def hidden(model: Decoder) -> Tensor:
        result = model.forward(tokens, model.new_cache(4096), sparse=model.attention == "sparse", output="hidden")
        assert result is not None
        return result[:-64].float()

    dense = hidden(released_cut.with_options(attention="dense"))
    errors = [
        float((hidden(released_cut.with_options(attention="sparse", coverage=coverage)) - dense).norm() / dense.norm())
        for coverage in (0.9, 0.95, 0.98)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.1
    assert errors[2] < 0.03


@pytest.mark.parametrize("text", TEXTS)
def test_coverage_is_what_is_kept(released_model: Decoder, text: str) -> None:
    tokens = tokens_of(released_model, text, 8192)
    for coverage in (0.85, 0.95):
        kept, density = recall(released_model, tokens, coverage)
        assert kept == pytest.approx(coverage, abs=0.02)
        assert density < 0.3


@pytest.mark.parametrize("text", TEXTS)
def test_predictions_are_those_of_dense_attention(released_model: Decoder, text: str) -> None:
    tokens = tokens_of(released_model, text, 8192)
    dense = predict_tail(released_model.with_options(attention="dense"), tokens, 2048)
    sparse = predict_tail(released_model.with_options(attention="sparse", coverage=0.9), tokens, 2048)
    assert sparse.density < 0.2
    assert divergence(dense, sparse).kl < 0.05
    assert sparse.loss() < dense.loss() + 0.01  # perplexity at most 1 % above; of this prose it is 1 to 2 % below


def test_as_many_needles_are_found_as_by_dense_attention(released_model: Decoder, tmp_path: Path) -> None:
    """Of twenty, about two thirds by either, not the same ones; their number differs by a few from text to text."""
    (tmp_path / "code.txt").write_text(texts.code())
    modes = ["rope", "rope+coverage0.87"]
    rows = list(evaluate_probes(released_model, 20, modes, [8192], hay=str(tmp_path / "code.txt"), chat=True))
    dense, sparse = (sum(row["found"] for row in rows if row["mode"] == mode) for mode in modes)
    assert dense >= 10
    assert sparse >= dense - 1
