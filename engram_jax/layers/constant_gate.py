"""The gated value with a gate that no context decides (config.model.engram.gate).

    "one"      u_m = value              no gate
    "learned"  u_m = sigmoid(b_m) value  one constant per branch; b_m starts at 0

Without a query there are no keys: of equation 3 only the value is left, a product of matrices like
any other, for which there is no kernel. It rounds as the gate's reference does
(kernels_pallas/engram_gate/reference.py): the value and all after it in at least float32, u rounded
once to the streams' dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.engram_gate.reference import keys_and_value, through_fp8
from kernels_pallas.remat import keeps_arguments


@keeps_arguments
def constant_gate(
    rows: jax.Array,
    weights: jax.Array,
    bias: jax.Array | None,
    logit: jax.Array | None,
    mask: jax.Array | None,
    *,
    branches: int,
    dtype: DTypeLike,
    recipe: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The value of every branch, and the gates.

    Args:
      rows: e, [..., C] with C = d_mem, in the projection's dtype.
      weights: [C, 1, d] of the value.
      bias: [1, d] or None.
      logit: b, [branches]; None = no gate.
      mask: bool [...] or None; False = a token without memory: gate and output are 0.
      branches: how many of them there are.
      dtype: of the result.
      recipe: None, or how rows and weights are rounded to FP8 (quantise.RECIPES).

    Returns:
      ([..., branches, d] in `dtype`, gates [..., branches] in at least float32, or None without).
    """
    narrow = rows.dtype
    rows, weights = through_fp8(rows, weights.astype(narrow), recipe)
    _, value = keys_and_value(rows, weights, bias, narrow)
    u, gate = jnp.broadcast_to(value, (*value.shape[:-2], branches, value.shape[-1])), None
    if logit is not None:
        gate = jnp.broadcast_to(jax.nn.sigmoid(logit.astype(u.dtype)), u.shape[:-1])
        u = gate[..., None] * value
    if mask is not None:
        u = jnp.where(mask[..., None, None], u, 0)
        gate = None if gate is None else jnp.where(mask[..., None], gate, 0)
    return u.astype(dtype), gate
