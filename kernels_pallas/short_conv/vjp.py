"""The short convolution's kernels with their gradients; the residuals are only the arguments."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import TPU, Choice
from kernels_pallas.short_conv import gpu, openings, reference, tpu, tpu_backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def short_conv(
    u: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    segments: jax.Array | None,
    mask: jax.Array | None,
    dilation: int,
    eps: float,
    choice: Choice,
) -> jax.Array:
    """As api.short_conv."""
    bits = _bits(u, taps, segments, mask, dilation)
    kernel = tpu.forward if choice.kernel == TPU else gpu.forward
    out = kernel(
        jnp.moveaxis(u, 2, 0),
        _filters(gain, taps),
        bits,
        dilation=dilation,
        eps=eps,
        interpret=choice.interpret,
    )
    return jnp.moveaxis(out, 0, 2)


def _forward(*args: Any) -> tuple[jax.Array, tuple]:
    return short_conv(*args), args[:5]


def gradients(
    u: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    segments: jax.Array | None,
    mask: jax.Array | None,
    g: jax.Array,
    dilation: int,
    eps: float,
    choice: Choice,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of u, gain and taps for the output's gradient g."""
    if choice.kernel != TPU:

        def plain(u: jax.Array, gain: jax.Array, taps: jax.Array) -> jax.Array:
            return reference.short_conv(u, gain, taps, segments, mask, dilation=dilation, eps=eps)

        return jax.vjp(plain, u, gain, taps)[1](g)
    du, d_filters = tpu_backward.backward(
        jnp.moveaxis(u, 2, 0),
        _filters(gain, taps),
        _bits(u, taps, segments, mask, dilation),
        jnp.moveaxis(g, 2, 0),
        dilation=dilation,
        eps=eps,
        interpret=choice.interpret,
    )
    d_product = jnp.moveaxis(d_filters, 1, 0) / 2
    d_gain = jnp.sum(d_product * taps.astype(jnp.float32), axis=0).astype(gain.dtype)
    d_taps = (d_product * gain.astype(jnp.float32)).astype(taps.dtype)
    return jnp.moveaxis(du, 0, 2), d_gain, d_taps


def _backward(dilation: int, eps: float, choice: Choice, kept: tuple, g: jax.Array) -> tuple:
    return *gradients(*kept, g, dilation, eps, choice), None, None


short_conv.defvjp(_forward, _backward)


def _filters(gain: jax.Array, taps: jax.Array) -> jax.Array:
    """[M, K, d]: taps times gain, so that the kernels multiply once, and halved as they need it."""
    return jnp.moveaxis(taps.astype(jnp.float32) * gain.astype(jnp.float32) / 2, 0, 1)


def _bits(
    u: jax.Array,
    taps: jax.Array,
    segments: jax.Array | None,
    mask: jax.Array | None,
    dilation: int,
    history: bool = False,
) -> jax.Array:
    return openings.bits_of(
        u.shape[:2], segments, mask, kernel=taps.shape[0], dilation=dilation, history=history
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def short_conv_cached(
    u: jax.Array,
    tail: jax.Array,
    valid: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    mask: jax.Array | None,
    dilation: int,
    eps: float,
    choice: Choice,
) -> tuple[jax.Array, jax.Array]:
    """As api.short_conv_cached; on TPU."""
    out = tpu.forward(
        jnp.moveaxis(u, 2, 0),
        _filters(jnp.ones_like(gain), taps),
        _bits(u, taps, None, mask, dilation, history=True),
        gain,
        jnp.moveaxis(tail, 2, 0),
        dilation=dilation,
        eps=eps,
        out_dtype=jnp.promote_types(u.dtype, tail.dtype),
        interpret=choice.interpret,
    )
    return jnp.moveaxis(out, 0, 2), _new_tail(u, tail, valid, gain, eps)


def _new_tail(
    u: jax.Array, tail: jax.Array, valid: jax.Array, gain: jax.Array, eps: float
) -> jax.Array:
    """The last L entries up to the valid[b]-th new one; those of u are normalised again."""
    keep, (b, s, m, d) = tail.shape[1], u.shape
    index = valid[:, None] + jnp.arange(keep)  # into tail and u, one after the other
    old = jax.vmap(lambda x, i: x[i])(tail, jnp.minimum(index, keep - 1))
    # Rows of [M B S, d], the kernel's layout: a gather by token would copy u.
    first = (jnp.arange(m) * b + jnp.arange(b)[:, None])[:, None] * s
    rows = jnp.moveaxis(u, 2, 0).reshape(m * b * s, d)
    new = rows[first + jnp.maximum(index - keep, 0)[..., None]]
    new = reference.normalised(reference.wide(new), gain, eps).astype(tail.dtype)
    return jnp.where((index < keep)[..., None, None], old, new)


def _cached_forward(*args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    return short_conv_cached(*args), args[:6]


def _cached_backward(dilation: int, eps: float, choice: Choice, kept: tuple, g: tuple) -> tuple:
    """JAX's gradient of the reference; training does not use it, but it is defined."""
    u, tail, valid, gain, taps, mask = kept

    def plain(u: jax.Array, tail: jax.Array, gain: jax.Array, taps: jax.Array) -> tuple:
        return reference.short_conv_cached(
            u, tail, valid, gain, taps, mask, dilation=dilation, eps=eps
        )

    du, d_tail, d_gain, d_taps = jax.vjp(plain, u, tail, gain, taps)[1](g)
    return du, d_tail, None, d_gain, d_taps, None


short_conv_cached.defvjp(_cached_forward, _cached_backward)
