"""Gathers rows of an array in memory by id, at close to the memory's bandwidth.

A row of a large table is in no cache, and a loop that waits for each reaches a tenth of the
bandwidth. So the cache lines of a row are prefetched some rows ahead, and the row is copied in
vectors. A small gather runs in the calling thread, a large one on all cores and with non-temporal
stores, so that the lines written need not be read first; numba's own parallel loops are not used,
because two threads cannot call them at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numba import uint64

from engram_jax.hardware.cores import cores
from engram_jax.hardware.numba_internals import (
    LINE,
    fence,
    host_jit,
    move_1,
    move_8,
    move_32,
    prefetch,
    stream_32,
)

AHEAD = 24  # rows; flat between 16 and 48 (benchmarks/host_gather.py)
INLINE_BYTES = 1 << 20  # below, handing over to other threads (tens of microseconds) costs more
_PIECES = 4  # chunks of work per core


@host_jit
def move_row(to, start, size):  # type: ignore[no-untyped-def]
    """Copy `size` bytes between two addresses (all uint64), for use in compiled loops."""
    done = uint64(0)
    while done + uint64(32) <= size:
        move_32(to + done, start + done)
        done += uint64(32)
    while done + uint64(8) <= size:
        move_8(to + done, start + done)
        done += uint64(8)
    while done < size:
        move_1(to + done, start + done)
        done += uint64(1)


@host_jit
def prefetch_row(start, size):  # type: ignore[no-untyped-def]
    """Prefetch every cache line of a row, for use in compiled loops."""
    end = start + size
    line = start & ~uint64(LINE - 1)
    while line < end:
        prefetch(line)
        line += uint64(LINE)


@host_jit
def _gather(table, ids, out, ahead, streams):  # type: ignore[no-untyped-def]
    size = uint64(table.shape[1])
    start, to = uint64(table.ctypes.data), uint64(out.ctypes.data)
    count = ids.size
    for i in range(min(ahead, count)):
        prefetch_row(start + uint64(ids[i]) * size, size)
    for i in range(count):
        if i + ahead < count:
            prefetch_row(start + uint64(ids[i + ahead]) * size, size)
        here, row = to + uint64(i) * size, start + uint64(ids[i]) * size
        if streams:
            done = uint64(0)
            while done < size:
                stream_32(here + done, row + done)
                done += uint64(32)
        else:
            move_row(here, row, size)
    if streams:
        fence()


@host_jit
def _first_outside(ids, rows):  # type: ignore[no-untyped-def]
    wrong = 0
    for i in range(ids.size):  # no early exit, so that the loop is vectorised
        wrong |= (ids[i] < 0) | (ids[i] >= rows)
    if wrong:
        for i in range(ids.size):
            if ids[i] < 0 or ids[i] >= rows:
                return i
    return -1


def check_request(
    ids: np.ndarray, rows: int, out: Sequence[np.ndarray], parts: Sequence[tuple[str, int]]
) -> np.ndarray:
    """The ids of a `gather`, contiguous, after checking the whole request.

    Raises IndexError for an id outside [0, rows), ValueError for ids other than int32 or int64 [n]
    and for buffers other than C-contiguous uint8 [n, bytes_i].
    """
    if ids.ndim != 1 or ids.dtype not in (np.int32, np.int64):
        raise ValueError(f"ids {ids.dtype} {list(ids.shape)}: must be int32 or int64 [n]")
    if len(out) != len(parts):
        raise ValueError(f"{len(out)} buffers: must be one for each of {len(parts)} parts")
    for buffer, (name, size) in zip(out, parts, strict=True):
        if buffer.shape != (ids.size, size) or buffer.dtype != np.uint8:
            raise ValueError(
                f"buffer of part {name}: {buffer.dtype} {list(buffer.shape)}, must be uint8"
                f" [{ids.size}, {size}]"
            )
        if not buffer.flags.c_contiguous:
            raise ValueError(f"buffer of part {name}: must be C-contiguous")
    ids = np.ascontiguousarray(ids)
    at = _first_outside(ids, rows)
    if at >= 0:
        raise IndexError(f"row {ids[at]} (position {at}): must be in 0 to {rows - 1}")
    return ids


def gather_rows(table: np.ndarray, ids: np.ndarray, out: np.ndarray, ahead: int = AHEAD) -> None:
    """table uint8 [R, b], ids int [n], each in [0, R) (not checked) -> out uint8 [n, b]; all
    C-contiguous."""
    if out.nbytes < INLINE_BYTES:
        _gather(table, ids, out, ahead, False)
    else:
        streams = out.shape[1] % 32 == 0 and out.ctypes.data % 32 == 0
        split(ids.size, lambda a, b: _gather(table, ids[a:b], out[a:b], ahead, streams))


def split(count: int, work: Callable[[int, int], None], pool: str = "memory") -> None:
    """Run work(begin, end) over [0, count) on all cores, in the calling thread and those of a pool.

    `work` must not call `split` with the same pool again, and work that may wait for a disk has a
    separate pool. There are more chunks than cores, and a free thread takes the next one: a core
    that is busy with other work does not delay the rest."""
    threads = min(cores(), count)
    chunks = max(1, min(_PIECES * threads, count))
    edges = [count * i // chunks for i in range(chunks + 1)]
    left = iter(range(chunks))  # the GIL serialises `next`

    def take() -> None:
        for i in left:
            work(edges[i], edges[i + 1])

    waiting = [_pool(pool).submit(take) for _ in range(1, threads)]
    try:
        take()
    finally:
        for future in waiting:
            if not future.cancel():  # cancelled: it had not started, and no work is left
                future.exception()  # no chunk may still be written when the caller continues
    for future in waiting:
        if not future.cancelled():
            future.result()


@cache
def _pool(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix=f"engram-{name}")


if hasattr(os, "register_at_fork"):  # a child process has the pool object without its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
