"""Which communication a schedule hides behind computing, and which it waits for.

A scheduled computation is a list: the core runs one operation after the other, beside it the links
and the SparseCores each carry out one transfer after the other. A transfer that is asynchronous
runs from its start; its done waits for what is left of it. One that is not holds the core up.

Seconds are pairs, [with the lower prices of operations, with the upper ones]: the more an operation
takes, the more it hides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

LINKS, SPARSE_CORES = "collectives", "SparseCore"
ENGINES = (LINKS, SPARSE_CORES)
Pair = np.ndarray  # float64 [2]


def pair(lower: float = 0.0, upper: float | None = None) -> Pair:
    return np.array([lower, lower if upper is None else upper])


@dataclass
class Overlap:
    """Of one engine. busy: seconds of all transfers; started: of the asynchronous ones; between:
    computing between their starts and dones (counted for each that is under way); waits: what the
    core waited."""

    busy: float = 0.0
    started: float = 0.0
    between: Pair = field(default_factory=pair)
    waits: Pair = field(default_factory=pair)

    def add(self, other: Overlap, times: float = 1) -> None:
        self.busy += other.busy * times
        self.started += other.started * times
        self.between = self.between + other.between * times
        self.waits = self.waits + other.waits * times


def nothing() -> dict[str, Overlap]:
    return {engine: Overlap() for engine in ENGINES}


class Timeline:
    """One run of a computation. core: seconds of its operations; overlaps: by engine."""

    def __init__(self) -> None:
        self.core, self._now = pair(), pair()
        self._free = {engine: pair() for engine in ENGINES}
        self.overlaps = nothing()
        self._pending: dict[str, tuple[dict[str, Pair], Pair]] = {}  # (ends, core at the start)

    @property
    def pending(self) -> tuple[str, ...]:
        """The names of transfers that are under way."""
        return tuple(self._pending)

    def compute(self, seconds: Pair) -> None:
        self.core = self.core + seconds
        self._now = self._now + seconds

    def ran(self, inner: Timeline, times: float = 1) -> None:
        """A computation that is called, and runs so often."""
        self.compute(inner.core * times)
        for engine, overlap in inner.overlaps.items():
            self.overlaps[engine].add(overlap, times)
            self._now = self._now + overlap.waits * times

    def block(self, engine: str, seconds: float) -> None:
        """A transfer that the core waits for."""
        overlap = self.overlaps[engine]
        overlap.busy += seconds
        end = np.maximum(self._now, self._free[engine]) + seconds
        overlap.waits = overlap.waits + end - self._now
        self._now, self._free[engine] = end, end

    def start(self, name: str, transfers: Mapping[str, float]) -> None:
        """A transfer, its seconds by engine."""
        ends = {}
        for engine, seconds in transfers.items():
            if seconds:
                self.overlaps[engine].busy += seconds
                self.overlaps[engine].started += seconds
                ends[engine] = np.maximum(self._now, self._free[engine]) + seconds
                self._free[engine] = ends[engine]
        self._pending[name] = ends, self.core

    def done(self, name: str) -> None:
        """The core needs the transfer that was started under that name."""
        ends, core = self._pending.pop(name)
        for engine, end in ends.items():
            overlap = self.overlaps[engine]
            overlap.between = overlap.between + self.core - core
            wait = np.maximum(end - self._now, 0)
            overlap.waits = overlap.waits + wait
            self._now = self._now + wait

    def finish(self) -> None:
        """The end of the computation: waits for what has no done in it."""
        for name in self.pending:
            self.done(name)
