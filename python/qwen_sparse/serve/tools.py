"""Tool calls in a model's text, as Qwen's templates ask for them: ``{"name": ..., "arguments": {...}}`` between
``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

__all__ = ["ToolCallText", "ToolParser"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCallText:
    """A call as the model wrote it."""

    name: str
    arguments: str
    """A JSON object, as text."""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolParser:
    """Splits a text that comes in pieces into content and calls.

    What could become a tag is held back until it cannot, so that no part of one is shown; a call is given out once it
    is whole. What stands between the tags and is no call stays content, tags included. White space around calls is not.

    Qwen2.5-Coder writes a call without tags, as all of its answer. A text that is nothing but a call of an offered
    tool, in a code block or not, is one; text that begins as such is held back until it goes on as something else.

    Args:
        names: of the offered tools.
        parallel: whether there may be several calls; if not, those behind the first are dropped.
    """

    def __init__(self, names: Collection[str] = (), *, parallel: bool = True) -> None:
        self._names, self._parallel = frozenset(names), parallel
        self._held = ""
        self._bare = bool(self._names)  # whether all of the text so far may be the beginning of a call without tags
        self._begun = False  # whether it surely begins as one
        self._searched = 0  # characters of what is held in which no closing tag begins
        self._inside = False
        self.calls = 0
        """Calls so far."""

    def push(self, text: str) -> list[str | ToolCallText]:
        """What the text so far shows that it did not before: pieces of content, and calls, in order."""
        self._held += text
        found: list[str | ToolCallText] = []
        if self._bare and not self._begun:
            self._bare, self._begun = _may_become_bare(self._held)
        if self._bare:
            return found
        while True:
            tag = _CLOSE if self._inside else _OPEN
            at = self._held.find(tag, self._searched)
            if at < 0:
                self._searched = max(self._searched, len(self._held) - len(tag) + 1)
                break
            before = self._held[:at]
            if self._inside and _ends_in_a_string(before):  # an argument that spells the tag
                self._searched = at + len(tag)
                continue
            self._held, self._searched = self._held[at + len(tag) :], 0
            self._add(found, before, closed=True)
            self._inside = not self._inside
        if not self._inside:
            cut = len(self._held) - self._held_back()
            self._add_content(found, self._held[:cut])
            self._held, self._searched = self._held[cut:], 0
        return found

    def flush(self) -> list[str | ToolCallText]:
        """What is still held back, at the end of the text: a call that only lacks its closing tag is one."""
        found: list[str | ToolCallText] = []
        if self._bare and (call := _bare_call(self._held)) is not None and call.name in self._names:
            self.calls += 1
            found.append(call)
        else:
            self._add(found, self._held, closed=False)
        self._held, self._inside = "", False
        return found

    def _add(self, found: list[str | ToolCallText], text: str, *, closed: bool) -> None:
        if not self._inside:
            # White space in front of a call is part of the call's layout, and behind the text's end there is none.
            self._add_content(found, text.rstrip() if closed else text)
            return
        call = _call(text)
        if call is None:
            self._add_content(found, f"{_OPEN}{text}{_CLOSE if closed else ''}")
        elif self._parallel or self.calls == 0:
            self.calls += 1
            found.append(call)

    def _add_content(self, found: list[str | ToolCallText], text: str) -> None:
        if self.calls and not text.strip():
            return
        if text:
            found.append(text)

    def _held_back(self) -> int:
        """How many characters at the end wait: a tag's beginning, and white space in front of one."""
        tag = next((n for n in range(len(_OPEN) - 1, 0, -1) if self._held.endswith(_OPEN[:n])), 0)
        rest = self._held[: len(self._held) - tag]
        return tag + len(rest) - len(rest.rstrip())


_FENCES = ("```json\n", "```\n", "")
_BEGINNING = '{"name":'


def _may_become_bare(text: str) -> tuple[bool, bool]:
    """Whether a text can go on to be a call without tags, and whether it begins as one."""
    text = text.lstrip()
    for fence in _FENCES:
        if text.startswith(fence):
            body = "".join(text.removeprefix(fence).split())
            if body.startswith(_BEGINNING):
                return True, True
            if _BEGINNING.startswith(body):
                return True, False
        elif fence.startswith(text):
            return True, False
    return False, False


def _ends_in_a_string(text: str) -> bool:
    """Whether JSON that begins so is within a string."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


def _bare_call(text: str) -> ToolCallText | None:
    text = text.strip()
    for fence in _FENCES:
        if fence and text.startswith(fence) and text.endswith("```"):
            text = text[len(fence) : -3]
    return _call(text)


def _call(text: str) -> ToolCallText | None:
    """The call between two tags; None: it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:  # Python reads numbers that are none and halves of characters, and other readers of JSON do not
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (value["name"] + written).encode()
    except ValueError:
        return None
    return ToolCallText(value["name"], written)
