"""A cache in host memory in front of a table on a slower tier; s3fifo.py decides what it keeps."""

from __future__ import annotations

import threading
import time

import numpy as np
from numba import uint64

from engram_jax.config.errors import UserError
from engram_jax.hardware.numba_internals import host_jit
from engram_jax.memory.store.counters import Counters
from engram_jax.memory.store.distinct_rows import distinct
from engram_jax.memory.store.dram import host_array
from engram_jax.memory.store.gather_rows import (
    AHEAD,
    INLINE_BYTES,
    check_request,
    move_row,
    prefetch_row,
    split,
)
from engram_jax.memory.store.read_counts import Frequency
from engram_jax.memory.store.reused_buffers import Scratch
from engram_jax.memory.store.row_source import RowSource
from engram_jax.memory.store.s3fifo import Sets

POLICIES = ("adaptive", "static")
_WARM = 1 << 16  # rows that are read at a time when a cache is warmed


class CachedTable:
    """At most `capacity` rows of `source` in DRAM. A `RowSource`; thread-safe; the same bits.

    Rows never change, so the cache cannot be stale. Its lock is held while it is searched and while
    rows are copied, never while `source` reads (except in `warm`).
    """

    def __init__(self, source: RowSource, capacity: int, policy: str = "adaptive") -> None:
        """capacity: rows, at least 1; above 16 rounded down to a multiple of 16, and at most the
        table's. policy: "adaptive", S3-FIFO (s3fifo.py), or "static", only the rows that `warm`
        loaded. Raises UserError for other values."""
        if policy not in POLICIES:
            raise UserError(f"cache policy {policy!r}: must be one of {', '.join(POLICIES)}")
        if capacity < 1:
            raise UserError(f"cache capacity {capacity}: must be at least 1 row")
        if source.rows > 1 << 31:
            raise UserError(f"a table of {source.rows} rows: a cache takes at most {1 << 31}")
        self.rows, self.format, self.source, self.policy = (
            source.rows,
            source.format,
            source,
            policy,
        )
        self.counters = Counters()
        self._sets = Sets.empty(capacity, source.rows)
        self._lock, self._scratch = threading.Lock(), Scratch()
        self._data = tuple(host_array(self.capacity, size) for _, size in self.format.parts)

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self._sets.slots

    def warm(self, frequency: Frequency) -> int:
        """Load the most frequent rows while there is room; returns how many.

        Raises UserError for a frequency that was counted on a table of another size.
        """
        if frequency.rows != self.rows:
            raise UserError(
                f"frequencies of a table of {frequency.rows} rows: this one has {self.rows}"
            )
        with self._lock:
            # Held throughout: a slot that is assigned must be filled before any lookup.
            slots = self._sets.seed(frequency.ids)
            ids, slots = frequency.ids[slots >= 0], slots[slots >= 0]
            order = np.argsort(ids)
            try:
                for begin in range(0, ids.size, _WARM):
                    some = order[begin : begin + _WARM]
                    rows = self.format.empty(some.size)
                    self.source.gather(ids[some], rows)
                    self._store(rows, np.arange(some.size, dtype=np.int32), slots[some])
            except BaseException:
                self._sets.clear()  # slots without their rows
                raise
        return ids.size

    def gather(self, ids: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
        """See `RowSource.gather`. A missing row is read once, however often it is requested."""
        began = time.perf_counter()
        ids = check_request(ids, self.rows, out, self.format.parts)
        slots = np.empty(ids.size, np.int32)
        with self._lock:
            hits = self._sets.look(ids, slots)
            if hits == ids.size:
                _copy_parts(self._data, slots, None, out)
            elif hits:
                found = np.flatnonzero(slots >= 0).astype(np.int32)
                _copy_parts(self._data, slots[found], found, out)
        if hits < ids.size:
            self._read(ids, np.flatnonzero(slots < 0).astype(np.int32), out)
        self.counters.add(
            began,
            lookups=ids.size,
            hits=hits,
            rows_read=hits,
            bytes_read=hits * self.format.row_bytes,
        )

    def _read(self, ids: np.ndarray, missing: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
        """Read the rows at positions `missing` from the source; admit them by the policy."""
        wanted, inverse = distinct(ids[missing])
        rows = tuple(
            self._scratch.get(name, wanted.size, size, np.uint8) for name, size in self.format.parts
        )
        self.source.gather(wanted, rows)
        _copy_parts(rows, inverse, missing, out)
        if self.policy == "static":
            return
        slots = np.empty(wanted.size, np.int32)
        with self._lock:
            self._sets.admit(wanted, slots)
            # A slot may be assigned twice: the row admitted last keeps it, and rows are stored in
            # that order.
            taken = np.flatnonzero(slots >= 0).astype(np.int32)
            self._store(rows, taken, slots[taken])

    def _store(self, rows: tuple[np.ndarray, ...], which: np.ndarray, slots: np.ndarray) -> None:
        for part, data in zip(rows, self._data, strict=True):
            _copy(part, which, slots, data)


def _copy_parts(
    tables: tuple[np.ndarray, ...],
    rows: np.ndarray,
    places: np.ndarray | None,
    out: tuple[np.ndarray, ...],
) -> None:
    """out[places] = table[rows] for each part. places: distinct; None = 0, 1, 2 .."""
    where = np.arange(rows.size, dtype=np.int32) if places is None else places
    for table, buffer in zip(tables, out, strict=True):

        def work(begin: int, end: int, table: np.ndarray = table, out: np.ndarray = buffer) -> None:
            _copy(table, rows[begin:end], where[begin:end], out)

        if rows.size * table.shape[1] < INLINE_BYTES:
            work(0, rows.size)
        else:
            split(rows.size, work)


@host_jit
def _copy(table, rows, places, out):  # type: ignore[no-untyped-def]
    size = uint64(table.shape[1])
    start, to = uint64(table.ctypes.data), uint64(out.ctypes.data)
    count = rows.size
    for i in range(min(AHEAD, count)):
        prefetch_row(start + uint64(rows[i]) * size, size)
    for i in range(count):
        if i + AHEAD < count:
            prefetch_row(start + uint64(rows[i + AHEAD]) * size, size)
        move_row(to + uint64(places[i]) * size, start + uint64(rows[i]) * size, size)
