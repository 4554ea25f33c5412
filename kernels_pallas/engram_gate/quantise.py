"""FP8 rows and weights: e4m3 values with scales, in three recipes.

    recipe    rows [T, C]: a scale for      weights [C, M + 1, d]: a scale for    scales
    channel   every token                   every output channel                  float32
    block     every 128 columns             every 128 x 128 block                 float32
    mx        every 32 columns              every 32 x 32 block                   E8M0, 2^(byte-127)

"mx" is how the DeepSeek-V4.1 tables and projections are released, "block" how DeepSeek-V3 trains.
A value stands for `values * scale`; the largest magnitude of a group becomes 448, e4m3's largest
(for "mx", lies between 224 and 448: the scale is the smallest power of two that fits).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import e8m0

CHANNEL, BLOCK, MX = "channel", "block", "mx"
RECIPES = (CHANNEL, BLOCK, MX)
WIDTH = {BLOCK: 128, MX: 32}  # columns, and rows, of a group
E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 2.0**-100  # a group whose largest magnitude is below is taken as this: no division by 0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("recipe",)
)
@dataclass(frozen=True)
class Quantised:
    """FP8 rows or weights.

    values: float8_e4m3fn, rows [..., C] or weights [C, M + 1, d].
    scales: float32, for "mx" uint8. Rows: [..., 1], [..., C / 128] or [..., C / 32]; weights:
      [1, M + 1, d], [C / 128, M + 1, d / 128] or [C / 32, M + 1, d / 32].
    """

    values: jax.Array
    scales: jax.Array
    recipe: str

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe {self.recipe!r} is not one of {RECIPES}")


def scale_of(largest: jax.Array, recipe: str) -> jax.Array:
    """The scale of a group by its largest magnitude, float32 (a power of two for "mx")."""
    scale = jnp.maximum(largest, SMALLEST) * (1.0 / LARGEST)
    if recipe != MX:
        return scale
    # Up to the next power of two: carry out of the mantissa into the exponent, cut the mantissa.
    bits = lax.bitcast_convert_type(scale, jnp.int32) + 0x007FFFFF
    return lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def quantise_rows(rows: jax.Array, recipe: str) -> Quantised:
    """rows [..., C], float32 or bfloat16 -> FP8."""
    wide = rows.astype(jnp.float32)
    groups = wide[..., None, :] if recipe == CHANNEL else _split(wide, -1, WIDTH[recipe])
    scale = scale_of(jnp.max(jnp.abs(groups), axis=-1), recipe)
    values = (groups / scale[..., None]).astype(E4M3)
    return Quantised(values.reshape(rows.shape), _stored(scale, recipe), recipe)


def quantise_weights(weights: jax.Array, recipe: str) -> Quantised:
    """weights [C, M + 1, d], float32 or bfloat16 -> FP8."""
    wide = jnp.abs(weights.astype(jnp.float32))
    if recipe == CHANNEL:
        scale = scale_of(jnp.max(wide, axis=0, keepdims=True), recipe)
    else:
        width = WIDTH[recipe]
        blocks = _split(_split(wide, 2, width), 0, width)  # [C / w, w, M + 1, d / w, w]
        scale = scale_of(jnp.max(blocks, axis=(1, 4)), recipe)
    values = (weights.astype(jnp.float32) / _spread_weights(scale, recipe)).astype(E4M3)
    return Quantised(values, _stored(scale, recipe), recipe)


def read_scales(x: Quantised) -> jax.Array:
    """The scales in float32, one per group."""
    return _read(x.scales)


def weight_scales(weights: Quantised) -> jax.Array:
    """Of every output channel: float32 [1, M + 1, d], [C / 128, M + 1, d] or [C / 32, M + 1, d]."""
    scales = _read(weights.scales)
    return scales if weights.recipe == CHANNEL else jnp.repeat(scales, WIDTH[weights.recipe], 2)


def dequantise_rows(rows: Quantised) -> jax.Array:
    """float32 [..., C]."""
    scales = _read(rows.scales)
    if rows.recipe != CHANNEL:
        scales = jnp.repeat(scales, WIDTH[rows.recipe], -1)
    return rows.values.astype(jnp.float32) * scales


def dequantise_weights(weights: Quantised) -> jax.Array:
    """float32 [C, M + 1, d]."""
    scales = _spread_weights(_read(weights.scales), weights.recipe)
    return weights.values.astype(jnp.float32) * scales


def _split(x: jax.Array, axis: int, width: int) -> jax.Array:
    axis %= x.ndim
    if x.shape[axis] % width:
        raise ValueError(f"{x.shape[axis]} columns do not divide into groups of {width}")
    return x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :])


def _spread_weights(scale: jax.Array, recipe: str) -> jax.Array:
    if recipe == CHANNEL:
        return scale
    return jnp.repeat(jnp.repeat(scale, WIDTH[recipe], 0), WIDTH[recipe], 2)


def _stored(scale: jax.Array, recipe: str) -> jax.Array:
    return e8m0.encode(scale) if recipe == MX else scale


def _read(scales: jax.Array) -> jax.Array:
    """float32."""
    return e8m0.decode(scales) if scales.dtype == jnp.uint8 else scales.astype(jnp.float32)
