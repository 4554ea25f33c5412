"""The distinct rows of a batch: read each once, in the order they lie in.

The device expands: it gets the distinct rows and, for every lookup, the number of its row.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from engram_jax.hardware.numba_internals import host_jit
from engram_jax.memory.store.gather_rows import cores, split
from engram_jax.memory.store.reused_buffers import Scratch

_SHARED = 1 << 18  # ids from which the cores share the work, each a range of ids
# Bits sorted by in one pass, for up to so many ids: 2 ** bits counters are cleared and added up.
_DIGITS = ((1 << 12, 8), (1 << 15, 11), (1 << 62, 15))
_scratch = Scratch()


@host_jit
def _all_bits(ids):  # type: ignore[no-untyped-def]
    """The bits that any id has; negative if one is."""
    found = np.int64(0)
    for i in range(ids.size):
        found |= np.int64(ids[i])
    return found


@host_jit
def _pack(ids, low, high, keys, shift):  # type: ignore[no-untyped-def]
    """keys = id << shift | position of every id in [low, high); how many."""
    if low == 0 and high > ids.max():  # all of them: this loop is vectorised
        for i in range(ids.size):
            keys[i] = (uint64(ids[i]) << uint64(shift)) | uint64(i)
        return ids.size
    count = 0
    for i in range(ids.size):  # no branch: which way it goes cannot be guessed
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
    """From sorted keys: the distinct ids to unique[number:], their numbers to `inverse`."""
    mask = (uint64(1) << uint64(shift)) - uint64(1)
    at = number - 1
    for i in range(keys.size):
        one = keys[i] >> uint64(shift)
        if i == 0 or one != keys[i - 1] >> uint64(shift):
            at += 1
            unique[at] = one
        inverse[keys[i] & mask] = at


def _sorted(ids: np.ndarray, low: int, high: int, shift: int, bits: int) -> np.ndarray:
    """The keys of the ids in [low, high), rising; in a buffer of this thread's."""
    # One more than there are: a key is written before it is known to count.
    keys = _scratch.get("keys", 1, ids.size + 1, np.uint64)[0]
    keys = keys[: _pack(ids, low, high, keys, shift)]
    spare = _scratch.get("spare", 1, keys.size, np.uint64)[0]
    passes = -(-bits // next(digit for most, digit in _DIGITS if keys.size < most))
    if not passes:
        return keys
    return spare if _sort(keys, spare, shift, shift + bits, -(-bits // passes)) else keys


def distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 or int64 [n], any order -> (distinct ids, rising, same dtype [m]; inverse int32
    [n] with ids == distinct[inverse]).

    Raises IndexError for a negative id, ValueError for another dtype or shape and for more ids
    than fit beside an id's bits in 64 (2**32 of them below 2**31).
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
    pieces = cores() if count >= _SHARED else 1
    top = int(ids.max()) + 1 if pieces > 1 else 1 << bits
    edges = [top * i // pieces for i in range(pieces + 1)]
    keys: list[np.ndarray] = [unique] * pieces
    found = [0] * pieces

    def sort(begin: int, end: int) -> None:
        for i in range(begin, end):
            keys[i] = _sorted(ids, edges[i], edges[i + 1], shift, bits)
            if pieces > 1:  # a thread may get several
                keys[i] = keys[i].copy()
            found[i] = int(_count(keys[i], shift))

    def number(begin: int, end: int) -> None:
        for i in range(begin, end):
            _unique(keys[i], shift, sum(found[:i]), unique, inverse)

    for work in (sort, number):
        work(0, 1) if pieces == 1 else split(pieces, work)
    return unique[: sum(found)], inverse
