"""The argument shapes of mHC that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """tokens T, streams n, width d."""

    tokens: int
    streams: int
    d: int

    @property
    def coefficients(self) -> int:
        """2 n + n^2: columns of fn."""
        return 2 * self.streams + self.streams**2


TINY = (
    Shape(1, 1, 128),
    Shape(128, 2, 256),
    Shape(300, 4, 256),
    Shape(150, 3, 384),
    Shape(77, 8, 128),
)
ENGRAM27B = Shape(8192, 4, 2560)
DEEPSEEK_V41 = Shape(8192, 4, 5120)
RAGGED = Shape(8000, 4, 2560)
REAL = {"engram27b": ENGRAM27B, "deepseek_v41": DEEPSEEK_V41, "ragged": RAGGED}


def pre_arrays(s: Shape, dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(x, fn, base, scale, norm_gain) of mhc_pre."""
    width, parameter = s.streams * s.d, jnp.float32
    return (
        jax.ShapeDtypeStruct((s.tokens, s.streams, s.d), dtype),
        jax.ShapeDtypeStruct((width, s.coefficients), parameter),
        jax.ShapeDtypeStruct((s.coefficients,), parameter),
        jax.ShapeDtypeStruct((3,), parameter),
        jax.ShapeDtypeStruct((width,), parameter),
    )


def merge_arrays(s: Shape, dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(x, y, post, res) of mhc_merge."""
    return (
        jax.ShapeDtypeStruct((s.tokens, s.streams, s.d), dtype),
        jax.ShapeDtypeStruct((s.tokens, s.d), dtype),
        jax.ShapeDtypeStruct((s.tokens, s.streams), jnp.float32),
        jax.ShapeDtypeStruct((s.tokens, s.streams, s.streams), jnp.float32),
    )
