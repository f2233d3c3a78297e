"""Which pages of a pool are in use, and which are kept for a prefix that may come again.

A full page is known by a digest of its tokens and of all before them. Whoever asks for a prefix with these digests
gets the pages that hold it, as often as wanted: full pages are never written again. Pages that nobody uses any more
stay until others are needed, the least recently used first.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from ..model.config import PAGE_SIZE

__all__ = ["PageAllocator", "page_digests"]


def page_digests(tokens: array[int], salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """A digest of every full page of a sequence: equal where the page's tokens and all before it are.

    Args:
        tokens: int64.
        salt: what else keys and values depend on.
        known: digests of the first pages, from an earlier call.
    """
    digests, data = list(known), memoryview(tokens)
    for page in range(len(digests), len(tokens) // PAGE_SIZE):
        before = digests[-1] if digests else salt
        digests.append(hashlib.sha256(before + data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes()).digest())
    return digests


class PageAllocator:
    """Hands out the pages ``0 .. num_pages - 1``. Not for use by several threads.

    Args:
        num_pages: how many there are.
        caching: whether to keep pages that were registered for whoever asks for their prefix again.
    """

    def __init__(self, num_pages: int, *, caching: bool = True) -> None:
        self.num_pages = num_pages
        self._caching = caching
        self._users = [0] * num_pages
        self._digests: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody's, but registered; the next to go first
        self._empty: list[int] = []  # a heap: handed out before, and worth nothing now
        self._untouched = 0  # from this page on, none was ever handed out

    @property
    def available(self) -> int:
        """Pages that can be handed out."""
        return len(self._idle) + len(self._empty) + self.untouched

    @property
    def used(self) -> int:
        """Pages that someone uses."""
        return self.num_pages - self.available

    @property
    def untouched(self) -> int:
        """Pages that were never handed out: an operating system may not have given memory for them yet."""
        return self.num_pages - self._untouched

    def take_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, for one more user."""
        pages: list[int] = []
        for digest in digests:
            page = self._pages.get(digest)
            if page is None:
                break
            self._use(page)
            pages.append(page)
        return pages

    def take(self, count: int, *, untouched: int | None = None) -> list[int] | None:
        """``count`` pages for one user, to be written; None, and nothing taken, where there are too few.

        Args:
            count: how many.
            untouched: how many of them may be ones that were never handed out; None for any number.
        """
        fresh = min(self.untouched, self.untouched if untouched is None else max(untouched, 0))
        if count > len(self._idle) + len(self._empty) + fresh:
            return None
        pages = []
        for _ in range(count):
            if self._empty:
                page = heapq.heappop(self._empty)
            elif fresh:
                page, fresh = self._untouched, fresh - 1
                self._untouched += 1
            else:
                page, _ = self._idle.popitem(last=False)
                del self._pages[self._digests.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Say what a page holds, once it is full. Of several with the same content, the first is kept for others."""
        if self._caching and digest not in self._pages and page not in self._digests:
            self._pages[digest] = page
            self._digests[page] = digest

    def give_back(self, pages: Sequence[int]) -> None:
        """End a user's use of its pages, in the order of its sequence: of one prefix, the end goes first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] > 0:
                continue
            if page in self._digests:
                self._idle[page] = None
            else:
                heapq.heappush(self._empty, page)

    def _use(self, page: int) -> None:
        if self._users[page] == 0:
            del self._idle[page]
        self._users[page] += 1
