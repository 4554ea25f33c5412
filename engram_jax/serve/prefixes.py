"""Beginnings that prompts have in common: computed once, their pages shared, the same to the bit.

A prompt is computed in chunks from its first token on. A unit is the fewest chunks that fill whole
pages. Whenever a sequence has computed another unit of its prompt, what the model needs behind it
is remembered under the tokens up to there: the unit's pages, which nobody writes again; the last
inputs of the Engram layers' convolutions, in a row of an array on the device; the last canonical
ids, to which n-grams reach back. A sequence whose prompt goes on with the same tokens takes them
instead of computing: the same chunks were computed by the same programs. At least the last token of
a prompt is always computed, for its logits. Generated tokens are not remembered: they are computed
one at a time, which may round differently.

Of sequences that would compute the same unit, one does, and the others take it: n answers to one
prompt compute it once.

Units are kept after their last holder has ended, until their pages are needed: those that were held
longest ago go first. Who holds a unit holds all before it, and lets go of the last one first; so
the first to go has none behind it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engram_jax.serve.pages import Pages


@dataclass(eq=False)
class Prefix:
    """A prompt up to the end of one unit; the unit is behind `parent`, None of the beginning.

    tokens: the unit's, as bytes. pages: those it lies in. history: the canonical ids behind it.
    row: of the array with the convolutions' inputs. salt: as of the sequences that share it.
    holders: those that use it now. behind: the units that go on, by their tokens.
    """

    parent: Prefix | None = None
    tokens: bytes = b""
    pages: list[int] = field(default_factory=list)
    history: Any = None
    row: int = -1
    salt: Hashable = None
    holders: int = 0
    behind: dict[bytes, Prefix] = field(default_factory=dict)


class Sharing(Protocol):
    """What a sequence tells of itself.

    shares: how many tokens of its prompt, from the first on, may be in units that it takes or
      gives; 0 = none. salt: it shares with those that have the same.
    computed: tokens in its pages. shared: the units it holds, from the beginning on.
    """

    prompt: np.ndarray
    history: np.ndarray
    pages: list[int]
    computed: int
    shares: int
    salt: Hashable
    shared: list[Prefix]


class Prefixes:
    """The units that are remembered.

    chunk: tokens of a prompt that are computed at a time; 0 = nothing is shared.
    """

    def __init__(self, pages: Pages, chunk: int = 0):
        self._pages = pages
        self.unit = math.lcm(chunk, pages.page)
        self.unit_pages = self.unit // pages.page
        units = pages.total // self.unit_pages if self.unit else 0  # at most, at a time
        self._rows = list(range(units))[::-1]
        self._roots: dict[Hashable, Prefix] = {}
        self._idle: OrderedDict[Prefix, None] = OrderedDict()  # without holders; next to go first
        self._count = 0
        self.hits = self.hit_tokens = 0

    @property
    def idle_pages(self) -> int:
        """Pages of units that nobody holds: free as soon as they are needed."""
        return len(self._idle) * self.unit_pages

    def stats(self) -> dict[str, float]:
        return {
            "prefix_hits": self.hits,
            "prefix_hit_tokens": self.hit_tokens,
            "prefix_pages": self._count * self.unit_pages,
        }

    # Taking

    def extend(self, s: Sharing) -> list[int]:
        """Hold the remembered units that go on where the sequence is, at the end of one; returns
        the pages of its own that they replace. Call `begin` for a sequence that goes on there."""
        before = len(s.shared)
        while (found := self._next(s)) is not None:
            found.holders += 1
            self._idle.pop(found, None)
            s.shared.append(found)
            s.computed = len(s.shared) * self.unit
        start, end = before * self.unit_pages, len(s.shared) * self.unit_pages
        own = s.pages[start:end]
        s.pages[start:end] = [page for unit in s.shared[before:] for page in unit.pages]
        return own

    def begin(self, s: Sharing, before: int) -> None:
        """The sequence goes on behind its last unit; it had `before` of them."""
        s.history = s.shared[-1].history.copy()
        self.hits += before == 0
        self.hit_tokens += (len(s.shared) - before) * self.unit

    def _next(self, s: Sharing) -> Prefix | None:
        tokens = self._tokens(s, len(s.prompt) - 1)
        if s.computed != len(s.shared) * self.unit or tokens is None:
            return None
        before = s.shared[-1] if s.shared else self._roots.get(s.salt)
        return None if before is None else before.behind.get(tokens)

    def _tokens(self, s: Sharing, limit: int) -> bytes | None:
        """The tokens of the unit that the sequence is at or in, if it ends within the limit."""
        start = len(s.shared) * self.unit
        if not self.unit or start + self.unit > min(limit, s.shares):
            return None
        return np.asarray(s.prompt[start : start + self.unit], np.int32).tobytes()

    def not_waiting(self, sequences: list[Any]) -> list[Any]:
        """Those, in their order, that do not wait for another to compute their next unit. Of
        several at one unit the one that has begun it goes on, else the first."""
        first: dict[tuple[Any, ...], Any] = {}
        for s in sorted(sequences, key=lambda s: s.computed % (self.unit or 1) == 0):  # stable
            if (tokens := self._tokens(s, len(s.prompt))) is not None:
                first.setdefault(self._place(s, tokens), s)

        def waits(s: Any) -> bool:
            tokens = self._tokens(s, len(s.prompt) - 1)
            at_end = s.computed == len(s.shared) * self.unit
            return tokens is not None and at_end and first[self._place(s, tokens)] is not s

        return [s for s in sequences if not waits(s)]

    def _place(self, s: Sharing, tokens: bytes) -> tuple[Any, ...]:
        return (id(s.shared[-1]) if s.shared else None, s.salt, tokens)

    # Giving

    def add(self, s: Sharing) -> Prefix | None:
        """Remember the unit that the sequence has just computed, and let it hold it; None if it has
        not just computed one, or it is remembered already."""
        tokens = self._tokens(s, len(s.prompt))
        if tokens is None or s.computed != (len(s.shared) + 1) * self.unit:
            return None
        before = s.shared[-1] if s.shared else self._roots.setdefault(s.salt, Prefix())
        if tokens in before.behind:
            return None
        start = len(s.shared) * self.unit_pages
        made = Prefix(before, tokens, s.pages[start : start + self.unit_pages], s.history.copy())
        made.row, made.salt, made.holders = self._rows.pop(), s.salt, 1
        before.behind[tokens] = made
        s.shared.append(made)
        self._count += 1
        return made

    def release(self, units: list[Prefix]) -> None:
        """A sequence holds them no longer."""
        for unit in reversed(units):
            unit.holders -= 1
            if not unit.holders:
                self._idle[unit] = None

    def evict(self, pages: int) -> None:
        """Forget units without holders until so many pages more are free, or there are none."""
        wanted = self._pages.free + pages
        while self._pages.free < wanted and self._idle:
            unit, _ = self._idle.popitem(last=False)
            assert unit.parent is not None and not unit.behind
            del unit.parent.behind[unit.tokens]
            self._pages.give(unit.pages)
            self._rows.append(unit.row)
            self._count -= 1
            if unit.parent.parent is None and not unit.parent.behind:
                del self._roots[unit.salt]
