"""The distinct rows of a batch: read each once, in the order they lie in.

The device expands: it gets the distinct rows and, for every lookup, the number of its row.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from engram_jax.memory.store.native import native

_SMALL = (
    4096  # ids; fewer are sorted by 8 bits at a time, because clearing 2,048 counters costs more
)
_BITS = 11


@native
def _pack(ids, keys, shift):  # type: ignore[no-untyped-def]
    """keys = id << shift | position; the bits that any id has, -1 for a negative one."""
    any_bits = np.int64(0)
    for i in range(ids.size):
        one = np.int64(ids[i])
        any_bits |= one
        keys[i] = (uint64(one) << uint64(shift)) | uint64(i)
    return np.int64(-1) if any_bits < 0 else any_bits


@native
def _sort(keys, spare, low, high, digit_bits):  # type: ignore[no-untyped-def]
    """Radix sort of uint64 keys by their bits [low, high); True: the result is in `spare`."""
    buckets = 1 << digit_bits
    ends = np.empty(buckets, np.int64)
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


@native
def _unique(keys, shift, unique, inverse):  # type: ignore[no-untyped-def]
    mask = (uint64(1) << uint64(shift)) - uint64(1)
    count = -1
    last = uint64(0)
    for i in range(keys.size):
        one = keys[i] >> uint64(shift)
        if count < 0 or one != last:
            count += 1
            unique[count] = one
            last = one
        inverse[keys[i] & mask] = count
    return count + 1


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
    shift = max(1, (count - 1).bit_length())
    keys, spare = np.empty(count, np.uint64), np.empty(count, np.uint64)
    any_bits = int(_pack(np.ascontiguousarray(ids), keys, shift))
    if any_bits < 0:
        raise IndexError(f"row {int(ids.min())}: must be at least 0")
    bits = any_bits.bit_length()
    if bits + shift > 64 or count > 1 << 31:
        raise ValueError(f"{count} ids of {bits} bits: too many for one call")
    digit = 8 if count < _SMALL else _BITS
    passes = -(-bits // digit)
    digit = -(-bits // max(1, passes))
    swapped = _sort(keys, spare, shift, shift + bits, digit) if bits else False
    found = _unique(spare if swapped else keys, shift, unique, inverse)
    return unique[:found], inverse
