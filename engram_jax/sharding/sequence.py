"""Which tokens of a sequence a device of the mesh's sequence axis has, and how it gets others.

With S devices along the axis a sequence is 2 S chunks, and device i has two of them, one behind the
other:

    device      0         1        ..   S - 1
    chunks    0, 2S-1   1, 2S-2         S-1, S

A token sees the earlier ones only, so a device that had the last 2 / S of a sequence would compute
almost 2 S - 1 times the scores of the first; an early and a late chunk together are the same work
on every device. "Device order" is this order of a sequence's tokens, "natural order" that of the
text.

The functions that communicate run inside shard_map. C: tokens of a chunk, T = 2 S C.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AXIS = "sequence"


def chunks_in_device_order(shards: int) -> list[int]:
    """The chunks' numbers in natural order, as the devices have them."""
    return [chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)]


def tokens_in_device_order(length: int, shards: int) -> np.ndarray:
    """The tokens' places in natural order, int32 [T], as the devices have them."""
    places = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return places[chunks_in_device_order(shards)].reshape(-1)


def device_order(x: jax.Array, shards: int, axis: int = 1) -> jax.Array:
    """Tokens along `axis` from natural to device order."""
    return _reordered(x, chunks_in_device_order(shards), axis) if shards > 1 else x


def natural_order(x: jax.Array, shards: int, axis: int = 1) -> jax.Array:
    """The inverse of `device_order`."""
    order = np.argsort(chunks_in_device_order(shards)).tolist()
    return _reordered(x, order, axis) if shards > 1 else x


def _reordered(x: jax.Array, order: list[int], axis: int) -> jax.Array:
    """The equal parts of an axis in another order: slices, which a device copies one by one."""
    size = x.shape[axis] // len(order)
    parts = [lax.slice_in_dim(x, n * size, (n + 1) * size, axis=axis) for n in order]
    return jnp.concatenate(parts, axis=axis)


def own(x: jax.Array, shards: int) -> jax.Array:
    """This device's tokens of a whole sequence: [B, T, ...] in natural order -> [B, T / S, ...]."""
    size = x.shape[1] // shards
    ordered = device_order(x, shards)
    return lax.dynamic_slice_in_dim(ordered, lax.axis_index(AXIS) * size, size, axis=1)


def whole(x: jax.Array, shards: int, axis: int = 1) -> jax.Array:
    """All devices' tokens along `axis`, in natural order; on every device."""
    return natural_order(lax.all_gather(x, AXIS, axis=axis, tiled=True), shards, axis)


def chunk_starts(chunk: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Where in the sequence this device's two chunks of C tokens begin, int32 [] each."""
    index = lax.axis_index(AXIS)
    return index * chunk, (2 * shards - 1 - index) * chunk


def before(x: jax.Array, count: int, shards: int) -> jax.Array:
    """The `count` <= C tokens before each of this device's chunks: [B, 2 C, ...] ->
    [B, 2, count, ...]; zeros before the sequence."""
    first, second = (part[:, -count:] for part in jnp.split(x, 2, axis=1))
    up = [(i, i + 1) for i in range(shards - 1)]
    # Chunk i - 1 is the first one of the device before; what is before a late chunk is the second
    # one of the device after, but for the last device, which has both chunks in the middle.
    earlier = lax.ppermute(first, AXIS, up)
    later = lax.ppermute(second, AXIS, [(after, i) for i, after in up])
    later = jnp.where(lax.axis_index(AXIS) == shards - 1, first, later)
    return jnp.stack([earlier, later], axis=1)
