"""Sinkhorn-Knopp normalisation of many tiny matrices, with an exact and cheap backward pass.

mHC (arXiv 2512.24880, equation 9) makes exp(logits) doubly stochastic by dividing it by its column
sums and by its row sums in turn. Matrices are stored as [n, n, P], the P tokens innermost, so that
every operation is a long vector operation. After any step the matrix is diag(u) K diag(v), and a
step updates only v (columns) or u (rows), n numbers instead of n^2:

    v' = v / (v K^T u + eps),      u' = u / (u K v' + eps)

Differentiated by JAX this takes 3 times as long: it would keep and revisit every intermediate.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[jax.Array, jax.Array]


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
    """exp(logits) with its columns and then its rows normalised, `iterations` times.

    The first division is a softmax over each column, to whose result eps is added; later ones
    divide by sum + eps: the arithmetic of the released DeepSeek-V4 and, for eps -> 0, the paper's.

    Args:
      logits: [n, n, P], float32 or float64: row (target), column (source), token.

    Returns:
      [n, n, P]: rows sum to one up to eps, columns approximately.
    """
    if len(logits) == 1:  # one stream: the softmax is 1, whatever the logits
        alone = _balance(jnp.full((1, 1, 1), 1 + eps, logits.dtype), iterations - 1, eps)
        return jnp.broadcast_to(alone, logits.shape)
    kernel = jax.nn.softmax(logits, axis=0) + eps
    return _balance(kernel, iterations - 1, eps)


# Sums of n terms, written out: as a reduction they are 30 times slower on CPU.


def _times(kernel: jax.Array, v: jax.Array) -> jax.Array:
    """K v: [n, n, P], [n, P] -> [n, P]."""
    return functools.reduce(jnp.add, [kernel[:, j] * v[j] for j in range(len(v))])


def _transposed_times(kernel: jax.Array, u: jax.Array) -> jax.Array:
    """K^T u: [n, n, P], [n, P] -> [n, P]."""
    return functools.reduce(jnp.add, [kernel[i] * u[i] for i in range(len(u))])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _balance(kernel: jax.Array, rounds: int, eps: float) -> jax.Array:
    """Rows of the kernel normalised, then `rounds` times columns and rows."""
    return _forward(kernel, rounds, eps)[0]


def _forward(kernel: jax.Array, rounds: int, eps: float) -> tuple[jax.Array, tuple]:
    def step(factors: Pair, _: None) -> tuple[Pair, Pair]:
        u, v = factors
        v = v / (v * _transposed_times(kernel, u) + eps)
        u = u / (u * _times(kernel, v) + eps)
        return (u, v), factors

    v = jnp.ones_like(kernel[0])
    u = 1 / (_times(kernel, v) + eps)
    (u, v), before = lax.scan(step, (u, v), None, length=rounds)
    return u[:, None] * kernel * v, (kernel, u, v, before)


def _backward(rounds: int, eps: float, residuals: tuple, g: jax.Array) -> tuple[jax.Array]:
    kernel, u, v, (us, vs) = residuals
    all_u, all_v = jnp.concatenate([us, u[None]]), jnp.concatenate([vs, v[None]])
    us_after, vs_after = all_u[1:], all_v[1:]
    # u' = u / (u K v' + eps): du'/d(K v') = -u'^2 and du'/du = eps (u' / u)^2; the same for v.
    # Reciprocals, to divide by: XLA never duplicates a division, but would fuse a product into each
    # of the sums below that use it and compute it n times (measured: 8 times slower).
    u_per_sum, v_per_sum = -(us_after**-2), -(vs_after**-2)
    u_per_old, v_per_old = eps * (us_after / us) ** 2, eps * (vs_after / vs) ** 2

    def step(grads: Pair, inputs: tuple) -> tuple[Pair, Pair]:
        du, dv = grads
        u_per_sum, v_per_sum, u_per_old, v_per_old = inputs
        row_sums = du / u_per_sum  # gradients of K v'
        dv = dv + _transposed_times(kernel, row_sums)
        column_sums = dv / v_per_sum  # gradients of K^T u
        du = du * u_per_old + _times(kernel, column_sums)
        return (du, dv * v_per_old), (row_sums, column_sums)

    product = g * kernel
    grads = _times(product, v), _transposed_times(product, u)
    inputs = (u_per_sum, v_per_sum, u_per_old, v_per_old)
    (du, _), sums = lax.scan(step, grads, inputs, reverse=True)

    def collect(total: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        row_sums, v, column_sums, u = inputs
        return total + row_sums[:, None] * v + u[:, None] * column_sums, None

    total = u[:, None] * g * v - (du * all_u[0] ** 2)[:, None]
    return (lax.scan(collect, total, (sums[0], vs_after, sums[1], us))[0],)


_balance.defvjp(_forward, _backward)
