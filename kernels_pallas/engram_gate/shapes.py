"""The argument shapes of the gate that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.engram_gate.quantise import E4M3, MX, WIDTH, Quantised


@dataclass(frozen=True)
class Shape:
    """tokens T, d_mem C, streams M, width d."""

    tokens: int
    d_mem: int
    streams: int
    d: int


TINY = (
    Shape(1, 128, 1, 128),
    Shape(40, 128, 4, 256),
    Shape(200, 256, 2, 128),
    Shape(300, 128, 3, 384),
    Shape(77, 384, 8, 128),
)
ENGRAM27B = Shape(8192, 1280, 4, 2560)
DEEPSEEK_V41 = Shape(8192, 6144, 4, 5120)
REAL = {"engram27b": ENGRAM27B, "deepseek_v41": DEEPSEEK_V41}


def arrays(
    s: Shape, dtype: jnp.dtype, recipe: str | None = None, *, prepared: bool = False
) -> tuple:
    """(rows, weights, streams, gain, bias, mask) as jax.ShapeDtypeStructs; prepared: rows and
    weights are FP8."""
    rows, weights = (s.tokens, s.d_mem), (s.d_mem, s.streams + 1, s.d)
    of_rows, of_weights = (_array(shape, dtype) for shape in (rows, weights))
    if prepared and recipe is not None:
        width = WIDTH.get(recipe)
        scale = jnp.uint8 if recipe == MX else jnp.float32
        groups = s.d_mem // width if width else 1
        columns = s.d // width if width else s.d
        of_rows = Quantised(_array(rows, E4M3), _array((s.tokens, groups), scale), recipe)
        of_weights = Quantised(
            _array(weights, E4M3), _array((groups, s.streams + 1, columns), scale), recipe
        )
    streams = _array((s.tokens, s.streams, s.d), dtype)
    gain, bias = (_array((s.streams + k, s.d), jnp.float32) for k in (0, 1))
    return of_rows, of_weights, streams, gain, bias, _array((s.tokens,), jnp.bool_)


def _array(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
