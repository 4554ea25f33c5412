"""Where rows come from: the protocol of every tier, and the tiers."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engram_jax.memory.store.counters import Counters, Stats
from engram_jax.memory.store.distinct_rows import distinct
from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.file_table import DiskTable
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.row_format import RowFormat

__all__ = ["CachedTable", "Counters", "DiskTable", "HostTable", "Source", "Stats", "distinct"]


class Source(Protocol):
    """One table, addresses in and stored bytes out.

    rows: R. format: what a row is. counters: what has been read so far (`counters.snapshot()`).
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
