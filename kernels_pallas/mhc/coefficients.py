"""Computes the coefficients of a block of tokens, and their gradients, inside the TPU kernels.

The arithmetic is sinkhorn.py's without its scans. Tokens are [G, 128]; a vector of n numbers per
token is [n, G, 128], a matrix [n (target), n (source), G, 128]: sums over n are sums of whole
registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), computed with exp(-|x|), which cannot overflow."""
    small = jnp.exp(-jnp.abs(x))
    return jnp.where(x >= 0, 1.0, small) / (1 + small)


def group(c: int, n: int) -> int:
    """Whether coefficient c is of pre (0), post (1) or res (2)."""
    return min(c // n, 2)


def logits_of(h: jax.Array, base: Any, scale: Any, n: int) -> jax.Array:
    """a h + b of every coefficient [c, G, 128], where a is that of pre, post or res."""
    return jnp.stack([scale[group(c, n)] * h[c] + base[c] for c in range(h.shape[0])])


def matrix_of(entries: jax.Array, n: int, transpose: bool) -> jax.Array:
    """[n n, G, 128] in fn's order -> [n (target), n (source), G, 128]."""
    if transpose:
        entries = jnp.stack([entries[j * n + i] for i in range(n) for j in range(n)])
    return entries.reshape(n, n, *entries.shape[1:])


def entries_of(matrix: jax.Array, transpose: bool) -> jax.Array:
    """The inverse of matrix_of."""
    n = matrix.shape[0]
    return matrix_of(matrix.reshape(n * n, *matrix.shape[2:]), n, transpose).reshape(
        n * n, *matrix.shape[2:]
    )


def softmax(logits: jax.Array) -> jax.Array:
    """exp(logits), columns divided by their sums: the first division of Sinkhorn."""
    powers = jnp.exp(logits - jnp.max(logits, axis=0)[None])
    return powers * (1 / jnp.sum(powers, axis=0))[None]


def softmax_backward(soft: jax.Array, g: jax.Array) -> jax.Array:
    return soft * (g - jnp.sum(soft * g, axis=0)[None])


def times(kernel: jax.Array, v: jax.Array) -> jax.Array:
    """K v."""
    return jnp.sum(kernel * v[None], axis=1)


def transposed_times(kernel: jax.Array, u: jax.Array) -> jax.Array:
    """K^T u."""
    return jnp.sum(kernel * u[:, None], axis=0)


def balance(
    kernel: jax.Array,
    iterations: int,
    eps: float,
    keep: Callable[[Any, jax.Array, jax.Array], None] = lambda step, u, v: None,
) -> tuple[jax.Array, jax.Array]:
    """(u, v) with diag(u) kernel diag(v) balanced: rows once, then columns and rows.

    keep(k, u, v) is called with the factors after k times columns and rows, k < iterations.
    """

    def step(k: Any, factors: tuple) -> tuple:
        u, v = factors
        v = v / (v * transposed_times(kernel, u) + eps)
        u = u / (u * times(kernel, v) + eps)
        keep(k + 1, u, v)
        return u, v

    v = jnp.ones_like(kernel[0])
    u = 1 / (times(kernel, v) + eps)
    keep(0, u, v)
    return lax.fori_loop(0, iterations - 1, step, (u, v))


def balance_backward(
    kernel: jax.Array,
    g: jax.Array,
    iterations: int,
    eps: float,
    kept: Callable[[Any], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Gradient of the kernel from g, that of diag(u) kernel diag(v); kept(k): (u, v) of `keep`."""
    u, v = kept(iterations - 1)
    product = g * kernel
    start = times(product, v), transposed_times(product, u), u[:, None] * g * v[None]

    def step(back: Any, carry: tuple) -> tuple:
        k = iterations - 2 - back
        du, dv, d_kernel = carry
        (u, v), (u_after, v_after) = kept(k), kept(k + 1)
        # u' = u / (u K v' + eps): du'/d(K v') = -u'^2 and du'/du = eps (u' / u)^2; so for v.
        rows = -du * u_after * u_after
        dv = dv + transposed_times(kernel, rows)
        columns = -dv * v_after * v_after
        d_kernel = d_kernel + rows[:, None] * v_after[None] + u[:, None] * columns[None]
        of_u, of_v = u_after / u, v_after / v
        du = du * eps * of_u * of_u + times(kernel, columns)
        return du, dv * eps * of_v * of_v, d_kernel

    du, _, d_kernel = lax.fori_loop(0, iterations - 1, step, start)
    first, _ = kept(0)
    return d_kernel - (du * first * first)[:, None]


def sinkhorn_backward(
    factors: Any, logits: jax.Array, g: jax.Array, iterations: int, eps: float
) -> jax.Array:
    """Gradient of the logits from g, that of the balanced matrix.

    factors: scratch [iterations, 2 n, G, 128]; recomputed forwards, then read backwards.
    """
    n = logits.shape[0]
    soft = softmax(logits)
    matrix = soft + eps

    def keep(k: Any, u: jax.Array, v: jax.Array) -> None:
        factors[k] = jnp.concatenate([u, v])

    def kept(k: Any) -> tuple[jax.Array, jax.Array]:
        both = factors[k]
        return both[:n], both[n:]

    balance(matrix, iterations, eps, keep)
    return softmax_backward(soft, balance_backward(matrix, g, iterations, eps, kept))
