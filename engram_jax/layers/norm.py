"""RMSNorm, the network's only normalisation, computed in at least float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


def compute_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of reductions and softmaxes: float32, or float64 if `x` is float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms_norm(x: jax.Array, gain: jax.Array | None, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2 over the last axis) + eps) * gain.

    Args:
      x: [..., d], or [..., M, d] with one gain per group.
      gain: None, [d] or [M, d].
      eps: added to the mean square.

    Returns:
      Shape and dtype of `x`; computed in float32 (float64 if `x` is float64).
    """
    wide = x.astype(compute_dtype(x))
    y = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if gain is not None:
        y = y * gain.astype(y.dtype)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a trained gain of shape [d] or, for M groups, [M, d] over inputs [..., M, d].

    gain_offset: the stored parameter is gain - gain_offset (1.0 for checkpoints that multiply by
      1 + weight, such as Qwen's); the gain itself starts at one either way.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        eps: float,
        *,
        gain_offset: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.eps = eps
        self.gain_offset = gain_offset
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.gain = nnx.Param(jnp.full(shape, 1.0 - gain_offset, param_dtype))

    def scale(self) -> jax.Array:
        """The gain itself, whatever the stored convention."""
        return self.gain[...] + self.gain_offset if self.gain_offset else self.gain[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale(), self.eps)
