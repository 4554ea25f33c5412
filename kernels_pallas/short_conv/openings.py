"""Computes which taps of each token are open, as bits, so that kernels need not know documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.short_conv.reference import shifted


def bits_of(
    shape: tuple[int, int],
    segments: jax.Array | None,
    mask: jax.Array | None,
    *,
    kernel: int,
    dilation: int,
    history: bool = False,
) -> jax.Array:
    """int32 [B, T]: bit j is set if tap j is open, bit K if the output is not masked.

    Args:
      shape: (B, T).
      segments: int32 [B, T] or None; a tap is closed if it reads another document.
      mask: bool [B, T] or None.
      kernel: K, taps; tap j reaches (K - 1 - j) * dilation positions back.
      history: taps may reach tokens before the first; otherwise they are closed there.
    """
    live = jnp.ones(shape, jnp.int32) if mask is None else mask.astype(jnp.int32)
    bits = live << kernel
    position = jnp.arange(shape[1])[None]
    for j in range(kernel):
        back = (kernel - 1 - j) * dilation
        is_open = jnp.ones(shape, bool)
        if not history:
            is_open &= position >= back
        if segments is not None and back:
            is_open &= segments == shifted(segments, back)
        bits |= is_open.astype(jnp.int32) << j
    return bits


def padded(bits: jax.Array, tokens: int) -> jax.Array:
    """[B, T] -> [B, multiple of tokens]; the padding is closed and masked."""
    return jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % tokens)))


def all_open(bits: jax.Array, chunk: int, kernel: int) -> jax.Array:
    """int32 [B, T / chunk]: 1 where every bit of every token of the chunk is set."""
    every = (1 << (kernel + 1)) - 1
    chunks = bits.reshape(bits.shape[0], -1, chunk)
    return jnp.all(chunks == every, axis=-1).astype(jnp.int32)
