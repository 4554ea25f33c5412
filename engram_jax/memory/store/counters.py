"""Thread-safe counters of what a row source has read."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Totals since the source was created.

    calls: of `gather`. lookups: rows requested. hits: of them, those that this tier has itself (all
      of them for the last tier). rows_read, bytes_read: rows read from this tier's own storage and
      the bytes that took, whole blocks for a file.
    seconds: in `gather`, summed over threads, including the tiers below.
    """

    calls: int = 0
    lookups: int = 0
    hits: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    seconds: float = 0.0


class Counters:
    """Adds up `Stats`; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = [0, 0, 0, 0, 0]
        self._seconds = 0.0

    def add(
        self, began: float, *, lookups: int, hits: int, rows_read: int, bytes_read: int
    ) -> None:
        """Add one call of `gather` that began at `time.perf_counter()` = began."""
        seconds = time.perf_counter() - began
        total = self._total
        with self._lock:
            total[0] += 1
            total[1] += lookups
            total[2] += hits
            total[3] += rows_read
            total[4] += bytes_read
            self._seconds += seconds

    def snapshot(self) -> Stats:
        """A consistent copy of the totals."""
        with self._lock:
            calls, lookups, hits, rows_read, bytes_read = self._total
            return Stats(calls, lookups, hits, rows_read, bytes_read, self._seconds)
