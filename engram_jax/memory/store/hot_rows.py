"""A hash table from row id to slot, for the most-read rows that are kept on a faster tier."""

from __future__ import annotations

import numpy as np

from engram_jax.hardware.numba_internals import host_jit

_EMPTY = -1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing


@host_jit
def _insert(ids, shift, keys, slots):  # type: ignore[no-untyped-def]
    mask = keys.size - 1
    for i in range(ids.size):
        at = np.int64((np.uint64(ids[i]) * _MULTIPLIER) >> shift)
        while keys[at] != _EMPTY:
            if keys[at] == ids[i]:
                return i
            at = (at + 1) & mask
        keys[at] = ids[i]
        slots[at] = i
    return -1


@host_jit
def _find(ids, shift, keys, slots, out):  # type: ignore[no-untyped-def]
    mask = keys.size - 1
    for i in range(ids.size):
        at = np.int64((np.uint64(ids[i]) * _MULTIPLIER) >> shift)
        while keys[at] != _EMPTY and keys[at] != ids[i]:
            at = (at + 1) & mask
        out[i] = slots[at] if keys[at] == ids[i] else -1


class Slots:
    """A hash table of ids int32 or int64 [h], distinct and not negative; the i-th has slot i.

    Open addressing, at most half full. Raises ValueError for an id that occurs twice.
    """

    def __init__(self, ids: np.ndarray):
        size = 1 << max(4, (2 * len(ids) - 1).bit_length())
        self._count, self._shift = len(ids), np.uint64(64 - (size - 1).bit_length())
        self._keys = np.full(size, _EMPTY, np.int64)
        self._slots = np.zeros(size, np.int32)
        wide = np.ascontiguousarray(ids, np.int64)
        twice = int(_insert(wide, self._shift, self._keys, self._slots))
        if twice >= 0:
            raise ValueError(f"id {int(wide[twice])} occurs twice")

    def __len__(self) -> int:
        return self._count

    def find(self, ids: np.ndarray) -> np.ndarray:
        """ids int32 or int64 [n] -> slots int32 [n], -1 for those that are not kept."""
        out = np.empty(ids.size, np.int32)
        _find(ids, self._shift, self._keys, self._slots, out)
        return out
