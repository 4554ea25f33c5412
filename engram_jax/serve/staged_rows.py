"""The memory whose table is off the device (DRAM, a file), its hottest rows perhaps on it.

A `RowSource` (memory/store/) reads stored bytes, which are staged in host buffers, transferred, and
decoded on the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.memory.store.distinct_rows import distinct
from engram_jax.memory.store.file_table import DiskTable
from engram_jax.memory.store.host_cache import CachedTable
from engram_jax.memory.store.hot_rows import Slots
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.memory.store.row_source import RowSource
from engram_jax.memory.table import lookup
from engram_jax.model.program import Program
from engram_jax.serve.row_fetch import STATS, on_device
from engram_jax.sharding.rules import P

BUFFERS = 2  # one is filled while the other is transferred
MERGE_FROM = 4096  # lookups; below, finding the distinct ones takes longer than it saves


class StagedMemory:
    """A table off the device, with its most frequent rows on it if `hot` names some.

    hot: addresses, int32 or int64 [h].
    """

    def __init__(self, program: Program, source: RowSource, hot: np.ndarray | None = None):
        self.source, self._program = source, program
        self._replicated = NamedSharding(program.mesh, P())
        self._buffers = [_Buffers(source.format) for _ in range(BUFFERS)]
        self._turn, self._lock = 0, threading.Lock()
        self._hot: Any = None
        self._slots: Slots | None = None
        if hot is not None and len(hot):
            self._slots = Slots(hot)
            parts = source.format.empty(len(hot))
            # Bypassing a cache, which would count them as lookups.
            behind = source.source if isinstance(source, CachedTable) else source
            behind.gather(np.ascontiguousarray(hot), parts)
            self._hot = on_device(program, parts)
        self._before = self._behind()
        self._jitted: dict[bool, Callable] = {
            indexed: program.jit(
                partial(_assemble, source.format, indexed), out_shardings=self._replicated
            )
            for indexed in (False, True)
        }
        self._stats = dict.fromkeys(STATS, 0.0)

    def fetch(self, addresses: np.ndarray, real: np.ndarray | None = None) -> jax.Array:
        with self._lock:
            began = time.perf_counter()
            ids = np.ascontiguousarray(addresses).reshape(-1)
            counts = np.ones(ids.size, bool)
            if real is not None:
                counts = np.broadcast_to(real[..., None], addresses.shape).reshape(-1)
            wanted, index, on_device = self._plan(ids, counts)
            size = len(wanted) if index is None else _bucket(len(wanted), ids.size)
            buffers = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            parts = buffers.of(size)
            self.source.gather(wanted, tuple(part[: len(wanted)] for part in parts))
            staged = jax.device_put(parts, self._replicated)
            rows = self._jitted[index is not None](self._hot, staged, index)
            buffers.used_by(rows)
            stats = dict(self._stats)
            stats["lookups"] += int(np.count_nonzero(counts))
            stats["hits_device"] += on_device
            stats["moved_rows"] += len(wanted)
            stats["moved_bytes"] += sum(part.nbytes for part in parts)
            stats["moved_bytes"] += 0 if index is None else index.nbytes
            stats["seconds"] += time.perf_counter() - began
            self._stats = stats  # at once: `stats` does not wait for a fetch
            return rows.reshape(*addresses.shape, -1)

    def _plan(
        self, ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, int]:
        """(rows to read; for every lookup its index in the hot rows followed by the rows to read,
        None = the rows to read are the lookups in order; lookups that need no reading, of those
        that count)."""
        if self._slots is None:
            if ids.size < MERGE_FROM:
                return ids, None, 0
            wanted, inverse = distinct(ids)
            return wanted, inverse, 0
        slot = self._slots.find(ids)
        missing = np.flatnonzero(slot < 0)
        hits = int(np.count_nonzero(counts & (slot >= 0)))
        wanted, inverse = distinct(ids[missing])
        slot[missing] = inverse + len(self._slots)
        return wanted, slot, hits

    def stats(self) -> dict[str, float]:
        behind = self._behind().items()
        return self._stats | {name: value - self._before[name] for name, value in behind}

    def _behind(self) -> dict[str, float]:
        """The counts of the tiers below the device, including the reads that filled `hot`."""
        source, found = self.source, {"hits_host_cache": 0.0, "file_bytes": 0.0}
        if isinstance(source, CachedTable):
            found["hits_host_cache"] = source.counters.snapshot().hits
            source = source.source
        if isinstance(source, DiskTable):
            found["file_bytes"] = source.counters.snapshot().bytes_read
        return found


def _assemble(stored: RowFormat, indexed: bool, hot: Any, staged: Any, index: Any) -> jax.Array:
    """The rows of all lookups [n, dim] from stored bytes [m, bytes_i] and the hot rows' bytes."""
    if not indexed:
        return stored.decode(staged)
    if hot is None:
        return stored.decode(tuple(lookup(part, index) for part in staged))
    count = hot[0].shape[0]
    behind = (index >= count)[:, None]
    return stored.decode(
        tuple(
            jnp.where(
                behind,
                lookup(moved, jnp.maximum(index - count, 0)),
                lookup(kept, jnp.minimum(index, count - 1)),
            )
            for kept, moved in zip(hot, staged, strict=True)
        )
    )


def _bucket(rows: int, lookups: int) -> int:
    """`rows` rounded up to eighths of the lookups: few sizes, so that few programs are compiled."""
    unit = max(1, -(-lookups // 8))
    return max(1, -(-rows // unit)) * unit


class _Buffers:
    """Host memory that rows are staged in, until the device has decoded them.

    That the transfer has ended is not enough: if the device is a CPU, JAX uses an aligned host
    array in place (whatever `may_alias` says, for NumPy arrays), and these are aligned to save the
    copy.
    """

    def __init__(self, stored: RowFormat):
        self._stored, self._parts = stored, stored.empty(0)
        self._user: Any = ()

    def of(self, rows: int) -> tuple[np.ndarray, ...]:
        """Buffers of `rows` rows, uint8 [rows, bytes_i], free to be overwritten."""
        jax.block_until_ready(self._user)
        if len(self._parts[0]) < rows:
            self._parts = self._stored.empty(rows)
        return tuple(part[:rows] for part in self._parts)

    def used_by(self, rows: jax.Array) -> None:
        """Record the array computed from the buffers: they are free when it is ready."""
        self._user = rows
