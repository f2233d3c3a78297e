"""Open inference for million-token Qwen prompts: Dual Chunk Attention and vertical-slash sparse attention.

>>> import qwen_sparse
>>> model = qwen_sparse.load_model("Qwen/Qwen2.5-7B-Instruct-1M", kv_cache_dtype="int8")
>>> tokens = model.tokenizer.encode("The grass is green. " * 1000)
>>> result = qwen_sparse.prefill(model, tokens, progress=True)
>>> list(qwen_sparse.generate(model, [42], cache=result.cache, max_new_tokens=8))
"""

from __future__ import annotations

from importlib.metadata import version as _version

try:
    import torch as _torch
except ImportError as _error:
    raise ImportError(f"qwen_sparse needs torch >= 2.10, and torch cannot be imported: {_error}") from _error

if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(f"qwen_sparse needs torch >= 2.10, got torch {_torch.__version__}")

try:
    from . import _C
except ImportError as _error:
    raise ImportError(
        f"the extension module qwen_sparse._C cannot be imported ({_error}); build it with "
        f"'pip install --no-build-isolation .' against the torch in use, {_torch.__version__}"
    ) from _error

from .engine.generate import generate, generate_text, truncate_prompt
from .engine.memory import estimate_memory
from .engine.prefill import PrefillResult, prefill
from .kernels import ops, reference
from .model.kv_cache import PagedKVCache
from .model.loader import load_model
from .model.tokenizer import Tokenizer

__all__ = [
    "PagedKVCache",
    "PrefillResult",
    "Tokenizer",
    "__version__",
    "build_info",
    "cpu_features",
    "estimate_memory",
    "generate",
    "generate_text",
    "load_model",
    "ops",
    "prefill",
    "reference",
    "truncate_prompt",
]

__version__ = _version("qwen-sparse")
build_info = _C.build_info
cpu_features = _C.cpu_features
