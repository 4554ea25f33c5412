"""The device-resident memory: one table per Engram layer, looked up by exact gather (equation 1).

A table never enters a differentiated function. The training step gathers its rows first, hands them
to the model as an input, and takes the gradient with respect to the rows; row_gradients.py sums
duplicates and training/optim/rowwise_adam.py applies them to the rows that were read. No
table-sized gradient exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

_MANY_ROWS, _DIVISIBLE = 1 << 16, 1 << 10  # of a device
ONE_DRAW = 1 << 26  # weights of the largest table that is drawn at once


@dataclass(frozen=True)
class TableLayout:
    """How the rows of one table are sharded; static.

    rows: R. devices: n. spare: how many of the last rows are zero at the start.
    """

    rows: int
    devices: int = 1
    spare: int = 0

    @property
    def rows_per_device(self) -> int:
        """L: rows per device, of which the last may be padding. A multiple of n, so that one
        all-to-all turns the stored into the natural order, and of many rows a multiple of 1,024,
        so that a checkpoint can divide them (Orbax divides by a divisor, and those of a sum of
        primes may be itself and 1)."""
        least = -(-self.rows // self.devices)
        unit = math.lcm(self.devices, _DIVISIBLE) if least > _MANY_ROWS else self.devices
        return -(-least // unit) * unit

    @property
    def stored(self) -> int:
        """n L: rows of the whole array."""
        return self.rows_per_device * self.devices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """One layer's table and its optimizer's moments.

    rows: [n L, dim] on n devices; the heads one after another (address = head offset + hash mod
      head size), row a at (a mod n) L + a // n (memory/exchange.py). Those from R on are padding.
    mu, nu: first and second moments of the rows, likewise, float32; None of a frozen table.
    """

    rows: jax.Array
    mu: jax.Array | None
    nu: jax.Array | None

    @property
    def moments(self) -> tuple[jax.Array, jax.Array]:
        """(mu, nu). Raises ValueError for a frozen table."""
        if self.mu is None or self.nu is None:
            raise ValueError("a frozen table has no moments")
        return self.mu, self.nu


# The tables of a model by layer id ("1", "14"): strings, being pytree keys and checkpoint names.
Tables = Mapping[str, Table]


def init_table(
    key: jax.Array,
    layout: TableLayout,
    dim: int,
    std: float,
    dtype: jnp.dtype,
    trained: bool = True,
) -> Table:
    """Rows ~ N(0, std^2) (the demo draws N(0, 1)), the same on any mesh; moments zero, none unless
    `trained`."""
    values = _normal(key, layout, dim, std, dtype)
    if not trained:
        return Table(values, None, None)
    zeros = jnp.zeros((layout.stored, dim), jnp.float32)
    return Table(values, zeros, zeros)


def _normal(
    key: jax.Array, layout: TableLayout, dim: int, std: float, dtype: jnp.dtype
) -> jax.Array:
    """N(0, std^2) [n L, dim] as stored. Drawing takes several times its result's size, so a large
    table is drawn a few columns at a time (columns: any device can draw its own rows of them)."""
    stored = layout.stored
    columns = dim if layout.rows * dim <= ONE_DRAW else math.gcd(dim, 4)

    def draw(key: jax.Array) -> jax.Array:
        # The generator counts along the natural order; device j owns [:, j].
        shape = (layout.rows_per_device, layout.devices, columns)
        drawn = (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
        drawn_rows = layout.rows - layout.spare
        if stored > drawn_rows:
            index = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * layout.devices
            index = index + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            drawn = jnp.where(index < drawn_rows, drawn, 0)
        return drawn.swapaxes(0, 1).reshape(stored, columns)

    def fill(i: jax.Array, values: jax.Array) -> jax.Array:
        drawn = draw(jax.random.fold_in(key, i))
        return jax.lax.dynamic_update_slice_in_dim(values, drawn, i * columns, axis=1)

    if columns == dim:
        return draw(key)
    return jax.lax.fori_loop(0, dim // columns, fill, jnp.zeros((stored, dim), dtype))


def init_memory(
    key: jax.Array,
    layouts: Mapping[str, TableLayout],
    dim: int,
    std: float,
    dtype: jnp.dtype = jnp.float32,
    trained: bool = True,
) -> dict[str, Table]:
    """All tables of a model; `layouts` by layer id. A table's initial values depend on its own
    layer id, not on which other tables exist."""
    return {
        layer: init_table(jax.random.fold_in(key, int(layer)), layout, dim, std, dtype, trained)
        for layer, layout in layouts.items()
    }


def lookup(rows: jax.Array, addresses: jax.Array) -> jax.Array:
    """Exact gather from a table in natural order (on one device: as stored): rows [R, dim],
    addresses int32 [...] in [0, R) -> [..., dim]."""
    return rows.at[addresses].get(mode="promise_in_bounds")
