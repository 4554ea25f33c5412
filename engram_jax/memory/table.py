"""The device-resident memory: one table per Engram layer, looked up by exact gather (equation 1).

A table never enters a differentiated function. The training step gathers its rows first, hands them
to the model as an input, and takes the gradient with respect to the rows; `row_gradients` sums
duplicates and `optim.rowwise_adam` applies them to the rows that were read. No table-sized gradient
exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

ONE_DRAW = 1 << 26  # numbers of a table that is drawn in one piece


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's table and its optimizer's moments.

    rows: [R, dim]; the heads one after another (address = head offset + hash mod head size).
    mu, nu: first and second moments of the rows, [R, dim] float32.
    """

    rows: jax.Array
    mu: jax.Array
    nu: jax.Array


# The tables of a model by layer id ("1", "14"): strings, being pytree keys and checkpoint names.
Memory = Mapping[str, Table]


def init_table(key: jax.Array, rows: int, dim: int, std: float, dtype: jnp.dtype) -> Table:
    """Rows ~ N(0, std^2) (the demo draws N(0, 1)), moments zero."""
    values = _normal(key, rows, dim, std, dtype)
    return Table(values, jnp.zeros((rows, dim), jnp.float32), jnp.zeros((rows, dim), jnp.float32))


def _normal(key: jax.Array, rows: int, dim: int, std: float, dtype: jnp.dtype) -> jax.Array:
    """N(0, std^2) [rows, dim]. Drawing takes several times its result's size, so a large table is
    drawn a few columns at a time (columns: any device can draw its own rows of them)."""
    columns = dim if rows * dim <= ONE_DRAW else math.gcd(dim, 4)

    def draw(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, (rows, columns), jnp.float32) * std).astype(dtype)

    def fill(i: jax.Array, values: jax.Array) -> jax.Array:
        drawn = draw(jax.random.fold_in(key, i))
        return jax.lax.dynamic_update_slice_in_dim(values, drawn, i * columns, axis=1)

    if columns == dim:
        return draw(key)
    return jax.lax.fori_loop(0, dim // columns, fill, jnp.zeros((rows, dim), dtype))


def init_memory(
    key: jax.Array, rows: Mapping[str, int], dim: int, std: float, dtype: jnp.dtype = jnp.float32
) -> dict[str, Table]:
    """All tables of a model; `rows` gives R per layer id."""
    keys = jax.random.split(key, max(1, len(rows)))
    return {
        layer: init_table(k, count, dim, std, dtype)
        for k, (layer, count) in zip(keys, rows.items(), strict=False)
    }


def lookup(rows: jax.Array, addresses: jax.Array) -> jax.Array:
    """Exact gather: rows [R, dim], addresses int32 [...] in [0, R) -> [..., dim]."""
    return rows.at[addresses].get(mode="promise_in_bounds")


def lookup_all(memory: Memory, addresses: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows for every Engram layer: addresses [B, T, H] -> [B, T, H, dim]."""
    return {layer: lookup(memory[layer].rows, ids) for layer, ids in addresses.items()}
