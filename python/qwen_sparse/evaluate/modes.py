"""The ways to run one model: rotations, dense or sparse prefill, dtype of the KV cache."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..model.config import check_coverage
from ..model.decoder import Decoder

__all__ = ["Mode", "default_modes"]

_NAME = re.compile(r"(?P<rotation>rope|dca)(?P<sparse>\+sparse|\+coverage(?P<coverage>0?\.\d{1,4}))?(?P<int8>\+int8)?")


@dataclass(frozen=True)
class Mode:
    """How to run a model. Its name is ``rope`` or ``dca``, then ``+sparse`` or ``+coverage0.95``, then ``+int8``.

    Without the second part prefill is dense. ``sparse`` is vertical-slash attention by the checkpoint's budgets,
    ``coverage`` block groups that keep that share of attention (:mod:`qwen_sparse.model.coverage`); both prefill every
    prompt sparsely, also one that the checkpoint's threshold would leave dense.
    """

    dual_chunk: bool
    sparse: bool = False
    """Sparse prefill."""
    coverage: float | None = None
    """Share of attention that its block groups are chosen to keep; None: vertical-slash attention by budgets."""
    int8: bool = False

    @classmethod
    def parse(cls, name: str) -> Mode:
        """From a name.

        Raises:
            ValueError: not such a name, or a coverage outside (0, 1).
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                "mode must be 'rope' or 'dca', then '+sparse' or '+coverage' with a share such as 0.95, then '+int8', "
                f"the last two as wanted, got {name!r}"
            )
        coverage = None if match["coverage"] is None else float(match["coverage"])
        if coverage is not None:
            check_coverage(coverage)
        return cls(match["rotation"] == "dca", match["sparse"] is not None, coverage, match["int8"] is not None)

    @property
    def name(self) -> str:
        """What :meth:`parse` reads."""
        prefill = "" if not self.sparse else "+sparse" if self.coverage is None else f"+coverage{self.coverage}"
        return ("dca" if self.dual_chunk else "rope") + prefill + "+int8" * self.int8

    @property
    def title(self) -> str:
        """What tables and figures say."""
        parts = ["DCA" if self.dual_chunk else "plain RoPE"]
        if self.sparse:
            parts.append("vertical-slash" if self.coverage is None else f"block groups (coverage {self.coverage})")
        return " + ".join([*parts, *["int8 KV"] * self.int8])

    def apply(self, model: Decoder) -> Decoder:
        """The same weights, run this way.

        Raises:
            ValueError: ``dca`` without Dual Chunk Attention in the model's config, ``sparse`` without budgets.
        """
        if self.dual_chunk and model.config.dual_chunk is None:
            raise ValueError(f"mode {self.name!r} needs dual_chunk_attention_config in the model's config.json")
        if self.sparse and self.coverage is None and not _has_budgets(model):
            raise ValueError(
                f"mode {self.name!r} needs budgets (sparse_attention_config.json beside the model, or "
                "sparse_attention_config inside dual_chunk_attention_config); this model has none"
            )
        return model.with_options(
            attention="sparse" if self.sparse else "dense",
            kv_cache_dtype="int8" if self.int8 else "auto",
            config=model.config if self.dual_chunk else replace(model.config, dual_chunk=None),
            coverage=self.coverage,
        )


def default_modes(model: Decoder) -> list[str]:
    """The modes that a model can run, without coverage and int8."""
    names = ["rope", *["dca"] * (model.config.dual_chunk is not None)]
    return names + [f"{names[-1]}+sparse"] * _has_budgets(model)


def _has_budgets(model: Decoder) -> bool:
    """A model that was loaded with a coverage has given up its own."""
    return model.config.sparse is not None and model.config.sparse.coverage is None
