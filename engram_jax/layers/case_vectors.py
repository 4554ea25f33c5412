"""A learned vector for the class of a token's case, added to what its addresses read.

With config.model.engram.case, e_t of the Engram module (equation 2) becomes e_t + vectors[class].
The classes: addressing/case_classes.py. Vectors start at zero, so that a model starts as the same
one without them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from engram_jax.addressing.case_classes import CLASSES


class CaseVectors(nnx.Module):
    """rows [B, T, H, dim], classes int32 [B, T] in [0, CLASSES) -> rows [B, T, H, dim].

    case: [CLASSES, d_mem].
    """

    def __init__(self, d_mem: int, *, param_dtype: DTypeLike):
        self.case = nnx.Param(jnp.zeros((CLASSES, d_mem), param_dtype))

    def __call__(self, rows: jax.Array, classes: jax.Array) -> jax.Array:
        """The sum, in at least float32."""
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        # A product with one-hot rows: its transpose adds the gradients of a class without a scatter
        # of all tokens into ten rows. HIGHEST keeps the vectors exact on a TPU.
        one_hot = jax.nn.one_hot(classes, CLASSES, dtype=wide)
        found = jnp.matmul(one_hot, self.case[...].astype(wide), precision=lax.Precision.HIGHEST)
        return rows.astype(wide) + found.reshape(rows.shape)
