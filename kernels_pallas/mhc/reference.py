"""mHC's coefficients and products in plain jax.numpy (arXiv 2512.24880, section 4).

The equations, and where the sources differ: engram_jax/layers/hyper_connections.py.
Coefficients are computed in float32 (float64 for float64 streams), streams keep their dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.mhc.sinkhorn import sinkhorn


def pre(
    x: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    *,
    iterations: int,
    eps: float,
    transpose: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As api.mhc_pre, with fn already times the gain; fn, base and scale in the compute dtype."""
    n = x.shape[-2]
    tokens = x.reshape(-1, *x.shape[-2:])
    logits = _normalised_product(tokens.reshape(tokens.shape[0], -1), fn, eps)
    a_pre, a_post, a_res = scale
    h_pre, h_post, h_res = jnp.split(logits, [n, 2 * n])
    b_pre, b_post, b_res = jnp.split(base[:, None], [n, 2 * n])

    weights = jax.nn.sigmoid(a_pre * h_pre + b_pre) + eps
    post = 2 * jax.nn.sigmoid(a_post * h_post + b_post)
    mixing = (a_res * h_res + b_res).reshape(n, n, -1)
    if transpose:
        mixing = mixing.swapaxes(0, 1)
    res = sinkhorn(mixing, iterations, eps)

    collapsed = _mix(weights.T[:, None], tokens).astype(x.dtype)
    return (
        collapsed.reshape(*x.shape[:-2], -1),
        post.T.reshape(x.shape[:-1]),
        jnp.moveaxis(res, -1, 0).reshape(*x.shape[:-1], n),
        x,
    )


def merge(x: jax.Array, y: jax.Array, post: jax.Array, res: jax.Array) -> jax.Array:
    """res x + post^T y, as api.mhc_merge: computed in the dtype of post and res."""
    n, d = x.shape[-2:]
    mixed = _mix(res.reshape(-1, n, n), x.reshape(-1, n, d))
    mixed = mixed + _mix(post.reshape(-1, n, 1), y.reshape(-1, 1, d))
    return mixed.astype(x.dtype).reshape(x.shape)


# The three products below are written to move little memory: streams are by far the largest arrays
# of a block, and JAX's own derivatives make several more passes over them (measured on CPU).


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalised_product(x: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """(RMSNorm(x) fn)^T: x [P, k], fn [k, c] -> [c, P] in the dtype of fn.

    The norm divides by one number per token, so it may follow the product: no normalised copy of
    the streams. Tokens are innermost in the result, as sinkhorn.py needs them.
    """
    return _normalised_product_forward(x, fn, eps)[0]


def _normalised_product_forward(x: jax.Array, fn: jax.Array, eps: float) -> tuple:
    wide = x.astype(fn.dtype)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1) + eps)
    # At least the precision of tfloat32, in which the mHC paper keeps fn.
    product = lax.dot_general(fn, wide, (((0,), (1,)), ((), ())), precision=lax.Precision.HIGH)
    out = product * scale
    return out, (x, fn, scale, out)


def _normalised_product_backward(eps: float, residuals: tuple, g: jax.Array) -> tuple:
    x, fn, scale, out = residuals
    wide, scaled = x.astype(fn.dtype), g * scale
    high = lax.Precision.HIGH
    # A product with ones: as a sum, XLA on CPU fuses it into the pass over x and makes it slow.
    ones = jnp.ones((1, len(out)), out.dtype)
    along = jnp.matmul(ones, out * g, precision=high)[0] * scale**2 / x.shape[1]
    dx = lax.dot_general(scaled, fn, (((0,), (1,)), ((), ())), precision=high)
    dx = dx - along[:, None] * wide
    # The barrier keeps XLA from fusing the transpose into the product, 5 times as slow on CPU.
    dfn = lax.dot_general(scaled, wide, (((1,), (0,)), ((), ())), precision=high)
    return dx.astype(x.dtype), lax.optimization_barrier(dfn).T


_normalised_product.defvjp(_normalised_product_forward, _normalised_product_backward)


@jax.custom_vjp
def _mix(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights [P, m, n], x [P, n, d] -> [P, m, d] in the weights' dtype.

    A sum of n elementwise terms: one pass over x; a batched product of tiny matrices is slow.
    """
    terms = [
        weights[:, :, j, None] * x[:, None, j].astype(weights.dtype) for j in range(x.shape[1])
    ]
    return functools.reduce(jnp.add, terms)


def _mix_forward(weights: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple]:
    return _mix(weights, x), (weights, x)


def _mix_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, x = residuals
    wide = x.astype(g.dtype)
    if 1 in weights.shape[1:]:  # a matrix and a vector for each token: fast on CPUs, too
        dweights = _inner_product(g, wide)
    else:
        dweights = lax.platform_dependent(g, wide, cpu=_inner_sums, default=_inner_product)
    return dweights, _mix(weights.swapaxes(1, 2), g).astype(x.dtype)


def _inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [P, m, d], b [P, n, d] -> [P, m, n], the sums over d of their products."""
    return jnp.einsum("pmd,pnd->pmn", a, b, precision=lax.Precision.HIGH)


def _inner_sums(a: jax.Array, b: jax.Array) -> jax.Array:
    """The same for CPUs, where a product of tiny matrices for each token is 4 times as slow.

    The loop, of two turns, is what makes XLA store a and b: without it, it computes what they
    are made from again for each of the m n sums.
    """
    tokens = a.shape[0]
    rows = (tokens + 1) // 2

    def half(i: jax.Array, out: jax.Array) -> jax.Array:
        first = i * (tokens - rows)
        a_rows, b_rows = (lax.dynamic_slice_in_dim(v, first, rows) for v in (a, b))
        sums = jnp.sum(a_rows[:, :, None] * b_rows[:, None], axis=-1)
        return lax.dynamic_update_slice_in_dim(out, sums, first, 0)

    out = jnp.zeros((tokens, a.shape[1], b.shape[1]), a.dtype)
    return lax.fori_loop(0, 2, half, out)


_mix.defvjp(_mix_forward, _mix_backward)
