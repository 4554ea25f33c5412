"""Opens a memory file: one model's tables, written by --mode=export-memory (write_file.py).

Opening takes constant time whatever the size: it reads and checks the header. Rows are verified
when they are read (`disk`) or loaded (`host`). Both first read the table's checksums, a 500th of
its size, and `disk` keeps them in memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import open_file, reason_of
from engram_jax.memory.store.dram import HostTable, host_array
from engram_jax.memory.store.file_format import (
    CHECKSUM,
    HEADER_CHECKSUM,
    MOST_HEADER,
    PAGE,
    Header,
    parse_header,
    tensor_name,
)
from engram_jax.memory.store.file_table import PUT_BACK, DiskTable, OpenFile, StoredPart
from engram_jax.memory.store.write_file import write_memory
from engram_jax.memory.store.xxh64 import block_checksums, xxh64

__all__ = ["MemoryFile", "open_memory", "write_memory"]

_LOAD = 1 << 26  # bytes that are read and verified at a time


class MemoryFile:
    """An open memory file; create it with `open_memory`.

    layers: (rows, row format) by layer id. fingerprint: of the addressing the rows belong to.
    metadata: the strings given to `write_memory`, and the format's own.
    """

    def __init__(self, file: OpenFile, start: int, header: Header) -> None:
        """start: bytes before the data."""
        self.layers = {layer: (h.rows, h.format) for layer, h in header.layers.items()}
        self.fingerprint = header.metadata["fingerprint"]
        self.metadata = dict(header.metadata)
        self._file, self._start, self._header = file, start, header

    def disk(self, layer: str, resident: tuple[str, ...] = ()) -> DiskTable:
        """A layer's table, read from the file.

        resident: suffixes of parts to load into memory nevertheless. ("scale",) halves the disk
        reads of FP8 rows and takes a 33rd of the table.
        Raises UserError for a layer that the file does not have, for a damaged resident part, and
        if the file has changed since it was opened.
        """
        parts, row_format = self._parts(layer), self.layers[layer][1]
        suffixes = [suffix for suffix, _ in row_format.parts]
        if unknown := set(resident) - set(suffixes):
            raise UserError(f"resident part {min(unknown)!r}: must be one of {', '.join(suffixes)}")
        loaded = {
            suffix: self._load(layer, part)
            for suffix, part in zip(suffixes, parts, strict=True)
            if suffix in resident
        }
        self._check_same()
        self._file.expect_random()
        return DiskTable(row_format, parts, file=self._file, layer=layer, resident=loaded)

    def host(self, layer: str) -> HostTable:
        """A layer's table, loaded into memory; every block is verified.
        Raises UserError for a layer that the file does not have, and for a damaged block."""
        loaded = [self._load(layer, part) for part in self._parts(layer)]
        self._check_same()
        return HostTable(self.layers[layer][1], loaded)

    def _check_same(self) -> None:
        """Raises UserError unless everything read so far is from the file as it was opened."""
        if self._file.changed:
            raise UserError(f"{self._file.path}: was changed while it was opened; {PUT_BACK}")

    def _parts(self, layer: str) -> list[StoredPart]:
        if layer not in self._header.layers:
            have = shown(", ".join(self.layers))
            raise UserError(f"{self._file.path}: has no layer {layer!r}; it has {have}")
        head = self._header.layers[layer]
        found = []
        for (suffix, size), block_rows in zip(head.format.parts, head.block_rows, strict=True):
            name = tensor_name(layer, suffix)
            tensors = self._header.tensors
            sums, data = tensors[name + CHECKSUM], self._start + tensors[name].begin
            checksums = np.empty(sums.shape, "<u8")
            self._file.read(checksums, self._start + sums.begin)
            found.append(StoredPart(name, data, head.rows, size, checksums, block_rows))
        return found

    def _load(self, layer: str, part: StoredPart) -> np.ndarray:
        """One part's rows in memory, verified."""
        table = host_array(part.rows, part.row_bytes)
        flat = table.reshape(-1)
        step = max(1, _LOAD // part.block_bytes) * part.block_bytes
        for begin in range(0, flat.size, step):
            chunk = flat[begin : begin + step]
            self._file.read(chunk, part.start + begin)
            first = begin // part.block_bytes
            sums = block_checksums(chunk, part.block_bytes)
            wrong = np.flatnonzero(sums != part.checksums[first : first + len(sums)])
            if wrong.size:
                raise part.damaged(self._file, layer, first + int(wrong[0]))
        return table


def open_memory(path: str | Path, fingerprint: str | None = None) -> MemoryFile:
    """Open a file that `write_memory` wrote; checks header, sizes, types and fingerprint.

    fingerprint: of the addressing that rows will be looked up with; None = any.
    Raises UserError, one line, for a file that is missing, truncated, damaged or of another format,
    and for one that belongs to another addressing.
    """
    try:
        file = OpenFile(open_file(path))
        start, header = _header(file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({reason_of(error)})") from error
    except ValueError as error:
        raise UserError(f"{shown(path)}: no usable memory file: {error}") from error
    found = header.metadata["fingerprint"]
    if fingerprint is not None and found != fingerprint:
        raise UserError(
            f"{shown(path)}: made for addressing {shown(found)}, this model has {fingerprint}: its"
            " tables would be read at the wrong rows"
        )
    return MemoryFile(file, start, header)


def _header(file: OpenFile) -> tuple[int, Header]:
    """(bytes before the data, the header). Raises ValueError for any other file."""
    size, number = file.size, file.number
    if size < 8:
        raise ValueError(f"{size} bytes, too short for a header")
    length = int.from_bytes(os.pread(number, 8, 0), "little")
    if not 2 <= length <= min(MOST_HEADER, size - 8):
        raise ValueError(
            f"the header's length is {length}: must be 2 to {min(MOST_HEADER, size - 8)}"
        )
    if (8 + length) % PAGE:
        raise ValueError(f"the data begins at {8 + length}: must be a multiple of {PAGE}")
    text = os.pread(number, length, 8)
    header, start = parse_header(text, size - 8 - length), 8 + length
    stored = os.pread(number, 8, start + header.tensors[HEADER_CHECKSUM].begin)
    if int.from_bytes(stored, "little") != xxh64(text):
        raise ValueError("damaged: the header's XXH64 is not the stored one")
    for name, tensor in header.tensors.items():
        if name.endswith(".padding"):
            zeros = os.pread(number, tensor.end - tensor.begin, start + tensor.begin)
            if any(zeros):
                raise ValueError(f"damaged: {name} is not zero")
    return start, header
