"""E8M0: a scale as one byte, the power of two 2 ** (byte - 127). Byte 255 is NaN, and not used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

BIAS = 127


def decode(scales: jax.Array) -> jax.Array:
    """uint8 -> float32: the byte is float32's exponent (byte 0, 2^-127, is subnormal there)."""
    return jnp.ldexp(jnp.float32(1), scales.astype(jnp.int32) - BIAS)


def encode(scales: jax.Array) -> jax.Array:
    """float32 powers of two, 2^-126 or more -> uint8."""
    return (lax.bitcast_convert_type(scales, jnp.int32) >> 23).astype(jnp.uint8)
