"""The short convolution in plain jax.numpy: the definition of the operation, also run on CPUs.

It rounds as the kernels do: everything is computed in float32 (float64 if u is float64), gradients
too, and rounded once at the end. Only a continued sequence also rounds its normalised positions: to
the dtype of its tail, from which later positions read them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.remat import keeps_arguments


@keeps_arguments
def short_conv(
    u: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    segments: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    dilation: int,
    eps: float,
) -> jax.Array:
    """As `api.short_conv`."""
    before, x = tail_length(taps, dilation), wide(u)
    padded = jnp.pad(normalised(x, gain, eps), ((0, 0), (before, 0), (0, 0), (0, 0)))
    return masked(x + convolved(padded, taps, segments, dilation), mask).astype(u.dtype)


def short_conv_cached(
    u: jax.Array,
    tail: jax.Array,
    valid: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    mask: jax.Array | None = None,
    *,
    dilation: int,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """As `api.short_conv_cached`."""
    x = wide(u)
    padded = jnp.concatenate([tail, normalised(x, gain, eps).astype(tail.dtype)], axis=1)
    out = masked(x + convolved(wide(padded), taps, None, dilation), mask)
    index = valid[:, None] + jnp.arange(tail.shape[1])
    new = jax.vmap(lambda x, i: x[i])(padded, index)
    return out.astype(jnp.promote_types(u.dtype, tail.dtype)), new


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def tail_length(taps: jax.Array, dilation: int) -> int:
    """Positions of history that the convolution needs."""
    return (taps.shape[0] - 1) * dilation


def normalised(u: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in u's dtype."""
    y = u * lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + eps)
    return y * gain.astype(y.dtype)


def convolved(
    padded: jax.Array, taps: jax.Array, segments: jax.Array | None, dilation: int
) -> jax.Array:
    """SiLU of the convolution: [B, L + T, M, d], L of them history -> [B, T, M, d]."""
    before = tail_length(taps, dilation)
    length = padded.shape[1] - before
    out = jnp.zeros((), padded.dtype)
    for j in range(taps.shape[0]):
        back = before - j * dilation
        x = lax.slice_in_dim(padded, before - back, before - back + length, axis=1)
        if segments is not None and back:
            same = segments == shifted(segments, back)
            x = jnp.where(same[..., None, None], x, 0)
        out = out + x * taps[j].astype(x.dtype)
    return jax.nn.silu(out)


def masked(out: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zero where `mask` [B, T] is False: a masked token must not get earlier tokens' values."""
    return out if mask is None else jnp.where(mask[..., None, None], out, 0)


def shifted(segments: jax.Array, back: int) -> jax.Array:
    """segments[t - back], 0 before the start."""
    return jnp.pad(segments, ((0, 0), (back, 0)))[:, : segments.shape[1]]
