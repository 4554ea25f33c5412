"""Routed experts without capacity: tokens sorted by expert, then one matrix product per group.

Every assignment of a token to an expert gets a slot; slots are sorted by expert, so a group (the
slots of one expert) is contiguous and may have any size from none to all. Two paths, one function:

  ragged   three `lax.ragged_dot` over all slots: accelerators
  tiled    a loop over tiles of slots of one expert: CPUs, where ragged_dot multiplies every
           token with every expert (measured 30 times slower at 16 experts)

Both read tokens and return them by gathers alone, forward and backward: `slots` and `order` are
inverses, so the transpose of a gather is a gather: faster than a scatter, and deterministic.

Symbols beside config.py's: N = T k assignments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from engram_jax.layers.feed_forward import gated

RAGGED, TILED = "ragged", "tiled"
LARGEST_KEY = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Who sits where.

    order: int32 [N], slot -> assignment t * k + j.
    slots: int32 [T, k], the inverse: assignment -> slot.
    sizes: int32 [E], slots per expert; the groups follow one another in the order of experts.
    """

    order: jax.Array
    slots: jax.Array
    sizes: jax.Array


def sort_by_expert(experts: jax.Array, count: int) -> Routing:
    """experts int32 [T, k] in [0, count) -> Routing; an expert's slots keep the order of tokens."""
    flat = experts.reshape(-1).astype(jnp.int32)
    index = jnp.arange(flat.size, dtype=jnp.int32)
    if count * flat.size <= LARGEST_KEY:
        # One sort of unique keys: 4 times as fast on CPU as a stable argsort of pairs.
        order = jnp.sort(flat * flat.size + index) % flat.size
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    slots = jnp.zeros_like(flat).at[order].set(index, unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(count, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    return Routing(order, slots.reshape(experts.shape), sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def routed_swiglu(
    x: jax.Array,
    weights: jax.Array,
    routing: Routing,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    path: str | None = None,
) -> jax.Array:
    """y[t] = sum over j < k of weights[t, j] * SwiGLU_e(x[t]), e the j-th expert of token t.

    Args:
      x: [T, d], in the compute dtype.
      weights: [T, k], float32 or wider.
      routing: of `sort_by_expert`.
      gate, up: [E, d, f]; down: [E, f, d]; in the dtype of x.
      path: RAGGED, TILED, or None = TILED where it is lowered for a CPU and RAGGED elsewhere.

    Returns:
      [T, d] in the dtype of x.
    """
    return _forward(x, weights, routing, gate, up, down, path)[0]


def _forward(*args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    *inputs, path = args
    y, *kept = _choose(path, _tiled_forward, _ragged_forward)(*inputs)
    x, weights, routing = inputs[:3]
    wide = weights[..., None] * y[routing.slots].astype(weights.dtype)
    return jnp.sum(wide, axis=1).astype(x.dtype), (*inputs, *kept)


def _backward(path: str | None, residuals: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    routing = residuals[2]
    dx, dweights, *dmatrices = _choose(path, _tiled_backward, _ragged_backward)(*residuals, dy)
    dx = jnp.sum(dx[routing.slots], axis=1)
    return dx, dweights[routing.slots], None, *dmatrices


routed_swiglu.defvjp(_forward, _backward)


def _choose(path: str | None, tiled: Callable, ragged: Callable) -> Callable:
    if path is None:
        # Decided when lowering, so that compiling for a TPU on a CPU machine takes the TPU's path.
        return functools.partial(lax.platform_dependent, cpu=tiled, default=ragged)
    return {TILED: tiled, RAGGED: ragged}[path]


def _token_and_weight(weights: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
    """For every slot: which token sits there and with which weight."""
    return routing.order // weights.shape[1], weights.reshape(-1)[routing.order]


def _expert_backward(
    gate: jax.Array, up: jax.Array, dh: jax.Array, weight: jax.Array
) -> tuple[jax.Array, ...]:
    """h = SiLU(gate) up, and what follows from dh, the gradient of h before weighting: [rows, f].

    Returns (weight * h, dgate, dup, dweight); dweight = <h W_down, dy> = <h, dh> needs no output.
    """
    h, pull = jax.vjp(gated, gate, up)
    dweight = jnp.sum(h.astype(weight.dtype) * dh.astype(weight.dtype), axis=-1)
    dgate, dup = pull((dh * weight[:, None]).astype(h.dtype))
    return (h * weight[:, None]).astype(h.dtype), dgate, dup, dweight


# ---- ragged --------------------------------------------------------------------------------------


def _ragged_forward(
    x: jax.Array, weights: jax.Array, routing: Routing, *matrices: jax.Array
) -> tuple[jax.Array, ...]:
    """By slot: outputs [N, d] before weighting; kept for later: gate and up products [N, f]."""
    gate, up, down = matrices
    rows = x[_token_and_weight(weights, routing)[0]]
    g = lax.ragged_dot(rows, gate, routing.sizes)
    u = lax.ragged_dot(rows, up, routing.sizes)
    return lax.ragged_dot(gated(g, u), down, routing.sizes), g, u


def _ragged_backward(
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
    """By slot: dx [N, d], dweights [N]; then the gradients of gate, up and down."""
    token, weight = _token_and_weight(weights, routing)
    rows, drows = x[token], dy[token]

    def transposed(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return lax.ragged_dot(rows, matrices.swapaxes(1, 2), routing.sizes)

    def outer(rows: jax.Array, drows: jax.Array) -> jax.Array:
        dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return lax.ragged_dot_general(rows, drows, routing.sizes, dimensions)

    h, dg, du, dweight = _expert_backward(g, u, transposed(drows, down), weight)
    dx = transposed(dg, gate) + transposed(du, up)
    return dx, dweight, outer(rows, dg), outer(rows, du), outer(h, drows)


# ---- tiled ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """`width` slots from `first`; those with `mine` belong to `expert` and to this tile."""

    expert: jax.Array
    first: jax.Array
    width: int
    mine: jax.Array

    def read(self, rows: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(rows, self.first, self.width)

    def write(self, rows: jax.Array, values: jax.Array) -> jax.Array:
        mine = self.mine.reshape(-1, *(1,) * (rows.ndim - 1))
        values = jnp.where(mine, values.astype(rows.dtype), self.read(rows))
        return lax.dynamic_update_slice_in_dim(rows, values, self.first, 0)

    def of_expert(self, matrices: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(matrices, self.expert, keepdims=False)

    def add_outer(self, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """total[expert] += a^T b, in the dtype of `total`."""
        product = jnp.einsum("ri,rj->ij", a, b, preferred_element_type=total.dtype)
        value = self.of_expert(total) + product
        return lax.dynamic_update_index_in_dim(total, value, self.expert, 0)


def _tile_width(slots: int, experts: int) -> int:
    """A power of two about a quarter of the mean group, in [32, 128].

    Wider tiles multiply faster, half a tile per expert is wasted (measured: E 16..64, d 128..256).
    """
    wanted = max(1, slots // (4 * experts))
    return min(slots, max(32, min(128, 1 << (wanted - 1).bit_length())))


def _for_each_tile(routing: Routing, body: Callable[[_Tile, Any], Any], carry: Any) -> Any:
    """Run body over as many tiles as the groups need (a dynamic end: not to be differentiated)."""
    slots, experts = routing.order.size, routing.sizes.size
    width = _tile_width(slots, experts)
    tiles = (routing.sizes + width - 1) // width
    last_tile, last_slot = jnp.cumsum(tiles), jnp.cumsum(routing.sizes)
    tile = jnp.arange((slots + experts * (width - 1)) // width, dtype=jnp.int32)
    expert = jnp.sum(tile[:, None] >= last_tile, axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)  # tiles behind the last one, never run
    start = (last_slot - routing.sizes)[expert] + (tile - (last_tile - tiles)[expert]) * width
    end = last_slot[expert]
    first = jnp.minimum(start, slots - width)  # a tile never reaches over the end of the arrays

    def step(i: jax.Array, carry: Any) -> Any:
        index = first[i] + jnp.arange(width, dtype=jnp.int32)
        mine = (index >= start[i]) & (index < end[i])
        return body(_Tile(expert[i], first[i], width, mine), carry)

    return lax.fori_loop(0, last_tile[-1], step, carry)


def _tiled_forward(
    x: jax.Array, weights: jax.Array, routing: Routing, *matrices: jax.Array
) -> tuple[jax.Array, ...]:
    """As `_ragged_forward`."""
    token, _ = _token_and_weight(weights, routing)

    def body(tile: _Tile, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = x[tile.read(token)]
        gate, up, down = (tile.of_expert(m) for m in matrices)
        g, u = rows @ gate, rows @ up
        values = gated(g, u) @ down, g, u
        return tuple(tile.write(*pair) for pair in zip(carry, values, strict=True))

    slots, inner = token.size, matrices[0].shape[2]
    carry = tuple(jnp.zeros((slots, width), x.dtype) for width in (x.shape[1], inner, inner))
    return _for_each_tile(routing, body, carry)


def _tiled_backward(
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
    """As `_ragged_backward`; the matrices' gradients are summed over tiles in at least float32."""
    token, weight = _token_and_weight(weights, routing)

    def body(tile: _Tile, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dweight, dgate, dup, ddown = carry
        where = tile.read(token)
        rows, drows = x[where], dy[where]
        # Weight zero for slots of others: they add nothing to this expert's gradients.
        own = jnp.where(tile.mine, tile.read(weight), 0)
        dh = drows @ tile.of_expert(down).T
        h, dg, du, dw = _expert_backward(tile.read(g), tile.read(u), dh, own)
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
