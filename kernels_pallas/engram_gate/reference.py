"""The gate of Engram in plain jax.numpy: the meaning of the operation, and what a CPU runs.

Rounding is the kernels': rows and weights are multiplied in the rows' dtype, but the products are
summed and kept in float32, and so is all that follows, up to the gated value, which is rounded once
to the streams' dtype. (Keys in bfloat16 would move a score near 0 across it, where the gate is
steepest: README.md.) Backward, the gradients of keys and value are rounded to the rows' dtype for
the two products behind them, which are summed in float32 again. FP8 is taken back to float32 and
multiplied so; backward in the dtype of what was rounded to it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.engram_gate import quantise
from kernels_pallas.engram_gate.quantise import Quantised
from kernels_pallas.remat import keeps_arguments

# |s| below this counts as this in the square root (the official demo): its slope stays finite.
SMALLEST_SCORE = 1e-6


def keys_and_value(
    rows: jax.Array, weights: jax.Array, bias: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Equation 3: rows [..., C], weights [C, M + 1, d] -> keys [..., M, d], value [..., 1, d], both
    in at least float32; dtype: of the products of the gradient."""
    out = _projected(rows, weights.astype(rows.dtype), dtype)
    if bias is not None:
        out = out + bias.astype(out.dtype)
    return out[..., :-1, :], out[..., -1:, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _projected(rows: jax.Array, weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """rows [..., C] times weights [C, M + 1, d] of their dtype, in at least float32. JAX's own
    gradient would multiply in float32 what the kernels multiply in the rows' dtype."""
    return _product(rows, weights, ([rows.ndim - 1], [0]))


def _product(a: jax.Array, b: jax.Array, contracted: tuple[list[int], list[int]]) -> jax.Array:
    """Exact products and sums of at least float32, whatever the platform's default is."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == wide else None
    return lax.dot_general(
        a, b, (contracted, ([], [])), precision=precision, preferred_element_type=wide
    )


def _projected_forward(
    rows: jax.Array, weights: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple]:
    like = jnp.zeros((), rows.dtype)  # rows' dtype, which is the weights', too
    kept = rows.astype(dtype), weights.astype(dtype), like
    return _projected(rows, weights, dtype), kept


def _projected_backward(dtype: jnp.dtype, kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, weights, like = kept
    g = g.astype(dtype)
    last, tokens = g.ndim - 1, list(range(g.ndim - 2))
    d_rows = _product(g, weights, ([last - 1, last], [1, 2]))
    d_weights = jnp.moveaxis(_product(g, rows, (tokens, tokens)), 2, 0)
    return d_rows.astype(like.dtype), d_weights.astype(like.dtype)


_projected.defvjp(_projected_forward, _projected_backward)


def gate_of_score(s: jax.Array) -> jax.Array:
    """sigmoid(sign(s) sqrt(max(|s|, 1e-6))): the signed square root is the official demo's."""
    return jax.nn.sigmoid(jnp.sign(s) * jnp.sqrt(jnp.maximum(jnp.abs(s), SMALLEST_SCORE)))


def slope_of_gate(s: jax.Array, gate: jax.Array) -> jax.Array:
    """d gate / d s: 0 where the square root is held at 1e-6, and of a masked token (gate 0)."""
    slope = 0.5 * lax.rsqrt(jnp.maximum(jnp.abs(s), SMALLEST_SCORE))
    return gate * (1 - gate) * jnp.where(jnp.abs(s) > SMALLEST_SCORE, slope, 0)


def gates(streams: jax.Array, keys: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Equation 4: streams [..., M, d] and wide keys [..., M, d] -> gates [..., M], as wide.

    gain: [M, d], the product of both norms' gains.
    """
    dtype = keys.dtype
    h = streams.astype(dtype)
    # <RMSNorm(h), RMSNorm(key)> without writing either norm out: the scales are per token.
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
    """Rows and weights as FP8 has them, in float32; without FP8 as they are.

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
    """`rounded`, with the gradient of x in its place."""
    return rounded


@_rounded.defjvp
def _rounded_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)
