"""The interface of an Engram layer's memory, and the memory whose table is on the device.

Otherwise stored rows are staged in host memory (staged_rows.py). The rows are the same to
the last bit.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.memory.table import lookup
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P, row_major

if TYPE_CHECKING:  # of the extra `serve`
    from engram_jax.memory.store.row_format import RowFormat

STATS = (
    *("lookups", "hits_device", "hits_host_cache"),
    *("moved_rows", "moved_bytes", "file_bytes", "seconds"),
)


class LayerMemory(Protocol):
    """One Engram layer's table."""

    def fetch(self, addresses: np.ndarray, real: np.ndarray | None = None) -> jax.Array:
        """int32 [B, S, H] -> rows [B, S, H, dim]. The host's work is done when this returns, the
        device's is dispatched. real: bool [B, S], others are padding and not counted as lookups;
        None: all. Raises UserError where stored rows cannot be read."""
        ...

    def stats(self) -> dict[str, float]:
        """lookups, of real tokens; hits_device, of these; hits_host_cache; moved_rows and
        moved_bytes, transferred to the device, with padding; file_bytes, of the blocks that were
        read and verified, from the disk or the page cache; seconds of the host."""
        ...


class DeviceMemory:
    """The whole table on the device.

    table: rows [R, dim] in natural order, or stored parts, uint8 [R, bytes_i], of `stored`.
    read: the compiled gather, (table, addresses) -> rows.
    """

    def __init__(self, program: Program, table: Any, stored: RowFormat | None = None):
        def read(table: Any, addresses: jax.Array) -> jax.Array:
            if stored is None:
                return lookup(table, addresses)
            return stored.decode(tuple(lookup(part, addresses) for part in table))

        replicated = NamedSharding(program.mesh, P())
        self._table, self.read = table, program.jit(read, out_shardings=replicated)
        self._lookups, self._seconds = 0, 0.0

    def fetch(self, addresses: np.ndarray, real: np.ndarray | None = None) -> jax.Array:
        began = time.perf_counter()
        rows = self.read(self._table, addresses)
        tokens = addresses[..., 0].size if real is None else int(real.sum())
        self._lookups += tokens * addresses.shape[-1]
        self._seconds += time.perf_counter() - began
        return rows

    def stats(self) -> dict[str, float]:
        found = dict.fromkeys(STATS, 0.0)
        found |= {"lookups": self._lookups, "hits_device": self._lookups}
        return found | {"seconds": self._seconds}


def on_device(program: Program, parts: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    """Stored parts, uint8 [R, bytes_i], on the device, row-major."""
    where = row_major(program.mesh, P(), 2)
    return tuple(jax.device_put(part, where) for part in parts)
