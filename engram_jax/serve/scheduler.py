"""The scheduler: decides which sequences run, requests in turns, in bounded memory.

* Requests that wait take turns, a sequence each (serve/waiting.py): hundreds of sequences of one
  request do not keep another's from beginning. Prompts are computed in turns, too (`prefilling`).
* The sequence whose turn it is is admitted when a slot and pages for its whole prompt and one more
  token are free; nothing passes it. One that can never fit was refused when it was submitted.
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
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_jax.serve.pages import Pages
from engram_jax.serve.request import Finish, QueueFullError, SamplingParams
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
    prompt_logprobs: list[Any] = field(default_factory=list)
    request: Hashable = None
    age: int = -1

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
    """The waiting, running and evicted (`evicted`) sequences."""

    def __init__(self, slots: int, pages: Pages, queue: int):
        self.pages, self.queue = pages, queue
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

    def admit(self) -> list[Sequence]:
        """Start waiting sequences while there is room; returns those started."""
        begun = []
        while self.waiting and self._slots and not self.evicted:
            needed = self.pages.needed(self.waiting.first.begins_with)
            if needed > self.pages.free:
                break
            sequence = self.waiting.take()
            sequence.age = next(self._ages)
            self._place(sequence, needed)
            begun.append(sequence)
        return begun

    def readmit(self) -> list[Sequence]:
        """Give evicted sequences a place again; returns those whose states must be swapped in."""
        back = []
        while self.evicted and self._slots:
            sequence = self.evicted[0]
            room = sequence.begins_with if sequence.prefilling else sequence.computed + 1
            needed = self.pages.needed(room)
            if needed + len(self.running) > self.pages.free:
                break
            self.evicted.pop(0)
            self._place(sequence, needed)
            back.append(sequence)
        return back

    def _place(self, sequence: Sequence, pages: int) -> None:
        sequence.slot, sequence.pages = self._slots.pop(), self.pages.take(pages)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.age)

    def prefilling(self, most: int) -> list[Sequence]:
        """Those whose prompts are computed next, at most so many, requests in turns."""
        return in_turns([s for s in self.running if s.prefilling])[:most]

    def room_for_next(self) -> tuple[list[Sequence], list[Sequence]]:
        """(sequences whose next token can be computed, those that must be evicted for it).

        Both oldest first. The state of the latter must be saved before anything is computed; then
        call `vacate` on each of them.
        """
        ready = [s for s in self.running if not s.prefilling and s.wants_token]
        out: list[Sequence] = []
        free, going = self.pages.free, list(self.running)
        for sequence in ready:
            if sequence in out or self.pages.needed(sequence.computed + 1) <= len(sequence.pages):
                continue
            while free == 0 and sequence in going:
                youngest = going.pop()
                out.append(youngest)
                free += len(youngest.pages)
            if sequence in going:
                free -= 1
        return [s for s in ready if s not in out], out[::-1]

    def vacate(self, sequence: Sequence) -> None:
        """Evict a sequence: free its slot and pages; it waits to be swapped in again."""
        self.evictions += 1
        self._leave(sequence)
        self.evicted.append(sequence)
        self.evicted.sort(key=lambda s: s.age)

    def grow(self, sequence: Sequence) -> bool:
        """Give it the page that its next token needs; True if it got a new one."""
        if self.pages.needed(sequence.computed + 1) <= len(sequence.pages):
            return False
        sequence.pages += self.pages.take(1)
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
        self.pages.give(sequence.pages)
        sequence.slot, sequence.pages = -1, []
