"""The coefficients of a block of tokens inside a kernel: lists of arrays with a number per token.

sinkhorn.py's arithmetic, with every matrix entry an array of its own, so that all of it is
elementwise: on TPU an entry is [tokens / 128, 128], on GPU [tokens].
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Vector = list[jax.Array]
Matrix = list[list[jax.Array]]


def total(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), from the exponential that cannot overflow."""
    small = jnp.exp(-jnp.abs(x))
    return jnp.where(x >= 0, 1.0, small) / (1 + small)


def entry(n: int, i: int, j: int, transpose: bool) -> int:
    """Which logit stands at row (target) i, column (source) j."""
    return 2 * n + (j * n + i if transpose else i * n + j)


def logits_of(h: Vector, base: Sequence[Any], scale: Sequence[Any], n: int) -> Vector:
    """a h + b with the a of pre, post or res."""
    return [scale[min(c // n, 2)] * x + base[c] for c, x in enumerate(h)]


def softmax(z: Vector, n: int, transpose: bool) -> Matrix:
    """exp of the mixing logits, columns divided by their sums: the first division of Sinkhorn."""
    out: Matrix = [[z[0]] * n for _ in range(n)]
    for j in range(n):
        column = [z[entry(n, i, j, transpose)] for i in range(n)]
        top = functools.reduce(jnp.maximum, column)
        column = [jnp.exp(x - top) for x in column]
        inverse = 1 / total(column)
        for i in range(n):
            out[i][j] = column[i] * inverse
    return out


def times(kernel: Matrix, v: Vector) -> Vector:
    return [total([k * x for k, x in zip(row, v, strict=True)]) for row in kernel]


def transposed_times(kernel: Matrix, u: Vector) -> Vector:
    return times([list(column) for column in zip(*kernel, strict=True)], u)


def balance(
    kernel: Matrix,
    iterations: int,
    eps: float,
    keep: Callable[[Any, Vector, Vector], None] = lambda step, u, v: None,
) -> tuple[Vector, Vector]:
    """(u, v) with diag(u) kernel diag(v) balanced: rows once, then columns and rows.

    keep(k, u, v) is called with the factors after k columns-and-rows, k = 0 .. iterations - 1.
    """
    n = len(kernel)

    def step(k: Any, factors: tuple) -> tuple:
        u, v = list(factors[:n]), list(factors[n:])
        v = [x / (x * s + eps) for x, s in zip(v, transposed_times(kernel, u), strict=True)]
        u = [x / (x * s + eps) for x, s in zip(u, times(kernel, v), strict=True)]
        keep(k + 1, u, v)
        return (*u, *v)

    v = [jnp.ones_like(x) for x in kernel[0]]
    u = [1 / (s + eps) for s in times(kernel, v)]
    keep(0, u, v)
    factors = lax.fori_loop(0, iterations - 1, step, (*u, *v))
    return list(factors[:n]), list(factors[n:])


def balance_backward(
    kernel: Matrix,
    g: Matrix,
    iterations: int,
    eps: float,
    kept: Callable[[Any], tuple[Vector, Vector]],
) -> Matrix:
    """Gradient of the kernel, from g, that of diag(u) kernel diag(v); kept(k): what `keep` got."""
    n = len(kernel)
    every = range(n)
    u, v = kept(iterations - 1)
    product = [[g[i][j] * kernel[i][j] for j in every] for i in every]
    start = (
        *times(product, v),
        *transposed_times(product, u),
        *(u[i] * g[i][j] * v[j] for i in every for j in every),
    )

    def step(back: Any, carry: tuple) -> tuple:
        k = iterations - 2 - back
        du, dv, d_kernel = list(carry[:n]), list(carry[n : 2 * n]), carry[2 * n :]
        (u, v), (u_after, v_after) = kept(k), kept(k + 1)
        # u' = u / (u K v' + eps): du'/d(K v') = -u'^2 and du'/du = eps (u' / u)^2; so for v.
        rows = [-d * a * a for d, a in zip(du, u_after, strict=True)]
        dv = [d + s for d, s in zip(dv, transposed_times(kernel, rows), strict=True)]
        columns = [-d * a * a for d, a in zip(dv, v_after, strict=True)]
        d_kernel = [
            d_kernel[i * n + j] + rows[i] * v_after[j] + u[i] * columns[j]
            for i in every
            for j in every
        ]
        through = times(kernel, columns)
        du = [du[i] * eps * (u_after[i] / u[i]) ** 2 + through[i] for i in every]
        dv = [dv[j] * eps * (v_after[j] / v[j]) ** 2 for j in every]
        return (*du, *dv, *d_kernel)

    out = lax.fori_loop(0, iterations - 1, step, start)
    first, _ = kept(0)
    return [[out[2 * n + i * n + j] - out[i] * first[i] * first[i] for j in every] for i in every]


def softmax_backward(soft: Matrix, g: Matrix) -> Matrix:
    n = len(soft)
    along = [total([soft[i][j] * g[i][j] for i in range(n)]) for j in range(n)]
    return [[soft[i][j] * (g[i][j] - along[j]) for j in range(n)] for i in range(n)]
