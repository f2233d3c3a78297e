"""GGUF files (llama.cpp's): config, tokenizer and tensors of one, through the package ``gguf``.

Its matrices are dequantised to float32 one at a time. Qwen's are stored in the order of the released checkpoints: no
rows of query and key projections are permuted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GgufFile", "GgufTensor", "is_gguf"]

_ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that are added to the vocabulary; GGUF pads it with the latter
_END_OF_TEXT = "<|endoftext|>"
_SPLIT = (  # of Qwen2's tokenizer.json; GGUF names it ("qwen2") and does not hold it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_gguf(path: Path) -> bool:
    """Whether the path is a file of that name."""
    return path.suffix == ".gguf" and path.is_file()


@dataclass(frozen=True)
class GgufTensor:
    """As :class:`qwen_sparse.model.formats.LogicalTensor`: a stored tensor, or one expert's part of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As GGUF names it: ``Q4_K``."""
    stored: Any = field(repr=False)
    expert: int | None = None
    is_number: bool = True

    def read(self, _: Callable[[str], Tensor] | None = None) -> Tensor:
        """Its values, float32."""
        from gguf.quants import dequantize

        data = self.stored.data if self.expert is None else self.stored.data[self.expert]
        values = np.asarray(dequantize(data, self.stored.tensor_type), dtype=np.float32)
        return torch.from_numpy(values.reshape(self.shape).copy())


class GgufFile:
    """What a GGUF file says of its model.

    Args:
        path: the file.
        reader: its ``gguf.GGUFReader``, where there is one already.

    Raises:
        ValueError: gguf is not installed, the file is damaged, or of an architecture that is not Qwen's.
    """

    def __init__(self, path: Path, reader: Any = None) -> None:
        self.path = path
        self._reader = self._read(path) if reader is None else reader
        self.architecture = str(self["general.architecture"])
        if self.architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{path.name} must be a GGUF file of one of {', '.join(_ARCHITECTURES)}, got {self.architecture!r}"
            )
        if "split.count" in self._reader.fields and (pieces := int(self["split.count"])) > 1:
            raise ValueError(f"{path.name} is one of {pieces} pieces: merge them first (llama-gguf-split --merge)")
        self.num_layers = int(self._of_model("block_count"))

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ValueError(f"{path} is a GGUF file, which needs the package gguf: pip install gguf") from error
        try:
            return GGUFReader(path)
        except (ValueError, LookupError, OverflowError) as error:
            raise ValueError(f"{path} is not a whole GGUF file: {error}") from error

    def __getitem__(self, key: str) -> Any:
        if key not in self._reader.fields:
            raise ValueError(f"{self.path.name}: the GGUF file has no {key!r}")
        return self._reader.fields[key].contents()

    def _of_model(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own; ``default`` for one that is not there, unless that is None."""
        key = f"{self.architecture}.{key}"
        return default if default is not None and key not in self._reader.fields else self[key]

    def stored(self) -> dict[str, Any]:
        """The reader's tensors by their names in a released checkpoint; those of all experts of a layer are one, whose
        name has ``*`` for the expert.

        Raises:
            ValueError: a name that Qwen's models have not.
        """
        return {hf_name(tensor.name): tensor for tensor in self._reader.tensors}

    def tensors(self) -> dict[str, GgufTensor]:
        """The tensors of the model by name."""
        result = {}
        for name, stored in self.stored().items():
            shape, dtype = tuple(int(size) for size in reversed(stored.shape)), stored.tensor_type.name
            if "*" in name:
                for expert in range(shape[0]):
                    one = GgufTensor(self.path, shape[1:], dtype, stored, expert)
                    result[name.replace("*", str(expert))] = one
            else:
                shape = (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape
                result[name] = GgufTensor(self.path, shape, dtype, stored)
        return result

    def config(self) -> dict[str, Any]:
        """As config.json has it.

        Raises:
            ValueError: a key that is missing.
        """
        tensors = self.stored()
        heads, width = int(self._of_model("attention.head_count")), int(self._of_model("embedding_length"))
        name, kind = _ARCHITECTURES[self.architecture]
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{self.path.name}: the GGUF file has no 'token_embd.weight'")
        end, tokens = int(self["tokenizer.ggml.eos_token_id"]), self["tokenizer.ggml.tokens"]
        ends = [end] + [tokens.index(_END_OF_TEXT)] * (_END_OF_TEXT in tokens)
        config = {
            "architectures": [name],
            "model_type": kind,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "hidden_size": width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._of_model("attention.head_count_kv")),
            "head_dim": int(self._of_model("attention.key_length", width // heads)),
            "intermediate_size": int(self._of_model("feed_forward_length")),
            "max_position_embeddings": int(self._of_model("context_length")),
            "rms_norm_eps": float(f"{self._of_model('attention.layer_norm_rms_epsilon'):.6g}"),  # from float32
            "rope_theta": float(self._of_model("rope.freq_base")),
            "vocab_size": int(embedding.shape[-1]),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "eos_token_id": list(dict.fromkeys(ends)),
            "use_sliding_window": False,
        }
        if f"{self.architecture}.rope.scaling.type" in self._reader.fields:
            config["rope_scaling"] = {
                "type": str(self._of_model("rope.scaling.type")),
                "factor": float(self._of_model("rope.scaling.factor")),
                "original_max_position_embeddings": int(self._of_model("rope.scaling.original_context_length")),
            }
        if kind.endswith("moe"):
            config |= {
                "num_experts": int(self._of_model("expert_count")),
                "num_experts_per_tok": int(self._of_model("expert_used_count")),
                "moe_intermediate_size": int(self._of_model("expert_feed_forward_length")),
                "norm_topk_prob": kind == "qwen3_moe",
            }
        if kind == "qwen2_moe":
            config["shared_expert_intermediate_size"] = int(self._of_model("expert_shared_feed_forward_length"))
        return config

    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json: byte-level BPE.

        Raises:
            ValueError: a tokenizer of another kind.
        """
        if (kind := self["tokenizer.ggml.model"]) != "gpt2":
            raise ValueError(f"{self.path.name}: tokenizer.ggml.model must be 'gpt2' (byte-level BPE), got {kind!r}")
        tokens, kinds = self["tokenizer.ggml.tokens"], self["tokenizer.ggml.token_type"]
        added = [
            {"id": number, "content": token, "special": kind == _CONTROL}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED) and not token.startswith("[PAD")
        ]
        first = min((entry["id"] for entry in added), default=len(tokens))
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: number for number, token in enumerate(tokens[:first])},
                "merges": [merge.split(" ", 1) for merge in self["tokenizer.ggml.merges"]],
            },
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """As tokenizer_config.json has it: the chat template, if there is one, and special tokens."""
        tokens, config = self["tokenizer.ggml.tokens"], {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
        config["eos_token"] = tokens[int(self["tokenizer.ggml.eos_token_id"])]
        if _END_OF_TEXT in tokens:
            config["pad_token"] = _END_OF_TEXT
        if "tokenizer.chat_template" in self._reader.fields:
            config["chat_template"] = self["tokenizer.chat_template"]
        return config


def hf_name(name: str) -> str:
    """A tensor's name in a released checkpoint.

    Raises:
        ValueError: a name that Qwen's models have not.
    """
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    stem, _, kind = rest.rpartition(".")
    if name.startswith("blk.") and block.isdecimal() and kind in ("weight", "bias"):
        if stem in _LAYER_NAMES:
            return f"model.layers.{block}.{_LAYER_NAMES[stem]}.{kind}"
        if stem in _EXPERT_NAMES and kind == "weight":
            return f"model.layers.{block}.mlp.experts.*.{_EXPERT_NAMES[stem]}.weight"
    raise ValueError(f"the GGUF file must have Qwen's tensors, got {name!r}")
