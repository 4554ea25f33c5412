"""Eviction policy of host_cache.py: S3-FIFO (Yang et al., SOSP 2023) in sets of 16 rows.

Row r belongs to set r mod S (addresses are hashes already) and may be in any of its slots. A new
row is on probation: if it has not been used again when two others have been admitted after it, it
is evicted, and only its number is remembered, as one of 16 "ghosts". A row that was used again
stays, and so does a ghost that returns; of these the oldest that was not used since its last turn
is evicted. So rows that are read once displace none that stay, and rows that a document repeats are
soon among these: of the policies in `benchmarks/cache_policies.py`, this one is closest to the
optimum on text.

Compiled loops over plain arrays; the caller must hold a lock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import uint8, uint32, uint64

from engram_jax.hardware.numba_internals import host_jit, prefetch

WAYS = 16  # a cache line of row numbers
PROBATION = 2  # rows on probation in a full set from which on the oldest is evicted unless used
_MOST_USES, _STAYS = 3, 4  # a slot's state: uses since its last turn, and whether it may stay
_AHEAD = 12  # lookups


@dataclass(frozen=True)
class Sets:
    """The state of a cache, without its rows; slot = set * ways + way.

    keys, ghosts: row numbers int32 [S, ways], -1 where empty. state: uint8 [S, ways]. turns: uint32
    [S, ways], when a row was admitted or last spared, by the set's clock. clocks: uint32 [S, 2],
    turns given and ghosts written.
    """

    keys: np.ndarray
    ghosts: np.ndarray
    state: np.ndarray
    turns: np.ndarray
    clocks: np.ndarray

    @classmethod
    def empty(cls, capacity: int, rows: int) -> Sets:
        """An empty cache for at most `capacity` (at least 1) of `rows` rows; rounded down to whole
        sets of 16, unless all rows fit."""
        if capacity >= rows:
            ways, sets = min(WAYS, rows), -(-rows // min(WAYS, rows))
        else:
            ways, sets = min(WAYS, capacity), capacity // min(WAYS, capacity)
        keys = np.full((sets, ways), -1, np.int32)
        state, turns = np.zeros((sets, ways), np.uint8), np.zeros((sets, ways), np.uint32)
        return cls(keys, keys.copy(), state, turns, np.zeros((sets, 2), np.uint32))

    @property
    def slots(self) -> int:
        return self.keys.size

    def clear(self) -> None:
        """Empty the cache, ghosts included."""
        self.keys.fill(-1)
        self.ghosts.fill(-1)
        for array in (self.state, self.turns, self.clocks):
            array.fill(0)

    def look(self, ids: np.ndarray, slots: np.ndarray) -> int:
        """Fill `slots` int32 [n] with the slots of rows `ids`, -1 where absent, and count their
        uses. Returns the number found."""
        return int(_look(self.keys, self.state, ids, slots))

    def admit(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """Fill `slots` int32 [n] with the slots to store rows `ids` in, distinct and just read, in
        this order. A row already cached keeps its slot and must not be stored: -1."""
        _admit(self.keys, self.ghosts, self.state, self.turns, self.clocks, ids, slots)

    def seed(self, ids: np.ndarray) -> np.ndarray:
        """Admit rows, most frequent first, while their sets have room -> slots int32 [n], -1: none.
        They are not on probation, and of them the least frequent is evicted first."""
        slots = np.empty(ids.size, np.int32)
        _seed(self.keys, self.state, self.turns, self.clocks, ids, slots)
        return slots


@host_jit
def _ask(array, set_):  # type: ignore[no-untyped-def]
    prefetch(uint64(array.ctypes.data) + uint64(set_) * uint64(array.shape[1] * array.itemsize))


@host_jit
def _find(line, row):  # type: ignore[no-untyped-def]
    found = -1
    for way in range(line.size):  # no early exit, so that the loop is vectorised
        if line[way] == row:
            found = way
    return found


@host_jit
def _look(keys, state, ids, slots):  # type: ignore[no-untyped-def]
    sets, ways = uint32(keys.shape[0]), keys.shape[1]
    hits = 0
    for i in range(ids.size):
        if i + _AHEAD < ids.size:
            later = uint32(ids[i + _AHEAD]) % sets
            _ask(keys, later)
            _ask(state, later)
        here = uint32(ids[i]) % sets
        way = _find(keys[here], np.int32(ids[i]))
        if way >= 0:
            if state[here, way] & _MOST_USES < _MOST_USES:
                state[here, way] += uint8(1)
            hits += 1
            slots[i] = here * ways + way
        else:
            slots[i] = -1
    return hits


@host_jit
def _oldest(state, turns, stays):  # type: ignore[no-untyped-def]
    """(way of the oldest row on probation (stays = 0) or of those that stay (4); how many)."""
    found, count, least = -1, 0, np.int64(1 << 62)
    for way in range(state.size):
        if state[way] & _STAYS == stays:
            count += 1
            if turns[way] < least:
                found, least = way, np.int64(turns[way])
    return found, count


@host_jit
def _make_room(keys, ghosts, state, turns, clock):  # type: ignore[no-untyped-def]
    """Evict a row of a full set; returns its way."""
    while True:
        way, newcomers = _oldest(state, turns, 0)
        if newcomers >= min(PROBATION, state.size):
            if state[way] & _MOST_USES == 0:
                ghosts[clock[1] % uint32(ghosts.size)] = keys[way]
                clock[1] += uint32(1)
                return way
            state[way] = _STAYS
        else:
            way, _ = _oldest(state, turns, _STAYS)
            if state[way] & _MOST_USES == 0:
                return way
            state[way] -= uint8(1)
        turns[way] = clock[0]
        clock[0] += uint32(1)


@host_jit
def _admit(keys, ghosts, state, turns, clocks, ids, slots):  # type: ignore[no-untyped-def]
    sets, ways = uint32(keys.shape[0]), keys.shape[1]
    for i in range(ids.size):
        if i + _AHEAD < ids.size:
            later = uint32(ids[i + _AHEAD]) % sets
            _ask(keys, later)
            _ask(ghosts, later)
            _ask(state, later)
            _ask(turns, later)
            _ask(clocks, later)
        row = np.int32(ids[i])
        here = uint32(ids[i]) % sets
        slots[i] = -1
        if _find(keys[here], row) >= 0:  # another thread was faster
            continue
        ghost = _find(ghosts[here], row)
        way = _find(keys[here], np.int32(-1))
        if way < 0:
            way = _make_room(keys[here], ghosts[here], state[here], turns[here], clocks[here])
        if ghost >= 0 and ghosts[here, ghost] == row:
            ghosts[here, ghost] = -1
        keys[here, way] = row
        state[here, way] = _STAYS if ghost >= 0 else 0
        turns[here, way] = clocks[here, 0]
        clocks[here, 0] += uint32(1)
        slots[i] = here * ways + way


@host_jit
def _seed(keys, state, turns, clocks, ids, slots):  # type: ignore[no-untyped-def]
    sets, ways = uint32(keys.shape[0]), keys.shape[1]
    for i in range(ids.size):
        here = uint32(ids[i]) % sets
        slots[i] = -1
        if _find(keys[here], np.int32(ids[i])) < 0:
            way = _find(keys[here], np.int32(-1))
            if way >= 0:
                keys[here, way] = ids[i]
                state[here, way] = _STAYS + 1
                # The last way is free first, so the most frequent has the latest turn.
                turns[here, way] = clocks[here, 0] + uint32(way)
                slots[i] = here * ways + way
    for here in range(sets):
        clocks[here, 0] += uint32(ways + 1)
