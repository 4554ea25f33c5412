"""Engram layers and n-gram orders that are switched off (config.serve.off_layers, off_orders)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig, ServeConfig


def switched(
    engram: EngramConfig, off: ServeConfig, rows: Mapping[str, jax.Array]
) -> dict[str, jax.Array | None]:
    """What layers read of their rows, by Engram layer id: None for a layer that is off, which then
    adds nothing; of the others `of_orders`."""
    return {k: None if off.is_off(k) else of_orders(engram, off, x) for k, x in rows.items()}


def of_orders(engram: EngramConfig, off: ServeConfig, rows: jax.Array) -> jax.Array:
    """A layer's rows [..., H, dim], zero for the orders that are off."""
    if not off.off_orders:
        return rows
    on = [order not in off.off_orders for order in engram.orders]
    heads = jnp.repeat(jnp.array(on), engram.heads_per_order)
    return jnp.where(heads[:, None], rows, 0)
