"""Released tables and projections in float32: FP8 E4M3 values with E8M0 scales (DeepSeek-V4.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def e8m0_to_float32(scale: jax.Array) -> jax.Array:
    """E8M0 bytes (uint8) -> float32 powers of two, 2 ** (byte - 127).

    Byte 255 is NaN, byte 0 is 2**-127.
    """
    exponent = scale.astype(jnp.uint32)
    # A float32's exponent field is the same biased byte; 2**-127 is the one subnormal value.
    bits = jnp.where(exponent == 0, jnp.uint32(1 << 22), exponent << 23)
    bits = jnp.where(exponent == 255, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def e4m3_to_float32(bits: jax.Array) -> jax.Array:
    """FP8 E4M3 bit patterns (uint8) -> float32, exactly."""
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def dequantise_rows(bits: jax.Array, scale: jax.Array) -> jax.Array:
    """Released rows: bits uint8 [..., dim], scale uint8 [..., dim / group] -> float32 [..., dim].

    One scale covers `dim / scale.shape[-1]` neighbouring columns (32 in DeepSeek-V4.1).
    """
    group = bits.shape[-1] // scale.shape[-1]
    return e4m3_to_float32(bits) * jnp.repeat(e8m0_to_float32(scale), group, axis=-1)


def dequantise_blocks(bits: jax.Array, scale: jax.Array) -> jax.Array:
    """Released projections: bits uint8 [n, m], scale uint8 [n / b, m / b] -> float32 [n, m].

    One scale covers a block of b x b (b = 32 in DeepSeek-V4.1).
    """
    block = bits.shape[0] // scale.shape[0]
    scales = jnp.repeat(jnp.repeat(e8m0_to_float32(scale), block, axis=0), block, axis=1)
    return e4m3_to_float32(bits) * scales
