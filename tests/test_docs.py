"""The documentation: its Python blocks run, its links lead somewhere, and no file names a path of somebody's machine.

Blocks of one file run in order and share a namespace. ``<!-- not run: reason -->`` on the line before a block leaves
it out; that is for what cannot run here (a large checkpoint, a network), not for what is broken.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "third_party" / "README.md"]
METHODS = ["dual-chunk", "vertical-slash", "int8-kv-cache"]

FENCE = re.compile(r"^\s*(?P<ticks>`{3,}|~{3,})\s*(?P<language>[\w-]*)")
NOT_RUN = re.compile(r"^\s*<!--\s*not run:\s*(?P<reason>\S.*?)\s*-->\s*$")
LINK = re.compile(
    r"\[[^\]]*\]\(\s*<?(?P<inline>[^)\s>]+)|^\[[^\]]+\]:\s*(?P<reference>\S+)|\ssrc=\"(?P<source>[^\"]+)\"", re.M
)
EXTERNAL = re.compile(r"^[a-z][a-z0-9+.-]*:", re.I)
HEADING = re.compile(r"^#{1,6}\s+(?P<title>.*?)\s*#*$", re.M)
MACHINE_PATH = re.compile(r"(?:(?<![\w./~})])|(?<=-[IL]))/(?:work|root|home|Users)/")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, where the code starts (1-based line), and why it is not to be run."""

    language: str
    code: str
    line: int
    not_run: str | None


def split_blocks(text: str) -> tuple[str, list[Block]]:
    """The prose of a page (code replaced by empty lines) and its fenced blocks.

    Raises:
        ValueError: a fence that is never closed.
    """
    prose: list[str] = []
    blocks: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            prose.append(lines[number])
            number += 1
            continue
        marker = NOT_RUN.match(lines[number - 1]) if number else None
        start = number + 1
        end = start
        while end < len(lines) and lines[end].strip() != opening["ticks"]:
            end += 1
        if end == len(lines):
            raise ValueError(f"line {number + 1}: the fence is never closed")
        code = "\n".join(lines[start:end]) + "\n"
        blocks.append(Block(opening["language"], code, start + 1, marker["reason"] if marker else None))
        prose.extend([""] * (end + 1 - number))
        number = end + 1
    return "\n".join(prose), blocks


def run_blocks(page: Path) -> int:
    """Run the Python blocks of a page and return how many ran; tracebacks point at the lines of the page."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in split_blocks(page.read_text(encoding="utf-8"))[1]:
        if block.language == "python" and block.not_run is None:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
            ran += 1
    return ran


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page (without the numbers it adds to repeated ones)."""
    titles = [match["title"].lower() for match in HEADING.finditer(split_blocks(text)[0])]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def broken_links(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Links of a page to files or headings that do not exist, or that lie outside the repository."""
    prose, _ = split_blocks(page.read_text(encoding="utf-8"))
    for match in LINK.finditer(re.sub(r"`[^`]*`", "", prose)):
        link = match["inline"] or match["reference"] or match["source"]
        if EXTERNAL.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not leads_somewhere(target, anchor, root):
            yield link


def leads_somewhere(target: Path, anchor: str, root: Path) -> bool:
    if not target.is_relative_to(root) or not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in anchors(target.read_text(encoding="utf-8"))


def repository_files() -> list[Path]:
    """Tracked files and those that would be added: all that git does not ignore."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def machine_paths(content: bytes) -> list[str]:
    """Lines of a text that hold an absolute path of a machine, with their numbers; none for a binary file."""
    if b"\0" in content:
        return []
    lines = content.decode("utf-8", errors="replace").splitlines()
    return [f"{number}: {line[:120]}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty working directory, no network, and a random state that is put back."""

    def refuse(*_: object) -> NoReturn:
        raise OSError("a block of the documentation must not use the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page: Path, sealed: None) -> None:
    run_blocks(page)


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_runnable_examples(method: str) -> None:
    _, blocks = split_blocks((ROOT / "docs" / f"{method}.md").read_text(encoding="utf-8"))
    runnable = [block for block in blocks if block.language == "python" and block.not_run is None]
    assert any("assert" in block.code for block in runnable)


@pytest.mark.parametrize("page", LINKED_PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_no_machine_paths() -> None:
    found = {name_of(path): machine_paths(path.read_bytes()) for path in repository_files()}
    assert {name: lines for name, lines in found.items() if lines} == {}


# The checks themselves.

PAGE = """# A page

```python
x = 2
```

<!-- not run: needs a large model -->
```python
x = missing
```

```text
x = also not Python
```

## Second part: `code`, and more

```python
assert x == 2, x
y = x
```
"""


def test_blocks_share_a_namespace_and_are_left_out_by_a_comment(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert run_blocks(page) == 2
    prose, blocks = split_blocks(PAGE)
    assert [block.not_run for block in blocks] == [None, "needs a large model", None, None]
    assert "x =" not in prose
    assert len(prose.split("\n")) == len(PAGE.splitlines())


@pytest.mark.parametrize("code", ["assert x == 3", "x = missing", "x =", ">>> x"])
def test_a_failing_block_fails_at_its_line(tmp_path: Path, code: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```python\nx = 2\n{code}\n```\n")
    with pytest.raises((AssertionError, NameError, SyntaxError)) as raised:
        run_blocks(page)
    error = raised.value
    assert (error.lineno if isinstance(error, SyntaxError) else raised.traceback[-1].lineno + 1) == 5


def test_an_open_fence_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 3: the fence is never closed"):
        split_blocks("# A page\n\n```python\nx = 2\n")


def test_the_network_is_refused(sealed: None) -> None:
    with socket.socket() as connection, pytest.raises(OSError, match="must not use the network"):
        connection.connect(("127.0.0.1", 1))


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(PAGE)
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#second-part-code-and-more) [c](https://example.org/x) [d](#here) `[e](no.md)`\n"
        '![f](missing.png) [g](other.md#third) [h](../outside.md) [i][i] <img src="gone.svg">\n\n[i]: nowhere.md\n'
        "# Here\n```text\n[j](no.md)\n```\n"
    )
    broken = ["missing.png", "other.md#third", "../outside.md", "gone.svg", "nowhere.md"]
    assert list(broken_links(page, tmp_path)) == broken


@pytest.mark.parametrize("top", ["work", "root", "home", "Users"])
def test_machine_paths_are_found(top: str) -> None:
    path = f"/{top}/somebody/x"
    assert machine_paths(f"first\ncd {path}\n".encode()) == [f"2: cd {path}"]
    for harmful in (f'open("{path}")', f"PATH=/bin:{path}", f"-I{path}"):
        assert machine_paths(harmful.encode())
    for harmless in (f"https://example.org{path}", f"build{path}", f"../..{path}", f"$(pwd){path}", f"$HOME{path}"):
        assert machine_paths(harmless.encode()) == []
    assert machine_paths(b"\0" + path.encode()) == []
