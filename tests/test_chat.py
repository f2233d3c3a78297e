"""qwen-sparse chat: what a question costs, what is left after Ctrl-C, documents, and the terminal."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pexpect
import pypdf
import pytest
import torch

from conftest import DUAL_CHUNK, WriteCheckpoint
from qwen_sparse import demo, generate, load_model, passkey
from qwen_sparse import prefill as prefill_function
from qwen_sparse.chat import ChatSession, Turn, _show
from qwen_sparse.cli import main
from qwen_sparse.documents import Document, read_document
from qwen_sparse.model.decoder import Decoder
from qwen_sparse.model.tokenizer import StreamDecoder, Tokenizer

MODEL = str(files("qwen_sparse") / "assets" / "passkey")
QUESTION = "What is the pass key? The pass key is "
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLED = {"temperature": 1.5, "seed": 1}  # sees smaller differences than the most likely token does
PENALISED = {"repetition_penalty": 1.5, "temperature": 0.8, "top_p": 0.9, "seed": 3}


def passkey_document(length: int = 4000, seed: int = 5) -> tuple[Document, str]:
    """A text that hides a number, and the number."""
    prompt = passkey.make_prompt(length, 0.4, seed=seed)
    return Document(f"notes{seed}.txt", prompt.text.removesuffix(passkey.question())), prompt.key


@pytest.fixture(scope="module")
def passkey_model() -> Decoder:
    return demo.load_passkey_model(device="cpu")


@pytest.fixture
def model(write_checkpoint: WriteCheckpoint) -> Decoder:
    """Random weights: answers are bytes that are mostly no UTF-8, so that their text is other tokens.

    Chunks are shorter than the prompts. The trained length is not: beyond it the temperature of Dual Chunk Attention
    grows with the prompt, and what an earlier, shorter prompt left in the cache is not quite that of a cold run.
    """
    dual_chunk = {**DUAL_CHUNK, "original_max_position_embeddings": 4096}
    directory = write_checkpoint(tokenizer=True, dual_chunk_attention_config=dual_chunk)
    (directory / "chat_template.jinja").write_text(CHATML)
    return load_model(directory, attention="dense")


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every prefill."""
    lengths: list[int] = []

    def spy(model: Decoder, input_ids: torch.Tensor, **options: Any) -> Any:
        lengths.append(len(input_ids))
        return prefill_function(model, input_ids, **options)

    monkeypatch.setattr(sys.modules["qwen_sparse.engine.generate"], "prefill", spy)
    return lengths


def ignore(piece: str) -> None:
    pass


def prompt_of(model: Decoder, turns: tuple[Turn, ...], system: str | None = None) -> list[int]:
    """The prompt of the last turn, written down independently."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.content}, {"role": "assistant", "content": turn.answer}]
    return model.tokenizer.encode(model.tokenizer.apply_chat_template(messages[:-1]))


def assert_as_cold(model: Decoder, session: ChatSession, system: str | None = None, **options: Any) -> None:
    """The last answer is that of a model that has seen nothing before."""
    turns = tuple(session.turns)
    assert turns[-1].tokens == list(generate(model, prompt_of(model, turns, system), **options))


@pytest.mark.parametrize("attention", ["dense", "auto"])
def test_a_second_question_costs_only_itself(passkey_model: Decoder, prefilled: list[int], attention: str) -> None:
    model = passkey_model.with_options(attention=attention)
    document, key = passkey_document()
    session = ChatSession(model)
    prompt = f"# {document.name}\n\n{document.text}\n\n{QUESTION}"
    assert session.add_documents(document) == len(prompt) - len(QUESTION) + 1
    pieces: list[str] = []
    first = session.ask(QUESTION, pieces.append)
    assert first.answer == "".join(pieces) == key
    assert (first.cached_tokens, first.new_tokens, first.documents) == (0, len(prompt), 1)
    assert first.finished
    assert not first.cut
    second = session.ask(QUESTION, ignore)
    assert second.answer == key
    assert (second.cached_tokens, second.new_tokens) == (len(prompt) + len(key) - 1, 1 + len("\n") + len(QUESTION))
    assert prefilled == [first.new_tokens, second.new_tokens]
    assert list(session.turns) == [first, second]
    if attention == "dense":
        assert_as_cold(model, session)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("sampling", [SAMPLED, PENALISED], ids=["sampled", "penalised"])
def test_every_answer_is_that_of_a_cold_run(model: Decoder, kv_cache_dtype: str, sampling: dict[str, Any]) -> None:
    model = model.with_options(kv_cache_dtype=kv_cache_dtype)
    options = {"max_new_tokens": 12, **sampling}
    session = ChatSession(model, system="Be brief.", **options)
    session.add_documents(Document("a.txt", "The sky is blue. " * 40))
    for number, question in enumerate(["Why?", "Grüße\nzurück", "And then?"]):
        turn = session.ask(question, ignore)
        assert (turn.cached_tokens > 600) == (number > 0)
        assert turn.cut
        assert len(turn.tokens) == 12
        assert_as_cold(model, session, "Be brief.", **options)


def test_a_document_is_not_encoded_again(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(model, max_new_tokens=4)
    session.add_documents(Document("a.txt", "The sky is blue. " * 40))
    session.ask("Why?", ignore)
    encoded: list[str] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text))
    turn = session.ask("How?", ignore)
    assert turn.new_tokens < 60
    assert "<|im_start|>user\nHow?" in encoded
    assert sum(len(text) for text in encoded) < 80
    monkeypatch.undo()
    assert_as_cold(model, session, max_new_tokens=4)


def test_stop_strings_end_an_answer(passkey_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    document, key = passkey_document()
    decoded: list[int] = []
    push = StreamDecoder.push
    monkeypatch.setattr(StreamDecoder, "push", lambda self, token: decoded.append(token) or push(self, token))
    session = ChatSession(passkey_model, stop=[key[2:4]])
    session.add_documents(document)
    turn = session.ask(QUESTION, ignore)
    assert turn.answer == key[:2]
    assert bytes(turn.tokens).decode() == key[:4]
    assert decoded == turn.tokens  # once, and none behind the stop string
    assert session.ask(QUESTION, ignore).cached_tokens == turn.cached_tokens + turn.new_tokens + len(turn.answer)


def test_a_document_in_mid_conversation_leaves_the_cache(passkey_model: Decoder) -> None:
    (first, _), (second, _) = passkey_document(seed=1), passkey_document(seed=2)
    session = ChatSession(passkey_model.with_options(attention="dense"))
    session.add_documents(first)
    before = session.ask(QUESTION, ignore)
    session.add_documents(second)
    turn = session.ask(QUESTION, ignore)
    assert turn.documents == 1
    assert turn.content == f"# notes2.txt\n\n{second.text}\n\n{QUESTION}"
    assert turn.cached_tokens == before.new_tokens + len(before.tokens) - 1
    session.reset()
    assert session.turns == ()
    assert session.documents == (first, second)
    turn = session.ask(QUESTION, ignore)
    assert turn.content == f"# notes1.txt\n\n{first.text}\n\n# notes2.txt\n\n{second.text}\n\n{QUESTION}"
    assert turn.cached_tokens == before.new_tokens - len(QUESTION)  # the first document


class Interruption:
    """Raises KeyboardInterrupt at call ``at`` of a method of the model, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, at: int) -> None:
        original: Callable[..., Any] = getattr(Decoder, method)
        calls = iter(range(1000))

        def interrupted(model: Decoder, *args: Any, **options: Any) -> Any:
            result = original(model, *args, **options)
            if next(calls) == at:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(Decoder, method, interrupted)


@pytest.mark.parametrize(
    ("method", "at", "tokens"),
    [("forward", 0, 0), ("forward", 2, 0), ("decode_step", 2, 3), ("decode_step", 7, 8)],
    ids=["first_chunk", "third_chunk", "third_step", "eighth_step"],
)
def test_an_interrupted_session_goes_on(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, method: str, at: int, tokens: int
) -> None:
    options = {"max_new_tokens": 20, "chunk_tokens": 128, **SAMPLED}
    session = ChatSession(model, **options)
    session.add_documents(Document("a.txt", "The sky is blue. " * 40))
    Interruption(monkeypatch, method, at)
    with pytest.raises(KeyboardInterrupt):
        session.ask("Why?", ignore)
    kept = list(session.turns)
    if tokens:  # a partial answer stays
        assert len(kept) == 1
        assert not kept[0].finished
        assert len(kept[0].tokens) == tokens
    else:
        assert kept == []
    turn = session.ask("How?", ignore)
    assert len(session.turns) == len(kept) + 1
    assert turn.documents == (0 if tokens else 1)
    assert turn.cached_tokens >= (680 if tokens else 128 * (at + 1))  # whole chunks of the prefill
    assert_as_cold(model, session, **options)


@pytest.mark.parametrize("at", [0, 3])
def test_interrupted_while_the_answer_is_shown(passkey_model: Decoder, at: int) -> None:
    model = passkey_model.with_options(attention="dense")
    document, key = passkey_document()
    session = ChatSession(model)
    session.add_documents(document)
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION, show)
    assert [turn.answer for turn in session.turns] == [key[: at + 1]]
    assert session.ask(QUESTION, ignore).answer == key
    assert_as_cold(model, session)


def test_refused_questions_and_documents_are_taken_back(
    passkey_model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, key = passkey_document()
    session = ChatSession(replace(passkey_model, max_seq_len=5000), max_new_tokens=20)
    session.add_documents(document)
    session.ask(QUESTION, ignore)
    with pytest.raises(ValueError, match=r"at most max_seq_len = 5000 tokens, got .* 1 new = "):
        session.ask("x" * 1000, ignore)
    with pytest.raises(ValueError, match="at most max_seq_len = 5000 tokens"):
        session.add_documents(Document("long.txt", "x" * 1000))
    assert session.documents == (document,)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["qwen_sparse.engine.prefill"], "available_memory", lambda device: 1000)
        with pytest.raises(MemoryError, match=r"1\.00 KB are available"):
            session.ask(QUESTION, ignore)
    assert len(session.turns) == 1
    turn = session.ask(QUESTION, ignore)
    assert turn.answer == key
    assert turn.new_tokens == 2 + len(QUESTION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be >= 0 and finite, got -1\.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
        ({"stop": [""]}, "stop must be non-empty strings"),
    ],
)
def test_bad_options_are_refused_at_the_start(passkey_model: Decoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatSession(passkey_model, **options)


# Documents.


def pdf(*pages: str) -> bytes:
    """A PDF file with a line of text on each page; an empty one where the line is."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for line in pages:
        content = f"BT /F1 12 Tf 20 100 Td ({line}) Tj ET" if line else ""
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 200] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {len(objects)} 0 R >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


def encrypted(content: bytes, user_password: str) -> bytes:
    writer, out = pypdf.PdfWriter(clone_from=io.BytesIO(content)), io.BytesIO()
    writer.encrypt(user_password, "owner", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "Grüße\n".encode(), "Grüße\n"),
        ("a.md", b"\xef\xbb\xbf# Title", "# Title"),
        ("a.txt", "Grüße\r\n🙂".encode("utf-16"), "Grüße\n🙂"),
        ("a.txt", b"\xfe\xff" + "Grüße".encode("utf-16-be"), "Grüße"),
        ("a.txt", b"one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("a.pdf", pdf("The pass key is 28884.", "", "Remember it."), "The pass key is 28884.\n\n\n\nRemember it."),
        ("no_suffix", pdf("The end."), "The end."),
        ("for_all.pdf", encrypted(pdf("Not to be printed."), ""), "Not to be printed."),
    ],
)
def test_documents(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    document = read_document(tmp_path / name)
    assert (document.name, document.text) == (name, text)


def test_pages_without_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("One.", "", "Three.", ""))
    document = read_document(tmp_path / "a.pdf")
    assert document.blank_pages == (2, 4)
    assert document.warning() == "a.pdf: no text on pages 2, 4"
    assert Document("a", "text", (7,)).warning() == "a: no text on page 7"
    first = ", ".join(map(str, range(1, 21)))
    assert Document("a", "text", tuple(range(1, 31))).warning() == f"a: no text on pages {first} and 10 more"
    assert Document("a", "text").warning() is None


def test_pdf_files_that_are_mended_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Text.").replace(b"startxref\n", b"startxref\n7"))
    assert read_document(tmp_path / "a.pdf").text == "Text."
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a\.txt must be UTF-8 text, and is not UTF-8 at byte 3"),
        (
            "a.txt",
            "ab".encode("utf-16-le"),
            r"a\.txt must be text, and has a NUL character at 1: it is",
        ),
        ("a.txt", b"\xff\xfea\x00\x00", r"a\.txt must be UTF-16 text, and is not UTF-16 at byte 4"),
        ("a.txt", b" \n", r"a\.txt is empty"),
        ("a.pdf", pdf(""), r"a\.pdf holds no text: pages that are pictures"),
        ("a.pdf", encrypted(pdf("Secret."), "password"), r"a\.pdf is encrypted"),
        ("a.pdf", b"not at all", r"a\.pdf is not a readable PDF file: "),
        ("a.pdf", b"", r"a\.pdf is not a readable PDF file: "),
    ],
    ids=[
        "not_utf8",
        "utf16_without_mark",
        "half_a_character",
        "empty",
        "textless",
        "encrypted",
        "damaged",
        "empty_pdf",
    ],
)
def test_documents_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_document(tmp_path / name)


def test_pdf_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Text."))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(ValueError, match=r"needs pypdf: pip install pypdf"):
        read_document(tmp_path / "a.pdf")


# The command, with questions from a file.


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *options: str | Path
) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of standard error."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    arguments = ["chat", "--model", MODEL, "--dtype", "float32", "--device", "cpu", *map(str, options)]
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.split("\n")[:-1]  # a bar rewrites its line


def test_questions_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document, key = passkey_document()
    other = passkey.statement("28884", label="account number")
    (tmp_path / "notes.txt").write_text(document.text)
    (tmp_path / "my account.pdf").write_bytes(pdf(other.strip()))
    asked = "What is the account number? The account number is "
    lines = f"{QUESTION}\n\n{QUESTION}\n/file {tmp_path / 'my account.pdf'}\nAnd:\\\n{asked}"
    code, out, err = chat(capsys, monkeypatch, lines, "--file", tmp_path / "notes.txt", "--progress")
    assert (code, out) == (0, f"{key}\n{key}\n28884\n")
    first = len(f"# notes.txt\n\n{document.text}\n\n{QUESTION}")
    assert err[0] == f"notes.txt: the conversation has {first - len(QUESTION) + 1:,} tokens"
    assert "prefill: 100%" in err[1]
    stats = [line for line in err if " cached, " in line]
    assert stats[0].startswith(f"0 tokens cached, {first:,} new · first token after ")
    assert re.search(r" s · 5 tokens at [\d,.]+/s$", stats[0])
    assert stats[1].startswith(f"{first + 4:,} tokens cached, {2 + len(QUESTION)} new · ")
    pdf_question = f"\n# my account.pdf\n\n{other.strip()}\n\nAnd:\n{asked}"
    assert stats[2].startswith(f"{first + 2 * 5 + len(QUESTION):,} tokens cached, {1 + len(pdf_question)} new · ")
    assert len([line for line in err if "prefill:" in line]) == 1  # short ones have no bar


def test_refused_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    document, key = passkey_document(1000)
    (tmp_path / "notes.txt").write_text(document.text)
    lines = ["/nothing", "/file", f"/file {tmp_path / 'absent'}", "x" * 1000, QUESTION, "/reset now", "/exit", "after"]
    options = ["--file", tmp_path / "notes.txt", "--max-seq-len", "1200", "--max-new-tokens", "9"]
    code, out, err = chat(capsys, monkeypatch, "\n".join(lines), *options)
    assert (code, out) == (2, f"{key}\n")
    assert err[1] == "no command '/nothing'; /help lists the commands"
    assert err[2] == "no command '/file'; /help lists the commands"
    assert "absent" in err[3]
    assert "at most max_seq_len = 1200 tokens" in err[4]
    assert "0 tokens cached" in err[5]
    assert err[6:] == ["no command '/reset now'; /help lists the commands"]


def test_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"The pass key is 10029. Remember it.\\\n{QUESTION}\n/reset\n/help\n /exit is a question\n"
    code, out, err = chat(capsys, monkeypatch, lines, "--max-new-tokens", "5", "--system", "Be brief.")
    assert code == 0
    assert out.startswith("10029\n")
    assert "cut at --max-new-tokens" in err[0]
    assert err[1] == "a new conversation; documents: 0"
    for command in ("/file PATH", "/reset", "/help", "/exit", "Ctrl-C"):
        assert any(line.startswith(command) for line in err)
    assert err[-1].startswith("10 tokens cached, ")  # the system message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--file", "absent.txt"], "absent.txt"),
        (["--temperature", "-1"], "temperature must be >= 0 and finite, got -1.0"),
        (["--file", __file__, "--max-seq-len", "1000"], "at most max_seq_len = 1000 tokens"),
    ],
)
def test_errors_at_the_start_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    code, out, err = chat(capsys, monkeypatch, "Hi\n", *options)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("qwen-sparse chat: ")
    assert message in err[0]


def test_a_model_without_chat_template(
    write_checkpoint: WriteCheckpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = chat(capsys, monkeypatch, "Hi\n", "--model", write_checkpoint(tokenizer=True))
    assert (code, out, len(err)) == (2, "", 1)
    assert "this tokenizer has no chat template" in err[0]


def test_an_interrupt_ends_a_session_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Interruption(monkeypatch, "forward", 0)
    assert chat(capsys, monkeypatch, "Hi\nHi\n") == (130, "", ["", "interrupted"])


# The command in a terminal.


def test_a_terminal_gets_no_escape_sequences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Grüße\n\tand \x1b[31mred\x9b0m\r\x07"
    _show(text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _show(text)
    assert capsys.readouterr().out == text + "Grüße\n\tand \ufffd[31mred\ufffd0m\ufffd\ufffd"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., pexpect.spawn]]:
    """``terminal(document, *options)`` starts a chat over a document in a pseudo-terminal and waits for its prompt."""
    children: list[pexpect.spawn] = []

    def start(document: Document, *options: str) -> pexpect.spawn:
        (tmp_path / "notes.txt").write_text(document.text)
        arguments = ["-m", "qwen_sparse.cli", "chat", "--model", MODEL, "--dtype", "float32", "--device", "cpu"]
        arguments += ["--threads", "2", "--file", str(tmp_path / "notes.txt"), *options]
        decoding = {"encoding": "utf-8", "codec_errors": "replace"}
        # Tests that a shell runs in the background inherit an ignored SIGINT, and so would the chat.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        child = pexpect.spawn(sys.executable, arguments, timeout=120, dimensions=(40, 200), preexec_fn=heed, **decoding)
        children.append(child)
        child.expect_exact("notes.txt: the conversation has ")
        child.expect_exact(">>> ")
        return child

    yield start
    for child in children:
        child.close(force=True)


def leave(child: pexpect.spawn) -> None:
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_ctrl_c_in_the_prefill(terminal: Callable[..., pexpect.spawn]) -> None:
    document, key = passkey_document(16_000)
    child = terminal(document, "--dense", "--chunk-tokens", "1024")
    child.sendline(QUESTION)
    child.expect(r"prefill:  +[1-9]\d?%")
    child.sendintr()
    child.expect_exact("stopped; the question is taken back")
    child.expect_exact(">>> ")
    child.sendline(QUESTION)
    child.expect_exact("prefill: 100%")
    child.expect_exact(f"{key}\r\n")
    child.expect(r"([\d,]+) tokens cached, ([\d,]+) new")
    cached, new = (int(number.replace(",", "")) for number in child.match.groups())
    assert cached >= 1024
    assert cached % 64 == 0
    assert cached + new == len(f"# notes.txt\n\n{document.text}\n\n{QUESTION}")
    child.expect_exact(">>> ")
    leave(child)


def test_ctrl_c_in_the_answer(terminal: Callable[..., pexpect.spawn]) -> None:
    document, key = passkey_document()
    child = terminal(document, "--max-new-tokens", "20000")
    child.sendline("def main():")
    child.expect(r"\dk/[^\r]*tok/s]\r\n")  # the end of the bar
    child.expect(r"\w{2}")
    child.sendintr()
    child.expect_exact("stopped; the answer so far stays")
    child.expect(r"0 tokens cached, [\d,]+ new")
    child.expect_exact(">>> ")
    child.sendintr()
    child.expect_exact("Ctrl-D or /exit leaves")
    child.expect_exact(">>> ")
    child.sendline(QUESTION)
    child.expect_exact(f"{key}\r\n")
    child.expect(r"([\d,]+) tokens cached, ")
    assert int(child.match[1].replace(",", "")) > len(document.text)
    child.expect_exact(">>> ")
    leave(child)


def test_what_is_no_text_is_refused(terminal: Callable[..., pexpect.spawn]) -> None:
    document, _ = passkey_document()
    child = terminal(document)
    os.write(child.child_fd, b"Gr\xfc\xdfe\r")
    child.expect("can't decode|lone surrogates")  # by the locale
    child.expect_exact(">>> ")
    leave(child)


def test_questions_of_several_lines(terminal: Callable[..., pexpect.spawn]) -> None:
    document, key = passkey_document()
    child = terminal(document)
    child.sendline("One.\\")
    child.expect_exact("... ")
    child.sendline(QUESTION)
    child.expect_exact(f"{key}\r\n")
    child.expect(r"0 tokens cached, ([\d,]+) new")
    asked = f"# notes.txt\n\n{document.text}\n\nOne.\n{QUESTION}"
    assert int(child.match[1].replace(",", "")) == len(asked)
    child.expect_exact(">>> ")
    child.sendline("/exit")
    child.expect(pexpect.EOF)


def test_a_paste_is_one_question(terminal: Callable[..., pexpect.spawn]) -> None:
    pytest.importorskip("readline")
    document, key = passkey_document()
    child = terminal(document)
    child.send(f"\x1b[200~One.\rTwo.\r{QUESTION}\x1b[201~\r")
    child.expect_exact(f"{key}\r\n")
    child.expect(r"0 tokens cached, ([\d,]+) new")
    asked = f"# notes.txt\n\n{document.text}\n\nOne.\nTwo.\n{QUESTION}"
    assert int(child.match[1].replace(",", "")) == len(asked)
    child.expect_exact(">>> ")
    leave(child)
