"""A table whose stored rows are in host memory."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Sequence

import numpy as np

from engram_jax.memory.store.counters import Counters
from engram_jax.memory.store.gather_rows import check_request, gather_rows
from engram_jax.memory.store.row_format import RowFormat

_HUGE = 1 << 21  # bytes of a huge page


def host_array(rows: int, size: int, *, huge_pages: bool = True) -> np.ndarray:
    """Zeros, uint8 [rows, size], outside Python's heap.

    Reading a random row of a large table misses the TLB, too: huge pages (where the kernel gives
    them on request, /sys/kernel/mm/transparent_hugepage/enabled) make that cheap.
    """
    if rows * size < _HUGE:
        return np.zeros((rows, size), np.uint8)
    memory = mmap.mmap(-1, rows * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(rows, size)


class HostTable:
    """Stored bytes of all rows in DRAM. A `RowSource`; thread-safe."""

    def __init__(self, row_format: RowFormat, parts: Sequence[np.ndarray]) -> None:
        """parts: uint8 [R, bytes_i] for each part of the format, C-contiguous; kept, not copied.
        Raises ValueError for other shapes."""
        sizes = [size for _, size in row_format.parts]
        rows = len(parts[0]) if parts else 0
        if [(p.shape, p.dtype) for p in parts] != [((rows, s), np.dtype(np.uint8)) for s in sizes]:
            shapes = ", ".join(f"{p.dtype} {list(p.shape)}" for p in parts)
            raise ValueError(f"parts {shapes}: must be uint8 [rows, {sizes}]")
        if not all(part.flags.c_contiguous for part in parts):
            raise ValueError("parts: must be C-contiguous")
        self.rows, self.format, self.parts = rows, row_format, tuple(parts)
        self.counters = Counters()

    @classmethod
    def from_rows(cls, row_format: RowFormat, rows: np.ndarray) -> HostTable:
        """The table of rows float32 or bfloat16 [R, dim]. Errors: as `RowFormat.encode`."""
        return cls(row_format, row_format.encode(rows))

    def gather(self, ids: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
        """See `RowSource.gather`."""
        began = time.perf_counter()
        ids = check_request(ids, self.rows, out, self.format.parts)
        for part, buffer in zip(self.parts, out, strict=True):
            gather_rows(part, ids, buffer)
        count = ids.size
        self.counters.add(
            began,
            lookups=count,
            hits=count,
            rows_read=count,
            bytes_read=count * self.format.row_bytes,
        )
