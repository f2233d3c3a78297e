"""Loading checkpoints: a Hugging Face directory (or hub id) to :class:`~qwen_sparse.model.decoder.Decoder`.

Weights are allocated once in their final, fused form and every tensor is copied straight into its place, so
the peak is the weights plus one tensor. Headers are compared with the config before anything is allocated.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import _C
from .checkpoint import FLOAT_DTYPES, StoredTensor, stored_tensors, weight_files
from .config import ModelConfig, parse_dtype
from .decoder import AttentionMode, Decoder, DecoderWeights, LayerWeights, check_coverage
from .formats import LogicalTensor, logical_tensors
from .gguf import GgufFile, GgufTensor, is_gguf
from .mlp import ExpertWeights, Mlp
from .quantized import QUANTIZATIONS, Int8Matrix, Matrix, split_rows

__all__ = ["load_config", "load_model", "resolve_device", "resolve_directory"]

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
_NAMES_SHOWN = 20


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    kv_cache_dtype: str = "auto",
    max_seq_len: int | None = None,
    attention: AttentionMode = "auto",
    coverage: float | None = None,
    config: str | Path | None = None,
    quantization: str | None = None,
) -> Decoder:
    """Load a checkpoint of Qwen2, Qwen2.5, Qwen3 or one of their mixtures of experts
    (:data:`qwen_sparse.model.architectures.ARCHITECTURES`).

    Args:
        path: directory with config.json and safetensors (one file, or shards with their index); a GGUF file (needs the
            package gguf); or a hub id ("Qwen/Qwen2.5-7B-Instruct-1M"; needs the package huggingface_hub). Matrices
            that are stored in fewer bits (:class:`qwen_sparse.model.formats.WeightFormat`, GGUF) become numbers of
            ``dtype``, or what ``quantization`` makes of them.
        device: "cpu", "cuda" or "cuda:N" (compute capability 8.0 or newer, 16-bit dtypes); "auto" is the current
            CUDA device if there is one, this build has CUDA kernels and the dtype is not float32; else the CPU.
        dtype: "auto" (the checkpoint's: of config.json, or of the embedding where it has none), "bfloat16", "float16"
            or "float32".
        kv_cache_dtype: "auto" (the model's dtype), "bfloat16" or "int8".
        max_seq_len: most tokens of a sequence, also beyond what the model is made for. None: that, i.e. no limit but
            memory for models with Dual Chunk Attention, and for others max_position_embeddings or, if that is more,
            YaRN's factor times the original length (:attr:`qwen_sparse.model.config.ModelConfig.longest`).
        attention: "auto" prefills sparsely iff the checkpoint has budgets, they are enabled and the prompt is
            longer than their threshold; "dense" never; "sparse" always. "auto" needs budgets (or a coverage) where
            config.json says ``sparse_attention_enabled: true``, "sparse" always does. Rows that are read are dense in
            any case: a prompt's last block, and up to 512 on top of a cache.
        coverage: share of attention over all rows, in (0, 1), that sparse prefill is to keep by block groups, chosen
            per head and 64 rows (:mod:`qwen_sparse.model.coverage`); the checkpoint needs no budgets then, and its own
            are not used. None: vertical-slash attention by budgets.
        config: a file to read instead of config.json: one beside it by its name (``"config_1m.json"`` of
            Qwen3-2507), or any by its path.
        quantization: None, or "int8": the matrices of layers and output in 8 bits with a scale per row, quantised as
            they are read; on a CPU. Embedding, norms, biases and routers keep the dtype.

    Raises:
        FileNotFoundError: there is no such directory, config or weight file.
        ValueError: an unsupported model or argument, or tensors that are missing, unexpected or mis-shaped
            or no floating-point numbers (all are named in one error).

    Example:
        >>> model = load_model("Qwen/Qwen2.5-7B-Instruct-1M", kv_cache_dtype="int8")
        >>> result = prefill(model, model.tokenizer.encode("Hello"))
    """
    directory = resolve_directory(path)
    settings = ModelConfig.from_directory(directory, config=config)
    check_coverage(attention, coverage)
    if coverage is not None:
        settings = settings.with_coverage(coverage)
    resolved_dtype = settings.dtype if dtype == "auto" else parse_dtype(dtype)
    resolved_device = resolve_device(device, resolved_dtype)
    check_quantization(quantization, resolved_device)
    if settings.experts is not None and resolved_device.type == "cuda" and resolved_dtype != torch.bfloat16:
        raise ValueError(f"dtype must be 'bfloat16' for a mixture of experts on a GPU, got {str(dtype)!r}")
    model = Decoder(  # no weights yet: every argument is checked before they are read
        config=settings,
        weights=empty_weights(settings, resolved_dtype, torch.device("meta"), quantization),
        dtype=resolved_dtype,
        device=resolved_device,
        kv_cache_dtype=kv_cache_dtype,
        max_seq_len=settings.longest if max_seq_len is None else max_seq_len,
        attention=attention,
        path=directory,
        quantization=quantization,
    )
    return replace(model, weights=_load_weights(directory, settings, resolved_dtype, resolved_device, quantization))


def check_quantization(quantization: str | None, device: torch.device) -> None:
    """Raises:
    ValueError: it is none of :data:`~qwen_sparse.model.quantized.QUANTIZATIONS`, or not for that device.
    """
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be None or one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if device.type != "cpu":
        raise ValueError(f"quantization must be None on a GPU, got {quantization!r} on {device}")


def load_config(path: str | Path, *, config: str | Path | None = None) -> ModelConfig:
    """The config alone, from a directory (weights may be absent) or a hub id; ``config`` as of :func:`load_model`.

    Raises:
        FileNotFoundError: there is no such directory or no config.json.
        ValueError: an unsupported model.
    """
    return ModelConfig.from_directory(resolve_directory(path, files=("*.json",)), config=config)


def resolve_directory(path: str | Path, *, files: tuple[str, ...] = _HUB_FILES) -> Path:
    """A local directory or GGUF file as it is; a hub id is downloaded (or found in the hub's cache) with ``files``.

    Raises:
        FileNotFoundError: neither a directory nor something that looks like a hub id, or the hub does not
            have it.
        ValueError: a hub id, but huggingface_hub is not installed.
    """
    if Path(path).is_dir() or is_gguf(Path(path)):
        return Path(path)
    if Path(path).is_file():
        raise FileNotFoundError(
            f"a model is a directory with config.json and safetensors, or a .gguf file, and {path} is another file"
        )
    if not isinstance(path, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise FileNotFoundError(f"no model directory at {path} (and it is not a hub id of the form 'owner/name')")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"no model directory at {path}; to load it as a hub id, install huggingface_hub "
            "(pip install huggingface_hub), or download the files and pass their directory"
        ) from error
    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no model directory at {path}, and the hub did not give it: {reason}") from error


def resolve_device(device: str | torch.device, dtype: torch.dtype, *, must_exist: bool = True) -> torch.device:
    """The device that :func:`load_model` takes for its argument ``device``, for weights of ``dtype``.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the weights.
        must_exist: whether this machine and this build must have the device; for plans they need not.

    Raises:
        ValueError: another name, no such device, one that is too old, or float32 on a GPU.
    """
    built = bool(_C.build_info()["cuda_archs"])
    if device == "auto":
        device = "cuda" if built and dtype != torch.float32 and torch.cuda.is_available() else "cpu"
    name = str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    resolved = _existing_gpu(name, built) if must_exist else torch.device(name)
    if dtype == torch.float32:
        raise ValueError("dtype must be 'bfloat16' or 'float16' on a GPU, got 'float32'")
    return resolved


def _existing_gpu(name: str, built: bool) -> torch.device:
    if not built:
        raise ValueError(f"device must be 'auto' or 'cpu': this build has no CUDA kernels, got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device must be 'auto' or 'cpu': torch finds no CUDA device, got {name!r}")
    index = torch.device(name).index
    resolved = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    if resolved.index >= torch.cuda.device_count():
        raise ValueError(f"device must be one of {torch.cuda.device_count()} CUDA devices, got {name!r}")
    capability = torch.cuda.get_device_capability(resolved)
    if capability < (8, 0):
        raise ValueError(f"device must have compute capability 8.0 or newer, got {name!r} of {capability}")
    return resolved


def empty_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> DecoderWeights:
    """Weights of a config's shapes on a device, not initialised."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def matrix(*shape: int) -> Matrix:
        return empty(*shape) if quantization is None else Int8Matrix.empty(*shape, dtype=dtype, device=device)

    def mlp(layer: int) -> Mlp | ExpertWeights:
        experts = config.experts
        if experts is None or not experts.of_layer(layer):
            return Mlp(matrix(2 * intermediate, hidden), matrix(hidden, intermediate))
        count, size, shared = experts.num_experts, experts.intermediate_size, experts.shared_size
        return ExpertWeights(
            router=empty(count, hidden),
            gate_up=matrix(count, 2 * size, hidden),
            down=matrix(count, hidden, size),
            top_k=experts.experts_per_token,
            normalise=experts.normalise,
            shared=None if shared is None else Mlp(matrix(2 * shared, hidden), matrix(hidden, shared)),
            shared_gate=None if shared is None else empty(1, hidden),
        )

    layers = [
        LayerWeights(
            input_norm=empty(hidden),
            qkv=matrix(q_size + 2 * kv_size, hidden),
            qkv_bias=empty(q_size + 2 * kv_size) if config.attention_bias else None,
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            o=matrix(hidden, q_size),
            o_bias=empty(hidden) if config.output_bias else None,
            post_attention_norm=empty(hidden),
            mlp=mlp(layer),
        )
        for layer in range(config.num_layers)
    ]
    embedding = empty(config.vocab_size, hidden)
    tied = config.tie_word_embeddings and quantization is None
    lm_head = embedding if tied else matrix(config.vocab_size, hidden)
    return DecoderWeights(embedding=embedding, layers=layers, norm=empty(hidden), lm_head=lm_head)


def _targets(config: ModelConfig, weights: DecoderWeights) -> Iterator[tuple[str, Matrix]]:
    """Checkpoint names with the places (views of fused weights) that they are copied to."""
    yield "model.embed_tokens.weight", weights.embedding
    yield "model.norm.weight", weights.norm
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.lm_head
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.input_layernorm.weight", layer.input_norm
        yield f"{prefix}.post_attention_layernorm.weight", layer.post_attention_norm
        for name, part in zip("qkv", split_rows(layer.qkv, [q_size, kv_size, kv_size]), strict=True):
            yield f"{prefix}.self_attn.{name}_proj.weight", part
        if layer.qkv_bias is not None:
            for name, part in zip("qkv", torch.split(layer.qkv_bias, [q_size, kv_size, kv_size]), strict=True):
                yield f"{prefix}.self_attn.{name}_proj.bias", part
        for name, norm in (("q", layer.q_norm), ("k", layer.k_norm)):
            if norm is not None:
                yield f"{prefix}.self_attn.{name}_norm.weight", norm
        yield f"{prefix}.self_attn.o_proj.weight", layer.o
        if layer.o_bias is not None:
            yield f"{prefix}.self_attn.o_proj.bias", layer.o_bias
        if isinstance(layer.mlp, Mlp):
            yield from _mlp_targets(f"{prefix}.mlp", layer.mlp.gate_up, layer.mlp.down)
            continue
        yield f"{prefix}.mlp.gate.weight", layer.mlp.router
        for expert in range(layer.mlp.router.shape[0]):
            yield from _mlp_targets(f"{prefix}.mlp.experts.{expert}", layer.mlp.gate_up[expert], layer.mlp.down[expert])
        if layer.mlp.shared is not None and layer.mlp.shared_gate is not None:
            yield from _mlp_targets(f"{prefix}.mlp.shared_expert", layer.mlp.shared.gate_up, layer.mlp.shared.down)
            yield f"{prefix}.mlp.shared_expert_gate.weight", layer.mlp.shared_gate


def _mlp_targets(prefix: str, gate_up: Matrix, down: Matrix) -> Iterator[tuple[str, Matrix]]:
    gate, up = split_rows(gate_up, [down.shape[1]] * 2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", down


def _may_ignore(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints repeat though they follow: a tied lm_head, rotary frequencies."""
    return (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith(".rotary_emb.inv_freq")


def _check_tensors(
    stored: Mapping[str, LogicalTensor | GgufTensor], targets: dict[str, Matrix], config: ModelConfig
) -> None:
    missing = [name for name in targets if name not in stored]
    extra = [name for name in stored if name not in targets and not _may_ignore(name, config)]
    mis_shaped = [
        f"{name} {list(stored[name].shape)}, not {list(target.shape)}"
        for name, target in targets.items()
        if name in stored and stored[name].is_number and stored[name].shape != tuple(target.shape)
    ]
    no_floats = [f"{name} {stored[name].dtype}" for name in targets if name in stored and not stored[name].is_number]
    problems = [
        f"{kind} {len(names)}: {', '.join(sorted(names)[:_NAMES_SHOWN])}"
        + (f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
        for kind, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("mis-shaped", mis_shaped),
            (f"in none of {', '.join(FLOAT_DTYPES)} (quantised?)", no_floats),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint's tensors do not fit its config; {'; '.join(problems)}")


class _Files:
    """Tensors of safetensors files, of which one is open at a time."""

    def __init__(self, headers: dict[str, StoredTensor]) -> None:
        self._headers = headers
        self._open: tuple[Path, Any] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """A stored tensor."""
        file = self._headers[name].file
        if self._open is None or self._open[0] != file:
            self._stack.close()
            self._open = file, self._stack.enter_context(safe_open(file, framework="pt"))
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor


@torch.no_grad()
def _load_weights(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> DecoderWeights:
    headers = {} if is_gguf(path) else stored_tensors(weight_files(path))
    stored = GgufFile(path).tensors() if is_gguf(path) else logical_tensors(headers, config.weight_format)
    _check_tensors(stored, dict(_targets(config, empty_weights(config, dtype, torch.device("meta")))), config)
    weights = empty_weights(config, dtype, device, quantization)
    targets = dict(_targets(config, weights))
    with _Files(headers) as files:
        for name in sorted(targets, key=lambda name: str(stored[name].file)):
            targets[name].copy_(stored[name].read(files.read))  # one tensor at a time, cast on the way
    if config.tie_word_embeddings and weights.lm_head is not weights.embedding:
        weights.lm_head.copy_(weights.embedding)
    return weights
