"""Simulates cache policies on recorded lookups: how many a cache of a given size would have hit.

A trace is the lookups of a model as a tier sees them, batch after batch, each row once per batch.
`belady` is the optimum that no policy can beat: it knows the future.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engram_jax.hardware.numba_internals import host_jit
from engram_jax.memory.store.distinct_rows import distinct
from engram_jax.memory.store.s3fifo import Sets


@dataclass(frozen=True)
class Trace:
    """Lookups, rows numbered 0 to U - 1 in order of their ids.

    ids: int32 [n], batch after batch, ascending within one. edges: int64 [batches + 1]. rows: the
    distinct ids [U] that are numbered. since: position in `ids` from which hits are counted:
    lookups before it only fill the cache.
    """

    ids: np.ndarray
    edges: np.ndarray
    rows: np.ndarray
    since: int = 0

    @property
    def lookups(self) -> int:
        """Lookups that are counted."""
        return self.ids.size - self.since


def record(batches: Sequence[np.ndarray], since: int = 0) -> Trace:
    """The trace of `batches`: the lookups of each step, ids int32 [n_i], any order, with
    duplicates. since: the batch from which hits are counted."""
    each = [distinct(batch)[0] for batch in batches]
    edges = np.cumsum([0, *(len(ids) for ids in each)])
    rows, ids = distinct(np.concatenate(each) if each else np.empty(0, np.int32))
    return Trace(ids, edges, rows, int(edges[since]))


def static(trace: Trace, capacity: int, by_frequency: np.ndarray) -> int:
    """Hits of the `capacity` rows that other text reads most often. by_frequency: ids by descending
    count, as `read_counts.Frequency.ids`."""
    kept = np.isin(trace.rows, by_frequency[:capacity])
    return int(kept[trace.ids[trace.since :]].sum())


def static_best(trace: Trace, capacity: int) -> int:
    """Hits of the rows that this trace itself reads most often, cached from its start: the optimum
    of a cache that never changes."""
    counts = np.bincount(trace.ids[trace.since :])
    return int(np.sort(counts)[::-1][:capacity].sum())


def sets(trace: Trace, capacity: int, warm: np.ndarray | None = None) -> int:
    """Hits of `CachedTable`'s own policy, S3-FIFO in sets (s3fifo.py). warm: ids by descending
    count, to start with; None = it starts empty."""
    rows = int(trace.rows.max(initial=0)) + 1
    book = Sets.empty(capacity, rows)
    if warm is not None:
        book.seed(warm)
    hits = 0
    ids = trace.rows[trace.ids]
    slots = np.empty(int(np.diff(trace.edges).max(initial=0)), np.int32)
    for begin, end in zip(trace.edges[:-1], trace.edges[1:], strict=True):
        batch = ids[begin:end]
        found = slots[: batch.size]
        inside = book.look(batch, found)
        hits += inside if begin >= trace.since else 0
        book.admit(batch[found < 0], np.empty(batch.size, np.int32))
    return hits


def lru(trace: Trace, capacity: int) -> int:
    """Hits of keeping the most recently used rows."""
    return int(_lru(trace.ids, trace.since, len(trace.rows), capacity))


def lfu(trace: Trace, capacity: int) -> int:
    """Hits of keeping the rows used most often so far, with the counts of all rows kept forever; a
    row is admitted only if its count exceeds a cached one's."""
    return int(_lfu(trace.ids, trace.since, len(trace.rows), capacity))


def s3_fifo(trace: Trace, capacity: int) -> int:
    """Hits of S3-FIFO (Yang et al., SOSP 2023): a small queue of a tenth in front of a main queue
    with second chances; a row that returns soon after leaving the small one enters the main one."""
    return int(_s3_fifo(trace.ids, trace.since, len(trace.rows), capacity))


def belady(trace: Trace, capacity: int) -> int:
    """Hits of the optimum: of the cached rows and the new one, evict the one whose next use is
    furthest away."""
    rows = len(trace.rows)
    later = _next_use(trace.ids, rows)
    return int(_belady(trace.ids, trace.since, later, rows, capacity))


ONLINE: dict[str, Callable[[Trace, int], int]] = {
    "LRU": lru,
    "S3-FIFO": s3_fifo,
    "LFU": lfu,
    "sets": sets,
}


@host_jit
def _lru(ids, since, rows, capacity):  # type: ignore[no-untyped-def]
    """A ring of linked rows around the node `rows`, whose successor is the most recently used."""
    after = np.full(rows + 1, -1, np.int64)
    before = np.full(rows + 1, -1, np.int64)
    after[rows] = before[rows] = rows
    size = hits = 0
    for i in range(ids.size):
        row = ids[i]
        if after[row] >= 0:
            hits += i >= since
            after[before[row]] = after[row]
            before[after[row]] = before[row]
        elif size == capacity:
            oldest = before[rows]
            before[rows] = before[oldest]
            after[before[oldest]] = rows
            after[oldest] = -1
        else:
            size += 1
        first = after[rows]
        after[rows] = row
        before[row] = rows
        after[row] = first
        before[first] = row
    return hits


@host_jit
def _sift(heap, place, key, size, at):  # type: ignore[no-untyped-def]
    """Restore a heap of rows, least key first, after the key of heap[at] has changed."""
    row = heap[at]
    while at > 0 and key[row] < key[heap[(at - 1) // 2]]:
        heap[at] = heap[(at - 1) // 2]
        place[heap[at]] = at
        at = (at - 1) // 2
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and key[heap[child + 1]] < key[heap[child]]:
            child += 1
        if key[heap[child]] >= key[row]:
            break
        heap[at] = heap[child]
        place[heap[at]] = at
        at = child
    heap[at] = row
    place[row] = at


@host_jit
def _lfu(ids, since, rows, capacity):  # type: ignore[no-untyped-def]
    key = np.zeros(rows, np.int64)
    heap = np.empty(capacity, np.int64)
    place = np.full(rows, -1, np.int64)
    size = hits = 0
    for i in range(ids.size):
        row = ids[i]
        key[row] += 1
        if place[row] >= 0:
            hits += i >= since
            _sift(heap, place, key, size, place[row])
        elif size < capacity:
            heap[size] = row
            size += 1
            _sift(heap, place, key, size, size - 1)
        elif key[row] > key[heap[0]]:
            place[heap[0]] = -1
            heap[0] = row
            _sift(heap, place, key, size, 0)
    return hits


@host_jit
def _next_use(ids, rows):  # type: ignore[no-untyped-def]
    seen = np.full(rows, ids.size, np.int64)
    found = np.empty(ids.size, np.int64)
    for i in range(ids.size - 1, -1, -1):
        found[i] = seen[ids[i]]
        seen[ids[i]] = i
    return found


@host_jit
def _belady(ids, since, next_use, rows, capacity):  # type: ignore[no-untyped-def]
    key = np.zeros(rows, np.int64)  # minus the next use: the least is dropped
    heap = np.empty(capacity, np.int64)
    place = np.full(rows, -1, np.int64)
    size = hits = 0
    for i in range(ids.size):
        row = ids[i]
        key[row] = -next_use[i]
        if place[row] >= 0:
            hits += i >= since
            _sift(heap, place, key, size, place[row])
        elif size < capacity:
            heap[size] = row
            size += 1
            _sift(heap, place, key, size, size - 1)
        elif key[row] > key[heap[0]]:
            place[heap[0]] = -1
            heap[0] = row
            _sift(heap, place, key, size, 0)
    return hits


@host_jit
def _s3_fifo(ids, since, rows, capacity):  # type: ignore[no-untyped-def]
    """where: 0 not cached, 1 small, 2 main; uses: capped at 3; left: when a row left the small
    queue, counted in rows that have (it is a ghost until more rows have left since than the main
    queue holds). queues, heads, sizes: of the small and the main queue."""
    small_most = max(1, capacity // 10)
    where, uses = np.zeros(rows, np.uint8), np.zeros(rows, np.uint8)
    left = np.full(rows, -1, np.int64)
    queues = np.empty((2, capacity + 1), np.int64)
    heads, sizes = np.zeros(2, np.int64), np.zeros(2, np.int64)
    departed = hits = 0
    for i in range(ids.size):
        row = ids[i]
        if where[row]:
            hits += i >= since
            uses[row] = min(uses[row] + 1, 3)
            continue
        while sizes[0] + sizes[1] == capacity:
            queue = 0 if sizes[0] >= small_most else 1
            old = queues[queue, heads[queue]]
            heads[queue] = (heads[queue] + 1) % (capacity + 1)
            sizes[queue] -= 1
            if uses[old] > 0:
                uses[old] = 0 if queue == 0 else uses[old] - 1
                where[old] = 2
                queues[1, (heads[1] + sizes[1]) % (capacity + 1)] = old
                sizes[1] += 1
            else:
                where[old] = 0
                if queue == 0:
                    departed += 1
                    left[old] = departed
        returns = left[row] >= 0 and departed - left[row] <= capacity - small_most
        queue = 1 if returns else 0
        queues[queue, (heads[queue] + sizes[queue]) % (capacity + 1)] = row
        sizes[queue] += 1
        where[row], uses[row] = queue + 1, 0
    return hits
