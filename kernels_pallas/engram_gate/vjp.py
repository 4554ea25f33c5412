"""The gate's kernels with their gradients.

Kept for the backward pass: the arguments, and of every token and branch four numbers (gate, score,
two reciprocal norms). Keys are computed again. Rounding to FP8 passes gradients through: they are
those of the same function of the rounded rows and weights, with products in the rows' own dtype.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import TPU, Choice
from kernels_pallas.engram_gate import gpu, reference, tpu, tpu_backward
from kernels_pallas.engram_gate.quantise import Quantised, quantise_weights

RECOMPUTED_AT_ONCE = 2048  # tokens whose keys the GPU's backward pass holds


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def engram_gate(
    rows: jax.Array | Quantised,
    weights: jax.Array | Quantised,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    eps: float,
    recipe: str | None,
    choice: Choice,
) -> tuple[jax.Array, jax.Array]:
    """As api.engram_gate with rows [T, C], weights [C, M + 1, d], streams [T, M, d]."""
    return _forward(rows, weights, streams, gain, bias, mask, eps, recipe, choice)[0]


def _forward(
    rows: Any,
    weights: Any,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    eps: float,
    recipe: str | None,
    choice: Choice,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    prepared = weights
    if recipe is not None and not isinstance(weights, Quantised):
        prepared = quantise_weights(weights, recipe)
    elif not isinstance(weights, Quantised):
        prepared = jnp.moveaxis(weights, 1, 0)
    kernel = tpu.forward if choice.kernel == TPU else gpu.forward
    out, stats = kernel(
        rows,
        prepared,
        jnp.moveaxis(streams, 1, 0),
        gain,
        bias,
        mask,
        eps=eps,
        recipe=recipe,
        interpret=choice.interpret,
    )
    kept = (rows, weights, streams, gain, bias, mask, stats)
    return (jnp.moveaxis(out, 0, 1), stats[:, : streams.shape[1]]), kept


def _backward(eps: float, recipe: str | None, choice: Choice, kept: tuple, g: tuple) -> tuple:
    rows, weights, streams, gain, bias, mask, stats = kept
    constant = isinstance(rows, Quantised), isinstance(weights, Quantised)
    dtype = jnp.bfloat16 if constant[0] else rows.dtype
    e, w = (x.astype(dtype) for x in reference.through_fp8(rows, weights, recipe))
    if choice.kernel == TPU:
        found = _products(e, w, streams, gain, bias, stats, g, choice.interpret)
    else:
        found = _recomputed(e, w, streams, gain, bias, mask, g, eps)
    d_rows, d_weights, d_streams, d_gain, d_bias = found
    return (
        None if constant[0] else d_rows.astype(rows.dtype),
        None if constant[1] else d_weights.astype(weights.dtype),
        d_streams,
        d_gain.astype(gain.dtype),
        None if bias is None else d_bias.astype(bias.dtype),
        None,
    )


def _products(
    rows: jax.Array,
    weights: jax.Array,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    stats: jax.Array,
    g: tuple[jax.Array, jax.Array],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The TPU kernel and the two products behind it, summed in float32."""
    columns = jnp.moveaxis(weights, 1, 0)
    d_projected, d_streams, d_gain, d_bias = tpu_backward.backward(
        rows,
        columns,
        jnp.moveaxis(streams, 1, 0),
        gain,
        bias,
        stats,
        jnp.moveaxis(g[0], 1, 0),
        g[1].astype(jnp.float32),
        interpret=interpret,
    )
    product = functools.partial(
        jnp.einsum, precision=_precision(rows.dtype), preferred_element_type=jnp.float32
    )
    d_rows = product("mtd,mcd->tc", d_projected, columns)
    d_weights = product("tc,mtd->mcd", rows, d_projected)
    return d_rows, jnp.moveaxis(d_weights, 0, 1), jnp.moveaxis(d_streams, 0, 1), d_gain, d_bias


def _precision(dtype: Any) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _recomputed(
    rows: jax.Array,
    weights: jax.Array,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    g: tuple[jax.Array, jax.Array],
    eps: float,
) -> tuple[jax.Array, ...]:
    """JAX's gradient of the reference, a few tokens at a time."""
    t = rows.shape[0]
    size = min(t, RECOMPUTED_AT_ONCE)
    parts = -(-t // size)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, parts * size - t), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(parts, size, *x.shape[1:])

    there = jnp.ones((t,), bool) if mask is None else mask
    bias = jnp.zeros((weights.shape[1:]), jnp.float32) if bias is None else bias
    shared = tuple(x.astype(jnp.float32) for x in (weights, gain, bias))

    def part(total: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        rows, streams, there, g_out, g_gate = inputs

        def gate(rows: jax.Array, streams: jax.Array, w: jax.Array, gain: jax.Array, b: jax.Array):
            w = w.astype(rows.dtype)
            return reference.engram_gate(rows, w, streams, gain, b, there, eps=eps)

        _, pullback = jax.vjp(gate, rows, streams, *shared)
        d_rows, d_streams, *d_shared = pullback((g_out, g_gate))
        return tuple(a + b for a, b in zip(total, d_shared, strict=True)), (d_rows, d_streams)

    inputs = (cut(rows), cut(streams), cut(there), cut(g[0]), cut(g[1].astype(jnp.float32)))
    zeros = tuple(jnp.zeros_like(x) for x in shared)
    (d_weights, d_gain, d_bias), (d_rows, d_streams) = jax.lax.scan(part, zeros, inputs)
    whole = (x.reshape(-1, *x.shape[2:])[:t] for x in (d_rows, d_streams))
    d_rows, d_streams = whole
    return d_rows, d_weights, d_streams, d_gain, d_bias


engram_gate.defvjp(_forward, _backward)
