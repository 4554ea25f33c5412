"""The scheduler: decides which sequences run, requests in turns, in bounded memory.

* Requests that wait take turns, a sequence each (serve/waiting.py): hundreds of sequences of one
  request do not keep another's from beginning. Prompts are computed in turns, too (`prefilling`).
* The sequence whose turn it is is admitted when a slot and pages for its whole prompt and one more
  token are free; nothing passes it. One that can never fit was refused when it was submitted.
* Beginnings of prompts that were computed before are not computed again (serve/prefixes.py); pages
  that only they need count as free.
* A running sequence takes a page whenever it has filled its last one. If none is free, the
  youngest running sequence is evicted (swapped out): its state goes to host memory, its pages and
  its slot become free. (Nothing is recomputed: a sequence that is swapped in has the same state to
  the last bit.) The oldest can always continue, because one sequence always fits.
* Evicted sequences are swapped in, oldest first, before anything new is admitted, when their pages
  and one more for every running sequence are free. So at most `slots` sequences have begun at any
  time, and host memory is bounded by their states.

"Oldest" is who was admitted first. engine.py carries this out (`Engine._evict`, `Engine._swap_in`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_jax.serve.pages import Pages
from engram_jax.serve.prefixes import Prefix, Prefixes
from engram_jax.serve.request import Finish, PromptLogprobs, QueueFullError, SamplingParams
from engram_jax.serve.waiting import Waiting, in_turns


@dataclass(eq=False)
class Sequence:
    """One unfinished sequence.

    computed: tokens in the cache. pending: its next token is being computed.
    history: its last N - 1 canonical ids (addressing/hash_tokens.py).
    saved: its state on the host, while it is evicted. text: its `TextStream`, or None. rules: its
    `LogitRules`, once it draws with some.
    request: what was submitted together with it shares this; None = it is a request of its own.
    age: the place in the order of admission; -1 = it waits.
    shares, salt, shared: the beginning of its prompt (serve/prefixes.py); shares: -1 = all of it.
    """

    number: int
    prompt: np.ndarray
    params: SamplingParams
    history: np.ndarray
    text: Any = None
    rules: Any = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    generated: list[int] = field(default_factory=list)
    pending: bool = False
    finish: Finish | None = None
    saved: Any = None
    prompt_logprobs: PromptLogprobs = field(default_factory=PromptLogprobs)
    request: Hashable = None
    age: int = -1
    shares: int = -1
    salt: Hashable = None
    shared: list[Prefix] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.shares < 0:
            self.shares = len(self.prompt)

    @property
    def group(self) -> Hashable:
        """What takes turns with others (serve/waiting.py)."""
        return (self.number,) if self.request is None else self.request

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.prompt)

    @property
    def begins_with(self) -> int:
        """Tokens it needs room for before it runs: its prompt and the first generated one."""
        return len(self.prompt) + min(1, self.params.max_tokens)

    @property
    def wants_token(self) -> bool:
        """Whether to compute another token, as far as is known before the pending one is read."""
        return len(self.generated) + self.pending < self.params.max_tokens


class Schedule:
    """The waiting, running and evicted (`evicted`) sequences.

    chunk: see `Prefixes`.
    """

    def __init__(self, slots: int, pages: Pages, queue: int, chunk: int = 0):
        self.pages, self.queue = pages, queue
        self.prefixes = Prefixes(pages, chunk)
        self._slots = list(range(slots))[::-1]
        self._ages = itertools.count()
        self.waiting: Waiting[Sequence] = Waiting(queue)
        self.running: list[Sequence] = []  # oldest first
        self.evicted: list[Sequence] = []  # oldest first
        self.evictions = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.evicted)

    def submit(self, sequence: Sequence) -> None:
        """Let it wait. Raises QueueFullError where its request may not have one more waiting."""
        if not self.waiting.has_room(sequence.group):
            waiting = len(self.waiting)
            raise QueueFullError(f"{waiting} sequences are waiting; try again later")
        self.waiting.add(sequence)

    @property
    def free(self) -> int:
        """Pages that no sequence needs."""
        return self.pages.free + self.prefixes.idle_pages

    def admit(self) -> list[Sequence]:
        """Start waiting sequences while there is room; returns those started."""
        begun = []
        while self.waiting and self._slots and not self.evicted:
            sequence = self.waiting.first
            self.prefixes.extend(sequence)
            needed = self.pages.needed(sequence.begins_with) - len(sequence.pages)
            if needed > self.free:
                self._give_pages(sequence)
                sequence.computed = 0
                break
            self.waiting.take()
            sequence.age = next(self._ages)
            self._place(sequence, needed)
            if sequence.shared:
                self.prefixes.begin(sequence, 0)
            begun.append(sequence)
        return begun

    def adopt(self) -> list[Sequence]:
        """Let running sequences take what others have computed of their prompts since; returns
        those that did: they go on behind the last of `shared`."""
        moved = []
        for sequence in self.running:
            before = len(sequence.shared)
            self.pages.give(self.prefixes.extend(sequence))
            if len(sequence.shared) > before:
                self.prefixes.begin(sequence, before)
                moved.append(sequence)
        return moved

    def readmit(self) -> list[Sequence]:
        """Give evicted sequences a place again; returns those whose states must be swapped in."""
        back = []
        while self.evicted and self._slots:
            sequence = self.evicted[0]
            room = sequence.begins_with if sequence.prefilling else sequence.computed + 1
            needed = self.pages.needed(room)
            if needed + len(self.running) > self.free:
                break
            self.evicted.pop(0)
            self._place(sequence, needed)
            back.append(sequence)
        return back

    def _place(self, sequence: Sequence, pages: int) -> None:
        sequence.slot = self._slots.pop()
        sequence.pages += self._take_pages(pages)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.age)

    def prefilling(self, most: int) -> list[Sequence]:
        """Those whose prompts are computed next, at most so many, requests in turns. What several
        would compute, one does."""
        turns = in_turns([s for s in self.running if s.prefilling])
        return self.prefixes.not_waiting(turns)[:most]

    def room_for_next(self) -> tuple[list[Sequence], list[Sequence]]:
        """(sequences whose next token can be computed, those that must be evicted for it).

        Both oldest first. The state of the latter must be saved before anything is computed; then
        call `vacate` on each of them.
        """
        ready = [s for s in self.running if not s.prefilling and s.wants_token]
        out: list[Sequence] = []
        free, going = self.free, list(self.running)
        for sequence in ready:
            if sequence in out or self.pages.needed(sequence.computed + 1) <= len(sequence.pages):
                continue
            while free == 0 and sequence in going:
                youngest = going.pop()
                before = self._only_of(out)
                out.append(youngest)
                free += self._only_of(out) - before
            if sequence in going:
                free -= 1
        return [s for s in ready if s not in out], out[::-1]

    def _only_of(self, sequences: list[Sequence]) -> int:
        """Pages that nobody else needs."""
        held = Counter(unit for s in sequences for unit in s.shared)
        only = sum(unit.holders == count for unit, count in held.items())
        size = self.prefixes.unit_pages
        return only * size + sum(len(s.pages) - len(s.shared) * size for s in sequences)

    def vacate(self, sequence: Sequence) -> None:
        """Evict a sequence: free its slot and pages; it waits to be swapped in again."""
        self.evictions += 1
        self._leave(sequence)
        sequence.shares = 0  # it comes back with pages of its own
        self.evicted.append(sequence)
        self.evicted.sort(key=lambda s: s.age)

    def grow(self, sequence: Sequence) -> bool:
        """Give it the page that its next token needs; True if it got a new one."""
        if self.pages.needed(sequence.computed + 1) <= len(sequence.pages):
            return False
        sequence.pages += self._take_pages(1)
        return True

    def end(self, sequence: Sequence) -> None:
        """Remove a finished sequence and free what it holds."""
        sequence.saved = None
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.evicted:
            self.evicted.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self._give_pages(sequence)

    def _take_pages(self, count: int) -> list[int]:
        self.prefixes.evict(count - self.pages.free)
        return self.pages.take(count)

    def _give_pages(self, s: Sequence) -> None:
        """The units it shares stay remembered."""
        self.pages.give(s.pages[len(s.shared) * self.prefixes.unit_pages :])
        self.prefixes.release(s.shared)
        s.pages, s.shared = [], []
