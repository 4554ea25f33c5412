"""Grouped products by `lax.ragged_dot`, of all slots or chunk by chunk (see grouped_matmul.py).

Rows after the last group, and sums over a group without rows, are whatever `ragged_dot` leaves
there (zeros on a CPU, uninitialised memory elsewhere): they are masked at once, since 0 * NaN is
not 0. Where every row is in a group there are no such rows, and no pass over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from engram_jax.layers.feed_forward import gated
from engram_jax.layers.grouped_routing import Routing, expert_backward, token_and_weight


def ragged_forward(
    x: jax.Array, weights: jax.Array, routing: Routing, *matrices: jax.Array
) -> tuple[jax.Array, ...]:
    """By slot: outputs [N, d] before weighting; residuals: gate and up products [N, f]."""
    gate, up, down = matrices
    product = partial(_product, sizes=routing.sizes, whole=routing.whole)
    rows = x[token_and_weight(weights, routing)[0]]
    g, u = product(rows, gate), product(rows, up)
    return product(gated(g, u), down), g, u


def ragged_backward(
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
    token, weight = token_and_weight(weights, routing)
    rows, drows = x[token], dy[token]
    sizes = routing.sizes
    transposed = partial(_transposed, sizes=sizes, whole=routing.whole)
    h, dg, du, dweight = expert_backward(g, u, transposed(drows, down), weight)
    dx = transposed(dg, gate) + transposed(du, up)
    return dx, dweight, _outer(rows, dg, sizes), _outer(rows, du, sizes), _outer(h, drows, sizes)


def _product(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, whole: bool = False
) -> jax.Array:
    """rows [N, a] times each group's matrix [a, b]: [N, b], zero after the last group.

    whole: there are no rows after the last group.
    """
    products = lax.ragged_dot(rows, matrices, sizes)
    if whole:
        return products
    inside = jnp.arange(len(rows)) < jnp.sum(sizes)
    return jnp.where(inside[:, None], products, 0)


def _transposed(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, whole: bool = False
) -> jax.Array:
    """rows [N, f] times each group's matrix [d, f], transposed: [N, d]."""
    return _product(rows, matrices.swapaxes(1, 2), sizes, whole)


def _outer(rows: jax.Array, drows: jax.Array, sizes: jax.Array) -> jax.Array:
    """The sum of outer products of each group: [N, a], [N, b] -> [E, a, b]. Rows after the last
    group are in none; they are tokens or zeros: finite where the loss is."""
    dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    sums = lax.ragged_dot_general(rows, drows, sizes, dimensions)
    return jnp.where(sizes[:, None, None] > 0, sums, 0)


# ---- chunked ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Slots [start, start + width): their assignments, tokens, weights, and share of each group."""

    assignment: jax.Array
    token: jax.Array
    weight: jax.Array
    sizes: jax.Array


def _for_each_chunk(
    width: int,
    weights: jax.Array,
    routing: Routing,
    body: Callable[[_Chunk, Any], Any],
    carry: Any,
) -> Any:
    """Run body over the chunks that hold slots of a group (a dynamic trip count)."""
    last = jnp.cumsum(routing.sizes)
    order = jnp.pad(routing.order, (0, -routing.order.size % width))

    def step(i: jax.Array, carry: Any) -> Any:
        start = i * width
        index = start + jnp.arange(width, dtype=jnp.int32)
        filled = index < last[-1]
        slots = lax.dynamic_slice_in_dim(order, start, width)
        # Out of range after the last group: reads give zeros, writes are dropped.
        assignment = jnp.where(filled, slots, weights.size)
        weight = weights.reshape(-1).at[assignment].get(mode="fill", fill_value=0)
        inside = jnp.clip(last, start, start + width)
        sizes = inside - jnp.clip(last - routing.sizes, start, start + width)
        chunk = _Chunk(assignment, assignment // weights.shape[1], weight, sizes)
        return body(chunk, carry)

    return lax.fori_loop(0, (last[-1] + width - 1) // width, step, carry)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def chunked_forward(
    width: int, x: jax.Array, weights: jax.Array, routing: Routing, *matrices: jax.Array
) -> tuple[jax.Array, ...]:
    """y [T, d]; nothing is kept for the backward pass, which computes gate and up again."""
    gate, up, down = matrices

    def body(chunk: _Chunk, y: jax.Array) -> jax.Array:
        rows = _rows(x, chunk.token)
        g, u = _product(rows, gate, chunk.sizes), _product(rows, up, chunk.sizes)
        out = _product(gated(g, u), down, chunk.sizes)
        out = out.astype(y.dtype) * chunk.weight[:, None].astype(y.dtype)
        return y.at[chunk.token].add(out, mode="drop")

    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = _for_each_chunk(width, weights, routing, body, jnp.zeros(x.shape, wide))
    return (y.astype(x.dtype),)


def chunked_backward(
    width: int,
    x: jax.Array,
    weights: jax.Array,
    routing: Routing,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, ...]:
    def body(chunk: _Chunk, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dweights, dgate, dup, ddown = carry
        rows, drows = _rows(x, chunk.token), _rows(dy, chunk.token)
        g, u = _product(rows, gate, chunk.sizes), _product(rows, up, chunk.sizes)
        dh = _transposed(drows, down, chunk.sizes)
        h, dg, du, dweight = expert_backward(g, u, dh, chunk.weight)
        drow = _transposed(dg, gate, chunk.sizes) + _transposed(du, up, chunk.sizes)
        return (
            dx.at[chunk.token].add(drow.astype(dx.dtype), mode="drop"),
            dweights.at[chunk.assignment].set(dweight, mode="drop", unique_indices=False),
            dgate + _outer(rows, dg, chunk.sizes).astype(dgate.dtype),
            dup + _outer(rows, du, chunk.sizes).astype(dup.dtype),
            ddown + _outer(h, drows, chunk.sizes).astype(ddown.dtype),
        )

    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = [jnp.zeros(m.shape, wide) for m in (x, gate, up, down)]
    carry = (sums[0], jnp.zeros((weights.size,), weights.dtype), *sums[1:])
    dx, dweights, *dmatrices = _for_each_chunk(width, weights, routing, body, carry)
    return (
        dx.astype(x.dtype),
        dweights.reshape(weights.shape),
        *(m.astype(x.dtype) for m in dmatrices),
    )
