"""From one gradient per lookup to one gradient per row: what the owner of a row applies."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Addresses from here up are out of range of every table: scatters drop them, gathers fill zeros.
# (Never -1, which would wrap.) Unused entries count up to the largest int32: all stay distinct.
LARGEST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowGradients:
    """Deduplicated gradients of the rows one step touched.

    addresses: int32 [N], ascending and distinct: `count` rows, then N - count values out of range.
    values: [N, dim] in at least float32, the summed gradient of each row, zero after `count`.
    count: int32 [], how many distinct rows the N lookups touched.
    """

    addresses: jax.Array
    values: jax.Array
    count: jax.Array

    def scaled(self, factor: jax.Array) -> RowGradients:
        """The same gradients times a scalar."""
        values = self.values * factor.astype(self.values.dtype)
        return RowGradients(self.addresses, values, self.count)


def out_of_range(size: int) -> jax.Array:
    """`size` distinct ascending addresses that no table has."""
    return jnp.arange(size, dtype=jnp.int32) + (LARGEST - size + 1)


def drop_all(gradients: RowGradients, condition: jax.Array) -> RowGradients:
    """Where `condition` (bool []) holds, no row is addressed: applying them changes nothing."""
    nowhere = out_of_range(gradients.addresses.size)
    addresses = jnp.where(condition, nowhere, gradients.addresses)
    return RowGradients(addresses, gradients.values, gradients.count)


def deduplicate(addresses: jax.Array, gradients: jax.Array) -> RowGradients:
    """Sum the gradients of equal addresses, in ascending order of position (so deterministically).

    Args:
      addresses: int32 [...], one per lookup, N in all.
      gradients: [..., dim], one per lookup.
    """
    addresses = addresses.reshape(-1)
    gradients = gradients.reshape(addresses.size, -1)
    gradients = gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32))
    size = addresses.size
    order = jnp.argsort(addresses, stable=True)
    ordered = addresses[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    slot = jnp.cumsum(first, dtype=jnp.int32) - 1
    sums = jnp.zeros_like(gradients).at[slot].add(gradients[order], indices_are_sorted=True)
    # The k-th distinct address stands where `first` is true for the k-th time.
    distinct = out_of_range(size).at[slot].set(ordered, indices_are_sorted=True)
    return RowGradients(distinct, sums, slot[-1] + 1)


def squared_norm(gradients: RowGradients) -> jax.Array:
    """Sum of squares of the summed row gradients: what the dense table gradient's norm would be."""
    return jnp.sum(jnp.square(gradients.values))
