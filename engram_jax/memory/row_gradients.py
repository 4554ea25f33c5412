"""Deduplicates lookups, and sums their gradients to one per distinct row."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Unused entries count up to this: distinct sentinels past the end of every table, so scatters drop
# them and gathers fill zeros. (Never -1, which would wrap.)
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

    def only_if(self, condition: jax.Array) -> RowGradients:
        """Unless `condition` (bool []) holds, no row is addressed: applying changes nothing."""
        nowhere = out_of_range(self.addresses.size)
        addresses = jnp.where(condition, self.addresses, nowhere)
        return RowGradients(addresses, self.values, self.count)


def out_of_range(size: int) -> jax.Array:
    """`size` distinct ascending addresses past the end of every table, int32."""
    return jnp.arange(size, dtype=jnp.int32) + (LARGEST - size + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Distinct:
    """Which rows N lookups read.

    order: int32 [N], the lookups sorted by row; equal rows keep the order of lookups.
    slot: int32 [N], for each place in `order`, which distinct row is read there.
    rows: int32 [N], ascending and distinct: `count` rows, then N - count values out of range.
    count: int32 [].
    """

    order: jax.Array
    slot: jax.Array
    rows: jax.Array
    count: jax.Array


def find_distinct(addresses: jax.Array, below: int = LARGEST) -> Distinct:
    """The distinct rows among addresses int32 [N], all in [0, below)."""
    lookups = addresses.size
    if below * lookups <= LARGEST:
        # One sort of unique keys: a CPU sorts them 4 times as fast as pairs.
        index = jnp.arange(lookups, dtype=jnp.int32)
        keys = jnp.sort(addresses * lookups + index)
        ordered, order = keys // lookups, keys % lookups
    else:
        order = jnp.argsort(addresses, stable=True).astype(jnp.int32)
        ordered = addresses[order]
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    slot = jnp.cumsum(first, dtype=jnp.int32) - 1
    # The k-th distinct address is where `first` is true for the k-th time.
    rows = out_of_range(addresses.size).at[slot].set(ordered, indices_are_sorted=True)
    return Distinct(order, slot, rows, slot[-1] + 1)


def sum_equal(gradients: jax.Array, distinct: Distinct) -> jax.Array:
    """Gradients [N, dim], one per lookup -> [N, dim] in at least float32, one sum per distinct row,
    then zeros. Equal rows are added in ascending order of position, so deterministically."""
    wide = gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32))
    return jnp.zeros_like(wide).at[distinct.slot].add(wide[distinct.order], indices_are_sorted=True)


def deduplicate(addresses: jax.Array, gradients: jax.Array) -> RowGradients:
    """Row gradients from addresses int32 [...] and gradients [..., dim], one of each per lookup."""
    distinct = find_distinct(addresses.reshape(-1))
    sums = sum_equal(gradients.reshape(addresses.size, -1), distinct)
    return RowGradients(distinct.rows, sums, distinct.count)


def squared_norm(gradients: RowGradients) -> jax.Array:
    """Sum of squares of the summed row gradients: what the dense table gradient's norm would be."""
    return jnp.sum(jnp.square(gradients.values))
