"""mHC's kernels with their gradients: by kernels on TPU, by the reference on GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import TPU, Choice
from kernels_pallas.mhc import gpu, reference, tpu, tpu_backward, tpu_merge


@dataclass(frozen=True)
class Options:
    iterations: int
    eps: float
    transpose: bool


def _first(x: jax.Array) -> jax.Array:
    """[P, n, ...] <-> [n, P, ...]: the order in a TPU's memory, so XLA moves no data."""
    return jnp.swapaxes(x, 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def pre(
    x: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    options: Options,
    choice: Choice,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x [P, n, d], float32 fn [n d, c], base, scale -> collapsed [P, d], post, res and x."""
    return _pre_forward(x, fn, base, scale, options, choice)[0]


def _pre_forward(
    x: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    options: Options,
    choice: Choice,
) -> tuple:
    kernel = tpu.forward if choice.kernel == TPU else gpu.pre
    streams = _first(x) if choice.kernel == TPU else x
    out = kernel(streams, fn, base, scale, **vars(options), interpret=choice.interpret)
    kept = None
    if choice.kernel == TPU:
        collapsed, post, res, kept = out
        post, res = post.T, res.T
    else:
        collapsed, post, res = out
    n = x.shape[1]
    return (collapsed, post, res.reshape(-1, n, n), x), (x, fn, base, scale, kept)


def _pre_backward(options: Options, choice: Choice, residuals: tuple, g: tuple) -> tuple:
    x, fn, base, scale, kept = residuals
    if choice.kernel != TPU:
        _, pullback = jax.vjp(functools.partial(reference.pre, **vars(options)), x, fn, base, scale)
        return pullback(g)
    g_collapsed, g_post, g_res, g_x = g
    g_res = g_res.reshape(x.shape[0], -1).T
    dx, *rest = tpu_backward.backward(
        _first(x),
        fn,
        base,
        scale,
        kept,
        g_collapsed,
        g_post.T,
        g_res,
        _first(g_x),
        **vars(options),
        interpret=choice.interpret,
    )
    return _first(dx), *rest


pre.defvjp(_pre_forward, _pre_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def merge(x: jax.Array, y: jax.Array, post: jax.Array, res: jax.Array, choice: Choice) -> jax.Array:
    """x [P, n, d], y [P, d], float32 post [P, n] and res [P, n, n] -> [P, n, d]."""
    return _merge_forward(x, y, post, res, choice)[0]


def _merge_forward(
    x: jax.Array, y: jax.Array, post: jax.Array, res: jax.Array, choice: Choice
) -> tuple:
    entries = res.reshape(res.shape[0], -1)
    if choice.kernel == TPU:
        out = tpu_merge.forward(_first(x), y, post.T, entries.T, interpret=choice.interpret)
        out = _first(out)
    else:
        out = gpu.merge(x, y, post, entries, interpret=choice.interpret)
    return out, (x, y, post, res)


def _merge_backward(choice: Choice, residuals: tuple, g: jax.Array) -> tuple:
    x, y, post, res = residuals
    if choice.kernel != TPU:
        return jax.vjp(reference.merge, *residuals)[1](g)
    entries = res.reshape(res.shape[0], -1).T
    dx, dy, d_post, d_res = tpu_merge.backward(
        _first(x), y, post.T, entries, _first(g), interpret=choice.interpret
    )
    return _first(dx), dy, d_post.T, d_res.T.reshape(res.shape)


merge.defvjp(_merge_forward, _merge_backward)
