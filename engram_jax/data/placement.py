"""Finds this process's rows of a global batch, and makes sharded arrays over the mesh from them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from engram_jax.data.packing import Batch
from engram_jax.sharding.rules import BATCH, P


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch on this process's devices, int64, ascending.

    No device order is assumed: a mesh follows the interconnect, and with a tensor axis two
    processes may have the same rows.
    """
    shards = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[at] for at in shards.values()]))


def place_batch(mesh: Mesh, batch: Batch, batch_size: int) -> dict[str, Any]:
    """This process's rows of a batch -> arrays of the whole batch [B, ...], over the mesh."""
    sharding = NamedSharding(mesh, P(BATCH))
    rows = rows_here(mesh, batch_size)

    def place(x: np.ndarray) -> jax.Array:
        shape, shards = (batch_size, *x.shape[1:]), []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            start, stop, _ = index[0].indices(batch_size)  # type: ignore[index]
            first = int(np.searchsorted(rows, start))
            shards.append(jax.device_put(x[first : first + stop - start], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(place, batch)
