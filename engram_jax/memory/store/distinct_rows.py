"""Finds the distinct rows of a batch, so that each is read once, in storage order.

The device expands them: it gets the distinct rows and, for every lookup, the index of its row.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from engram_jax.hardware.cores import cores
from engram_jax.hardware.numba_internals import host_jit
from engram_jax.memory.store.gather_rows import split
from engram_jax.memory.store.reused_buffers import Scratch

_SHARED = 1 << 18  # ids from which the cores share the work, each a range of ids
# (number of ids, radix bits per pass up to it): 2 ** bits counters are cleared and summed per pass.
_DIGITS = ((1 << 12, 8), (1 << 15, 11), (1 << 62, 15))
_scratch = Scratch()


@host_jit
def _all_bits(ids):  # type: ignore[no-untyped-def]
    """The bitwise or of all ids; negative if any id is."""
    found = np.int64(0)
    for i in range(ids.size):
        found |= np.int64(ids[i])
    return found


@host_jit
def _pack(ids, low, high, keys, shift):  # type: ignore[no-untyped-def]
    """keys = id << shift | position of every id in [low, high); returns how many."""
    if low == 0 and high > ids.max():  # all of them: this loop is vectorised
        for i in range(ids.size):
            keys[i] = (uint64(ids[i]) << uint64(shift)) | uint64(i)
        return ids.size
    count = 0
    for i in range(ids.size):  # no branch: it could not be predicted
        keys[count] = (uint64(ids[i]) << uint64(shift)) | uint64(i)
        count += (ids[i] >= low) & (ids[i] < high)
    return count


@host_jit
def _sort(keys, spare, low, high, digit_bits):  # type: ignore[no-untyped-def]
    """Radix sort of uint64 keys by their bits [low, high); True: the result is in `spare`."""
    buckets = 1 << digit_bits
    ends = np.empty(buckets, np.int32)
    mask = uint64(buckets - 1)
    swapped = False
    while low < high:
        source, to = (spare, keys) if swapped else (keys, spare)
        ends[:] = 0
        shift = uint64(low)
        for i in range(source.size):
            ends[(source[i] >> shift) & mask] += 1
        total = 0
        for b in range(buckets):
            here = ends[b]
            ends[b] = total
            total += here
        for i in range(source.size):
            b = (source[i] >> shift) & mask
            to[ends[b]] = source[i]
            ends[b] += 1
        swapped = not swapped
        low += digit_bits
    return swapped


@host_jit
def _count(keys, shift):  # type: ignore[no-untyped-def]
    count = min(1, keys.size)
    for i in range(1, keys.size):
        count += (keys[i] >> uint64(shift)) != (keys[i - 1] >> uint64(shift))
    return count


@host_jit
def _unique(keys, shift, number, unique, inverse):  # type: ignore[no-untyped-def]
    """From sorted keys: the distinct ids to unique[number:], their indices to `inverse`."""
    mask = (uint64(1) << uint64(shift)) - uint64(1)
    at = number - 1
    for i in range(keys.size):
        one = keys[i] >> uint64(shift)
        if i == 0 or one != keys[i - 1] >> uint64(shift):
            at += 1
            unique[at] = one
        inverse[keys[i] & mask] = at


def _sorted(ids: np.ndarray, low: int, high: int, shift: int, bits: int) -> np.ndarray:
    """The keys of the ids in [low, high), ascending, in a buffer of this thread."""
    # One extra: a key is written before it is known to be in range.
    keys = _scratch.get("keys", 1, ids.size + 1, np.uint64)[0]
    keys = keys[: _pack(ids, low, high, keys, shift)]
    spare = _scratch.get("spare", 1, keys.size, np.uint64)[0]
    passes = -(-bits // next(digit for most, digit in _DIGITS if keys.size < most))
    if not passes:
        return keys
    return spare if _sort(keys, spare, shift, shift + bits, -(-bits // passes)) else keys


def distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 or int64 [n], any order -> (distinct ids, ascending, same dtype [m]; inverse int32
    [n] with ids == distinct[inverse]).

    Raises IndexError for a negative id, ValueError for another dtype or shape and where an id and
    its position do not fit 64 bits together (ids below 2**31: 2**31 of them do).
    """
    if ids.ndim != 1 or ids.dtype not in (np.int32, np.int64):
        raise ValueError(f"ids {ids.dtype} {list(ids.shape)}: must be int32 or int64 [n]")
    count = ids.size
    unique, inverse = np.empty(count, ids.dtype), np.empty(count, np.int32)
    if count == 0:
        return unique, inverse
    ids = np.ascontiguousarray(ids)
    bits = int(_all_bits(ids))
    if bits < 0:
        raise IndexError(f"row {int(ids.min())}: must be at least 0")
    shift, bits = (count - 1).bit_length() or 1, bits.bit_length()
    if bits + shift > 64 or bits > 62 or count > 1 << 31:
        raise ValueError(f"{count} ids of {bits} bits: too many for one call")
    ranges = cores() if count >= _SHARED else 1
    top = int(ids.max()) + 1 if ranges > 1 else 1 << bits
    edges = [top * i // ranges for i in range(ranges + 1)]
    keys: list[np.ndarray] = [unique] * ranges
    found = [0] * ranges

    def sort(begin: int, end: int) -> None:
        for i in range(begin, end):
            keys[i] = _sorted(ids, edges[i], edges[i + 1], shift, bits)
            if ranges > 1:  # a thread may get several
                keys[i] = keys[i].copy()
            found[i] = int(_count(keys[i], shift))

    def number(begin: int, end: int) -> None:
        for i in range(begin, end):
            _unique(keys[i], shift, sum(found[:i]), unique, inverse)

    for work in (sort, number):
        work(0, 1) if ranges == 1 else split(ranges, work)
    return unique[: sum(found)], inverse
