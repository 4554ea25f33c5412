"""The argument shapes of the short convolution that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """batch B, tokens T, streams M, width d, taps K, positions between taps."""

    batch: int
    tokens: int
    streams: int
    d: int
    kernel: int
    dilation: int

    @property
    def tail(self) -> int:
        """L, positions of history."""
        return (self.kernel - 1) * self.dilation


TINY = (
    Shape(1, 1, 1, 128, 4, 3),
    Shape(2, 40, 3, 256, 4, 3),
    Shape(1, 300, 2, 128, 8, 8),
    Shape(2, 129, 1, 384, 1, 1),
    Shape(1, 256, 1, 128, 2, 5),
    Shape(3, 64, 1, 512, 3, 1),
)
ENGRAM27B = Shape(1, 8192, 4, 2560, 4, 3)
DEEPSEEK_V41 = Shape(1, 8192, 4, 5120, 4, 3)
REAL = {"engram27b": ENGRAM27B, "deepseek_v41": DEEPSEEK_V41}


def arrays(s: Shape, dtype: Any) -> tuple:
    """(u, gain, taps, segments) as jax.ShapeDtypeStructs."""
    return (
        jax.ShapeDtypeStruct((s.batch, s.tokens, s.streams, s.d), dtype),
        jax.ShapeDtypeStruct((s.streams, s.d), jnp.float32),
        jax.ShapeDtypeStruct((s.kernel, s.streams, s.d), jnp.float32),
        jax.ShapeDtypeStruct((s.batch, s.tokens), jnp.int32),
    )
