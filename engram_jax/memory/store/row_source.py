"""The interface of every tier that stored rows are read from (dram, file_table, host_cache)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engram_jax.memory.store.counters import Counters
from engram_jax.memory.store.row_format import RowFormat


class RowSource(Protocol):
    """One table: reads stored bytes by address.

    rows: R. format: of a row. counters: what has been read so far (`counters.snapshot()`).
    """

    rows: int
    format: RowFormat
    counters: Counters

    def gather(self, ids: np.ndarray, out: tuple[np.ndarray, ...]) -> None:
        """Read rows `ids` into `out`; several threads may call at once.

        ids: int32 or int64 [n], any order, duplicates allowed, each in [0, rows).
        out: for each part uint8 [n, bytes_i], C-contiguous; may be a slice of a larger buffer.

        Raises IndexError for an id outside the table and ValueError for other shapes or dtypes,
        before anything is read; UserError for a file that is damaged.
        """
        ...
