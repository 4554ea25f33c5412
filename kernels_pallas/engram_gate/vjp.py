"""The gate's kernels with their gradients.

Residuals: the arguments, and for every token and branch four numbers (gate, score, two reciprocal
norms). Keys are recomputed. Rounding to FP8 passes gradients through: they are those of the same
function of the rounded rows and weights, with products in the rows' own dtype.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.dispatch import TPU, Choice
from kernels_pallas.engram_gate import gpu, reference, tpu, tpu_backward
from kernels_pallas.engram_gate.quantise import Quantised, quantise_weights

RECOMPUTED_AT_ONCE = 2048  # tokens whose keys the GPU's backward pass holds at a time


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
    kept = (rows, weights, streams, gain, bias, stats)
    return (jnp.moveaxis(out, 0, 1), stats[:, : streams.shape[1]]), kept


def _backward(eps: float, recipe: str | None, choice: Choice, kept: tuple, g: tuple) -> tuple:
    rows, weights, streams, gain, bias, stats = kept
    constant = isinstance(rows, Quantised), isinstance(weights, Quantised)
    dtype = jnp.bfloat16 if constant[0] else rows.dtype
    e, w = (x.astype(dtype) for x in reference.through_fp8(rows, weights, recipe))
    if choice.kernel == TPU:
        found = _products(e, w, streams, gain, bias, stats, g, choice.interpret)
    else:
        found = _recomputed(e, w, streams, gain, bias, stats, g, choice.interpret)
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
    """The gradients by the TPU kernel and the two products after it, summed in float32."""
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


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _recomputed(
    rows: jax.Array,
    weights: jax.Array,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    stats: jax.Array,
    g: tuple[jax.Array, jax.Array],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The equations of tpu_backward.py in plain jax.numpy, RECOMPUTED_AT_ONCE tokens at a time."""
    t, d = rows.shape[0], streams.shape[-1]
    size = min(t, RECOMPUTED_AT_ONCE)
    parts = -(-t // size)
    wide, gain = jnp.float32, gain.astype(jnp.float32)

    def product(dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
        if interpret:  # XLA on CPU lacks some products of bfloat16
            a, b = a.astype(wide), b.astype(wide)
        precision = _precision(a.dtype)
        return jnp.einsum(dimensions, a, b, precision=precision, preferred_element_type=wide)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, parts * size - t), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(parts, size, *x.shape[1:])

    def part(total: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        rows, h, stats, g_out, g_gate = inputs
        projected = product("tc,cmd->tmd", rows, weights)
        if bias is not None:
            projected = projected + bias.astype(wide)
        key, value = projected[:, :-1], projected[:, -1:]
        h, g_out = h.astype(wide), g_out.astype(wide)
        gate, s, r_h, r_key = (x[..., None] for x in jnp.split(stats, 4, axis=1))
        d_gate = jnp.sum(g_out * value, -1, keepdims=True) + g_gate[..., None]
        ds = d_gate * reference.slope_of_gate(s, gate)
        a, b, c = ds * r_h * r_key * d**-0.5, ds * s * r_key**2 / d, ds * s * r_h**2 / d
        d_key, d_h = a * h * gain - b * key, a * gain * key - c * h
        d_value = jnp.sum(gate * g_out, 1, keepdims=True)
        d_projected = jnp.concatenate([d_key, d_value], 1)
        sums = jnp.sum(a * h * key, 0), jnp.sum(d_projected, 0)
        d_projected = d_projected.astype(rows.dtype)
        sums = (product("tc,tmd->cmd", rows, d_projected), *sums)
        d_rows = product("tmd,cmd->tc", d_projected, weights)
        return jax.tree.map(jnp.add, total, sums), (d_rows, d_h.astype(streams.dtype))

    inputs = (split(rows), split(streams), split(stats), split(g[0]), split(g[1].astype(wide)))
    shapes = weights.shape, gain.shape, weights.shape[1:]
    sums, whole = lax.scan(part, tuple(jnp.zeros(x, wide) for x in shapes), inputs)
    d_rows, d_streams = (x.reshape(-1, *x.shape[2:])[:t] for x in whole)
    d_weights, d_gain, d_bias = sums
    return d_rows, d_weights, d_streams, d_gain, d_bias


engram_gate.defvjp(_forward, _backward)
