"""Rotary position embedding of adjacent pairs, as DeepSeek-V2/V3 apply it, and its extension to
longer contexts, YaRN (arXiv 2309.00071, 3.2 and 3.4)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import YarnConfig

NO_YARN = YarnConfig()


def rope_tables(
    positions: jax.Array, dim: int, theta: float, yarn: YarnConfig = NO_YARN
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 [..., dim / 2]: pair i turns by positions * `frequencies`[i] radians.

    Args:
      positions: int32 [...], tokens since the start of the document.
      dim: width of the rotated part of a head, even.
      theta: base of the wavelengths.
      yarn: the extension to longer contexts.
    """
    angles = positions.astype(jnp.float32)[..., None] * np.float32(frequencies(dim, theta, yarn))
    return jnp.cos(angles), jnp.sin(angles)


def frequencies(dim: int, theta: float, yarn: YarnConfig = NO_YARN) -> np.ndarray:
    """Radians per token of every pair, float64 [dim / 2]: theta^(-2i / dim), and with YaRN

        (1 - r_i) theta^(-2i / dim) + r_i theta^(-2i / dim) / scale

    r_i: 0 for pairs that turn at least `beta` times within the original length, 1 for those that
    turn at most `alpha` times, linear in i between the last of the former and the first of the
    latter. (The paper's ramp is linear in the number of turns; its code and DeepSeek's are not.)
    """
    pairs = np.arange(dim // 2)
    plain = theta ** -(2 * pairs / dim)
    if yarn.scale == 1:
        return plain
    first = max(math.floor(_pair_with_turns(yarn.beta, dim, theta, yarn)), 0)
    last = min(math.ceil(_pair_with_turns(yarn.alpha, dim, theta, yarn)), dim - 1)
    ramp = np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)
    return plain * (1 - ramp) + plain / yarn.scale * ramp


def _pair_with_turns(turns: float, dim: int, theta: float, yarn: YarnConfig) -> float:
    """The (broken) number of the pair that turns so often within the original length."""
    return dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))


def yarn_softmax_factor(yarn: YarnConfig) -> float:
    """What the attention scores are multiplied with beside 1 / sqrt(width): mscale^2, with mscale =
    0.1 f ln(scale) + 1, as in DeepSeek-V2 and V3, which scale cos and sin by 1."""
    return (0.1 * yarn.mscale * math.log(yarn.scale) + 1) ** 2


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x[2i], x[2i + 1]) of x [..., dim] by the angles of tables [..., dim / 2].

    In the result all rotated first members come before all second ones. Queries and keys are
    permuted alike, which changes no dot product and saves a strided write.
    """
    return rotate(pairs_apart(x), cos, sin)


def pairs_apart(x: jax.Array) -> jax.Array:
    """x [..., dim] with all first members of pairs before all second ones. Done to the columns of
    a matrix, it is done to the products."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`apply_rope` of x whose pairs are apart."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, second = (half.astype(wide) for half in jnp.split(x, 2, axis=-1))
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
