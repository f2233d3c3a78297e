"""Model configuration: what ``config.json`` and ``sparse_attention_config.json`` say, checked and typed.

Everything the decoder does not implement is refused here, by name, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..base.values import LARGEST, boolean, integer, number, refuse_unknown, value
from .architectures import Experts, architecture_of
from .checkpoint import parse_json, read_json, weights_dtype
from .formats import WeightFormat
from .gguf import GgufFile, is_gguf

__all__ = [
    "PAGE_SIZE",
    "DualChunkConfig",
    "ModelConfig",
    "RopeConfig",
    "SparseConfig",
    "SparseSwitches",
    "parse_dtype",
    "served_columns",
]

PAGE_SIZE = 128
"""Tokens per page of the KV cache. A page never straddles the border of a DCA chunk."""

HEAD_DIMS = (64, 128)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DUAL_CHUNK_KEYS = frozenset({"chunk_size", "local_size", "original_max_position_embeddings"})
_SPARSE_KEYS = frozenset(
    {
        "sparse_attention_config",
        "sparse_attention_enabled",
        "sparse_attention_threshold",
        "sparse_attention_last_q",
    }
)
_ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
    }
)


def parse_dtype(value: object, name: str = "dtype") -> torch.dtype:
    """``"bfloat16"``, ``"torch.bfloat16"`` or a ``torch.dtype`` to one of the three supported dtypes.

    Raises:
        ValueError: any other value; the message names ``name``.
    """
    dtype = value if isinstance(value, torch.dtype) else _DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None or dtype not in _DTYPES.values():
        raise ValueError(f"{name} must be one of {', '.join(_DTYPES)}, got {value!r}")
    return dtype


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: plain, or YaRN (arXiv 2309.00071) when ``factor`` is set; config.json's names."""

    rope_theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RopeConfig:
        """From config.json: ``rope_theta`` with ``rope_scaling``, or transformers 5's ``rope_parameters``.

        Raises:
            ValueError: a rope type other than default and yarn, an unknown key, or a value out of range.
        """
        where = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
        scaling = value(raw, where, where, {})
        if not isinstance(scaling, Mapping):
            raise ValueError(f"{where} must be an object or null, got {scaling!r}")
        if "mrope_section" in scaling:
            raise ValueError(
                f"{where}: mrope_section must be absent: multimodal rotary embedding (mrope) is of models that read "
                f"images, which are not supported, got {scaling['mrope_section']!r}"
            )
        refuse_unknown(scaling, _ROPE_KEYS, where)
        sources = [(scaling, where), (raw, "config.json")]
        theta_source = next((source for source in sources if source[0].get("rope_theta") is not None), sources[1])
        theta = number(theta_source[0], "rope_theta", theta_source[1], 1e4, above=1)
        for source, name in sources:
            partial = number(source, "partial_rotary_factor", name, 1.0)
            if partial != 1.0:
                raise ValueError(
                    f"{name}: partial_rotary_factor must be 1 (the whole head is rotated), got {partial!r}"
                )
        kind = next((scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None), None)
        options = sorted(set(scaling) - {"rope_theta", "partial_rotary_factor", "rope_type", "type"})
        if kind is None and options:  # transformers leaves them out without a word
            raise ValueError(f"{where}: rope_type is missing ('default' or 'yarn') beside {', '.join(options)}")
        if kind in (None, "default"):
            return cls(rope_theta=theta)
        if kind != "yarn":
            raise ValueError(f"{where}: type must be 'default' or 'yarn', got {kind!r}")

        def optional(key: str) -> float | None:
            return None if scaling.get(key) is None else number(scaling, key, where)

        return cls(
            rope_theta=theta,
            factor=number(scaling, "factor", where),
            original_max_position_embeddings=integer(
                scaling,
                "original_max_position_embeddings",
                where,
                default=raw.get("max_position_embeddings"),
            ),
            beta_fast=number(scaling, "beta_fast", where, 32.0),
            beta_slow=number(scaling, "beta_slow", where, 1.0),
            attention_factor=optional("attention_factor"),
            mscale=optional("mscale"),
            mscale_all_dim=optional("mscale_all_dim"),
            truncate=boolean(scaling, "truncate", where, True),
        )


@dataclass(frozen=True, slots=True)
class DualChunkConfig:
    """Dual Chunk Attention (arXiv 2402.17463): config.json's ``dual_chunk_attention_config``, in tokens.

    Raises:
        ValueError: ``local_size`` is not below ``chunk_size``, or ``chunk_len`` no multiple of the page size.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        where = "dual_chunk_attention_config"
        for name, minimum in (("chunk_size", 1), ("local_size", 1), ("original_max_position_embeddings", 0)):
            integer({name: getattr(self, name)}, name, where, minimum=minimum)
        if self.local_size >= self.chunk_size:
            raise ValueError(f"{where}: local_size must be below chunk_size = {self.chunk_size}, got {self.local_size}")
        if self.chunk_len % PAGE_SIZE:
            raise ValueError(
                f"{where}: chunk_size - local_size must be a multiple of the KV page size {PAGE_SIZE}, "
                f"got {self.chunk_size} - {self.local_size} = {self.chunk_len}"
            )

    @property
    def chunk_len(self) -> int:
        """``chunk_size - local_size``: keys are rotated at their position modulo this length."""
        return self.chunk_size - self.local_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DualChunkConfig:
        """From ``dual_chunk_attention_config``; an absent original length means 0: no temperature.

        Raises:
            ValueError: a key is missing, unknown or out of range.
        """
        where = "dual_chunk_attention_config"
        refuse_unknown(raw, _DUAL_CHUNK_KEYS | _SPARSE_KEYS, where)
        return cls(
            chunk_size=integer(raw, "chunk_size", where),
            local_size=integer(raw, "local_size", where),
            original_max_position_embeddings=integer(
                raw, "original_max_position_embeddings", where, minimum=0, default=0
            ),
        )


def check_coverage(coverage: float) -> None:
    """Raises:
    ValueError: not in (0, 1).
    """
    if not isinstance(coverage, int | float) or not 0 < coverage < 1:
        raise ValueError(f"coverage must lie in (0, 1), got {coverage!r}")


@dataclass(frozen=True, slots=True)
class SparseSwitches:
    """What ``dual_chunk_attention_config`` says of sparse attention besides budgets."""

    enabled: bool = False
    """``sparse_attention_enabled``; where it is absent, whether there are budgets."""
    threshold: int = 32768
    """Prompts up to this many tokens run dense."""
    last_q: int = 64
    """Query rows that vote in the selection; at most 64."""

    @classmethod
    def from_dual_chunk(cls, raw: Mapping[str, Any], *, budgets: bool) -> SparseSwitches:
        """From the contents of ``dual_chunk_attention_config``; ``budgets``: whether there are any.

        Raises:
            ValueError: a bad value.
        """
        where = "dual_chunk_attention_config"
        return cls(
            enabled=boolean(raw, "sparse_attention_enabled", where, budgets),
            threshold=integer(raw, "sparse_attention_threshold", where, minimum=0, default=32768),
            last_q=integer(raw, "sparse_attention_last_q", where, maximum=64, default=64),
        )


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """What sparse prefill attends: vertical-slash attention by budgets (MInference), or block groups by coverage."""

    vertical_sizes: tuple[tuple[int, ...], ...] = ()
    """``[num_layers][num_heads]``: number of columns; empty with a coverage."""
    slash_sizes: tuple[tuple[int, ...], ...] = ()
    """``[num_layers][num_heads]``: number of distances; empty with a coverage."""
    enabled: bool = True
    threshold: int = 32768
    """Prompts up to this many tokens run dense."""
    last_q: int = 64
    """Query rows that vote in the selection; at most 64."""
    coverage: float | None = None
    """Share of attention that block groups keep (:mod:`qwen_sparse.model.coverage`), in (0, 1); no budgets then."""

    def __post_init__(self) -> None:
        for name, minimum, maximum in (("threshold", 0, LARGEST), ("last_q", 1, 64)):
            integer({name: getattr(self, name)}, name, "SparseConfig", minimum=minimum, maximum=maximum)
        if self.coverage is not None:
            check_coverage(self.coverage)
        if (self.coverage is None) != bool(self.vertical_sizes and self.slash_sizes):
            raise ValueError(
                "SparseConfig must have budgets (vertical_sizes and slash_sizes) or a coverage, one of them"
            )

    @classmethod
    def from_budgets(
        cls,
        budgets: object,
        *,
        num_layers: int,
        num_heads: int,
        enabled: bool = True,
        threshold: int = 32768,
        last_q: int = 64,
    ) -> SparseConfig:
        """From the published format: a list by layer of ``{"head": ["vertical_and_slash", V, S, score]}``, or an object
        of these by layer.

        V = 30 means 130, as served by vLLM: the forced columns come on top of it.

        Raises:
            ValueError: anything else; the message names the layer and the head.
        """
        where = "sparse_attention_config"
        if isinstance(budgets, Mapping):
            if set(budgets) != {str(layer) for layer in range(num_layers)}:
                raise ValueError(
                    f'{where} must have keys "0" to "{num_layers - 1}", one per layer, got keys '
                    f"{', '.join(map(str, budgets))}"
                )
            budgets = [budgets[str(layer)] for layer in range(num_layers)]
        if not isinstance(budgets, Sequence) or isinstance(budgets, str) or len(budgets) != num_layers:
            got = f"{len(budgets)} entries" if isinstance(budgets, list) else f"a {type(budgets).__name__}"
            raise ValueError(f"{where} must be a list with one entry per layer ({num_layers}), got {got}")
        pairs = [_layer_budgets(heads, num_heads, f"{where}: layer {layer}") for layer, heads in enumerate(budgets)]
        return cls(
            vertical_sizes=tuple(tuple(v for v, _ in layer) for layer in pairs),
            slash_sizes=tuple(tuple(s for _, s in layer) for layer in pairs),
            enabled=enabled,
            threshold=threshold,
            last_q=last_q,
        )

    @classmethod
    def from_dual_chunk(
        cls, raw: Mapping[str, Any], *, num_layers: int, num_heads: int, budgets: object = None
    ) -> SparseConfig | None:
        """From the switches inside ``dual_chunk_attention_config``, and the budgets there unless others are given.

        None if there are no budgets.

        Raises:
            ValueError: a bad value, or ``sparse_attention_enabled`` without budgets.
        """
        budgets = raw.get("sparse_attention_config") if budgets is None else budgets
        switches = SparseSwitches.from_dual_chunk(raw, budgets=budgets is not None)
        if budgets is not None:
            return cls.from_budgets(budgets, num_layers=num_layers, num_heads=num_heads, **asdict(switches))
        if switches.enabled:
            raise ValueError(
                "dual_chunk_attention_config: sparse_attention_enabled is true but there are no budgets "
                "(sparse_attention_config.json beside the model, or sparse_attention_config)"
            )
        return None

    def of_layer(self, layer: int, heads: slice = slice(None)) -> SparseConfig:
        """Budgets of one layer and some of its heads, as a config of that one layer; a coverage is the same for all."""
        if self.coverage is not None:
            return self
        sizes = (self.vertical_sizes[layer][heads],), (self.slash_sizes[layer][heads],)
        return replace(self, vertical_sizes=sizes[0], slash_sizes=sizes[1])


def _layer_budgets(heads: object, num_heads: int, where: str) -> list[tuple[int, int]]:
    """(V, S) of every head of one layer."""
    if not isinstance(heads, Mapping) or set(heads) != {str(head) for head in range(num_heads)}:
        got = f"keys {', '.join(map(str, heads))}" if isinstance(heads, Mapping) else repr(heads)
        raise ValueError(f'{where} must be an object with keys "0" to "{num_heads - 1}", one per head, got {got}')
    pairs = []
    for head in range(num_heads):
        entry = heads[str(head)]
        sizes = entry[1:3] if isinstance(entry, Sequence) and not isinstance(entry, str) else ()
        if (
            len(sizes) != 2
            or entry[0] != "vertical_and_slash"
            or not all(type(size) is int and 0 <= size <= LARGEST for size in sizes)
        ):
            raise ValueError(
                f'{where}, head {head} must be ["vertical_and_slash", V, S, score] with integers V, S >= 0, '
                f"got {entry!r}"
            )
        pairs.append((served_columns(sizes[0]), sizes[1]))
    return pairs


def served_columns(vertical: int) -> int:
    """Columns that a head with V = ``vertical`` in its budget gets: V = 30 means 130, as vLLM serves it."""
    return 130 if vertical == 30 else vertical


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder. Sizes are counts of elements; ``dtype`` is the checkpoint's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    architecture: str = "Qwen2ForCausalLM"
    """Of :data:`qwen_sparse.model.architectures.ARCHITECTURES`."""
    attention_bias: bool = True
    """Bias on the q, k and v projections."""
    output_bias: bool = False
    """Bias on attention's output projection."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before it is rotated."""
    experts: Experts | None = None
    """Of layers whose MLP is a choice of several; None: of no layer."""
    windows: tuple[int | None, ...] = ()
    """By layer, how many keys a row attends at most, its own included; empty: no layer has a window."""
    dtype: torch.dtype = torch.bfloat16
    """Of the checkpoint; where config.json has none, the embedding's, and float32 where there are no weights either."""
    eos_token_ids: tuple[int, ...] = ()
    dual_chunk: DualChunkConfig | None = None
    sparse: SparseConfig | None = None
    sparse_switches: SparseSwitches = SparseSwitches()
    """Of a checkpoint without budgets; :attr:`sparse` has its own."""
    weight_format: WeightFormat | None = None
    """Of a checkpoint whose matrices are stored in fewer bits."""

    def __post_init__(self) -> None:
        if self.windows and self.dual_chunk is not None:
            raise ValueError(
                "dual_chunk_attention_config must be absent where layers have sliding windows (use_sliding_window), "
                f"got {self.dual_chunk}"
            )
        for name in (
            () if self.sparse is None or self.sparse.coverage is not None else ("vertical_sizes", "slash_sizes")
        ):
            heads = [len(layer) for layer in getattr(self.sparse, name)]
            if heads != [self.num_heads] * self.num_layers:
                raise ValueError(
                    f"sparse.{name} must have shape [num_layers, num_heads] = [{self.num_layers}, {self.num_heads}], "
                    f"got {heads} heads by layer"
                )

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence that the model's rotations are made for; None: Dual Chunk Attention has no limit.

        With YaRN as model cards ask for it, ``max_position_embeddings`` stays what it was: it is the larger of that and
        ``factor`` times the original length.
        """
        if self.dual_chunk is not None:
            return None
        scaled = 0
        if self.rope.factor is not None and self.rope.original_max_position_embeddings is not None:
            scaled = int(self.rope.factor * self.rope.original_max_position_embeddings)
        return max(self.max_position_embeddings, scaled)

    def check_length(self, name: str, length: int) -> None:
        """Raises:
        ValueError: the model's rotations are not made for sequences of so many tokens; the message names ``name``.
        """
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"{name} must be at most {self.longest}, the tokens that this model reads by its config "
                "(max_position_embeddings, or YaRN's factor times the original length; Dual Chunk Attention would read "
                f"more), got {length}"
            )

    def window(self, layer: int) -> int | None:
        """How many keys a row of the layer attends at most; None: all before it."""
        return self.windows[layer] if self.windows else None

    def with_coverage(self, coverage: float) -> ModelConfig:
        """The same with block groups chosen by coverage instead of budgets; the threshold stays.

        Raises:
            ValueError: ``coverage`` is not in (0, 1).
        """
        kept = self.sparse or self.sparse_switches
        return replace(self, sparse=SparseConfig(threshold=kept.threshold, last_q=kept.last_q, coverage=coverage))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, budgets: object = None) -> ModelConfig:
        """From the contents of config.json.

        Args:
            raw: the parsed config.json.
            budgets: contents of ``sparse_attention_config.json``; None to use those inside
                ``dual_chunk_attention_config``, if any.

        Raises:
            ValueError: an unknown architecture, an option that is not implemented, or a bad value.
        """
        where = "config.json"
        architecture = architecture_of(raw)
        _check_supported(raw)
        num_heads = integer(raw, "num_attention_heads", where)
        num_kv_heads = integer(raw, "num_key_value_heads", where, default=num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{where}: num_attention_heads must be a multiple of num_key_value_heads = {num_kv_heads}, "
                f"got {num_heads}"
            )
        hidden_size = integer(raw, "hidden_size", where)
        head_dim = integer(raw, "head_dim", where, default=hidden_size // num_heads)
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"{where}: head_dim must be 64 or 128, got {head_dim}")
        num_layers = integer(raw, "num_hidden_layers", where)
        dual_chunk = value(raw, "dual_chunk_attention_config", where, {})
        if not isinstance(dual_chunk, Mapping):
            raise ValueError(f"{where}: dual_chunk_attention_config must be an object, got {dual_chunk!r}")
        budgets = dual_chunk.get("sparse_attention_config") if budgets is None else budgets
        switches = SparseSwitches.from_dual_chunk(dual_chunk, budgets=budgets is not None)
        stored = raw.get("quantization_config")
        return cls(
            vocab_size=integer(raw, "vocab_size", where),
            hidden_size=hidden_size,
            intermediate_size=integer(raw, "intermediate_size", where),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=integer(raw, "max_position_embeddings", where),
            rope=RopeConfig.from_dict(raw),
            rms_norm_eps=number(raw, "rms_norm_eps", where, 1e-6),
            tie_word_embeddings=boolean(raw, "tie_word_embeddings", where, False),
            architecture=architecture.name,
            **architecture.read(raw, num_layers),
            dtype=parse_dtype(
                value(raw, "dtype", where, value(raw, "torch_dtype", where, "float32")),
                f"{where}: dtype (or torch_dtype)",
            ),
            eos_token_ids=_token_ids(raw, "eos_token_id", where),
            dual_chunk=DualChunkConfig.from_dict(dual_chunk) if dual_chunk else None,
            sparse=None
            if budgets is None
            else SparseConfig.from_budgets(budgets, num_layers=num_layers, num_heads=num_heads, **asdict(switches)),
            sparse_switches=switches if budgets is None else SparseSwitches(),
            weight_format=None if stored is None else WeightFormat.from_dict(stored),
        )

    @classmethod
    def from_directory(cls, path: str | Path, *, config: str | Path | None = None) -> ModelConfig:
        """From config.json, generation_config.json (its EOS tokens) and sparse_attention_config.json.

        Args:
            path: the checkpoint's directory, or a GGUF file, whose header is read instead.
            config: another file than config.json: one in the directory by its name (Qwen3-2507 has config_1m.json), or
                any by its path.

        Raises:
            FileNotFoundError: there is no config.json, or no such file.
            ValueError: a file is not JSON, or see :meth:`from_dict`.
        """
        path = Path(path)
        if is_gguf(path) and config is None:
            return cls.from_dict(GgufFile(path).config())
        file = path / ("config.json" if config is None else config)
        if config is not None and not file.is_file():
            file = Path(config)
        if not file.is_file():
            raise FileNotFoundError(
                f"no config.json in {path}"
                if config is None
                else f"config must be a file in {path} or the path of one, got {str(config)!r}"
            )
        raw = read_json(file)
        if raw.get("dtype") is None and raw.get("torch_dtype") is None:
            raw = {**raw, "dtype": weights_dtype(path)}
        generation, sparse = path / "generation_config.json", path / "sparse_attention_config.json"
        parsed = cls.from_dict(raw, budgets=parse_json(sparse) if sparse.is_file() else None)
        eos = _token_ids(read_json(generation), "eos_token_id", generation.name) if generation.is_file() else ()
        return replace(parsed, eos_token_ids=eos or parsed.eos_token_ids)


def _check_supported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {raw['hidden_act']!r}")


def _token_ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """A token id, a list of them, or null."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(integer({key: token}, key, where, minimum=0) for token in ids)
