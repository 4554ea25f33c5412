"""The free list of the key-value cache's pages."""

from __future__ import annotations


class Pages:
    """A free list. pages: their number, for all sequences together; page: tokens in one."""

    def __init__(self, pages: int, page: int):
        self.total, self.page = pages, page
        self._free = list(range(pages))[::-1]

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that `tokens` tokens need."""
        return -(-tokens // self.page)

    def take(self, count: int) -> list[int]:
        """`count` free pages. Raises ValueError if there are fewer; check `free` first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
