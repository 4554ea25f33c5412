"""What a kernel tells the compiler that it costs (`pl.CostEstimate`).

XLA's scheduler plans with it, and the prediction of a step (engram_jax/aot/prices.py) reads it from
the compiled text. Declared is what the kernel does, not the least that any would do: products as
large as they are run, padding and split numbers included, and an operand as often as it is fetched.
"""

from __future__ import annotations

import math
from typing import Any

from jax.experimental import pallas as pl

LANES = 128


def estimate(
    flops: int, once: Any, *fetched: tuple[Any, int], transcendentals: int = 0
) -> pl.CostEstimate:
    """The estimate of one call.

    Args:
      flops: of the products on the matrix unit; where there are none, of the multiply-adds.
      once: arrays (or jax.ShapeDtypeStructs) that are read or written once.
      fetched: (array, how often it is read).
      transcendentals: exp, tanh and the like.
    """
    moved = sum(map(array_bytes, once)) + sum(array_bytes(a) * times for a, times in fetched)
    return pl.CostEstimate(int(flops), int(transcendentals), int(moved))


def array_bytes(array: Any) -> int:
    """Of an array in HBM; one of several dimensions lies in rows of whole 128 lanes."""
    *rows, last = array.shape or (1,)
    return math.prod(rows) * (pl.cdiv(last, LANES) * LANES if rows else last) * array.dtype.itemsize
