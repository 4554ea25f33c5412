"""Rotary position embedding of adjacent pairs, as DeepSeek-V2/V3 apply it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def rope_tables(positions: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 [..., dim / 2]: pair i turns by positions * theta^(-2i / dim) radians.

    Args:
      positions: int32 [...], tokens since the start of the document.
      dim: width of the rotated part of a head, even.
      theta: base of the wavelengths.
    """
    frequencies = np.float32(theta ** -(np.arange(0, dim, 2) / dim))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x[2i], x[2i + 1]) of x [..., dim] by the angles of tables [..., dim / 2].

    In the result all rotated first members come before all second ones. Queries and keys are
    permuted alike, which changes no dot product and saves a strided write.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, second = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
