"""Reads blocks of a file that is larger than memory, by system calls inside a compiled loop.

A page that is not in memory blocks the thread that reads it until the disk has answered, and a disk
is fast only with many reads in flight. So a block is read at once if the page cache has it
(RWF_NOWAIT), else announced (POSIX_FADV_WILLNEED, which does not wait) and read after some dozens
more have been announced: one thread then reads as fast as 64 threads do without (docs/log.md).

A memory mapping would save the copy, but a mapped file that is truncated, or on a disk that fails,
kills the process (SIGBUS), and bytes may change between verification and use. Here either is an
error of the call, and a copy is verified.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from numba import int64, types, uint64

from engram_jax.hardware.numba_internals import c_function, host_jit
from engram_jax.memory.store.gather_rows import move_row
from engram_jax.memory.store.xxh64 import xxh64_at

DAMAGED, UNREADABLE = 1, 2
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_WILLNEED = getattr(os, "POSIX_FADV_WILLNEED", 0)
_pread: Any = c_function("pread", types.intp, types.intc, types.uintp, types.uintp, types.int64)

if sys.platform == "linux" and _NOWAIT:
    _preadv2: Any = c_function(
        "preadv2", types.intp, types.intc, types.uintp, types.intc, types.int64, types.intc
    )

    @host_jit
    def _cached(file, vector, to, size, at):  # type: ignore[no-untyped-def]
        """Whether `size` bytes at `at` were in the page cache; they are then at address `to`.
        Also False where the file system does not support the question."""
        vector[0], vector[1] = to, size  # struct iovec
        return _preadv2(file, vector.ctypes.data, 1, at, _NOWAIT) == size

else:

    @host_jit
    def _cached(file, vector, to, size, at):  # type: ignore[no-untyped-def]
        return False


if hasattr(os, "posix_fadvise"):
    _advise: Any = c_function(
        "posix_fadvise", types.intc, types.intc, types.int64, types.int64, types.intc
    )

    @host_jit
    def _announce(file, at, size):  # type: ignore[no-untyped-def]
        _advise(file, at, size, _WILLNEED)

else:

    @host_jit
    def _announce(file, at, size):  # type: ignore[no-untyped-def]
        pass


@host_jit
def _whole(file, to, size, at):  # type: ignore[no-untyped-def]
    """Whether `size` bytes at `at` could be read to address `to`."""
    done = uint64(0)
    while done < size:
        got = _pread(file, to + done, size - done, at + int64(done))
        if got <= 0:  # an error, or the file's end
            return False
        done += uint64(got)
    return True


@host_jit
def read_rows(  # type: ignore[no-untyped-def]
    file, start, rows, block_rows, checksums, ids, order, out, buffer, waiting, found
):
    """Read rows ids[order], where rows of a block are adjacent, to out[order], uint8 [n, bytes].

    file: a descriptor; row 0 of its `rows` is at byte `start`. checksums: uint64 [blocks], XXH64 of
    `block_rows` rows each. buffer: uint8, one block. waiting: int64 [a, 2]: up to `a` blocks, at
    least 1, are announced before the first of them is read.
    found: int64 [4], filled: blocks read; their bytes; the block that failed, and why: DAMAGED,
    UNREADABLE, or 0 for none.
    """
    size, to, here = out.shape[1], uint64(out.ctypes.data), uint64(buffer.ctypes.data)
    vector = np.empty(2, np.uint64)
    found[:] = 0
    next_, first, count = 0, 0, 0  # of `order`; of `waiting`, a ring
    while next_ < order.size or count:
        ahead = next_ < order.size and count < len(waiting)
        if ahead:
            begin = next_
            block = int64(ids[order[begin]]) // block_rows
            while next_ < order.size and int64(ids[order[next_]]) // block_rows == block:
                next_ += 1
            end = next_
        else:
            begin, end = waiting[first]
            block = int64(ids[order[begin]]) // block_rows
            first, count = (first + 1) % len(waiting), count - 1
        at = start + block * block_rows * size
        length = min(block_rows, rows - block * block_rows) * size
        if ahead:
            if not _cached(file, vector, here, uint64(length), at):
                _announce(file, at, length)
                last = (first + count) % len(waiting)
                waiting[last, 0], waiting[last, 1], count = begin, end, count + 1
                continue
        elif not _whole(file, here, uint64(length), at):
            found[2], found[3] = block, UNREADABLE
            return
        if xxh64_at(here, length) != checksums[block]:
            found[2], found[3] = block, DAMAGED
            return
        found[0] += 1
        found[1] += length
        for i in range(begin, end):
            inside = uint64(int64(ids[order[i]]) - block * block_rows) * uint64(size)
            move_row(to + uint64(order[i]) * uint64(size), here + inside, uint64(size))
