"""Products of activations with a weight matrix."""

from __future__ import annotations

import math

import jax


def flat(x: jax.Array) -> jax.Array:
    """[..., d] -> [rows, d].

    Products take activations with their leading axes as one. With two, the gradient of a weight
    contracts both, for which XLA's CPU compiler transposes the activations, and computes them anew
    while it does (SwiGLU of width 814, forward and backward: 61 ms instead of 25). On accelerators
    it is the same product.
    """
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [..., a] times matrix [a, b]: [..., b]."""
    return (flat(x) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])
