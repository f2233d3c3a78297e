"""What the plugin supports of vLLM; everything else is refused when a model is loaded, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from .. import _C
from ..model.config import HEAD_DIMS, SparseConfig, SparseSwitches, check_coverage

__all__ = [
    "ADDITIONAL",
    "INT8",
    "VLLM_VERSIONS",
    "check_engine",
    "check_layer",
    "check_rope_theta",
    "check_unused",
    "check_version",
    "sparse_config",
    "version_problem",
]

VLLM_VERSIONS = ((0, 32),)
"""Releases (major, minor) that ``make test-vllm`` runs on."""

INT8 = "int8_per_token_head"
"""vLLM's name of a KV cache in int8 with one scale per token and kv head."""

ADDITIONAL = "qwen_sparse"
"""Key of vLLM's ``additional_config`` (``--additional-config``) that options of the plugin are under."""

_OFF = "or turn the plugin off with QWEN_SPARSE_VLLM=0"


def version_problem() -> str | None:
    """Why this vLLM cannot be used; None if it can."""
    import vllm

    parts = vllm.__version__.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) in VLLM_VERSIONS:
        return None
    known = " or ".join(f"{major}.{minor}" for major, minor in VLLM_VERSIONS)
    return (
        f"qwen_sparse: Dual Chunk Attention is supported in vLLM {known}, and this is vLLM {vllm.__version__}; install "
        f"'vllm=={VLLM_VERSIONS[-1][0]}.{VLLM_VERSIONS[-1][1]}.*', {_OFF}"
    )


def check_version() -> None:
    """Refuse another vLLM.

    Raises:
        RuntimeError: the version is not one of :data:`VLLM_VERSIONS`.
    """
    problem = version_problem()
    if problem is not None:
        raise RuntimeError(problem)


def check_engine(config: Any) -> None:
    """Refuse options of a ``VllmConfig`` that the backend does not implement.

    Raises:
        ValueError: one of them is on; the message names it.
    """
    from vllm.platforms import current_platform

    if current_platform.is_rocm() or not (current_platform.is_cpu() or current_platform.is_cuda()):
        _refuse("device", "a CPU or an NVIDIA GPU", current_platform.device_name)
    on_gpu = current_platform.is_cuda()
    if on_gpu and not _C.build_info()["cuda"]:
        _refuse("device", "a build of qwen_sparse with CUDA (QWEN_SPARSE_CUDA=1 when it is installed)", "one without")
    if on_gpu and not current_platform.has_device_capability(80):
        _refuse("device", "compute capability 8.0 or later", current_platform.get_device_capability())
    dtype = config.model_config.dtype
    supported = (torch.bfloat16, torch.float16) if on_gpu else (torch.bfloat16, torch.float16, torch.float32)
    if dtype not in supported:
        _refuse("dtype", " or ".join(str(each).removeprefix("torch.") for each in supported), dtype)
    parameters = getattr(config.model_config.hf_text_config, "rope_parameters", None) or {}
    if parameters.get("rope_type", "default") != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("rope_parameters", "rope_type 'default' over whole heads", parameters)
    if getattr(config.model_config, "uses_mrope", False):
        _refuse("rope_parameters", "one position per token", "multimodal sections")
    parallel = config.parallel_config
    for name, value in {
        "speculative_config": config.speculative_config,
        "kv_transfer_config": config.kv_transfer_config,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo": getattr(parallel, "enable_dbo", False),
        "kv_sharing_fast_prefill": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
    }.items():
        if value:
            raise ValueError(
                f"qwen_sparse: {name} is not supported with Dual Chunk Attention; serve this model without it"
            )


def check_layer(
    *, head_size: int, group_size: int, kv_cache_dtype: str, dtype: torch.dtype, attn_type: str, **options: Any
) -> None:
    """Refuse an attention layer that the backend does not implement.

    Args:
        head_size: channels per head.
        group_size: query heads per kv head.
        kv_cache_dtype: vLLM's name.
        dtype: of the model.
        attn_type: vLLM's name.
        options: further options of vLLM's layer; each must be None.

    Raises:
        ValueError: the message names the option.
    """
    if head_size not in HEAD_DIMS:
        _refuse("head_size", " or ".join(map(str, HEAD_DIMS)), head_size)
    if group_size > 64:
        _refuse("num_heads / num_kv_heads", "at most 64", group_size)
    allowed = ["auto", INT8, str(dtype).removeprefix("torch.")]
    if kv_cache_dtype not in allowed:
        _refuse("kv_cache_dtype", " or ".join(map(repr, allowed)), repr(kv_cache_dtype))
    if attn_type != "decoder":
        _refuse("attn_type", "'decoder'", repr(attn_type))
    for name, value in options.items():
        if value is not None:
            _refuse(name, "None", value)


def check_rope_theta(parameters: Mapping[str, Any] | None) -> float:
    """``rope_theta`` of ``rope_parameters``.

    Raises:
        ValueError: there is none.
    """
    theta = (parameters or {}).get("rope_theta")
    if theta is None:
        _refuse("rope_parameters", "an object with rope_theta", parameters)
    return float(theta)


def sparse_config(
    additional: object, dual_chunk: Mapping[str, Any], *, num_layers: int, num_heads: int
) -> SparseConfig | None:
    """What sparse prefill attends: block groups by the coverage of ``additional_config``, or the model's budgets.

    Args:
        additional: vLLM's ``additional_config``; under :data:`ADDITIONAL` it may have ``{"coverage": 0.95}`` and beside
            that a ``threshold``, which comes before the model's ``sparse_attention_threshold``.
        dual_chunk: the model's ``dual_chunk_attention_config``.
        num_layers: of the whole model, which budgets are given for.
        num_heads: of the whole model.

    Returns:
        Of all layers and heads; None: dense.

    Raises:
        ValueError: unknown or missing keys or bad values, in either.
    """
    options = _options(additional)
    if options is None:
        return SparseConfig.from_dual_chunk(dual_chunk, num_layers=num_layers, num_heads=num_heads)
    where = f"qwen_sparse: additional_config[{ADDITIONAL!r}]"
    if not isinstance(options, Mapping):
        raise ValueError(f'{where} must be an object such as {{"coverage": 0.95}}, got {options!r}')
    unknown = sorted(map(str, set(options) - {"coverage", "threshold"}))
    if unknown:
        raise ValueError(f"{where}: unsupported keys {', '.join(unknown)}; known are coverage, threshold")
    if options.get("coverage") is None:
        raise ValueError(f"{where} must have a coverage, the share of attention to keep, got {dict(options)}")
    threshold = options.get("threshold")
    if threshold is None:
        threshold = SparseSwitches.from_dual_chunk(dual_chunk, budgets=False).threshold
    try:
        check_coverage(options["coverage"])
        return SparseConfig(coverage=options["coverage"], threshold=threshold)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_unused(config: Any) -> None:
    """Refuse options of the plugin for a model that it leaves alone.

    Raises:
        ValueError: ``additional_config`` has some, and the model no ``dual_chunk_attention_config``.
    """
    asked = _options(config.additional_config)
    text_config = getattr(config.model_config, "hf_text_config", None)
    if asked is not None and not getattr(text_config, "dual_chunk_attention_config", None):
        raise ValueError(
            f"qwen_sparse: additional_config[{ADDITIONAL!r}] is for models with a dual_chunk_attention_config, and "
            f"this one has none (--hf-overrides can give it one), got {asked!r}"
        )


def _options(additional: object) -> object:
    return additional.get(ADDITIONAL) if isinstance(additional, Mapping) else None


def _refuse(name: str, rule: str, value: object) -> NoReturn:
    raise ValueError(f"qwen_sparse: Dual Chunk Attention in vLLM: {name} must be {rule}, got {value}")
