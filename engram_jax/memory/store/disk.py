"""A table in a file, larger than memory: mapped, read block by block, each block verified.

A page that is not in memory stops the thread that touches it for the time of a read, and a disk is
fast only with many reads under way. So blocks are announced (MADV_WILLNEED, which does not wait)
some dozens ahead of their use: one thread then gets what 64 threads get without (docs/log.md), and
the kernel reads nothing else (MADV_RANDOM: no read-ahead).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
from numba import types, uint64

from engram_jax.errors import UserError
from engram_jax.memory.store.gather import check_request, gather_rows, move_row, split
from engram_jax.memory.store.rows import RowFormat
from engram_jax.memory.store.stats import Counters
from engram_jax.memory.store.xxh64 import xxh64_at
from engram_jax.native import native

AHEAD = 64  # blocks announced ahead; more gains nothing, 16 loses a sixth
_SPLIT = 512  # rows from which several threads share a request
_WILLNEED, _PAGE = 3, 4096
_madvise: Any = types.ExternalFunction("madvise", types.intc(types.uintp, types.uintp, types.intc))


@dataclass(frozen=True)
class StoredPart:
    """One part of a table in a mapped file.

    name: of the tensor. data: uint8 [R, bytes]. checksums: uint64 [blocks], of `block_rows` rows
      each, the last one possibly fewer.
    """

    name: str
    data: np.ndarray
    checksums: np.ndarray
    block_rows: int

    def error(self, path: str, layer: str, block: int) -> UserError:
        first = block * self.block_rows
        last = min(first + self.block_rows, len(self.data)) - 1
        return UserError(
            f"{path}: layer {layer}, tensor {self.name}, block {block} (rows {first} to {last}):"
            " damaged, its XXH64 is not the stored one; copy the file again from its origin"
        )


@native
def _announce(start, block, block_bytes, end):  # type: ignore[no-untyped-def]
    first = (start + uint64(block) * block_bytes) & ~uint64(_PAGE - 1)
    last = min(start + uint64(block + 1) * block_bytes, end)
    _madvise(first, last - first, _WILLNEED)


@native
def _read(data, checksums, block_rows, ids, order, out, ahead, found):  # type: ignore[no-untyped-def]
    """Rows ids[order] -> out[order]; found[0]: blocks read, [1]: their bytes, [2]: the first
    damaged block, which ends it, or -1."""
    size = uint64(data.shape[1])
    start, to = uint64(data.ctypes.data), uint64(out.ctypes.data)
    end = start + uint64(data.shape[0]) * size
    block_bytes = uint64(block_rows) * size
    found[0], found[1], found[2] = 0, 0, -1
    asked = 0  # position in `order` up to which blocks are announced
    pending, last_asked, last_read = 0, -1, -1
    for i in range(order.size):
        while asked < order.size and pending < ahead:
            block = ids[order[asked]] // block_rows
            if block != last_asked:
                _announce(start, block, block_bytes, end)
                last_asked = block
                pending += 1
            asked += 1
        row = ids[order[i]]
        block = row // block_rows
        if block != last_read:
            first = start + uint64(block) * block_bytes
            length = min(block_bytes, end - first)
            if xxh64_at(first, length) != checksums[block]:
                found[2] = block
                return
            last_read = block
            pending -= ahead > 0
            found[0] += 1
            found[1] += length
        move_row(to + uint64(order[i]) * size, start + uint64(row) * size, size)


class DiskTable:
    """Stored bytes of all rows in a mapped file. A `Source`; thread-safe.

    The file must stay as it is: it is looked at again in every call, but one that shrinks or fails
    to be read within a call ends the process (SIGBUS), as with any mapped file.
    """

    def __init__(
        self,
        row_format: RowFormat,
        parts: Sequence[StoredPart],
        *,
        file: FileIO,
        layer: str,
        resident: dict[str, np.ndarray],
    ) -> None:
        """parts: as the format's. file: open, kept. resident: parts by suffix that were loaded
        into memory (and verified) already, uint8 [R, bytes_i]; they are not read from the file."""
        self.rows, self.format = len(parts[0].data), row_format
        self.counters = Counters()
        self._parts, self._file, self._layer = tuple(parts), file, layer
        self._resident, self._path = resident, str(file.name)
        self._size = os.fstat(file.fileno()).st_size

    def gather(self, ids: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
        """See `Source.gather`. Every block that a row is read from is verified: a damaged one
        raises UserError naming file, layer, tensor and rows; what `out` has then is undefined."""
        began = time.perf_counter()
        ids = check_request(ids, self.rows, out, self.format.parts)
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise UserError(f"{self._path}: changed its size while open; it must stay as it is")
        order = np.arange(ids.size)
        if ids.size > 1 and not (ids[1:] >= ids[:-1]).all():
            order = np.argsort(ids, kind="stable")  # a block is then read once
        read = 0
        for (suffix, _), part, buffer in zip(self.format.parts, self._parts, out, strict=True):
            if suffix in self._resident:
                gather_rows(self._resident[suffix], ids, buffer)
            else:
                read += self._gather(part, ids, order, buffer)
        self.counters.add(
            began, lookups=ids.size, hits=ids.size, rows_read=ids.size, bytes_read=read
        )

    def _gather(self, part: StoredPart, ids: np.ndarray, order: np.ndarray, out: np.ndarray) -> int:
        """One part of the rows; bytes of the blocks that were read."""
        pieces: list[np.ndarray] = []

        def work(begin: int, end: int) -> None:
            found = np.zeros(3, np.int64)
            some = order[begin:end]
            _read(part.data, part.checksums, part.block_rows, ids, some, out, AHEAD, found)
            pieces.append(found)

        if ids.size < _SPLIT:
            work(0, ids.size)
        else:
            split(ids.size, work, pool="disk")
        for found in pieces:
            if found[2] >= 0:
                raise part.error(self._path, self._layer, int(found[2]))
        return int(sum(found[1] for found in pieces))
