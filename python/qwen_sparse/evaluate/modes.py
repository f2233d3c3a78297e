"""The ways to run one model: rotations, sparse or dense prefill, dtype of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..models.qwen2 import Qwen2Model

__all__ = ["Mode", "default_modes"]

_ROTATIONS = {"rope": "plain RoPE", "dca": "DCA"}
_OPTIONS = {"sparse": "vertical-slash", "int8": "int8 KV"}


@dataclass(frozen=True)
class Mode:
    """How to run a model. Its name is ``rope`` or ``dca``, then ``+sparse`` and ``+int8`` as wanted.

    ``sparse`` prefills every prompt sparsely, also one that the checkpoint's threshold would leave dense.
    """

    dual_chunk: bool
    sparse: bool = False
    int8: bool = False

    @classmethod
    def parse(cls, name: str) -> Mode:
        """From a name.

        Raises:
            ValueError: not such a name.
        """
        rotation, *options = name.split("+")
        if rotation not in _ROTATIONS or not set(options) <= set(_OPTIONS) or len(options) > len(set(options)):
            raise ValueError(f"mode must be 'rope' or 'dca', then '+sparse' and '+int8' as wanted, got {name!r}")
        return cls(rotation == "dca", "sparse" in options, "int8" in options)

    @property
    def name(self) -> str:
        """What :meth:`parse` reads."""
        return "dca" * self.dual_chunk + "rope" * (not self.dual_chunk) + "+sparse" * self.sparse + "+int8" * self.int8

    @property
    def title(self) -> str:
        """What tables and figures say."""
        return " + ".join(_ROTATIONS.get(part) or _OPTIONS[part] for part in self.name.split("+"))

    def apply(self, model: Qwen2Model) -> Qwen2Model:
        """The same weights, run this way.

        Raises:
            ValueError: ``dca`` without Dual Chunk Attention in the model's config, ``sparse`` without budgets.
        """
        if self.dual_chunk and model.config.dual_chunk is None:
            raise ValueError(f"mode {self.name!r} needs dual_chunk_attention_config in the model's config.json")
        if self.sparse and model.config.sparse is None:
            raise ValueError(
                f"mode {self.name!r} needs budgets (sparse_attention_config.json beside the model, or "
                "sparse_attention_config inside dual_chunk_attention_config); this model has none"
            )
        return model.with_options(
            attention="sparse" if self.sparse else "dense",
            kv_cache_dtype="int8" if self.int8 else "auto",
            config=model.config if self.dual_chunk else replace(model.config, dual_chunk=None),
        )


def default_modes(model: Qwen2Model) -> list[str]:
    """The modes that a model can run, without int8."""
    names = ["rope", *["dca"] * (model.config.dual_chunk is not None)]
    return names + [f"{names[-1]}+sparse"] * (model.config.sparse is not None)
