"""Derives a separate random stream for every use of a seed.

`jax.random.fold_in(key, i)`, `jax.random.split(key, n)[i]` and the i-th draw of an `nnx.Rngs`
stream are all the same key. So two uses that both count from key(seed) would collide: a table's key
fold_in(key(seed), 1) would be the second parameter's, and the first token would be sampled with the
embedding's key. Therefore every use first folds in its name, and counts from the resulting key.
"""

from __future__ import annotations

import zlib

import jax
import numpy as np
from jax.typing import ArrayLike

PARAMS = "params"  # the network's parameters: one key per module and layer (Transformer)
MEMORY = "memory"  # the tables' rows: one key per Engram layer id
SAMPLING = "sampling"  # generated tokens: one key per token drawn before
ROUNDING = "rounding"  # rows in bfloat16: one number per Engram layer id


def stream(seed: ArrayLike, name: str) -> jax.Array:
    """The key for the use `name`, whatever generator is JAX's default. seed: from 0 to 2**32 - 1,
    traced or not."""
    return fold_name(jax.random.key(seed, impl="threefry2x32"), name)


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """The key of a part of what `key` is for."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def number(seed: int, name: str, index: int) -> int:
    """A 32-bit number of seed (0 or more), use and index, for generators that are not JAX's."""
    parts = (seed, zlib.crc32(name.encode()), index)
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
