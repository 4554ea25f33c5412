"""The gate of Engram in plain jax.numpy: the definition of the operation, also run on CPUs.

It rounds as the kernels do: rows and weights are multiplied in the rows' dtype, but the products
are summed and kept in float32, and so is everything after them, up to the gated value, which is
rounded once to the streams' dtype. (Keys in bfloat16 could change the sign of a score near 0, where
the gate is steepest: README.md.) Backward, the gradients of keys and value are rounded to the rows'
dtype for the two products after them, which are again summed in float32. FP8 is dequantised to
float32 and multiplied in it; backward in the dtype of the unquantised rows (bfloat16 if there are
none).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.engram_gate import quantise
from kernels_pallas.engram_gate.quantise import Quantised
from kernels_pallas.remat import keeps_arguments

# |s| is clamped to at least this in the square root (as in the official demo): a finite slope.
SMALLEST_SCORE = 1e-6


def keys_and_value(
    rows: jax.Array, weights: jax.Array, bias: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Equation 3: rows [..., C], weights [C, M + 1, d] -> keys [..., M, d], value [..., 1, d], both
    in at least float32. dtype: that of the products in the backward pass."""
    out = _projected(rows, weights.astype(rows.dtype), dtype)
    if bias is not None:
        out = out + bias.astype(out.dtype)
    return out[..., :-1, :], out[..., -1:, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _projected(rows: jax.Array, weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """rows [..., C] times weights [C, M + 1, d] of the same dtype, in at least float32. JAX's own
    gradient would multiply in float32, the kernels multiply in the rows' dtype.

    All products are of matrices: with more axes XLA's CPU compiler transposes the operands."""
    out = _product(_matrix(rows, 1), _matrix(weights, 2), ([1], [0]))
    return out.reshape(*rows.shape[:-1], *weights.shape[1:])


def _matrix(x: jax.Array, axes: int) -> jax.Array:
    """x with its last `axes` axes as one, and the others as one."""
    columns = math.prod(x.shape[-axes:])
    return x.reshape(x.size // columns, columns)


def _product(a: jax.Array, b: jax.Array, contracted: tuple[list[int], list[int]]) -> jax.Array:
    """A product with exact terms and sums in at least float32, whatever the platform's default."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == wide else None
    return lax.dot_general(
        a, b, (contracted, ([], [])), precision=precision, preferred_element_type=wide
    )


def _projected_forward(
    rows: jax.Array, weights: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple]:
    like = jnp.zeros((), rows.dtype)  # the dtype of rows and weights
    kept = rows.astype(dtype), weights.astype(dtype), like
    return _projected(rows, weights, dtype), kept


def _projected_backward(dtype: jnp.dtype, kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, weights, like = kept
    gradient = _matrix(g.astype(dtype), 2)
    d_rows = _product(gradient, _matrix(weights, 2), ([1], [1])).reshape(rows.shape)
    d_weights = _product(_matrix(rows, 1), gradient, ([0], [0])).reshape(weights.shape)
    return d_rows.astype(like.dtype), d_weights.astype(like.dtype)


_projected.defvjp(_projected_forward, _projected_backward)


def gate_of_score(s: jax.Array) -> jax.Array:
    """sigmoid(sign(s) sqrt(max(|s|, 1e-6))): the signed square root is the official demo's."""
    return jax.nn.sigmoid(jnp.sign(s) * jnp.sqrt(jnp.maximum(jnp.abs(s), SMALLEST_SCORE)))


def slope_of_gate(s: jax.Array, gate: jax.Array) -> jax.Array:
    """d gate / d s: 0 where |s| is clamped to 1e-6, and for a masked token (gate 0)."""
    slope = 0.5 * lax.rsqrt(jnp.maximum(jnp.abs(s), SMALLEST_SCORE))
    return gate * (1 - gate) * jnp.where(jnp.abs(s) > SMALLEST_SCORE, slope, 0)


def gates(streams: jax.Array, keys: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Equation 4: streams [..., M, d] and keys [..., M, d] -> gates [..., M] in the keys' dtype.

    gain: [M, d], the product of both norms' gains.
    """
    dtype = keys.dtype
    h = streams.astype(dtype)
    # <RMSNorm(h), RMSNorm(key)> without storing either norm: the scales are per token.
    dot = jnp.sum(h * keys * gain.astype(dtype), axis=-1)
    scale = lax.rsqrt(jnp.mean(h * h, axis=-1) + eps)
    scale = scale * lax.rsqrt(jnp.mean(keys * keys, axis=-1) + eps)
    return gate_of_score(dot * scale / jnp.sqrt(jnp.asarray(h.shape[-1], dtype)))


@keeps_arguments
def engram_gate(
    rows: jax.Array | Quantised,
    weights: jax.Array | Quantised,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    eps: float,
    recipe: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `api.engram_gate`."""
    dtype = jnp.dtype(jnp.bfloat16) if isinstance(rows, Quantised) else rows.dtype
    rows, weights = through_fp8(rows, weights, recipe)
    keys, value = keys_and_value(rows, weights, bias, dtype)
    gate = gates(streams, keys, gain, eps)
    if mask is not None:
        gate = jnp.where(mask[..., None], gate, 0)
    # The product is rounded once, to the streams' dtype (V4.1's cast).
    return (gate[..., None] * value).astype(streams.dtype), gate


def through_fp8(
    rows: jax.Array | Quantised, weights: jax.Array | Quantised, recipe: str | None
) -> tuple[jax.Array, jax.Array]:
    """Rows and weights after rounding to FP8, in float32; without FP8 unchanged.

    Rounding to FP8 passes gradients through unchanged (straight-through).
    """
    if isinstance(rows, Quantised):
        rows = lax.stop_gradient(quantise.dequantise_rows(rows))
    elif recipe is not None:
        rows = _rounded(rows, quantise.dequantise_rows(quantise.quantise_rows(rows, recipe)))
    if isinstance(weights, Quantised):
        weights = lax.stop_gradient(quantise.dequantise_weights(weights))
    elif recipe is not None:
        fp8 = quantise.dequantise_weights(quantise.quantise_weights(weights, recipe))
        weights = _rounded(weights, fp8)
    return rows, weights


@jax.custom_jvp
def _rounded(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient going to x (straight-through)."""
    return rounded


@_rounded.defjvp
def _rounded_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)
