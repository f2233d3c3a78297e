"""The kernels inside transformers: ``attn_implementation="qwen_sparse"``, Dual Chunk Attention, sparse prefill.

    import qwen_sparse.transformers as plugin
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="qwen_sparse")
    plugin.enable_dual_chunk(model, chunk_size=262144, local_size=8192)
    plugin.enable_block_groups(model, coverage=0.95)  # or enable_vertical_slash(model, "sparse_attention_config.json")
    model.generate(...)

Importing this module registers the attention. It serves any model that goes through transformers' attention interface
with head sizes 64 and 128: causal or not, sliding windows, grouped queries, left or right padding, dynamic and
static caches. What it cannot honour (gradients, dropout, soft capping, attention sinks, packed sequences, other masks)
it refuses by name. Under torch.compile it runs in eager mode, with the same results; fullgraph=True is refused.

Dual Chunk Attention needs positions modulo the chunk length, so the model's rotary embedding gets these; queries then
are in their intra-chunk rotation, and the other two follow from it by a further rotation of their own distance. The
cache holds keys as the definition wants them. One sequence of a batch is one call of our ops, and a decode step goes
through the prefill kernels: for serving, see docs/vllm.md or qwen_sparse.generate.

Sparse prefill, by budgets or by coverage, leaves rows that are read dense: up to 512 on top of cached keys (a question
about what was cached, a decode step), and the last block of every other forward pass (from a multiple of 64 on).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .kernels import ops
from .model import rope
from .model.attention import Queries, attend, dense_rows
from .model.checkpoint import parse_json
from .model.config import DualChunkConfig, SparseConfig

__all__ = [
    "NAME",
    "Enabled",
    "attention",
    "attention_mask",
    "enable_block_groups",
    "enable_dual_chunk",
    "enable_vertical_slash",
    "register",
]

NAME = "qwen_sparse"
"""For ``attn_implementation`` and ``model.set_attn_implementation``."""
_SETTINGS = "_qwen_sparse"  # attribute of attention modules
_PREVIOUS = "_qwen_sparse_previous"  # attribute of models: the attention that they had
_UNSUPPORTED = {"softcap": "soft capping of logits", "s_aux": "attention sinks", "position_bias": "a position bias"}


class _Positions:
    """Those that the rotary embedding was given in this forward pass, not yet modulo the chunk length."""

    ids: Tensor
    """``[batch or 1, n]``."""


@dataclass(frozen=True)
class _Settings:
    """Of one attention module."""

    dual_chunk: DualChunkConfig | None = None
    inv_freq: Tensor | None = None
    positions: _Positions | None = None
    """With ``dual_chunk``; the same object in all layers."""
    sparse: SparseConfig | None = None
    """Of this layer; None: dense."""


@dataclass(frozen=True)
class _Bounds:
    """What a mask comes down to: one run of keys per sequence, the rows at their end."""

    runs: tuple[tuple[int, int], ...]
    """First key and the one behind the last, by sequence; empty: all keys up to ``end``."""
    end: int
    """Keys that exist; a static cache is longer."""


class _Mask(Tensor):
    """An empty tensor that carries bounds through a model's layers."""

    bounds: _Bounds


class Enabled:
    """What an ``enable_`` function changed; :meth:`remove` undoes it."""

    def __init__(self, undo: Sequence[Callable[[], object]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Restores the model, once."""
        while self._undo:
            self._undo.pop()()


def register() -> None:
    """Makes :data:`NAME` known to transformers.

    Raises:
        ImportError: a version of transformers whose masks are made in another way.
    """
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(f"qwen_sparse.transformers needs transformers 5, got {transformers.__version__}")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def enable_dual_chunk(
    model: nn.Module, *, chunk_size: int, local_size: int, original_max_position_embeddings: int | None = None
) -> Enabled:
    """Switch a loaded model to Dual Chunk Attention (arXiv 2402.17463), for forward and ``generate``.

    Args:
        model: a transformers decoder with one rotary embedding of all channels, such as Qwen2, Qwen3 or Llama.
        chunk_size, local_size: in tokens, as in ``dual_chunk_attention_config``.
        original_max_position_embeddings: trained length, beyond which the temperature sets in; ``chunk_size`` when
            None, 0 for no temperature. It follows the length at hand: with ``prefill_chunk_size``, early chunks of
            a prompt beyond the trained length see a smaller one than in one pass.

    Returns:
        What undoes the change.

    Raises:
        ValueError: sizes out of range, Dual Chunk Attention enabled already, a rotary embedding that it does not fit,
            or layers with a sliding window.
    """
    original = chunk_size if original_max_position_embeddings is None else original_max_position_embeddings
    dual_chunk = DualChunkConfig(chunk_size, local_size, original)
    embedding = _rotary_embedding(model)
    modules = _attention_modules(model)
    for module in modules:
        if _settings(module).dual_chunk is not None:
            raise ValueError("enable_dual_chunk: this model has Dual Chunk Attention already")
        if getattr(module, "sliding_window", None) is not None:
            raise ValueError(
                "enable_dual_chunk: layers must have full attention, "
                f"got sliding_window = {module.sliding_window} in layer {module.layer_idx}"
            )
    undo = [_use(model)]
    inv_freq, positions = cast(Tensor, embedding.inv_freq).double(), _Positions()
    for module in modules:
        undo.append(_set(module, dual_chunk=dual_chunk, inv_freq=inv_freq, positions=positions))

    def positions_in_chunk(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "position_ids" in kwargs:
            positions.ids = kwargs["position_ids"]
            return args, {**kwargs, "position_ids": positions.ids % dual_chunk.chunk_len}
        positions.ids = args[1]
        return (args[0], positions.ids % dual_chunk.chunk_len, *args[2:]), kwargs

    undo.append(embedding.register_forward_pre_hook(positions_in_chunk, with_kwargs=True).remove)
    return Enabled(undo)


def enable_vertical_slash(
    model: nn.Module, budgets: str | Path | Sequence[Any], *, threshold: int = 32768, last_q: int = 64
) -> Enabled:
    """Prefill with vertical-slash attention (MInference, arXiv 2407.02490) where a prompt is longer than ``threshold``.

    Args:
        model: a transformers decoder.
        budgets: ``sparse_attention_config.json``, or its contents: a list by layer of
            ``{"head": ["vertical_and_slash", V, S, score]}``.
        threshold: prompts of up to this many tokens, cached ones included, stay dense.
        last_q: query rows that vote, at most 64.

    Returns:
        What undoes the change.

    Raises:
        FileNotFoundError: no such file.
        ValueError: budgets that do not fit the model, a threshold or number of voting rows out of range, or sparse
            prefill enabled already.
    """
    modules = _attention_modules(model)
    if isinstance(budgets, str | Path):
        budgets = parse_json(Path(budgets))
    num_heads = _num_heads(modules[0])
    sparse = SparseConfig.from_budgets(
        budgets, num_layers=len(modules), num_heads=num_heads, threshold=threshold, last_q=last_q
    )
    return _enable_sparse("enable_vertical_slash", model, sparse)


def enable_block_groups(model: nn.Module, *, coverage: float = 0.95, threshold: int = 32768) -> Enabled:
    """Prefill with block groups (:mod:`qwen_sparse.model.coverage`) where a prompt is longer than ``threshold``.

    Each head and block of 64 rows attends the groups of 16 keys that are estimated to matter to it; no budgets needed.

    Args:
        model: a transformers decoder.
        coverage: share of attention to keep, in (0, 1).
        threshold: prompts of up to this many tokens, cached ones included, stay dense.

    Returns:
        What undoes the change.

    Raises:
        ValueError: a coverage or threshold out of range, or sparse prefill enabled already.
    """
    return _enable_sparse("enable_block_groups", model, SparseConfig(coverage=coverage, threshold=threshold))


def _enable_sparse(name: str, model: nn.Module, sparse: SparseConfig) -> Enabled:
    modules = _attention_modules(model)
    for module in modules:
        enabled = _settings(module).sparse
        if enabled is not None:
            kind = "vertical-slash attention" if enabled.coverage is None else "block groups"
            raise ValueError(f"{name}: this model has {kind} already; remove() what enabled it first")
    undo = [_use(model)]
    for module in modules:
        undo.append(_set(module, sparse=sparse.of_layer(module.layer_idx)))
    return Enabled(undo)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor:
    """What transformers calls once per forward pass instead of making a mask of all pairs.

    Raises:
        NotImplementedError: packed sequences, overlays, or padding that leaves more than one run of keys.
    """
    if use_vmap or not (allow_is_causal_skip or q_length == 1):
        raise NotImplementedError(
            "attn_implementation 'qwen_sparse' takes causal, bidirectional and sliding-window attention with padding; "
            "this model asked for another mask (packed sequences, blocks, or a function of its own)"
        )
    end = int(q_offset) + q_length - kv_offset
    runs: tuple[tuple[int, int], ...] = ()
    if attention_mask is not None and not bool(attention_mask.all()):
        shown = attention_mask[:, kv_offset : kv_offset + end].cpu()
        runs = tuple(_run(row, end, number) for number, row in enumerate(shown))
    mask = torch.empty(0).as_subclass(_Mask)
    mask.bounds = _Bounds(runs, end)
    return mask


def _run(row: Tensor, end: int, number: int) -> tuple[int, int]:
    keys = row.nonzero().flatten()
    if keys.numel() == 0:
        return end, end
    first, behind = int(keys[0]), int(keys[-1]) + 1
    if behind - first != keys.numel():
        raise NotImplementedError(
            "attn_implementation 'qwen_sparse' takes padding before or behind a sequence; the attention_mask of "
            f"sequence {number} shows {keys.numel()} of the keys {first} to {behind - 1}"
        )
    return first, behind


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: dense, or what ``enable_`` functions set for the module.

    Args:
        module: the attention module.
        query: ``[batch, num_heads, n, head_dim]``.
        key, value: ``[batch, num_kv_heads, keys, head_dim]``; the last rows of ``query`` meet the last keys.
        attention_mask: what :func:`attention_mask` made, or None for none.
        scaling: softmax scale; head_dim^-1/2 when None.
        sliding_window: row p attends keys after p - sliding_window.
        is_causal: whether rows attend later keys; the module's ``is_causal`` when None.

    Returns:
        ``[batch, n, num_heads, head_dim]``, and None for the weights. Rows of padding are zero.

    Raises:
        NotImplementedError: something that the kernels do not compute.
    """
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation 'qwen_sparse' has no {meaning} ({name})")
    if dropout:
        raise NotImplementedError(f"attn_implementation 'qwen_sparse' has no dropout, got {dropout}")
    if torch.compiler.is_compiling():
        raise NotImplementedError("attn_implementation 'qwen_sparse' does not go through torch.compile")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise NotImplementedError(
            "attn_implementation 'qwen_sparse' has no gradients, and queries, keys or values require them: run the "
            "model under torch.no_grad() or torch.inference_mode(), or train with another attention "
            "(model.set_attn_implementation('sdpa'))"
        )
    if attention_mask is not None and not isinstance(attention_mask, _Mask):
        raise NotImplementedError(
            "attn_implementation 'qwen_sparse' takes two-dimensional attention masks (padding) only, "
            f"got shape {list(attention_mask.shape)}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    settings = _settings(module)
    rows = query.shape[2]
    bounds = _Bounds((), key.shape[2]) if attention_mask is None else attention_mask.bounds
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for number in range(query.shape[0]):
        first, behind = bounds.runs[number] if bounds.runs else (0, bounds.end)
        before = bounds.end - rows  # keys before the first row
        begin, stop = max(first - before, 0), behind - before
        if stop <= begin:
            continue
        q = query[number, :, begin:stop].transpose(0, 1)
        k, v = (x[number, :, first:behind].transpose(0, 1) for x in (key, value))
        if settings.positions is not None and module.layer_idx == 0:  # they are the same in every layer
            _check_positions(settings.positions.ids, number, begin, stop, before + begin - first)
        out[number, begin:stop] = _attend(settings, q, k, v, scaling, causal, sliding_window)
    return out, None


def _attend(
    settings: _Settings, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
) -> Tensor:
    """One sequence, ``[n, num_heads, head_dim]``."""
    seqlen, dual_chunk, sparse = k.shape[0], settings.dual_chunk, settings.sparse
    dense = dense_rows(q.shape[0], seqlen, seqlen)
    if sparse is not None and (seqlen <= sparse.threshold or dense == q.shape[0]):
        sparse = None
    if (sparse is not None or dual_chunk is not None) and (not causal or window is not None):
        raise NotImplementedError(
            "Dual Chunk Attention and sparse attention are causal and without a sliding window, "
            f"got is_causal = {causal}, sliding_window = {window}"
        )
    if dual_chunk is not None:
        scale *= rope.dual_chunk_temperature(seqlen, dual_chunk.original_max_position_embeddings) ** 2
        if seqlen <= dual_chunk.chunk_len:
            dual_chunk = None  # plain RoPE, which it equals
    if dual_chunk is None and sparse is None:
        return cast(Tensor, ops.attention(q, k, v, softmax_scale=scale, causal=causal, window=window))
    queries = Queries(q) if dual_chunk is None else _rotations(settings, dual_chunk, sparse, q, seqlen)
    return attend(queries, k, v, scale, sparse, dense)


def _rotations(
    settings: _Settings, dual_chunk: DualChunkConfig, sparse: SparseConfig | None, q: Tensor, seqlen: int
) -> Queries:
    """All rotations of queries that come in their intra-chunk rotation; those that are not clamped are for budgets."""
    q_succ, q_inter = _further(settings, q, seqlen, clamp=True), _further(settings, q, seqlen)
    if sparse is None or sparse.coverage is not None:
        return Queries(q, q_succ, q_inter, dual_chunk.chunk_len)
    last = q[-sparse.last_q :]
    critical = (
        _rotate(settings, last, torch.full((last.shape[0],), distance))
        for distance in (dual_chunk.chunk_len, dual_chunk.chunk_size)
    )
    return Queries(q, q_succ, q_inter, dual_chunk.chunk_len, *critical)


def _further(settings: _Settings, q: Tensor, seqlen: int, *, clamp: bool = False) -> Tensor:
    """Queries in their intra-chunk rotation to the one for the chunk before (``clamp``) or for those before that."""
    dual_chunk = settings.dual_chunk
    assert dual_chunk is not None
    position = torch.arange(seqlen - q.shape[0], seqlen) % dual_chunk.chunk_len
    if clamp:
        target = (position + dual_chunk.chunk_len).clamp(max=dual_chunk.chunk_size)
    else:
        target = torch.full_like(position, min(2 * dual_chunk.chunk_len - 1, dual_chunk.chunk_size))
    return _rotate(settings, q, target - position)


def _rotate(settings: _Settings, q: Tensor, distances: Tensor) -> Tensor:
    assert settings.inv_freq is not None
    inv_freq = settings.inv_freq.to(q.device)
    return ops.rotary(q, q[:, :1], distances.to(q.device), inv_freq)[0]


def _check_positions(position_ids: Tensor, number: int, begin: int, stop: int, expected: int) -> None:
    """Rows ``begin`` to ``stop`` stand where the kernels take them to stand: chunks begin at a sequence's first key."""
    got = position_ids[number if position_ids.shape[0] > 1 else 0, begin:stop]
    wanted = torch.arange(expected, expected + stop - begin, device=got.device)
    if not torch.equal(got.long(), wanted):
        row = int((got != wanted).nonzero()[0])
        raise NotImplementedError(
            "Dual Chunk Attention needs position_ids that count from a sequence's first token (generate makes them), "
            f"got {int(got[row])} instead of {int(wanted[row])} in sequence {number}"
        )


def _settings(module: nn.Module) -> _Settings:
    return cast(_Settings, getattr(module, _SETTINGS, _Settings()))


def _set(module: nn.Module, **changes: Any) -> Callable[[], object]:
    """Changes some settings; the result makes those the defaults again and leaves others, whatever came in between."""
    setattr(module, _SETTINGS, replace(_settings(module), **changes))
    defaults = {name: getattr(_Settings(), name) for name in changes}
    return lambda: setattr(module, _SETTINGS, replace(_settings(module), **defaults))


def _use(model: nn.Module) -> Callable[[], object]:
    """Makes the model use our attention; the result restores what it had, once nothing is enabled any more."""
    target = cast(Any, model)
    if not hasattr(target, _PREVIOUS):
        setattr(target, _PREVIOUS, target.config._attn_implementation)
    target.set_attn_implementation(NAME)

    def restore() -> None:
        settings = [_settings(module) for module in _attention_modules(model)]
        if all(each.dual_chunk is None and each.sparse is None for each in settings):
            target.set_attn_implementation(getattr(target, _PREVIOUS))
            delattr(target, _PREVIOUS)

    return restore


def _attention_modules(model: nn.Module) -> list[Any]:
    """The model's attention modules, by layer."""

    def found() -> Iterator[Any]:
        for module in model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups"):
                yield module

    modules = sorted(found(), key=lambda module: module.layer_idx)
    if not modules or [module.layer_idx for module in modules] != list(range(len(modules))):
        raise ValueError(
            f"{type(model).__name__} must have one attention module of grouped heads per layer, "
            f"got layers {[module.layer_idx for module in modules]}"
        )
    return modules


def _num_heads(module: Any) -> int:
    return int(module.config.num_attention_heads)


def _rotary_embedding(model: nn.Module) -> nn.Module:
    embeddings = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "rotary_emb" and hasattr(module, "inv_freq")
    ]
    if len(embeddings) != 1:
        raise ValueError(
            f"enable_dual_chunk: {type(model).__name__} must have one rotary_emb, got {len(embeddings)}: this model "
            "turns positions in another way"
        )
    embedding: Any = embeddings[0]
    kind = getattr(embedding, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"enable_dual_chunk: frequencies must not depend on the length, got a rotary embedding of type {kind!r}"
        )
    module = _attention_modules(model)[0]
    if 2 * embedding.inv_freq.shape[-1] != module.head_dim:
        raise ValueError(
            f"enable_dual_chunk: all channels must be rotated (head_dim = {module.head_dim}), "
            f"got {2 * embedding.inv_freq.shape[-1]}"
        )
    return cast(nn.Module, embedding)


register()
