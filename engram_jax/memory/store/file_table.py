"""A table in a file larger than memory, read block by block; every block's checksum is verified."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO

import numpy as np

from engram_jax.config.errors import UserError
from engram_jax.memory.store.block_reads import DAMAGED, read_rows
from engram_jax.memory.store.counters import Counters
from engram_jax.memory.store.gather_rows import check_request, gather_rows, split
from engram_jax.memory.store.reused_buffers import Scratch
from engram_jax.memory.store.row_format import RowFormat

AHEAD = 64  # blocks announced ahead; more gains nothing, 16 loses a sixth
_SPLIT = 512  # rows from which several threads share a request


class OpenFile:
    """A file that is read by position; it remembers size and times at opening."""

    def __init__(self, file: FileIO) -> None:
        self.number, self.path, self._file = file.fileno(), str(file.name), file
        self._then = self._now()

    def _now(self) -> tuple[int, int, int]:
        found = os.fstat(self.number)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    @property
    def size(self) -> int:
        """Bytes at opening."""
        return self._then[0]

    @property
    def changed(self) -> bool:
        """Whether its contents or attributes have been written to since."""
        return self._now() != self._then

    def check_size(self) -> None:
        """Raises UserError if it has grown or shrunk."""
        if (size := os.fstat(self.number).st_size) != self.size:
            raise UserError(
                f"{self.path}: changed its size while open, from {self.size} to {size} bytes;"
                f" {PUT_BACK}"
            )

    def expect_random(self) -> None:
        """Turn off the kernel's read-ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, into: np.ndarray, at: int) -> None:
        """Fill a C-contiguous array with the bytes from `at` on. Raises UserError."""
        view = into.reshape(-1).view(np.uint8).data
        while len(view):
            try:
                done = os.preadv(self.number, [view], at)
            except OSError as error:
                reason = error.strerror or str(error)
                raise UserError(f"{self.path}: cannot be read at byte {at} ({reason})") from error
            if done == 0:
                raise UserError(f"{self.path}: ends at byte {at}, it was longer when opened")
            view, at = view[done:], at + done


PUT_BACK = "put it back, or start again; to replace a file that is in use, mv another over it"


@dataclass(frozen=True)
class StoredPart:
    """One part of a table in a file.

    name: of the tensor. start: its first byte in the file. rows: R. row_bytes: bytes per row.
    checksums: uint64 [blocks], in memory, of `block_rows` rows each; the last may have fewer.
    """

    name: str
    start: int
    rows: int
    row_bytes: int
    checksums: np.ndarray
    block_rows: int

    @property
    def block_bytes(self) -> int:
        return self.block_rows * self.row_bytes

    def where(self, layer: str, block: int) -> str:
        """The name of a block in error messages."""
        first = block * self.block_rows
        last = min(first + self.block_rows, self.rows) - 1
        return f"layer {layer}, tensor {self.name}, block {block} (rows {first} to {last})"

    def damaged(self, file: OpenFile, layer: str, block: int) -> UserError:
        """The error for a block whose checksum differs."""
        if file.changed:
            what = f"was changed while the file was open; {PUT_BACK}"
        else:
            what = "damaged, its XXH64 is not the stored one; copy the file again from its origin"
        return UserError(f"{file.path}: {self.where(layer, block)}: {what}")

    def unreadable(self, file: OpenFile, layer: str, block: int) -> UserError:
        """The error for a block that could not be read whole; reads it again to find out why."""
        begin = block * self.block_bytes
        size = min(self.block_bytes, self.rows * self.row_bytes - begin)
        try:
            file.read(np.empty(size, np.uint8), self.start + begin)
        except UserError as error:
            return UserError(f"{error}; in {self.where(layer, block)}")
        return UserError(f"{file.path}: {self.where(layer, block)}: could not be read just now")


class DiskTable:
    """Stored bytes of all rows in a file. A `RowSource`; thread-safe.

    The checksums are kept in memory, 8 bytes for a block of about 4 KiB, as they were when the file
    was opened: rows that are written into it later fail verification and are never served. Nothing
    that happens to the file kills the process.
    """

    def __init__(
        self,
        row_format: RowFormat,
        parts: Sequence[StoredPart],
        *,
        file: OpenFile,
        layer: str,
        resident: dict[str, np.ndarray],
    ) -> None:
        """parts: in the format's order. file: must stay open. resident: parts by suffix that are
        already in memory (and verified), uint8 [R, bytes_i]; they are not read from the file."""
        self.rows, self.format = parts[0].rows, row_format
        self.counters = Counters()
        self._parts, self._file, self._layer = tuple(parts), file, layer
        self._resident, self._scratch = resident, Scratch()

    def gather(self, ids: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
        """See `RowSource.gather`. Every block that a row is read from is verified: one that is
        damaged, changed or cannot be read raises UserError naming file, layer, tensor and rows;
        the contents of `out` are then undefined."""
        began = time.perf_counter()
        ids = check_request(ids, self.rows, out, self.format.parts)
        self._file.check_size()
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
        """Read one part of the rows; returns the bytes of the blocks that were read."""
        results: list[np.ndarray] = []

        def work(begin: int, end: int) -> None:
            found = np.zeros(4, np.int64)
            read_rows(
                self._file.number,
                part.start,
                part.rows,
                part.block_rows,
                part.checksums,
                ids,
                order[begin:end],
                out,
                self._scratch.get("block", 1, part.block_bytes, np.uint8)[0],
                self._scratch.get("waiting", max(1, AHEAD), 2, np.int64),
                found,
            )
            results.append(found)

        if ids.size < _SPLIT:
            work(0, ids.size)
        else:
            split(ids.size, work, pool="disk")
        if wrong := [(int(block), why) for _, _, block, why in results if why]:
            block, why = min(wrong)  # the first block, whichever thread was first
            tell = part.damaged if why == DAMAGED else part.unreadable
            raise tell(self._file, self._layer, block)
        return int(sum(found[1] for found in results))
