"""The scheduler: decides which sequences run, first come, first served, in bounded memory.

* A request is admitted when nothing older waits, and a slot and pages for its whole prompt and one
  more token are free; one that can never fit was refused when it was submitted.
* A running sequence takes a page whenever it has filled its last one. If none is free, the
  youngest running sequence is evicted (swapped out): its state goes to host memory, its pages and
  its slot become free. (Nothing is recomputed: a sequence that is swapped in has the same state to
  the last bit.) The oldest can always continue, because one sequence always fits.
* Evicted sequences are swapped in, oldest first, before anything new is admitted, when their pages
  and one more for every running sequence are free. So at most `slots` sequences have begun at any
  time, and host memory is bounded by their states.

engine.py carries this out (`Engine._evict`, `Engine._swap_in`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_jax.serve.pages import Pages
from engram_jax.serve.request import Finish, QueueFullError, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One unfinished request.

    computed: tokens in the cache. pending: its next token is being computed.
    history: its last N - 1 canonical ids (addressing/hash_tokens.py).
    saved: its state on the host, while it is evicted. text: its `TextStream`, or None. rules: its
    `LogitRules`, once it draws with some.
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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.evicted: list[Sequence] = []  # oldest first
        self.evictions = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.evicted)

    def submit(self, sequence: Sequence) -> None:
        if len(self.waiting) >= self.queue:
            raise QueueFullError(f"{self.queue} requests are waiting; try again later")
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Start waiting requests while there is room; returns those started."""
        begun = []
        while self.waiting and self._slots and not self.evicted:
            needed = self.pages.needed(self.waiting[0].begins_with)
            if needed > self.pages.free:
                break
            sequence = self.waiting.popleft()
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
        self.running.sort(key=lambda s: s.number)

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
        self.evicted.sort(key=lambda s: s.number)

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
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.pages.give(sequence.pages)
        sequence.slot, sequence.pages = -1, []
