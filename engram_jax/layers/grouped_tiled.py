"""Grouped products for CPUs: a loop over tiles of one expert's slots (see grouped_matmul.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from engram_jax.layers.feed_forward import gated
from engram_jax.layers.grouped_routing import Routing, expert_backward, token_and_weight


@dataclass(frozen=True)
class _Tile:
    """`width` slots from `first`; those with `mine` belong to `expert` and to this tile.

    mine: bool [width], or None where all of them do.
    """

    expert: jax.Array
    first: jax.Array
    width: int
    mine: jax.Array | None

    def read(self, rows: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(rows, self.first, self.width)

    def write(self, rows: jax.Array, values: jax.Array) -> jax.Array:
        values = values.astype(rows.dtype)
        if self.mine is not None:
            mine = self.mine.reshape(-1, *(1,) * (rows.ndim - 1))
            values = jnp.where(mine, values, self.read(rows))
        return lax.dynamic_update_slice_in_dim(rows, values, self.first, 0)

    def own(self, values: jax.Array) -> jax.Array:
        """values [width], zero in slots that belong to other experts or tiles."""
        return values if self.mine is None else jnp.where(self.mine, values, 0)

    def of_expert(self, matrices: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(matrices, self.expert, keepdims=False)

    def add_outer(self, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """total[expert] += a^T b, in the dtype of `total`."""
        product = jnp.einsum("ri,rj->ij", a, b, preferred_element_type=total.dtype)
        value = self.of_expert(total) + product
        return lax.dynamic_update_index_in_dim(total, value, self.expert, 0)


def _tile_width(slots: int, experts: int) -> int:
    """A power of two, about a quarter of the mean group, in [32, 128].

    Wider tiles multiply faster; half a tile per expert is wasted (measured: E 16..64, d 128..256).
    """
    wanted = max(1, slots // (4 * experts))
    return min(slots, max(32, min(128, 1 << (wanted - 1).bit_length())))


def _for_each_tile(routing: Routing, body: Callable[[_Tile, Any], Any], carry: Any) -> Any:
    """Run body over as many tiles as the groups need (dynamic trip counts: no gradients).

    First the full tiles of all groups, which need no mask, then what is left of each group.
    """
    slots, experts = routing.order.size, routing.sizes.size
    width = _tile_width(slots, experts)
    end = jnp.cumsum(routing.sizes)
    full = routing.sizes // width
    rest = end - routing.sizes % width  # where an expert's last, partial tile begins
    owner, number, full_tiles = _listed(full, slots // width)
    start = (end - routing.sizes)[owner] + number * width
    unfinished, _, rests = _listed((rest < end).astype(jnp.int32), min(slots, experts))

    def whole(i: jax.Array, carry: Any) -> Any:
        return body(_Tile(owner[i], start[i], width, None), carry)

    def part(i: jax.Array, carry: Any) -> Any:
        expert = unfinished[i]
        first = jnp.minimum(rest[expert], slots - width)  # not past the end of the arrays
        index = first + jnp.arange(width, dtype=jnp.int32)
        mine = (index >= rest[expert]) & (index < end[expert])
        return body(_Tile(expert, first, width, mine), carry)

    carry = lax.fori_loop(0, full_tiles, whole, carry)
    return lax.fori_loop(0, rests, part, carry)


def _listed(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One entry for each of the tiles that are counted, in the order of experts.

    counts: int32 [E], tiles per expert, in sum at most `most`.
    Returns the expert of each tile and the tile's number among that expert's, int32 [most] both
    (without meaning after the last tile), and the number of tiles, int32 [].
    """
    last = jnp.cumsum(counts)
    index = jnp.arange(most, dtype=jnp.int32)
    owner = jnp.sum(index[:, None] >= last, axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, counts.size - 1)  # entries after the last one
    return owner, index - (last - counts)[owner], last[-1]


def tiled_forward(
    x: jax.Array, weights: jax.Array, routing: Routing, *matrices: jax.Array
) -> tuple[jax.Array, ...]:
    """As `ragged_forward`."""
    token, _ = token_and_weight(weights, routing)

    def body(tile: _Tile, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = x[tile.read(token)]
        gate, up, down = (tile.of_expert(m) for m in matrices)
        g, u = rows @ gate, rows @ up
        values = gated(g, u) @ down, g, u
        return tuple(tile.write(*pair) for pair in zip(carry, values, strict=True))

    slots, inner = token.size, matrices[0].shape[2]
    carry = tuple(jnp.zeros((slots, width), x.dtype) for width in (x.shape[1], inner, inner))
    return _for_each_tile(routing, body, carry)


def tiled_backward(
    x: jax.Array,
    weights: jax.Array,
    routing: Routing,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    g: jax.Array,
    u: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, ...]:
    """As `ragged_backward`; the matrices' gradients are summed over tiles in at least float32."""
    token, weight = token_and_weight(weights, routing)

    def body(tile: _Tile, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dweight, dgate, dup, ddown = carry
        where = tile.read(token)
        rows, drows = x[where], dy[where]
        # Weight zero for other experts' slots: they add nothing to this one's gradients.
        own = tile.own(tile.read(weight))
        dh = drows @ tile.of_expert(down).T
        h, dg, du, dw = expert_backward(tile.read(g), tile.read(u), dh, own)
        return (
            tile.write(dx, dg @ tile.of_expert(gate).T + du @ tile.of_expert(up).T),
            tile.write(dweight, dw),
            tile.add_outer(dgate, rows, dg),
            tile.add_outer(dup, rows, du),
            tile.add_outer(ddown, h, drows),
        )

    wide = jnp.promote_types(x.dtype, jnp.float32)
    totals = [jnp.zeros(m.shape, wide) for m in (gate, up, down)]
    empty = jnp.zeros((token.size, x.shape[1]), x.dtype), jnp.zeros_like(weight)
    dx, dweight, *totals = _for_each_tile(routing, body, (*empty, *totals))
    return dx, dweight, *(m.astype(x.dtype) for m in totals)
