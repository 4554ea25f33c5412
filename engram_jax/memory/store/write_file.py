"""Writing a memory file: any size in constant memory, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from engram_jax.config.errors import UserError
from engram_jax.hardware.storage import replacing
from engram_jax.memory.store.file_format import (
    CHECKSUM,
    HEADER_CHECKSUM,
    LayerHeader,
    Tensor,
    block_rows,
    plan_tensors,
    tensor_name,
    to_bytes,
)
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.xxh64 import block_checksums, xxh64

_PIECE = 1 << 23  # bytes of rows that are encoded at a time

# Of one layer: row format, number of rows, and the rows in order, in chunks of any length, float32
# or bfloat16 [n, dim].
LayerRows = tuple[RowFormat, int, Iterable[np.ndarray]]


def write_memory(
    path: str | Path,
    layers: Mapping[str, LayerRows],
    fingerprint: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the tables of a model; the format is in `header`.

    layers: by layer id. fingerprint: `Addressing.fingerprint`. metadata: strings for the header.

    The file appears under its name when all of it is on the disk, and replaces another of that
    name; on any error nothing is left. (A process that is killed leaves PATH.xxxxxxxx.partial.)

    Raises UserError for chunks that are not as many rows as promised, for what
    `RowFormat.encode` refuses, and for a disk that is full or cannot be written.
    """
    path = Path(path)
    heads = {}
    for layer, (row_format, rows, _) in layers.items():
        if not (layer.isascii() and layer.isalnum()):
            raise UserError(f"layer {layer!r}: a layer id must be letters and digits")
        if rows < 1:
            raise UserError(f"layer {layer}: {rows} rows, must be at least 1")
        heads[layer] = LayerHeader(row_format, rows, block_rows(row_format))
    head = to_bytes(heads, fingerprint, metadata or {})
    try:
        with replacing(path) as file:
            _write(file.fileno(), head, heads, layers)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _write(
    file: int, head: bytes, heads: Mapping[str, LayerHeader], layers: Mapping[str, LayerRows]
) -> None:
    tensors, start = plan_tensors(heads), len(head)
    os.ftruncate(file, start + tensors[HEADER_CHECKSUM].end)  # padding: what nobody writes is zero
    _put(file, np.frombuffer(head, np.uint8), 0)
    for layer, (row_format, rows, chunks) in layers.items():
        parts = [
            _Part(file, start, tensors, tensor_name(layer, suffix), size * block)
            for (suffix, size), block in zip(row_format.parts, heads[layer].block_rows, strict=True)
        ]
        count = 0
        for chunk in _pieces(chunks, row_format.dim):
            try:
                encoded = row_format.encode(chunk)
            except UserError as error:
                raise UserError(f"layer {layer}, in the rows from {count} on: {error}") from error
            count += len(chunk)
            if count > rows:
                break
            for part, data in zip(parts, encoded, strict=True):
                part.add(data.reshape(-1))
        if count != rows:
            more = "more" if count > rows else f"only {count}"
            raise UserError(f"layer {layer}: {rows} rows were promised and {more} came")
        for part in parts:
            part.finish()
    total = np.array([xxh64(head[8:])], "<u8")
    _put(file, total.view(np.uint8), start + tensors[HEADER_CHECKSUM].begin)


def _pieces(chunks: Iterable[np.ndarray], dim: int) -> Iterator[np.ndarray]:
    step = max(1, _PIECE // (4 * dim))
    for chunk in chunks:
        chunk = np.asarray(chunk)
        if chunk.ndim == 0:
            raise UserError("a chunk of rows: must be an array [n, dim]")
        for begin in range(0, len(chunk), step):
            yield chunk[begin : begin + step]


class _Part:
    """One data tensor and its checksums, written from front to back."""

    def __init__(
        self, file: int, start: int, tensors: Mapping[str, Tensor], name: str, block_bytes: int
    ) -> None:
        self._file, self._block_bytes = file, block_bytes
        self._at = start + tensors[name].begin
        self._sums_at = start + tensors[name + CHECKSUM].begin
        self._open = np.empty(0, np.uint8)  # of a block that is not complete

    def add(self, data: np.ndarray) -> None:
        _put(self._file, data, self._at)
        self._at += data.size
        joined = np.concatenate([self._open, data]) if self._open.size else data
        whole = joined.size - joined.size % self._block_bytes
        self._sum(joined[:whole])
        self._open = joined[whole:].copy()

    def finish(self) -> None:
        self._sum(self._open)

    def _sum(self, data: np.ndarray) -> None:
        sums = block_checksums(data, self._block_bytes).astype("<u8")
        _put(self._file, sums.view(np.uint8), self._sums_at)
        self._sums_at += sums.nbytes


def _put(file: int, data: np.ndarray, at: int) -> None:
    view = data.data
    while len(view):
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done
